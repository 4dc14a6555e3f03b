"""The steps of an export, each a function from values to values.

:mod:`cmt_edge.export.pipeline` puts them in order, and :mod:`cmt_edge.export.auto` uses some of them to make
its candidates. A step that changes the model compares its result with the untouched PyTorch reference and
raises :class:`~cmt_edge.deploy.errors.ParityError` beyond what is allowed.

Steps of TensorRT alone are in :mod:`cmt_edge.export.trt`, so that other exports do not import TensorRT's
side."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from cmt_edge.calib import CalibrationSet, Quantized, quantize
from cmt_edge.calib.data import SYNTHETIC
from cmt_edge.calib.generated import generate
from cmt_edge.calib.quantize import keep_float
from cmt_edge.calib.synthetic import choose_default_count, make_synthetic_set
from cmt_edge.cmt import choose_head, compute_weights_fingerprint, fuse
from cmt_edge.cmt.described import describe_input
from cmt_edge.cmt.outside import OUTSIDE_FAMILIES
from cmt_edge.cmt.reference import load_reference
from cmt_edge.cmt.weights import LoadedWeights
from cmt_edge.deploy import Bundle, Predictor, Preprocess, report
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, get_runtime
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.bundle import GOLDEN, LOGITS, ONNX, Golden, Manifest
from cmt_edge.deploy.bundle.sections import FORMATS, TYPED_FORMATS, GoldenCheck, RuntimeEntry
from cmt_edge.deploy.errors import CmtEdgeError, GateError, InputError
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.benchmark import (
    Benchmark,
    Protocol,
    benchmark,
)
from cmt_edge.deploy.measure.labels import match_labels
from cmt_edge.deploy.measure.parity import (
    Verification,
    check_golden,
    measure_resolution,
    verify,
)
from cmt_edge.deploy.preprocessing import decode_pixels, normalise

from .config import NAMED_WEIGHTS, OPSET, ExportConfig
from .outputs import (
    identify_outputs,
    require_finite,
)
from .refusals import require_single_answers
from .to_onnx import (
    FUSE_ATOL,
    GRAPH_ATOL,
    compute_outputs,
    export_onnx,
    require_parity,
    set_batch,
    simplify,
)
from .typed import observe

MAX_KEYS = 6
"""Number of keys of a checkpoint that a note names."""
GOLDEN_IMAGES = 4
"""Number of golden images in a bundle."""
GOLDEN_SEED = 7
"""Seed of the golden images."""
GOLDEN_MARGIN = 1.3
"""Size of a golden image before preprocessing, in sizes of the input, so that resizing is checked too."""
OBSERVED_IMAGES = 32
"""Number of images that activations are observed on; the ranges hardly grow with more, and
:data:`~cmt_edge.export.typed.SAFETY` covers the rest."""
DYNAMIC_SIZES = (1, 3, 8)
"""Batch sizes that a graph with a dynamic batch is checked with."""
EXPORT_PROTOCOL = Protocol(iters=25, seconds=0.5, warmup_seconds=0.25)
"""How long a finished bundle is measured; ``cmt-bench`` measures longer."""
SERVED_HERE = frozenset({"onnx", "openvino"})
"""Formats whose bundles a CPU serves without anything built for it."""

GREY_LEVELS = 255
"""The largest value of a pixel before it is divided."""
MAX_MEAN = 1.0
"""A mean above this is no mean of values from 0 to 1."""
MAX_STD = 2.0
"""A deviation above this is none of values from 0 to 1, whose deviation is at most one half."""
MAX_RECIPROCAL = 0.03
"""A deviation of values from 0 to 1 is hardly ever below this; the reciprocals of grey levels are."""
LEAST_RECIPROCAL = 0.005
"""The least such reciprocal. A deviation of 1 / 255 leaves the values as they are in the file, and is
meant so."""

PRECISION_REMEDIES = {
    "fp32": "the graph computes something else than the model: look for what forward does with values of an"
    " image or of the batch in Python, or allow more with --atol",
    "fp16": "use --precision fp32, or allow more with --max-drop or --atol",
    "bf16": "use --precision fp32, or allow more with --max-drop or --atol",
    "int8": "calibrate on more and more typical images, use bf16 or fp32, or allow more with --max-drop or"
    " --atol",
}
"""Precision of a bundle that differs from the reference by more than allowed -> what to do."""

Differences = dict[str, float]
"""Step -> the largest difference of its outputs from the reference's."""
ProgressCallback = Callable[[int, int], None]
"""Called with how many are done, and of how many."""


@dataclass(frozen=True)
class Reference:
    """The untouched PyTorch side of every comparison.

    Attributes:
        classifier: the model as it was loaded, in eval mode.
        model: the classifier with the head that was asked for.
        loaded: where its weights came from.
        golden: the golden images and what ``model`` makes of them.
        batch: the golden images preprocessed, float32 ``(K, 3, S, S)``.
        kind: what the outputs of a classifier are: logits, probabilities or scores.
    """

    classifier: nn.Module
    model: nn.Module
    loaded: LoadedWeights
    golden: Golden
    batch: np.ndarray
    kind: str = LOGITS

    @property
    def outputs(self) -> list[np.ndarray]:
        """What ``model`` makes of ``batch``, float32 ``(K, ...)`` each."""
        return self.golden.outputs

    @property
    def resolution(self) -> float:
        """How coarse the model itself rounds its outputs, relative to the largest one; mostly 0."""
        return max(measure_resolution(output) for output in self.outputs)


@dataclass(frozen=True)
class Evaluation:
    """Labelled images, and the logit of each of their class folders."""

    images: ImageSet
    targets: dict[str, int]


def require_unit_scale(spec: Preprocess) -> None:
    """Raise :class:`InputError` where ``spec`` normalises with a mean or deviation of values from 0 to 255.

    Values are from 0 to 1 here, so that no mean lies above 1 and no deviation above one half; a deviation of
    1 changes nothing.
    """
    if max(spec.mean) <= MAX_MEAN and max(spec.std) <= MAX_STD:
        _require_no_reciprocal(spec)
        _require_applicable(spec)
        return
    if _mixes_scales(spec.mean, MAX_MEAN) or _mixes_scales(spec.std, MAX_STD):
        raise InputError(
            f"mean {_format_list(spec.mean)} and std {_format_list(spec.std)} are not of values from 0 to 1",
            why="they mix two scales: some of them are of pixels from 0 to 1, others of pixels from 0 to 255",
            remedy="give --mean and --std of all three channels for pixels from 0 to 1",
        )
    mean, std = (
        _describe_conversion(values, most) for values, most in ((spec.mean, MAX_MEAN), (spec.std, MAX_STD))
    )
    raise InputError(
        f"mean {_format_list(spec.mean)} and std {_format_list(spec.std)} are not of values from 0 to 1",
        why="they look like those of values from 0 to 255; the pixels are divided by 255 first",
        remedy=f"give both of values from 0 to 1: --mean {mean} --std {std}",
    )


def _mixes_scales(values: tuple[float, float, float], most: float) -> bool:
    """Whether some of three values are of pixels from 0 to 1, the largest of which is ``most``, and others
    are not. A mean of 0 is one of either scale."""
    small = [value for value in values if value != 0 and value <= most]
    return bool(small) and max(values) > most


def _describe_conversion(values: tuple[float, float, float], most: float) -> str:
    """A mean or deviation of values from 0 to 1. It is divided by 255 where it is above ``most``; where it
    is the reciprocal of a deviation of values from 0 to 255, the deviation is worked out.

    The default, which is of values from 0 to 1 already, stays as it is.
    """
    if max(values) > most:
        values = (values[0] / GREY_LEVELS, values[1] / GREY_LEVELS, values[2] / GREY_LEVELS)
    elif most == MAX_STD and _looks_reciprocal(values):
        values = (
            1 / (values[0] * GREY_LEVELS),
            1 / (values[1] * GREY_LEVELS),
            1 / (values[2] * GREY_LEVELS),
        )
    return ",".join(f"{value:.5g}" for value in values)


def _looks_reciprocal(std: tuple[float, float, float]) -> bool:
    """Whether deviations look like 1 / 58.8: the factor that some libraries multiply grey levels with."""
    return all(LEAST_RECIPROCAL < value < MAX_RECIPROCAL for value in std)


def _require_no_reciprocal(spec: Preprocess) -> None:
    if not _looks_reciprocal(spec.std):
        return
    std = _describe_conversion(spec.std, MAX_STD)
    raise InputError(
        f"std {_format_list(spec.std)} looks like the reciprocal of a deviation of values from 0 to 255",
        why="a deviation of pixels from 0 to 1 is seldom below 0.03; 0.017 is 1 / 58.8",
        remedy=f"give the deviation of values from 0 to 1: --std {std}",
    )


def _require_applicable(spec: Preprocess) -> None:
    if fault := spec.fault():
        raise InputError(
            f"the preprocessing cannot be applied: {fault}",
            remedy="change --mean, --std, --imgsz or --crop-ratio, or leave them out for the model's own",
        )


def _format_list(values: tuple[float, float, float]) -> str:
    return ",".join(f"{value:g}" for value in values)


# --- the reference --------------------------------------------------------------------------------


def make_reference(config: ExportConfig) -> Reference:
    """The model with the weights that were asked for, and its answers to the golden images.

    Raises:
        WeightsError: the weights cannot be read, or do not fit.
        InputError: the model's answers are no logits and no probabilities, or numbers that it takes from one
            image decide the answer to another one.
    """
    classifier, loaded = load_reference(
        config.subject,
        config.weights,
        img_size=config.img_size,
        num_classes=config.classes,
        seed=config.seed,
        ema=config.ema,
        fresh_head=config.fresh_head,
        resize=config.resize_position_bias,
    )
    model = choose_head(classifier, config.head)
    golden, batch = make_golden(model, config.preprocess)
    require_finite(golden.outputs)
    if config.spec.family in OUTSIDE_FAMILIES:
        require_single_answers(model, batch, golden.outputs)
    kind = identify_outputs(model, batch, golden.logits) if config.head == LOGITS else LOGITS
    return Reference(classifier, model, loaded, golden, batch, kind)


def make_golden(model: nn.Module, spec: Preprocess) -> tuple[Golden, np.ndarray]:
    """Golden images with what ``model`` makes of them, and the images preprocessed, ``(K, 3, S, S)``."""
    sources = generate(
        GOLDEN_IMAGES,
        round(GOLDEN_MARGIN * spec.size),
        seed=GOLDEN_SEED,
    )
    decoded = np.stack([decode_pixels(source, spec) for source in sources])
    batch = normalise(decoded, spec)
    return Golden(sources, decoded, TorchSession(model).run(batch)), batch


def match_evaluation(bundle: Bundle, path: str, by_order: bool) -> Evaluation:
    """The labelled images of ``path``, matched with the labels of a bundle, of which only the manifest is
    read.

    Raises:
        DataError: the images cannot be used, or their folders are not the labels.
    """
    labelled = ImageSet(path)
    return Evaluation(labelled, match_labels(bundle, labelled, by_order))


# --- images for calibration -----------------------------------------------------------------------


def choose_images(config: ExportConfig) -> CalibrationSet | None:
    """The calibration images that were asked for; ``None`` without any, and for synthetic ones, which
    :func:`make_images` makes."""
    if config.data is None or config.data == SYNTHETIC:
        return None
    return CalibrationSet.choose(config.data, config.calib_size, config.preprocess, config.seed)


def count_synthetic(config: ExportConfig) -> int:
    """How many synthetic images an export makes: those asked for, for fp16 never more than are observed."""
    count = choose_default_count(config.preprocess) if config.calib_size is None else config.calib_size
    return count if config.quantizes else min(count, OBSERVED_IMAGES)


def make_images(
    config: ExportConfig,
    classifier: nn.Module,
    count: int,
    progress: ProgressCallback,
) -> CalibrationSet:
    """``count`` images made from the batch norms of ``classifier``.

    Raises:
        InputError: the model has no batch norm with statistics of training.
    """
    return make_synthetic_set(
        classifier,
        count,
        config.preprocess,
        config.seed,
        weights=f"{config.model_name} {compute_weights_fingerprint(classifier)}",
        cache=find_cache_folder() / "synthetic" if config.uses_cache else None,
        progress=progress,
    )


# --- the graph ------------------------------------------------------------------------------------


def fuse_model(reference: Reference, head: str, target: str) -> tuple[nn.Module, Differences]:
    """The reference with the exact rewrites of its family for ``target``."""
    fused = choose_head(fuse(reference.classifier, target=target), head)
    outputs = TorchSession(fused).run(reference.batch)
    return fused, {
        "fuse": require_parity(
            "fuse",
            outputs,
            reference.outputs,
            max(FUSE_ATOL, reference.resolution),
        )
    }


def trace_model(
    fused: nn.Module,
    reference: Reference,
    img_size: int,
    outputs: list[str],
) -> tuple[onnx.ModelProto, Differences]:
    """The float32 graph of ``fused`` with a dynamic batch; ``outputs`` are its outputs' names.

    Raises:
        StepError: torch.onnx refuses the model.
    """
    step = "export to ONNX"
    differences: Differences = {}

    def compare(graph: onnx.ModelProto) -> None:
        ours = compute_outputs(graph, reference.batch, step)
        differences["onnx"] = require_parity(
            step,
            ours,
            reference.outputs,
            max(GRAPH_ATOL, reference.resolution),
        )

    return export_onnx(fused, img_size, OPSET, outputs, compare), differences


def simplify_graph(graph: onnx.ModelProto, reference: Reference) -> tuple[onnx.ModelProto, Differences]:
    """``graph`` after onnxsim."""
    simplified = simplify(graph)
    ours = compute_outputs(simplified, reference.batch, "simplify")
    allowed = max(GRAPH_ATOL, reference.resolution)
    return simplified, {"simplify": require_parity("simplify", ours, reference.outputs, allowed)}


def compare_batch_sizes(graph: onnx.ModelProto, reference: Reference) -> Differences:
    """Differences of ``graph`` with batches of :data:`DYNAMIC_SIZES`."""
    differences: Differences = {}
    for count in DYNAMIC_SIZES:
        step = f"dynamic batch of {count}"
        index = np.arange(count) % len(reference.batch)
        ours = compute_outputs(graph, reference.batch[index], step)
        expected = [output[index] for output in reference.outputs]
        differences[step] = require_parity(step, ours, expected, max(GRAPH_ATOL, reference.resolution))
    return differences


def calibrate_graph(
    graph: onnx.ModelProto,
    data: CalibrationSet,
    spec: Preprocess,
    cached: bool,
    progress: ProgressCallback,
) -> Quantized:
    """``graph`` in int8, calibrated on ``data``; an equal one of an earlier run is used again where
    ``cached``.

    Raises:
        GateError: the graph breaks a rule for int8.
    """
    cache = find_cache_folder() / "calibrated" if cached else None
    return quantize(graph, data, spec, cache=cache, progress=progress)


def choose_graph(
    graph: onnx.ModelProto,
    quantized: Quantized | None,
    precision: str,
    kept_float: tuple[str, ...],
) -> onnx.ModelProto:
    """The graph of one precision: ``graph``, or for int8 the calibrated one with groups taken back to float.

    Raises:
        InputError: a name in ``kept_float`` is no group of the graph, or nothing would be left in int8.
    """
    if precision != "int8":
        return graph
    assert quantized is not None, "int8 was asked for, so the graph was calibrated"
    return keep_float(quantized, kept_float) if kept_float else quantized.model


def observe_ranges(
    graph: onnx.ModelProto,
    data: CalibrationSet,
    reference: Reference,
    spec: Preprocess,
) -> dict[str, float]:
    """Largest absolute value of every tensor on the golden images and the first :data:`OBSERVED_IMAGES` of
    ``data``."""
    golden = np.split(reference.batch, len(reference.batch))
    images = itertools.islice(data.batches(spec), OBSERVED_IMAGES)
    return observe(graph, itertools.chain(golden, images))


# --- the bundle -----------------------------------------------------------------------------------


def write_files(
    folder: Path,
    graph: onnx.ModelProto,
    batch: int,
    golden: Golden,
    format: str,
) -> RuntimeEntry:
    """Write ``model.onnx`` with its batch size, the golden vectors, and what the runtime reads instead of the
    graph.

    Returns:
        The runtime of the format; without a version for those of NVIDIA, whose engines come later.
    """
    path = folder / ONNX
    path.write_bytes(set_batch(graph, batch).SerializeToString(deterministic=True))
    golden.save(folder / GOLDEN)
    name = RUNTIME_OF_FORMAT[format]
    if format in TYPED_FORMATS:
        return RuntimeEntry(backend=name, version=None)
    runtime = get_runtime(name)
    runtime.compile(path, folder)
    return RuntimeEntry(backend=name, version=runtime.check())


def verify_bundle(
    config: ExportConfig,
    bundle: Bundle,
    reference: Reference,
    labelled: ImageSet | None,
    candidate: Predictor | None,
    progress: ProgressCallback,
) -> Verification:
    """Compare a staged bundle with the reference.

    Args:
        config: says how and how closely.
        bundle: staged.
        reference: the PyTorch side.
        labelled: images in class folders, if there are some.
        candidate: what to check instead of the bundle as its runtime opens it.
        progress: called with images done and total.

    Raises:
        DataError: an image cannot be used.
    """
    session = TorchSession(reference.model)
    with Predictor(
        session,
        config.preprocess,
        bundle.labels,
        batch=0,
        head=config.head,
    ) as torch_side:
        result = verify(
            bundle,
            data=labelled,
            by_order=config.by_order,
            threads=config.threads,
            device=config.device,
            reference=torch_side,
            max_drop=config.allowed_drop,
            atol=config.atol,
            limit=config.eval_limit,
            progress=progress,
            candidate=candidate,
        )
    notes = [*result.notes, *write_notes_on_checkpoint(config, bundle.manifest, reference.loaded)]
    return replace(result, notes=tuple(notes))


def write_notes_on_checkpoint(config: ExportConfig, manifest: Manifest, loaded: LoadedWeights) -> list[str]:
    """What a user should know of a checkpoint file: names of classes that it lacks, keys that were left
    out, and settings of the images that are not used."""
    notes = []
    source, labels = manifest.labels_source, manifest.labels
    if config.weights not in NAMED_WEIGHTS and source in ("published", "numbered"):
        notes.append(
            f"{loaded.source} does not name its classes, so that their labels are {source}, from"
            f" {labels[0][1]!r} to {labels[-1][1]!r}: --labels FILE gives others"
        )
    if loaded.left_out:
        keys = ", ".join(loaded.left_out[:MAX_KEYS])
        rest = len(loaded.left_out) - MAX_KEYS
        more = f" and {rest} more" if rest > 0 else ""
        notes.append(f"not of the model, left out: {keys}{more} (all of its weights are in {loaded.entry})")
    if loaded.unread:
        notes.append(
            f"not read, because that would run its code: {', '.join(loaded.unread)} in {loaded.source}"
        )
    if config.weights not in NAMED_WEIGHTS:
        notes += _write_notes_on_images(config)
    return notes


def _write_notes_on_images(config: ExportConfig) -> list[str]:
    """Which settings of the images in a checkpoint file differ from those of the export."""
    path, used = Path(config.weights), config.preprocess
    said = describe_input(path)
    given = said.fault or (said.mean is not None and (said.mean, said.std) != (used.mean, used.std))
    notes = []
    if given and config.mean is None and config.std is None:
        what = said.fault or f"the mean {said.mean} and the standard deviation {said.std}"
        notes.append(
            f"what {path.name} says of mean and standard deviation is not used ({what}): --mean and --std"
            " give them"
        )
    agreed = {
        "interpolation": (used.interpolation,),
        "crop_pct": (config.crop_ratio or config.spec.crop_ratio,),
        "crop_ratio": (config.crop_ratio or config.spec.crop_ratio,),
    }
    for name, value in said.not_taken:
        if value not in agreed.get(name, (True, "rgb", "RGB")):
            notes.append(f"{name} = {_show(value)} in {path.name} is not used: {NOT_TAKEN_REMEDY[name]}")
    return notes


def _show(value: object) -> str:
    """A value of a checkpoint in a note; an object of another class is only named."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"


CHANNELS_REMEDY = "images are given as red, green, blue; a model of blue, green, red must turn them itself"
"""What a note says of an order of the channels."""
NOT_TAKEN_REMEDY = {
    "bgr_to_rgb": CHANNELS_REMEDY,
    "channel_order": CHANNELS_REMEDY,
    "color_order": CHANNELS_REMEDY,
    "crop_pct": "--crop-ratio gives it",
    "crop_ratio": "--crop-ratio gives it",
    "interpolation": "the model's own filter is kept",
    "to_rgb": CHANNELS_REMEDY,
}
"""Name of a setting that is not taken from a checkpoint -> what the note says of it."""


@dataclass(frozen=True)
class SecondOpinion:
    """What another runtime makes of a bundle's graph: its format, its name and version, and its check."""

    format: str
    runtime: str
    golden: GoldenCheck


def ask_other_runtime(bundle: Bundle, atol: float | None) -> SecondOpinion | None:
    """The runtime that is within the allowed difference where the bundle's own is not.

    Args:
        bundle: staged; its own runtime differs from the reference.
        atol: allowed difference of the golden logits, ``None`` for that of the precision.

    Returns:
        ``None`` where no other runtime is installed, computes in the precision and agrees.
    """
    for form in SERVED_HERE - {bundle.manifest.format}:
        if bundle.manifest.precision not in FORMATS[form]:
            continue
        runtime = get_runtime(RUNTIME_OF_FORMAT[form])
        try:
            name = runtime.check()
            with Predictor.load(bundle, backend=RUNTIME_OF_FORMAT[form], cache=False) as other:
                golden = check_golden(bundle, other, atol)
        except CmtEdgeError:  # it is not installed, or cannot run the graph
            continue
        if golden.passed:
            return SecondOpinion(form, name, golden)
    return None


def require_passed(result: Verification, opinion: SecondOpinion | None = None) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.GateError` if a bundle differs by more than allowed.

    Where another runtime agrees with the reference (``opinion``), neither the graph nor calibration is at
    fault, and the remedy is another format.
    """
    if result.passed:
        return
    figures = "\n       ".join(report.describe_verification(result).splitlines())
    if opinion is None:
        raise GateError(
            "the exported model differs from the reference by more than allowed",
            why=figures,
            remedy=f"nothing was written; {PRECISION_REMEDIES[result.precision]}",
        )
    ours, other = result.golden, opinion.golden
    found, allowed = report.format_differences(ours.diff, other.atol)
    raise GateError(
        f"{result.runtime.runtime} alone differs from the reference by more than allowed",
        why=f"{figures}\n       the same graph on the golden images: {result.runtime.runtime} differs by"
        f" {found}, {opinion.runtime} by {other.diff:.3g} (allowed {allowed})",
        remedy=f"nothing was written; use --format {opinion.format}, or replace the operation that"
        f" {result.runtime.runtime} computes otherwise",
    )


def measure_bundle(
    bundle: Bundle,
    threads: int | None,
    progress: Callable[[str, float], None],
) -> Benchmark:
    """A short measurement of a staged bundle."""
    return benchmark(
        [bundle],
        threads=threads,
        protocol=EXPORT_PROTOCOL,
        with_throughput=False,
        progress=progress,
    )
