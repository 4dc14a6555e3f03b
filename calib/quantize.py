"""Makes one Q/DQ ONNX graph for every runtime from a float graph, images, and a recipe.

NNCF calibrates; results are cached by content.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from threadpoolctl import threadpool_limits

from cmt_edge.deploy.cache import Cache, Files
from cmt_edge.deploy.errors import (
    CmtEdgeError,
    GateError,
    InputError,
    StepError,
)
from cmt_edge.deploy.preprocessing import Preprocess

from .data import CalibrationSet
from .equalize import Equalized, equalize, guard_calibration
from .graph import get_input, name_value, open_view, write_model
from .groups import group_by_kind, group_nodes
from .lint import lint, list_half_int8_nodes
from .qdq_pairs import move_pairs_to_layers, sign_quantizers
from .recipe import DEFAULT, INT8_OPS, Recipe
from .refine import MOST_IMAGES, refine
from .restore import list_int8_nodes, restore
from .sampling import pick, spread

CACHED_FILES = 20
"""The number of calibrated graphs that the cache keeps, with the float graphs they were made from. The oldest
are deleted first."""

IMAGES_AT_ONCE = 4
"""The number of images on which statistics are collected at once. More need more memory and save little."""

ENOUGH = 64
"""The smallest number of images from which means are taken, for the correction of biases."""

KEPT_BYTES = 512 << 20
"""Preprocessed images are kept in memory up to this size, in bytes. 300 images of 192 x 192 are 130 MB."""

SHOWN_RULES = 5
"""The number of broken rules that an error message quotes."""


@dataclass(frozen=True)
class Quantized:
    """The result of :func:`quantize`.

    Attributes:
        model: the Q/DQ graph.
        source: the float graph that it was made from: the given one, equalized.
        recipe: the key of the recipe.
        cached: whether it was read from the cache.
    """

    model: onnx.ModelProto
    source: onnx.ModelProto
    recipe: str
    cached: bool


def quantize(
    model: onnx.ModelProto,
    data: CalibrationSet,
    spec: Preprocess,
    recipe: Recipe = DEFAULT,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Quantized:
    """Quantize a float graph.

    Args:
        model: float32 ONNX graph with input ``(batch, 3, S, S)``, which is not modified.
        data: the calibration images.
        spec: their preprocessing.
        recipe: what stays float.
        cache: a folder of calibrated graphs, where nothing is calibrated twice.
        progress: is called with the number of images that were read, and the number of all images.

    Raises:
        GateError: the result breaks a rule of :func:`cmt_edge.calib.lint.lint`.
        InputError: ``recipe.keep_float`` names what the graph lacks, or all that could be int8.
        StepError: NNCF failed.
    """
    plain = replace(recipe, keep_float=())

    def make() -> Quantized:
        return _require_clean(calibrate(model, data, spec, plain, progress))

    if cache is None:
        whole = make()
    else:
        content = model.SerializeToString(deterministic=True)
        whole = Cache(cache, (".float", ".onnx"), CACHED_FILES).get(
            _make_key(content, data, spec, plain),
            decode=lambda files: _read_files(files, plain),
            make=make,
            encode=_convert_to_files,
        )
    return _take_back(whole, recipe) if recipe.keep_float else whole


def _take_back(whole: Quantized, recipe: Recipe) -> Quantized:
    """``whole`` with what the recipe names in float again."""
    return replace(
        whole,
        model=keep_float(whole, recipe.keep_float),
        recipe=recipe.key(),
    )


def _convert_to_files(quantized: Quantized) -> Files:
    graphs = (quantized.source, quantized.model)
    return tuple(graph.SerializeToString(deterministic=True) for graph in graphs)


def _read_files(files: Files, recipe: Recipe) -> Quantized | None:
    """An entry of the cache; ``None`` where the graph breaks today's rules."""
    source, model = (onnx.load_from_string(content) for content in files)
    return None if lint(model) else Quantized(model, source, recipe.key(), True)


def keep_float(quantized: Quantized, names: tuple[str, ...]) -> onnx.ModelProto:
    """The graph of ``quantized`` with the named groups or operations float again.

    Raises:
        InputError: a name belongs to neither a group nor an operation, or nothing would be left in int8.
    """
    original, candidates = quantized.source, list_int8_nodes(quantized.model)
    groups = group_nodes(original, candidates) | group_by_kind(original, candidates)
    singles = {node.name for node in original.graph.node}
    unknown = [name for name in names if name not in groups and name not in singles]
    if unknown:
        raise InputError(
            f"the model has no group of operations {unknown[0]!r} to keep float",
            remedy=f"choose from {', '.join(groups)}",
        )
    chosen = {node for name in names for node in groups.get(name, (name,))}
    if chosen.issuperset(candidates):
        raise InputError(
            "nothing would be left in int8",
            remedy="keep fewer groups float, or use --precision fp32 or bf16",
        )
    restored = restore(quantized.model, original, chosen)
    return _require_clean(replace(quantized, model=restored)).model


def _make_key(
    content: bytes,
    data: CalibrationSet,
    spec: Preprocess,
    recipe: Recipe,
) -> str:
    parts = [
        hashlib.sha256(content).hexdigest(),
        data.fingerprint,
        repr(spec),
        recipe.key(),
    ]
    parts += [f"{name} {metadata.version(name)}" for name in ("nncf", "onnxruntime", "pillow")]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _require_clean(quantized: Quantized) -> Quantized:
    """``quantized``, if its graph keeps every rule; raises :class:`GateError` otherwise."""
    findings = lint(quantized.model)
    if findings:
        hidden = len(findings) - SHOWN_RULES
        more = f" and {hidden} more" if hidden > 0 else ""
        raise GateError(
            "the quantized graph breaks the rules for int8",
            why="; ".join(findings[:SHOWN_RULES]) + more,
            remedy="report the model; an fp32 or bf16 bundle is not affected",
        )
    return quantized


class Batches:
    """Preprocessed images that may be read several times.

    They are decoded once and kept as float32 up to :data:`KEPT_BYTES`; beyond that they are decoded again at
    every reading.
    """

    def __init__(
        self,
        data: CalibrationSet,
        spec: Preprocess,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._data, self._spec, self._progress = data, spec, progress
        image_bytes = 3 * spec.size**2 * np.dtype(np.float32).itemsize
        self._keeps = len(data) * image_bytes <= KEPT_BYTES
        self._kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[np.ndarray]:
        source = self._kept if self._kept is not None else self._data.batches(self._spec)
        keeps = self._keeps and self._kept is None
        read = []
        for i, batch in enumerate(source):
            if keeps:
                read.append(batch)
            if self._progress:
                self._progress(i + 1, len(self))
            yield batch
        if keeps:
            self._kept = read


def calibrate(
    model: onnx.ModelProto,
    data: CalibrationSet,
    spec: Preprocess,
    recipe: Recipe,
    progress: Callable[[int, int], None] | None,
) -> Quantized:
    """:func:`quantize` without a cache, without ``keep_float``, and without the rules of
    :func:`cmt_edge.calib.lint.lint`, which some choices of a recipe break."""
    batches = Batches(data, spec, progress)
    with threadpool_limits(1, "blas"):  # sums of several threads would round differently
        calibrated, source, reach = place_pairs(model, batches, recipe)
        if recipe.smooth_quant is None:
            calibrated = refine(
                calibrated,
                source,
                pick(batches, spread(len(batches), MOST_IMAGES)),
                guard_calibration,
                reach if recipe.shift else {},
                search=recipe.range_estimator == "error",
                rounding=recipe.rounding,
                biases=recipe.bias_correction,
            )
    return Quantized(calibrated, source, recipe.key(), False)


def place_pairs(
    model: onnx.ModelProto,
    batches: Batches,
    recipe: Recipe,
) -> tuple[onnx.ModelProto, onnx.ModelProto, Mapping[str, tuple[float, float]]]:
    """The first part of :func:`calibrate`: Q/DQ pairs with extremes as ranges, the float graph that they
    belong to, and the lowest and highest values of its tensors. Weights are rounded to the nearest; with
    ``smooth_quant`` NNCF corrects the biases."""
    equalized = Equalized(model)
    if recipe.equalize:
        equalized = equalize(model, batches, _read_in_int8(model, recipe))
    refines = recipe.smooth_quant is None
    ranges = "mean_minmax" if recipe.range_estimator == "mean_minmax" else "minmax"
    chosen: Collection[int] = range(len(batches))
    if ranges == "minmax" and equalized.telling:
        chosen = equalized.telling if refines else fill_up(equalized.telling, len(batches))
    nncf_recipe = replace(
        recipe,
        range_estimator=ranges,
        bias_correction=recipe.bias_correction and not refines,
    )
    calibrated = run_nncf(equalized.model, batches, chosen, nncf_recipe)
    # NNCF gives no scale to what does not come from the image alone, such as coordinates beside a map.
    halves = list_half_int8_nodes(calibrated)
    if halves:
        calibrated = restore(calibrated, equalized.model, halves)
    return calibrated, equalized.model, equalized.reach


def _read_in_int8(model: onnx.ModelProto, recipe: Recipe) -> set[str]:
    """Tensors that layers may read in int8."""
    with open_view(model) as view:
        floats = set(recipe.float_nodes_of(view.graph))
        layers = [node for node in view.graph if node.op_type in INT8_OPS and node.name not in floats]
        operands = [get_input(node, position) for node in layers for position in (0, 1)]
        return {name_value(value) for value in operands if not value.is_initializer()}


def fill_up(telling: Collection[int], count: int) -> list[int]:
    """Numbers of ``telling`` images, filled up to :data:`ENOUGH` of ``count`` with others, evenly spread."""
    others = [i for i in range(count) if i not in telling]
    missing = max(0, min(ENOUGH, count) - len(telling))
    return sorted(
        {
            *telling,
            *(others[i * len(others) // missing] for i in range(missing)),
        }
    )


class _Grouped:
    """The ``chosen`` ones of ``batches``, ``size`` at a time.

    Extremes over all are the same, and statistics of many small tensors cost more than of a few larger ones.
    """

    def __init__(self, batches: Batches, chosen: Collection[int], size: int) -> None:
        self._batches, self._chosen, self._size = (
            batches,
            set(chosen),
            size,
        )

    def __len__(self) -> int:
        return math.ceil(len(self._chosen) / self._size)

    def __iter__(self) -> Iterator[np.ndarray]:
        images = (batch for i, batch in enumerate(self._batches) if i in self._chosen)
        while group := list(itertools.islice(images, self._size)):
            yield np.concatenate(group)


def run_nncf(
    model: onnx.ModelProto,
    batches: Batches,
    chosen: Collection[int],
    recipe: Recipe,
) -> onnx.ModelProto:
    """The Q/DQ graph that NNCF makes of ``model``, with signed pairs directly before the layers."""
    nncf = _import_nncf()
    at_once = IMAGES_AT_ONCE if recipe.range_estimator == "minmax" else 1
    grouped = _Grouped(batches, chosen, at_once)
    name = model.graph.input[0].name
    dataset = nncf.Dataset(grouped, lambda batch: {name: batch})
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    with _translating_failures(), _silence():
        result = nncf.quantize(
            copy,
            dataset,
            preset=nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(grouped),
            fast_bias_correction=True,
            ignored_scope=nncf.IgnoredScope(names=recipe.float_nodes(copy), validate=False),
            advanced_parameters=_make_parameters(nncf, recipe),
        )
    with open_view(result) as view:
        sign_quantizers(view.graph)
        move_pairs_to_layers(view.graph)
        return write_model(view)


@contextmanager
def _translating_failures() -> Iterator[None]:
    """Errors of NNCF as a :class:`StepError`; errors of cmt-edge, which images raise, stay as they are."""
    try:
        yield
    except CmtEdgeError:
        raise
    except Exception as exc:
        raise StepError(
            "calibration failed in NNCF",
            why=f"{type(exc).__name__}: {exc}",
            remedy="export fp32 or bf16, and report the model",
        ) from exc


def _import_nncf() -> Any:
    """NNCF without its log lines."""
    with _silence():
        import nncf

        nncf.set_log_level(logging.ERROR)
    return nncf


@contextmanager
def _silence() -> Iterator[None]:
    """Discard standard output, which is reserved for results: NNCF draws its own progress there."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _make_parameters(nncf: Any, recipe: Recipe) -> Any:
    """NNCF's parameters for ``recipe``: symmetric, weights per channel, activations per tensor."""
    from nncf.common.quantization.structs import QuantizationScheme
    from nncf.quantization import advanced_parameters as advanced
    from nncf.quantization.range_estimator import (
        RangeEstimatorParametersSet,
    )

    ranges = {
        "mean_minmax": RangeEstimatorParametersSet.MEAN_MINMAX,
        "minmax": RangeEstimatorParametersSet.MINMAX,
    }
    alpha = -1.0 if recipe.smooth_quant is None else recipe.smooth_quant
    return advanced.AdvancedQuantizationParameters(
        activations_quantization_params=advanced.QuantizationParameters(
            mode=QuantizationScheme.SYMMETRIC, per_channel=False
        ),
        weights_quantization_params=advanced.QuantizationParameters(
            mode=QuantizationScheme.SYMMETRIC, per_channel=True
        ),
        activations_range_estimator_params=ranges[recipe.range_estimator],
        smooth_quant_alphas=advanced.AdvancedSmoothQuantParameters(matmul=alpha, convolution=-1.0),
        disable_bias_correction=not recipe.bias_correction,
    )
