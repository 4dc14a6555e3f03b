"""Power from a running ``tegrastats``, for Jetsons whose sysfs does not let the user read the rails.

Source: *NVIDIA Jetson Linux Developer Guide*, "tegrastats Utility".
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Sequence

from .jetson import parse_tegrastats, total_rails

INTERVAL_MS = 100
FIRST_LINE_S = 3.0
END_S = 2.0


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
            line = parse_tegrastats(raw.decode("utf-8", "replace"))
            names = total_rails(line.rails_mw) if line else []
            if line and names:
                self._watts = sum(line.rails_mw[name] for name in names) / 1e3
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
