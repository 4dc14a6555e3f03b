"""Commands of cmt-edge on hostile input: each in a process with limits on time and memory.

As a program it is the process that runs them: it has imported the runtimes once, and runs each command in a
fork of its own.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

from .forks import ForkServer, run_command, serve

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
    """The process, as a context manager: call it with the arguments of ``python -m cmt_edge``."""

    def __init__(self, folder: Path) -> None:
        """``folder`` receives what the commands print."""
        self._files = {name: str(folder / name) for name in ("stdout", "stderr")}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
        self._server = ForkServer("helpers.limited", environment=environment)

    def __call__(self, *argv: object, memory: int = MEMORY, seconds: int = SECONDS) -> Outcome:
        """Run one command."""
        start = time.monotonic()
        words = [str(word) for word in argv]
        code = self._server({"argv": words, **self._files, "memory": memory, "seconds": seconds})
        took = time.monotonic() - start
        printed = {name: Path(file).read_text(errors="replace") for name, file in self._files.items()}
        return Outcome(code, seconds=took, **printed)

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.__exit__(*exc)


def _serve() -> None:
    """Answer requests, one a line."""
    from importlib import import_module

    for name in ("numpy", "PIL.Image", "openvino", "onnxruntime", "cmt_edge.deploy.cli.predict"):
        try:
            import_module(name)
        except ImportError:  # then its commands say so
            continue
    serve(_run)


def _run(argv: list[str], stdout: str, stderr: str, memory: int, seconds: int) -> None:
    """Run one command in this process, and end it."""

    def limit() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        space = used + memory * MEBIBYTE
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))

    run_command(argv, stdout, stderr, limit)


if __name__ == "__main__":
    _serve()
