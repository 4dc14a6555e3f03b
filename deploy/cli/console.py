"""What the command lines share: flags, progress on standard error, one place where errors become exit
codes."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import io
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmt_edge.version import __version__

from ..errors import CacheWarning, CmtEdgeError, OutputError

INTERNAL = 4
"""Exit code of a failure that is a bug of ours."""
INTERRUPTED = 130
"""Exit code after Ctrl-C: 128 and the number of SIGINT."""

ESCAPED = "cmt-edge-escape"
"""Name of the error handler that writes characters which an encoding lacks as JSON does."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk that is full, or of a user who may not use more of it."""


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
        "--json",
        action="store_true",
        help="print one machine-readable object last on standard output",
    )
    p.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show the trace of an error",
    )
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return p


def add_runtime_flags(p: argparse.ArgumentParser) -> None:
    """``--backend``, ``--device``, ``--threads``."""
    runtime = p.add_argument_group("runtime")
    runtime.add_argument(
        "--backend",
        help="runtime to use (default: the one of the bundle's format)",
    )
    runtime.add_argument(
        "--device",
        help="the runtime's device (default: CPU; TensorRT: GPU 0)",
    )
    runtime.add_argument(
        "--threads",
        type=int,
        help="CPU threads of one inference (default: all cores)",
    )


def add_key_flag(p: argparse.ArgumentParser) -> None:
    """``--key``."""
    p.add_argument(
        "--key",
        type=Path,
        metavar="PUB",
        help="public Ed25519 key, a PEM file: refuse a bundle that is not signed with it",
    )


def finite(text: str) -> float:
    """The number in ``text``, for ``type=`` of a flag; refuses NaN and infinity, which no flag can mean."""
    try:
        number = float(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from exc
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def say(text: str) -> None:
    """Print an answer on standard output at once.

    A reader that has closed the pipe has seen enough. Where standard output cannot be written to, the answer
    goes to standard error, so that it is not lost.

    Raises:
        OutputError: standard output is full, closed or broken.
    """
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "it is closed")
        print(text, flush=True)
    except BrokenPipeError:
        _discard_output()
    except OSError as exc:
        _discard_output()
        tell(text)
        raise _unwritable_output(exc, "the answer stands above, on standard error") from exc


def tell(text: str) -> None:
    """Print a message on standard error; without one there is nobody to tell."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def _unwritable_output(exc: OSError, answer: str) -> OutputError:
    return OutputError(
        "standard output cannot be written to",
        why=exc.strerror or exc,
        remedy=f"{answer}; free some space, or send standard output elsewhere",
    )


def _discard_output() -> None:
    """Send to nowhere what standard output still holds, so that Python does not fail on it at its end."""
    if sys.stdout is not None:
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _escape(error: UnicodeError) -> tuple[str, int]:
    """What stands for characters that an output's encoding lacks: their escapes in JSON, so that JSON stays
    JSON."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


codecs.register_error(ESCAPED, _escape)


def _escape_unknown_characters() -> None:
    """Let no name of a class or file fail because the terminal's encoding lacks one of its characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


def run(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; every error becomes one message on standard error and its exit code."""
    _escape_unknown_characters()
    with warnings.catch_warnings():
        warnings.simplefilter("always", CacheWarning)
        warnings.showwarning = _show_warning(warnings.showwarning)
        return _exit_code(main, args)


def _show_warning(others: Callable[..., None]) -> Callable[..., None]:
    """What shows our own warnings as sentences, and leaves ``others`` as they are."""

    def show(
        message: Warning | str,
        category: type[Warning],
        *place: Any,
        **more: Any,
    ) -> None:
        if issubclass(category, CacheWarning):
            tell(f"warning: {message}")
        else:
            others(message, category, *place, **more)

    return show


def _exit_code(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        code = main(args)
        _flush_output()
        return code
    except CmtEdgeError as exc:
        if args.verbose:
            traceback.print_exc()
        tell(f"error: {exc}")
        return exc.exit_code
    except KeyboardInterrupt:
        tell("interrupted; nothing half-written was left")
        return INTERRUPTED
    except BrokenPipeError:
        _discard_output()
        return 0
    except Exception as exc:
        if isinstance(exc, OSError) and exc.errno in FULL:
            _discard_output()
            tell(f"error: {_unwritable_output(exc, 'a part of the answer is lost')}")
            return OutputError.exit_code
        traceback.print_exc()
        tell(f"error: internal failure: {type(exc).__name__}: {exc}")
        tell("  remedy: please report it with this trace")
        return INTERNAL


def _flush_output() -> None:
    """Write what is left of the answers; raises :class:`OutputError`."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
    except OSError as exc:
        _discard_output()
        raise _unwritable_output(exc, "a part of the answer is lost") from exc
