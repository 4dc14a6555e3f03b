"""A summary of the kernels that a compiler made of a graph, for the bundle and its report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..bundle.sections import BlockEntry, CompiledEntry, KernelEntry
from .bindings import RTX
from .kernels import Kernel, count_operations, find_blocks
from .roofline import GPUS, PORTABLE, Gpu, choose_gpus, estimate_latency


@dataclass(frozen=True)
class EngineFacts:
    """What is known of an engine besides its kernels.

    Attributes:
        product, version: the compiler.
        engine_bytes: size of the engine.
        targets: compute capabilities that it was built for; empty for a portable engine.
        seconds: how long the build took, where that is known.
        engine: name of the engine in the bundle, where it lies there.
        blocks: name of an operation of the graph -> the block of the model that it is in.
        attentions: number of attentions in the graph, where it is known.
    """

    product: str
    version: str
    engine_bytes: int
    targets: tuple[str, ...] = ()
    seconds: float | None = None
    engine: str | None = None
    blocks: Mapping[str, str] = field(default_factory=dict)
    attentions: int | None = None


def summarise_kernels(
    kernels: Sequence[Kernel], facts: EngineFacts, details: str | None = None
) -> CompiledEntry:
    """What the compiler made of the graph.

    Args:
        kernels: of the engine.
        facts: what else is known of it.
        details: name of the list of kernels in the bundle, where it lies there.
    """
    computing = [kernel for kernel in kernels if not kernel.is_sync]
    return CompiledEntry(
        product=facts.product,
        version=facts.version,
        targets=facts.targets,
        seconds=facts.seconds,
        engine=facts.engine,
        engine_bytes=facts.engine_bytes,
        kernels=dict(sorted(Counter(kernel.kind for kernel in computing).items())),
        sync_nodes=len(kernels) - len(computing),
        fused=sum(len(kernel.nodes) > 1 for kernel in computing),
        attention=sum(kernel.is_attention for kernel in computing),
        attentions=facts.attentions,
        conversions=sum(kernel.is_conversion for kernel in computing),
        types=dict(Counter(kernel.types for kernel in computing if kernel.is_product).most_common()),
        activation_bytes=sum(kernel.activation_bytes for kernel in computing),
        weight_bytes=sum(kernel.weight_bytes for kernel in computing),
        blocks=_summarise_blocks(computing, facts.blocks),
        estimates=tuple(estimate_latency(computing, gpu) for gpu in _choose_gpus(facts)),
        details=details,
    )


def _choose_gpus(facts: EngineFacts) -> tuple[Gpu, ...]:
    """The GPUs that an estimate is made for: all for TensorRT, for which any of them can build the graph, and
    those that run the engine for TensorRT for RTX."""
    if facts.product != RTX.name:
        return GPUS
    return choose_gpus(facts.targets or PORTABLE)


def _summarise_blocks(
    kernels: Sequence[Kernel],
    blocks: Mapping[str, str],
) -> tuple[BlockEntry, ...]:
    """The blocks in the order of their first kernels; none where no block is known."""
    members: dict[str, list[Kernel]] = {}
    for kernel, block in zip(kernels, find_blocks(kernels, blocks), strict=True):
        members.setdefault(block, []).append(kernel)
    if set(members) <= {""}:
        return ()
    return tuple(
        BlockEntry(
            name=name,
            kernels=len(found),
            attention=sum(kernel.is_attention for kernel in found),
            activation_bytes=sum(kernel.activation_bytes for kernel in found),
        )
        for name, found in members.items()
    )


def describe_kernels(
    kernels: Sequence[Kernel],
    blocks: Mapping[str, str],
) -> tuple[KernelEntry, ...]:
    """Every kernel for the list in the bundle, signals between streams included."""
    return tuple(
        KernelEntry(
            name=kernel.name,
            kind=kernel.kind,
            block=block,
            nodes=kernel.nodes,
            types=kernel.types,
            reads=sum(tensor.bytes for tensor in kernel.inputs),
            writes=sum(tensor.bytes for tensor in kernel.outputs),
            weights=kernel.weight_bytes,
            operations=count_operations(kernel),
        )
        for kernel, block in zip(kernels, find_blocks(kernels, blocks), strict=True)
    )
