"""Bundles as one file: written the same way each time, checked as a whole before anything is unpacked."""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import packed
from cmt_edge.deploy.bundle.manifest import MANIFEST
from cmt_edge.deploy.errors import BundleError, InputError, OutputError
from cmt_edge.deploy.locks import TEMPORARY
from helpers.bundles import make_bundle, snapshot


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(folder))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "b", members={"extra/notes.txt": b"hello"})


@pytest.fixture
def file(bundle: Bundle, tmp_path: Path) -> Path:
    path = tmp_path / f"b{packed.SUFFIX}"
    bundle.pack(path)
    return path


def test_a_packed_bundle_is_the_same_bundle(bundle: Bundle, file: Path) -> None:
    opened = Bundle.open(file)
    assert opened.manifest == Bundle.open(bundle.path).manifest
    assert snapshot(opened.path) == snapshot(bundle.path)
    assert opened.name == "b"
    assert opened.title == str(file)


def test_members_are_stored_at_multiples_of_64_bytes(bundle: Bundle, file: Path) -> None:
    content = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert archive.namelist()[0] == MANIFEST
        for entry in archive.infolist():
            name_length, extra = struct.unpack_from("<2H", content, entry.header_offset + 26)
            begin = entry.header_offset + 30 + name_length + extra
            assert begin % packed.ALIGNMENT == 0
            assert content[begin : begin + entry.file_size] == (bundle.path / entry.filename).read_bytes()


def test_packing_twice_gives_the_same_bytes(bundle: Bundle, file: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.zip"
    bundle.pack(again)
    assert again.read_bytes() == file.read_bytes()


def test_what_systems_left_beside_the_files_is_not_packed(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.path / ".DS_Store").write_bytes(b"x")
    Bundle.open(bundle.path).pack(tmp_path / "p.zip")
    assert ".DS_Store" not in zipfile.ZipFile(tmp_path / "p.zip").namelist()


def test_other_tools_unpack_it(bundle: Bundle, file: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "zipfile", "-e", file, tmp_path / "out"], check=True)
    assert snapshot(Bundle.open(tmp_path / "out").path) == snapshot(bundle.path)


def test_the_second_opening_unpacks_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Bundle.open(file)
    monkeypatch.setattr(packed, "_extract", None)  # would fail if it were called
    assert Bundle.open(file).path == first.path


def damage_member(folder: Path) -> None:
    path = folder / "model.bin"
    path.write_bytes(b"W" * path.stat().st_size)


def add_member(folder: Path) -> None:
    (folder / "more.txt").write_text("x")


@pytest.mark.parametrize("damage", [damage_member, add_member, shutil.rmtree], ids=lambda f: f.__name__)
def test_a_damaged_copy_in_the_cache_is_made_again(file: Path, damage: Callable[[Path], None]) -> None:
    first = Bundle.open(file)
    whole = snapshot(first.path)
    damage(first.path)
    assert snapshot(Bundle.open(file).path) == whole


def pack_many(place: Path, count: int) -> list[Path]:
    """Different packed bundles."""
    files = [place / f"{number}.zip" for number in range(count)]
    for number, file in enumerate(files):
        make_bundle(place / str(number), members={"n.txt": str(number).encode()}).pack(file)
    return files


@pytest.mark.parametrize(
    "fault",
    [errno.EROFS, errno.ENOSPC, errno.ENAMETOOLONG, errno.ENOENT, errno.EACCES, errno.EIO, errno.ELOOP],
)
def test_a_cache_that_cannot_be_written(file: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    def fail(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(packed, "hold_folder", fail)
    assert Bundle.open(file).golden().logits.shape[0] == 2


@pytest.mark.parametrize("name", ["a file", "a long name", "a device", "no folder"])
def test_a_place_that_is_no_cache(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, where the cache should be")
    places = {"a file": blocked, "a long name": "x" * 300, "a device": os.devnull, "no folder": "/proc/none"}
    monkeypatch.setenv("CMT_EDGE_CACHE", str(places[name]))
    assert Bundle.open(file).golden().logits.shape[0] == 2


def test_no_room_anywhere(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(packed, "hold_folder", fail)
    monkeypatch.setattr(packed, "make_scratch", fail)
    with pytest.raises(OutputError, match=r"no room to unpack it(.|\n)*CMT_EDGE_CACHE or TMPDIR") as found:
        Bundle.open(file)
    assert "-o DIR" not in str(found.value)


def test_what_lies_among_the_temporary_files_goes_with_the_bundle(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CMT_EDGE_CACHE", os.devnull)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    left_by_killed = tmp_path / "tmp" / f"{packed.SCRATCH}left{TEMPORARY}"
    left_by_killed.mkdir(parents=True)
    bundle = Bundle.open(file)
    assert [path.name for path in (tmp_path / "tmp").iterdir()] == [bundle.path.parent.name]
    with Predictor.load(bundle) as predictor:
        del bundle
        gc.collect()
        assert list((tmp_path / "tmp").iterdir())
        assert predictor(np.zeros((4, 4, 3), np.uint8))
    gc.collect()
    assert not list((tmp_path / "tmp").iterdir())


def test_only_the_last_bundles_stay_in_the_cache(tmp_path: Path, cache: Path) -> None:
    for file in pack_many(tmp_path, packed.KEEP + 3):
        Bundle.open(file)
    folders = [path for path in (cache / packed.FOLDER).iterdir() if path.is_dir()]
    assert len(folders) == packed.KEEP


def test_bundles_that_are_open_stay(tmp_path: Path, cache: Path) -> None:
    files = pack_many(tmp_path, packed.KEEP + 3)
    bundles = [Bundle.open(file) for file in files]
    for bundle in bundles:
        assert bundle.golden().logits.shape[0] == 2
    del bundle, bundles
    gc.collect()
    Bundle.open(files[0])
    assert len([path for path in (cache / packed.FOLDER).iterdir() if path.is_dir()]) == packed.KEEP


HOLDER = """
import sys
from cmt_edge.deploy import Bundle
bundle = Bundle.open(sys.argv[1])
print(bundle.path, flush=True)
sys.stdin.read()
"""


def test_a_bundle_that_another_process_has_open_stays(tmp_path: Path) -> None:
    first, *others = pack_many(tmp_path, packed.KEEP + 3)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, first], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        for file in others:
            Bundle.open(file)
        assert (folder / MANIFEST).exists()
    Bundle.open(others[0])
    assert not folder.exists()


def test_a_forked_child_removes_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMT_EDGE_CACHE", os.devnull)
    bundle = Bundle.open(file)
    hold = bundle.hold
    assert hold is not None
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a child
    packed_folder = bundle.path
    del bundle, hold
    gc.collect()
    assert packed_folder.exists()
    monkeypatch.undo()
    shutil.rmtree(packed_folder.parent)


def test_a_packed_bundle_is_not_added_to(file: Path) -> None:
    opened = Bundle.open(file)
    with pytest.raises(InputError, match="packed"):
        opened.update(opened.manifest, {"engines/new": b""})


def test_a_place_that_cannot_be_written(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(OutputError):
        bundle.pack(tmp_path / "none" / "b.zip")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError):
        bundle.pack(tmp_path / "folder")
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_real_bundle_answers_the_same_packed(onnx_bundle: Bundle, tmp_path: Path) -> None:
    onnx_bundle.pack(tmp_path / "p.zip")
    images = list(onnx_bundle.golden().pixels)
    with Predictor.load(onnx_bundle.path) as plain, Predictor.load(tmp_path / "p.zip") as other:
        for image in images:
            np.testing.assert_array_equal(plain(image).logits, other(image).logits)


# --- hostile archives -----------------------------------------------------------------------------


def repacked(
    source: Path,
    target: Path,
    edit: Callable[[zipfile.ZipFile], None],
    method: int = zipfile.ZIP_STORED,
) -> Path:
    """The same members in a new archive, with more of them."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
        edit(new)
    return target


def add_link(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("link")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


def add_named(name: str) -> Callable[[zipfile.ZipFile], None]:
    def add(archive: zipfile.ZipFile) -> None:
        archive.writestr(name, b"x")

    return add


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (add_named("../outside"), "outside"),
        (add_named("/absolute"), "outside"),
        (add_named("a/../../b"), "outside"),
        (add_named("..\\windows"), "outside"),
        (add_named("C:drive"), "outside"),
        (add_named("a//b"), "outside"),
        (add_named("./a"), "outside"),
        (add_named("bell\a"), "outside"),
        (add_named("n" * 300), "outside"),
        (add_named("folder/"), "outside|no regular file"),
        (add_named("model.bin"), "twice"),
        (add_named("MODEL.BIN"), "twice"),
        (add_named("model.bin/below"), "like a folder"),
        (add_link, "no regular file"),
        (add_named("more.txt"), "does not name"),
    ],
)
def test_archives_with_members_that_no_bundle_has(
    file: Path,
    tmp_path: Path,
    edit: Callable[[zipfile.ZipFile], None],
    message: str,
) -> None:
    before = snapshot(tmp_path)
    hostile = repacked(file, tmp_path / "hostile.zip", edit)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(hostile)
    assert str(hostile) in str(caught.value)
    hostile.unlink()
    assert snapshot(tmp_path) == before


def test_compression_is_refused(file: Path, tmp_path: Path) -> None:
    bomb = repacked(
        file,
        tmp_path / "bomb.zip",
        lambda archive: archive.writestr("zeros", bytes(1 << 20)),
        zipfile.ZIP_DEFLATED,
    )
    with pytest.raises(BundleError, match="compresses"):
        Bundle.open(bomb)


def test_too_many_members(file: Path, tmp_path: Path) -> None:
    def add(archive: zipfile.ZipFile) -> None:
        for number in range(400):
            archive.writestr(str(number), b"")

    with pytest.raises(BundleError, match="too large a directory"):
        Bundle.open(repacked(file, tmp_path / "many.zip", add))


def test_members_that_share_bytes(file: Path, tmp_path: Path) -> None:
    """Two entries of the directory that point to one member: a bomb without compression."""
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        first, second = archive.infolist()[1:3]
    place = content.rindex(second.filename.encode()) - 46
    struct.pack_into("<L", content, place + 42, first.header_offset)
    (tmp_path / "shared.zip").write_bytes(content)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "shared.zip")


def cut(content: bytes) -> bytes:
    return content[:-30]


def add_bytes_before(content: bytes) -> bytes:
    return b"#!/bin/sh\n" + content


def add_bytes_after(content: bytes) -> bytes:
    return content + b"more"


def add_comment(content: bytes) -> bytes:
    return content[:-2] + b"\x04\x00more"


FILES = {
    "empty": lambda content: b"",
    "text": lambda content: b"this is no archive" * 10,
    "cut": cut,
    "bytes before": add_bytes_before,
    "bytes after": add_bytes_after,
    "comment": add_comment,
    "end only": lambda content: content[-22:],
    "end of an empty archive": lambda content: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_files_that_are_no_packed_bundle(
    file: Path, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    other = tmp_path / "other.zip"
    other.write_bytes(change(file.read_bytes()))
    with pytest.raises(BundleError) as caught:
        Bundle.open(other)
    assert "--pack" in str(caught.value) or "copy" in str(caught.value)


def test_special_files_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "pipe.zip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 255)), min_size=1, max_size=4))
def test_damaged_archives_answer_as_before_or_are_refused(
    file: Path,
    bundle: Bundle,
    flips: list[tuple[int, int]],
) -> None:
    content = bytearray(file.read_bytes())
    directory = struct.unpack_from("<L", content, len(content) - 6)[0]
    for position, value in flips:  # mostly in the directory, where the structure is
        place = (
            position % len(content)
            if position % 4 == 0
            else directory + position % (len(content) - directory)
        )
        content[place] = value
    damaged = file.with_name("damaged.zip")
    damaged.write_bytes(content)
    with contextlib.suppress(BundleError):  # any other exception fails
        assert snapshot(Bundle.open(damaged).path) == snapshot(bundle.path)


def test_what_a_killed_process_left_goes_also_where_nothing_is_unpacked(file: Path, cache: Path) -> None:
    folder = Bundle.open(file).path.parent
    before = [path.name for path in folder.iterdir()]
    (folder / f".killed{TEMPORARY}").mkdir()
    Bundle.open(file)
    assert [path.name for path in folder.iterdir()] == before
