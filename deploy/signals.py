"""Signals that unwind the program as Ctrl-C does, so that cleaning up happens, and what it then ends with."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from cmt_edge.startup import end_at_once

STOPPED_BY = ("SIGTERM", "SIGHUP")
"""Names of the signals that ask the process to end; a system may lack some."""

REPEATED_AFTER_S = 0.02
"""Seconds after which an interrupt is repeated that came where Python can raise nothing."""

TOGETHER_S = 1.0
"""Seconds after the first signal in which a different one counts as a part of the same request: systems send
SIGTERM and SIGHUP together."""

WAIT_S = 0.2
"""Seconds between two looks for a signal: the system may tell another thread of it, which wakes nobody."""

Result = TypeVar("Result")
"""The type of what a call returns."""

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


def raise_swallowed() -> None:
    """Raise :class:`Stopped` for a signal that has come in the body of :func:`unwound_by_signals` and ended
    nothing: a library that calls a function of ours may go on where this one was interrupted."""
    number = get_received()
    is_main = threading.current_thread() is threading.main_thread()
    if number is not None and is_main and _is_unwinding(interrupt=True):
        raise Stopped(number)


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
    outermost = not _is_unwinding(interrupt)
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


def complete(call: Callable[[], Result], left: threading.Event) -> Result:
    """The result of ``call``, which no signal interrupts halfway: the first one is raised at its end, a
    second one at once.

    The call runs in a thread of its own, so that it cannot replace what happens at a signal either: a library
    that is started may take SIGTERM for itself, and end the process when its own start is interrupted. What
    it has taken below Python is taken back: Ray's own code ends a process by SIGABRT three seconds after a
    SIGTERM. The thread stays until ``left`` is set, because Linux can end processes with the thread that
    started them.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    results: list[Result] = []
    errors: list[BaseException] = []
    ended = threading.Event()

    def work() -> None:
        try:
            results.append(call())
        except BaseException as exc:
            errors.append(exc)
        finally:
            ended.set()
            left.wait()

    interrupts: list[BaseException] = []
    is_timed = _is_alarm_set()
    try:
        threading.Thread(target=work, daemon=True).start()
        _await(ended)
    except RuntimeError:  # the system starts no more threads
        raise
    except BaseException as exc:
        interrupts.append(exc)
        _await(ended)
    finally:
        _take_back(is_timed)
    for error in (*interrupts, *errors):
        raise error
    return results[0]


def _is_alarm_set() -> bool:
    """Whether SIGALRM will come."""
    return hasattr(signal, "getitimer") and signal.getitimer(signal.ITIMER_REAL)[0] > 0


def _take_back(is_timed: bool) -> None:
    """Let Python handle the signals again that ask to end, and stop an alarm, unless there was one before
    (``is_timed``)."""
    for number in _list_numbers(interrupt=True):
        handler = signal.getsignal(number)
        if handler is not None:  # else it was set before Python began
            signal.signal(number, handler)
    if not is_timed and _is_alarm_set():
        signal.setitimer(signal.ITIMER_REAL, 0)


def _await(ended: threading.Event) -> None:
    """Wait for an event, with an eye for signals."""
    while not ended.wait(WAIT_S):
        pass


def _list_numbers(interrupt: bool) -> list[int]:
    """The signals that are handled, by number."""
    names = (*STOPPED_BY, "SIGINT") if interrupt else STOPPED_BY
    return [int(getattr(signal, name)) for name in names if hasattr(signal, name)]


def _is_unwinding(interrupt: bool) -> bool:
    """Whether a :func:`unwound_by_signals` handles signals now."""
    return any(signal.getsignal(number) is _raise for number in _list_numbers(interrupt))


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
