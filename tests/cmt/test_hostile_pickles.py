"""Checkpoints whose pickles, archives or texts ask for hours or for gigabytes, and are refused in seconds.

The limits are lowered, or the files are small: a case without its rule ends by another error or with values.
"""

from __future__ import annotations

import io
import json
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from cmt_edge.cmt import checkpoint, containers, strangers
from cmt_edge.cmt.checkpoint import read_content, read_metadata
from cmt_edge.cmt.containers import find_places
from cmt_edge.deploy.errors import WeightsError

GET = b"h\x01"
"""Opcode that puts what was kept last on the stack."""
KEEP = b"q\x01"
"""Opcode that keeps what lies on top."""
LEVELS = 60
"""Levels of a value that holds the next one twice; whoever visits each of its 2^60 ways never ends."""
TUPLES = b"K\x01\x85" + KEEP + (GET + GET + b"\x86" + KEEP) * LEVELS
"""Tuples inside each other, each twice."""
LISTS = b"]" + KEEP + (b"]q\x02" + GET + b"a" + GET + b"a" + KEEP) * LEVELS
"""Lists inside each other, each twice."""
MAPPING = b"}" + KEEP + b"(" + b"".join(b"K%cN" % i for i in range(200)) + b"u"
"""A mapping of 200 entries."""
ORDERED = b"ccollections\nOrderedDict\n"
"""Opcode that names the class."""


def save(path: Path, *opcodes: bytes, compression: int = zipfile.ZIP_STORED, name: str = "data.pkl") -> Path:
    """A file as torch.save writes it; the opcodes make items of a list."""
    pickled = b"\x80\x02](" + b"".join(opcodes) + b"e."
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        archive.writestr(f"archive/{name}", pickled)
    return path


EXCESSIVE = {
    "a key of tuples": [TUPLES, b"}", GET, b"Ns"],
    "keys of tuples": [TUPLES, b"}(", GET, b"Nu"],
    "a path of lists": [LISTS, b"cpathlib\nPosixPath\n", GET, b"\x85R"],
    "a NumPy type of lists": [LISTS, b"cnumpy\ndtype\n", GET, b"\x85R"],
    "copies of a mapping": [MAPPING, (ORDERED + GET + b"\x85R") * 1000],
    "copies of a copy": [MAPPING, ORDERED + GET + b"\x85R" + KEEP, (ORDERED + GET + b"\x85R") * 1000],
    "many opcodes": [b"N" * 30_000],
}
"""What makes a pickle excessive -> its opcodes."""


@pytest.mark.parametrize("name", EXCESSIVE)
def test_an_excessive_pickle_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(strangers, "MAX_OPCODES", 20_000)
    monkeypatch.setattr(strangers, "MAX_WORK", 100_000)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(WeightsError, match="asks for more than a checkpoint may"):
        read_content(save(tmp_path / "w.pth", *EXCESSIVE[name]))


def test_a_pickle_under_another_name_is_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch does not tell small letters from large ones in the names of an archive."""
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    path = save(tmp_path / "w.pth", TUPLES, b"}", GET, b"Ns", name="DATA.pkl")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("decoy/data.pkl", b"\x80\x02}.")
    with pytest.raises(WeightsError, match="asks for more than a checkpoint may"):
        read_content(path)


def test_an_archive_that_becomes_far_larger_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strangers, "MODEST_BYTES", 1 << 16)
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1 << 18)}, path)
    assert read_content(path)["w"].shape == (1 << 18,)
    with (
        zipfile.ZipFile(path) as archive,
        zipfile.ZipFile(tmp_path / "z", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in archive.namelist():
            packed.writestr(member, archive.read(member))
    with pytest.raises(WeightsError, match="asks for more than a checkpoint may"):
        read_content(tmp_path / "z")


def test_lists_that_nobody_copies_are_read(tmp_path: Path) -> None:
    assert len(read_content(save(tmp_path / "w.pth", LISTS))) == LEVELS + 1


@pytest.mark.parametrize(
    "opcodes",
    [
        b"cpathlib\nPosixPath\n]\x85R",
        b"cnumpy\ndtype\nX" + struct.pack("<I", 300) + b"f4," * 100 + b"\x85R",
    ],
    ids=["a path", "a NumPy type"],
)
def test_stand_ins_take_short_texts(tmp_path: Path, opcodes: bytes) -> None:
    with pytest.raises(WeightsError, match="cannot be read as a PyTorch checkpoint"):
        read_content(save(tmp_path / "w.pth", opcodes))


def test_tensors_without_places_for_their_values_have_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "MAX_DENSE", 100)
    repeated = torch.zeros(1, 1).expand(1 << 20, 1 << 20)
    with torch.sparse.check_sparse_tensor_invariants():
        sparse = [torch.eye(8).to_sparse() for _ in range(3)]
    buffer = io.BytesIO()
    torch.save({"huge": repeated}, buffer)
    assert len(buffer.getvalue()) < 1 << 16
    (place,) = find_places({"w": torch.zeros(50), "a": sparse[0], "b": sparse[1], "c": sparse[2]})
    assert list(place.state) == ["w", "a"]
    (place,) = find_places({"w": torch.zeros(50), "mask": torch.ones(1).expand(9), "huge": repeated})
    assert list(place.state) == ["w", "mask"]


def test_long_texts_beside_tensors_are_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head: dict[str, object] = {
        "__metadata__": {"classes": "['a', 'b']", "epoch": "7"},
        "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    text = json.dumps(head).encode()
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    assert read_metadata(path) == {"classes": ["a", "b"], "epoch": 7}
    monkeypatch.setattr(checkpoint, "MAX_SAID", 10)
    assert read_metadata(path) == {"classes": "['a', 'b']", "epoch": "7"}
