"""Child processes and how they are spoken to: one protocol for measuring and for building engines.

A runtime may crash, leak or read its settings only once, so some work is done in a process of its own. The
parent writes requests to the child's standard input, one JSON object a line, and reads answers from its
standard output:

* ``{"phase": ..., "share": ...}`` while the child works,
* ``{"done": ...}`` with the result at last, or
* ``{"failed": ..., "kind": ..., ...}``, which the parent raises as the typed error that it was in the child.

A child ends with its parent: it watches its standard input, which the parent holds open. It starts with the
parent's ``cmt_edge`` and imports nothing from the working directory, where a user may have files such as
``calib.py`` or ``tensorrt.py``.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from . import errors
from .errors import CmtEdgeError, StepError

Report = Callable[[str, float], None]
"""Takes the name of a phase, and its share done, 0 to 1."""

Request = Mapping[str, Any]
"""What a call is given: anything that JSON holds."""

TAIL_LINES = 3
"""Number of lines of the child's standard error that a crash message quotes."""
TAIL_CHARACTERS = 2000
"""Number of characters of standard error among which these lines are looked for."""
SCRATCH = "cmt-edge-errors"
"""What the system's lists of open files call a child's standard error."""
IMPORT_FOLDER = str(Path(__file__).absolute().parents[2])
"""The folder that holds ``cmt_edge``. It is not resolved: in a checkout the path leads through a link."""
START_CODE = """\
import sys
sys.path[:] = [folder for folder in sys.path if folder]
import importlib, runpy, typing
source, module = sys.argv[1:]
sys.path.insert(0, source)
import cmt_edge
sys.path.remove(source)
del sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
"""What the child runs first: it takes the working directory (an empty entry) off its import path, which
``PYTHONSAFEPATH`` does only from Python 3.11 on, and imports the parent's ``cmt_edge`` before any other. The
modules that both need are imported before ``source`` is on the path, which may be ``site-packages``."""


class ChildCrashed(Exception):
    """The child ended without an answer.

    Attributes:
        code: its exit code; minus the number of the signal that ended it.
        tail: the last lines of its standard error.
    """

    def __init__(self, code: int, tail: list[str]) -> None:
        self.code = code
        self.tail = tail
        super().__init__(f"{self.ending}: {'; '.join(tail)}")

    @property
    def ending(self) -> str:
        """How it ended, for a message: ``"exit code 1"`` or ``"SIGSEGV"``."""
        if self.code >= 0:
            return f"exit code {self.code}"
        try:
            return signal.Signals(-self.code).name
        except ValueError:
            return f"signal {-self.code}"


class ChildTimedOut(Exception):
    """The child did not answer in time and was stopped."""


# --- in the parent --------------------------------------------------------------------------------


def _open_scratch() -> TextIO:
    """A file without a name, for the child's standard error. It lies in memory where the system can do that,
    since a container may have no folder for temporary files."""
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create(SCRATCH), "w+", encoding="utf-8", errors="replace")
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")


class Child:
    """A child process that answers requests; a context manager that kills it at the end.

    It is started by the first request, and again by the first one after a crash.

    Args:
        module: the module to run, which calls :func:`serve`.
        environment: variables that differ from this process's.
        progress: called while a request is at work.
    """

    def __init__(
        self,
        module: str,
        *,
        environment: Mapping[str, str] | None = None,
        progress: Report | None = None,
    ) -> None:
        self.module = module
        self.environment = dict(environment or {})
        self._progress = progress or (lambda phase, share: None)
        self._process: subprocess.Popen[str] | None = None
        self._errors = _open_scratch()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._errors.close()

    @property
    def pid(self) -> int | None:
        """The process's number, ``None`` while there is no process."""
        return self._process.pid if self._process else None

    def request(
        self,
        call: str,
        *,
        time_limit: float | None = None,
        **arguments: Any,
    ) -> Any:
        """The answer to one request.

        Args:
            call: its name in the table that the child serves.
            time_limit: seconds after which the child is stopped.
            arguments: anything that JSON holds.

        Raises:
            CmtEdgeError: of the kind and with the words that the child raised.
            ChildCrashed: the child ended without an answer.
            ChildTimedOut: the child was stopped after ``time_limit``.
        """
        process = self._process = self._process or self._start()
        try:
            with self._stopped_after(time_limit) as expired:
                _send(process, {"call": call, **arguments})
                answer = self._read_answer(process)
        except BaseException:  # interrupted: its answer would be taken for that of the next request
            self.kill()
            raise
        if answer is None:
            crash = self._make_crash()
            if expired.is_set():
                raise ChildTimedOut
            raise crash
        if "done" in answer:
            return answer["done"]
        raise read_error(answer)

    def kill(self) -> None:
        """End the process, and what it started."""
        process, self._process = self._process, None
        if process is None:
            return
        _kill(process)
        process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        self._errors.seek(0)
        self._errors.truncate()
        return subprocess.Popen(
            [sys.executable, "-c", START_CODE, IMPORT_FOLDER, self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            encoding="utf-8",
            env=os.environ | {"PYTHONSAFEPATH": "1"} | self.environment,
            start_new_session=True,
        )

    @contextmanager
    def _stopped_after(self, seconds: float | None) -> Iterator[threading.Event]:
        """Stop the process after ``seconds``; the event is set once that has happened."""
        expired = threading.Event()
        process = self._process
        if seconds is None or process is None:
            yield expired
            return

        def expire() -> None:
            expired.set()
            _kill(process)

        timer = threading.Timer(seconds, expire)
        timer.daemon = True  # Ctrl-C while it starts must not keep the process until the time is up
        try:
            timer.start()
            yield expired
        finally:
            timer.cancel()

    def _read_answer(self, process: subprocess.Popen[str]) -> dict[str, Any] | None:
        """The next answer that is no progress, ``None`` where the process ended instead."""
        assert process.stdout is not None
        for line in process.stdout:
            answer: dict[str, Any] = json.loads(line)
            if "share" not in answer:
                return answer
            self._progress(answer["phase"], answer["share"])
        return None

    def _make_crash(self) -> ChildCrashed:
        """What the ended process left; the next request starts another."""
        process = self._process
        assert process is not None
        process.communicate()
        self._process = None
        self._errors.seek(0)
        text = self._errors.read()[-TAIL_CHARACTERS:]
        lines = text.strip().splitlines()
        return ChildCrashed(process.returncode, lines[-TAIL_LINES:])


def _send(
    process: subprocess.Popen[str],
    message: dict[str, Any],
) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # reading the answer finds out that it ended
        print(json.dumps(message), file=process.stdin, flush=True)


def _kill(process: subprocess.Popen[str]) -> None:
    """End a process and those it started, which share its group."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)


def read_error(answer: Mapping[str, Any]) -> CmtEdgeError:
    """The error of an answer, of the same kind as in the child where the project's list has it."""
    kind = getattr(errors, answer["kind"], StepError)
    error: CmtEdgeError = CmtEdgeError.__new__(kind)
    CmtEdgeError.__init__(
        error,
        answer["failed"],
        where=answer["where"],
        why=answer["why"],
        remedy=answer["remedy"],
    )
    return error


# --- in the child ---------------------------------------------------------------------------------


def serve(
    calls: Mapping[str, Callable[[Request, Report], Any]],
    unexpected: Callable[[Exception], CmtEdgeError],
) -> None:
    """Answer requests until the parent closes the pipe or ends.

    Args:
        calls: name -> function of the request and of a report of progress.
        unexpected: makes a typed error of an exception that is none of ours.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand among the answers

    def say(**answer: Any) -> None:
        try:
            print(json.dumps(answer), file=channel, flush=True)
        except BrokenPipeError:  # the parent is gone
            os._exit(1)

    def report(phase: str, share: float) -> None:
        say(phase=phase, share=round(share, 3))

    for request in _iterate_requests():
        try:
            say(done=calls[request["call"]](request, report))
        except CmtEdgeError as exc:
            say(**describe_error(exc))
        except Exception as exc:
            say(**describe_error(unexpected(exc)))


def _iterate_requests() -> Iterator[dict[str, Any]]:
    """The parent's requests. A thread reads them, so that the process ends with its parent while it works."""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def read() -> None:
        with os.fdopen(0, "rb", closefd=False) as pipe:  # not sys.stdin, whose lock would be in the way
            for line in pipe:
                lines.put(line)
        os._exit(1)

    threading.Thread(target=read, name="requests", daemon=True).start()
    while True:
        yield json.loads(lines.get())


def describe_error(error: CmtEdgeError) -> dict[str, Any]:
    """An error as JSON, which :func:`read_error` reads."""
    return {
        "failed": error.what,
        "where": error.where,
        "why": error.why,
        "remedy": error.remedy,
        "kind": type(error).__name__,
    }
