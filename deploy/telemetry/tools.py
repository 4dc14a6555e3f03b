"""Running the tools of a device, such as ``nvpmodel``: no shell, no ``sudo``, no input, no waiting."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

MW_PER_W = 1e3
"""Milliwatts in a watt."""
TIMEOUT_S = 3.0
"""Seconds after which a tool has no answer."""
FOLDERS = ("/usr/sbin", "/usr/bin", "/sbin", "/bin")
"""Searched after ``PATH``: ``nvpmodel`` lies in ``/usr/sbin``, which many users' ``PATH`` lacks."""


def find_tool(name: str) -> str | None:
    """Path of a program, also where the user's ``PATH`` lacks its folder."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *FOLDERS])
    return shutil.which(name, path=path)


def run_tool(command: Sequence[str]) -> str | None:
    """Standard output of a tool, whatever its exit code.

    ``None`` where the tool is absent or takes longer than :data:`TIMEOUT_S`.
    """
    program = find_tool(command[0])
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=TIMEOUT_S,
            check=False,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.decode("utf-8", "replace")
