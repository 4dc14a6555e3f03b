"""How long the help of each command takes, and what a library for command lines would add to it.

usage: python benchmarks/command_start.py [ROUNDS]

Everything is started by turns, so that a busy machine slows all of it alike; the table gives medians and
their ratio to Python's own start. Libraries that are not installed are left out:
pip install click rich-click typer.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from importlib.util import find_spec

from common import make_environment

from cmt_edge.__main__ import COMMANDS
from cmt_edge.deploy.report import format_table

ROUNDS = 15
"""Starts of each program."""
LIBRARIES = ("argparse", "click", "rich_click", "typer")
"""Modules that read a command line."""


def list_programs() -> dict[str, list[str]]:
    """What is started, by name."""
    bare = {"python": ["-c", "pass"]}
    libraries = {f"import {name}": ["-c", f"import {name}"] for name in LIBRARIES if find_spec(name)}
    helps = {f"cmt-edge {name} --help": ["-m", "cmt_edge", name, "--help"] for name in COMMANDS}
    return bare | libraries | {"cmt-edge --help": ["-m", "cmt_edge", "--help"]} | helps


def time_start(arguments: list[str]) -> float:
    """Seconds from the start to the end of an interpreter."""
    begun = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], env=make_environment(), stdout=subprocess.DEVNULL, check=True
    )
    return time.perf_counter() - begun


def main(argv: list[str]) -> int:
    """Measure and print; returns the exit code."""
    rounds = int(argv[0]) if argv else ROUNDS
    programs = list_programs()
    spent: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, arguments in programs.items():
            spent[name].append(time_start(arguments))
    medians = {name: statistics.median(seconds) for name, seconds in spent.items()}
    rows = [[name, f"{1e3 * s:.0f}", f"{s / medians['python']:.1f}"] for name, s in medians.items()]
    print(format_table(["program", "median ms", "of python"], rows, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
