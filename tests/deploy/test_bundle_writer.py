"""Writing a bundle is all or nothing, whatever interrupts it."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle, files
from cmt_edge.deploy.bundle import (
    GOLDEN,
    BundleWriter,
)
from cmt_edge.deploy.errors import OutputError
from cmt_edge.deploy.files import hash_file
from cmt_edge.deploy.locks import TEMPORARY, try_lock
from helpers.bundles import (
    LABELS,
    make_bundle,
    snapshot,
    tiny_golden,
    tiny_manifest,
)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny", members={"extra/notes.txt": b"hello"})


def hidden(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.name.startswith("."))


def test_staged_bundle_is_usable_before_it_is_finished(tmp_path):
    with BundleWriter(tmp_path / "new") as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        staged = writer.staged(tiny_manifest())
        assert len(staged.golden().sources) == 2
        assert not (tmp_path / "new").exists()
        writer.commit(staged.manifest)
    assert Bundle.open(tmp_path / "new").labels == list(LABELS)
    assert hidden(tmp_path) == []


def test_a_staged_bundle_has_its_final_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with BundleWriter(Path("new")) as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        staged = writer.staged(tiny_manifest())
        assert (staged.name, staged.title) == ("new", "new")
        assert staged.path == writer.folder != staged.target
        made = writer.commit(staged.manifest)
    assert (made.name, made.title, made.target) == ("new", "new", None)
    assert Bundle.open(tmp_path / "new").title == str(tmp_path / "new")
    monkeypatch.chdir("new")
    assert Bundle.open(".").name == "new"


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """Names of the files that the writer hashes."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return hash_file(path)

    monkeypatch.setattr("cmt_edge.deploy.bundle.writer.hash_file", counted)
    return names


def test_each_file_is_hashed_once(tmp_path, hashed):
    with BundleWriter(tmp_path / "new") as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        writer.staged(tiny_manifest())
        (writer.folder / "model.bin").write_bytes(b"weights")
        (writer.folder / "extra").mkdir()
        (writer.folder / "extra" / "notes.txt").write_bytes(b"hello")
        writer.staged(tiny_manifest())
        writer.commit(writer.staged(tiny_manifest()).manifest)
    assert sorted(hashed) == [GOLDEN, "model.bin", "notes.txt"]
    assert set(Bundle.open(tmp_path / "new").manifest.files) == {GOLDEN, "model.bin", "extra/notes.txt"}


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)


def replace_file(path: Path, data: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(data)
    shutil.copystat(path, other)
    other.replace(path)


def write_within(path: Path, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(1)
        file.write(data[1:])


def write_and_keep_the_date(path: Path, data: bytes) -> None:
    status = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


CHANGES = [write, replace_file, write_within, write_and_keep_the_date]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes_after_it_was_hashed_is_hashed_again(tmp_path, change):
    """Even at once, to content of the same length: the clock of a file system is coarse."""
    with BundleWriter(tmp_path / "new") as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        path = writer.folder / "model.bin"
        path.write_bytes(b"w0000")
        for i in range(1, 50):
            before = writer.staged(tiny_manifest()).manifest.files["model.bin"]
            change(path, b"w%04d" % i)
            after = writer.staged(tiny_manifest()).manifest.files["model.bin"]
            assert after.sha256 == hashlib.sha256(b"w%04d" % i).hexdigest() != before.sha256
            change(path, b"W%04d" % i if change is not write_within else b"w%04d" % -i)
        writer.commit(tiny_manifest())
    assert Bundle.open(tmp_path / "new").name == "new"


def test_a_file_that_cannot_be_dated_is_hashed_each_time(tmp_path, hashed, monkeypatch):
    def refused(*_, **__):
        raise PermissionError

    with BundleWriter(tmp_path / "new") as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        monkeypatch.setattr("cmt_edge.deploy.bundle.writer.os.utime", refused)
        writer.staged(tiny_manifest())
        writer.commit(tiny_manifest())
    assert hashed == [GOLDEN, GOLDEN]
    assert Bundle.open(tmp_path / "new").golden().sources


def test_a_file_that_is_removed_after_it_was_hashed_is_not_named(tmp_path):
    with BundleWriter(tmp_path / "new") as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        (writer.folder / "model.bin").write_bytes(b"weights")
        assert "model.bin" in writer.staged(tiny_manifest()).manifest.files
        (writer.folder / "model.bin").unlink()
        writer.commit(tiny_manifest())
    assert set(Bundle.open(tmp_path / "new").manifest.files) == {GOLDEN}


def test_commit_replaces_an_older_bundle(bundle):
    make_bundle(bundle.path, members={"model.bin": b"newer"})
    assert Bundle.open(bundle.path).file("model.bin").read_bytes() == b"newer"
    assert not (bundle.path / "extra").exists()
    assert hidden(bundle.path.parent) == []


def test_missing_parents_are_made(tmp_path):
    assert Bundle.open(make_bundle(tmp_path / "a" / "b" / "c").path).labels


def test_relative_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_bundle(Path("here"))
    assert Bundle.open("here").labels == list(LABELS)
    assert hidden(tmp_path) == []


def interrupted(writer: BundleWriter, error: type[BaseException]) -> None:
    (writer.folder / "model.bin").write_bytes(b"half")
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("existing", [True, False])
def test_interruption_leaves_everything_as_it_was(tmp_path, error, existing):
    target = tmp_path / "tiny"
    if existing:
        make_bundle(target)
    before = snapshot(tmp_path)
    with pytest.raises(error), BundleWriter(target) as writer:
        interrupted(writer, error)
    assert snapshot(tmp_path) == before
    assert target.exists() == existing
    assert hidden(tmp_path) == []


def test_leaving_without_commit_writes_nothing(bundle):
    before = snapshot(bundle.path)
    with BundleWriter(bundle.path) as writer:
        (writer.folder / "model.bin").write_bytes(b"half")
    assert snapshot(bundle.path) == before
    assert hidden(bundle.path.parent) == []


@pytest.mark.parametrize(("owner", "function"), [(os, "fsync"), (os, "replace"), (Path, "rename")])
@pytest.mark.parametrize("existing", [True, False])
def test_full_disk(tmp_path, monkeypatch, owner, function, existing):
    target = tmp_path / "tiny"
    if existing:
        make_bundle(target)
    before = snapshot(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(owner, function, full)
    with pytest.raises(OutputError, match="No space left") as caught:
        make_bundle(target, members={"model.bin": b"newer"})
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    assert snapshot(tmp_path) == before
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("moment", "error"), [("before", KeyboardInterrupt), ("after", KeyboardInterrupt), ("before", OSError)]
)
def test_interruption_while_moving_into_place(bundle, monkeypatch, call, moment, error):
    """Where folders cannot be exchanged, four renames follow each other: the first one fails, because a
    bundle is there; it moves aside; the new one moves in; the old one moves on. A signal may come before or
    after each."""
    old = snapshot(bundle.path)
    rename, count = Path.rename, 0

    def rename_interrupted(source, target):
        nonlocal count
        count += 1
        if count == call and moment == "before":
            raise error(errno.EIO, "interrupted")
        try:
            rename(source, target)
        finally:
            if count == call:
                raise error

    with monkeypatch.context() as patch:
        patch.setattr(files, "renameat2", lambda: None)
        patch.setattr(Path, "rename", rename_interrupted)
        with pytest.raises((KeyboardInterrupt, OutputError)):
            make_bundle(bundle.path, members={"model.bin": b"newer"})
    assert count >= call
    assert bundle.path.is_dir(), "the bundle is gone from its place"
    Bundle.open(bundle.path)
    if call < 3 or (call, moment) == (3, "before"):
        assert snapshot(bundle.path) == old
    assert hidden(bundle.path.parent) == []


def test_place_below_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "b", tmp_path / "file" / "a" / "b"):
        with pytest.raises(OutputError) as caught:
            make_bundle(target)
        assert caught.value.remedy
    assert snapshot(tmp_path) == {"file": b"x"}


def test_what_is_no_bundle_is_never_replaced(tmp_path, bundle):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.jpg").write_text("precious")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(bundle.path)
    (tmp_path / "broken").symlink_to("nowhere")
    before = snapshot(tmp_path)
    for name in ("photos", "empty", "file", "link", "broken"):
        with pytest.raises(OutputError, match="not replaced") as caught:
            make_bundle(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)
    assert snapshot(tmp_path) == before
    assert hidden(tmp_path) == []


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    """What runs is told by its lock, not by a number in the name, which means another process elsewhere."""
    stale = tmp_path / f".tiny.{os.getpid()}.abc{TEMPORARY}"
    running = tmp_path / f".tiny.4194305.abc{TEMPORARY}"
    others = tmp_path / f".other.4194305.abc{TEMPORARY}"
    for folder in (stale, running, others):
        folder.mkdir()
        (folder / "model.bin").write_text("half")
    descriptor = os.open(running, os.O_RDONLY)
    try:
        assert try_lock(descriptor)
        make_bundle(tmp_path / "tiny")
        assert not stale.exists()
        assert (running / "model.bin").exists()
        assert (others / "model.bin").exists()
    finally:
        os.close(descriptor)
    make_bundle(tmp_path / "tiny")
    assert not running.exists()


def test_bundle_moved_aside_comes_back(bundle):
    before = snapshot(bundle.path)
    bundle.path.rename(files.make_aside_path(bundle.path))
    with BundleWriter(bundle.path):
        pass
    assert snapshot(bundle.path) == before
    assert hidden(bundle.path.parent) == []


def test_older_leftover_does_not_win_over_the_bundle(bundle):
    old = files.make_aside_path(bundle.path)
    shutil.copytree(bundle.path, old)
    (old / "model.bin").write_bytes(b"ancient")
    make_bundle(bundle.path, members={"model.bin": b"newer"})
    assert Bundle.open(bundle.path).file("model.bin").read_bytes() == b"newer"
    assert not old.exists()


SLEEPER = """
import sys, time
from pathlib import Path
from cmt_edge.deploy.bundle import BundleWriter
with BundleWriter(Path(sys.argv[1])) as writer:
    (writer.folder / "model.bin").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("existing", [True, False])
def test_signal_leaves_nothing_half_written(tmp_path, number, existing):
    target = tmp_path / "tiny"
    if existing:
        make_bundle(target)
    before = snapshot(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(target)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert process.stdout.readline() == b"ready\n"
    assert len(hidden(tmp_path)) == 1
    process.send_signal(number)
    assert process.wait(10) != 0
    process.stdout.close()
    assert snapshot(tmp_path) == before
    assert hidden(tmp_path) == []


def test_killed_run_is_cleaned_up_by_the_next(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(tmp_path / "tiny")], stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.kill()
    process.wait(10)
    process.stdout.close()
    assert len(hidden(tmp_path)) == 1
    make_bundle(tmp_path / "tiny")
    assert hidden(tmp_path) == []


def test_signal_handler_is_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with BundleWriter(tmp_path / "tiny"):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("place", ["inner", "a/b/inner"])
def test_no_bundle_is_written_into_another_one(bundle, place):
    before = snapshot(bundle.path)
    with pytest.raises(OutputError, match="inside the bundle"), BundleWriter(bundle.path / place):
        pytest.fail("the body must not run")
    assert snapshot(bundle.path) == before
