"""What the command lines share: flags, progress on standard error, one place where errors become exit
codes, and where everything is made safe to print."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import errno
import io
import json
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from cmt_edge.version import __version__

from ..backends import list_offered_runtimes, require_offered
from ..errors import CacheWarning, CmtEdgeError, InputError, OutputError
from ..escaping import escape, escape_line, escape_surrogates
from ..signals import Stopped, compute_exit_code, get_received, unwound_by_signals
from .ranges import THREADS

INTERNAL = 4
"""Exit code of a failure that is a bug of ours."""

ESCAPED = "cmt-edge-escape"
"""Name of the error handler that writes characters which an encoding lacks as JSON does."""

VERSION = f"cmt-edge {__version__}"
"""What ``--version`` prints."""

FULL = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a disk that is full, or of a user who may not use more of it."""

UNUSABLE = (
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EIO,
)
"""Error numbers of a place that the user named and that cannot be used."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints cannot steer the terminal: they quote arguments, and file names are some."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message`` on standard error, and exit with 2. Where that is closed, argparse
        itself would print the usage among the answers."""
        tell(f"{self.format_usage()}{self.prog}: error: {message}")
        self.exit(2)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does it, but two kinds of words are refused: ``--flag=--``, which argparse takes for a
        list of no values; and an empty word, which a script gives whose variable is not set. As a path it
        would be the current folder, and as ``--data`` it would silently be none."""
        words = [*(sys.argv[1:] if args is None else args)]
        before = ""
        for word in words[: words.index("--")] if "--" in words else words:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: '--' is no value")
            if word == "" or (word.startswith("--") and word.find("=") == len(word) - 1):
                self.error(f"{self._name_empty(word or before)} is empty: give a value, or leave it out")
            before = word
        return super().parse_args(args, namespace)

    @staticmethod
    def _name_empty(word: str) -> str:
        """What a message calls an empty value: its flag, if ``word`` is one."""
        return word.rstrip("=") if word.startswith("-") else "an argument"

    def print_help(self, file: Any = None) -> None:
        """Print the help as an answer, which a full standard output does not lose."""
        if file is None:
            say(self.format_help().rstrip("\n"))
        else:
            super().print_help(file)

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Exit; also after ``--help`` a full standard output is an error and no trace."""
        _output.flush()
        super().exit(_judge_output(status), message)


class _ShowVersion(argparse.Action):
    """Prints the version as an answer, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, **more)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        say(VERSION)
        parser.exit()


def make_parser(
    prog: str,
    description: str,
    epilog: str = "",
    *,
    json_help: str = "print one machine-readable object last on standard output",
    verbose_help: str = "show the trace of an error",
) -> Parser:
    """An argument parser with the flags every command has; ``json_help`` says what ``--json`` prints, and
    ``verbose_help`` what ``-v`` shows."""
    p = Parser(
        prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--version", action=_ShowVersion, help="show program's version number and exit")
    p.add_argument("--json", action="store_true", help=json_help)
    p.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help=verbose_help,
    )
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return p


def add_runtime_flags(p: argparse.ArgumentParser) -> None:
    """``--backend``, ``--device``, ``--threads``, ``--trust-engine``."""
    runtime = p.add_argument_group("runtime")
    runtime.add_argument(
        "--backend",
        metavar=f"{{{','.join(list_offered_runtimes())}}}",
        help="runtime to use (default: the one of the bundle's format)",
    )
    runtime.add_argument(
        "--device",
        help="the runtime's device (default: CPU; TensorRT: GPU 0); openvino also takes GPU, GPU.1, NPU and"
        " AUTO; onnxruntime cuda, tensorrt, rtx and openvino:GPU",
    )
    runtime.add_argument(
        "--threads",
        type=THREADS.parse_whole,
        help="CPU threads of one inference (default: all cores)",
    )
    runtime.add_argument(
        "--trust-engine",
        action="store_true",
        help="open the engine that came with a bundle although no signature was checked; an engine is native"
        " code, so whoever made it can do here what you can",
    )


def add_cache_flag(p: argparse.ArgumentParser) -> None:
    """``--no-cache``."""
    p.add_argument(
        "--no-cache",
        action="store_true",
        help="compile the model anew, and keep nothing for the next start",
    )


def add_key_flag(p: argparse.ArgumentParser) -> None:
    """``--key``."""
    p.add_argument(
        "--key",
        type=Path,
        metavar="PUB",
        help="public Ed25519 key, a PEM file: refuse a bundle that is not signed with it",
    )


@dataclass
class _Output:
    """What has become of standard output.

    Attributes:
        failure: why it cannot be written to.
        is_lost: whether a part of the answers was in its buffer then, and stands nowhere.
        has_reader: whether anybody reads there.
    """

    failure: OSError | None = None
    is_lost: bool = False
    has_reader: bool = True

    def reset(self) -> None:
        """Begin a command."""
        self.failure, self.is_lost, self.has_reader = None, False, True

    def write(self, text: str) -> None:
        """Print ``text`` there, or on standard error where that is impossible."""
        if self.failure is None and self.has_reader:
            self._attempt(lambda: print(text, flush=True, file=_open_standard_output()))
        if self.failure is not None:
            tell(text)

    def flush(self) -> None:
        """Write what others have left in its buffer."""
        if sys.stdout is not None and self.failure is None:
            self._attempt(sys.stdout.flush)
            self.is_lost = self.failure is not None

    def _attempt(self, write: Callable[[], None]) -> None:
        """Do something that writes there, and note what came of it."""
        try:
            write()
        except BrokenPipeError:
            self.has_reader = False
            _discard_output()
        except OSError as exc:
            self.failure = exc
            _discard_output()


_output = _Output()
"""The standard output of this process."""


def say(text: str) -> bool:
    """Print an answer on standard output at once; whether anybody reads there.

    A reader that has closed the pipe has seen enough. Where standard output is full, closed or broken, this
    and all further answers go to standard error, so that none is lost; :func:`run_command` then ends with
    an error.
    """
    _output.write(escape(text))
    return _output.has_reader


def answer(text: str) -> int:
    """Print the only answer of a command that does nothing else; returns its exit code."""
    _escape_unknown_characters()
    _output.reset()
    say(text)
    return _judge_output(0)


def say_data(text: str) -> bool:
    """As :func:`say`, for a program that reads the answer: only a terminal gets escapes in place of what
    could steer it. Bytes of a file name that are no UTF-8 are escaped everywhere, because no text can hold
    them."""
    if sys.stdout is None or is_terminal():
        return say(text)
    _output.write(escape_surrogates(text))
    return _output.has_reader


def is_terminal() -> bool:
    """Whether answers are printed on a terminal, which text could steer."""
    return sys.stdout is not None and sys.stdout.isatty()


def tell(text: str) -> None:
    """Print a message on standard error; without one there is nobody to tell."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            print(escape(text), file=sys.stderr, flush=True)


def tell_error(error: CmtEdgeError) -> None:
    """Print an error on standard error: what it quotes of files cannot pretend to be a line of ours."""
    lines = [error.what if error.where is None else f"{escape_line(error.where)}: {error.what}"]
    lines += [f"why: {error.why}"] if error.why else []
    lines += [f"remedy: {error.remedy}"] if error.remedy else []
    tell("\n  ".join(["error: " + _indent(lines[0]), *map(_indent, lines[1:])]))


def _indent(text: str) -> str:
    """``text`` with every line but the first indented below it."""
    return "\n    ".join(text.split("\n"))


def _open_standard_output() -> Any:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    return sys.stdout


def _make_output_error(exc: OSError, is_lost: bool) -> OutputError:
    answer = "a part of the answer is lost" if is_lost else "the answer stands above, on standard error"
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


def run_command(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; every error becomes one message on standard error and its exit code, and a signal that
    asks the process to end becomes 128 and its number."""
    _escape_unknown_characters()
    _output.reset()
    with unwound_by_signals(interrupt=True), warnings.catch_warnings():
        warnings.simplefilter("always", CacheWarning)
        warnings.showwarning = _show_warning
        return _exit_code(main, args)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as a sentence. The place in the code that Python's own way adds, with its source line,
    tells a user nothing."""
    tell(f"warning: {_indent(str(message))}")


def _exit_code(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        require_offered(getattr(args, "backend", None))
        code = main(args)
        _output.flush()
    except KeyboardInterrupt as exc:
        return _end_interrupted(exc.number if isinstance(exc, Stopped) else signal.SIGINT)
    except Exception as exc:
        number = get_received()
        if number is not None:  # what it interrupted made another exception of it
            return _end_interrupted(number)
        return _end_failed(exc, args.verbose)
    return _judge_output(code)


def _judge_output(code: int) -> int:
    """The exit code of what would end with ``code``: a standard output that could not be written to is an
    error, and it is told."""
    if _output.failure is None:
        return code
    tell_error(_make_output_error(_output.failure, _output.is_lost))
    return code or OutputError.exit_code


def _end_interrupted(number: int) -> int:
    tell("interrupted; nothing half-written was left")
    return compute_exit_code(number)


def _end_failed(exc: Exception, verbose: bool) -> int:
    """Explain an exception on standard error; its exit code."""
    error = _convert_to_typed(exc)
    if verbose or error is None:
        tell(traceback.format_exc().rstrip())
    if error is not None:
        tell_error(error)
        return error.exit_code
    tell(f"error: internal failure: {type(exc).__name__}: {_indent(str(exc))}")
    tell("  remedy: please report it with this trace")
    return INTERNAL


def _convert_to_typed(exc: Exception) -> CmtEdgeError | None:
    """``exc`` as one of our errors; ``None`` for what only a bug of ours can be."""
    if isinstance(exc, CmtEdgeError):
        return exc
    if not isinstance(exc, OSError):
        return None
    if exc.errno in FULL:
        _discard_output()
        return _make_output_error(exc, is_lost=True)
    if exc.errno in UNUSABLE and exc.filename is not None:
        return InputError(
            "cannot be used",
            where=os.fsdecode(exc.filename) if isinstance(exc.filename, bytes) else exc.filename,
            why=exc.strerror,
            remedy="check the name and the permissions",
        )
    return None
