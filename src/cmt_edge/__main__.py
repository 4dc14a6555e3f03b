"""``python -m cmt_edge COMMAND ...``: the same commands as ``cmt-COMMAND``."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {
    "export": "export.cli",
    "predict": "deploy.cli.predict",
    "verify": "deploy.cli.verify",
    "bench": "deploy.cli.bench",
    "build": "deploy.cli.build",
}
"""Command -> the module whose ``main`` runs it."""

USAGE = f"""\
usage: python -m cmt_edge {{{",".join(COMMANDS)}}} ...

  export    export a PyTorch model to a verified bundle
  predict   classify images with a bundle
  verify    check a bundle against its reference
  bench     measure bundles side by side
  build     finish a TensorRT bundle on its device

'python -m cmt_edge COMMAND --help' lists the flags of a command."""


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
        print(f"error: unknown command {name!r}" if name else "error: no command was named", file=sys.stderr)
        print(USAGE, file=sys.stderr)
        return 2
    run = import_module(f".{COMMANDS[name]}", "cmt_edge").main
    code: int = run(arguments[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
