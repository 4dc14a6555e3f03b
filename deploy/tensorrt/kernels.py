"""The kernels of an engine, read from what its compiler says of them.

Two texts are understood: the list that TensorRT for RTX logs while it builds (one line a kernel), and the
JSON of TensorRT's engine inspector. Both name the kind of each kernel, its inputs, constants and outputs with
types and shapes, and the operations of the ONNX graph that it came from. A dimension that is open counts as
1 until :func:`.open_sizes.close_sizes` has found its size. What the host computes of the sizes of tensors is
no kernel, and left out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import StepError
from .inspection import find_precision, is_conversion

SECTIONS = (
    "LayerType",
    "Inputs",
    "Constants",
    "Outputs",
    "TacticName",
    "ParameterType",
    "StreamId",
    "Metadata",
)
"""What a logged line says of a kernel, after its name."""
SPLIT = re.compile(rf", ({'|'.join(SECTIONS)}): ")
"""Where a line is cut into its parts."""
TENSOR = re.compile(r"Dimensions: \[([\d,\s-]*)\].*?Datatype: (\w+)")
"""Shape and type of a tensor in a logged line."""
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
"""Name of an operation of the ONNX graph in a kernel's metadata."""
BYTES = {
    "fp32": 4,
    "int32": 4,
    "fp16": 2,
    "bf16": 2,
    "int8": 1,
    "uint8": 1,
    "fp8": 1,
    "bool": 1,
    "int64": 8,
}
"""Type of a value -> its bytes."""
WHOLE_TYPES = re.compile(r"\b(u?int8|int32|int64|bool)\b", re.IGNORECASE)
"""Types that are no precision, or that :func:`find_precision` does not know."""
OPEN = -1
"""A dimension that depends on the batch size."""
HOST_KIND = "shape_call"
"""Kind of what computes sizes of tensors on the host."""
MOST_SIZES = 8
"""The largest number of dimensions of a tensor, so of the sizes that the host computes at once."""
SYNC_KINDS = ("signal", "wait")
"""Kinds of nodes that only make one stream wait for another."""
PRODUCT_KINDS = ("correlation", "gemm", "runtime_fusion", "convolution", "fusedconv", "matrix_multiply")
"""Kinds of kernels that multiply matrices or convolve; TensorRT's inspector has other words than the log of
TensorRT for RTX."""
ATTENTION = ("_gemm_mha", "_gemv_mha", "fused_mha", "fmha")
"""Parts of the names of kernels that compute an attention as a whole; ``gemv`` is for a single query, such
as a class token."""


@dataclass(frozen=True)
class TensorUse:
    """A tensor that a kernel reads or writes: its shape, and its type by our names."""

    dims: tuple[int, ...]
    type: str

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(max(1, size) for size in self.dims)

    @property
    def bytes(self) -> int:
        """Size in bytes; a type that is not known counts as 4 bytes."""
        return self.count * BYTES.get(self.type, 4)


@dataclass(frozen=True)
class Kernel:
    """One kernel of an engine, or one signal between its streams.

    Attributes:
        name, kind: the compiler's.
        inputs, constants, outputs: what it reads and writes.
        nodes: names of the ONNX operations that it came from.
    """

    name: str
    kind: str
    inputs: tuple[TensorUse, ...]
    constants: tuple[TensorUse, ...]
    outputs: tuple[TensorUse, ...]
    nodes: tuple[str, ...]

    @property
    def is_sync(self) -> bool:
        """Whether it only makes one stream wait for another."""
        return self.kind.lower() in SYNC_KINDS

    @property
    def is_on_host(self) -> bool:
        """Whether it only computes sizes of tensors, which the host does."""
        tensors = (*self.inputs, *self.constants, *self.outputs)
        are_sizes = all(each.type == "int64" and each.count <= MOST_SIZES for each in tensors)
        return self.kind.lower() == HOST_KIND or (bool(tensors) and are_sizes)

    @property
    def is_attention(self) -> bool:
        """Whether it computes an attention as a whole."""
        return any(word in self.name for word in ATTENTION)

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices or convolves."""
        return self.is_attention or self.kind.lower() in PRODUCT_KINDS

    @property
    def is_conversion(self) -> bool:
        """Whether it only moves or converts."""
        return is_conversion(self.kind, self.name)

    @property
    def activation_bytes(self) -> int:
        """Bytes of activations that it reads and writes."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))

    @property
    def weight_bytes(self) -> int:
        """Bytes of constants that it reads."""
        return sum(tensor.bytes for tensor in self.constants)

    @property
    def types(self) -> str:
        """What it reads and writes, such as ``"int8 -> fp32"``."""
        read, written = (
            "+".join(sorted({tensor.type for tensor in tensors if tensor.type}))
            for tensors in (self.inputs, self.outputs)
        )
        return f"{read} -> {written}"


def read_kernels(text: str) -> list[Kernel]:
    """The kernels in a builder's log or in an inspector's JSON, in the order in which they run.

    Raises:
        StepError: the text cannot be understood, or names no kernel with its tensors.
    """
    if text.lstrip().startswith("{"):
        found = list(_read_inspection(text))
    else:
        found = [_read_line(line) for line in text.splitlines() if ", LayerType: " in line]
    if not any(kernel.outputs for kernel in found):
        raise StepError(
            "what the compiler says of the engine's kernels cannot be understood",
            why="it names no kernel with its tensors",
            remedy="report the version of the compiler",
        )
    return [kernel for kernel in found if not kernel.is_on_host]


def _read_line(line: str) -> Kernel:
    """A kernel from its line in the log of TensorRT for RTX."""
    head, *rest = SPLIT.split(line)
    parts = dict(zip(rest[::2], rest[1::2], strict=True))
    return Kernel(
        name=head.partition("Name: ")[2],
        kind=parts.get("LayerType", ""),
        inputs=_read_tensors(parts.get("Inputs", "")),
        constants=_read_tensors(parts.get("Constants", "")),
        outputs=_read_tensors(parts.get("Outputs", "")),
        nodes=tuple(NODE.findall(parts.get("Metadata", ""))),
    )


def _read_tensors(text: str) -> tuple[TensorUse, ...]:
    return tuple(
        TensorUse(tuple(int(size) for size in dims.split(",") if size.strip()), _read_type(words))
        for dims, words in TENSOR.findall(text)
    )


def _read_type(words: str) -> str:
    """Our name of a type; ``""`` where the words name none."""
    precision = find_precision(words)
    if precision:
        return precision
    found = WHOLE_TYPES.search(words)
    return found[1].lower() if found else ""


def _read_inspection(text: str) -> Iterator[Kernel]:
    """The kernels in the JSON of TensorRT's engine inspector."""
    try:
        entries = json.loads(text, strict=False)["Layers"]
        for entry in entries:
            if isinstance(entry, dict):
                yield _read_entry(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise StepError(
            "the engine's inspection cannot be understood",
            why=f"{type(exc).__name__}: {exc}",
            remedy="report the TensorRT version and the first lines of the inspection",
        ) from exc


def _read_entry(entry: Mapping[str, Any]) -> Kernel:
    return Kernel(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        inputs=_read_section(entry, "Inputs"),
        constants=_read_section(entry, "Constants"),
        outputs=_read_section(entry, "Outputs"),
        nodes=tuple(NODE.findall(str(entry.get("Metadata", "")))),
    )


def _read_section(
    entry: Mapping[str, Any],
    section: str,
) -> tuple[TensorUse, ...]:
    tensors = entry.get(section) or ()
    return tuple(_read_described(tensor) for tensor in tensors if isinstance(tensor, dict))


def _read_described(tensor: Mapping[str, Any]) -> TensorUse:
    """A tensor of the inspection; versions differ in where its type stands."""
    words = " ".join(
        str(value) for key, value in tensor.items() if "format" in key.lower() or "type" in key.lower()
    )
    sizes = tuple(int(size) for size in tensor.get("Dimensions") or ())
    return TensorUse(sizes, _read_type(words))


def count_operations(kernel: Kernel) -> int:
    """Multiplications and additions of a kernel's products, from the shapes alone; 0 for a kernel without
    products.

    An attention has two products of the same size: scores ``(N, d) (d, Nk)`` and values ``(N, Nk) (Nk, d)``.
    A fusion of several products is counted by its largest constant, because the others are not told apart.
    """
    if not kernel.is_product or not kernel.outputs:
        return 0
    written = kernel.outputs[0]
    if kernel.is_attention:
        keys = kernel.inputs[1].count // max(1, _find_last(kernel.inputs[0])) if len(kernel.inputs) > 1 else 0
        heads = max(1, kernel.inputs[0].dims[0]) if kernel.inputs and kernel.inputs[0].dims else 1
        return 4 * written.count * keys // heads
    return 2 * written.count * _find_depth(kernel, written)


def _find_last(tensor: TensorUse) -> int:
    """The last dimension."""
    return tensor.dims[-1] if tensor.dims else 1


def _find_depth(kernel: Kernel, written: TensorUse) -> int:
    """How many products are added up for each value that is written."""
    weights = max(
        kernel.constants,
        key=lambda tensor: tensor.count,
        default=None,
    )
    if weights is not None and len(weights.dims) == 4 and kernel.kind.lower() != "gemm":
        return math.prod(weights.dims[1:])  # (out, in / groups, height, width)
    if len(kernel.inputs) > 1 and (weights is None or len(weights.dims) < 2):
        return max(1, _find_last(kernel.inputs[0]))
    if weights is None or len(weights.dims) < 2:
        return 0
    rows, columns = weights.dims[-2:]
    return rows if columns == _find_last(written) else columns


def find_blocks(
    kernels: Sequence[Kernel],
    blocks: Mapping[str, str],
) -> list[str]:
    """The block of each kernel, from the blocks of the operations that it came from.

    Of several blocks it is the one with the most operations, the last of them in a tie. A kernel that names
    no operation, as copies that the compiler adds, counts to the block of the next one that does.
    """
    found: list[str] = []
    following = ""
    for kernel in reversed(kernels):
        following = _find_block(kernel, blocks) or following
        found.append(following)
    return found[::-1]


def _find_block(kernel: Kernel, blocks: Mapping[str, str]) -> str:
    """``""`` where none of its operations has a block."""
    found = [blocks[node] for node in kernel.nodes if blocks.get(node)]
    return max(
        found,
        key=lambda name: (found.count(name), name),
        default="",
    )
