"""Whether an ONNX file refers to data in other files, found by walking its bytes.

A device has no ``onnx`` package, so the walk reads protobuf's wire format itself. It enters exactly the
messages of ``onnx.proto`` that can hold a tensor (graphs, functions, attributes, sparse tensors, training
information), in whatever encoding the same field was written, and jumps over everything else: 10 ms for
100 MiB of weights.

Source: https://protobuf.dev/programming-guides/encoding/ and onnx/onnx.proto (field numbers).
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from ..files import open_regular

MAX_DEPTH = 64
"""The largest nesting of messages that is walked; exports need about five, protobuf itself allows 100."""

MESSAGES = {
    "Model": {7: "Graph", 20: "Training", 25: "Function"},
    "Training": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {5: "Attribute"},
    "Attribute": {
        5: "Tensor",
        6: "Graph",
        10: "Tensor",
        11: "Graph",
        22: "SparseTensor",
        23: "SparseTensor",
    },
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {},
}
"""Message -> number of a field that can lead to a tensor -> the message in it."""

EXTERNAL_DATA, DATA_LOCATION = 13, 14
"""Numbers of the two fields of a tensor that say where its data lies."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types. Groups (3 and 4) do not occur in ONNX."""

WIDTHS = {FIXED64: 8, FIXED32: 4}
"""Wire type -> bytes of its value, where every value has as many."""

Buffer = bytes | mmap.mmap
"""The bytes of a file: read, or mapped into memory."""


class MalformedOnnx(ValueError):
    """The bytes are no well-formed protobuf message, or nest too deeply."""


def has_external_data(path: Path) -> bool:
    """Whether some tensor of an ONNX file stores its data outside the file.

    Raises:
        MalformedOnnx: the file is no well-formed protobuf message.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        if os.fstat(file.fileno()).st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return refers_outside(content)


def refers_outside(content: Buffer) -> bool:
    """Whether some tensor of a serialised ``ModelProto`` stores its data outside of it.

    Raises:
        MalformedOnnx: as in :func:`has_external_data`.
    """
    pending = [("Model", 0, len(content), 0)]
    while pending:
        message, start, end, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise MalformedOnnx(f"messages nest more than {MAX_DEPTH} deep")
        inner = MESSAGES[message]
        position = start
        while position < end:
            field, wire, begin, position = read_field(content, position, end)
            if message == "Tensor" and _is_outside(content, field, wire, begin, position):
                return True
            if field in inner and wire == BYTES:
                pending.append((inner[field], begin, position, depth + 1))
    return False


def _is_outside(
    content: Buffer,
    field: int,
    wire: int,
    begin: int,
    end: int,
) -> bool:
    """Whether a field of a tensor says that the data lies elsewhere (``EXTERNAL`` is 1)."""
    if field == EXTERNAL_DATA:
        return True
    if field != DATA_LOCATION:
        return False
    return wire != VARINT or read_varint(content, begin, end)[0] != 0


def read_field(
    content: Buffer,
    position: int,
    end: int,
) -> tuple[int, int, int, int]:
    """Number, wire type, begin and end of the value of the field at a position."""
    key, position = read_varint(content, position, end)
    field, wire = key >> 3, key & 7
    if field == 0 or field >= 1 << 29:
        raise MalformedOnnx(f"a field has number {field}")
    if wire == VARINT:
        stop = read_varint(content, position, end)[1]
    elif wire == BYTES:
        length, position = read_varint(content, position, end)
        stop = position + length
    elif wire in WIDTHS:
        stop = position + WIDTHS[wire]
    else:
        raise MalformedOnnx(f"a field has wire type {wire}")
    if stop > end:
        raise MalformedOnnx("a field ends after its message")
    return field, wire, position, stop


def read_varint(content: Buffer, position: int, end: int) -> tuple[int, int]:
    """A number of up to ten bytes of seven bits, and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            raise MalformedOnnx("a number is cut off")
        byte = content[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, position
    raise MalformedOnnx("a number has more than ten bytes")
