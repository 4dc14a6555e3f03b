"""Whether a file of OpenVINO's format is what its name says, told before OpenVINO reads it.

OpenVINO chooses a reader by the content of a file, not by its name: an ONNX file that is called ``.xml`` is
read as ONNX, with the weights in other files that it names. The first bytes that are demanded here begin no
file of another format, because ``<`` is no field of a protobuf message.

Source: https://docs.openvino.ai, "Operation sets and IR": layers, edges, and the places of constants.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from xml.parsers import expat

from ..files import read_regular

MAX_IR = 256 << 20
"""The largest size in bytes of a graph in OpenVINO's format without its weights."""
MAX_LAYERS = 100_000
"""The largest number of layers of a graph; models of the registry have about 5,000."""
START = re.compile(rb"<\?xml [^<>?]{0,80}\?>\s{0,8}<net[\s>]")
"""How a file of OpenVINO's format begins."""
LEAST_BITS = 1
"""Bits of the smallest type of values."""


class NotAnIr(ValueError):
    """A file is no graph in OpenVINO's format, or it asks for more than a bundle may."""


def require_ir(path: Path) -> None:
    """Check that a file is a graph in OpenVINO's format whose constants lie within the weights beside it.

    Raises:
        NotAnIr: it is another file, it has a document type, it has too many layers, or a constant is larger
            than its bytes.
        OSError: the file cannot be read.
    """
    data = read_regular(path, MAX_IR)
    weights = path.with_suffix(".bin")
    require_ir_content(data, weights.stat().st_size if weights.is_file() else 0)


def require_ir_content(data: bytes, weights: int) -> None:
    """As :func:`require_ir`, for the content of a file and the number of bytes of its weights."""
    if START.match(data) is None:
        raise NotAnIr("it does not begin as a file of OpenVINO does")
    reader = _Reader(weights)
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = reader.refuse_doctype
    parser.StartElementHandler = reader.start
    try:
        parser.Parse(data, True)
    except expat.ExpatError as exc:
        raise NotAnIr(f"it is no well-formed XML: {exc}") from exc


class _Reader:
    """Looks at each element of a file."""

    def __init__(self, weights: int) -> None:
        self._weights = weights
        self._layers = 0
        self._in_constant = False

    def refuse_doctype(self, *_: object) -> None:
        raise NotAnIr("it has a document type, which OpenVINO does not write")

    def start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "layer":
            self._layers += 1
            self._in_constant = attributes.get("type") == "Const"
            if self._layers > MAX_LAYERS:
                raise NotAnIr(f"it has more than {MAX_LAYERS} layers")
        elif name == "data" and self._in_constant:
            self._check_constant(attributes)

    def _check_constant(self, attributes: dict[str, str]) -> None:
        """Raise :class:`NotAnIr` for a constant that lies outside the weights or is larger than its bytes."""
        try:
            offset, size = int(attributes["offset"]), int(attributes["size"])
            sizes = attributes.get("shape", "").split(",")
            shape = [int(size) for size in sizes if size.strip()]
        except (KeyError, ValueError) as exc:
            raise NotAnIr("a constant has no place, or no shape") from exc
        if min([offset, size, *shape]) < 0 or offset + size > self._weights:
            raise NotAnIr(f"a constant of {size} bytes lies outside the weights of {self._weights} bytes")
        if math.prod(shape) * LEAST_BITS > 8 * size:
            raise NotAnIr(f"a constant declares {math.prod(shape)} values, and has {size} bytes")
