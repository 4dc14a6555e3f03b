"""Groups of operations that are judged together and stay float together: one kind of layer in one stage, in
the model's own names.

A node's group comes from the path of the module that made it (:data:`MODULE` in the node's metadata), without
the numbers of the blocks: ``stages.2.blocks.5.ffn.expand`` is in ``stages.2.ffn``. Models without stages have
one long row of blocks, which is cut into :data:`PARTS` groups: ``blocks.4.attn.qkv`` of 12 blocks is in
``blocks[3-5].attn``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import onnx
import onnx_ir as ir

from .graph import get_node_name, is_constant, open_view
from .recipe import is_depthwise_node

MODULE = "module"
"""Key in a node's metadata: the path of the module that made the node, as in the model's ``state_dict``."""

PARTS = 4
"""The number of groups into which a row of blocks outside of stages is cut, if it has at least twice as many
blocks."""

COMMON_GROUPS = ("@products", "@depthwise", "@linears")
"""Names of the groups that every model has: products of two activations, depthwise convs, and products of any
kind (every int8 operation that is not a conv)."""


def find_module(node: ir.Node) -> str:
    """Path of the module that made ``node``; its own name where that is not known."""
    return node.metadata_props.get(MODULE, get_node_name(node))


def name_groups(paths: Collection[str]) -> dict[str, str]:
    """Module path -> group.

    ``paths`` are those of all operations that may be grouped: how a model is divided into stages and blocks
    shows only in all of them together.
    """
    rows = _find_rows(paths)
    stages = {_find_parent(row) for row in rows}
    names = {path: _find_group(path, rows, stages) for path in paths}
    alone = _find_only_children(names.values(), rows)
    return {path: _find_parent(name) if name in alone else name for path, name in names.items()}


def _find_only_children(names: Iterable[str], rows: Collection[str]) -> set[str]:
    """Groups that are the only one in their row of blocks."""
    siblings = defaultdict(set)
    for name in names:
        siblings[_find_parent(name)].add(name)
    inner = [children for parent, children in siblings.items() if parent in rows]
    lonely = [children for children in inner if len(children) == 1]
    return set().union(*lonely)


def _find_rows(paths: Iterable[str]) -> dict[str, list[int]]:
    """The innermost containers of numbered blocks with modules of their own, and the blocks' numbers."""
    rows: dict[str, set[int]] = defaultdict(set)
    for path in paths:
        parts = path.split(".")
        inner = [i for i, part in enumerate(parts) if part.isdigit() and 0 < i < len(parts) - 1]
        if inner:
            last = inner[-1]
            row = ".".join(parts[:last])
            rows[row].add(int(parts[last]))
    nested = {outer for outer in rows for other in rows if other.startswith(f"{outer}.")}
    return {row: sorted(numbers) for row, numbers in rows.items() if row not in nested}


def _find_group(
    path: str,
    rows: Mapping[str, list[int]],
    stages: Collection[str],
) -> str:
    """The group of one module, in a block or beside the blocks."""
    for row, numbers in rows.items():
        number, _, rest = path.removeprefix(f"{row}.").partition(".")
        if path.startswith(f"{row}.") and number.isdigit():
            container = _find_parent(row) or row + _name_part(int(number), numbers)
            kind = rest.split(".")[0]
            return f"{container}.{kind}" if kind else container
    inside = [stage for stage in stages if stage and path.startswith(f"{stage}.")]
    stage = max(inside, key=len, default="")
    if not stage:
        return path.split(".", maxsplit=1)[0]
    child = path.removeprefix(f"{stage}.").split(".")[0]
    return f"{stage}.{child}"


def _name_part(number: int, numbers: list[int]) -> str:
    """The part of a row that a block is in, like ``"[3-5]"``; empty for a short row."""
    if len(numbers) < 2 * PARTS:
        return ""
    place = numbers.index(number) * PARTS // len(numbers)
    members = [n for i, n in enumerate(numbers) if i * PARTS // len(numbers) == place]
    return f"[{members[0]}-{members[-1]}]"


def _find_parent(path: str) -> str:
    return path.rpartition(".")[0]


def group_nodes(
    model: onnx.ModelProto,
    nodes: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """Group -> names of those of ``nodes`` in it, in the graph's order; ``model`` carries the modules'
    names."""
    with open_view(model) as view:
        found = [node for node in view.graph if node.name in nodes]
        chosen = [(get_node_name(node), find_module(node)) for node in found]
    names = name_groups({module for _, module in chosen})
    groups: dict[str, list[str]] = {}
    for node, module in chosen:
        groups.setdefault(names[module], []).append(node)
    return {group: tuple(members) for group, members in groups.items()}


def group_by_kind(
    model: onnx.ModelProto,
    nodes: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """As :func:`group_nodes`, for the groups that every model has (:data:`COMMON_GROUPS`)."""
    with open_view(model) as view:
        chosen = [node for node in view.graph if node.name in nodes]
        products = [node for node in chosen if node.op_type in ("MatMul", "Gemm")]
        members = (
            [node for node in products if not any(is_constant(value) for value in node.inputs)],
            [node for node in chosen if is_depthwise_node(node)],
            products,
        )
    return {
        name: tuple(get_node_name(node) for node in found)
        for name, found in zip(COMMON_GROUPS, members, strict=True)
    }
