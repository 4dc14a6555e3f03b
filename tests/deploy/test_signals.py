"""A command that is asked to end unwinds, says so in one line, and ends with 128 and the signal's number."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from cmt_edge import startup
from cmt_edge.__main__ import COMMANDS
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.signals import Stopped, complete, get_received, unwound_by_signals
from helpers.paths import ROOT

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
EARLY = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background may ignore it
import builtins
from cmt_edge import startup
ours = builtins.__import__
def slow(name, *rest, **more):
    if name == "numpy":
        print("ready", flush=True)
        import time
        for _ in range(3000): time.sleep(0.01)
    return ours(name, *rest, **more)
builtins.__import__ = slow
sys.argv[1:] = [{name!r}]
sys.exit(startup.edge())
"""
"""Starts a command of ``cmt-edge`` that hangs in an import."""
LATE = """
import argparse, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from cmt_edge import startup
from cmt_edge.deploy.cli.console import run_command
startup.end_at_once_on_signals()
def wait():  # a signal that comes just before a long sleep begins is noticed only after it
    print("ready", flush=True)
    for _ in range(3000): time.sleep(0.01)
def main(args):
    {body}
    return 0
sys.exit(run_command(main, argparse.Namespace(verbose=False)))
"""
"""A command that is at work."""
BODIES = {
    "waits": "wait()",
    "makes another exception of it": """
    try:
        wait()
    except BaseException:
        raise ImportError("numpy is broken")""",
    "loses it in a destructor": """
    class Slow:
        def __del__(self):
            print('ready', flush=True)
            for _ in range(100): time.sleep(0.01)
    Slow()
    for _ in range(3000): time.sleep(0.01)""",
}


def ended(code: str, *numbers: int, argv: tuple[str, ...] = (), **options) -> tuple[int, str]:
    """Exit code and standard error of Python code that gets signals once it has said that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        assert process.stdout.readline() == "ready\n"
        for number in numbers:
            process.send_signal(number)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, error


def test_little_is_imported_before_signals_are_handled():
    """Until then Ctrl-C prints a trace, so that every millisecond counts."""
    code = "import sys; before = {*sys.modules}; import cmt_edge.startup; print(*{*sys.modules} - before)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    )
    assert not {"typing", "contextlib", "re", "enum", "warnings"} & {*done.stdout.split()}


KEPT = """
import atexit, sys
class Kept:
    def __del__(self): print("freed")
kept = Kept()
sys.argv[1:] = ["report", "absent"]
def start():
    {start}
try:
    start()
finally:
    atexit.register(print, "called", end="")  # Python has it in its buffer until the end
"""
"""Runs a command in a process that holds an object."""


@pytest.mark.parametrize(
    "start",
    [
        "from cmt_edge import startup; sys.exit(startup.edge())",
        "import runpy; runpy.run_module('cmt_edge', run_name='__main__', alter_sys=True)",
    ],
    ids=["cmt-edge", "python -m cmt_edge"],
)
def test_a_command_ends_without_freeing_what_it_holds(start):
    """Freeing took a second after an export, and after Ctrl-C. What was registered is still called."""
    done = subprocess.run(
        [sys.executable, "-c", KEPT.format(start=start)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "called")
    assert "no such" in done.stderr


def test_a_process_that_is_no_command_ends_as_always():
    code = KEPT.format(start="from cmt_edge import startup; startup.prepare()")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "calledfreed\n"


def test_a_signal_that_a_library_swallows_ends_the_step():
    """onnxsim goes on where a function of ours that it calls raises."""
    steps = []
    with unwound_by_signals(), pytest.raises(Stopped):  # noqa: PT012
        for name in ("first", "second"):
            with Progress(quiet=True).step(name):
                steps.append(name)
                with suppress(KeyboardInterrupt):
                    os.kill(os.getpid(), signal.SIGTERM)
                    time.sleep(5)
    assert steps == ["first"]


def test_an_earlier_signal_ends_no_step():
    with unwound_by_signals(), pytest.raises(Stopped):  # noqa: PT012, it comes a moment later
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert get_received() == signal.SIGTERM
    with Progress(quiet=True).step("without a handler"):
        pass
    with unwound_by_signals(), Progress(quiet=True).step("of another run"):
        pass


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_while_a_command_is_imported_prints_nothing(name, number):
    assert ended(EARLY.replace("{name!r}", repr(name)), number) == (128 + number, "")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_signal_ends_a_command_with_its_number(body, number):
    code, error = ended(LATE.format(body=body), number)
    assert (code, error) == (128 + number, "interrupted; nothing half-written was left\n")


def test_several_signals_are_one_request(tmp_path):
    """systemd and a closing terminal send two: the second one must not disturb the cleaning up."""
    cleaning = "for _ in range(40): time.sleep(0.01)\n        open('done', 'w').close()"
    body = f"try: wait()\n    finally:\n        {cleaning}"
    code, error = ended(LATE.format(body=body), signal.SIGTERM, signal.SIGHUP, cwd=tmp_path)
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGHUP), error
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("number", NUMBERS)
def test_an_ignored_signal_stays_ignored(number):
    """``nohup cmt-export ...`` goes on."""
    body = f"import os; print('ready', flush=True); os.kill(os.getpid(), {int(number)}); time.sleep(0.1)"
    code = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n" + LATE.replace(
        "signal.signal(signal.SIGINT, signal.default_int_handler)", ""
    ).format(body=body)
    assert ended(code) == (0, "")


def test_handlers_are_put_back_and_an_applications_own_stay():
    before = [signal.getsignal(number) for number in NUMBERS]
    with unwound_by_signals(interrupt=True), unwound_by_signals():
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in NUMBERS] == before
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    try:
        with unwound_by_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert seen == [signal.SIGTERM]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_signal_is_known_afterwards(number):
    with unwound_by_signals(), pytest.raises(Stopped) as stopped:  # noqa: PT012, it comes a moment later
        os.kill(os.getpid(), number)
        time.sleep(0.01)
    assert stopped.value.number == get_received() == number
    with unwound_by_signals():
        assert get_received() is None


def test_off_the_main_thread_nothing_changes():
    before = signal.getsignal(signal.SIGTERM)
    inside = []

    def look() -> None:
        with unwound_by_signals():
            inside.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert inside == [before]


def test_the_start_of_a_command_handles_only_what_nobody_else_does(monkeypatch):
    set_: dict[int, object] = {}
    monkeypatch.setattr(startup.signal, "getsignal", lambda number: signal.SIG_IGN)
    monkeypatch.setattr(startup.signal, "signal", set_.__setitem__)
    startup.end_at_once_on_signals()
    assert set_ == {}


def test_a_call_that_must_be_complete_is_interrupted_at_its_end():
    done: list[str] = []

    def call() -> None:
        with pytest.raises(ValueError, match="main thread"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGTERM)
        while get_received() is None:
            time.sleep(0.001)
        done.append("all of it")

    left = threading.Event()
    left.set()
    with unwound_by_signals(), pytest.raises(Stopped):
        complete(call, left)
    assert done == ["all of it"]


def test_a_complete_call_gives_its_result_or_its_error_and_its_thread_stays():
    left, threads = threading.Event(), []

    def call() -> str:
        threads.append(threading.current_thread())
        return "done"

    assert complete(call, left) == "done"
    assert threads[0].is_alive()
    with pytest.raises(KeyError):
        complete({}.popitem, left)
    left.set()
    threads[0].join()
