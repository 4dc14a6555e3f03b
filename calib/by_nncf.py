"""Q/DQ pairs by NNCF, with signed quantizers directly before the layers.

NNCF decides where pairs stand, which of them share a scale, and what the scales are. It takes the extremes of
activations from images that it runs itself (:func:`run_nncf`), or is handed them
(:class:`RangeQuantizer`): extremes can be measured in parts, on several machines, and put together exactly.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx

from .graph import declare_weights, open_view, write_model
from .nncf_patterns import fitting_nodes_only
from .qdq_pairs import move_pairs_to_layers, sign_quantizers
from .recipe import Recipe
from .running import Extremes
from .statistics import Images, guard

IMAGES_AT_ONCE = 4
"""The number of images on which statistics are collected at once. More need more memory and save little."""


class RangeQuantizer:
    """NNCF with the extremes of activations handed to it.

    Attributes:
        tensors: names of the tensors whose extremes it needs, sorted.
    """

    def __init__(self, model: onnx.ModelProto, recipe: Recipe) -> None:
        """Let NNCF look at ``model``, which is not modified.

        Args:
            model: the float graph.
            recipe: with extremes as ranges and without corrections of biases, which need images.

        Raises:
            StepError: NNCF failed.
        """
        nncf = _import_nncf()
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        with guard("NNCF"), _silence(), fitting_nodes_only():
            self._open(nncf, recipe)
        self.tensors = tuple(sorted({name for name, _ in self._collectors} - set(self._constants)))

    def _open(self, nncf: Any, recipe: Recipe) -> None:
        """As :func:`nncf.quantize` begins, up to the collection of statistics."""
        from nncf.onnx.graph.passes import apply_preprocess_passes
        from nncf.quantization.algorithms.post_training.algorithm import PostTrainingQuantization

        self._model = apply_preprocess_passes(self._model)
        self._algorithm = PostTrainingQuantization(**_make_settings(nncf, self._model, recipe))
        self._graph = nncf.build_graph(self._model)
        self._points = self._algorithm.get_statistic_points(self._model, self._graph)
        self._constants = {tensor.name: tensor for tensor in self._model.graph.initializer}
        nodes = {node.name: node for node in self._model.graph.node}
        self._collectors = [
            (self._find_tensor(point.target_point, nodes), collector)
            for _, point, collector in self._points.get_tensor_collectors()
        ]

    def _find_tensor(self, point: Any, nodes: Mapping[str, onnx.NodeProto]) -> str:
        """The tensor that NNCF observes; it calls the graph's input a node, too."""
        node = nodes.get(point.target_node_name)
        if node is None:
            return str(self._model.graph.input[0].name)
        is_output = point.type.name == "POST_LAYER_OPERATION"
        return str((node.output if is_output else node.input)[point.port_id])

    def quantize(self, extremes: Extremes) -> onnx.ModelProto:
        """The Q/DQ graph.

        Args:
            extremes: of all :attr:`tensors`, ``(images, 1)`` each.

        Raises:
            StepError: NNCF failed.
        """
        from nncf.onnx.graph.passes import compress_quantize_weights_transformation
        from nncf.tensor import Tensor

        with guard("NNCF"), _silence():
            ranks = self._read_ranks()
            for name, collector in self._collectors:
                if name in self._constants:
                    values = onnx.numpy_helper.to_array(self._constants[name])
                else:
                    values = _make_example(*extremes[name], max(ranks.get(name, 1), 1))
                collector.register_input_for_all_reducers(Tensor(values))
            result = self._algorithm.apply(self._model, self._graph, self._points)
            compress_quantize_weights_transformation(result)
        return _arrange_pairs(result)

    def _read_ranks(self) -> dict[str, int]:
        """The number of dimensions of each activation whose shape ONNX can tell; NNCF reduces others along
        all dimensions, whatever their number is."""
        graph = onnx.shape_inference.infer_shapes(declare_weights(self._model)).graph
        infos = (*graph.input, *graph.value_info, *graph.output)
        return {info.name: len(info.type.tensor_type.shape.dim) for info in infos}


def _make_example(lows: np.ndarray, highs: np.ndarray, rank: int) -> np.ndarray:
    """A tensor of ``rank`` dimensions with two values, which has the extremes of all images."""
    values = np.array([lows.min(), highs.max()], np.float32)
    return values.reshape((1,) * (rank - 1) + (2,))


class _Grouped:
    """The ``chosen`` ones of ``batches``, ``size`` at a time.

    Extremes over all are the same, and statistics of many small tensors cost more than of a few larger ones.
    """

    def __init__(self, batches: Images, chosen: Collection[int], size: int) -> None:
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
    batches: Images,
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
    with guard("NNCF"), _silence(), fitting_nodes_only():
        result = nncf.quantize(
            copy,
            dataset,
            subset_size=len(grouped),
            **_make_settings(nncf, copy, recipe),
        )
    return _arrange_pairs(result)


def _make_settings(nncf: Any, model: onnx.ModelProto, recipe: Recipe) -> dict[str, Any]:
    """NNCF's arguments for ``recipe``."""
    return {
        "preset": nncf.QuantizationPreset.PERFORMANCE,  # symmetric activations
        "model_type": nncf.ModelType.TRANSFORMER,
        "fast_bias_correction": True,
        "ignored_scope": nncf.IgnoredScope(names=recipe.float_nodes(model), validate=False),
        "advanced_parameters": _make_parameters(nncf, recipe),
    }


def _arrange_pairs(result: onnx.ModelProto) -> onnx.ModelProto:
    """NNCF's graph with signed quantizers, and their pairs directly before the layers."""
    with open_view(result) as view:
        sign_quantizers(view.graph)
        move_pairs_to_layers(view.graph)
        return write_model(view)


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
