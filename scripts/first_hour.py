"""Replay a stranger's first hour: clone, follow the README and the quick start, paste what is printed.

usage: python scripts/first_hour.py [--folder FOLDER] [--markdown FILE]

The commands are read from the pages of a fresh clone of this repository's last commit, and run in their
order on a terminal of 80 columns, in an environment without variables of ours. After each the commands that
it printed below ``next:`` are pasted too, unless they hold a placeholder. The table tells for every step the
seconds, those of the processors, the seconds until something was shown, and the widest line. The exit code
is 1 if a step failed or showed a line that does not fit.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cmt_edge.deploy.report import format_table

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""
PAGES = (("README.md", "## Start", 1), ("docs/quickstart.md", "# Quick start", None))
"""Page, heading below which its commands are read, and how many of them (``None``: all)."""
LEFT_OUT = (
    "make demo",  # of the quick start: the README's was run already
    "pip install",  # other ways to install
)
"""Beginnings of commands of the quick start that are not run."""
COLUMNS, ROWS = 80, 24
"""The size of the terminal, in characters."""
KEPT = ("HOME", "LANG", "PATH", "TMPDIR")
"""Variables that a stranger has too, beside those that tell pip where packages are."""
BLOCK = re.compile(r"^```(sh|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
"""A block of commands: in a console block they stand behind ``$``."""
NEXT = re.compile(r"^next[^\n]*:\n((?:  \S[^\n]*\n?)+)", re.MULTILINE)
"""The commands that an output offers."""
PLACEHOLDER = re.compile(r"\b[A-Z]{2,}(?:_[A-Z]+)*\b")
"""A word in place of which users write their own."""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
"""What steers a terminal."""
STEP_S = 1800
"""The longest time of a step, in seconds."""


@dataclass(frozen=True)
class Step:
    """A command that was run.

    Attributes:
        command: as a page or an output gives it.
        code: its exit code.
        seconds, cpu_seconds: of the clock, and of the processors.
        first: seconds until something was shown; ``None`` if nothing was.
        text: what was shown.
    """

    command: str
    code: int
    seconds: float
    cpu_seconds: float
    first: float | None
    text: str

    @property
    def widest(self) -> int:
        """Characters of the widest line."""
        return max(map(len, self.lines), default=0)

    @property
    def lines(self) -> list[str]:
        """The lines as a terminal has shown them; a carriage return begins one anew."""
        text = CONTROL.sub("", self.text).replace("\r\n", "\n")
        return [part.rstrip() for part in re.split(r"[\r\n]", text)]

    @property
    def is_good(self) -> bool:
        """Whether it succeeded, and fitted."""
        return self.code == 0 and self.widest <= COLUMNS


def read_commands(page: str, heading: str, most: int | None) -> list[str]:
    """The commands of a page below a heading."""
    text = page[page.index(heading) :]
    found: list[str] = []
    for kind, block in BLOCK.findall(text):
        lines = block.replace("\\\n", " ").splitlines()
        if kind == "console":
            lines = [line[2:] for line in lines if line.startswith("$ ")]
        found += [line.split("  #")[0].strip() for line in lines if line.strip()]
    return found[:most]


def read_next(text: str) -> list[str]:
    """The commands below ``next:`` that can be pasted as they stand."""
    lines = [line for block in NEXT.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line.strip() for line in lines if not PLACEHOLDER.search(line)]


class Terminal:
    """Runs commands in the clone, each on a terminal of its own; those that begin with ``.`` hold for all
    later ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.prefix = ""
        self.environment = {
            name: value for name, value in os.environ.items() if name in KEPT or name.startswith("PIP_")
        } | {"TERM": "xterm-256color", "CMT_EDGE_CACHE": str(folder.parent / "cache")}

    def run(self, command: str) -> Step:
        """Run a command, and look at what it shows."""
        begun, shown, first = time.monotonic(), b"", None
        started = self._start(self.prefix + command)
        with contextlib.suppress(OSError):  # Linux's way to say that nobody writes any more
            while chunk := self._read(started.descriptor, begun):
                first = time.monotonic() - begun if first is None else first
                shown += chunk
        os.close(started.descriptor)
        _, status, usage = os.wait4(started.process.pid, 0)
        code = started.process.returncode = os.waitstatus_to_exitcode(status)
        if command.startswith(". ") and code == 0:
            self.prefix += f"{command} && "
        text = shown.decode(errors="replace")
        seconds = time.monotonic() - begun
        return Step(command, code, seconds, usage.ru_utime + usage.ru_stime, first, text)

    def _start(self, command: str) -> Started:
        master, terminal = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
        os.close(terminal)
        return Started(process, master)

    @staticmethod
    def _read(master: int, begun: float) -> bytes:
        ready, _, _ = select.select([master], [], [], max(0.0, STEP_S - (time.monotonic() - begun)))
        if not ready:
            raise SystemExit(f"error: a step took more than {STEP_S} s")
        return os.read(master, 1 << 16)


@dataclass(frozen=True)
class Started:
    """A process, and the descriptor from which what it shows is read."""

    process: subprocess.Popen[bytes]
    descriptor: int


def clone(folder: Path) -> Path:
    """A fresh clone of the last commit."""
    place = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    subprocess.run(["git", "checkout", "--quiet", "--detach", head], cwd=place, check=True)
    return place


def list_commands(place: Path) -> Iterator[str]:
    """The commands of the pages, in the order in which a stranger meets them."""
    for number, (name, heading, most) in enumerate(PAGES):
        commands = read_commands((place / name).read_text(encoding="utf-8"), heading, most)
        yield from (one for one in commands if number == 0 or not one.startswith(LEFT_OUT))


def replay(place: Path) -> Iterator[Step]:
    """Run the commands, and paste what they offer, each once."""
    terminal, run = Terminal(place), set[str]()
    for command in list_commands(place):
        step = terminal.run(command)
        yield step
        offered = read_next("\n".join(step.lines)) if terminal.prefix else []
        for pasted in offered:
            if pasted not in run:
                run.add(pasted)
                yield terminal.run(pasted)


def format_row(step: Step) -> list[str]:
    """The cells of a step."""
    command = step.command if len(step.command) <= COLUMNS else f"{step.command[: COLUMNS - 3]}..."
    first = "-" if step.first is None else f"{step.first:.2f}"
    figures = [f"{step.seconds:.1f}", f"{step.cpu_seconds:.1f}", first, str(step.widest), str(step.code)]
    return [command, *figures]


def main(arguments: list[str] | None = None) -> int:
    """Replay the hour and print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where to clone (default: a temporary folder)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as Markdown")
    options = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        steps = []
        for step in replay(clone(folder.resolve())):
            steps.append(step)
            print(*format_row(step), file=sys.stderr, flush=True)
            if not step.is_good:
                print(*[line for line in step.lines if line][-20:], sep="\n", file=sys.stderr)
    header = ["step", "s", "CPU s", "first sign s", "widest line", "exit code"]
    rows = [format_row(step) for step in steps]
    print(format_table(header, rows))
    if options.markdown:
        options.markdown.write_text(format_table(header, rows, markdown=True) + "\n", encoding="utf-8")
    return int(not all(step.is_good for step in steps))


if __name__ == "__main__":
    sys.exit(main())
