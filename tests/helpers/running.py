"""What still runs: threads of this process, and other processes."""

from __future__ import annotations

import threading
from pathlib import Path


def list_helper_threads() -> list[threading.Thread]:
    """The threads that decode images or run a session."""
    return [t for t in threading.enumerate() if t.name.startswith(("decode", "infer"))]


def is_running(pid: int) -> bool:
    """Whether a process exists and has not ended; one that nobody has waited for yet has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
