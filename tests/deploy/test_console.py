"""Answers are not lost: standard output in ASCII, full, closed, or with a reader that has seen enough."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
import tempfile
import unicodedata

import pytest

from cmt_edge.deploy.cli.console import run_command
from cmt_edge.deploy.cli.ranges import parse_finite
from cmt_edge.deploy.escaping import UNSAFE, escape, escape_line, escape_markdown

SAY = """
import argparse, sys, warnings
from cmt_edge.deploy.cache import CacheWarning
from cmt_edge.deploy.cli.console import run_command
from cmt_edge.deploy.cli.output import say
def main(args):
    text = sys.argv[1]
    {body}
    return 1
sys.exit(run_command(main, argparse.Namespace(verbose=False)))
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
    assert done.returncode == 1
    assert text.strip() in done.stderr
    assert "error: standard output cannot be written to\n  why: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_output_is_noticed_at_the_end_too(unbuffered):
    with open("/dev/full", "w") as full:
        done = ended(body="print(text)", stdout=full, env=os.environ | {"PYTHONUNBUFFERED": unbuffered})
    assert done.returncode == (2 if unbuffered else 1), "what is printed at once interrupts the command"
    assert "a part of the answer is lost" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize(("code", "expected"), [(0, 2), (1, 1), (3, 3)])
@pytest.mark.parametrize("body", ["say(text)", "say(text); say(text)", "print(text)"])
def test_a_full_output_turns_only_success_into_a_failure(code, expected, body):
    """A check that failed still says so."""
    with open("/dev/full", "w") as full:
        env = os.environ | {"PYTHONUNBUFFERED": ""}
        done = ended(body=f"{body}; return {code}", stdout=full, env=env)
    assert done.returncode == expected
    assert done.stderr.count("error: standard output cannot be written to") == 1
    assert done.stderr.count("crêpe") == body.count("say"), "each answer stands on standard error, once"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("code", [0, 1, 2])
def test_two_full_outputs_are_no_crash(code):
    with open("/dev/full", "w") as full:
        argv = command(TEXT, f"say(text); return {code}")
        assert subprocess.run(argv, stdout=full, stderr=full, check=False).returncode == (code or 2)


def closed(descriptor: int, body: str = "say(text)") -> subprocess.CompletedProcess[str]:
    code = f"import os, sys; os.close({descriptor}); os.execv(sys.executable, sys.argv[1:])"
    argv = [sys.executable, "-c", code, *command("an answer", body)]
    return subprocess.run(argv, capture_output=True, encoding="utf-8", check=False)


def test_a_closed_output_loses_no_answer():
    done = closed(1)
    assert done.returncode == 1, done.stderr
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
    assert done.stderr.splitlines() == ["warning: the cache is full", "warning: of others"]


ATTACKS = {
    "escape sequence": "\x1b]0;owned\x07",
    "8-bit escape sequence": "\x9b31m",
    "carriage return": "good\rbad",
    "NUL": "a\0b",
    "delete": "a\x7fb",
    "override of the direction": "\u202egpj.exe",
    "isolate": "\u2067abc\u2069",
    "line separator": "a\u2028error: b",
    "byte that is no UTF-8": "\udcff.jpg",
    "invisible tag": "a\U000e0041b",
    "byte order mark": "\ufeffcat",
    "form feed": "a\x0cb",
}
"""What may steer a terminal, by its name."""


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_every_attack_is_escaped(attack):
    for safe in (escape(attack), escape_line(attack), escape_markdown(attack)):
        assert safe != attack
        assert safe.isascii()
        assert safe.isprintable()
    assert json.loads(f'"{escape(attack)}"') == json.loads(f'"{escape_line(attack)}"') == attack


def test_lines_stay_in_a_message_and_not_in_a_name():
    assert escape("a\n\tb") == "a\n\tb"
    assert escape_line("a\n\tb") == "a\\n\\tb"
    assert escape_markdown("a|b\n<img src=x>[c](d)`e`") == "a\\|b\\\\n\\<img src=x\\>\\[c\\](d)\\`e\\`"


@pytest.mark.parametrize(
    "body",
    [
        "say(%r)",
        "print('answer'); warnings.warn(%r, CacheWarning)",
        "print('answer'); warnings.warn(%r)",
        "from cmt_edge.deploy.errors import InputError; raise InputError(%r)",
        "from cmt_edge.deploy.errors import InputError; raise InputError('w', where=%r, why=%r, remedy=%r)",
        "raise RuntimeError(%r)",
        "raise FileNotFoundError(2, 'x', %r)",
        "raise PermissionError(13, 'x', %r)",
        "from cmt_edge.deploy.progress import Progress; Progress().tell(%r)",
    ],
)
def test_nothing_steers_the_terminal(body):
    done = ended(body=body.replace("%r", repr("".join(ATTACKS.values()))), encoding=None)
    printed = (done.stdout + done.stderr).decode()
    assert printed
    assert not [c for c in printed if c != "\n" and unicodedata.category(c) in UNSAFE], repr(printed)


def test_a_name_cannot_pretend_to_be_a_line_of_ours():
    name = "a.jpg\n  remedy: rm -rf ~\nerror: b"
    body = (
        f"from cmt_edge.deploy.errors import InputError; raise InputError(text, where={name!r}, why={name!r})"
    )
    done = ended("is bad\nerror: all is lost", body=body)
    starts = [line.split(":")[0] for line in done.stderr.splitlines() if not line.startswith("    ")]
    assert starts == ["error", "  why"]


def test_json_that_is_escaped_is_the_same_json():
    text = json.dumps({"label": "".join(ATTACKS.values())}, ensure_ascii=False)
    done = ended(body=f"say({text!r})")
    assert json.loads(done.stdout) == json.loads(text)


def test_words_of_many_languages_stay_as_they_are():
    text = "crêpe 猫 🐈 👩\u200d🔬 \u0645\u06cc\u200c\u062e\u0648 \u05e2\u05d1 \u3000\u00a0ไทย"
    assert ended(body=f"say({text!r})").stdout == text + "\n"


@pytest.mark.parametrize("text", ["nan", "NaN", "-inf", "Infinity", "1e999", "x", ""])
def test_what_is_no_finite_number(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
        parse_finite(text)


@pytest.mark.parametrize("text", ["0", "-1", "1e-3", " 2.5 "])
def test_finite_numbers(text):
    assert parse_finite(text) == float(text)


def test_no_folder_for_temporary_files_is_no_bug_of_ours(monkeypatch, capsys):
    """As in a container with a read-only root."""

    def refuse(path, flags, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    def main(_):
        with monkeypatch.context() as patch:
            patch.setattr(tempfile, "tempdir", None)
            patch.setattr(os, "open", refuse)
            tempfile.gettempdir()

    assert run_command(main, argparse.Namespace(verbose=False)) == 2
    said = capsys.readouterr().err
    assert "no folder for temporary files" in said
    assert "--tmpfs /tmp" in said
    assert "Traceback" not in said
