"""The one cache, and the locks between processes that it rests on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from cmt_edge.deploy import cache as cache_module
from cmt_edge.deploy import files as files_module
from cmt_edge.deploy import locks
from cmt_edge.deploy.cache import Cache, CacheWarning, JsonCache, can_keep, compute_digest
from cmt_edge.deploy.children import IMPORT_FOLDER
from cmt_edge.deploy.errors import GateError, OutputError
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.locks import locked, try_lock


def text_of(cache: Cache, key: str, make):
    """Cache a text in two files."""
    return cache.get(
        key,
        decode=lambda files: (files[0] + files[1]).decode(),
        make=make,
        encode=lambda text: (text[:1].encode(), text[1:].encode()),
    )


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", (".head", ".tail"), keep=2)


def never():
    raise AssertionError("it was made again")


def names(cache: Cache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


def test_a_result_is_made_once(cache):
    assert text_of(cache, "k", lambda: "hello") == "hello"
    assert text_of(cache, "k", never) == "hello"
    assert names(cache) == ["k.head", "k.tail"], "no lock is left"


@pytest.mark.parametrize("damage", ["gone", "unreadable", "undecodable"])
def test_what_cannot_be_read_is_made_again(cache, damage):
    text_of(cache, "k", lambda: "hello")
    file = cache.folder / "k.tail"
    file.unlink()
    if damage == "unreadable":
        file.mkdir()
    elif damage == "undecodable":
        file.write_bytes(b"\xff")
    if damage == "unreadable":
        with pytest.warns(CacheWarning):
            assert text_of(cache, "k", lambda: "again") == "again"
    else:
        assert text_of(cache, "k", lambda: "again") == "again"
        assert text_of(cache, "k", never) == "again"


def test_what_making_raises_is_raised(cache):
    def refuse():
        raise GateError("no")

    with pytest.raises(GateError):
        text_of(cache, "k", refuse)
    assert names(cache) == []


def test_the_entries_that_were_used_last_stay(cache):
    a, b, c = (letter * 64 for letter in "abc")
    for age, key in ((300, a), (200, b)):
        text_of(cache, key, lambda key=key: key * 2)
        for suffix in cache.suffixes:
            os.utime(cache.folder / f"{key}{suffix}", (time.time() - age, time.time() - age))
    assert text_of(cache, a, never) == a * 2  # used now, so b is older
    text_of(cache, c, lambda: "cc")
    assert names(cache) == [f"{a}.head", f"{a}.tail", f"{c}.head", f"{c}.tail"]


def test_files_of_a_user_in_the_folder_are_not_dropped(cache):
    """A user may name a folder as the cache that has such files already."""
    cache.folder.mkdir()
    for name in ("thesis.head", "thesis.tail", "more.tail", "cafe.tail"):
        (cache.folder / name).write_text("precious")
    for letter in "abcd":
        text_of(cache, letter * 64, lambda: "made")
    ours = [f"{letter * 64}{suffix}" for letter in "cd" for suffix in cache.suffixes]
    assert names(cache) == sorted(["thesis.head", "thesis.tail", "more.tail", "cafe.tail", *ours])


@pytest.mark.parametrize("where", ["folder", "file"])
def test_a_cache_that_cannot_be_used_costs_only_the_keeping(tmp_path, where):
    cache = Cache(tmp_path / "file" / "cache", (".head", ".tail"), 2)
    if where == "folder":
        (tmp_path / "file").write_text("in the way")
    else:
        (cache.folder / "k.tail").mkdir(parents=True)
        (cache.folder / "k.tail" / "in the way").write_text("")
    with pytest.warns(CacheWarning, match=f"the cache {cache.folder} cannot be used"):
        assert text_of(cache, "k", lambda: "hello") == "hello"


def test_a_cache_that_nobody_can_write_to_still_gives_what_it_holds(cache, monkeypatch):
    """A cache in a read-only image, say."""
    text_of(cache, "k", lambda: "hello")

    @contextmanager
    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system")
        yield

    monkeypatch.setattr(cache_module, "locked", refuse)
    assert text_of(cache, "k", never) == "hello"
    with pytest.warns(CacheWarning, match="Read-only"):
        assert text_of(cache, "other", lambda: "made") == "made"


def test_an_unusable_folder_is_told_of_once_and_before_the_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(CacheWarning, match="CMT_EDGE_CACHE=FOLDER"):
        assert not can_keep(tmp_path / "file")
    assert not can_keep(tmp_path / "file" / "weights")  # a second warning would be an error here
    cache = Cache(tmp_path / "file" / "calibrated", (".head", ".tail"), 2)
    assert text_of(cache, "k", lambda: "hello") == "hello"
    assert can_keep(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_user_without_a_home_gets_no_folder_that_is_called_tilde(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CMT_EDGE_CACHE")
    monkeypatch.setattr(files_module, "user_cache_path", lambda *_, **__: Path("~/.cache/cmt-edge"))
    with pytest.warns(CacheWarning):
        assert not can_keep(find_cache_folder())
    assert list(tmp_path.iterdir()) == []


def test_writing_alone_tells_why_it_failed(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        Cache(tmp_path / "file", (".x",), 1).write("k", (b"",))


def test_one_thread_makes_what_several_ask_for(cache):
    made = []

    def make():
        made.append(1)
        time.sleep(0.2)
        return "hello"

    results = []
    threads = [threading.Thread(target=lambda: results.append(text_of(cache, "k", make))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (made, results) == ([1], ["hello"] * 8)
    assert names(cache) == ["k.head", "k.tail"]


def test_json_is_kept_in_a_folder_or_in_memory(tmp_path):
    made = []

    def make():
        made.append(len(made))
        return {"n": made[-1]}

    def read(content):
        if list(content) != ["n"]:
            raise ValueError("it is another result")
        return content

    def get(cache, key):
        return cache.get(key, make=make, read=read, plain=dict)

    folder = tmp_path / "search"
    first = JsonCache(folder, keep=10)
    assert [get(first, ["a", {"b": 1}])["n"] for _ in range(2)] == [0, 0]
    assert get(JsonCache(folder, keep=10), ["a", {"b": 1}]) == {"n": 0}
    (file,) = folder.iterdir()
    assert file.name == f"{compute_digest(['a', {'b': 1}])}.json"
    assert file.read_text() == '{"n": 0}'
    for damage in ("", "[]", "{", '{"m": 0}'):
        file.write_text(damage)
        assert get(JsonCache(folder, keep=10), ["a", {"b": 1}])["n"] == made[-1]
    assert made == [0, 1, 2, 3, 4]
    alone = JsonCache(None, keep=10)
    assert get(alone, "x") == get(alone, "x") == {"n": 5}
    assert get(JsonCache(None, keep=10), "x") == {"n": 6}


COUNT = """
import sys, time
from pathlib import Path
from cmt_edge.deploy.locks import locked
file = Path(sys.argv[1])
for _ in range(25):
    with locked(file):
        value = int(file.read_text())
        time.sleep(0.0005)
        file.write_text(str(value + 1))
"""


def test_several_processes_exclude_each_other(tmp_path):
    """Although each removes the lock's file when it is done."""
    file = tmp_path / "count"
    file.write_text("0")
    environment = os.environ | {"PYTHONPATH": IMPORT_FOLDER}
    command = [sys.executable, "-c", COUNT, str(file)]
    running = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert file.read_text() == "100"
    assert [path.name for path in tmp_path.iterdir()] == ["count"]


def test_a_lock_is_dropped_with_an_error_and_an_unusable_folder_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "x"):
        raise ZeroDivisionError
    with locked(tmp_path / "x"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError), locked(tmp_path / "file" / "x"):  # noqa: PT011
        pytest.fail("the body must not run")


def test_a_file_system_without_locks_is_no_failure(tmp_path, monkeypatch):
    def refuse(descriptor, wait=True):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks, "lock_descriptor", refuse)
    with locked(tmp_path / "x"):
        pass
    assert list(tmp_path.iterdir()) == []
    assert try_lock(-1)


def test_trying_for_a_held_lock_does_not_wait(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("")
    first, second = (os.open(tmp_path / "x", os.O_RDWR) for _ in range(2))
    try:
        assert try_lock(first)
        assert not try_lock(second)
    finally:
        os.close(first)
    assert try_lock(second)
    os.close(second)
    with pytest.raises(OSError, match="Bad file descriptor"):
        try_lock(second)


def test_names_of_entries_are_those_of_their_content():
    assert compute_digest({"b": [1, None], "a": "x"}) == compute_digest({"a": "x", "b": [1, None]})
    assert len(compute_digest([])) == 64
    assert compute_digest([1]) != compute_digest([2])
