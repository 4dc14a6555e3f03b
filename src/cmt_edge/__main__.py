"""``cmt-edge COMMAND ...``, or ``python -m cmt_edge COMMAND ...``: every command of the project.

``cmt-export ...`` is the same as ``cmt-edge export ...``, and so on."""

# ruff: noqa: E402, because nothing may be imported from the working directory
from __future__ import annotations

import os
import sys


def leave_working_directory() -> None:
    """Take the working directory off the import path, where ``python -m`` has put it first: a file such as
    ``openvino.py`` there must not stand for the package of that name."""
    if getattr(sys.flags, "safe_path", False) or sys.flags.isolated:
        return
    try:
        here = os.getcwd()
    except OSError:  # it has been deleted
        return
    if sys.path[:1] in ([""], [here]):
        del sys.path[0]


if __name__ == "__main__":
    leave_working_directory()
    from cmt_edge import startup

    startup.front.append("python -m cmt_edge")
    startup.prepare()

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: the module, inside the package, whose ``main`` runs it.
        group: heading under which it is listed.
        does: what it does.
        has_script: whether ``cmt-NAME`` runs it too.
        only_opens: whether it does nothing with a model but open and run it, see :func:`.startup.lighten`.
    """

    module: str
    group: str
    does: str
    has_script: bool = True
    only_opens: bool = False


MAKE, USE, MACHINE = "make a bundle", "use and check it", "this machine"
"""Headings of the list of commands."""

COMMANDS = {
    "export": Command("export.cli", MAKE, "export a PyTorch model to a verified bundle"),
    "build": Command("deploy.cli.build", MAKE, "finish a TensorRT bundle on its device"),
    "models": Command("export.models", MAKE, "list the models that have a name", has_script=False),
    "predict": Command("deploy.cli.predict", USE, "classify images with a bundle", only_opens=True),
    "verify": Command("deploy.cli.verify", USE, "check a bundle against its reference"),
    "bench": Command("deploy.cli.bench", USE, "measure bundles side by side"),
    "report": Command(
        "deploy.cli.report",
        USE,
        "write what bundles record as one HTML file",
        only_opens=True,
    ),
    "serve-repo": Command(
        "deploy.cli.serve_repo",
        USE,
        "write bundles as a folder for Triton or OpenVINO Model Server",
        has_script=False,
    ),
    "doctor": Command(
        "deploy.cli.doctor",
        MACHINE,
        "what is installed, what runs here, and what is missing",
        has_script=False,
    ),
}
"""Every command by name. Pages and checks of the repository read this table."""

EXAMPLES = """\
examples:
  {front} doctor
  {front} export --model cmt_nano --precision int8 --data synthetic
  {front} predict cmt_nano_int8_openvino ship.jpg
  {front} bench cmt_nano_fp32_openvino cmt_nano_int8_openvino

'{front} COMMAND --help' lists the flags of a command, with examples.
'{front} --completion bash' (or zsh, tcsh) prints what the TAB key needs.
Exit codes: 0 done and verified, 1 a check failed, 2 bad usage or input,
3 a runtime or device is missing, 4 a bug of ours."""
"""What ``--help`` prints last."""

FLAGS = ("--help", "--version", "--completion")
"""What may stand in place of a command."""

CLOSE_FLAG = 0.7
"""Similarity, 0 to 1, from which on a flag is offered in place of a misspelled one."""

CLOSE = 0.5
"""Similarity, 0 to 1, from which on a command is offered in place of a misspelled one."""


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names; returns its exit code."""
    name = arguments[0].lower() if arguments else ""
    if name not in COMMANDS:
        return answer_without_command(arguments)
    from cmt_edge import startup

    command = COMMANDS[name]
    if command.only_opens:
        startup.lighten()
    startup.show_sign(arguments)
    try:
        run = import_module(f".{command.module}", "cmt_edge").main
    finally:
        startup.remove_sign()
    code: int = run(arguments[1:])
    return code


def answer_without_command(arguments: list[str]) -> int:
    """Print what was asked for in place of a command, or that there is no such command; returns the exit
    code."""
    from cmt_edge.deploy.cli.output import answer, make_error_json, tell

    name = arguments[0] if arguments else ""
    if name in {"-h", "--help", "help"}:
        return answer(write_usage())
    if name == "--version":
        from cmt_edge.version import __version__

        return answer(f"cmt-edge {__version__}")
    if name == "--completion":
        return answer_completion(arguments[1:])
    fault = describe_unknown(name)
    tell(f"error: {fault}")
    tell(write_usage())
    if "--json" in arguments:
        answer(make_error_json("UsageError", 2, fault))
    return 2


def answer_completion(arguments: list[str]) -> int:
    """Print what a shell needs to complete commands; returns the exit code."""
    from argparse import Namespace

    from cmt_edge.deploy.cli.completion import show_completion
    from cmt_edge.deploy.cli.console import run_command

    shell = arguments[0].lower() if arguments else ""
    modules = {name: f"cmt_edge.{command.module}" for name, command in COMMANDS.items()}
    try:
        models = import_module("cmt_edge.cmt").list_models()
    except ImportError:  # a device, which exports nothing
        models = []
    options = Namespace(verbose=False, json="--json" in arguments)
    return run_command(lambda _: show_completion(shell, modules, models), options)


def describe_unknown(name: str) -> str:
    """What a message says of a word that is no command."""
    from difflib import get_close_matches

    if not name or name.startswith("-"):
        close = get_close_matches(name.lower(), FLAGS, n=1, cutoff=CLOSE_FLAG)
        if close:
            return f"unknown flag {name!r}; did you mean {close[0]}?"
        return "no command was named" + (f" before {name!r}" if name else "")
    known = COMMANDS | {flag.removeprefix("--"): flag for flag in FLAGS}
    close = get_close_matches(name.lower().removeprefix("cmt-"), known, n=1, cutoff=CLOSE)
    close = [name if name in COMMANDS else f"--{name}" for name in close]
    return f"unknown command {name!r}" + (f"; did you mean {close[0]}?" if close else "")


def write_usage() -> str:
    """What ``--help`` prints."""
    from cmt_edge import startup

    front = startup.front[-1] if startup.front else "cmt-edge"
    lines = [f"usage: {front} COMMAND ..."]
    for group in (MAKE, USE, MACHINE):
        listed = [(name, command) for name, command in COMMANDS.items() if command.group == group]
        lines += ["", f"{group}:", *(f"  {name:<11} {command.does}" for name, command in listed)]
    return "\n".join([*lines, "", EXAMPLES.format(front=front)])


if __name__ == "__main__":
    startup.ended.append(main(sys.argv[1:]))
    sys.exit(startup.ended[-1])
