"""Power from a running ``tegrastats``, for Jetsons whose sysfs does not let the user read the rails.

Source: *NVIDIA Jetson Linux Developer Guide*, "tegrastats Utility".
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
from collections.abc import Sequence

from .jetson import LONGEST_LINE, UNCONNECTED, total_rails
from .tools import MW_PER_W

INTERVAL_MS = 100
"""Milliseconds between two lines of the tool."""
FIRST_LINE_S = 3.0
"""Seconds that the tool has for its first line."""
END_S = 2.0
"""Seconds that the tool has to end."""
RAIL = re.compile(r"(?<!\S)([A-Za-z]\w*)\s+(\d+)mW(?:/\d+(?:mW)?)*(?!\S)")
"""A rail of a line: its power now, mostly followed by its average, and in JetPack 7 by its maximum."""


def parse_rails(line: str) -> dict[str, int]:
    """Rail -> milliwatts now, of one line of ``tegrastats``; empty where it names none.

    Source: Jetson Linux Developer Guide, "tegrastats Utility", "Reported Statistics".
    """
    if len(line) > LONGEST_LINE:
        return {}
    rails = {found[1]: int(found[2]) for found in RAIL.finditer(line)}
    rails.pop(UNCONNECTED, None)
    return rails


class TegrastatsPower:
    """Runs the tool until :meth:`close`; raises ``OSError`` where it cannot be started or names no rail.

    Attributes:
        source: the tool and the rails that are added up.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self._watts: float | None = None
        self.source = ""
        self._told = threading.Event()
        self._process = subprocess.Popen(
            [*program, "--interval", str(INTERVAL_MS)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        self._lines = self._process.stdout
        self._reader = threading.Thread(target=self._read, name="tegrastats", daemon=True)
        self._reader.start()
        self._told.wait(FIRST_LINE_S)
        if self._watts is None:
            self.close()
            raise OSError("tegrastats names no power rail")

    def _read(self) -> None:
        for raw in self._lines:
            rails = parse_rails(raw.decode("utf-8", "replace"))
            names = total_rails(rails)
            if names:
                self._watts = sum(rails[name] for name in names) / MW_PER_W
                self.source = f"tegrastats, {' + '.join(names)}"
                self._told.set()
        self._watts = None  # the tool has ended: its last figure is no present one
        self._told.set()

    def watts(self) -> float:
        """The power of the last line; raises ``OSError`` once the tool has ended."""
        if self._watts is None:
            raise OSError("tegrastats has ended")
        return self._watts

    def close(self) -> None:
        """End the tool."""
        self._process.terminate()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(END_S)
        with contextlib.suppress(OSError):
            self._lines.close()
