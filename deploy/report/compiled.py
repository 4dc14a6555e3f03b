"""What NVIDIA's compiler made of a graph, as text."""

from __future__ import annotations

from collections.abc import Mapping

from ..bundle.sections import CompiledEntry, EstimateEntry
from .tables import format_table

TITLES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}
"""Name of a compiler -> what a reader knows it as."""
MEGABYTE = 1e6
"""Bytes in a megabyte."""
ASSUMPTIONS = (
    "Estimates, not measurements: the sum over the kernels of the time that their bytes or their operations"
    " need at the data sheet's rates, and of 2 us to start each. Nothing is assumed to stay in a cache. They"
    " compare graphs; a real GPU is slower in small kernels and faster where its cache holds a layer."
)
"""What an estimate of the latency assumes."""


def describe_compiled(entry: CompiledEntry, markdown: bool = False) -> str:
    """What the compiler made of the graph; as Markdown with a table of blocks and one of estimates."""
    kernels, types = _join_counts(entry.kernels), _join_counts(entry.types)
    traffic = (
        f"activations {_format_size(entry.activation_bytes)}, weights {_format_size(entry.weight_bytes)}"
    )
    lines = [
        f"compiled by {_describe_compiler(entry)}",
        f"kernels: {entry.kernel_count} ({kernels}), {entry.sync_nodes} signals between streams",
        f"attentions fused: {_describe_attention(entry)}; {entry.fused} kernels compute several operations,"
        f" {entry.conversions} only move or convert",
        f"products run as: {types}",
        f"memory traffic of one batch: {traffic}; engine {_format_size(entry.engine_bytes)}",
        *(f"note: {note}" for note in entry.notes),
    ]
    if not markdown:
        return "\n".join([*lines, _describe_estimates(entry)])
    parts = [
        "  \n".join(lines),
        _format_blocks(entry),
        _format_estimates(entry),
        ASSUMPTIONS,
    ]
    return "\n\n".join(part for part in parts if part)


def _describe_compiler(entry: CompiledEntry) -> str:
    target = (
        f"compute capability {', '.join(entry.targets)}" if entry.targets else "any supported GPU (portable)"
    )
    time = "" if entry.seconds is None else f" in {entry.seconds:.0f} s"
    return f"{TITLES.get(entry.product, entry.product)} {entry.version} for {target}{time}"


def _describe_attention(entry: CompiledEntry) -> str:
    return str(entry.attention) if entry.attentions is None else f"{entry.attention} of {entry.attentions}"


def _join_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"


def _format_size(size: int) -> str:
    return f"{size / MEGABYTE:.1f} MB"


def _format_blocks(entry: CompiledEntry) -> str:
    """A row for each block of the model; empty where no block is known."""
    if not entry.blocks:
        return ""
    rows = [
        [
            block.name or "(none)",
            str(block.kernels),
            str(block.attention),
            f"{block.activation_bytes / MEGABYTE:.2f}",
        ]
        for block in entry.blocks
    ]
    return format_table(
        ["block", "kernels", "attentions", "activations, MB"],
        rows,
        markdown=True,
    )


def _format_estimates(entry: CompiledEntry) -> str:
    rows = [
        [
            estimate.gpu,
            f"{estimate.total_ms:.2f}",
            f"{estimate.memory_ms:.2f}",
            f"{estimate.arithmetic_ms:.2f}",
            f"{estimate.launch_ms:.2f}",
        ]
        for estimate in entry.estimates
    ]
    header = ["estimate, ms", "in all", "memory", "arithmetic", "starting kernels"]
    return format_table(header, rows, markdown=True) if rows else ""


def _describe_estimates(entry: CompiledEntry) -> str:
    """The estimates in one line, for the terminal."""
    found = ", ".join(map(_describe_estimate, entry.estimates))
    return f"estimate from data sheets (not measured): {found}"


def _describe_estimate(estimate: EstimateEntry) -> str:
    return f"{estimate.gpu} {estimate.total_ms:.2f} ms"
