"""A session in a process of its own, possibly of another environment, that takes turns with sessions here.

The input lies in a file that both processes map. One byte asks for an inference, and the logits come back
through a pipe; the way there and back takes about 0.03 ms, which is part of the row's latency.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cmt_edge.deploy.backends import Binding, ExecutedPrecision, Session

ASK, TELL, KERNELS, READY = b"r", b"x", b"k", b"!"
"""What asks for an inference, for the precisions and for the kernels that ran; and what says that the session
is open."""

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
        self._batch[:] = batch
        return ExecutedPrecision(**json.loads(self._send(TELL)))

    def kernels(self, batch: np.ndarray) -> dict[str, float]:
        self._batch[:] = batch
        found: dict[str, float] = json.loads(self._send(KERNELS))
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self) -> list[np.ndarray]:
        return [np.frombuffer(self._send(ASK), np.float32).reshape(len(self._batch), -1)]

    def _send(self, command: bytes) -> bytes:
        """The answer to a command of one byte."""
        assert self._process.stdin is not None
        self._process.stdin.write(command)
        self._process.stdin.flush()
        (size,) = LENGTH.unpack(self._read(LENGTH.size))
        return self._read(size)

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
        while command := sys.stdin.buffer.read(len(ASK)):
            answer = ANSWERS[command](session, batch)
            answers.write(LENGTH.pack(len(answer)) + answer)
            answers.flush()


def _infer(session: Session, batch: np.ndarray) -> bytes:
    """The first output of an inference, float32."""
    return np.ascontiguousarray(session.run(batch)[0], np.float32).tobytes()


def _tell(session: Session, batch: np.ndarray) -> bytes:
    """Which precisions ran, as JSON."""
    return json.dumps(asdict(session.executed(np.array(batch)))).encode()


def _name_kernels(session: Session, batch: np.ndarray) -> bytes:
    """The share of the time by kernel, as JSON."""
    return json.dumps(session.kernels(np.array(batch))).encode()


ANSWERS = {ASK: _infer, TELL: _tell, KERNELS: _name_kernels}
"""What answers each command."""
