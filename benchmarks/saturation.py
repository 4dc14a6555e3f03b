"""What int8 layers answer in OpenVINO without VNNI, where two products are added in 16 bits.

    python benchmarks/saturation.py layers
    python benchmarks/saturation.py answers BUNDLE --archive ../shared/data/cifar10.tar \
        --weights ../shared/weights/cmt_nano_cifar10.pt
    python benchmarks/saturation.py answers BUNDLE

``layers`` compares single layers of each kind with the exact answer, with weights of four kinds: any, at most
63, those of which neighbouring input channels add up to at most 128, and those of which neighbours within
filters do. The second and third are exact, so that the kernels add neighbouring channels.

``answers`` compares an int8 bundle with its float model, as the CPU runs it, and limited to older ones: with
weights as they are stored, as :mod:`cmt_edge.deploy.backends.openvino_pairs` rounds them, and with seven bits
for all of them. The images are CIFAR-10's test images, labelled, or else generated ones.

Each limit takes a process of its own. What is not int8 is computed in float32.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from common import check_images, deviation, say
from onnx import numpy_helper

from cmt_edge.deploy.backends.openvino_core import open_core
from cmt_edge.deploy.backends.openvino_graph import make_unsigned
from cmt_edge.deploy.backends.openvino_pairs import LARGEST_SUM, limit_pairs
from cmt_edge.deploy.bundle import ONNX, Bundle
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.child import SWITCHES
from cmt_edge.deploy.measure.statistics import compute_paired_drop
from cmt_edge.deploy.preprocessing import decode_pixels, normalise
from cmt_edge.deploy.report import format_table

LIMITS = {"none": "", "avx2_vnni": "AVX2_VNNI", "avx512": "AVX512_CORE", "avx2": "AVX2"}
"""Name of a limit -> the value of OpenVINO's switches. The last two have no instructions that add int8
products in 32 bits; OpenVINO names the kernels of ``avx512`` as those with VNNI."""

SIZE = 14
"""Height and width of the maps of single layers."""

CHANNELS = (46, 64)
"""Numbers of input channels; one of them fills no vector."""

FILTERS = 64
"""The number of output channels of dense layers."""

INPUT_SCALE, WEIGHT_SCALE = np.float32(1 / 8), np.float32(1 / 16)
"""Steps of single layers. Powers of two, so that float32 is exact."""

GENERATED = 64
"""The number of generated images."""


@dataclass(frozen=True)
class Kind:
    """A kind of layer: a conv by ``size``, or a linear where that is 0."""

    name: str
    size: int
    pad: int = 0
    stride: int = 1
    depthwise: bool = False


KINDS = (
    Kind("conv 1x1", 1),
    Kind("conv 2x2, stride 2", 2, stride=2),
    Kind("conv 3x3", 3),
    Kind("conv 3x3, padded", 3, pad=1),
    Kind("depthwise 3x3, padded", 3, pad=1, depthwise=True),
    Kind("linear", 0),
)
"""The kinds that hybrids have."""

STORED, ROUNDED, SEVEN = "as stored", "rounded for 16 bits", "seven bits"
"""What becomes of a bundle's weights."""

WEIGHTS = ("any", "at most 63", "neighbouring channels fit", "neighbours in filters fit")
"""Kinds of weights."""


# --- single layers --------------------------------------------------------------------------------


def draw_weights(kind: Kind, channels: int, what: str, rng: np.random.Generator) -> np.ndarray:
    """Int8 weights, ``(outputs, inputs, taps)``."""
    shape = (channels, 1) if kind.depthwise else (FILTERS, channels)
    largest = 63 if what == "at most 63" else 127
    weights = rng.integers(-largest, largest + 1, (*shape, max(1, kind.size**2)))
    axis = {"neighbouring channels fit": 1, "neighbours in filters fit": 2}.get(what)
    if axis is not None:
        columns = np.moveaxis(weights, axis, 0)
        for i in range(1, len(columns)):
            columns[i] = np.clip(columns[i], -LARGEST_SUM - columns[i - 1], LARGEST_SUM - columns[i - 1])
        weights = np.clip(weights, -127, 127)
    return weights.astype(np.int8)


def make_layer(kind: Kind, weights: np.ndarray) -> onnx.ModelProto:
    """``x -> Q -> DQ -> layer -> y``."""
    h = onnx.helper
    axis = 0 if kind.size else 1
    stored = weights.reshape(*weights.shape[:2], kind.size, kind.size) if kind.size else weights[..., 0].T
    constants = {
        "s": INPUT_SCALE,
        "z": np.int8(0),
        "w": stored,
        "ws": np.full(len(weights), WEIGHT_SCALE),
        "wz": np.zeros(len(weights), np.int8),
    }
    nodes = [
        h.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        h.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        h.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=axis),
    ]
    channels = len(weights) if kind.depthwise else weights.shape[1]
    shape = [1, channels, SIZE, SIZE] if kind.size else [1, SIZE * SIZE, channels]
    if kind.size:
        settings = {
            "pads": [kind.pad] * 4,
            "strides": [kind.stride] * 2,
            "group": channels if kind.depthwise else 1,
        }
        nodes.append(h.make_node("Conv", ["d", "wd"], ["y"], **settings))
    else:
        nodes.append(h.make_node("MatMul", ["d", "wd"], ["y"]))
    ends = [h.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    given = [h.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)]
    stored_constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    graph = h.make_graph(nodes, "layer", given, ends, stored_constants)
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 20)], ir_version=9)


def answer_exactly(layer: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    """By ONNX's own reference, in float32, which is exact for these scales."""
    from onnx.reference import ReferenceEvaluator

    found: np.ndarray = ReferenceEvaluator(layer).run(None, {"x": x})[0]
    return found


def compare_layers() -> Iterator[list[str]]:
    """Under the limit of this process: for each kind of layer the kernel, and the largest error for each kind
    of weights, relative to the largest exact answer."""
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for channels in CHANNELS:
            cells, kernel = [], ""
            for what in WEIGHTS:
                layer = make_layer(kind, draw_weights(kind, channels, what, rng))
                shape = [d.dim_value for d in layer.graph.input[0].type.tensor_type.shape.dim]
                steps = np.where(rng.random(shape) < 0.7, 127, rng.integers(-128, 128, shape))
                x = (INPUT_SCALE * steps).astype(np.float32)
                exact = answer_exactly(layer, x)
                model = make_unsigned(open_core().read_model(layer.SerializeToString()))
                compiled = open_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
                error = np.abs(compiled([x])[0] - exact).max() / np.abs(exact).max()
                cells.append(f"{error:.1e}")
                kernel = find_kernel(compiled)
            yield [kind.name, str(channels), kernel, *cells]


def find_kernel(compiled: object) -> str:
    """The name of the kernel of the only layer."""
    for node in compiled.get_runtime_model().get_ops():  # type: ignore[attr-defined]
        info = node.get_rt_info()
        if info["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul"):
            return str(info["primitiveType"].astype(str))
    return "?"


# --- whole bundles --------------------------------------------------------------------------------


def halve_weights(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Round all int8 weights to seven bits, in place: half as many steps, of twice the size."""
    constants = {tensor.name: tensor for tensor in graph.graph.initializer}
    for node in graph.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in constants:
            continue
        values, scales = (constants[name] for name in node.input[:2])
        halves = np.rint(numpy_helper.to_array(values) / 2).astype(np.int8)
        values.CopyFrom(numpy_helper.from_array(halves, values.name))
        scales.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(scales), scales.name))
    return graph


def answer(bundle: Bundle, pixels: np.ndarray, threads: int, weights: str) -> np.ndarray:
    """Logits of uint8 images ``(N, S, S, 3)``, under the limit of this process."""
    graph = onnx.load(bundle.file(ONNX))
    if weights == SEVEN:
        graph = halve_weights(graph)
    model = open_core().read_model(graph.SerializeToString())
    if weights == ROUNDED:
        limit_pairs(model)
    config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    compiled = open_core().compile_model(make_unsigned(model), "CPU", config)
    batches = (normalise(image[None], bundle.preprocess) for image in pixels)
    return np.concatenate([np.array(compiled([batch])[0]) for batch in batches])


def read_images(bundle: Bundle, archive: Path | None, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Images as a model's uint8 pixels, and their labels if there is an archive."""
    if archive is None:
        images = check_images(bundle.preprocess, GENERATED)
        mean, std = (np.array(v).reshape(3, 1, 1) for v in (bundle.preprocess.mean, bundle.preprocess.std))
        pixels = np.rint(255 * (images * std + mean)).clip(0, 255).astype(np.uint8)
        return pixels.transpose(0, 2, 3, 1), None
    images = ImageSet(archive / "test")
    items = list(images)
    items = [items[i * len(items) // count] for i in range(min(count, len(items)))]
    names = sorted({item.label for item in items})
    truth = np.array([names.index(item.label) for item in items])
    return np.stack([decode_pixels(images.read(item), bundle.preprocess) for item in items]), truth


def answer_in_float(bundle: Bundle, weights: str | None, pixels: np.ndarray) -> np.ndarray:
    """Logits of the model in PyTorch; of random weights as ``peers.py`` makes them where none are given."""
    import torch
    from peers_rows import make_reference

    from cmt_edge.cmt.reference import load_reference

    name = bundle.manifest.model.name
    model = (load_reference(name, weights)[0] if weights else make_reference(name)).eval()
    parts = [pixels[i : i + 50] for i in range(0, len(pixels), 50)]
    with torch.inference_mode():
        found = [model(torch.from_numpy(normalise(part, bundle.preprocess))).numpy() for part in parts]
    return np.concatenate(found)


def compare_answers(args: argparse.Namespace, folder: Path) -> Iterator[list[str]]:
    """For each limit, with and without our rounding: how near the answers are to those in float32."""
    bundle = Bundle.open(args.bundle)
    pixels, truth = read_images(bundle, args.archive, args.count)
    np.save(folder / "pixels.npy", pixels)
    reference = answer_in_float(bundle, args.weights, pixels)
    for limit in args.limits:
        for kind in args.kinds:
            say(f"{limit}, {kind}")
            target = folder / "logits.npy"
            given = ["--bundle", args.bundle, "--threads", str(args.threads), "--target", str(target)]
            call(["answer", *given, "--kinds", kind], limit)
            yield [limit, kind, *judge(target, reference, truth)]


def judge(target: Path, reference: np.ndarray, truth: np.ndarray | None) -> list[str]:
    """Deviation of logits, agreement, and top-1 with its drop where there are labels."""
    found = np.load(target)
    ours, theirs = found.argmax(1), reference.argmax(1)
    cells = [f"{deviation(found, reference):.4f}", f"{100 * (ours == theirs).mean():.2f}"]
    if truth is None:
        return [*cells, "-", "-"]
    drop = compute_paired_drop(theirs == truth, ours == truth)
    interval = f"{drop.mean:+.2f} ({drop.interval.low:+.2f} to {drop.interval.high:+.2f})"
    return [*cells, f"{100 * (ours == truth).mean():.2f}", interval]


# --- the command ----------------------------------------------------------------------------------


def call(arguments: list[str], limit: str) -> str:
    """What this script prints in a process under a limit."""
    variables = os.environ | (dict.fromkeys(SWITCHES, LIMITS[limit]) if LIMITS[limit] else {})
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, env=variables, check=True, capture_output=True, text=True).stdout


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("action", choices=("layers", "answers", "layer", "answer"), help="layers or answers")
    p.add_argument("bundle", nargs="?", help="an int8 bundle for OpenVINO (answers)")
    p.add_argument("--archive", type=Path, help="CIFAR-10, with test/CLASS/*.jpg (default: generated images)")
    p.add_argument("--weights", help="of the float model (default: random ones, as of peers.py)")
    p.add_argument("--count", type=int, default=10_000, help="number of test images (10000)")
    p.add_argument("--limits", nargs="+", default=list(LIMITS), choices=LIMITS)
    p.add_argument("--kinds", nargs="+", default=[STORED, ROUNDED], choices=(STORED, ROUNDED, SEVEN))
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--bundle", dest="opened", help=argparse.SUPPRESS)
    p.add_argument("--target", type=Path, help=argparse.SUPPRESS)
    return p.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.action == "layer":
        for cells in compare_layers():
            print("\t".join(cells))
    elif args.action == "answer":
        pixels = np.load(args.target.parent / "pixels.npy", mmap_mode="r")
        np.save(args.target, answer(Bundle.open(args.opened), pixels, args.threads, args.kinds[0]))
    elif args.action == "layers":
        rows = [
            [limit, *line.split("\t")]
            for limit in args.limits
            for line in call(["layer"], limit).splitlines()
            if "\t" in line
        ]
        print(format_table(["limit", "layer", "inputs", "kernel", *WEIGHTS], rows, markdown=True))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = list(compare_answers(args, Path(folder)))
        heads = ["limit", "weights", "logits off, std", "agreement %", "top-1 %", "drop (95 % CI)"]
        print(format_table(heads, rows, markdown=True))


if __name__ == "__main__":
    main()
