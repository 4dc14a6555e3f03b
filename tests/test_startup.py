"""The sign that a command has started, on a terminal and only there."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cmt_edge import startup

REMOVED = startup.SIGN + b"\r" + b" " * len(startup.SIGN) + b"\r"
"""What a terminal gets of a sign that was shown and removed."""


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Where what standard error gets can be read; it is taken for a terminal."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    monkeypatch.setattr(startup, "STANDARD_ERROR", writing)
    monkeypatch.setattr(startup, "began_s", [0.0])
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == writing)
    yield reading
    os.close(reading)
    os.close(writing)


def read(reading: int) -> bytes:
    try:
        return os.read(reading, 1 << 10)
    except BlockingIOError:
        return b""


def test_a_sign_is_shown_and_removed_once(shown):
    startup.show_sign(["export", "--model", "cmt_nano"])
    startup.remove_sign()
    startup.remove_sign()
    assert read(shown) == REMOVED


@pytest.mark.parametrize("word", ["-q", "--quiet"])
def test_who_wants_no_progress_gets_no_sign(shown, word):
    startup.show_sign(["export", word])
    startup.remove_sign()
    assert read(shown) == b""


def test_an_interrupted_start_leaves_an_empty_line(shown, monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    startup.show_sign(["export"])
    startup.end_at_once(2, None)
    assert (read(shown), ended) == (REMOVED, [130])


def test_a_library_that_is_no_command_shows_nothing(shown, monkeypatch):
    monkeypatch.setattr(startup, "began_s", [])
    startup.show_sign(["export"])
    assert read(shown) == b""


def test_what_is_no_terminal_gets_no_sign(shown, monkeypatch):
    monkeypatch.setattr(os, "isatty", lambda _: False)
    startup.show_sign(["export"])
    startup.remove_sign()
    assert read(shown) == b""
