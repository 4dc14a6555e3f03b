"""``python -m cmt_edge COMMAND ...``: the same commands as ``cmt-COMMAND``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module


@dataclass(frozen=True)
class Command:
    """The module, inside the package, whose ``main`` runs a command, and what it does."""

    module: str
    does: str


COMMANDS = {
    "export": Command("export.cli", "export a PyTorch model to a verified bundle"),
    "predict": Command("deploy.cli.predict", "classify images with a bundle"),
    "verify": Command("deploy.cli.verify", "check a bundle against its reference"),
    "bench": Command("deploy.cli.bench", "measure bundles side by side"),
    "build": Command("deploy.cli.build", "finish a TensorRT bundle on its device"),
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
    if name in ("-h", "--help"):
        print(USAGE)
        return 0
    if name == "--version":
        from cmt_edge import __version__

        print(f"cmt-edge {__version__}")
        return 0
    if name not in COMMANDS:
        print(
            f"error: unknown command {name!r}" if name else "error: no command was named",
            file=sys.stderr,
        )
        print(USAGE, file=sys.stderr)
        return 2
    run = import_module(f".{COMMANDS[name].module}", "cmt_edge").main
    code: int = run(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
