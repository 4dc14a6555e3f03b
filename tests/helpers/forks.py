"""Commands of cmt-edge in forks of one process that has imported everything: seconds less for each.

A test starts such a process by :class:`ForkServer`; :func:`serve` and :func:`run_command` are its other side.
The process reads JSON objects from standard input, one a line. It answers each with the exit code of the fork
that ran it, or minus the number of the signal that ended the fork.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .paths import ROOT

READY = "ready\n"
"""The line that the process prints when it has imported everything."""

UNKNOWN = 99
"""The exit code of a fork that ended by an exception which the command did not catch."""


class ForkServer:
    """The process, as seen by a test; a context manager."""

    def __init__(self, module: str, *arguments: str, environment: dict[str, str]) -> None:
        """Start ``module``, a module of the helpers, with ``arguments``; waits until it is ready."""
        places = [str(ROOT / "tests"), *filter(None, [environment.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment | {"PYTHONPATH": os.pathsep.join(places)},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._questions, self._answers = self._process.stdin, self._process.stdout
        line = self._answers.readline()
        assert line == READY, line

    def __call__(self, request: dict[str, Any]) -> int:
        """Have one request run; its exit code, or minus the number of the signal that ended it."""
        print(json.dumps(request), file=self._questions, flush=True)
        return int(self._answers.readline())

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._questions.close()
        self._process.wait()
        self._answers.close()


def serve(run: Callable[..., None]) -> None:
    """Call ``run`` in a fork for each request, with its entries as arguments; ``run`` must not return."""
    print(READY, end="", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            run(**request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def run_command(
    argv: Sequence[str],
    stdout: str,
    stderr: str,
    prepare: Callable[[], None] = lambda: None,
) -> NoReturn:
    """Run ``python -m cmt_edge`` with ``argv`` in this process, and end the process with its exit code.

    Args:
        argv: the words of the command.
        stdout, stderr: paths of the files that receive what it prints.
        prepare: is called before the command, when its output already goes to the files.
    """
    from cmt_edge.__main__ import main

    code = UNKNOWN
    try:
        for number, path in ((1, stdout), (2, stderr)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        prepare()
        code = main(list(argv))
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
