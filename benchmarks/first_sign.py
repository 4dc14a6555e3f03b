"""Seconds until a command shows something on a terminal, the start of Python and all imports included.

usage: python benchmarks/first_sign.py [--rounds 10] [BUNDLE IMAGE]

Every command is started on a terminal of its own, by turns, and is ended once it has shown something. A
bundle and an image add the commands that need one.
"""

from __future__ import annotations

import argparse
import os
import pty
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import make_environment

from cmt_edge.deploy.report import format_table

ROUNDS = 10
"""Starts of each command that count."""
WAIT_S = 60.0
"""Seconds after which a command that has shown nothing is a fault."""
AIM_S = 0.3
"""Seconds within which a command should show something."""


def list_commands(subject: list[str], folder: str) -> list[list[str]]:
    """What is started; ``subject`` is empty, or a bundle and an image."""
    plain = [["--help"], ["doctor"], ["models"]]
    exports = [
        ["export", "--model", "cmt_nano", "--output", folder],
        ["export", "--model", "cmt_nano", "--output", folder, "--dry-run"],
    ]
    if not subject:
        return plain + exports
    bundle, image = subject
    used = [["predict", bundle, image], ["verify", bundle], ["bench", bundle]]
    return [*plain, *exports, *used, ["report", bundle, "-o", f"{folder}/report.html"]]


def time_first_sign(command: list[str]) -> float:
    """Seconds from the start of a command until its terminal shows something."""
    master, terminal = pty.openpty()
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "cmt_edge", *command],
        env=make_environment(),
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    ready, _, _ = select.select([master], [], [], WAIT_S)
    seconds = time.perf_counter() - begun
    try:
        shown = os.read(master, 1) if ready else b""
    except OSError:  # Linux's way to say that it ended
        shown = b""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(master)
    if not shown:
        raise SystemExit(f"error: {' '.join(command)} showed nothing")
    return seconds


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code is 1 where a median misses the aim."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("subject", nargs="*", metavar="BUNDLE IMAGE")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(argv)
    if len(options.subject) not in {0, 2}:
        parser.error("give a bundle and an image, or neither")
    with tempfile.TemporaryDirectory() as folder:
        commands = list_commands([str(Path(path).resolve()) for path in options.subject], folder)
        spent: list[list[float]] = [[] for _ in commands]
        for number in range(options.rounds + 1):
            taken = [time_first_sign(command) for command in commands]
            if number:  # the first round reads the files from the disk
                for seconds, one in zip(spent, taken, strict=True):
                    seconds.append(one)
    medians = [statistics.median(seconds) for seconds in spent]
    rows = [
        [f"cmt-edge {describe(command)}", f"{middle:.2f}", f"{max(seconds):.2f}"]
        for command, middle, seconds in zip(commands, medians, spent, strict=True)
    ]
    print(format_table(["command", "first sign, median s", "largest s"], rows, markdown=True))
    return int(max(medians) > AIM_S)


def describe(command: list[str]) -> str:
    """A command as a table shows it, without folders."""
    return " ".join(Path(word).name if "/" in word else word for word in command[:3] + command[5:])


if __name__ == "__main__":
    sys.exit(main())
