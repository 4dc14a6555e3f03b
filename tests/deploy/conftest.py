"""What several tests of a device share: commands, and threads that must end."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from pathlib import Path

import pytest

from cmt_edge.deploy import cache as cache_module
from cmt_edge.deploy.measure.timing import Protocol
from helpers.cli import assert_told
from helpers.collections import archive, fill
from helpers.nvml import FakeNvml
from helpers.running import list_helper_threads

ENDING_S = 5.0
"""Seconds that a thread which was told to end may take for it, on a machine with other work."""


@pytest.fixture
def call(capsys):
    """Runs a command; its exit code, standard output and standard error."""

    def run(command, *argv):
        try:
            code = command([str(a) for a in argv])
        except SystemExit as exc:
            code = exc.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def fails(call):
    """Runs a command that must fail with ``code`` and returns its one message; with ``--json`` standard
    output has the same as an object."""

    def run(code, command, *argv):
        got, out, err = call(command, *argv)
        assert got == code, err
        assert_told(out, err, code, is_json="--json" in argv)
        assert err.startswith("error: ")
        assert err.count("error:") == 1
        assert "Traceback" not in err
        assert "remedy: " in err
        return err

    return run


@pytest.fixture(scope="module")
def quick_collections():
    """Objects from before the module are left out where garbage is collected, from now on: with PyTorch in
    memory, one collection takes half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_thread_is_left(quick_collections):
    """The test ends every thread that it started; an abandoned stream may do so when it is collected."""
    yield
    gc.collect()
    end = time.monotonic() + ENDING_S
    while list_helper_threads() and time.monotonic() < end:  # one that is just starting cannot be joined
        time.sleep(0.01)
    assert not list_helper_threads()


@pytest.fixture
def no_torch(monkeypatch):
    """PyTorch looks as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )


@pytest.fixture
def quick_builds(monkeypatch):
    """How long ``cmt-build`` measures is not what the test is about."""
    from cmt_edge.deploy.cli import build as command
    from cmt_edge.deploy.tensorrt import build

    monkeypatch.setattr(command, "read_protocol", lambda *_: Protocol(5, 0.0, 1, 0.0))
    monkeypatch.setattr(build, "POWER_SECONDS", 0.05)


@pytest.fixture(params=["folder", "tar", "tar with ./"])
def place(request, tmp_path):
    """Builds a collection of ``files`` in each of its forms."""

    def build(files: dict[str, bytes]) -> Path:
        if request.param == "folder":
            return fill(tmp_path / "images", files)
        return archive(tmp_path / "images.tar", files, "./" if "./" in request.param else "")

    return build


@pytest.fixture
def nvml(monkeypatch):
    """Puts a fake in the place of ``pynvml``; at the end, everything opened is closed."""
    made = []

    def install(**settings):
        made.append(FakeNvml(**settings))
        monkeypatch.setitem(sys.modules, "pynvml", made[-1])
        return made[-1]

    yield install
    assert all(m.opened == 0 for m in made)


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    """Every test has an empty cache and a secret of its own."""
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "state"))
    monkeypatch.setattr(cache_module, "_reported", set())
