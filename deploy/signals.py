"""Signals that unwind the program as Ctrl-C does, so that cleaning up happens, and what it then ends with."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cmt_edge.startup import end_at_once

STOPPED_BY = ("SIGTERM", "SIGHUP")
"""Names of the signals that ask the process to end; a system may lack some."""

REPEATED_AFTER_S = 0.02
"""Seconds after which an interrupt is repeated that came where Python can raise nothing."""

TOGETHER_S = 1.0
"""Seconds after the first signal in which a different one counts as a part of the same request: systems send
SIGTERM and SIGHUP together."""

_received: list[tuple[int, float]] = []
"""Number and time in seconds of the signals since the outermost :func:`unwound_by_signals` began."""


class Stopped(KeyboardInterrupt):
    """The process was asked to end; ``number`` is that of the signal."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(f"stopped by {signal.Signals(number).name}")


def get_received() -> int | None:
    """The first signal that has come since the outermost :func:`unwound_by_signals` began, if any has.

    What was interrupted may have made another exception of it: an import of a C extension does.
    """
    return _received[0][0] if _received else None


def compute_exit_code(number: int) -> int:
    """The exit code of a process that a signal ended."""
    return 128 + number


@contextmanager
def unwound_by_signals(*, interrupt: bool = False) -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise :class:`Stopped` in the body; also SIGINT, if ``interrupt``.

    A signal that the process ignores stays ignored (``nohup``), and a handler of the application's own stays
    in place. Off the main thread nothing changes, because Python handles signals only there. A different
    signal that comes just after the first does nothing, so that cleaning up is not disturbed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    replaced: dict[int, Any] = {}
    outermost = not any(signal.getsignal(number) is _raise for number in _list_numbers(interrupt))
    hook = sys.unraisablehook
    try:
        for number in _list_numbers(interrupt):
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler, end_at_once):
                replaced[number] = signal.signal(number, _raise)
        if outermost:
            _received.clear()
            sys.unraisablehook = _make_repeating_hook(hook)
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
        if outermost:
            sys.unraisablehook = hook


def _list_numbers(interrupt: bool) -> list[int]:
    """The signals that are handled, by number."""
    names = (*STOPPED_BY, "SIGINT") if interrupt else STOPPED_BY
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def _raise(number: int, frame: object) -> None:
    _received.append((number, time.monotonic()))
    first, start = _received[0]
    if number == first or _received[-1][1] - start > TOGETHER_S:
        raise Stopped(number)


def _make_repeating_hook(others: Any) -> Any:
    """A hook for exceptions that Python cannot raise, as in a destructor: an interrupt is not lost there but
    comes again a moment later; ``others`` sees the rest."""

    def hook(found: Any) -> None:
        if not issubclass(found.exc_type, Stopped):
            others(found)
            return
        again = threading.Timer(
            REPEATED_AFTER_S,
            os.kill,
            (os.getpid(), found.exc_value.number),
        )
        again.daemon = True
        again.start()

    return hook
