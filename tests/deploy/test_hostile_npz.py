"""Golden and reference files that somebody hostile wrote: one typed error each, before memory is taken."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy.bundle import GOLDEN, REFERENCE, Bundle
from cmt_edge.deploy.bundle.npz import MAX_ARRAYS, open_arrays
from cmt_edge.deploy.errors import BundleError
from helpers.bundles import SIZE, copy_bundle, make_bundle, tiny_golden

MEBIBYTE = 1 << 20
LIMIT = 64 * MEBIBYTE
PLAIN = np.arange(6, dtype=np.float32).reshape(2, 3)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def declared(header: str, values: bytes = b"") -> bytes:
    """An array whose header is this text, padded as ``numpy`` does."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + values


def described(dtype: str, shape: str, values: bytes = b"") -> bytes:
    return declared(f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}", values)


def archive(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as made:
        for name, data in members:
            made.writestr(name, data)
    return buffer.getvalue()


def one(data: bytes) -> bytes:
    """An archive with one array."""
    return archive(("a.npy", data))


def patched(data: bytes, offset: int, value: bytes) -> bytes:
    """``data`` with the directory's entry of the first member changed at ``offset``."""
    start = data.rindex(b"PK\1\2") + offset
    return data[:start] + value + data[start + len(value) :]


def twice(data: bytes) -> bytes:
    """An archive whose two members have one name; ``zipfile`` warns when it writes that."""
    return archive(("a.npy", data), ("b.npy", data)).replace(b"b.npy", b"a.npy")


def zip64(data: bytes) -> bytes:
    """An archive whose true directory is named by a record of the zip64 format."""
    end = data.rindex(b"PK\5\6")
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 1, 1, 1 << 40, 0)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, end, 1)
    return data[:end] + record + locator + data[end:]


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "text": b"no archive",
    "cut off": one(npy(PLAIN))[:-30],
    "without a directory": one(npy(PLAIN))[:60],
    "a comment at the end": one(npy(PLAIN)) + b"comment",
    "no .npy": archive(("a.txt", b"text")),
    "an empty member": one(b""),
    "another magic": one(b"\x93NUMPX" + npy(PLAIN)[6:]),
    "version 2": one(b"\x93NUMPY\2\0\xff\xff\xff\x7f" + b" " * 99),
    "version 3": one(b"\x93NUMPY\3\0\xff\xff\xff\xff"),
    "version 9": one(b"\x93NUMPY\t\t\1\0 "),
    "header cut off": one(npy(PLAIN)[:40]),
    "header of garbage": one(declared("{'descr': __import__('os').system('id')}")),
    "header of minus signs": one(declared("-" * 60000)),
    "header of brackets": one(declared("(" * 60000)),
    "objects": one(npy(np.array([{}, []], object))),
    "objects by name": one(described("|O", "(1,)", b"x" * 8)),
    "a record type": one(npy(np.zeros(2, [("a", "<i4")]))),
    "float64": one(npy(np.zeros(3))),
    "big endian": one(npy(np.zeros(3, ">f4"))),
    "dates": one(npy(np.zeros(3, "M8[s]"))),
    "texts of a gigabyte": one(described("<U1000000000", "(1,)", b"x")),
    "10 GB in the header": one(described("<f4", "(2500000000,)", b"x" * 64)),
    "2**80 in the header": one(described("<f4", f"({1 << 80},)", b"x" * 64)),
    "a product beyond 64 bits": one(described("<f4", f"({', '.join(['4294967296'] * 4)})", b"")),
    "a negative size": one(described("<f4", "(-4,)", b"x" * 16)),
    "many dimensions": one(described("<f4", f"({'1, ' * 40})", b"x" * 4)),
    "no values": one(described("<f4", "(4,)")),
    "too many values": one(described("<f4", "(4,)", b"x" * 400)),
    "10 GB in the directory": patched(one(npy(PLAIN)), 24, struct.pack("<L", 0xFFFFFFF0)),
    "no bytes in the directory": patched(one(npy(PLAIN)), 24, struct.pack("<L", 0)),
    "a damaged checksum": patched(one(npy(PLAIN)), 16, b"\0\0\0\0"),
    "an unknown method": patched(one(npy(PLAIN)), 10, struct.pack("<H", 99)),
    "lzma": archive(("a.npy", npy(PLAIN)), method=zipfile.ZIP_LZMA),
    "bzip2": archive(("a.npy", npy(PLAIN)), method=zipfile.ZIP_BZIP2),
    "a password": patched(one(npy(PLAIN)), 8, b"\1\0"),
    "a local header elsewhere": patched(one(npy(PLAIN)), 42, struct.pack("<L", 7)),
    "one name twice": twice(npy(PLAIN)),
    "thousands of members": archive(*[(f"{i}.npy", b"") for i in range(MAX_ARRAYS + 1)]),
    "zip64": zip64(one(npy(PLAIN))),
    "a bomb": one(described("|u1", f"({LIMIT + 1},)", bytes(LIMIT + 1))),
}
"""What is wrong with an ``.npz`` file -> its bytes."""


def read_all(file: Path) -> list[np.ndarray]:
    with open_arrays(file, LIMIT) as arrays:
        return [arrays.read(name) for name in arrays.layouts]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_hostile_archive_is_read(tmp_path, name):
    file = tmp_path / "golden.npz"
    file.write_bytes(HOSTILE[name])
    with pytest.raises(BundleError, match=r"golden\.npz") as caught:
        read_all(file)
    assert caught.value.why
    assert caught.value.remedy


def test_damaged_values_are_noticed(tmp_path):
    file = tmp_path / "golden.npz"
    data = bytearray(archive(("a.npy", npy(PLAIN)), method=zipfile.ZIP_STORED))
    data[data.index(b"PK\1\2") - 3] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match="CRC"):
        read_all(file)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "array",
    [
        PLAIN,
        np.asfortranarray(PLAIN),
        np.zeros((0, 3), np.float32),
        np.float32(7),
        np.array(["a" * 32, "b"], "<U32"),
        np.arange(256, dtype=np.uint8),
    ],
    ids=["rows", "columns", "nothing", "a number", "texts", "bytes"],
)
def test_what_numpy_writes_is_read(tmp_path, save, array):
    file = tmp_path / "a.npz"
    save(file, first=array, second=PLAIN)
    with open_arrays(file, LIMIT) as arrays:
        np.testing.assert_array_equal(arrays.read("first"), array, strict=True)
        np.testing.assert_array_equal(arrays.read("second"), PLAIN, strict=True)
        assert arrays.read("first").flags.writeable


def golden_without(*names: str, **changes: np.ndarray) -> Callable[[Path], None]:
    """What writes golden data in which some arrays are missing or others."""
    golden = tiny_golden()
    arrays = {f"source{i}": np.frombuffer(s, np.uint8) for i, s in enumerate(golden.sources)}
    arrays |= {"pixels": golden.pixels, "output0": golden.logits} | changes
    left = {name: array for name, array in arrays.items() if name not in names}
    return lambda folder: np.savez(folder / GOLDEN, **left)


@pytest.mark.parametrize(
    "edit",
    [
        golden_without("pixels"),
        golden_without("source1"),
        golden_without(pixels=np.zeros((0, SIZE, SIZE, 3), np.uint8)),
        golden_without(pixels=np.zeros((2, SIZE, SIZE), np.uint8)),
        golden_without(pixels=np.zeros((2, SIZE + 1, SIZE, 3), np.uint8)),
        golden_without(pixels=np.zeros((2, SIZE, SIZE, 3), np.float32)),
        golden_without(pixels=np.zeros((9999, SIZE, SIZE, 3), np.uint8)),
        golden_without(source0=np.zeros((4, 4), np.uint8)),
        golden_without(source0=np.zeros(4, np.float32)),
        golden_without(output0=np.zeros((3, 3), np.float32)),
        golden_without(output0=np.zeros((2, 3), np.int32)),
        golden_without("output0", output1=np.zeros((2, 3), np.float32)),
    ],
)
def test_golden_arrays_of_another_shape_or_type(tmp_path, edit):
    bad = copy_bundle(make_bundle(tmp_path / "a"), tmp_path / "b", edit)
    with pytest.raises(BundleError, match=r"golden\.npz"):
        bad.golden()


@pytest.mark.parametrize(
    "answers",
    [
        {"top1": np.zeros(2, np.int32)},
        {"digest": np.zeros(2, "<U32")},
        {"digest": np.zeros(2, "<U32"), "top1": np.zeros(3, np.int32)},
        {"digest": np.zeros(2, "<U31"), "top1": np.zeros(2, np.int32)},
        {"digest": np.zeros(2, "<U32"), "top1": np.zeros(2, np.float32)},
        {"digest": np.zeros(2, "<U32"), "top1": np.array([0, 3], np.int32)},
        {"digest": np.zeros(2, "<U32"), "top1": np.array([-1, 0], np.int32)},
        {
            "digest": np.frombuffer(b"\xff" * 256, "<U32"),
            "top1": np.zeros(2, np.int32),
        },
    ],
)
def test_reference_answers_of_another_shape_type_or_value(tmp_path, answers):
    def edit(folder: Path) -> None:
        np.savez(folder / REFERENCE, **answers)

    made = make_bundle(tmp_path / "a", reference={"a" * 32: 2})
    assert Bundle.open(made.path).reference() == {"a" * 32: 2}
    with pytest.raises(BundleError, match=r"reference"):
        copy_bundle(made, tmp_path / "b", edit).reference()
