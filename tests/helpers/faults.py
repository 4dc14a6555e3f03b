"""Faults of the operating system in real commands: builds and steers the library of ``faults.c``."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
"""The library, in C."""

KINDS = {
    "write": 1,
    "fsync": 2,
    "rename": 4,
    "mkdir": 8,
    "open": 16,
    "remove": 32,
    "read": 64,
}
"""Name of a kind of calls -> its number in ``faults.c``."""

ERRORS = {
    "ENOSPC": errno.ENOSPC,
    "EIO": errno.EIO,
    "EACCES": errno.EACCES,
    "SIGKILL": -signal.SIGKILL,
}
"""Name of a fault -> what ``faults.c`` takes for it: an error number, or minus the number of a signal."""

LAYOUT = struct.Struct("7q")
"""``struct state`` of ``faults.c``: kinds, target, error, lasting, count, fired, network."""


@dataclass(frozen=True)
class Fault:
    """The ``number``-th call of ``kind`` fails with ``error``; if ``lasting``, all later ones fail too."""

    kind: str
    number: int
    error: str
    lasting: bool = False

    def __str__(self) -> str:
        return f"{self.kind} {self.number} {self.error}{' and later ones' if self.lasting else ''}"


def compiler() -> str | None:
    """The C compiler of this machine; the library works on Linux only."""
    return shutil.which("gcc") if os.uname().sysname == "Linux" else None


@cache
def library() -> Path:
    """The built library."""
    target = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    command = [compiler() or "gcc", "-shared", "-fPIC", "-O1", "-o", str(target), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True)
    return target


class Faults:
    """Counts the calls of processes on files below ``roots``, makes one of them fail, and keeps the processes
    from the network.

    Args:
        folder: where the counters and the log lie.
        roots: folders whose files are watched.
    """

    def __init__(self, folder: Path, *roots: Path) -> None:
        self.state = folder / "faults.state"
        self.log = folder / "faults.log"
        self.state.write_bytes(bytes(LAYOUT.size))
        self.roots = roots
        with open(self.state, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), LAYOUT.size)

    @property
    def environment(self) -> dict[str, str]:
        """The variables that a process needs so that it is watched; its children are watched too."""
        return {
            "LD_PRELOAD": str(library()),
            "FAULTS_STATE": str(self.state),
            "FAULTS_LOG": str(self.log),
            "FAULTS_ROOTS": ":".join(map(str, self.roots)),
        }

    def arm(self, fault: Fault | None, kinds: tuple[str, ...] = tuple(KINDS)) -> None:
        """Count from 0 again; ``kinds`` are counted where there is no fault."""
        self.log.unlink(missing_ok=True)
        numbers = (sum(KINDS[kind] for kind in kinds), 0, 0, 0)
        if fault is not None:
            numbers = (KINDS[fault.kind], fault.number, ERRORS[fault.error], int(fault.lasting))
        self._memory[:] = LAYOUT.pack(*numbers, 0, 0, 0)

    @property
    def count(self) -> int:
        """Calls that were counted."""
        return int(LAYOUT.unpack(self._memory)[4])

    @property
    def fired(self) -> int:
        """Calls that failed."""
        return int(LAYOUT.unpack(self._memory)[5])

    @property
    def network(self) -> int:
        """Attempts to reach the network."""
        return int(LAYOUT.unpack(self._memory)[6])

    @property
    def lines(self) -> list[str]:
        """The counted calls and the attempts to reach the network, in order: name of the call, and path."""
        return self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
