"""What an ONNX file may ask of a runtime, told from its bytes before a runtime opens it.

A graph is a program, and a runtime that opens it computes what is constant. A file of some hundred bytes can
therefore ask for gigabytes. These rules refuse what no program of ours writes: tensors that declare more
values than the file holds, sparse tensors that become large, constants that make a tensor large, and files of
millions of tiny fields. Sizes that a graph computes are not followed.

Source: onnx/onnx.proto (field numbers), onnx/Operators.md (the inputs that give a size).
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import open_regular
from .external_data import (
    BYTES,
    DATA_LOCATION,
    EXTERNAL_DATA,
    FIXED32,
    FIXED64,
    MAX_DEPTH,
    MESSAGES,
    VARINT,
    Buffer,
    MalformedOnnx,
    read_field,
    read_varint,
)

MAX_GRAPH = (1 << 31) - 1
"""The largest size in bytes of an ONNX file; protobuf reads no larger one."""
MAX_NODES = 100_000
"""The largest number of operations in a file; the largest model of the registry has about 2,500."""
MAX_FIELDS = 1_000_000
"""The largest number of protobuf fields that are looked at; it bounds the time, to seconds."""
MAX_MADE = 1 << 28
"""The largest number of elements of all tensors together whose sizes constants give: 1 GiB of float32."""
MAX_SPARSE = 1 << 24
"""The largest number of elements of a sparse tensor once it is dense."""
MAX_SIZES = 64
"""The largest number of dimensions, and of numbers in a constant that is read as a size."""
MAX_ALIKE = 64
"""The largest number of constants of one name."""

MAX_GROWTH = 1 << 12
"""The largest factor by which constants let an operation enlarge its input: 64 in each direction."""

SIZES = {
    "AffineGrid": (1,),
    "BlackmanWindow": (0,),
    "CenterCropPad": (1,),
    "Col2Im": (1,),
    "ConstantOfShape": (0,),
    "DFT": (1,),
    "Expand": (1,),
    "HammingWindow": (0,),
    "HannWindow": (0,),
    "MaxUnpool": (2,),
    "MelWeightMatrix": (0, 1),
    "OneHot": (1,),
    "Pad": (1,),
    "Resize": (2, 3),
    "Tile": (1,),
    "Upsample": (1,),
}
"""Operation -> the inputs whose values decide how large its output becomes. ``Range`` is counted apart."""

PASSING = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")
"""Operations that give the values of their first input."""
UNKNOWN = ("If", "Loop", "RandomNormal", "RandomUniform", "Scan")
"""Operations that give something else than their inputs say."""

PADS = "pads"
"""Attribute of what is added around an input, of any operation."""
SIZE_ATTRIBUTES = (
    "output_height",
    "output_padding",
    "output_shape",
    "output_width",
    "pooled_shape",
    "repeats",
    "sample_size",
    "scales",
    "shape",
    "sizes",
)
"""Attributes that decide how large an output becomes, of any operation; those of one operation multiply."""
GROWING = ("OneHot", "Tile", "Upsample")
"""Operations of which these inputs give a factor by which their input is enlarged."""
GROWTH_ATTRIBUTES = {"ConvTranspose": ("strides",)}
"""Operation -> its attributes by whose product it enlarges its input."""

BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64}
"""ONNX's number of a type of values -> bits of one; types beyond them count with :data:`LEAST_BITS`."""
LEAST_BITS = 1
"""Bits of the smallest type of values."""
RAW_DATA, STRING_DATA = 9, 6
"""Numbers of two fields of a tensor with values: plain bytes, and texts."""
VALUES = (4, 5, STRING_DATA, 7, 10, 11)
"""Numbers of the fields of a tensor with values of one type each."""
LAYOUTS = {1: "<f", 3: "<b", 5: "<h", 6: "<i", 7: "<q", 10: "<e", 11: "<d"}
"""ONNX's number of a type of values that can give a size -> how :mod:`struct` calls its plain bytes."""

ONE_VARINT, ONE_BYTES, ONE_FLOAT = (1, (VARINT,)), (1, (BYTES,)), (1, (FIXED32,))
"""What a field is that may occur once: a whole number, bytes (texts and messages too), or a float32."""
MANY_BYTES = (MAX_FIELDS, (BYTES,))
"""A field of bytes that may occur again and again."""
MANY_VARINTS, MANY_FLOATS = (MAX_FIELDS, (VARINT, BYTES)), (MAX_FIELDS, (FIXED32, BYTES))
"""Fields of numbers that may occur again and again, each alone or many of them packed."""
MANY_DOUBLES = (MAX_FIELDS, (FIXED64, BYTES))
"""The same for float64."""

FIELDS: dict[str, dict[int, tuple[int, tuple[int, ...]]]] = {
    "Model": {
        **dict.fromkeys((1, 5), ONE_VARINT),
        **dict.fromkeys((2, 3, 4, 6, 7), ONE_BYTES),
        **dict.fromkeys((8, 14, 20, 25, 26), MANY_BYTES),
    },
    "Training": {**dict.fromkeys((1, 2), ONE_BYTES), **dict.fromkeys((3, 4), MANY_BYTES)},
    "Function": {
        **dict.fromkeys((1, 8, 10, 13), ONE_BYTES),
        **dict.fromkeys((4, 5, 6, 7, 9, 11, 12, 14), MANY_BYTES),
    },
    "Graph": {
        **dict.fromkeys((2, 10), ONE_BYTES),
        **dict.fromkeys((1, 5, 11, 12, 13, 14, 15, 16), MANY_BYTES),
    },
    "Node": {
        **dict.fromkeys((3, 4, 6, 7, 8), ONE_BYTES),
        **dict.fromkeys((1, 2, 5, 9, 10), MANY_BYTES),
    },
    "Attribute": {
        2: ONE_FLOAT,
        **dict.fromkeys((3, 20), ONE_VARINT),
        **dict.fromkeys((1, 4, 5, 6, 13, 14, 21, 22), ONE_BYTES),
        7: MANY_FLOATS,
        8: MANY_VARINTS,
        **dict.fromkeys((9, 10, 11, 15, 23), MANY_BYTES),
    },
    "SparseTensor": {**dict.fromkeys((1, 2), ONE_BYTES), 3: MANY_VARINTS},
    "Tensor": {
        **dict.fromkeys((2, 14), ONE_VARINT),
        **dict.fromkeys((3, 8, 9, 12), ONE_BYTES),
        **dict.fromkeys((1, 5, 7, 11), MANY_VARINTS),
        4: MANY_FLOATS,
        10: MANY_DOUBLES,
        **dict.fromkeys((6, 13, 16), MANY_BYTES),
    },
}
"""Message -> number of a field of ``onnx.proto`` -> how often it may occur, and in which wire types.

Protobuf takes the last of two numbers, merges two messages, and skips a field that it does not know or that
has another wire type: what it skips may be a file of another format.
"""

START = b"\x08"
"""First byte of an ONNX file: its first field is the version of the format, a whole number."""


class ExcessiveGraph(ValueError):
    """A graph asks for more than a file of a bundle may."""


@dataclass
class _Message:
    """The fields of one message: number -> its places ``(wire type, begin, end)``."""

    kind: str
    fields: dict[int, list[tuple[int, int, int]]]

    def places(self, number: int) -> list[tuple[int, int, int]]:
        return self.fields.get(number, [])


@dataclass
class _Survey:
    """What the walk has found so far.

    Attributes:
        nodes, fields: how many.
        constants: name -> the values of every small constant of this name.
        sized: the names that decide a size, with the operation that they belong to.
        made: elements of the tensors whose sizes constants give.
        ranges: the names of the inputs of each ``Range``: start, limit and step.
        producers: name -> the operations that give a value of this name, with their inputs.
    """

    nodes: int = 0
    fields: int = 0
    constants: dict[bytes, list[list[float]]] = field(default_factory=dict)
    sized: list[tuple[bytes, str]] = field(default_factory=list)
    made: float = 0
    ranges: list[list[bytes]] = field(default_factory=list)
    producers: dict[bytes, list[tuple[str, list[bytes]]]] = field(default_factory=dict)

    def name(self, name: bytes, numbers: list[float]) -> None:
        """Note a constant; graphs within a graph may use a name again."""
        known = self.constants.setdefault(name, [])
        known.append(numbers)
        if len(known) > MAX_ALIKE:
            raise ExcessiveGraph(f"more than {MAX_ALIKE} constants have the same name")

    def find_constants(self, name: bytes, operation: str) -> list[list[float]]:
        """The values of every constant that a size may be; none where it depends on the graph's input.

        Raises:
            ExcessiveGraph: it is computed from constants alone, in more than a step that keeps the values. A
                program would have written the result.
        """
        for _ in range(MAX_DEPTH):
            made = self.producers.get(name, [])
            if name in self.constants or not made:
                return self.constants.get(name, [])
            kind, inputs = made[0]
            if len(made) > 1 or kind not in PASSING or not inputs:
                break
            name = inputs[0]
        if self._is_constant(name):
            raise ExcessiveGraph(f"the size of a {operation} is computed from constants")
        return []

    def _is_constant(self, name: bytes) -> bool:
        """Whether a value depends on constants alone."""
        pending, seen = [name], {name}
        while pending:
            asked = pending.pop()
            made = self.producers.get(asked, [])
            if not made and asked not in self.constants:
                return False
            for kind, inputs in made:
                if kind in UNKNOWN:
                    return False
                pending += [known for known in inputs if known and known not in seen]
                seen.update(inputs)
        return True

    def make(self, operation: str, elements: float) -> None:
        """Count the elements that a constant asks an operation for."""
        self.made += elements
        if not self.made <= MAX_MADE:  # also where it is NaN
            raise ExcessiveGraph(f"a constant asks {operation} for more than {MAX_MADE} elements")


def require_modest_onnx(path: Path) -> None:
    """Check the rules of this module for a file.

    Raises:
        ExcessiveGraph: the file asks for more than it may.
        MalformedOnnx: the file is not as ONNX's own writer writes one.
        OSError: the file cannot be read.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_GRAPH:
            raise ExcessiveGraph(f"it has {size} bytes, the cap is {MAX_GRAPH}")
        if not size:
            require_modest(b"")
        else:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                require_modest(content)


def require_modest(content: Buffer) -> None:
    """As :func:`require_modest_onnx`, for the bytes of a ``ModelProto``."""
    if content[:1] != START:
        raise MalformedOnnx("it does not begin with the version of the format")
    survey = _Survey()
    pending = [("Model", 0, len(content), 0)]
    while pending:
        kind, start, end, depth = pending.pop()
        if depth > MAX_DEPTH:
            raise MalformedOnnx(f"messages nest more than {MAX_DEPTH} deep")
        message = _read_message(content, kind, start, end, survey)
        _look_at(content, message, survey)
        for number, inner in MESSAGES[kind].items():
            places = message.places(number)
            inside = [(begin, stop) for wire, begin, stop in places if wire == BYTES]
            pending += [(inner, begin, stop, depth + 1) for begin, stop in inside]
    for name, operation in survey.sized:
        made = [_multiply(operation, values) for values in survey.find_constants(name, operation)]
        survey.make(operation, max(made, default=0))
        if operation in GROWING:
            _check_growth(operation, max(made, default=0))
    for names in survey.ranges:
        survey.make("Range", _count_range([survey.find_constants(name, "Range") for name in names]))


def _read_message(
    content: Buffer,
    kind: str,
    start: int,
    end: int,
    survey: _Survey,
) -> _Message:
    message = _Message(kind, {})
    position = start
    while position < end:
        number, wire, begin, position = read_field(content, position, end)
        message.fields.setdefault(number, []).append((wire, begin, position))
        survey.fields += 1
        if survey.fields > MAX_FIELDS:
            raise ExcessiveGraph(f"it has more than {MAX_FIELDS} fields")
    for number, places in message.fields.items():
        most, wires = FIELDS[kind].get(number, (0, ()))
        if any(wire not in wires for wire, _, _ in places):
            raise MalformedOnnx(f"{kind}Proto has no field {number} of wire type {places[0][0]}")
        if len(places) > most:
            raise ExcessiveGraph(f"field {number} of {kind}Proto occurs more than once")
    return message


def _look_at(content: Buffer, message: _Message, survey: _Survey) -> None:
    """Check one message by itself, and note what it says of others."""
    if message.kind == "Node":
        survey.nodes += 1
        if survey.nodes > MAX_NODES:
            raise ExcessiveGraph(f"it has more than {MAX_NODES} operations")
        _look_at_node(content, message, survey)
    elif message.kind == "Tensor":
        _check_tensor(content, message)
        for name in _read_texts(content, message, 8):
            survey.name(name, _read_sizes(content, message))
    elif message.kind == "SparseTensor":
        elements = math.prod(_read_dimensions(content, message, 3))
        if elements > MAX_SPARSE:
            raise ExcessiveGraph(f"a sparse tensor stands for {elements} elements, the cap is {MAX_SPARSE}")


def _look_at_node(content: Buffer, node: _Message, survey: _Survey) -> None:
    """Note the inputs of an operation that decide a size, and what a constant stands for."""
    operation = _read_last_text(content, node, 4)
    names = _read_texts(content, node, 1)
    survey.sized += [(names[i], operation) for i in SIZES.get(operation, ()) if i < len(names)]
    if operation == "Range":
        survey.ranges.append(names)
    if operation != "Constant":
        for output in _read_texts(content, node, 2):
            survey.producers.setdefault(output, []).append((operation, names))
    asked = 1.0
    for _, begin, end in node.places(5):
        attribute = _read_message(content, "Attribute", begin, end, survey)
        name = _read_last_text(content, attribute, 1)
        numbers: list[float] = [
            *_read_numbers(content, attribute, 3),
            *_read_numbers(content, attribute, 8),
        ]
        numbers += _read_floats(content, attribute, 7)
        can_be_read = len(numbers) <= MAX_SIZES
        if name in SIZE_ATTRIBUTES:
            asked *= _multiply(operation, numbers) if can_be_read else math.inf
        elif name == PADS:
            asked *= _multiply("Pad", numbers) if can_be_read else math.inf
        elif name in GROWTH_ATTRIBUTES.get(operation, ()):
            _check_growth(operation, _multiply(operation, numbers))
        if operation == "Constant":
            for _, start, stop in attribute.places(5):
                tensor = _read_message(content, "Tensor", start, stop, survey)
                numbers += _read_sizes(content, tensor)
            for output in _read_texts(content, node, 2):
                survey.name(output, numbers)
    if asked > 1:
        survey.make(operation, asked)


def _check_growth(operation: str, factor: float) -> None:
    if not factor <= MAX_GROWTH:  # also where it is NaN
        raise ExcessiveGraph(f"{operation} enlarges its input by more than {MAX_GROWTH}")


def _multiply(operation: str, numbers: Sequence[float]) -> float:
    """The number of elements that the sizes given to an operation stand for."""
    half = len(numbers) // 2
    if operation == "Pad":  # what is added before and after each dimension
        pairs = zip(numbers[:half], numbers[half:], strict=False)
        numbers = [1 + max(0, before) + max(0, after) for before, after in pairs]
    return math.prod(number for number in numbers if number > 1)


def _count_range(inputs: Sequence[Sequence[Sequence[float]]]) -> float:
    """The largest number of elements of a ``Range``, from what its start, limit and step may be; a limit that
    the graph computes is not followed."""
    starts, limits, steps = (
        [value for numbers in constants for value in numbers] for constants in (*inputs[:3], (), (), ())[:3]
    )
    if not limits:
        return 0
    lengths = [abs(limit - start) for limit in limits for start in starts or [0]]
    step = min(map(abs, steps), default=1)
    return max(lengths) / step if step else math.inf


def _check_tensor(content: Buffer, tensor: _Message) -> None:
    """Raise :class:`ExcessiveGraph` for a tensor that declares more values than it has.

    One whose values lie in another file is left to :mod:`.external_data`.
    """
    if tensor.places(EXTERNAL_DATA) or tensor.places(DATA_LOCATION):
        return
    sizes = _read_dimensions(content, tensor, 1)
    kinds = _read_numbers(content, tensor, 2)
    elements = math.prod(sizes)
    bits = BITS.get(kinds[-1] if kinds else 0, LEAST_BITS)
    raw = sum(end - begin for _, begin, end in tensor.places(RAW_DATA))
    places = [place for number in VALUES for place in tensor.places(number)]
    typed = sum(end - begin for _, begin, end in places)
    texts = len(tensor.places(STRING_DATA))  # an empty text has no bytes
    if elements * bits > 8 * raw and elements > 8 * typed + texts:
        raise ExcessiveGraph(f"a tensor declares {elements} values, and has {raw + typed} bytes")


def _read_sizes(content: Buffer, tensor: _Message) -> list[float]:
    """The values of a small tensor, as far as they can give a size."""
    numbers: list[float] = []
    if math.prod(_read_numbers(content, tensor, 1)) > MAX_SIZES:
        return numbers
    numbers += _read_numbers(content, tensor, 5) + _read_numbers(content, tensor, 7)
    numbers += _read_floats(content, tensor, 4)
    numbers += _read_floats(content, tensor, 10, "<d")
    kinds = _read_numbers(content, tensor, 2)
    kind = kinds[-1] if kinds else 0
    layout = LAYOUTS.get(kind)
    for _, begin, end in tensor.places(RAW_DATA) if layout else ():
        width = struct.calcsize(layout or "")
        stop = begin + min(end - begin, MAX_SIZES * width) // width * width
        numbers += [number for (number,) in struct.iter_unpack(layout or "", content[begin:stop])]
    return numbers


def _read_numbers(content: Buffer, message: _Message, number: int) -> list[int]:
    """The whole numbers of a field, in both ways in which protobuf writes them; the first ones of many."""
    found: list[int] = []
    for wire, begin, end in message.places(number):
        position = begin
        while wire in (VARINT, BYTES) and position < end and len(found) <= MAX_SIZES:
            value, position = read_varint(content, position, end)
            found.append(value - (1 << 64) if value >= 1 << 63 else value)
    return found


def _read_dimensions(content: Buffer, message: _Message, number: int) -> list[int]:
    """The dimensions of a tensor."""
    sizes = _read_numbers(content, message, number)
    if len(sizes) > MAX_SIZES or any(size < 0 for size in sizes):
        raise ExcessiveGraph(f"a tensor has more than {MAX_SIZES} dimensions, or a negative one")
    return sizes


def _read_floats(
    content: Buffer,
    message: _Message,
    number: int,
    layout: str = "<f",
) -> list[float]:
    """The real numbers of a field, in both ways in which protobuf writes them; the first ones of many."""
    found: list[float] = []
    width = struct.calcsize(layout)
    for _, begin, end in message.places(number):
        stop = begin + min(end - begin, width * MAX_SIZES) // width * width
        found += [value for (value,) in struct.iter_unpack(layout, content[begin:stop])]
    return found[:MAX_SIZES]


def _read_texts(content: Buffer, message: _Message, number: int) -> list[bytes]:
    return [content[begin:end] for wire, begin, end in message.places(number) if wire == BYTES]


def _read_last_text(content: Buffer, message: _Message, number: int) -> str:
    """The last text of a field, which is the one that counts; empty without one."""
    return b"".join(_read_texts(content, message, number)[-1:]).decode(errors="replace")
