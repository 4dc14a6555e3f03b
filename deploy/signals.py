"""Signals that unwind the program as Ctrl-C does."""

from __future__ import annotations

import signal
from typing import Any


def terminate_as_interrupt(number: int = signal.SIGTERM) -> Any:
    """Let a signal unwind like Ctrl-C, so that cleaning up happens; the previous handler, or ``None`` off the
    main thread."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(number, interrupt)
    except ValueError:
        return None
