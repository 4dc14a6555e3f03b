"""Several processes at one bundle and one cache: writers, readers, one that is killed, one in a container."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor, files, locks
from cmt_edge.deploy.bundle import BundleWriter
from cmt_edge.deploy.bundle.golden import Golden
from cmt_edge.deploy.cache import Cache
from cmt_edge.deploy.errors import BundleError, OutputError
from cmt_edge.deploy.locks import LOCK, TEMPORARY
from helpers.bundles import make_bundle, snapshot, tiny_golden
from helpers.paths import ROOT

SWAPS = 50
"""How often a bundle is replaced while others read it."""

WORKER = """
import sys
from pathlib import Path
from cmt_edge.deploy.cache import Cache
from helpers.bundles import make_bundle
target, cache, number = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
store = Cache(cache, (".a", ".b"), 2)
def same(files):
    return files
print("ready", flush=True)
for turn in range(12):
    make_bundle(target, members={"model.bin": f"{number} {turn}".encode() * 100_000})
    for key in ("shared", f"{number}-{turn}"):
        made = store.get(key, decode=same, make=lambda: (b"a", b"b"), encode=same)
        assert made == (b"a", b"b"), made
    print("turn", flush=True)
"""
"""Replaces one bundle again and again, and asks one cache for one key and for others, which evict each
other."""

HOLDER = """
import sys, time
from pathlib import Path
from cmt_edge.deploy.bundle import BundleWriter
with BundleWriter(Path(sys.argv[1])) as writer:
    (writer.folder / "model.bin").write_bytes(b"half")
    print("ready", flush=True)
    sys.stdin.readline()
    assert (writer.folder / "model.bin").read_bytes() == b"half"
"""
"""Writes a bundle until it is told to stop, and sees that nobody has touched it."""

ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT / 'tests'}"}
"""What a child process needs to import the checkout and the helpers."""


def start(*command: object) -> subprocess.Popen:
    return subprocess.Popen(
        [str(part) for part in command],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.slow
def test_eight_processes_with_one_output_and_one_cache_key(tmp_path):
    """One of them is killed at work. The others end well, and the next run finds nothing that is left."""
    target, cache = tmp_path / "out" / "tiny", tmp_path / "cache"
    workers = [start(sys.executable, "-c", WORKER, target, cache, number) for number in range(8)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    victim, *others = workers
    assert victim.stdout.readline() == "turn\n"
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    for worker in others:
        _, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
    Bundle.open(target)
    make_bundle(target)
    assert snapshot(tmp_path / "out").keys() == {f"tiny/{name}" for name in snapshot(target)}
    assert hidden(target.parent) == []
    old = time.time() - 60
    for path in cache.iterdir():
        os.utime(path, (old, old))
    Cache(cache, (".a", ".b"), 2).write("next", (b"a", b"b"))
    assert hidden(cache) == []
    assert not list(cache.glob(f"*{LOCK}"))


def versioned(target: Path, number: int) -> None:
    """A bundle whose labels and golden logits both tell its number."""
    golden = tiny_golden()
    logits = np.full((len(golden.sources), 3), number, np.float32)
    labels = tuple(f"{name} {number}" for name in ("red", "green", "blue"))
    made = Golden(golden.sources, golden.pixels, [logits])
    make_bundle(target, golden=made, labels=labels, members={"model.bin": bytes([number]) * 50_000})


def require_whole(target: Path) -> int:
    """Read a bundle in every way; its number, which all of it tells alike."""
    with Predictor.load(target) as predictor:
        numbers = {int(label.split()[1]) for label in predictor.labels}
    bundle = Bundle.open(target)
    found = {int(label.split()[1]) for label in bundle.labels}
    try:
        found |= {int(bundle.golden().logits[0, 0]), bundle.file("model.bin").read_bytes()[0]}
        bundle.require_unchanged()
    except (BundleError, OSError):  # it went after it was opened, which is said, not hidden
        with pytest.raises(BundleError, match="replaced"):
            bundle.require_unchanged()
        found = {min(found)}
    assert len(numbers) == len(found) == 1
    return found.pop()


@pytest.mark.parametrize("exchange", ["in one step", "in two steps"])
def test_readers_see_one_bundle_while_it_is_replaced(tmp_path, monkeypatch, exchange):
    if exchange == "in two steps":
        monkeypatch.setattr(files, "renameat2", lambda: None)
    target = tmp_path / "tiny"
    versioned(target, 0)

    def replace() -> None:
        for number in range(1, SWAPS + 1):
            versioned(target, number)

    writer = threading.Thread(target=replace)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(require_whole(target))
    writer.join()
    assert seen == sorted(seen)
    assert len(set(seen)) > 1, "nothing was replaced while it was read"
    assert require_whole(target) == SWAPS
    assert hidden(tmp_path) == []


def test_a_bundle_that_is_replaced_after_it_was_opened_says_so(tmp_path):
    versioned(tmp_path / "tiny", 1)
    bundle = Bundle.open(tmp_path / "tiny")
    versioned(tmp_path / "tiny", 2)
    for use in (bundle.golden, bundle.require_unchanged, lambda: Predictor.load(bundle)):
        with pytest.raises(BundleError, match="replaced while it was being read") as caught:
            use()
        assert caught.value.remedy


def test_a_writer_in_another_pid_namespace_keeps_its_folder(tmp_path):
    """There its process number means another process, or none."""
    unshare = shutil.which("unshare")
    command = [unshare, "--pid", "--fork", "--kill-child"]
    if unshare is None or subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine permits no pid namespaces")
    target = tmp_path / "tiny"
    holder = start(*command, sys.executable, "-c", HOLDER, target)
    assert holder.stdout.readline() == "ready\n"
    assert len(hidden(tmp_path)) == 1
    make_bundle(target)
    assert len(hidden(tmp_path)) == 1
    _, err = holder.communicate("stop\n", timeout=60)
    assert holder.returncode == 0, err
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_file_system_that_cannot_exchange_folders(tmp_path, monkeypatch, number):
    def refuse(*_: object) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(files, "renameat2", lambda: refuse)
    versioned(tmp_path / "tiny", 1)
    versioned(tmp_path / "tiny", 2)
    assert require_whole(tmp_path / "tiny") == 2
    assert hidden(tmp_path) == []


def test_a_kill_between_two_steps_is_undone_by_the_next_writer(tmp_path):
    target = tmp_path / "tiny"
    versioned(target, 1)
    target.rename(files.make_aside_path(target))
    with pytest.raises(BundleError, match="no such bundle folder"):
        Bundle.open(target)
    with BundleWriter(target):
        assert require_whole(target) == 1
    assert require_whole(target) == 1


def test_what_a_user_puts_there_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "tiny"
    bundle = make_bundle(tmp_path / "other")
    with BundleWriter(target) as writer:
        target.mkdir()
        (target / "photo.jpg").write_bytes(b"precious")
        with pytest.raises(OutputError, match="not replaced"):
            writer.commit(bundle.manifest)
    assert snapshot(target) == {"photo.jpg": b"precious"}
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("name", ["[ab]*?", "tiny.tmp", "a b"])
def test_leftovers_are_found_whatever_the_name(tmp_path, name):
    (tmp_path / f".{name}.abc{TEMPORARY}").mkdir()
    make_bundle(tmp_path / name)
    assert hidden(tmp_path) == []


def test_a_fresh_file_without_a_lock_is_spared_and_an_old_one_goes(tmp_path):
    """Its process may be about to lock it."""
    left = tmp_path / f".report.md.abc{TEMPORARY}"
    left.write_bytes(b"half")
    files.write_atomic(tmp_path / "report.md", b"whole")
    assert left.exists()
    old = time.time() - 60
    os.utime(left, (old, old))
    files.write_atomic(tmp_path / "report.md", b"whole")
    assert snapshot(tmp_path) == {"report.md": b"whole"}


def test_a_new_folder_that_another_process_is_about_to_remove_is_not_used(tmp_path, monkeypatch):
    """It found the folder before its lock was taken, and holds the lock itself until the folder is gone."""
    made = []
    mkdtemp = tempfile.mkdtemp

    def found_at_once(*args):
        path = mkdtemp(*args)
        made.append((path, os.open(path, os.O_RDONLY)))
        if len(made) == 1:
            assert locks.try_lock(made[0][1])
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", found_at_once)
    with locks.scratch_folder(tmp_path, ".tiny.") as folder:
        assert [str(folder)] == [path for path, _ in made[1:]]
    for _, descriptor in made:
        os.close(descriptor)


def test_two_threads_write_one_file(tmp_path):
    contents = [bytes([65 + number]) * 200_000 for number in range(8)]
    threads = [
        threading.Thread(target=files.write_atomic, args=(tmp_path / "file", content)) for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert snapshot(tmp_path).keys() == {"file"}
    assert (tmp_path / "file").read_bytes() in contents
