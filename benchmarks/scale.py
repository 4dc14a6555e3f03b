"""How fast Ray on this machine answers images, beside ``cmt-predict``, and how it grows with workers.

    python benchmarks/scale.py throughput BUNDLE PHOTOS [--rounds 3] [--repeat 6] [--into docs/scale.md]
    python benchmarks/scale.py growth BUNDLE [--workers 1,2,4,8,16] [--into docs/scale.md]
    python benchmarks/scale.py calibration BUNDLE PHOTOS [--images 100] [--rounds 2] [--into docs/scale.md]

``throughput``: the same images, in turn, through ``Predictor.attempt`` as ``cmt-predict`` calls it, and as
``cmt-verify --ray`` answers them with one worker a core, on a cluster that is running. ``PHOTOS`` is a folder
of images. Each way answers a quarter of the images and then all of them; what the others took is told, so
that the start of processes and models cancels out. The time of processors counts all processes of Ray; a
machine that is busy with something else hardly changes it.

``growth``: workers whose model sleeps for 10 ms an image and needs no processor, so that more of them than
this machine has cores can be simulated. What is left to 100 % is what Ray, decoding, the driver and the
writing of the answers cost.

``calibration``: int8 for ONNX Runtime, of the float graph of an fp32 bundle, in turn on one machine and on a
cluster that is running, with one worker a core. It also compares the bytes, and ends with an error where they
differ. What is measured on the images is shared among the workers; the rest stays where the command runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
from common import say

from cmt_edge.calib import CalibrationSet, quantize
from cmt_edge.calib.generated import generate
from cmt_edge.calib.integer_layers import measure_conv_ranges
from cmt_edge.calib.shards import ClusterStatistics
from cmt_edge.calib.statistics import Batches, Images, LocalStatistics, Measured, Request, Statistics
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.cores import count_cores
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.host import describe_host
from cmt_edge.deploy.preprocessing import Preprocess
from cmt_edge.deploy.report.tables import format_table
from cmt_edge.deploy.scale.answers import AnswersFolder
from cmt_edge.deploy.scale.cluster import Cluster, import_ray
from cmt_edge.deploy.scale.evaluation import pack_bundle
from cmt_edge.deploy.scale.passes import TASK_IMAGES, Plan, answer_all
from cmt_edge.deploy.scale.records import Record
from cmt_edge.deploy.scale.worker import Answerer, Subject

SLEEP_S = 0.010
"""Seconds that the simulated model takes for an image."""

TASKS_EACH = 8
"""Tasks of each simulated worker."""

CHUNK = 16
"""Images that go through the model at once, as in ``cmt-verify``."""

BEGIN, END = "<!-- benchmarks/scale.py {}: begin -->", "<!-- benchmarks/scale.py {}: end -->"
"""Around the figures in the documentation."""


@dataclass(frozen=True)
class Cost:
    """What it took to answer some images.

    Attributes:
        images: number of them.
        seconds: by the clock.
        cpu: seconds of processors, of this process and of those that it started.
    """

    images: int
    seconds: float
    cpu: float

    def compare(self, smaller: Cost) -> tuple[float, float]:
        """Images a second, and milliseconds of processors an image, of the images that ``smaller`` did not
        have: what starting takes is in both, and cancels out."""
        images = self.images - smaller.images
        return images / (self.seconds - smaller.seconds), 1000 * (self.cpu - smaller.cpu) / images


class Meter:
    """Measures from when it is made."""

    def __init__(self) -> None:
        self._start, self._ticks = time.perf_counter(), read_ticks()
        self.cost = Cost(0, 0.0, 0.0)
        """Up to the last call."""

    def note(self, done: int, _: int = 0) -> None:
        """Note that ``done`` images are answered. Processes that have ended do not count: they are workers of
        earlier runs."""
        ticks = sum(now - self._ticks.get(number, 0) for number, now in read_ticks().items())
        cpu = ticks / os.sysconf("SC_CLK_TCK")
        self.cost = Cost(done, time.perf_counter() - self._start, cpu)


def read_ticks() -> dict[int, int]:
    """Process -> the time of processors that it took, for this process and its descendants."""
    ticks, children = dict[int, int](), dict[int, list[int]]()
    for number in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            values = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
            ticks[int(number)] = int(values[11]) + int(values[12])
            children.setdefault(int(values[1]), []).append(int(number))
    own, left = dict[int, int](), [os.getpid()]
    while left:
        number = left.pop()
        own[number] = ticks.get(number, 0)
        left += children.get(number, [])
    return own


class Sleeping(Answerer):
    """A model that takes :data:`SLEEP_S` an image and no processor: that of a GPU, or of another machine."""

    def __call__(self, table: Any) -> Any:
        time.sleep(SLEEP_S * table.num_rows)
        return super().__call__(table)


@contextmanager
def running(cores: int) -> Iterator[tuple[Cluster, float]]:
    """A cluster on this machine with ``cores`` cores, real or not, and the seconds that its start took."""
    ray, start = import_ray(), time.perf_counter()
    ray.init(
        address="local",
        num_cpus=cores,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="CRITICAL",
    )
    took = time.perf_counter() - start
    try:
        with Cluster("") as cluster:
            yield cluster, took
    finally:
        ray.shutdown()


def predict(bundle: Path, paths: Sequence[Path]) -> Cost:
    """As ``cmt-predict`` does it."""
    meter = Meter()
    with Predictor.load(bundle, throughput=True, cache=False) as predictor:
        deque(predictor.attempt(paths, copy=False), maxlen=0)
        meter.note(len(paths))
    return meter.cost


def answer(cluster: Cluster, subject: Subject, plan: Plan) -> Cost:
    """As ``cmt-verify --ray`` does it; the answers are written, and then deleted."""
    cluster.connect()
    meter = Meter()
    with tempfile.TemporaryDirectory() as name:
        folder = AnswersFolder(Path(name) / "answers", {})
        answer_all(cluster, subject, replace(plan, progress=meter.note), folder)
    return meter.cost


def measure_throughput(args: argparse.Namespace) -> tuple[list[list[str]], list[str], str]:
    """Both ways in turn: the table's rows, its header, and a sentence."""
    bundle = Bundle.open(args.bundle)
    images = ImageSet(args.photos, labelled=False)
    paths = [images.path.absolute() / item.name for item in images] * args.repeat
    subject = Subject(bundle.title, pack_bundle(bundle), source=str(images.path))
    plan = Plan(
        [Record(f"{i}", "none", str(path)) for i, path in enumerate(paths)], CHUNK, None, bundle.labels
    )
    few = len(paths) // 4
    found: dict[str, list[tuple[float, float]]] = {"cmt-predict": [], "--ray": []}
    with running(count_cores()) as (cluster, started):
        for number in range(args.rounds):
            alone = [predict(args.bundle, part) for part in (paths[:few], paths)]
            plans = replace(plan, records=plan.records[:few]), plan
            shared = [answer(cluster, subject, part) for part in plans]
            found["cmt-predict"].append(alone[1].compare(alone[0]))
            found["--ray"].append(shared[1].compare(shared[0]))
            say(f"round {number + 1}: {found['cmt-predict'][-1]} and {found['--ray'][-1]}")
    first = shared[0].seconds - few / found["--ray"][-1][0]
    best = max(rate for rate, _ in found["cmt-predict"])
    text = (
        f"{Path(args.bundle).name}, {len(paths) - few} photographs, {args.rounds} rounds in turn. The cluster"
        f" started in {started:.1f} s, and the workers with their models in {first:.1f} s."
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
                few = replace(plan, records=records[: len(records) // 4])
                small = answer(cluster, subject, few)
                rate, _ = answer(cluster, subject, plan).compare(small)
            ideal = workers / SLEEP_S
            say(f"{workers} workers: {rate:.0f} images/s")
            rows.append([str(workers), f"{rate:.0f}", f"{ideal:.0f}", f"{100 * rate / ideal:.0f} %"])
    text = f"A model that sleeps for {1000 * SLEEP_S:.0f} ms an image, {TASKS_EACH} tasks a worker."
    return rows, ["workers", "images/s", "of the models alone", "share"], text


class Timed:
    """Statistics whose time is counted."""

    def __init__(self, inner: Statistics) -> None:
        self._inner, self.seconds = inner, 0.0

    def __len__(self) -> int:
        return len(self._inner)

    def list_batches(self) -> Images:
        return self._inner.list_batches()

    def measure(self, request: Request) -> Measured:
        start = time.perf_counter()
        try:
            return self._inner.measure(request)
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True)
class Calibrated:
    """A calibration: its seconds, those of them that were spent measuring on images, seconds of processors,
    and what came of it."""

    seconds: float
    shared: float
    cpu: float
    result: bytes


def calibrate_once(
    model: onnx.ModelProto, data: CalibrationSet, spec: Preprocess, inner: Statistics
) -> Calibrated:
    """As ``cmt-export --precision int8 --format onnx`` does it."""
    meter, timed = Meter(), Timed(inner)
    made = quantize(model, data, spec, statistics=timed)
    ranges = measure_conv_ranges(made.model, timed)
    meter.note(len(data))
    result = made.model.SerializeToString(deterministic=True) + repr(ranges).encode()
    return Calibrated(meter.cost.seconds, timed.seconds, meter.cost.cpu, result)


def measure_calibration(args: argparse.Namespace) -> tuple[list[list[str]], list[str], str]:
    """Both ways in turn."""
    bundle = Bundle.open(args.bundle)
    spec, model = bundle.preprocess, onnx.load(bundle.path / "model.onnx")
    data = CalibrationSet.choose(args.photos, args.images, spec)
    found: dict[str, list[Calibrated]] = {"one machine": [], "--ray": []}
    with running(count_cores()) as (cluster, _):
        cluster.connect()
        for number in range(args.rounds):
            alone = calibrate_once(model, data, spec, LocalStatistics(Batches(data, spec, None)))
            shared = calibrate_once(model, data, spec, ClusterStatistics(cluster, data, spec))
            if alone.result != shared.result:
                raise SystemExit("the cluster calibrates another graph")
            found["one machine"].append(alone)
            found["--ray"].append(shared)
            say(f"round {number + 1}: {alone.seconds:.1f} and {shared.seconds:.1f} s")
    rows = [_make_calibration_row(name, results) for name, results in found.items()]
    header = ["", "seconds, median", "on the images", "the rest", "CPU seconds"]
    text = (
        f"{Path(args.bundle).name} to int8 for ONNX Runtime, {len(data)} photographs, {args.rounds} rounds in"
        " turn on a cluster that was running. The graphs were equal, byte for byte."
    )
    return rows, header, text


def _make_calibration_row(name: str, results: Sequence[Calibrated]) -> list[str]:
    """A line of the table."""
    seconds = statistics.median(one.seconds for one in results)
    shared = statistics.median(one.shared for one in results)
    cpu = statistics.median(one.cpu for one in results)
    rest = statistics.median(one.seconds - one.shared for one in results)
    return [name, f"{seconds:.1f}", f"{shared:.1f}", f"{rest:.1f}", f"{cpu:.0f}"]


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
    calibration = parts.add_parser("calibration")
    calibration.add_argument("bundle", type=Path, help="in fp32")
    calibration.add_argument("photos", type=Path)
    calibration.add_argument("--images", type=int, default=100)
    calibration.add_argument("--rounds", type=int, default=2)
    for one in (throughput, growth, calibration):
        one.add_argument("--into", type=Path, help="a page whose figures are replaced")
    return p.parse_args()


def main() -> None:
    """Measure one part, and print it."""
    args = parse()
    measures = {
        "throughput": measure_throughput,
        "growth": measure_growth,
        "calibration": measure_calibration,
    }
    measure = measures[args.part]
    rows, header, text = measure(args)
    host = describe_host()
    page = f"{text} {host.cpu}, {count_cores()} cores.\n\n{format_table(header, rows, True)}"
    print(page)
    if args.into:
        write_into(args.into, args.part, page)


if __name__ == "__main__":
    main()
