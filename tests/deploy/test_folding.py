"""Lines that are too long for a terminal are folded at spaces, and commands can still be pasted."""

from __future__ import annotations

import io
import shlex
import sys

import pytest

from cmt_edge.deploy.cli import output
from cmt_edge.deploy.folding import fold
from cmt_edge.deploy.progress import Progress

SENTENCE = "the error is first beyond 0.2 in stages.1.blocks.0 (0.31); it grows most in stages.2.blocks.1"
COMMAND = (
    "  cmt-edge verify 'my photos/cmt_xs_int8_openvino' --data photos/test --max-drop 0.5 --by-order --json"
)


@pytest.mark.parametrize("width", [20, 40, 80])
def test_a_sentence_folds_at_spaces(width):
    lines = fold(SENTENCE, width).split("\n")
    assert " ".join(line.strip() for line in lines) == SENTENCE
    assert max(map(len, lines)) <= width
    assert all(line.startswith("  ") for line in lines[1:])


def test_an_indented_line_stays_below_its_beginning():
    first, second = fold(f"  why: {SENTENCE}", 80).split("\n")
    assert (first[:7], second[:4]) == ("  why: ", "    ")


@pytest.mark.parametrize("width", [60, 80])
def test_a_folded_command_can_be_pasted(width):
    folded = fold(COMMAND, width)
    assert max(map(len, folded.split("\n"))) <= width
    assert shlex.split(folded.replace("\\\n", " ")) == shlex.split(COMMAND)
    assert "--data photos/test" in folded, "a flag and its value stay together"


def test_a_text_behind_a_name_folds_below_itself():
    answers = "airplane 89.9 %, bird 3.6 %, ship 1.0 %, dog 0.9 %, truck 0.9 %, automobile 0.5 %"
    lines = fold(f"pics/airplane.png    {answers}", 60).split("\n")
    assert len(lines) == 3
    assert {line[:21].strip() for line in lines[1:]} == {""}
    assert " ".join(line[21:] for line in lines) == answers


def test_what_stays_as_it_is():
    row = "cmt_nano_fp32_openvino  6.9    0.42  0.47"
    path = f"/{'x' * 90}"
    assert fold(row, 20) == row
    assert fold(path, 20) == path
    assert fold(SENTENCE, None) == SENTENCE
    remedy = 'shtab is not installed: pip install "cmt-edge[completion]" installs it'
    assert 'pip install "cmt-edge[completion]"' in fold(remedy, 40)


class Terminal(io.StringIO):
    """A standard error that is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "lines"), [(Terminal, 3), (io.StringIO, 2)])
def test_messages_fold_on_terminals_alone(monkeypatch, stream, lines):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    error = stream()
    monkeypatch.setattr(output.sys, "stderr", error)
    output.tell(f"error: bad\n  why: {SENTENCE}")
    assert error.getvalue().count("\n") == lines


def test_a_sign_of_life_is_taken_away_again(monkeypatch):
    error = Terminal()
    monkeypatch.setattr("sys.stderr", error)
    with pytest.raises(ValueError, match="bad"), Progress().shown("open the bundle"):
        raise ValueError("bad")
    assert error.getvalue() == f"open the bundle ...\r{' ' * 19}\r"
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with Progress().shown("open the bundle"):
        pass
    assert not sys.stderr.getvalue()
