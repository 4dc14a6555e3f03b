"""What one of NVIDIA's compilers made of a graph: its kernels, and the memory that they read and write."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..record import OMITTED, Between
from .values import Count, Duration

Seconds = Annotated[float, Between(0)]
"""How long a build took."""


@dataclass(frozen=True, kw_only=True)
class KernelEntry:
    """One kernel of an engine; sizes are bytes of one batch.

    Attributes:
        name: the compiler's.
        kind: the compiler's word for it, such as ``"gemm"`` or ``"kgen"``.
        block: the part of the model that it belongs to; empty where that is not known.
        nodes: names of the operations of ``model.onnx`` that it computes, or computes a part of.
        types: what it reads and writes, such as ``"int8 -> fp32"``.
        reads, writes: activations.
        weights: constants that it reads.
        operations: multiplications and additions of its products, counted from the shapes.
    """

    name: str
    kind: str
    block: str
    nodes: tuple[str, ...]
    types: str
    reads: Count
    writes: Count
    weights: Count
    operations: Count


@dataclass(frozen=True, kw_only=True)
class CompiledDetails:
    """The content of ``compile.json``: every kernel of the engine, in the order in which they run."""

    kernels: tuple[KernelEntry, ...]


@dataclass(frozen=True, kw_only=True)
class BlockEntry:
    """What one block of the model became.

    Attributes:
        name: the path of its module; empty for kernels of which no block is known.
        kernels: number of kernels.
        attention: number of fused attentions among them.
        activation_bytes: activations that they read and write.
    """

    name: str
    kernels: Count
    attention: Count
    activation_bytes: Count


@dataclass(frozen=True, kw_only=True)
class EstimateEntry:
    """An estimate, and no measurement: the time that a GPU needs at least by its data sheet, milliseconds.

    Attributes:
        gpu: its name.
        total_ms: the sum over all kernels.
        memory_ms: what the slower of memory and arithmetic accounts for of it, in kernels that memory limits.
        arithmetic_ms: the same in kernels that arithmetic limits.
        launch_ms: what starting the kernels accounts for.
    """

    gpu: str
    total_ms: Duration
    memory_ms: Duration
    arithmetic_ms: Duration
    launch_ms: Duration


@dataclass(frozen=True, kw_only=True)
class CompiledEntry:
    """What the compiler made of the graph; sizes are bytes of one batch.

    Attributes:
        product, version: the compiler.
        targets: compute capabilities that the engine was built for, such as ``"8.6"``; empty for a portable
            engine.
        seconds: how long the build took; ``None`` where it is not known.
        engine: name of the engine in the bundle; ``None`` where it does not lie there.
        engine_bytes: its size.
        kernels: kind -> number of kernels; signals between streams are not among them.
        sync_nodes: number of signals and waits between streams.
        fused: number of kernels that compute more than one operation of the graph.
        attention: number of fused attentions.
        attentions: number of attentions in the graph; ``None`` where it is not known.
        conversions: number of kernels that only move or convert.
        types: what products read and write, such as ``"int8 -> fp32"`` -> number of kernels.
        activation_bytes: activations that all kernels read and write.
        weight_bytes: constants that all kernels read.
        blocks: the same by block of the model.
        estimates: of the latency, by GPU.
        details: name of the list of kernels in the bundle; ``None`` where it does not lie there.
        notes: what a reader should know, one sentence each.
    """

    product: str
    version: str
    targets: tuple[str, ...]
    seconds: Seconds | None
    engine: str | None
    engine_bytes: Count
    kernels: dict[str, Count]
    sync_nodes: Count
    fused: Count
    attention: Count
    attentions: Count | None = field(default=None, metadata=OMITTED)
    conversions: Count
    types: dict[str, Count]
    activation_bytes: Count
    weight_bytes: Count
    blocks: tuple[BlockEntry, ...]
    estimates: tuple[EstimateEntry, ...]
    details: str | None
    notes: tuple[str, ...] = ()

    @property
    def kernel_count(self) -> int:
        """Number of all kernels."""
        return sum(self.kernels.values())
