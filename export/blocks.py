"""Which block of the model each operation of its graph belongs to."""

from __future__ import annotations

import onnx

from cmt_edge.calib.groups import MODULE


def name_blocks(graph: onnx.ModelProto) -> dict[str, str]:
    """Name of each operation -> the block of the model that it is in; operations without a module are left
    out."""
    found = {}
    for node in graph.graph.node:
        modules = [prop.value for prop in node.metadata_props if prop.key == MODULE]
        module = modules[0] if modules else ""
        if module:
            found[node.name] = name_block(module)
    return found


def name_block(module: str) -> str:
    """The block that a module belongs to: its path up to the last number, ``stages.2.blocks.5`` of
    ``stages.2.blocks.5.ffn.expand``; of a path without numbers the first part."""
    parts = module.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else parts[0]


def list_by_block(blocks: dict[str, str]) -> dict[str, list[str]]:
    """Block -> names of its operations, from what :func:`name_blocks` gives."""
    found: dict[str, list[str]] = {}
    for node, block in blocks.items():
        found.setdefault(block, []).append(node)
    return found
