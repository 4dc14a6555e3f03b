"""Groups of operations that are judged and kept float together: one kind of layer in one stage, in the
model's own names.

A node's group comes from the path of the module that made it (:data:`MODULE` in the node's metadata), without
the numbers of the blocks: ``stages.2.blocks.5.ffn.expand`` is in ``stages.2.ffn``. Models without stages have
one long row of blocks, which is cut into :data:`PARTS`: ``blocks.4.attn.qkv`` of 12 blocks is in
``blocks[3-5].attn``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

import onnx

from .recipe import is_depthwise

MODULE = "module"
"""Key of a node's metadata: path of the module that made it, as in the model's ``state_dict``."""
PARTS = 4
"""A row of blocks that is no part of a stage is cut into so many groups, if it has at least twice as many
blocks."""
CLASSES = ("@products", "@depthwise", "@linears")
"""Groups of every model: products of two activations; depthwise convs; products of any kind (all that is not
a conv)."""


def module_of(node: onnx.NodeProto) -> str:
    """Path of the module that made ``node``; its own name where that is not known."""
    return next((p.value for p in node.metadata_props if p.key == MODULE), node.name)


def group_names(paths: Collection[str]) -> dict[str, str]:
    """Module path -> group. ``paths``: of all operations in question; how a model is divided shows only in
    their whole."""
    rows = _rows(paths)
    stages = {_parent(row) for row in rows}
    names = {path: _group(path, rows, stages) for path in paths}
    siblings = defaultdict(set)
    for name in names.values():
        siblings[_parent(name)].add(name)
    alone = {
        name
        for parent, children in siblings.items()
        if parent in rows and len(children) == 1
        for name in children
    }
    return {path: _parent(name) if name in alone else name for path, name in names.items()}


def _rows(paths: Iterable[str]) -> dict[str, list[int]]:
    """Innermost containers of numbered blocks that are modules of their own, and the numbers in use."""
    rows: dict[str, set[int]] = defaultdict(set)
    for path in paths:
        parts = path.split(".")
        inner = [i for i, part in enumerate(parts) if part.isdigit() and 0 < i < len(parts) - 1]
        if inner:
            rows[".".join(parts[: inner[-1]])].add(int(parts[inner[-1]]))
    nested = {outer for outer in rows for other in rows if other.startswith(f"{outer}.")}
    return {row: sorted(numbers) for row, numbers in rows.items() if row not in nested}


def _group(path: str, rows: Mapping[str, list[int]], stages: Collection[str]) -> str:
    row = next(
        (
            r
            for r in rows
            if path.startswith(f"{r}.") and path[len(r) + 1 :].split(".", maxsplit=1)[0].isdigit()
        ),
        None,
    )
    if row is not None:
        number, _, rest = path[len(row) + 1 :].partition(".")
        kind = rest.split(".")[0]
        container = _parent(row) or row + _part(int(number), rows[row])
        return f"{container}.{kind}" if kind else container
    inside = [s for s in stages if s and path.startswith(f"{s}.")]
    stage = max(inside, key=len, default="")
    child = path[len(stage) + 1 if stage else 0 :].split(".", maxsplit=1)[0]
    return f"{stage}.{child}" if stage else child


def _part(number: int, numbers: list[int]) -> str:
    """``"[3-5]"``: the part of a row that ``number`` is in; empty for a short row."""
    if len(numbers) < 2 * PARTS:
        return ""
    place = numbers.index(number) * PARTS // len(numbers)
    members = [n for i, n in enumerate(numbers) if i * PARTS // len(numbers) == place]
    return f"[{members[0]}-{members[-1]}]"


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def groups_of(model: onnx.ModelProto, nodes: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Group -> names of those of ``nodes`` in it, in the graph's order; ``model`` carries the modules'
    names."""
    chosen = [node for node in model.graph.node if node.name in nodes]
    names = group_names({module_of(node) for node in chosen})
    groups: dict[str, list[str]] = {}
    for node in chosen:
        groups.setdefault(names[module_of(node)], []).append(node.name)
    return {group: tuple(members) for group, members in groups.items()}


def classes_of(model: onnx.ModelProto, nodes: Collection[str]) -> dict[str, tuple[str, ...]]:
    """As :func:`groups_of`, for the groups that every model has (:data:`CLASSES`)."""
    constants = {i.name for i in model.graph.initializer}
    products = [n for n in model.graph.node if n.name in nodes and n.op_type in ("MatMul", "Gemm")]
    free = tuple(n.name for n in products if not constants.intersection(n.input))
    depthwise = tuple(n.name for n in model.graph.node if n.name in nodes and is_depthwise(n))
    return dict(zip(CLASSES, (free, depthwise, tuple(n.name for n in products)), strict=True))
