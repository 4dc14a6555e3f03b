"""What becomes of open sessions when the process is forked, or ends while its threads still use them.

The threads of a runtime do not live on in a forked child, but destroying a session waits for them: with
OpenVINO the child would hang. In the child nothing of the parent's sessions is therefore used or destroyed.

When the interpreter ends, it stops every thread that asks for its lock. A daemon thread that is inside an
inference then tears down C++ frames that do not permit it, and the process aborts. Running inferences are
therefore waited for, new ones are refused, and what such threads hold is not destroyed.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import weakref
from typing import Protocol


class Owner(Protocol):
    """What owns a session."""

    def abandon(self) -> None:
        """Refuse all further use; called in a forked child, where locks may be held by nobody."""

    def drain(self) -> bool:
        """Refuse further use and wait for what runs; called when the process ends. Whether threads still
        hold something of the session."""
        ...


_owners: weakref.WeakSet[Owner] = weakref.WeakSet()
"""What owns a session and is told when the process is forked or ends."""


def watch(owner: Owner) -> None:
    """Tell ``owner`` when the process is forked or ends."""
    _owners.add(owner)


def keep_forever(thing: object) -> None:
    """Never destroy an object, not even when the process ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _end_in_child() -> None:
    for owner in list(_owners):
        owner.abandon()
        keep_forever(owner)


def _end_at_exit() -> None:
    for owner in list(_owners):
        if owner.drain():
            keep_forever(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_in_child)
atexit.register(_end_at_exit)
