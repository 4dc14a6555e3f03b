"""What all commands share: close names for what is misspelled, errors as JSON, colours, completion."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import types

import pytest

from cmt_edge import startup
from cmt_edge.__main__ import COMMANDS, main
from cmt_edge.deploy.backends import list_offered_runtimes
from cmt_edge.deploy.cli import bench, completion, doctor, output, predict, serve_repo
from cmt_edge.deploy.cli.console import run_command
from cmt_edge.deploy.errors import InputError

HEAVY = {"numpy", "torch", "openvino", "onnxruntime", "PIL", "argparse", "importlib.metadata"}
"""Modules without which ``cmt-edge --help`` starts."""


# --- the front command ----------------------------------------------------------------------------


def test_help_and_errors_of_the_front_command_import_next_to_nothing():
    show = "import sys; from cmt_edge.__main__ import main; main(['--help'])"
    code = f"{show}; print({HEAVY!r} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\nset()\n")
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["exprt"], "unknown command 'exprt'; did you mean export?"),
        (["cmt-bench"], "did you mean bench?"),
        (["qqq"], "unknown command 'qqq'\n"),
        (["--json"], "no command was named"),
        (["--nope"], "no command was named before '--nope'"),
    ],
)
def test_a_misspelled_command(capsys, argv, words):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert bool(out) == ("--json" in argv)


def test_a_command_in_capital_letters(capsys):
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["DOCTOR", "--help"])
    assert "cmt-edge doctor" in capsys.readouterr().out


@pytest.mark.parametrize(("front", "program"), [([], "cmt-bench"), (["cmt-edge"], "cmt-edge bench")])
def test_usage_and_examples_name_what_was_typed(call, monkeypatch, front, program):
    monkeypatch.setattr(startup, "front", front)
    _, out, _ = call(bench.main, "--help")
    assert out.startswith(f"usage: {program} [options] BUNDLE [BUNDLE ...]\n")
    assert f"\n  {program} cmt_xs_fp32_openvino " in out


def test_every_command_has_a_name_that_can_be_typed(monkeypatch):
    monkeypatch.setattr(startup, "front", [])
    assert {name for name, command in COMMANDS.items() if command.has_script} == {*startup.OWN_SCRIPTS}
    assert [startup.name_program(name) for name in ("build", "doctor")] == ["cmt-build", "cmt-edge doctor"]


@pytest.mark.parametrize(("front", "program"), [([], "cmt-export"), (["cmt-edge"], "cmt-edge export")])
def test_a_remedy_names_what_was_typed(fails, tmp_path, monkeypatch, front, program):
    monkeypatch.setattr(startup, "front", front)
    assert f"give the folder that {program} printed" in fails(2, bench.main, tmp_path / "absent")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_shows_examples(call, name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = call(lambda argv: main([name, *argv]), "--help")
    assert "\nexamples:\n  cmt-" in out
    head = out.split("\nexamples:")[0]
    assert max(map(len, head.splitlines())) <= 80


# --- flags and values -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--trheads", "2"], "unrecognized arguments: --trheads; did you mean --threads?"),
        (["b", "a.png", "--TopK=3"], "unrecognized arguments: --TopK=3; did you mean --topk?"),
        (["b", "a.png", "--no_cache"], "did you mean --no-cache?"),
        (["b", "a.png", "-topk"], "did you mean --topk?"),
        (["b", "a.png", "--zzz"], "--zzz; cmt-predict --help lists the flags"),
    ],
)
def test_a_misspelled_flag(call, argv, words):
    code, out, err = call(predict.main, *argv)
    assert (code, out) == (2, "")
    assert err.rstrip().endswith(words)


@pytest.mark.parametrize(
    ("server", "words"),
    [
        ("tritn", "argument --for: invalid choice: 'tritn'"),
        ("tritn", "; did you mean triton?"),
        ("OVSM", "; did you mean ovms?"),
    ],
)
def test_a_misspelled_choice(call, server, words):
    code, out, err = call(serve_repo.main, "b", "-o", "models", "--for", server)
    assert (code, out) == (2, "")
    assert words in err


def test_a_choice_that_resembles_none(call):
    code, _, err = call(serve_repo.main, "b", "-o", "models", "--for", "qqq")
    assert code == 2
    assert "did you mean" not in err
    assert "triton" in err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fake", "choose one of: openvino, onnxruntime, tensorrt, tensorrt_rtx, kserve, torch"),
        ("onnx", "did you mean onnxruntime or openvino?"),
        ("kserv", "did you mean kserve?"),
    ],
)
def test_a_runtime_that_no_command_offers(fails, name, words):
    assert words in fails(2, predict.main, "b", "a.png", "--backend", name)


def test_what_follows_two_hyphens_is_no_flag(fails):
    assert "no_bundle" in fails(2, predict.main, "no_bundle", "--", "--absent.png")


def test_a_runtime_in_capital_letters(fails):
    assert "no_bundle" in fails(2, predict.main, "no_bundle", "a.png", "--backend", "ONNXRuntime")


# --- errors as JSON -------------------------------------------------------------------------------


def run(exc: BaseException) -> int:
    def fail(args):
        raise exc

    return run_command(fail, argparse.Namespace(verbose=False, json=True))


@pytest.mark.parametrize(
    ("exc", "kind", "code"),
    [
        (InputError("it is wrong", where="a.png", why="so", remedy="do"), "InputError", 2),
        (ZeroDivisionError("a bug"), "CmtEdgeError", 4),
        (KeyboardInterrupt(), "Interrupted", 130),
        (PermissionError(13, "denied", "place"), "InputError", 2),
    ],
)
def test_every_end_is_an_object(capsys, exc, kind, code):
    assert run(exc) == code
    out, err = capsys.readouterr()
    error = json.loads(out)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, code)
    assert error["what"] in err
    if kind == "InputError" and error["why"] == "so":
        assert error == {"kind": kind, "exit_code": 2, "what": "it is wrong"} | {
            "where": "a.png",
            "why": "so",
            "remedy": "do",
        }


def test_words_that_cannot_be_read_are_an_object_too(call):
    code, out, err = call(doctor.main, "--json", "--fromat", "onnx")
    assert code == json.loads(out)["error"]["exit_code"] == 2
    assert json.loads(out)["error"]["what"] in err
    assert call(doctor.main, "--fromat", "--", "--json")[1] == ""


# --- colours and widths ---------------------------------------------------------------------------


class Screen:
    def __init__(self, is_terminal: bool = True) -> None:
        self.isatty = lambda: is_terminal


@pytest.mark.parametrize(
    ("environment", "screen", "is_coloured"),
    [
        ({"TERM": "xterm"}, Screen(), True),
        ({"TERM": "xterm", "NO_COLOR": ""}, Screen(), True),
        ({"TERM": "xterm", "NO_COLOR": "1"}, Screen(), False),
        ({"TERM": "dumb"}, Screen(), False),
        ({}, Screen(), False),
        ({"TERM": "xterm"}, Screen(is_terminal=False), False),
    ],
)
def test_colours_only_on_terminals_of_those_who_want_them(monkeypatch, environment, screen, is_coloured):
    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    text = "error: a\n  remedy: b\nan error: c"
    coloured = "\033[1;31merror:\033[0m a\n  \033[32mremedy:\033[0m b\nan error: c"
    assert output.colour(text, screen) == (coloured if is_coloured else text)


def test_the_width_is_that_of_the_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: True, fileno=lambda: 1))
    monkeypatch.setattr(os, "get_terminal_size", lambda number: os.terminal_size((72, 20)))
    assert output.find_width() == 72
    monkeypatch.setenv("COLUMNS", "33")
    assert output.find_width() == 33
    monkeypatch.setattr(sys, "stdout", types.SimpleNamespace(isatty=lambda: False))
    for nothing in ("0", "\u00b2", "-1", "9" * 5000):  # the second is a digit by str.isdigit
        monkeypatch.setenv("COLUMNS", nothing)
        assert output.find_width() is None


# --- completion -----------------------------------------------------------------------------------

MODULES = {"predict": "cmt_edge.deploy.cli.predict", "doctor": "cmt_edge.deploy.cli.doctor"}


def test_a_shell_learns_values_and_files(monkeypatch, capsys):
    seen = []
    fake = types.SimpleNamespace(
        FILE="files", complete=lambda tree, shell: seen.append((tree, shell)) or "it"
    )
    monkeypatch.setitem(sys.modules, "shtab", fake)
    assert completion.show_completion("zsh", MODULES, ["cmt_nano"]) == 0
    assert capsys.readouterr().out.endswith("\nit\n")
    ((tree, shell),) = seen
    assert shell == "zsh"
    (commands,) = (action for action in tree._actions if action.dest == "==SUPPRESS==")  # noqa: SLF001
    flags = {flag: a for a in commands.choices["predict"]._actions for flag in a.option_strings}  # noqa: SLF001
    assert flags["--backend"].choices == list_offered_runtimes()
    assert flags["--key"].complete == "files"
    assert set(commands.choices) == set(MODULES)


def test_completion_without_its_package_or_for_no_shell(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "BASH"]) == 3
    assert 'pip install "cmt-edge[completion]"' in capsys.readouterr().err
    assert main(["--completion", "bsh"]) == 2
    assert "did you mean bash?" in capsys.readouterr().err
