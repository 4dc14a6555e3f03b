"""``python -m cmt_edge COMMAND ...``: the same commands as ``cmt-COMMAND``."""

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

    startup.prepare()

from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """A command.

    Attributes:
        module: the module, inside the package, whose ``main`` runs it.
        does: what it does.
        only_opens: whether it does nothing with a model but open and run it, see :func:`.startup.lighten`.
    """

    module: str
    does: str
    only_opens: bool = False


COMMANDS = {
    "export": Command("export.cli", "export a PyTorch model to a verified bundle"),
    "predict": Command("deploy.cli.predict", "classify images with a bundle", only_opens=True),
    "verify": Command("deploy.cli.verify", "check a bundle against its reference"),
    "bench": Command("deploy.cli.bench", "measure bundles side by side"),
    "build": Command("deploy.cli.build", "finish a TensorRT bundle on its device"),
    "report": Command("deploy.cli.report", "write what bundles record as one HTML file", only_opens=True),
}
"""Every command by name. Pages and checks of the repository read this table."""

LISTING = "\n".join(f"  {name:<9} {command.does}" for name, command in COMMANDS.items())
"""What ``--help`` prints of the commands."""

USAGE = f"""\
usage: python -m cmt_edge {{{",".join(COMMANDS)}}} ...

{LISTING}

'python -m cmt_edge COMMAND --help' lists the flags of a command."""
"""What ``--help`` prints."""


def main(arguments: list[str]) -> int:
    """Run the command that the first argument names; returns its exit code."""
    name = arguments[0] if arguments else ""
    if name not in COMMANDS:
        return answer_without_command(name)
    from cmt_edge import startup

    command = COMMANDS[name]
    if command.only_opens:
        startup.lighten()
    run = import_module(f".{command.module}", "cmt_edge").main
    code: int = run(arguments[1:])
    return code


def answer_without_command(name: str) -> int:
    """Print what was asked for in place of a command, or that ``name`` is none; returns the exit code."""
    from cmt_edge.deploy.cli.console import VERSION, answer, tell

    answers = {"-h": USAGE, "--help": USAGE, "--version": VERSION}
    if name in answers:
        return answer(answers[name])
    tell(f"error: unknown command {name!r}" if name else "error: no command was named")
    tell(USAGE)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
