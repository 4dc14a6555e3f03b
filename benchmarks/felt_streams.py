"""Streams of large JPEG files, and a folder of very many: ``felt.py --what stream`` and ``--what folder``."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import add, truediv
from pathlib import Path
from statistics import median

from by_hand import Preparation, classify_all, compile_bundle, decode_all, infer_only
from PIL import Image

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.report import format_table

LARGE = (1920, 1080)
"""Width and height in pixels of the images of a stream."""
LARGE_FILES = 16
"""Number of different files in a stream."""
QUALITY = 90
"""JPEG quality of the enlarged images."""
LINKS = 10_000
"""Number of files in the folder: hard links to a few."""
SAMPLE_S = 0.2
"""Seconds between two looks at a process's memory."""
SETTLED = 0.1
"""Share of a folder after which a process's memory should have stopped growing."""

PREDICT = "from cmt_edge.startup import predict; raise SystemExit(predict())"
"""The program of ``cmt-predict``."""


def enlarge_images(source: Path, folder: Path) -> list[Path]:
    """The first images of ``source`` as JPEG files of :data:`LARGE`, in ``folder``."""
    files = []
    for path in sorted(source.iterdir())[:LARGE_FILES]:
        file = folder / f"{path.stem}.jpg"
        with Image.open(path) as image:
            image.convert("RGB").resize(LARGE, Image.Resampling.BICUBIC).save(file, quality=QUALITY)
        files.append(file)
    return files


def measure_stream(path: Path, images: Path, rounds: int, threads: int, seconds: float) -> str:
    """The tables of ``--what stream``: one for each way to decode."""
    bundle = Bundle.open(path)
    with tempfile.TemporaryDirectory() as folder:
        files = enlarge_images(images, Path(folder))
        tables = [
            f"decode: {decode}\n\n{compare_streams(bundle, files, decode, rounds, threads, seconds)}"
            for decode in ("full", "reduced")
        ]
    return "\n\n".join(tables)


def compare_streams(
    bundle: Bundle, files: list[Path], decode: str, rounds: int, threads: int, seconds: float
) -> str:
    """The model alone, decoding alone, both by hand, and ``stream()``, in turn."""
    spec = replace(bundle.preprocess, decode=decode)
    prepare = Preparation(spec)
    compiled = compile_bundle(bundle, threads, throughput=True)
    with Predictor.load(bundle, threads=threads, throughput=True, cache=False) as predictor:
        predictor.spec = spec
        row = prepare(files[0])
        ways: dict[str, Callable[[list[Path]], object]] = {
            "model alone": lambda chosen: infer_only(compiled, row, len(chosen)),
            "decoding alone": lambda chosen: consume(decode_all(prepare, chosen, threads)),
            "both, by hand": lambda chosen: consume(classify_all(compiled, prepare, chosen)),
            "stream()": lambda chosen: consume(predictor.stream(chosen, workers=2)),
        }
        turns = take_turns(ways, files, rounds, seconds)
    return format_stream(turns)


def consume(items: Iterable[object]) -> None:
    """Go through all of ``items``."""
    for _ in items:
        pass


@dataclass
class Turns:
    """What a way took in every round, seconds an image: by the clock, and of all processors together."""

    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


def take_turns(
    ways: dict[str, Callable[[list[Path]], object]], files: list[Path], rounds: int, seconds: float
) -> dict[str, Turns]:
    """Time each way in turn, about ``seconds`` each, after one round that does not count."""
    counts = {name: len(files) for name in ways}
    turns = {name: Turns() for name in ways}
    for number in range(rounds + 1):
        for name in list(ways) if number % 2 else list(ways)[::-1]:
            chosen = [files[i % len(files)] for i in range(counts[name])]
            start, cpu = time.perf_counter(), time.process_time()
            ways[name](chosen)
            taken = (time.perf_counter() - start) / len(chosen)
            counts[name] = max(len(files), int(seconds / taken))
            if number:
                turns[name].clock.append(taken)
                turns[name].processor.append((time.process_time() - cpu) / len(chosen))
    return turns


def format_stream(turns: dict[str, Turns]) -> str:
    """Medians, and medians of the ratios within a round: of the images a second to those of the slower of the
    model and decoding, to those of both at best on the same cores, and to those of the loop by hand."""
    model, decoding = turns["model alone"], turns["decoding alone"]
    slower = list(map(max, model.clock, decoding.clock))
    both = Turns(
        list(map(add, model.clock, decoding.clock)),
        list(map(add, model.processor, decoding.processor)),
    )
    bases = (slower, both.clock, turns["both, by hand"].clock)
    rows = [
        [
            name,
            f"{1 / median(taken.clock):.1f}",
            *(f"{compare_rounds(base, taken.clock):.2f}" for base in bases),
            f"{1e3 * median(taken.processor):.1f}",
        ]
        for name, taken in {**turns, "sum of the two alone": both}.items()
    ]
    header = ["1080p JPEG files", "images/s", "of the slower", "of the sum", "of by hand", "processor ms"]
    return format_table(header, rows, markdown=True)


def compare_rounds(values: list[float], base: list[float]) -> float:
    """Median of the ratios within a round."""
    return median(map(truediv, values, base))


@dataclass
class Watched:
    """What a process that answers line by line took.

    Attributes:
        start_s: seconds to its first answer.
        rest_s: seconds from the first to the last answer.
        processor_s: seconds of all processors together, from its start to its end.
        memory: resident memory in MB, with the number of answers until then.
    """

    start_s: float = 0.0
    rest_s: float = 0.0
    processor_s: float = 0.0
    memory: list[tuple[int, float]] = field(default_factory=list)

    @property
    def settled(self) -> float:
        """Largest memory until :data:`SETTLED` of the answers were given, MB."""
        soon = max(1, SETTLED * self.memory[-1][0])
        return max(size for count, size in self.memory if count <= soon)

    @property
    def largest(self) -> float:
        """Largest memory, MB."""
        return max(size for _, size in self.memory)


def measure_folder(path: Path, images: Path, rounds: int, threads: int, links: int) -> str:
    """The table of ``--what folder``: ``cmt-predict`` over many files against the loop by hand, in turn."""
    script = str(Path(__file__).with_name("by_hand.py"))
    with tempfile.TemporaryDirectory() as made:
        folder = link_images(images, Path(made), links)
        common = [str(path), str(folder), "--threads", str(threads)]
        ways = {
            "by hand": [sys.executable, script, *common],
            "cmt-predict": [sys.executable, "-c", PREDICT, *common, "--csv", "-q"],
        }
        watched: dict[str, list[Watched]] = {name: [] for name in ways}
        for number in range(rounds):
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                watched[name].append(watch_answers(ways[name], links))
                print(f"{name}: {watched[name][-1].rest_s:.1f} s", file=sys.stderr, flush=True)
    base = [taken.rest_s for taken in watched["by hand"]]
    rows = [
        [
            name,
            f"{links / median(taken.rest_s for taken in each):.1f}",
            f"{compare_rounds([taken.rest_s for taken in each], base):.2f}",
            f"{median(taken.processor_s for taken in each):.1f}",
            f"{median(taken.start_s for taken in each):.2f}",
            f"{median(taken.settled for taken in each):.0f}",
            f"{max(taken.largest for taken in each):.0f}",
        ]
        for name, each in watched.items()
    ]
    header = [
        f"{links} files",
        "images/s",
        "time, of by hand",
        "processor s",
        "to the first s",
        f"MB at {SETTLED:.0%}",
        "MB at most",
    ]
    return format_table(header, rows, markdown=True)


def link_images(source: Path, folder: Path, count: int) -> Path:
    """``count`` names for a few JPEG files, as hard links to copies of the images of ``source``."""
    kept, many = folder / "kept", folder / "many"
    kept.mkdir()
    many.mkdir()
    files = []
    for path in sorted(source.iterdir())[:LARGE_FILES]:
        files.append(kept / path.name)
        files[-1].write_bytes(path.read_bytes())
    for number in range(count):
        os.link(files[number % len(files)], many / f"{number:05}.jpg")
    return many


def watch_answers(command: list[str], answers: int) -> Watched:
    """Run a process that prints ``answers`` lines, after a header or without one, and watch its memory."""
    watched = Watched()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = last = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None, "it was asked for"
        looked, count = 0.0, 0
        for line in process.stdout:
            if line.startswith("source,"):
                continue
            last = time.perf_counter()
            count += 1
            if count == 1:
                watched.start_s = last - start
            if last - looked > SAMPLE_S:
                watched.memory.append((count, read_memory(process.pid)))
                looked = last
    if process.returncode or count != answers:
        raise SystemExit(f"{' '.join(command)} failed after {count} answers")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    watched.processor_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    watched.rest_s = last - start - watched.start_s
    return watched


def read_memory(process: int) -> float:
    """Resident memory of a process, MB; 0 of one that has ended."""
    status = Path(f"/proc/{process}/status").read_text()
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmRSS")]
    return int(sizes[0]) / 1e3 if sizes else 0.0
