"""Commands of cmt-edge on hostile input: each in a process with limits on time and memory.

As a script it is the server: it has imported the runtimes once, and runs each command in a fork of its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

MEBIBYTE = 1 << 20
MEMORY = 768
"""MiB of address space that a command may take beyond what the imports have taken."""
SECONDS = 20
"""Seconds of CPU that a command may take."""
TRACE = "Traceback (most recent call last)"


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: exit code, or minus the number of the signal that ended it.
        stdout, stderr: what it printed.
        seconds: how long it took.
    """

    code: int
    stdout: str
    stderr: str
    seconds: float

    @property
    def complaint(self) -> str:
        """What the promises forbid, empty if nothing happened that they do."""
        if self.code not in {0, 1, 2, 3} or TRACE in self.stderr:
            return f"ended with {self.code}: {self.stderr[-2000:]}"
        return ""


class Limited:
    """The server, as a context manager: call it with the arguments of ``python -m cmt_edge``."""

    def __init__(self, folder: Path) -> None:
        """``folder`` receives what the commands print."""
        self._files = str(folder / "stdout"), str(folder / "stderr")
        command = [sys.executable, __file__]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def __call__(self, *argv: object, memory: int = MEMORY, seconds: int = SECONDS) -> Outcome:
        """Run one command."""
        server = self._server
        assert server.stdin is not None
        assert server.stdout is not None
        start = time.monotonic()
        request = {
            "argv": [str(word) for word in argv],
            "files": self._files,
            "memory": memory,
            "seconds": seconds,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        stdout, stderr = (Path(file).read_text(errors="replace") for file in self._files)
        return Outcome(code, stdout, stderr, time.monotonic() - start)

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def _serve() -> None:
    """Answer requests, one a line."""
    from importlib import import_module

    for name in ("numpy", "PIL.Image", "openvino", "onnxruntime", "cmt_edge.deploy.cli.predict"):
        try:
            import_module(name)
        except ImportError:  # then its commands say so
            continue
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _run(**request)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(argv: list[str], files: list[str], memory: int, seconds: int) -> None:
    """Run one command in this process, and end it."""
    from cmt_edge.__main__ import main

    code = 99
    try:
        for number, path in zip((1, 2), files, strict=True):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        space = used + memory * MEBIBYTE
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        code = main(argv)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
