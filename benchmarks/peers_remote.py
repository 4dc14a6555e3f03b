"""A session in a process of its own, possibly of another environment, that takes turns with sessions here.

The input lies in a file that both processes map. One byte asks for an inference, and the logits come back
through a pipe; the way there and back takes about 0.03 ms, which is part of the row's latency.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cmt_edge.deploy.backends import Binding, ExecutedPrecision, Session

ASK, READY = b"r", b"!"
"""What asks for an inference, and what says that the session is open."""

LENGTH = struct.Struct("<I")
"""How the number of bytes of an answer is written before it."""


class RemoteSession(Session):
    """The parent's end: for one thread, and for batches of one shape."""

    device = "CPU"

    def __init__(
        self,
        command: Sequence[str],
        variables: dict[str, str],
        shared: Path,
        shape: tuple[int, ...],
        log: Path,
    ) -> None:
        """Start ``command``, which calls :func:`serve` with the same file and shape.

        Raises ``RuntimeError`` if it ends before its session is open.
        """
        self.runtime = "another process"
        self._batch = np.memmap(shared, np.float32, "w+", shape=shape)
        self._log = log
        with open(log, "wb") as stream:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, env=variables
            )
        self._read(len(READY))

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        self._batch[:] = batch
        return self._ask()

    def bind(self, shape: tuple[int, ...]) -> Binding:
        return Binding(self._batch, self._ask)

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        """Nothing: other tools do not say in which precision they compute."""
        return ExecutedPrecision({}, {}, source="not told")

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self) -> list[np.ndarray]:
        assert self._process.stdin is not None
        self._process.stdin.write(ASK)
        self._process.stdin.flush()
        (size,) = LENGTH.unpack(self._read(LENGTH.size))
        return [np.frombuffer(self._read(size), np.float32).reshape(len(self._batch), -1)]

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            self.close()
            raise RuntimeError(f"the process of the session ended; {self._log} says why")
        return data


def serve(open_session: Callable[[], Session], shared: Path, shape: tuple[int, ...]) -> None:
    """The child's end: open the session and answer until standard input ends.

    What tools print goes to standard error, so that it does not get among the answers.
    """
    with os.fdopen(os.dup(sys.stdout.fileno()), "wb") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        session = open_session()
        batch = np.memmap(shared, np.float32, "r+", shape=shape)
        answers.write(READY)
        answers.flush()
        while sys.stdin.buffer.read(len(ASK)) == ASK:
            logits = np.ascontiguousarray(session.run(batch)[0], np.float32).tobytes()
            answers.write(LENGTH.pack(len(logits)) + logits)
            answers.flush()
