"""Run a step of the set-up, and show on a terminal what it does; silent elsewhere.

usage: python scripts/show_step.py TITLE COMMAND [ARGUMENT ...]

One line is shown and rewritten: the title, the seconds, and what ``pip`` is busy with. Where the step fails,
its last lines are printed. The exit code is the command's. It needs the standard library alone, because it
installs the rest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import deque

KEPT_LINES = 20
"""Lines of the output that are printed where the step fails."""
TURN_S = 0.2
"""Seconds between two looks at the step."""
BUSY = re.compile(r"\s*(Collecting|Downloading|Using cached|Building|Installing|Preparing)\s+(\S+)?(.*)")
"""Matches a line of pip that says what it is doing."""
SIZE = re.compile(r"\(([\d.]+ [kMG]?B)\)")
"""Matches a size in such a line."""


def describe(line: str) -> str:
    """What a line of pip's says, in few words; empty for other lines."""
    found = BUSY.match(line)
    if not found:
        return ""
    verb, what, rest = found.groups("")
    size = SIZE.search(rest)
    name = re.split(r"[=<>;\[]", what.rsplit("/", 1)[-1])[0]
    if verb == "Installing" and name == "collected":
        return f"installing {rest.count(',') + 1} packages"
    return f"{verb.lower()} {name}" + (f" ({size[1]})" if size else "")


class Step:
    """A command at work."""

    def __init__(self, title: str, command: list[str]) -> None:
        self.title = title
        self.busy = ""
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.begun = time.monotonic()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                self.lines.append(line.rstrip())
                self.busy = describe(line) or self.busy

    def write_line(self, width: int) -> str:
        """The line now, without the last column, where a terminal would break it."""
        text = f"{self.title} {time.monotonic() - self.begun:4.0f} s  {self.busy}"
        return "".join(c if c.isprintable() else "?" for c in text)[: width - 1]

    def wait(self, show: bool) -> int:
        """Wait for the end; returns the exit code."""
        while self.process.poll() is None:
            if show:
                self._draw()
            time.sleep(TURN_S)
        self.reader.join(1)
        if show:
            self.busy = "" if self.process.returncode == 0 else "failed"
            self._draw(end="\n")
        return self.process.returncode

    def _draw(self, end: str = "") -> None:
        width = shutil.get_terminal_size().columns
        print(f"\r{self.write_line(width).ljust(width - 1)}", end=end, file=sys.stderr, flush=True)


def main(argv: list[str]) -> int:
    """Run the step; returns its exit code."""
    if len(argv) < 2:
        print(__doc__, file=sys.stderr)
        return 2
    title, *command = argv
    try:
        step = Step(title, command)
    except OSError as exc:
        print(f"error: {command[0]}: {exc.strerror}", file=sys.stderr)
        return 2
    try:
        code = step.wait(show=sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb")
    except KeyboardInterrupt:
        step.process.terminate()
        print("\ninterrupted; run make again to go on", file=sys.stderr)
        return 130
    if code:
        print("\n".join([f"error: {title}: exit code {code}", *step.lines]), file=sys.stderr)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
