"""Answers are not lost: standard output in ASCII, full, closed, or with a reader that has seen enough."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest

from cmt_edge.deploy.cli.console import finite

SAY = """
import argparse, sys, warnings
from cmt_edge.deploy.cache import CacheWarning
from cmt_edge.deploy.cli.console import run, say
def main(args):
    text = sys.argv[1]
    {body}
    return 1
sys.exit(run(main, argparse.Namespace(verbose=False)))
"""
"""A command that answers and ends with 1, as a failed check does."""
TEXT = '{"label": "crêpe ± 猫 🐈"}'


def command(text: str, body: str = "say(text)") -> list[str]:
    return [sys.executable, "-c", SAY.format(body=body), text]


def ended(text: str = TEXT, body: str = "say(text)", **options) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, "encoding": "utf-8"} | options
    return subprocess.run(command(text, body), stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "ascii:strict", "utf-8"])
@pytest.mark.parametrize("body", ["say(text)", "print(text)"])
def test_characters_that_the_encoding_lacks_are_escaped(encoding, body):
    done = ended(body=body, env=os.environ | {"PYTHONIOENCODING": encoding}, encoding=encoding.split(":")[0])
    assert done.returncode == 1, done.stderr
    assert done.stderr == ""
    assert json.loads(done.stdout) == json.loads(TEXT), "it must still be JSON"
    assert ("ê" in done.stdout) == ("ascii" not in encoding)


def test_a_file_name_that_is_no_text_is_escaped():
    done = ended(body="say(repr(sys.argv[1]) and '\\udcff.jpg')", env=os.environ | {"PYTHONUTF8": "1"})
    assert (done.returncode, done.stdout) == (1, "\\udcff.jpg\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("text", ["short", "long " * 100_000], ids=["short", "long"])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_loses_no_answer(text, unbuffered):
    with open("/dev/full", "w") as full:
        done = ended(
            "x",
            body=f"say({text!r})" if len(text) < 9 else "say('long ' * 100_000)",
            stdout=full,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert done.returncode == 2
    assert text.strip() in done.stderr
    assert "error: standard output cannot be written to\n  why: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_is_noticed_at_the_end_too(unbuffered):
    with open("/dev/full", "w") as full:
        done = ended(body="print(text)", stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == 2
    assert "a part of the answer is lost" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def closed(descriptor: int, body: str = "say(text)") -> subprocess.CompletedProcess[str]:
    code = f"import os, sys; os.close({descriptor}); os.execv(sys.executable, sys.argv[1:])"
    argv = [sys.executable, "-c", code, *command("an answer", body)]
    return subprocess.run(argv, capture_output=True, encoding="utf-8", check=False)


def test_a_closed_output_loses_no_answer():
    done = closed(1)
    assert done.returncode == 2, done.stderr
    assert "an answer" in done.stderr
    assert "it is closed" in done.stderr


def test_a_closed_standard_error_is_no_failure():
    done = closed(2, "warnings.warn('x', CacheWarning); say(text)")
    assert (done.returncode, done.stdout) == (1, "an answer\n")


@pytest.mark.parametrize("body", ["say(text)", "[say(text * 1000) for _ in range(1000)]"])
def test_a_reader_that_has_seen_enough_changes_no_exit_code(body):
    """``cmt-verify BUNDLE | head -0`` still says that the check failed."""
    process = subprocess.Popen(command(TEXT, body), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), errors) == (1, b"")


def test_our_warnings_are_sentences():
    done = ended(body="warnings.warn('the cache is full', CacheWarning); warnings.warn('of others')")
    first, *others = done.stderr.splitlines()
    assert first == "warning: the cache is full"
    assert "UserWarning: of others" in others[0]


@pytest.mark.parametrize("text", ["nan", "NaN", "-inf", "Infinity", "1e999", "x", ""])
def test_what_is_no_finite_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
        finite(text)


@pytest.mark.parametrize("text", ["0", "-1", "1e-3", " 2.5 "])
def test_finite_numbers(text):
    assert finite(text) == float(text)
