"""How fast Ray on this machine answers images, beside ``cmt-predict``, and how it grows with workers.

    python benchmarks/scale.py throughput BUNDLE PHOTOS [--rounds 3] [--repeat 6] [--into docs/scale.md]
    python benchmarks/scale.py growth BUNDLE [--workers 1,2,4,8,16] [--into docs/scale.md]

``throughput``: the same images, in turn, through ``Predictor.attempt`` as ``cmt-predict`` calls it, and as
``cmt-verify --ray`` answers them with one worker a core, on a cluster that is running. ``PHOTOS`` is a folder
of images. Counted is the steady state: the images and the time from the moment when every worker has answered
to the last answer. What the start of the cluster, and that of the workers with their models, takes is told
apart. The time of processors counts all processes of Ray; a busy machine hardly changes it.

``growth``: workers whose model sleeps for 10 ms an image and needs no processor, so that more of them than
this machine has cores can be simulated. What is left to 100 % is what Ray, decoding, the driver and the
writing of the answers cost.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from common import say

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.host import describe_host
from cmt_edge.deploy.report.tables import format_table
from cmt_edge.deploy.scale.answers import AnswersFolder, Part
from cmt_edge.deploy.scale.cluster import Cluster, count_cores, import_ray
from cmt_edge.deploy.scale.evaluation import pack_bundle
from cmt_edge.deploy.scale.passes import TASK_IMAGES, Plan, answer_all
from cmt_edge.deploy.scale.records import Record, Task
from cmt_edge.deploy.scale.worker import Answerer, Subject

SLEEP_S = 0.010
"""Seconds that the simulated model takes for an image."""

TASKS_EACH = 6
"""Tasks of each simulated worker."""

CHUNK = 16
"""Images that go through the model at once, as in ``cmt-verify``."""

BEGIN, END = "<!-- benchmarks/scale.py {}: begin -->", "<!-- benchmarks/scale.py {}: end -->"
"""Around the figures in the documentation."""


@dataclass(frozen=True)
class Moment:
    """What was done by then.

    Attributes:
        seconds: since the start.
        done: images.
        cpu: seconds of processors that this process and those that it started took.
        workers: number of workers that have answered.
    """

    seconds: float
    done: int
    cpu: float
    workers: int


@dataclass
class Clock:
    """What was done at each moment."""

    start: float = field(default_factory=time.perf_counter)
    seen: list[Moment] = field(default_factory=list)

    def note(self, done: int, workers: int = 1) -> None:
        """So many images are done, by so many workers."""
        self.seen.append(Moment(time.perf_counter() - self.start, done, read_cpu_seconds(), workers))

    def rate(self, workers: int = 1) -> float:
        """Images a second once all ``workers`` had answered: the slope of the line through what
        was done, so that it does not count whether several answered at one moment."""
        steady = self._keep_steady(workers)
        moments, done = [moment.seconds for moment in steady], [moment.done for moment in steady]
        return float(np.polyfit(moments, done, 1)[0])

    def cpu_ms(self, workers: int = 1) -> float:
        """Milliseconds of processors an image, from the same moment on."""
        steady = self._keep_steady(workers)
        return 1000 * (steady[-1].cpu - steady[0].cpu) / (steady[-1].done - steady[0].done)

    def _keep_steady(self, workers: int) -> list[Moment]:
        return [moment for moment in self.seen if moment.workers >= workers and moment.done >= TASK_IMAGES]


def read_cpu_seconds() -> float:
    """The time that this process and its descendants took, also of those that ended within one of them."""
    ticks, children = dict[int, int](), dict[int, list[int]]()
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            ticks[int(number)] = int(fields[11]) + int(fields[12])
            children.setdefault(int(fields[1]), []).append(int(number))
    total, left = 0, [os.getpid()]
    while left:
        number = left.pop()
        total += ticks.get(number, 0)
        left += children.get(number, [])
    return total / os.sysconf("SC_CLK_TCK")


class Watched(AnswersFolder):
    """A folder that notes when answers came, and of how many workers."""

    def __init__(self, path: Path, clock: Clock) -> None:
        super().__init__(path, {})
        self._clock, self._workers, self._done = clock, set[str](), 0

    def write(self, task: Task, part: Part, labels: Sequence[str]) -> None:
        """As the base class."""
        super().write(task, part, labels)
        self._workers.add(part.worker)
        self._done += len(task.records)
        self._clock.note(self._done, len(self._workers))


class Sleeping(Answerer):
    """A model that takes :data:`SLEEP_S` an image and no processor: that of a GPU, or of another machine."""

    def __call__(self, table: Any) -> Any:
        time.sleep(SLEEP_S * table.num_rows)
        return super().__call__(table)


@contextmanager
def running(cores: int) -> Iterator[tuple[Cluster, float]]:
    """A cluster on this machine with so many cores, real or not; and the seconds that its start took."""
    ray, start = import_ray(), time.perf_counter()
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="CRITICAL")
    took = time.perf_counter() - start
    try:
        with Cluster("") as cluster:
            yield cluster, took
    finally:
        ray.shutdown()


def predict(bundle: Path, paths: Sequence[Path]) -> Clock:
    """As ``cmt-predict`` does it."""
    clock = Clock()
    with Predictor.load(bundle, throughput=True) as predictor:
        for done, _ in enumerate(predictor.attempt(paths, copy=False), 1):
            if done % TASK_IMAGES == 0:
                clock.note(done)
    return clock


def answer(cluster: Cluster, subject: Subject, plan: Plan) -> Clock:
    """As ``cmt-verify --ray`` does it; the answers are written, and then deleted."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        answer_all(cluster, subject, plan, Watched(Path(folder) / "answers", clock))
    return clock


def measure_throughput(args: argparse.Namespace) -> tuple[list[list[str]], list[str], str]:
    """Both ways in turn: the table's rows, its header, and a sentence."""
    bundle = Bundle.open(args.bundle)
    images = ImageSet(args.photos, labelled=False)
    paths = [images.path.absolute() / item.name for item in images] * args.repeat
    records = [Record(f"{i}", "none", str(path)) for i, path in enumerate(paths)]
    subject = Subject(bundle.title, pack_bundle(bundle), source=str(images.path))
    plan = Plan(records, CHUNK, None, bundle.labels)
    cores = count_cores()
    found: dict[str, list[tuple[float, float]]] = {"cmt-predict": [], "--ray": []}
    starts = []
    with running(cores) as (cluster, started):
        for number in range(args.rounds):
            alone = predict(args.bundle, paths)
            found["cmt-predict"].append((alone.rate(), alone.cpu_ms()))
            shared = answer(cluster, subject, plan)
            found["--ray"].append((shared.rate(cores), shared.cpu_ms(cores)))
            starts.append(shared.seen[0].seconds)
            say(f"round {number + 1}: {found['cmt-predict'][-1]} and {found['--ray'][-1]}")
    best = max(rate for rate, _ in found["cmt-predict"])
    text = (
        f"{Path(args.bundle).name}, {len(paths)} photographs, {args.rounds} rounds in turn. The cluster"
        f" started in {started:.1f} s; a run's first task, for which a worker starts and loads the model,"
        f" took {statistics.median(starts):.1f} s."
    )
    header = ["", "images/s, median", "best", "median / best of cmt-predict", "CPU ms an image, median"]
    return [_make_row(name, figures, best) for name, figures in found.items()], header, text


def _make_row(name: str, figures: Sequence[tuple[float, float]], best: float) -> list[str]:
    """A line of the table; ``best`` is the best rate of ``cmt-predict``."""
    rates, cpu = zip(*figures, strict=True)
    rate = statistics.median(rates)
    return [
        name,
        f"{rate:.1f}",
        f"{max(rates):.1f}",
        f"{rate / best:.2f}",
        f"{statistics.median(cpu):.1f}",
    ]


def measure_growth(args: argparse.Namespace) -> tuple[list[list[str]], list[str], str]:
    """A model that sleeps, on more and more workers."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        photo = Path(name) / "photo.png"
        photo.write_bytes(generate(1, 32)[0])
        bundle = Bundle.open(args.bundle)
        packed = pack_bundle(bundle)
        for workers in args.workers:
            tasks = TASKS_EACH * workers
            records = [Record(str(i), "none", str(photo)) for i in range(TASK_IMAGES * tasks)]
            subject = Subject(bundle.title, packed, backend="fake", check=False, source=name)
            plan = Plan(records, CHUNK, workers, bundle.labels, answerer=Sleeping)
            with running(workers) as (cluster, _):
                rate = answer(cluster, subject, plan).rate(workers)
            ideal = workers / SLEEP_S
            say(f"{workers} workers: {rate:.0f} images/s")
            rows.append([str(workers), f"{rate:.0f}", f"{ideal:.0f}", f"{100 * rate / ideal:.0f} %"])
    text = f"A model that sleeps for {1000 * SLEEP_S:.0f} ms an image, {TASKS_EACH} tasks a worker."
    return rows, ["workers", "images/s", "of the models alone", "share"], text


def write_into(page: Path, part: str, text: str) -> None:
    """Put the figures between the comments of a page."""
    content = page.read_text()
    begin, end = BEGIN.format(part), END.format(part)
    before, after = content.split(begin)[0], content.split(end)[1]
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def parse() -> argparse.Namespace:
    """The command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = p.add_subparsers(dest="part", required=True)
    throughput = parts.add_parser("throughput")
    throughput.add_argument("bundle", type=Path)
    throughput.add_argument("photos", type=Path)
    throughput.add_argument("--rounds", type=int, default=3)
    throughput.add_argument("--repeat", type=int, default=6, help="how often each photograph is answered")
    growth = parts.add_parser("growth")
    growth.add_argument("bundle", type=Path, help="whose preprocessing is done for each image")
    growth.add_argument(
        "--workers",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 2, 4, 8, 16],
    )
    for one in (throughput, growth):
        one.add_argument("--into", type=Path, help="a page whose figures are replaced")
    return p.parse_args()


def main() -> None:
    """Measure one part, and print it."""
    args = parse()
    measure = measure_throughput if args.part == "throughput" else measure_growth
    rows, header, text = measure(args)
    host = describe_host()
    page = f"{text} {host.cpu}, {count_cores()} cores.\n\n{format_table(header, rows, True)}"
    print(page)
    if args.into:
        write_into(args.into, args.part, page)


if __name__ == "__main__":
    main()
