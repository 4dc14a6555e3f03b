"""Arrays from an ``.npz`` file that somebody else wrote: what it declares is checked before it is believed.

Names, types, shapes and sizes are read from the archive's directory and from the header of each array.
Nothing is allocated for an array before it is known that all of them together stay below a limit. Objects,
which only pickle could read, are refused like every type that we do not write.

Sources: APPNOTE.TXT of the zip format, sections 4.3.7 to 4.3.16; ``numpy.lib.format`` for ``.npy``.
"""

from __future__ import annotations

import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..files import open_regular
from .manifest import make_bundle_error

MAX_ARRAYS = 1024
"""The largest number of arrays in a file."""
MAX_DIMENSIONS = 8
"""The largest number of dimensions of an array."""
MAX_DIRECTORY = 1 << 20
"""The largest size in bytes of the archive's directory."""

END = struct.Struct("<4s4H2LH")
"""The record at the end of a zip archive: signature, disks, entries, size and place of the directory."""
LOCATOR = b"PK\6\7"
"""Signature of the record just before the end that leads to a second, larger directory."""
LOCATOR_BYTES = 20
"""Bytes of that record."""
ENCRYPTED = 1
"""Bit in the flags of a member that needs a password."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Ways of compression that ``numpy`` writes."""

ARRAY_START = struct.Struct("<6s2BH")
"""How an array of ``.npy`` format 1.0 starts: signature, version, bytes of the header."""
HEADER = re.compile(
    rb"\{'descr': '([|<](?:u1|i4|f4|U32))', 'fortran_order': (True|False),"
    rb" 'shape': \(((?:\d{1,10}, ?)*(?:\d{1,10})?)\), \} *\n"
)
"""The header of an array of a type that we write: bytes, whole numbers, float32, texts of 32 letters."""
MEMBER_SUFFIX = ".npy"
"""End of the names of an archive's members."""

FAULTS = (
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What Python raises for an archive that is damaged or has unknown features."""


@dataclass(frozen=True)
class Layout:
    """What the header of an array says.

    Attributes:
        dtype: as ``numpy`` writes it, e.g. ``"<f4"``.
        shape: number of elements in each dimension.
        by_columns: whether the first index runs fastest.
        header: bytes before the values.
    """

    dtype: str
    shape: tuple[int, ...]
    by_columns: bool
    header: int

    @property
    def size(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


class Arrays:
    """The arrays of an open file: ask :attr:`layouts` first, then :meth:`read` what fits."""

    def __init__(
        self,
        path: Path,
        archive: zipfile.ZipFile,
        layouts: dict[str, Layout],
    ) -> None:
        self._path = path
        self._archive = archive
        self.layouts = layouts
        """Name of each array -> what its header says."""

    def require(
        self,
        name: str,
        dtype: str,
        shape: tuple[int | None, ...],
    ) -> tuple[int, ...]:
        """The shape of an array, which must have this type and this shape; ``None`` stands for any number.

        Raises:
            BundleError: there is no such array, or it is another one.
        """
        layout = self.layouts.get(name)
        if layout is None:
            raise make_bundle_error(f"lacks the array {name!r}", self._path)
        fits = len(layout.shape) == len(shape) and all(
            expected in (None, found) for expected, found in zip(shape, layout.shape, strict=True)
        )
        if layout.dtype != dtype or not fits:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise make_bundle_error(
                f"the array {name!r} is {layout.dtype} {layout.shape}, expected {dtype} ({wanted})",
                self._path,
            )
        return layout.shape

    def read(self, name: str) -> np.ndarray:
        """The values of an array; raises as :func:`open_arrays` where they are damaged."""
        layout = self.layouts[name]
        with self._archive.open(name + MEMBER_SUFFIX) as member:
            member.read(layout.header)
            data = bytearray(member.read())  # so that the array can be written to
        if len(data) != layout.size:
            raise ValueError(f"{name} has {len(data)} bytes instead of {layout.size}")
        values: np.ndarray = np.frombuffer(data, layout.dtype)
        if layout.by_columns:
            columns: np.ndarray = values.reshape(layout.shape[::-1])
            turned: np.ndarray = columns.T
            return turned
        rows: np.ndarray = values.reshape(layout.shape)
        return rows


@contextmanager
def open_arrays(path: Path, limit: int) -> Iterator[Arrays]:
    """Open the ``.npz`` file at ``path``, whose arrays may have ``limit`` bytes together.

    Raises:
        BundleError: the file is damaged, or holds more than that or other things than arrays of plain types.
    """
    try:
        with open_regular(path, limit) as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                yield Arrays(path, archive, _read_layouts(archive, limit))
    except FAULTS as exc:
        raise make_bundle_error("cannot be read", path, exc) from exc


def _check_directory(file: BinaryIO) -> None:
    """Raise ``ValueError`` for a directory that would take long to read; ``zipfile`` reads all of it."""
    length = file.seek(0, 2)
    if length < END.size:
        raise ValueError("it is no zip archive")
    file.seek(max(0, length - END.size - LOCATOR_BYTES))
    tail = file.read()
    signature, _, _, _, entries, size, _, comment = END.unpack(tail[-END.size :])
    if tail.startswith(LOCATOR):
        raise ValueError("it has a directory of the zip64 format, which is for larger files")
    if signature != b"PK\5\6" or comment:
        raise ValueError("it is no zip archive, or it is cut off")
    if entries > MAX_ARRAYS or size > MAX_DIRECTORY:
        raise ValueError(f"it holds {entries} arrays, the cap is {MAX_ARRAYS}")
    file.seek(0)


def _read_layouts(archive: zipfile.ZipFile, limit: int) -> dict[str, Layout]:
    """What the headers say, checked against the directory."""
    layouts: dict[str, Layout] = {}
    members = archive.infolist()
    if len(members) > MAX_ARRAYS:
        raise ValueError(f"it holds {len(members)} arrays, the cap is {MAX_ARRAYS}")
    total = sum(member.file_size for member in members)
    if total > limit:
        raise ValueError(f"its arrays have {total} bytes, the cap is {limit}")
    for member in members:
        name = member.filename.removesuffix(MEMBER_SUFFIX)
        if name == member.filename or name in layouts:
            raise ValueError(f"{name!r} is no array, or is there twice")
        if member.flag_bits & ENCRYPTED or member.compress_type not in METHODS:
            raise ValueError(f"{name} is packed in another way than numpy does")
        layouts[name] = _read_layout(archive, member)
    return layouts


def _read_layout(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Layout:
    """What one header says; it must fit the size of the member."""
    with archive.open(member) as content:
        start = content.read(ARRAY_START.size)
        if len(start) < ARRAY_START.size:
            raise ValueError(f"{member.filename} is too short")
        signature, major, minor, length = ARRAY_START.unpack(start)
        if signature != b"\x93NUMPY" or (major, minor) != (1, 0):
            raise ValueError(f"{member.filename} is no array of .npy format 1.0")
        found = HEADER.fullmatch(content.read(length))
    if found is None:
        raise ValueError(f"{member.filename} has a header that we do not write; objects are never read")
    dtype, by_columns, shape = (part.decode() for part in found.groups())
    sizes = tuple(int(size) for size in shape.split(",") if size.strip())
    layout = Layout(
        dtype,
        sizes,
        by_columns == "True",
        ARRAY_START.size + length,
    )
    if len(sizes) > MAX_DIMENSIONS or layout.header + layout.size != member.file_size:
        raise ValueError(f"{member.filename} says {dtype} {sizes}, but has {member.file_size} bytes")
    return layout
