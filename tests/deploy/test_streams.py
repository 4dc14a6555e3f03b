"""Standard streams that are full, closed or unread lose no answer, and the exit code keeps its meaning."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

needs_full = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")

ANSWERS = {
    "--version": "cmt-edge ",
    "--help": "usage: python -m cmt_edge",
    "predict --version": "cmt-edge ",
    "predict --help": "--topk",
    "export --help": "--precision",
}
"""What is asked for -> a part of the answer."""
WRONG = ["", "bogus", "predict --bogus", "export", "bench /absent", "verify /absent"]
"""Commands that end with 2."""

PRINT_FREE_DESCRIPTOR = """
import os, sys
from cmt_edge import startup
startup.occupy_closed_descriptors()
os.write(int(sys.argv[1]), str(os.open(os.devnull, os.O_RDONLY)).encode())
"""
"""Prints the number that the next opened file gets."""


def run_shell(words: str, streams: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m cmt_edge WORDS`` with streams as a shell connects them."""
    command = f"set -o pipefail; {sys.executable} -m cmt_edge {words} {streams}"
    return subprocess.run(
        ["bash", "-c", command],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_full
@pytest.mark.parametrize("asked", ANSWERS)
@pytest.mark.parametrize("streams", [">/dev/full", ">&-"])
def test_an_answer_that_cannot_be_printed_stands_on_standard_error(asked, streams):
    done = run_shell(asked, streams)
    assert done.returncode == 2
    assert ANSWERS[asked] in done.stderr
    assert "error: standard output cannot be written to" in done.stderr
    assert "Traceback" not in done.stderr


@needs_full
@pytest.mark.parametrize("asked", ["--version", "export --help"])
def test_two_full_streams_are_no_crash(asked):
    assert run_shell(asked, ">/dev/full 2>/dev/full").returncode == 2


@pytest.mark.parametrize("asked", ANSWERS)
def test_a_reader_that_has_seen_enough_is_no_failure(asked):
    done = run_shell(asked, "| true")
    assert (done.returncode, done.stderr) == (0, "")


@needs_full
@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("streams", ["2>/dev/full", "2>&-", ">&- 2>&-"])
def test_bad_usage_ends_with_two_also_where_nobody_can_be_told(words, streams):
    done = run_shell(words, streams)
    assert (done.returncode, done.stdout) == (2, ""), "a complaint is no answer"


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_no_file_takes_the_number_of_a_closed_stream(closed):
    """A runtime that writes its messages to descriptor 2 would write them into that file."""
    seen = 1 if closed == 2 else 2
    done = subprocess.run(
        ["bash", "-c", f'exec "$0" -c "$1" {seen} {closed}>&-', sys.executable, PRINT_FREE_DESCRIPTOR],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert int(done.stdout + done.stderr) > 2
