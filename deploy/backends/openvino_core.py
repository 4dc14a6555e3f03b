"""The one connection of a process to OpenVINO."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from functools import cache

import openvino as ov

CPU = "CPU"
"""The device of the CPU plugin."""
_processes: set[int] = set()
"""Numbers of the processes that have opened a Core: this one, and those that it was forked from."""


def open_core() -> ov.Core:
    """The process's :class:`openvino.Core`, which is never destroyed.

    OpenVINO's CPU plugin gives the thread that first compiles a stack for signal handlers, and takes it away
    with the Core. Where two Cores end in the order in which they began, the second one puts the first one's
    stack back, whose memory is free by then: the next signal, such as Ctrl-C, ends the process with a
    segmentation fault (OpenVINO 2026.4).
    """
    return _open(ov.Core, os.getpid())


@cache
def _open(kind: Callable[[], ov.Core], process: int) -> ov.Core:
    """By what makes it, so that tests can put something else in its place; and by the process, because the
    threads of a Core do not come along into a forked child."""
    _processes.add(process)
    return kind()


def _end_idle_threads() -> None:
    """Before the process is forked: end the threads of models that are closed.

    OpenVINO keeps them for the next model. In a child, where they do not run, that model would wait for them
    for ever (OpenVINO 2026.4). The end of any Core's CPU plugin ends those that nothing uses.
    """
    if os.getpid() in _processes:
        core = ov.Core()
        with contextlib.suppress(RuntimeError):  # without a CPU plugin there are no such threads
            core.get_property(CPU, "FULL_DEVICE_NAME")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_end_idle_threads)
