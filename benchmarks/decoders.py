"""Other decoders and resizers of JPEG images beside Pillow: milliseconds, and what they change in the pixels.

    python benchmarks/decoders.py ../shared/data --work WORK [--natural FOLDER] [--libturbojpeg FILE]

A table for each set of images: ``imagenet_sample/*.JPEG`` enlarged to 12 megapixels and to 1920 x 1080, as in
``photographs.py``, and with ``--natural`` that script's folder of photographs as cameras made them. All are
decoded, resized to a short side of 256 pixels and cropped to 224, one thread, in turns. The base is Pillow as
a :class:`~cmt_edge.Predictor` calls it.

``--work`` is where two environments are made the first time: one for Pillow-SIMD, which takes Pillow's place,
and one for all others. PyTurboJPEG needs the library itself: ``apt-get download libturbojpeg0 && dpkg -x
libturbojpeg0_*.deb x`` unpacks one to ``x/usr/lib/x86_64-linux-gnu/libturbojpeg.so.0``. Pillow-SIMD is
compiled, with AVX2, for which it needs a compiler and the headers of libjpeg and zlib. torchvision is left
out: it has no build without CUDA for the PyTorch of ``constraints.txt`` here, and its decoder is
libjpeg-turbo, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from common import say
from peers_environments import MissingEnvironment, install, make_variables
from photographs import CAMERA, SCREEN, USUAL, enlarge

from cmt_edge.deploy.decoding import decode
from cmt_edge.deploy.measure.host import describe_host
from cmt_edge.deploy.preprocessing import compute_geometry
from cmt_edge.deploy.report import format_table

PILLOW = f"pillow=={PIL.__version__}"
"""The Pillow that this interpreter has."""
ENVIRONMENTS: dict[str, tuple[str, ...]] = {
    "decoders": (
        "numpy",
        PILLOW,
        "simplejpeg==1.9.0",
        "PyTurboJPEG==1.8.2",
        "pyvips==3.2.0",
        "pyvips-binary==8.18.7",
        "opencv-python-headless==5.0.0.93",
    ),
    "pillow-simd": ("numpy", "pillow-simd==12.1.1.post0"),
}
"""Name of an environment -> what pip installs there."""
VARIABLES = {"CC": "cc -mavx2", "VIPS_CONCURRENCY": "1", "OMP_NUM_THREADS": "1"}
"""How Pillow-SIMD is compiled, and that all tools use one thread."""
WAYS = {
    "Pillow, as a Predictor calls it": ("decoders", "pillow:full"),
    "Pillow, reduced": ("decoders", "pillow:reduced"),
    "Pillow-SIMD": ("pillow-simd", "pillow:full"),
    "Pillow-SIMD, reduced": ("pillow-simd", "pillow:reduced"),
    "simplejpeg, resized by Pillow": ("decoders", "simplejpeg:full"),
    "simplejpeg, reduced, resized by Pillow": ("decoders", "simplejpeg:reduced"),
    "PyTurboJPEG, resized by Pillow": ("decoders", "turbojpeg:full"),
    "PyTurboJPEG, reduced, resized by Pillow": ("decoders", "turbojpeg:reduced"),
    "OpenCV, resized by Pillow": ("decoders", "opencv:pillow"),
    "OpenCV, resized by area": ("decoders", "opencv:INTER_AREA"),
    "OpenCV, resized by cubic": ("decoders", "opencv:INTER_CUBIC"),
    "pyvips, resized by Pillow": ("decoders", "vips:pillow"),
    "pyvips, resized by cubic": ("decoders", "vips:cubic"),
    "pyvips, thumbnail (reduced)": ("decoders", "vips:thumbnail"),
}
"""Name of a row -> environment and way; the first one is the base."""
TURNS = 5
"""Turns in which all rows decode each image twice; the second time counts."""
COUNT = 12
"""Images of a set."""
TIMED = 4
"""How many of them are timed; the pixels of all are compared."""


@dataclass
class Row:
    """A tool at work.

    Attributes:
        child: its process.
        ms: milliseconds of each image, one for each turn.
        pixels: what it made of each image.
    """

    child: subprocess.Popen[str]
    ms: dict[Path, list[float]] = field(default_factory=dict)
    pixels: dict[Path, np.ndarray] = field(default_factory=dict)

    def run(self, job: dict[str, Any]) -> list[float]:
        """Milliseconds of each round of a job."""
        assert self.child.stdin
        assert self.child.stdout
        self.child.stdin.write(json.dumps(job) + "\n")
        self.child.stdin.flush()
        answer = self.child.stdout.readline()
        if not answer:
            raise RuntimeError("the tool ended")
        return [float(value) for value in json.loads(answer)["ms"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="FOLDER")
    parser.add_argument("--work", type=Path, required=True, help="where environments and images lie")
    parser.add_argument("--natural", type=Path, help="folder of large photographs")
    parser.add_argument("--libturbojpeg", default="", help="the library that PyTurboJPEG calls")
    args = parser.parse_args()
    sample = [p.read_bytes() for p in sorted((args.data / "imagenet_sample").glob("*.JPEG"))[:COUNT]]
    sets = {"4000 x 3000": enlarge(sample, CAMERA), "1920 x 1080": enlarge(sample, SCREEN)}
    if args.natural:
        sets["natural"] = [path.read_bytes() for path in sorted(args.natural.glob("*.jpg"))[:COUNT]]
    errors: dict[str, str] = {}
    with ExitStack() as stack:
        rows: dict[str, Row] = {}
        for name, (environment, way) in WAYS.items():
            if errors and not rows:
                raise SystemExit(f"error: the base cannot be measured: {errors.popitem()[1]}")
            try:
                python = find_python(args.work.absolute(), environment)
                rows[name] = stack.enter_context(started(python, way, args.libturbojpeg))
            except (MissingEnvironment, RuntimeError) as exc:
                errors[name] = str(exc)
        for title, files in sets.items():
            print(f"\n{title}:\n\n{measure(files, rows, args.work / 'images')}", flush=True)
    for name, error in errors.items():
        print(f"\n{name}: {error}")
    host = describe_host()
    print(f"\n{host.cpu} ({', '.join(host.flags)}), {host.cores} cores; {PILLOW}")


def find_python(work: Path, name: str) -> str:
    """The interpreter of an environment, which is made the first time."""
    place = work / name
    python, complete = str(place / "bin" / "python"), place / "complete"
    if not complete.exists():
        say(f"install {', '.join(ENVIRONMENTS[name])}")
        venv.create(place, with_pip=True, clear=True)
        os.environ.update(VARIABLES)
        install(python, list(ENVIRONMENTS[name]))
        complete.touch()
    return python


@contextmanager
def started(python: str, way: str, library: str) -> Iterator[Row]:
    """A tool's process; raises ``RuntimeError`` with its last words where it cannot start."""
    script = Path(__file__).with_name("decoders_child.py")
    command = [python, str(script), way, library]
    trial = subprocess.run(
        command, check=False, input="", capture_output=True, text=True, env=make_environment()
    )
    if trial.returncode:
        raise RuntimeError((trial.stderr.strip().splitlines() or ["it ended"])[-1])
    child = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=make_environment(),
    )
    with child:
        yield Row(child)
        assert child.stdin
        child.stdin.close()


def make_environment() -> dict[str, str]:
    """Variables of a tool's process."""
    return make_variables() | VARIABLES


def measure(files: Sequence[bytes], rows: dict[str, Row], folder: Path) -> str:
    """A table of all rows for one set of images."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[Path, dict[str, Any]] = {}
    for number, data in enumerate(files):
        place = folder / f"{number}.jpg"
        place.write_bytes(data)
        width, height = decode(data, "apply").size
        size, box = compute_geometry(width, height, USUAL, data)
        jobs[place] = {"file": str(place), "size": size, "box": box, "rounds": 2, "keep": ""}
    for row in rows.values():
        row.ms, row.pixels = {}, {}
        for place, job in jobs.items():
            kept = folder / "pixels.npy"
            row.run(job | {"rounds": 1, "keep": str(kept)})
            row.pixels[place] = np.load(kept).astype(int)
    for _ in range(TURNS):
        for place, job in list(jobs.items())[:TIMED]:
            for row in rows.values():
                row.ms.setdefault(place, []).append(row.run(job)[-1])
    return format_rows(rows)


def format_rows(rows: dict[str, Row]) -> str:
    base = next(iter(rows.values()))
    lines = []
    for name, row in rows.items():
        ratios = [np.array(row.ms[place]) / np.array(base.ms[place]) for place in base.ms]
        differences = [np.abs(row.pixels[place] - base.pixels[place]) for place in base.pixels]
        lines.append(
            [
                name,
                f"{np.median([row.ms[place] for place in row.ms]):.1f}",
                f"{np.median(ratios):.2f}",
                f"{np.mean([d.mean() for d in differences]):.2f}",
                f"{max(d.mean() for d in differences):.2f}",
                f"{max(d.max() for d in differences)}",
            ]
        )
    head = ["decoder", "ms", "of the first row", "mean difference", "of the worst image", "largest"]
    return format_table(head, lines, markdown=True)


if __name__ == "__main__":
    sys.exit(main())
