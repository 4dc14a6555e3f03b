"""Numbers on the command lines of all commands: each flag has a range, and what is outside ends with 2
before any work."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

import pytest

from cmt_edge.__main__ import COMMANDS
from cmt_edge.deploy.cli.ranges import Range

PARSERS = {
    name: import_module(f"cmt_edge.{command.module}").build_parser for name, command in COMMANDS.items()
}
MAINS = {name: import_module(f"cmt_edge.{command.module}").main for name, command in COMMANDS.items()}
FLAGS = [
    (name, action.option_strings[-1])
    for name, make in PARSERS.items()
    for action in make()._actions  # noqa: SLF001, argparse has no other list of them
    if isinstance(getattr(action.type, "__self__", None), Range)
]
"""Command and flag of every number."""
NOT_NUMBERS = ["nan", "NaN", "inf", "-inf", "1e999", "0x10", "", " ", "one", "1,5", "²", "\u0661\u0662x"]


def action_of(command: str, flag: str) -> argparse.Action:
    """What argparse knows of a flag."""
    return next(a for a in PARSERS[command]()._actions if flag in a.option_strings)  # noqa: SLF001


def refused(capsys, command: str, flag: str, value: str) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        MAINS[command]([*(["bundle"] if command != "export" else []), f"{flag}={value}"])
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err.splitlines()[-1]


def is_text(reader: object) -> bool:
    """Whether a flag's value is text: it stays as it is, or a function of ours says that it returns text."""
    returned = getattr(reader, "__annotations__", {}).get("return")
    return reader in (None, str, str.lower, Path) or returned == "str"


def test_no_number_is_without_a_range():
    for make in PARSERS.values():
        for action in make()._actions:  # noqa: SLF001
            assert is_text(action.type) or isinstance(action.type.__self__, Range), action.option_strings


THRESHOLD = "--layer-threshold"
LOADGEN_FLAGS = ("--loadgen-rate", "--loadgen-limit")
"""What bench asks MLPerf LoadGen."""


def test_the_flags_that_are_numbers():
    found = {name: {flag for command, flag in FLAGS if command == name} for name in COMMANDS}
    assert found["predict"] == {"--topk", "--threads"}
    assert found["verify"] == {
        "--limit",
        "--max-drop",
        "--atol",
        "--threads",
        "--workers",
        "--ray-wait",
        THRESHOLD,
    }
    assert found["bench"] == {"--iters", "--seconds", "--warmup", "--threads", *LOADGEN_FLAGS}
    assert found["build"] == {"--workspace", "--level", "--time-limit", "--atol", "--iters", "--seconds"}
    assert {"--seed", "--batch", "--imgsz", "--threads", "--num-classes", "--workspace"} <= found["export"]


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_a_number_that_is_outside_is_refused(capsys, command, flag):
    numbers = action_of(command, flag).type.__self__
    low = numbers.least if numbers.above else numbers.least - 1
    for value in (str(low), "-3", "-999999999"):
        assert f"{flag}: {value!r} is too small" in refused(capsys, command, flag, value)
    for value in (str(numbers.most + 1), "9" * 30):
        assert f"{flag}: {value!r} is too large" in refused(capsys, command, flag, value)
    assert "..." in refused(capsys, command, flag, "9" * 5000)


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_what_is_no_number_is_refused(capsys, command, flag):
    for value in NOT_NUMBERS:
        what = f"argument {flag}: {value!r} is not a" if value else f"{flag} is empty"
        assert what in refused(capsys, command, flag, value)


@pytest.mark.parametrize(("command", "flag"), FLAGS)
def test_the_largest_and_the_smallest_are_taken(command, flag):
    read = action_of(command, flag).type
    numbers = read.__self__
    assert read(str(numbers.most)) == numbers.most
    if not numbers.above:
        assert read(str(numbers.least)) == numbers.least
