"""Models from outside the registry, exported in fp32 and int8: does it work, how near is it, how fast.

    python benchmarks/outside_models.py [--output FILE] [MODEL ...]

Without names it tries three hybrids of timm with random weights, and the five models of ``own_habits.py``. It
prints a table for ``docs/notes/outside-models.md``. Only timm's models need timm: torchvision is not needed,
because timm uses it for its data pipeline alone and this script puts empty modules in its place.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from common import check_images, deviation, say

from cmt_edge import Bundle, ExportConfig, Predictor, benchmark, export
from cmt_edge.cmt import create_model
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.errors import CmtEdgeError
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.report import format_table

HABITS = Path(__file__).with_name("own_habits.py")
"""The file with the five models."""
MODELS = (
    "timm:mobilevit_xxs",
    "timm:efficientformer_l1",
    "timm:levit_128s",
    *(f"{HABITS}:{name}" for name in ("encoder", "shared", "coordinates", "transformer", "neighbours")),
)
"""Models that are tried unless others are named."""
FORMATS = ("openvino", "onnx")
"""Formats of the bundles."""
PRECISIONS = ("fp32", "int8")
"""Precisions, of which the first is what the others are compared with."""
IMAGES = 64
"""Number of generated images on which the answers are compared."""
CALIBRATION = 64
"""Number of generated images for calibration."""
PROTOCOL = Protocol(iters=50, seconds=1.5, warmup_seconds=0.5)
"""How long two precisions are measured in turns."""
HEADER = ("model", "format", "precision", "MMACs", "same class %", "largest", "mean", "latency", "result")
"""The columns of the table."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        model, format, precision: what was exported.
        macs: multiply-accumulates of an image, or ``None`` where they are unknown.
        agreement: share of images with the reference's class, percent.
        largest: difference of a logit, in standard deviations of the reference's.
        mean: the same, the mean of all logits.
        ratio: median latency as a share of that of fp32.
        refusal: why there is no bundle.
    """

    model: str
    format: str
    precision: str
    macs: int | None = None
    agreement: float | None = None
    largest: float | None = None
    mean: float | None = None
    ratio: float | None = None
    refusal: str = ""

    def cells(self) -> list[str]:
        """The line as text."""
        return [
            self.model,
            self.format,
            self.precision,
            "-" if self.macs is None else f"{self.macs / 1e6:.1f}",
            _format_value(self.agreement, ".1f"),
            _format_value(self.largest, ".2g"),
            _format_value(self.mean, ".2g"),
            _format_value(self.ratio, ".2f"),
            self.refusal or "verified",
        ]


def _format_value(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def try_model(name: str, form: str, folder: Path) -> list[Row]:
    """Export one model in every precision of a format, compare and measure it."""
    shown = name.replace(f"{HABITS}", HABITS.name)
    rows: list[Row] = []
    made: list[Bundle] = []
    for precision in PRECISIONS:
        say(f"{shown} {form} {precision}")
        try:
            bundle = export(_make_config(name, form, precision, folder))
        except CmtEdgeError as exc:
            rows.append(Row(shown, form, precision, refusal=str(exc).splitlines()[0]))
            continue
        made.append(bundle)
        rows.append(_compare(name, shown, bundle))
    if len(made) < len(PRECISIONS):
        return rows
    measured = benchmark(made, threads=2, protocol=PROTOCOL, with_throughput=False)
    first, second = (result.model.p50 for result in measured.results)
    return [rows[0], _add_ratio(rows[1], second / first)]


def _make_config(name: str, form: str, precision: str, folder: Path) -> ExportConfig:
    quantizes = precision == "int8"
    return ExportConfig(
        name,
        weights="random" if name.startswith("timm:") else "pretrained",
        format=form,
        precision=precision,
        data="generated" if quantizes else None,
        calib_size=CALIBRATION if quantizes else None,
        output=str(folder),
    )


def _compare(name: str, shown: str, bundle: Bundle) -> Row:
    """The answers of a bundle to images that it was not calibrated on, beside those of PyTorch."""
    images = check_images(bundle.preprocess, IMAGES)
    model = create_model(name, seed=0)
    if name.startswith("timm:"):
        randomize(model, 0)
    expected = np.concatenate([TorchSession(model).run(image[None])[0] for image in images])
    with Predictor.load(bundle, threads=2) as predictor:
        ours = np.concatenate([predictor.logits(image[None]) for image in images])
    spread = float(expected.std(axis=1).mean())
    return Row(
        shown,
        bundle.manifest.format,
        bundle.manifest.precision,
        macs=bundle.manifest.model.macs,
        agreement=100 * float((ours.argmax(1) == expected.argmax(1)).mean()),
        largest=float(np.abs(ours - expected).max()) / spread,
        mean=deviation(ours, expected),
    )


def _add_ratio(row: Row, ratio: float) -> Row:
    return Row(**{**vars(row), "ratio": ratio})


# --- timm without torchvision ---------------------------------------------------------------------


class _AnyName(type):
    """A class whose attributes are their own names, as those of an enumeration of interpolations."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Empty(ModuleType):
    """A module in which every name is an empty class."""

    __path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _AnyName(name, (), {})
        setattr(self, name, made)
        return made


class _Torchvision(MetaPathFinder, Loader):
    """Finds ``torchvision`` and every module below it, all of them empty."""

    def find_spec(self, fullname: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def stand_in_for_torchvision() -> None:
    """Let timm be imported where torchvision is not installed."""
    if find_spec("torchvision") is None:
        sys.meta_path.append(_Torchvision())


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit code is 0 if every model was exported or refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL")
    parser.add_argument("--output", type=Path, help="file for the table (default: standard output)")
    args = parser.parse_args(argv)
    stand_in_for_torchvision()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, form in itertools.product(args.models, FORMATS):
            rows += try_model(name, form, Path(folder))
            text = format_table(HEADER, [row.cells() for row in rows], markdown=True)
            if args.output:  # after every model, because all of them take half an hour
                args.output.write_text(text + "\n", encoding="utf-8")
    if not args.output:
        print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
