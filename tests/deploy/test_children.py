"""Child processes: answers, progress, typed errors, crashes, time limits, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cmt_edge.deploy.children import IMPORT_FOLDER, Child, ChildCrashed, ChildTimedOut
from cmt_edge.deploy.errors import BundleError, StepError, UnknownNameError
from helpers.running import is_running

MODULE = """
import ctypes, os, signal, sys, time
from cmt_edge.deploy.children import serve
from cmt_edge.deploy.errors import BundleError, CmtEdgeError, StepError, UnknownNameError

class Unlisted(CmtEdgeError):
    pass

def echo(request, report):
    print("what libraries print")
    ctypes.CDLL(None).puts(b"from C")
    return {k: v for k, v in request.items() if k != "call"}

def steps(request, report):
    for i in range(3):
        report("count", i / 2)
    return sys.path

def fail(request, report):
    if request["kind"] == "bundle":
        raise BundleError("it is damaged", where="here", why="rain", remedy="dry it")
    if request["kind"] == "name":
        raise UnknownNameError("runtime", "x", ["y"], ["y", "z"])
    if request["kind"] == "unlisted":
        raise Unlisted("odd", remedy="none")
    raise ZeroDivisionError("by zero")

def crash(request, report):
    print("first", file=sys.stderr)
    sys.stderr.flush()
    os.write(2, b"last words \\xff\\n")
    if request["code"] < 0:
        os.kill(os.getpid(), -request["code"])
    os._exit(request["code"])

def sleep(request, report):
    report("asleep", 0.0)
    time.sleep(60)

def unexpected(exc):
    return StepError("it failed", why=f"{type(exc).__name__}: {exc}")

if __name__ == "__main__":
    serve({f.__name__: f for f in (echo, steps, fail, crash, sleep)}, unexpected)
"""


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "served.py").write_text(MODULE)
    return folder


@pytest.fixture
def child(module):
    with Child("served", environment={"PYTHONPATH": str(module)}) as c:
        yield c


def wait_for_end(pid: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} still runs"
        time.sleep(0.02)


def test_answers_come_back_whatever_libraries_print(child):
    assert child.request("echo", text="ä\n€", number=1.5, nothing=None) == {
        "text": "ä\n€",
        "number": 1.5,
        "nothing": None,
    }
    first = child.pid
    assert child.request("echo") == {}
    assert child.pid == first, "one process answers all requests"


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs a system with files in memory")
def test_no_folder_for_temporary_files_is_needed(module, monkeypatch):
    """A container with a read-only root may have none."""
    monkeypatch.setattr("tempfile.TemporaryFile", None)
    with Child("served", environment={"PYTHONPATH": str(module)}) as child:
        assert child.request("echo") == {}


def test_progress(module):
    seen = []
    with Child(
        "served",
        environment={"PYTHONPATH": str(module)},
        progress=lambda phase, share: seen.append((phase, share)),
    ) as child:
        child.request("steps")
    assert seen == [("count", 0.0), ("count", 0.5), ("count", 1.0)]


def test_errors_keep_their_kind_and_words(child):
    with pytest.raises(BundleError) as error:
        child.request("fail", kind="bundle")
    found = error.value
    assert (found.what, found.where, found.why, found.remedy) == ("it is damaged", "here", "rain", "dry it")
    with pytest.raises(UnknownNameError, match="unknown runtime 'x'"):
        child.request("fail", kind="name")
    with pytest.raises(StepError, match="odd"):  # of a kind that the project's list does not have
        child.request("fail", kind="unlisted")
    with pytest.raises(StepError, match="it failed") as other:
        child.request("fail", kind="else")
    assert other.value.why == "ZeroDivisionError: by zero"
    assert child.request("echo") == {}, "an error does not end the process"


@pytest.mark.parametrize(
    ("code", "ending"), [(3, "exit code 3"), (0, "exit code 0"), (-signal.SIGSEGV, "SIGSEGV")]
)
def test_a_crash_quotes_the_last_words_and_the_next_request_works(child, code, ending):
    with pytest.raises(ChildCrashed) as error:
        child.request("crash", code=int(code))
    assert (error.value.code, error.value.ending) == (code, ending)
    assert error.value.tail[0] == "first"
    assert error.value.tail[1].startswith("last words")
    with pytest.raises(ChildCrashed) as second:
        child.request("crash", code=1)
    assert len(second.value.tail) == 2, "words of an earlier process are not quoted again"
    assert child.request("echo", again=True) == {"again": True}


def test_a_process_that_is_gone_before_the_request(child):
    child.request("echo")
    os.kill(child.pid, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(ChildCrashed, match="SIGKILL"):
        child.request("echo", text="x" * 100_000)


def test_a_time_limit_stops_the_process(child):
    child.request("echo")
    pid = child.pid
    start = time.monotonic()
    with pytest.raises(ChildTimedOut):
        child.request("sleep", time_limit=0.3)
    assert time.monotonic() - start < 10
    wait_for_end(pid)
    assert child.request("echo", time_limit=60) == {}


def test_it_is_killed_at_the_end(module):
    with Child("served", environment={"PYTHONPATH": str(module)}) as child:
        child.request("echo")
        pid = child.pid
        assert is_running(pid)
    assert child.pid is None
    wait_for_end(pid)


def test_an_interrupted_request_leaves_no_answer_behind(module):
    def interrupt(phase, share):
        raise KeyboardInterrupt

    with Child("served", environment={"PYTHONPATH": str(module)}, progress=interrupt) as child:
        child.request("echo")
        pid = child.pid
        with pytest.raises(KeyboardInterrupt):
            child.request("sleep")
        wait_for_end(pid)
        assert child.request("echo", n=1) == {"n": 1}


PARENT = """
import os, sys
from cmt_edge.deploy.children import Child
def say(*_):
    print(child.pid, flush=True)
child = Child("served", environment={"PYTHONPATH": sys.argv[1]}, progress=say)
child.request("sleep")
"""


def test_it_ends_with_its_parent_while_it_works(module):
    environment = os.environ | {"PYTHONPATH": IMPORT_FOLDER}
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(module)], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_for_end(pid)


def test_the_working_directory_hides_nothing(module, tmp_path, monkeypatch):
    for name in ("cmt_edge", "served", "runpy", "typing", "json", "queue", "deploy"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('taken from the working directory')")
    monkeypatch.chdir(tmp_path)
    with Child("served", environment={"PYTHONPATH": str(module)}) as child:
        path = child.request("steps")
    assert "" not in path
    assert str(tmp_path) not in path


def test_its_package_is_the_parents(module, tmp_path):
    """Also where another one comes first on the import path."""
    (tmp_path / "cmt_edge").mkdir()
    (tmp_path / "cmt_edge" / "__init__.py").write_text("raise ImportError('another cmt_edge')")
    both = os.pathsep.join([str(tmp_path), str(module)])
    with Child("served", environment={"PYTHONPATH": both}) as child:
        assert child.request("echo") == {}
