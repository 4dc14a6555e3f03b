"""What still runs, threads of this process and other processes, and waiting for something to happen."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path


def list_helper_threads() -> list[threading.Thread]:
    """The threads that decode images or run a session.

    One whose start was interrupted at a certain point never begins, but stays in Python's list for good.
    """
    names = ("decode", "infer")
    return [t for t in threading.enumerate() if t.ident is not None and t.name.startswith(names)]


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended; one that nobody has waited for yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return once ``condition`` holds; fail where it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)
