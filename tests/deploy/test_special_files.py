"""Whatever reads files reads regular files of a bounded size, and waits for nothing else."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle
from cmt_edge.deploy import files as files_module
from cmt_edge.deploy.errors import CmtEdgeError, OutputError
from cmt_edge.deploy.files import describe_irregular, open_regular, read_regular, read_text, write_atomic
from helpers.bundles import make_bundle
from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the special files of POSIX")

SECONDS = 120
"""A reader that takes longer waits for something."""
GIBIBYTES = 1 << 36
"""Bytes of the sparse file: more than the memory of any machine that tests run on."""


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sock(path: Path) -> None:
    here = os.open(path.parent, os.O_RDONLY)  # the path of a socket may have some hundred letters only
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def folder(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(GIBIBYTES)


KINDS = (pipe, device, sock, folder, sparse)

READERS = {
    "manifest": "Bundle.open(place)",
    "member": "Bundle.open(place)",
    "graph": "Bundle.open(place)",
    "golden": "Bundle.open(place)",
    "signature": "Bundle.open(place).signed_by",
    "key": "Bundle.open(place, key=special)",
    "image": "decode(str(special), 'apply')",
    "archive": "ImageSet(special)",
    "settings": "read_config(special)",
    "labels": "ExportConfig('cmt_nano', labels=str(special)).read_labels()",
    "checkpoint": "read_content(special)",
    "own model": "create_model(f'{special}:build')",
    "secret": "sealing.make_seal('text')",
}
"""What reads a file -> the expression that reads it: ``special`` is the file, ``place`` a bundle."""

NAMES = {
    "manifest": "manifest.json",
    "member": "model.bin",
    "graph": "model.onnx",
    "golden": "golden.npz",
    "signature": "signature.json",
    "image": "image.png",
    "archive": "images.tar",
    "settings": "settings.toml",
    "own model": "net.py",
    "secret": "machine.key",
}
"""What reads a file -> the file's name, where one is asked for."""

INSIDE = {"manifest", "member", "graph", "golden", "signature"}
"""Readers of files that lie in a bundle."""

PROGRAM = """
import json, resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
from cmt_edge.cmt import create_model
from cmt_edge.cmt.checkpoint import read_content
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.decoding import decode
from cmt_edge.deploy.errors import CmtEdgeError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy import sealing
from cmt_edge.export.config import ExportConfig
from cmt_edge.export.config_file import read_config
for name, special, place, expression in json.loads(sys.argv[1]):
    print("reads", name, flush=True)
    special, place = Path(special), Path(place)
    try:
        eval(expression)
    except CmtEdgeError as exc:
        assert exc.exit_code == 2 and exc.remedy, exc
    else:
        assert name == "signature", "it was read"  # what is no file there is no signature
"""
"""Reads special files in a process of its own, with a bound on its memory."""


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make):
    """By everything that reads files: each is given a bundle or a folder of its own."""
    pytest.importorskip("torch", reason="needs torch")
    jobs = []
    for reader, expression in READERS.items():
        own = tmp_path / reader
        place = make_bundle(own / "bundle", members={"model.onnx": b""}).path
        special = (place if reader in INSIDE else own) / NAMES.get(reader, "special")
        special.unlink(missing_ok=True)
        make(special)
        jobs.append((reader, str(special), str(place), expression))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(jobs)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "CMT_EDGE_STATE": str(tmp_path / "secret")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, (done.stdout.splitlines()[-1:], done.stderr[-1500:])
    assert done.stdout.splitlines() == [f"reads {name}" for name in READERS]


@pytest.mark.parametrize("make", KINDS)
def test_the_one_way_to_read_a_file_tells_what_it_found(tmp_path, make):
    path = tmp_path / "special"
    make(path)
    for read in (lambda: open_regular(path, 100), lambda: read_regular(path, 100), lambda: read_text(path)):
        with pytest.raises(OSError, match=r"not a regular file|the cap is"):
            read()


def test_a_regular_file_and_a_link_to_one_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert describe_irregular(tmp_path / name) is None
        assert read_regular(tmp_path / name, 5) == b"12345"
        with pytest.raises(OSError, match="5 bytes, the cap is 4"):
            read_regular(tmp_path / name, 4)
    assert describe_irregular(tmp_path / "absent") is None
    assert describe_irregular("a\0b") is None
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "absent")


def test_a_member_that_cannot_be_read_is_a_bundle_error(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "b")

    def broken(*_: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("cmt_edge.deploy.bundle.bundle.hash_file", broken)
    with pytest.raises(CmtEdgeError, match="cannot be read") as caught:
        Bundle.open(bundle.path)
    assert caught.value.exit_code == 2
    assert "Input/output" in str(caught.value)


@pytest.mark.parametrize("make", [folder])
def test_nothing_is_written_over_a_folder(tmp_path, make):
    make(tmp_path / "report.md")
    with pytest.raises(OutputError):
        write_atomic(tmp_path / "report.md", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


class Growing(io.FileIO):
    """A file that another process appends to after each of the first reads."""

    def __init__(self, path: Path, parts: list[bytes]) -> None:
        super().__init__(path)
        self._path, self._parts = path, parts

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if self._parts:
            with open(self._path, "ab") as file:
                file.write(self._parts.pop(0))
        return data


@pytest.mark.parametrize("limit", [7, 1 << 62])
def test_a_file_that_grows_while_it_is_read(tmp_path, monkeypatch, limit):
    """A large limit takes no memory."""
    file = tmp_path / "file"
    file.write_bytes(b"123")
    monkeypatch.setattr(files_module, "open_regular", lambda path, _: Growing(path, [b"45", b"67"]))
    assert read_regular(file, limit) == b"1234567"
    with pytest.raises(OSError, match="more than 8 bytes"):
        read_regular(file, 8)
