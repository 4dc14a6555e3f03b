"""What an engine's layers really compute in, read from TensorRT's engine inspector.

The JSON of ``get_engine_information`` differs between versions: an input's type stands in ``Format/Datatype``
("Row major linear FP16 format", "Half") up to 10.x and apart from the format in 11 (``Datatype``). Only the
words are looked at, so both are understood. Source: TensorRT documentation, "Engine Inspector"; the engines
of NVIDIA's TREx examples.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cmt_edge.startup import name_program

from ..bundle.sections import ExecutedPrecision
from ..errors import GateError, StepError

WORDS = (
    ("int8", r"\bint8\b"),
    ("fp8", r"\bfp8\w*\b"),
    ("bf16", r"\b(bf16|bfloat16|bfloat)\b"),
    ("fp16", r"\b(fp16|half|float16)\b"),
    ("fp32", r"\b(fp32|float|float32|tf32)\b"),
)
"""Precisions with the words for them, the lowest first."""
CONVERTING_KINDS = (
    "reformat",
    "cast",
    "copy",
    "noop",
    "shuffle",
    "identity",
    "quantize",
    "dequantize",
)
"""Words in the kinds of layers that only move or convert."""
NO_COMPUTE = (
    "constant",
    "shape",
    "shape_call",
    "assertion",
    "signal",
    "wait",
)
"""Kinds of layers that neither compute nor convert."""
GENERATED_MOVE = re.compile(
    r"^__myl_(move|cast?|copy|reform|quan|dequ|tran|resh|conc|slic|repl)+(_myl|$)", re.IGNORECASE
)
"""Names of generated kernels (kind "kgen") that only move or convert; the name lists what was fused into
one."""
TACTICS = (
    ("int8", r"(?<![a-z0-9])(i8i8|s8s8|imma)"),
    ("fp16", r"(?<![a-z0-9])(f16f16|h884|h1688|h16816|hmma)"),
    ("fp32", r"(?<![a-z0-9])(f32f32|tf32|s1688)"),
)
"""Words of kernel names, for layers whose tensors tell nothing."""
LOW = {"int8": ("int8",), "fp16": ("int8", "fp8", "fp16", "bf16")}
"""Precision that was asked for -> those that are as low or lower."""
SOURCE = "TensorRT engine inspector"
"""Where the figures come from, for reports."""
LEAST_KEPT_SHARE = 0.5
"""Fusions change how many operations there are, so an engine passes with this part of the low-precision share
of its graph."""


@dataclass(frozen=True)
class EngineLayer:
    """One layer: ``precision`` is the lowest its inputs have; ``conversion`` if it only moves or converts."""

    name: str
    kind: str
    precision: str
    conversion: bool


def read_layers(text: str) -> list[EngineLayer]:
    """The computing and converting layers of an inspector's JSON; raises :class:`StepError` if it cannot be
    understood."""
    try:
        entries = json.loads(text, strict=False)["Layers"]
        found = [_read_layer(entry) for entry in entries if isinstance(entry, dict)]
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise StepError(
            "the engine's inspection cannot be understood",
            why=f"{type(exc).__name__}: {exc}",
            remedy="report the TensorRT version and the first lines of the inspection",
        ) from exc
    if entries and not found:
        raise StepError(
            "the engine's inspection names its layers only",
            why="it was built without detailed profiling verbosity",
            remedy=f"build it again: {name_program('build')} --force",
        )
    return [layer for layer in found if layer.precision and layer.kind.lower() not in NO_COMPUTE]


def _read_layer(entry: Mapping[str, Any]) -> EngineLayer:
    kind = str(entry.get("LayerType", ""))
    name = str(entry.get("Name", ""))
    precision = (
        _find_lowest(entry.get("Inputs"))
        or _find_lowest(entry.get("Outputs"))
        or _find_in_tactic(str(entry.get("TacticName", "")))
    )
    return EngineLayer(name, kind, precision, is_conversion(kind, name))


def is_conversion(kind: str, name: str) -> bool:
    """Whether a kernel of this kind and name only moves or converts."""
    if any(word in kind.lower() for word in CONVERTING_KINDS):
        return True
    return bool(GENERATED_MOVE.match(name))


def _find_lowest(tensors: Any) -> str:
    """The lowest precision that a list of tensors mentions, ``""`` if none has a float or int8 type."""
    described = [tensor for tensor in tensors or () if isinstance(tensor, dict)]
    words = [word for tensor in described for word in _split_words(tensor)]
    return find_precision(" ".join(words))


def find_precision(words: str) -> str:
    """The lowest precision that TensorRT's words for a type or a format name, ``""`` for none."""
    return _find_first_match(WORDS, words)


def _find_in_tactic(name: str) -> str:
    """The precision that a kernel's name tells, e.g. ``sm80_xmma_fprop_implicit_gemm_f16f16_f16f32_...``."""
    return _find_first_match(TACTICS, name)


def _find_first_match(patterns: Sequence[tuple[str, str]], text: str) -> str:
    """The first precision whose pattern the text holds, ``""`` for none."""
    text = text.lower()
    for precision, pattern in patterns:
        if re.search(pattern, text):
            return precision
    return ""


def _split_words(tensor: Mapping[str, Any]) -> list[str]:
    named = [(key.lower(), str(value)) for key, value in tensor.items()]
    return [value for key, value in named if "format" in key or "type" in key]


def count_executed(
    found: list[EngineLayer],
    times: Mapping[str, float] | None = None,
) -> ExecutedPrecision:
    """Shares by precision: of time where ``times`` (layer name -> any unit) is given, and of layers."""
    operations = Counter(layer.precision for layer in found if not layer.conversion)
    total = sum(times.values()) if times else 0.0
    if not times or not total:
        return ExecutedPrecision({}, dict(operations), 0.0, SOURCE)
    by_name = {layer.name: layer for layer in found}
    share: dict[str, float] = defaultdict(float)
    conversion = 0.0
    for name, spent in times.items():
        layer = by_name.get(name)
        share[layer.precision if layer else "other"] += spent / total
        if layer and layer.conversion:
            conversion += spent / total
    return ExecutedPrecision(
        dict(share),
        dict(operations),
        conversion,
        f"{SOURCE} and profiler",
    )


def require_precision(
    asked: str,
    operations: Mapping[str, int],
    found: list[EngineLayer],
) -> float:
    """The share of computing layers at the precision ``asked`` or below.

    Args:
        asked: the bundle's precision.
        operations: precision -> operations in the bundle's graph, what the engine should have kept.
        found: the engine's layers.

    Raises:
        GateError: less than half of what the graph asks for: the engine would be slower than it says.
        StepError: the inspection does not tell.
    """
    low = LOW.get(asked)
    if low is None:
        return 1.0
    computing = [layer for layer in found if not layer.conversion]
    if not computing:
        raise StepError(
            f"the engine's inspection tells no types, so it is not known whether it computes in {asked}",
            remedy="report the TensorRT version; a bundle of a fixed --batch may tell more",
        )
    share = sum(layer.precision in low for layer in computing) / len(computing)
    wanted = sum(operations.get(p, 0) for p in low)
    expected = wanted / max(1, sum(operations.values()))
    if share < LEAST_KEPT_SHARE * expected:
        counts = Counter(layer.precision for layer in computing)
        summary = ", ".join(f"{count} {precision}" for precision, count in counts.items())
        raise GateError(
            f"{asked} was asked for, but only {100 * share:.0f} % of the engine's layers compute in it",
            why=f"the graph has {100 * expected:.0f} %; the engine's layers: {summary}",
            remedy="nothing was kept; build with another --level, or export another --precision",
        )
    return share
