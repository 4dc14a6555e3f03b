"""What the command lines share: flags, progress on standard error, one place where errors become exit
codes."""

from __future__ import annotations

import argparse
import math
import os
import sys
import traceback
from collections.abc import Callable

from cmt_edge.version import __version__

from ..errors import CmtEdgeError

INTERNAL = 4
"""Exit code of a failure that is a bug of ours."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT."""


def parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """An argument parser with the flags every command has."""
    p = argparse.ArgumentParser(
        prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--version", action="version", version=f"cmt-edge {__version__}")
    p.add_argument(
        "--json", action="store_true", help="print one machine-readable object last on standard output"
    )
    p.add_argument("-v", "--verbose", action="store_true", help="show the trace of an error")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return p


def add_runtime_flags(p: argparse.ArgumentParser) -> None:
    """``--backend``, ``--device``, ``--threads``."""
    runtime = p.add_argument_group("runtime")
    runtime.add_argument("--backend", help="runtime to use (default: the one of the bundle's format)")
    runtime.add_argument("--device", help="the runtime's device (default: CPU; TensorRT: GPU 0)")
    runtime.add_argument("--threads", type=int, help="CPU threads of one inference (default: all cores)")


def finite(text: str) -> float:
    """The number in ``text``, for ``type=`` of a flag; refuses NaN and infinity, which no flag can mean."""
    try:
        number = float(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from exc
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; every error becomes one message on standard error and its exit code."""
    try:
        return main(args)
    except CmtEdgeError as exc:
        if args.verbose:
            traceback.print_exc()
        print(f"error: {exc}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as exc:
        traceback.print_exc()
        print(f"error: internal failure: {type(exc).__name__}: {exc}", file=sys.stderr)
        print("  remedy: please report it with this trace", file=sys.stderr)
        return INTERNAL
