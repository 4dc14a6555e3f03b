"""Where the outputs of a model's blocks are in the bundle's graph, and how far they are from the
reference's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..record import OMITTED, Between, OneOf
from .values import OutputDifference, Precision, Size

SAME, TOKENS, MAP, LAST = "same", "tokens", "map", "channels-last"
"""How a tensor of the graph holds what the module returns: alike; a map ``(N, C, H, W)`` as tokens
``(N, H * W, C)``; tokens as a map; a map with its channels last, ``(N, H, W, C)``."""
LAYOUTS = (SAME, TOKENS, MAP, LAST)
"""Every layout of a tensor."""
Cosine = Annotated[float, Between(-1.001, 1.001)]
"""A cosine; rounding may take it a little beyond 1."""


@dataclass(frozen=True, kw_only=True)
class BlockPlace:
    """A block of the PyTorch model, and the tensor of the graph that is its output.

    The export writes only places that it has compared: the tensor of the float32 graph had the values of the
    module.

    Attributes:
        name: the path of its module in the model, ``stages.1.blocks.0``.
        tensor: the name in ``model.onnx``; ``None`` where no tensor has these values.
        layout: how the tensor holds them, one of :data:`LAYOUTS`.
        before: the module inside the block whose *input* the tensor is, where an exact rewrite has moved
            what this module computes into a later operation; ``None`` for the output of the block.
        rows: the number of first tokens that the graph computes, where it leaves out the others.
        missing: why there is no such tensor.
    """

    name: str
    tensor: str | None = None
    layout: Annotated[str, OneOf(LAYOUTS)] = SAME
    before: str | None = field(default=None, metadata=OMITTED)
    rows: Size | None = field(default=None, metadata=OMITTED)
    missing: str | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class LayerError:
    """How far the output of one block is from the reference's, which is PyTorch in float64.

    Attributes:
        name: the path of the block's module in the model.
        precision: of the bundle.
        backend: the runtime that computed it, ``"openvino"`` or ``"onnxruntime"``.
        relative_error: ``|ours - reference| / |reference|``, Euclidean lengths over all values of all images.
        cosine: of the angle between both, over all values of all images.
        images: how many were compared.
        worst: the largest relative error of a single image.
        before: see :class:`BlockPlace`.
        rows: see :class:`BlockPlace`.
    """

    name: str
    precision: Precision
    backend: str
    relative_error: OutputDifference
    cosine: Cosine
    images: Size
    worst: OutputDifference
    before: str | None = field(default=None, metadata=OMITTED)
    rows: Size | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class LayerRun:
    """What the comparison of one bundle on one runtime says as a whole; relative errors are those of
    :class:`LayerError`.

    Attributes:
        bundle: name or path of the bundle.
        precision: of the bundle.
        backend: the runtime, ``"openvino"`` or ``"onnxruntime"``.
        runtime: its name and version.
        threshold: the relative error that counts as much.
        first: the first block beyond the threshold; ``None`` where there is none.
        grows: the block whose error exceeds that of the block before it most; ``None`` where none does.
        output: relative error of the model's output, from the bundle as it runs.
        watched: the same with the blocks' tensors as further outputs.
        moved: relative difference of the one from the other: what watching changed. 0 means the same bits.
        hidden: block -> why it is not compared.
    """

    bundle: str
    precision: Precision
    backend: str
    runtime: str
    threshold: OutputDifference
    first: str | None
    grows: str | None
    output: OutputDifference
    watched: OutputDifference
    moved: OutputDifference
    hidden: dict[str, str]
