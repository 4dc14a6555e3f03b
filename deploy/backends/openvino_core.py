"""The one connection of a process to OpenVINO."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache

import openvino as ov


def open_core() -> ov.Core:
    """The process's :class:`openvino.Core`, which is never destroyed.

    OpenVINO's CPU plugin gives the thread that first compiles a stack for signal handlers, and takes it away
    with the Core. Where two Cores end in the order in which they began, the second one puts the first one's
    stack back, whose memory is free by then: the next signal, such as Ctrl-C, ends the process with a
    segmentation fault (OpenVINO 2026.4).
    """
    return _open(ov.Core, os.getpid())


@cache
def _open(kind: Callable[[], ov.Core], _process: int) -> ov.Core:
    """By what makes it, so that tests can put something else in its place; and by the process, because the
    threads of a Core do not come along into a forked child."""
    return kind()
