"""What commands print, and where: answers on standard output, messages on standard error, all of it safe to
print. It imports next to nothing, so that ``cmt-edge --help`` is quick."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO

from ..errors import CmtEdgeError, OutputError
from ..escaping import escape, escape_line, escape_surrogates
from ..folding import find_terminal_width, fold, read_columns

ESCAPED = "cmt-edge-escape"
"""Name of the error handler that writes characters which an encoding lacks as JSON does."""

COLOURS = {"error": "1;31", "warning": "33", "why": "2", "remedy": "32", "note": "36", "missing": "33"}
"""Word at the beginning of a line, before a colon -> the colour that a terminal shows it in (ECMA-48)."""

COLOURED = re.compile(rf"^([ ]*)({'|'.join(COLOURS)}):", re.MULTILINE)
"""Matches such a word."""


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
            self._attempt(lambda: _print_answer(text))
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
            discard_output()
        except OSError as exc:
            self.failure = exc
            discard_output()


_output = _Output()
"""The standard output of this process."""


def say(text: str) -> bool:
    """Print an answer on standard output at once; whether anybody reads there.

    A reader that has closed the pipe has seen enough. Where standard output is full, closed or broken, this
    and all further answers go to standard error, so that none is lost; the command then ends with an error.
    """
    _output.write(escape(text))
    return _output.has_reader


def say_folded(text: str) -> bool:
    """As :func:`say`, for sentences and tables: what is longer than the terminal's lines is folded."""
    return say(fold(escape(text), find_width()))


def answer(text: str) -> int:
    """Print the only answer of a command that does nothing else; returns its exit code."""
    begin_output()
    say(text)
    return judge_output(0)


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


def find_width() -> int | None:
    """Columns that a table may take: what ``COLUMNS`` says, or the terminal; ``None`` for a file or a pipe,
    which have no width."""
    return read_columns() or find_terminal_width(sys.stdout)


def colour(text: str, stream: IO[str]) -> str:
    """``text``, already escaped, with the words of :data:`COLOURS` in their colours; unchanged unless
    ``stream`` is a terminal that shows colours to a user who wants them (no-color.org)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb" or not stream.isatty():
        return text
    return COLOURED.sub(lambda found: f"{found[1]}\033[{COLOURS[found[2]]}m{found[2]}:\033[0m", text)


def tell(text: str, *, is_folded: bool = True) -> None:
    """Print a message on standard error, on a terminal folded unless it is a trace; without standard error
    there is nobody to tell."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            width = find_terminal_width(sys.stderr) if is_folded else None
            print(colour(fold(escape(text), width), sys.stderr), file=sys.stderr, flush=True)


def tell_error(error: CmtEdgeError) -> None:
    """Print an error on standard error: what it quotes of files cannot pretend to be a line of ours."""
    lines = [error.what if error.where is None else f"{escape_line(error.where)}: {error.what}"]
    lines += [f"why: {error.why}"] if error.why else []
    lines += [f"remedy: {error.remedy}"] if error.remedy else []
    tell("\n  ".join(["error: " + indent(lines[0]), *map(indent, lines[1:])]))


def indent(text: str) -> str:
    """``text`` with every line but the first indented below it."""
    return "\n    ".join(text.split("\n"))


def make_error_json(kind: str, exit_code: int, what: str, **known: str | None) -> str:
    """What ``--json`` prints of an error: one object on one line; ``known``: where, why, remedy."""
    told = {key: known.get(key) for key in ("where", "why", "remedy")}
    error = {"kind": kind, "exit_code": exit_code, "what": what, **told}
    return json.dumps({"error": error}, ensure_ascii=False)


def _print_answer(text: str) -> None:
    if sys.stdout is None:
        raise OSError(errno.EBADF, "it is closed")
    print(colour(text, sys.stdout), file=sys.stdout, flush=True)


def make_output_error(exc: OSError, is_lost: bool) -> OutputError:
    """The error of a standard output that failed; ``is_lost``: a part of the answers stands nowhere."""
    answer = "a part of the answer is lost" if is_lost else "the answer stands above, on standard error"
    return OutputError(
        "standard output cannot be written to",
        why=exc.strerror or exc,
        remedy=f"{answer}; free some space, or send standard output elsewhere",
    )


def discard_output() -> None:
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


def begin_output() -> None:
    """Begin a command: nothing has become of its answers yet, and no name of a class or file fails because
    the terminal's encoding lacks one of its characters."""
    _escape_unknown_characters()
    _output.reset()


def flush_output() -> None:
    """Write what others have left in the buffer of standard output."""
    _output.flush()


def _escape_unknown_characters() -> None:
    """Let no name of a class or file fail because the terminal's encoding lacks one of its characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPED)


def judge_output(code: int) -> int:
    """The exit code of what would end with ``code``: a standard output that could not be written to is an
    error, and it is told."""
    if _output.failure is None:
        return code
    tell_error(make_output_error(_output.failure, _output.is_lost))
    return code or OutputError.exit_code
