"""Where the outputs of the model's blocks are in a graph: found by their values, and never guessed.

The blocks of the PyTorch reference have names, which rewriting and tracing do not keep. Therefore the float32
graph computes some golden images with its tensors as further outputs, and a block gets the tensor that has
the values of its module: alike, or in another layout. A module that an exact rewrite has changed may have no
such tensor. Then the input of its last layer is looked for, which folded norms leave as it is, and its first
tokens, where the graph computes no others. Otherwise the block has none, and nothing is compared for it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from cmt_edge.calib.graph import DEQUANTIZE, MOVES, QUANTIZE, name_value, open_view
from cmt_edge.calib.groups import MODULE
from cmt_edge.calib.running import open_graph
from cmt_edge.deploy.backends.torch_blocks import Seen, find_last_leaf, list_blocks, watch
from cmt_edge.deploy.bundle.sections import BlockPlace
from cmt_edge.deploy.measure.layouts import Distance, find_layouts, restore_layout

from ..to_onnx import guarded
from .reference import Reference

PROBED = 2
"""Number of golden images on which tensors and modules are compared."""

NEAR = 1e-4
"""The largest relative error (Euclidean) of a tensor of the float32 graph that counts as a module's output;
both round in float32."""

STEP = "find the blocks in the graph"
"""The name of this step in error messages."""

UNLIKE = "no tensor of the graph has its values"
"""Why a block is not compared that an exact rewrite has changed."""

OVERWRITTEN = "the graph of this precision has no such tensor"
"""Why a block is not compared whose tensor later steps have taken away."""


@dataclass(frozen=True)
class _Candidate:
    """A computed tensor: its name, the module of the node that made it, and its values."""

    name: str
    module: str
    values: np.ndarray


@dataclass(frozen=True)
class _Target:
    """Values that a block's tensor may have, and how the place says so."""

    values: np.ndarray
    before: str | None = None
    rows: int | None = None

    @property
    def elements(self) -> int:
        """The number of elements of one image."""
        return math.prod(self.values.shape[1:])


def find_blocks(
    source: onnx.ModelProto, final: onnx.ModelProto, reference: Reference
) -> tuple[BlockPlace, ...]:
    """The place of every block of the reference, in the order in which the model computes them.

    Args:
        source: the float32 graph that ``final`` was made from.
        final: the graph of the bundle, whose tensors keep the names that they have in ``source``.
        reference: the PyTorch side.

    Raises:
        StepError: ONNX Runtime cannot run the graph.
    """
    batch = reference.batch[:PROBED]
    model = reference.classifier
    blocks = list_blocks(model)
    leaves = {path: find_last_leaf(model.get_submodule(path)) for path in blocks}
    inside = {path: f"{path}.{leaf}" for path, leaf in leaves.items() if leaf}
    with guarded(STEP):
        _, seen = watch(reference.model, batch, blocks, inside.values(), model)
        targets = {path: _list_targets(path, inside.get(path), seen) for path in blocks}
        sizes = {target.elements for found in targets.values() for target in found}
        candidates = _compute_candidates(source, batch, sizes)
        places = [_find_place(path, targets[path], candidates, seen) for path in _sort(blocks, seen)]
        return _drop_repeated(_require_present(places, source, final))


def _sort(blocks: Sequence[str], seen: Seen) -> list[str]:
    """Blocks in the order in which the model was done with them; those that it did not call come last."""
    return [*seen.outputs, *(path for path in blocks if path not in seen.outputs)]


def _list_targets(path: str, last_leaf: str | None, seen: Seen) -> list[_Target]:
    """What the tensor of a block may hold, the best first."""
    output = seen.find_output(path)
    if isinstance(output, str):
        return []
    found = [_Target(output)]
    if output.ndim == 3 and output.shape[1] > 1:
        found.append(_Target(output[:, :1], rows=1))
    before = seen.find_input(last_leaf) if last_leaf else ""
    if isinstance(before, np.ndarray):
        found.append(_Target(before, before=str(last_leaf).removeprefix(f"{path}.")))
    return found


def _compute_candidates(graph: onnx.ModelProto, batch: np.ndarray, sizes: set[int]) -> list[_Candidate]:
    """Every computed float tensor that has one of these numbers of elements for an image."""
    with open_view(graph, types=True) as view:
        made = [(node, value) for node in view.graph for value in node.outputs if _computes(node)]
        chosen = {
            name_value(value): node.metadata_props.get(MODULE, "")
            for node, value in made
            if value.dtype == ir.DataType.FLOAT and _count_elements(value) in sizes
        }
    if not chosen:
        return []
    present = {output.name for output in graph.graph.output}
    more = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in chosen if name not in present])
    run = open_graph(graph, functools.partial(guarded, STEP), list(chosen), added=more)
    return [
        _Candidate(name, module, found)
        for (name, module), found in zip(chosen.items(), run(batch), strict=True)
    ]


def _computes(node: ir.Node) -> bool:
    return node.op_type not in (*MOVES, QUANTIZE, DEQUANTIZE, "Constant", "Identity", "Cast")


def _count_elements(value: ir.Value) -> int:
    """The number of elements of one image; 0 where it is not known."""
    dims = tuple(value.shape.dims[1:]) if value.shape is not None and len(value.shape) > 1 else (0,)
    return math.prod(dim if isinstance(dim, int) else 0 for dim in dims)


def _find_place(
    path: str,
    targets: Sequence[_Target],
    candidates: Sequence[_Candidate],
    seen: Seen,
) -> BlockPlace:
    """The place of one block: the nearest tensor among those that nodes of its own module made, and among all
    tensors where there is none."""
    if not targets:
        return BlockPlace(name=path, missing=str(seen.find_output(path)))
    own = [candidate for candidate in candidates if f"{candidate.module}.".startswith(f"{path}.")]
    for target in targets:
        for chosen in (own, candidates):
            found = _find_nearest(target, chosen)
            if found is not None:
                tensor, layout = found
                return BlockPlace(
                    name=path, tensor=tensor, layout=layout, before=target.before, rows=target.rows
                )
    return BlockPlace(name=path, missing=UNLIKE)


def _find_nearest(target: _Target, candidates: Sequence[_Candidate]) -> tuple[str, str] | None:
    """Name and layout of the tensor that is nearest to a target, if it is near; the first one of equals."""
    errors = {
        (candidate.name, layout): _measure(candidate.values, layout, target.values)
        for candidate in candidates
        for layout in find_layouts(candidate.values.shape, target.values.shape)
    }
    best = min(errors, key=errors.__getitem__, default=None)
    return best if best is not None and errors[best] <= NEAR else None


def _measure(values: np.ndarray, layout: str, target: np.ndarray) -> float:
    distance = Distance()
    distance.add(restore_layout(values, layout, target.shape), target)
    return distance.relative_error


def _require_present(
    places: Sequence[BlockPlace], source: onnx.ModelProto, final: onnx.ModelProto
) -> list[BlockPlace]:
    """``places`` whose tensors the final graph still has, made by the same operations."""
    before, after = _list_makers(source), _list_makers(final)
    return [
        place
        if place.tensor is None or after.get(place.tensor) == before[place.tensor]
        else BlockPlace(name=place.name, missing=OVERWRITTEN)
        for place in places
    ]


def _list_makers(graph: onnx.ModelProto) -> Mapping[str, tuple[str, str]]:
    """Tensor -> name and kind of the operation that makes it."""
    return {name: (node.name, node.op_type) for node in graph.graph.node for name in node.output}


def _drop_repeated(places: Sequence[BlockPlace]) -> tuple[BlockPlace, ...]:
    """``places`` without modules that return what a block inside them has returned: stages."""
    taken: dict[str, str] = {}
    kept = []
    for place in places:
        inner = taken.get(place.tensor or "", "")
        if inner.startswith(f"{place.name}."):
            continue
        taken.setdefault(place.tensor or "", place.name)
        kept.append(place)
    return tuple(kept)
