"""How near the int8 graphs of several models are to float32, by the steps that follow equalization.

    python benchmarks/fidelity.py --data ../shared/data --golden ../shared/golden \
        --weights ../shared/weights/cmt_nano_cifar10.pt --keep /tmp/fidelity --markdown fidelity.md

cmt_nano with trained weights is judged by CIFAR-10 test images, calibrated on training images. The other
models have the random weights of the golden logits; they are calibrated on some of the photographs and judged
by others, so that a choice is not made for one model. Graphs are kept in ``--keep``; only what follows the
placing of pairs is repeated for each variant. Everything runs in OpenVINO on the CPU, as bundles do.

``--only VARIANT ...`` and ``--models MODEL ...`` choose rows and columns. ``--float GROUP`` adds a row with
a group of layers in float (several are joined by commas; ``embed`` stands for all groups with that ending),
and ``--time SECONDS`` runs the graphs of a model in turns and gives their speed relative to the first, in
OpenVINO or where ``--time-in`` says; with ``--kept`` it times those of an earlier run and judges nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import torch
from common import deviation, logits, open_onnxruntime, open_openvino, say
from threadpoolctl import threadpool_limits
from torch import nn

from cmt_edge.calib import CalibrationSet
from cmt_edge.calib.groups import group_nodes
from cmt_edge.calib.integer_layers import measure_conv_ranges, place_for_integers
from cmt_edge.calib.quantize import Placed, place_pairs
from cmt_edge.calib.recipe import DEFAULT, Recipe
from cmt_edge.calib.refine import refine
from cmt_edge.calib.restore import list_int8_nodes, restore
from cmt_edge.calib.statistics import Batches, LocalStatistics
from cmt_edge.cmt import create_model, find_model, fuse
from cmt_edge.cmt.reference import load_reference
from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.files import write_atomic
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.preprocessing import preprocess
from cmt_edge.deploy.report import format_table
from cmt_edge.export import ExportConfig
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import export_onnx, set_batch, simplify

TRAINED = "cmt_nano"
"""The model with trained weights, which CIFAR-10 judges."""

GOLDEN = ("cmt_xs", "cmt_s", "cvt_13", "mvitv2_t")
"""Models with the random weights of the golden logits, which photographs judge."""

FILES = {"cvt_13": "cvt_13_224"}
"""Names of golden files that differ from those of the models."""

JUDGING_PHOTOGRAPHS = 100
"""Number of photographs that judge; all others calibrate."""

VARIANTS: dict[str, dict[str, bool]] = {
    "none": {"search": False, "rounding": False, "biases": False},
    "ranges": {"search": True, "rounding": False, "biases": False},
    "rounding": {"search": False, "rounding": True, "biases": False},
    "biases": {"search": False, "rounding": False, "biases": True},
    "unshifted": {"search": True, "rounding": True, "biases": True},
    "all": {"search": True, "rounding": True, "biases": True},
    "fits": {"search": True, "rounding": True, "biases": True, "fits_16_bits": True},
    "trunk": {"search": True, "rounding": True, "biases": True, "fits_16_bits": True},
    "unequalized": {"search": True, "rounding": True, "biases": True, "fits_16_bits": True},
    "fits-integers": {"search": True, "rounding": True, "biases": True, "fits_16_bits": True},
    "trunk-integers": {"search": True, "rounding": True, "biases": True, "fits_16_bits": True},
}
"""Names of the variants and the steps of :func:`cmt_edge.calib.refine.refine` that they take. "trunk" is what
bundles of OpenVINO have: layers that nothing leads around read floats (:mod:`cmt_edge.calib.trunk`).
"unequalized" is that without equalization, as where images are drawn. "trunk-integers" is what bundles of
ONNX Runtime have, "fits-integers" that without layers that read floats."""

PLACED = ("fits-integers", "trunk-integers")
"""The variants with what ONNX Runtime needs (:mod:`cmt_edge.calib.integer_layers`)."""

RECIPES = {
    "trunk": replace(DEFAULT, float_trunk=True),
    "trunk-integers": replace(DEFAULT, float_trunk=True),
    "unequalized": replace(DEFAULT, float_trunk=True, equalize=False),
}
"""The recipes of variants that differ before :func:`cmt_edge.calib.refine.refine`; others have
:data:`cmt_edge.calib.recipe.DEFAULT`."""

COPIES = 3
"""How often each graph is compiled for ``--time``."""

SHIFTED = ("all", "fits", "trunk", "unequalized", *PLACED)
"""The variants that shift values, too."""


JUDGES = ("OpenVINO", "ONNX Runtime")
"""The runtimes that answer. OpenVINO answers as it does on this CPU: its float operations are bfloat16 where
the CPU has it, and without VNNI it rounds weights of some layers more coarsely. ONNX Runtime computes what
the graph says, exactly: sums of int8 products in 32 bits, and all else in float32."""


@dataclass(frozen=True)
class Case:
    """One model with one choice of images: its float graph, the images that calibrate, and those that judge,
    ``(N, 3, S, S)``, with the float graph's logits."""

    name: str
    graph: onnx.ModelProto
    spec: Preprocess
    data: CalibrationSet
    images: np.ndarray
    truth: np.ndarray


@dataclass(frozen=True)
class Found:
    """How near one int8 graph is to float32: for each of :data:`JUDGES` the share of images with the same
    top-1, in percent, and how far the logits are off, in their standard deviations; and the seconds that
    calibration took."""

    agreements: tuple[float, ...]
    deviations: tuple[float, ...]
    seconds: float


def load_golden_model(name: str, folder: Path) -> nn.Module:
    """A model with the golden weights: by the official code's names, or by ours where these are not known."""
    path = folder / "golden.py"
    spec = importlib.util.spec_from_file_location("golden", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path} cannot be loaded")
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    model = create_model(name)
    published = FILES.get(name, name)
    if (folder / f"{published}.json").exists():
        known = find_model(name)
        weights = {k: torch.from_numpy(np.array(v)) for k, v in golden.weights(published).items()}
        state = {known.rename(key): value for key, value in weights.items()}
        state = known.adapt(state) if known.adapt else state
    else:
        state = {
            key: torch.from_numpy(np.array(golden.tensor(key, tuple(value.shape), str(value.dtype))))
            for key, value in model.state_dict().items()
        }
    model.load_state_dict(state)
    return model.eval()


def make_graph(name: str, args: argparse.Namespace) -> onnx.ModelProto:
    """The simplified float graph, from the folder of kept ones where it is there."""
    path = args.keep / f"{name}.onnx"
    if not path.exists():
        if name == TRAINED:
            model: nn.Module = load_reference(name, args.weights)[0]
        else:
            model = load_golden_model(name, args.golden)
        fused = fuse(model, target="openvino")
        onnx.save(simplify(export_onnx(fused, ExportConfig(name).preprocess.size, OPSET)), path)
    return onnx.load(path)


def read_cifar(archive: Path, count: int) -> list[bytes]:
    """Test images, each class in equal parts."""
    images = ImageSet(archive / "test", labelled=False)
    items = list(images)
    return [images.read(items[i * len(items) // count]) for i in range(count)]


def read_photographs(folder: Path, seed: int) -> tuple[list[bytes], list[bytes]]:
    """Photographs that calibrate, and the others, which judge: every few with seed 0, else by chance."""
    blobs = [path.read_bytes() for path in sorted(folder.iterdir())]
    judging = {i * len(blobs) // JUDGING_PHOTOGRAPHS for i in range(JUDGING_PHOTOGRAPHS)}
    if seed:
        chosen = np.random.default_rng(seed).choice(len(blobs), JUDGING_PHOTOGRAPHS, replace=False)
        judging = set(chosen.tolist())
    return (
        [blob for i, blob in enumerate(blobs) if i not in judging],
        [blobs[i] for i in sorted(judging)],
    )


def make_case(name: str, graph: onnx.ModelProto, seed: int, args: argparse.Namespace) -> Case:
    """The model ``name`` with images chosen by ``seed``, and what its float graph answers to those that
    judge."""
    spec = ExportConfig(name).preprocess
    if name == TRAINED:
        archive = args.data / "cifar10.tar"
        data = CalibrationSet.choose(archive / "train", args.calib_size, spec, seed)
        judging = read_cifar(archive, args.cifar)
    else:
        blobs, judging = read_photographs(args.data / "imagenet_sample", seed)
        data = CalibrationSet.of_blobs("photographs", blobs[: args.calib_size])
    if args.generated:
        data = CalibrationSet.choose("generated", args.calib_size, spec, seed)
    images = np.stack([preprocess(blob, spec) for blob in judging])
    truth = answer(graph, images, args.threads, "fp32")
    return Case(name, graph, spec, data, images, truth)


def answer(graph: onnx.ModelProto, images: np.ndarray, threads: int, precision: str | None) -> np.ndarray:
    """Logits of a graph, one image at a time: in OpenVINO, or in ONNX Runtime where ``precision`` is
    ``None``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(set_batch(graph, 1), path)
        session = open_openvino(path, threads, precision) if precision else open_onnxruntime(path, threads)
        result = logits(session, images)
        session.close()
    return result


def judge(case: Case, args: argparse.Namespace) -> Iterator[tuple[str, Found]]:
    """Each variant of one case."""
    local = LocalStatistics(Batches(case.data, case.spec, None))
    known: dict[Recipe, tuple[Placed, float]] = {}
    for name in args.only:
        recipe = RECIPES.get(name, DEFAULT)
        if recipe not in known:
            start = time.perf_counter()
            with threadpool_limits(1, "blas"):
                known[recipe] = place_pairs(case.graph, local, recipe), time.perf_counter() - start
        placed, shared = known[recipe]
        start = time.perf_counter()
        with threadpool_limits(1, "blas"):
            graph = refine(
                placed.model,
                placed.source,
                local,
                placed.reach if name in SHIFTED else {},
                **VARIANTS[name],
            )
        if name in PLACED:
            graph = place_for_integers(graph, measure_conv_ranges(graph, local))
        seconds = shared + time.perf_counter() - start
        yield name, compare(case, name, graph, seconds, args)
    for groups in args.floats:
        names = find_group(placed.source, graph, groups.split(","))
        name = f"{groups} float"
        yield name, compare(case, name, restore(graph, placed.source, names), seconds, args)


def find_group(source: onnx.ModelProto, graph: onnx.ModelProto, endings: Sequence[str]) -> set[str]:
    """The int8 operations of all groups that end in one of ``endings``."""
    groups = group_nodes(source, list_int8_nodes(graph))
    return {name for group, names in groups.items() if group.endswith(tuple(endings)) for name in names}


def compare(case: Case, name: str, graph: onnx.ModelProto, seconds: float, args: argparse.Namespace) -> Found:
    """How near one variant is; its graph is kept."""
    onnx.save(set_batch(graph, 1), get_path(case.name, name, args))
    answers = [answer(graph, case.images, args.threads, precision) for precision in (args.precision, None)]
    return Found(
        tuple(100 * float((ours.argmax(1) == case.truth.argmax(1)).mean()) for ours in answers),
        tuple(deviation(ours, case.truth) for ours in answers),
        seconds,
    )


def format_found(found: Sequence[Found]) -> list[str]:
    """The cells of one variant, from all choices of images."""
    cells = []
    for i in range(len(JUDGES)):
        cells += [format_range([f.agreements[i] for f in found], 2)]
        cells += [format_range([f.deviations[i] for f in found], 4)]
    return [*cells, f"{statistics.mean(f.seconds for f in found):.0f}"]


def format_range(values: Sequence[float], digits: int) -> str:
    """The mean of several values, with the smallest and the largest one."""
    mean, low, high = (f"{v:.{digits}f}" for v in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def get_path(model: str, variant: str, args: argparse.Namespace) -> Path:
    """The file of one variant's graph."""
    folder: Path = args.keep
    return folder / f"{model}.{variant.replace(' ', '_')}.int8.onnx"


def time_in_turns(case: Case, variants: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Speed of the kept graphs, which are those of the last choice of images, relative to the first. Each is
    compiled :data:`COPIES` times, because compilations of one graph differ; the fastest median counts."""
    paths = {name: get_path(case.name, name, args) for name in variants}
    in_openvino = args.time_in == "openvino"
    sessions = [
        (
            name,
            open_openvino(path, args.threads, args.precision)
            if in_openvino
            else open_onnxruntime(path, args.threads),
        )
        for _ in range(COPIES)
        for name, path in paths.items()
    ]
    times: list[list[float]] = [[] for _ in sessions]
    end = time.perf_counter() + args.time
    while time.perf_counter() < end:
        for (_, session), taken in zip(sessions, times, strict=True):
            start = time.perf_counter()
            session.run(case.images[:1])
            taken.append(time.perf_counter() - start)
    for _, session in sessions:
        session.close()
    medians = [
        min(statistics.median(taken) for (n, _), taken in zip(sessions, times, strict=True) if n == name)
        for name in variants
    ]
    return [f"{medians[0] / median:.3f} ({1000 * median:.2f} ms)" for median in medians]


def judge_model(name: str, args: argparse.Namespace) -> list[list[str]]:
    """The rows of one model."""
    graph = make_graph(name, args)
    if args.kept:
        speeds = time_in_turns(make_case(name, graph, 0, args), args.only, args)
        return [[name, variant, *["-"] * 5, speed] for variant, speed in zip(args.only, speeds, strict=True)]
    found: dict[str, list[Found]] = {}
    for seed in range(args.seeds):
        case = make_case(name, graph, seed, args)
        for variant, one in judge(case, args):
            say("  ".join([name, f"seed {seed}", variant, *format_found([one])]))
            found.setdefault(variant, []).append(one)
    speeds = time_in_turns(case, list(found), args) if args.time else ["-"] * len(found)
    return [
        [name, variant, *format_found(ones), speed]
        for (variant, ones), speed in zip(found.items(), speeds, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", type=Path, required=True, help="folder with cifar10.tar and imagenet_sample/")
    p.add_argument("--golden", type=Path, required=True, help="folder with golden.py")
    p.add_argument("--weights", default="pretrained", help="of cmt_nano (default: embedded)")
    p.add_argument("--keep", type=Path, required=True, help="folder where float graphs are kept")
    p.add_argument("--models", nargs="+", default=[TRAINED, *GOLDEN], choices=[TRAINED, *GOLDEN])
    p.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    p.add_argument("--cifar", type=int, default=2000, help="number of CIFAR-10 test images (2000)")
    p.add_argument("--calib-size", type=int, help="number of calibration images (default 300, or all)")
    p.add_argument("--generated", action="store_true", help="calibrate on drawn images instead")
    p.add_argument("--seeds", type=int, default=1, help="number of choices of calibration images (1)")
    p.add_argument("--precision", default="int8", help="int8, or fp32 for float operations in float32")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--float", dest="floats", nargs="+", default=[], metavar="GROUP", help="float groups")
    p.add_argument("--time", type=float, default=0.0, help="seconds for the latency of each model (0: none)")
    p.add_argument("--time-in", choices=["openvino", "onnxruntime"], default="openvino")
    p.add_argument("--kept", action="store_true", help="only time the graphs of an earlier run (--time)")
    p.add_argument("--markdown", type=Path)
    args = p.parse_args(argv)
    if args.kept and not args.time:
        p.error("--kept needs --time")
    args.keep.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.models:
        rows += judge_model(name, args)
    heads = [f"{judge}: {what}" for judge in JUDGES for what in ("agreement %", "logits off, std")]
    table = format_table(["model", "steps", *heads, "s", "speed"], rows, markdown=True)
    if args.markdown:
        write_atomic(args.markdown, f"{table}\n".encode())
    print(table)


if __name__ == "__main__":
    main()
