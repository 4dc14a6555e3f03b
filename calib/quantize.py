"""Makes one Q/DQ ONNX graph for every runtime from a float graph, images, and a recipe.

NNCF calibrates; results are cached by content.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from pathlib import Path

import onnx
import PIL
from threadpoolctl import threadpool_limits

from cmt_edge.deploy.cache import Cache, Files
from cmt_edge.deploy.errors import GateError, InputError
from cmt_edge.deploy.preprocessing import Preprocess

from .by_nncf import RangeQuantizer, run_nncf
from .data import CalibrationSet
from .equalize import Equalized, equalize
from .graph import get_input, get_node_name, name_value, open_view, write_model
from .groups import group_by_kind, group_nodes
from .lint import lint, list_half_int8_nodes
from .recipe import DEFAULT, INT8_OPS, Recipe
from .refine import refine
from .restore import list_int8_nodes, restore
from .statistics import Batches, LocalStatistics, Request, Statistics
from .trunk import find_trunk, list_trunk, read_floats

CACHED_FILES = 20
"""The number of calibrated graphs that the cache keeps, with the float graphs they were made from. The oldest
are deleted first."""

ENOUGH = 64
"""The smallest number of images from which means are taken, for the correction of biases."""

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

    @cached_property
    def int8_nodes(self) -> list[str]:
        """Names of the operations that compute in int8, in the graph's order."""
        return list_int8_nodes(self.model)

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> names of the operations in it that compute in int8."""
        return group_nodes(self.source, self.int8_nodes) | group_by_kind(self.source, self.int8_nodes)

    @cached_property
    def trunk(self) -> list[str]:
        """Names of the layers that may read floats, see :mod:`cmt_edge.calib.trunk`."""
        return list_trunk(self.source)


def quantize(
    model: onnx.ModelProto,
    data: CalibrationSet,
    spec: Preprocess,
    recipe: Recipe = DEFAULT,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    statistics: Statistics | None = None,
) -> Quantized:
    """Quantize a float graph.

    Args:
        model: float32 ONNX graph with input ``(batch, 3, S, S)``, which is not modified.
        data: the calibration images.
        spec: their preprocessing.
        recipe: what stays float.
        cache: a folder of calibrated graphs, where nothing is calibrated twice.
        progress: is called with the number of images that were read, and the number of all images.
        statistics: measures on the images; by default this process does. What it raises passes through.

    Raises:
        GateError: the result breaks a rule of :func:`cmt_edge.calib.lint.lint`.
        InputError: ``recipe.keep_float`` names what the graph lacks, or all that could be int8.
        StepError: NNCF failed.
    """
    plain = replace(recipe, keep_float=())

    def make() -> Quantized:
        used = statistics or LocalStatistics(Batches(data, spec, progress))
        made = calibrate(model, used, plain)
        _require_clean(made.model, made.trunk)
        return made

    if cache is None:
        whole = make()
    else:
        whole = Cache(cache, (".float", ".onnx"), CACHED_FILES).get(
            _make_key(model.SerializeToString(deterministic=True), data, spec, plain),
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
    return None if lint(model, list_trunk(source)) else Quantized(model, source, recipe.key(), True)


def keep_float(quantized: Quantized, names: tuple[str, ...]) -> onnx.ModelProto:
    """The graph of ``quantized`` with the named groups or operations float again.

    Raises:
        InputError: a name belongs to neither a group nor an operation, or nothing would be left in int8.
    """
    groups = quantized.groups
    singles = {node.name for node in quantized.source.graph.node}
    unknown = [name for name in names if name not in groups and name not in singles]
    if unknown:
        raise InputError(
            f"the model has no group of operations {unknown[0]!r} to keep float",
            remedy=f"choose from {', '.join(groups)}",
        )
    chosen = {node for name in names for node in groups.get(name, (name,))}
    if chosen.issuperset(quantized.int8_nodes):
        raise InputError(
            "nothing would be left in int8",
            remedy="keep fewer groups float, or use --precision fp32 or bf16",
        )
    restored = restore(quantized.model, quantized.source, chosen)
    _require_clean(restored, quantized.trunk)
    return restored


def _make_key(
    content: bytes,
    data: CalibrationSet,
    spec: Preprocess,
    recipe: Recipe,
) -> str:
    import onnxruntime as ort  # not where nothing is kept

    parts = [
        hashlib.sha256(content).hexdigest(),
        data.fingerprint,
        repr(spec),
        recipe.key(),
    ]
    # not as installed: onnxruntime-gpu and Pillow-SIMD bring the same modules
    versions = {"nncf": metadata.version("nncf"), "onnxruntime": ort.__version__, "pillow": PIL.__version__}
    parts += [f"{name} {version}" for name, version in versions.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _require_clean(graph: onnx.ModelProto, trunk: Collection[str]) -> None:
    """Raise :class:`GateError` where a Q/DQ graph breaks a rule."""
    findings = lint(graph, trunk)
    if findings:
        hidden = len(findings) - SHOWN_RULES
        more = f" and {hidden} more" if hidden > 0 else ""
        raise GateError(
            "the quantized graph breaks the rules for int8",
            why="; ".join(findings[:SHOWN_RULES]) + more,
            remedy="report the model; an fp32 or bf16 bundle is not affected",
        )


def calibrate(
    model: onnx.ModelProto,
    statistics: Statistics,
    recipe: Recipe,
) -> Quantized:
    """:func:`quantize` without a cache, without ``keep_float``, and without the rules of
    :func:`cmt_edge.calib.lint.lint`, which some choices of a recipe break."""
    with threadpool_limits(1, "blas"):  # sums of several threads would round differently
        placed = place_pairs(model, statistics, recipe)
        calibrated = placed.model
        if recipe.smooth_quant is None:
            calibrated = refine(
                calibrated,
                placed.source,
                statistics,
                placed.reach if recipe.shift else {},
                search=recipe.range_estimator == "error",
                rounding=recipe.rounding,
                biases=recipe.bias_correction,
                fits_16_bits=recipe.fits_16_bits,
            )
    return Quantized(calibrated, placed.source, recipe.key(), False)


@dataclass(frozen=True)
class Placed:
    """The result of :func:`place_pairs`.

    Attributes:
        model: the graph with Q/DQ pairs, whose weights are rounded to the nearest.
        source: the float graph that it was made from.
        reach: tensor of ``source`` that layers read -> its lowest and its highest value.
    """

    model: onnx.ModelProto
    source: onnx.ModelProto
    reach: Mapping[str, tuple[float, float]]


def place_pairs(
    model: onnx.ModelProto,
    statistics: Statistics,
    recipe: Recipe,
) -> Placed:
    """The first part of :func:`calibrate`: Q/DQ pairs with extremes as ranges. Weights are rounded to the
    nearest; with ``smooth_quant`` NNCF corrects the biases."""
    equalized = equalize(model, statistics, _read_in_int8(model, recipe), rescales=recipe.equalize)
    source = equalized.model
    if recipe.smooth_quant is not None or recipe.range_estimator == "mean_minmax":
        calibrated = _place_by_images(equalized, statistics, recipe)
    else:
        observed = equalized.telling or tuple(range(len(statistics)))
        calibrated = _place_by_ranges(source, statistics, observed, recipe)
    # NNCF gives no scale to what does not come from the image alone, such as coordinates beside a map.
    halves = list_half_int8_nodes(calibrated)
    if halves:
        calibrated = restore(calibrated, source, halves)
    if recipe.float_trunk:
        calibrated = _free_trunk(calibrated, list_trunk(source))
    return Placed(calibrated, source, equalized.reach)


def _free_trunk(calibrated: onnx.ModelProto, names: Collection[str]) -> onnx.ModelProto:
    """A copy whose layers of these names read floats."""
    with open_view(calibrated) as view:
        read_floats(view.graph, names)
        return write_model(view)


def _place_by_ranges(
    source: onnx.ModelProto,
    statistics: Statistics,
    observed: tuple[int, ...],
    recipe: Recipe,
) -> onnx.ModelProto:
    """The graph with pairs that NNCF makes with the extremes over the ``observed`` images."""
    quantizer = RangeQuantizer(source, replace(recipe, range_estimator="minmax", bias_correction=False))
    found = statistics.measure(Request(source, whole=quantizer.tensors, observed=observed))
    return quantizer.quantize(found.extremes)


def _place_by_images(
    equalized: Equalized,
    statistics: Statistics,
    recipe: Recipe,
) -> onnx.ModelProto:
    """The graph with pairs that NNCF makes of images: of means, or with corrections of biases."""
    refines = recipe.smooth_quant is None
    ranges = "mean_minmax" if recipe.range_estimator == "mean_minmax" else "minmax"
    chosen: Collection[int] = range(len(statistics))
    if ranges == "minmax" and equalized.telling:
        chosen = fill_up(equalized.telling, len(statistics))
    nncf_recipe = replace(
        recipe,
        range_estimator=ranges,
        bias_correction=recipe.bias_correction and not refines,
    )
    return run_nncf(equalized.model, statistics.list_batches(), chosen, nncf_recipe)


def _read_in_int8(model: onnx.ModelProto, recipe: Recipe) -> set[str]:
    """Tensors that layers may read in int8."""
    with open_view(model) as view:
        floats = set(recipe.float_nodes_of(view.graph))
        if recipe.float_trunk:
            floats.update(get_node_name(node) for node in find_trunk(view.graph))
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
