"""Where the time of an inference goes: by class of operation, and by block of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..backends.profile import NodeRun, Profile
from ..bundle import REPORT_JSON, Bundle, parse_json
from ..bundle.record import read_record
from ..bundle.sections import Count, Share
from ..files import read_regular

MAX_REPORT = 16 << 20
"""A larger ``report.json``, in bytes, is not read."""
ELSEWHERE = ""
"""Name of the block of operations of which no block is known."""


@dataclass(frozen=True)
class Part:
    """A class of operations, or a block of the model.

    Attributes:
        name: the runtime's name of the class; the path of the block's module, or empty for operations of
            which no block is known.
        share: of the time of all operations.
        operations: number of operations that the runtime runs.
        precisions: precision -> its share of the time of all operations; they sum to ``share``.
    """

    name: str
    share: Share
    operations: Count
    precisions: dict[str, Share]


@dataclass(frozen=True)
class Breakdown:
    """Where the time goes, by the runtime's own clock, which costs time itself.

    Attributes:
        source: where the figures come from.
        kinds: classes of operations, the slowest first.
        blocks: in the order in which they run; empty where no block is known.
    """

    source: str
    kinds: tuple[Part, ...]
    blocks: tuple[Part, ...]


@dataclass(frozen=True)
class _Blocks:
    """The entry of ``report.json``: block -> names of its operations in ``model.onnx``."""

    blocks: dict[str, tuple[str, ...]]


def read_blocks(bundle: Bundle) -> dict[str, str]:
    """Name of each operation of a bundle's graph -> its block; empty where the bundle does not record it.

    Raises:
        BundleError: its report cannot be read.
    """
    if REPORT_JSON not in bundle.manifest.files:
        return {}
    file = bundle.file(REPORT_JSON)
    with bundle.kept():
        content = parse_json(read_regular(file, MAX_REPORT), file, "the report")
    recorded = content.get("blocks", {}) if isinstance(content, dict) else {}
    found = read_record(_Blocks, {"blocks": recorded}, file, "the report")
    return {node: block for block, nodes in found.blocks.items() for node in nodes}


def break_down(profile: Profile, blocks: Mapping[str, str]) -> Breakdown:
    """The sums of a profile.

    Args:
        profile: of some inferences.
        blocks: name of an operation of ``model.onnx`` -> its block.
    """
    total = profile.seconds
    kinds = _add_up(((node.kind, node) for node in profile.nodes), total)
    kinds.sort(key=lambda part: -part.share)
    named = zip(find_blocks(profile.nodes, blocks), profile.nodes, strict=True)
    return Breakdown(profile.source, tuple(kinds), tuple(_add_up(named, total)) if blocks else ())


def find_blocks(nodes: Iterable[NodeRun], blocks: Mapping[str, str]) -> list[str]:
    """The block of each operation.

    A runtime fuses operations; one that stands for several blocks counts to the last of them. One that names
    none of the graph's, such as a reorder that the runtime adds, counts to the block of the next one that
    does.
    """
    found: list[str] = []
    following = ELSEWHERE
    for node in reversed([*nodes]):
        known = [blocks[source] for source in node.sources if source in blocks]
        following = known[-1] if known else following
        found.append(following)
    return found[::-1]


def _add_up(named: Iterable[tuple[str, NodeRun]], total: float) -> list[Part]:
    """The parts in the order of their first operations."""
    members: dict[str, list[NodeRun]] = {}
    for name, node in named:
        members.setdefault(name, []).append(node)
    return [
        Part(
            name,
            sum(node.seconds for node in nodes) / total,
            len(nodes),
            {
                precision: sum(node.seconds for node in nodes if node.precision == precision) / total
                for precision in dict.fromkeys(node.precision for node in nodes)
            },
        )
        for name, nodes in members.items()
    ]
