"""What the command lines share: their parser and its flags, and the one place where errors become messages,
exit codes and, with ``--json``, objects."""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypedDict

from cmt_edge.startup import name_program
from cmt_edge.version import __version__

from ..backends import list_offered_runtimes, require_offered
from ..errors import CacheWarning, CmtEdgeError, InputError, OutputError
from ..folding import fold
from ..signals import Stopped, compute_exit_code, get_received, unwound_by_signals
from .output import (
    begin_output,
    discard_output,
    flush_output,
    indent,
    judge_output,
    make_error_json,
    make_output_error,
    say,
    tell,
    tell_error,
)
from .ranges import THREADS

INTERNAL = CmtEdgeError.exit_code
"""Exit code of a failure that is a bug of ours."""

CLOSE = 0.6
"""Similarity, 0 to 1, from which on a known name is offered in place of a misspelled one."""

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

NO_TEMPORARY = "No usable temporary directory"
"""How Python's error begins where no folder for temporary files can be written to."""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints cannot steer the terminal: they quote arguments, and file names are some."""

    words: Sequence[str] = ()
    """The words that are parsed, up to ``--``."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and ``message`` on standard error, and exit with 2. Where that is closed, argparse
        itself would print the usage among the answers."""
        tell(f"{self.format_usage()}{self.prog}: error: {message}")
        if "--json" in self.words:
            say(make_error_json("UsageError", InputError.exit_code, message))
        self.exit(InputError.exit_code)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse does it, but two kinds of words are refused: ``--flag=--``, which argparse takes for a
        list of no values; and an empty word, which a script gives whose variable is not set. As a path it
        would be the current folder, and as ``--data`` it would silently be none."""
        words = [*(sys.argv[1:] if args is None else args)]
        self.words = words[: words.index("--")] if "--" in words else words
        self._require_values()
        found, unknown = self.parse_known_args(words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}{self._suggest(unknown)}")
        return found

    def list_actions(self) -> list[argparse.Action]:
        """Every argument and flag, in the order of ``--help``."""
        return list(self._actions)

    def _require_values(self) -> None:
        """Refuse words that hold no value where one belongs, and flags that do not exist: a misspelled flag
        is told before an argument that is missing because of it."""
        before = ""
        for word in self.words:
            if word.startswith("-") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: '--' is no value")
            if word == "" or (word.startswith("--") and word.find("=") == len(word) - 1):
                self.error(f"{self._name_empty(word or before)} is empty: give a value, or leave it out")
            if word.startswith("--") and " " not in word and not self._knows(word):
                self.error(f"unrecognized arguments: {word}{self._suggest([word])}")
            before = word

    def _knows(self, word: str) -> bool:
        return word.partition("=")[0] in self._option_string_actions

    def _suggest(self, unknown: Sequence[str]) -> str:
        """The flags that look like the first of ``unknown``, for the end of a message."""
        flag = unknown[0].partition("=")[0]
        if not flag.startswith("-"):
            return ""
        asked = f"--{flag.lstrip('-').lower().replace('_', '-')}"
        if valued := [flag for flag, values in self._list_values() if asked[2:] in values]:
            return f"; did you mean {' or '.join(f'{flag} {asked[2:]}' for flag in valued)}?"
        known = [name for name in self._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(asked, known, n=2, cutoff=CLOSE)
        return f"; did you mean {' or '.join(close)}?" if close else f"; {self.prog} --help lists the flags"

    def _list_values(self) -> list[tuple[str, list[str]]]:
        """The flags whose values can be listed, with these."""
        flags = [action for action in self._actions if action.option_strings]
        return [(action.option_strings[-1], list_values(action)) for action in flags]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse does it; the message also names the choices that look like ``value``."""
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as exc:
            known = [choice for choice in action.choices or () if isinstance(choice, str)]
            close = difflib.get_close_matches(str(value).lower(), known, n=2, cutoff=CLOSE)
            if close:
                exc.message += f"; did you mean {' or '.join(close)}?"
            raise

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
        flush_output()
        super().exit(judge_output(status), message)


def list_values(action: argparse.Action) -> list[str]:
    """What an argument can be, as its help lists it: ``{fp32,int8}``; empty where that cannot be listed."""
    shown = action.metavar
    if isinstance(shown, str) and shown.startswith("{"):
        return shown.strip("{}").split(",")
    return [str(choice) for choice in action.choices or ()]


OPTIONS = argparse.Action([], "options", metavar="[options]")
"""What a usage line says of all flags: the groups below list them."""


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Folds a description of one line, and of one of several lines, such as the examples, only those that
    are too long. The usage is one line, not a wall of forty flags."""

    def add_usage(
        self,
        usage: str | None,
        actions: Iterable[argparse.Action],
        groups: Iterable[Any],
        prefix: str | None = None,
    ) -> None:
        positional = [action for action in actions if not action.option_strings]
        super().add_usage(usage, [OPTIONS, *positional], [], prefix)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n" in text:
            return fold(super()._fill_text(text, width, indent), width)
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)


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
        formatter_class=HelpFormatter,
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
        type=str.lower,
        metavar=f"{{{','.join(list_offered_runtimes())}}}",
        help="runtime to use (default: the one of the bundle's format)",
    )
    runtime.add_argument(
        "--device",
        help="the runtime's device (default: CPU; TensorRT: GPU 0); openvino also takes GPU, GPU.1, NPU and"
        " AUTO; onnxruntime cuda, tensorrt, rtx and openvino:GPU; kserve the address HOST:PORT/MODEL",
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


class RuntimeFlags(TypedDict):
    """What the flags of :func:`add_runtime_flags` say, by the names that ``Predictor.load`` has for it."""

    backend: str | None
    device: str | None
    threads: int | None
    trusted_engine: bool


def read_runtime_flags(args: argparse.Namespace) -> RuntimeFlags:
    """The runtime that a user asked for, as arguments of :meth:`~cmt_edge.deploy.Predictor.load`."""
    return {
        "backend": args.backend,
        "device": args.device,
        "threads": args.threads,
        "trusted_engine": args.trust_engine,
    }


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


def run_command(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; every error becomes one message on standard error and its exit code, and a signal that
    asks the process to end becomes 128 and its number."""
    begin_output()
    with unwound_by_signals(interrupt=True), warnings.catch_warnings():
        warnings.simplefilter("always", CacheWarning)
        warnings.showwarning = _show_warning
        return _exit_code(main, args)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Show a warning as a sentence. The place in the code that Python's own way adds, with its source line,
    tells a user nothing."""
    tell(f"warning: {indent(str(message))}")


def _exit_code(main: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    try:
        require_offered(getattr(args, "backend", None))
        code = main(args)
        flush_output()
    except KeyboardInterrupt as exc:
        return _end_interrupted(exc.number if isinstance(exc, Stopped) else signal.SIGINT, args)
    except Exception as exc:
        number = get_received()
        if number is not None:  # what it interrupted made another exception of it
            return _end_interrupted(number, args)
        return _end_failed(exc, args)
    return judge_output(code)


def _end_interrupted(number: int, args: argparse.Namespace) -> int:
    what, code = "interrupted; nothing half-written was left", compute_exit_code(number)
    tell(what)
    if _wants_json(args):
        say(make_error_json("Interrupted", code, what))
    return code


def _end_failed(exc: Exception, args: argparse.Namespace) -> int:
    """Explain an exception on standard error, and with ``--json`` on standard output; its exit code."""
    error = _convert_to_typed(exc)
    if args.verbose or error is None:
        tell(traceback.format_exc().rstrip(), is_folded=False)
    if error is None:
        error = _make_internal_error(exc)
    tell_error(error)
    if _wants_json(args) and not _lost_output(error):
        say(describe_as_json(error))
    return error.exit_code


def _lost_output(error: CmtEdgeError) -> bool:
    """Whether nothing can be answered any more: standard output itself failed, and not a file."""
    return isinstance(error, OutputError) and error.where is None


def _wants_json(args: argparse.Namespace) -> bool:
    return bool(getattr(args, "json", False))


def describe_as_json(error: CmtEdgeError) -> str:
    """An error for ``--json``."""
    return make_error_json(
        type(error).__name__,
        error.exit_code,
        error.what,
        where=error.where,
        why=error.why,
        remedy=error.remedy,
    )


def _make_internal_error(exc: Exception) -> CmtEdgeError:
    """The error for what only a bug of ours can be."""
    return CmtEdgeError(
        f"internal failure: {type(exc).__name__}: {exc}",
        remedy=f"please report it with this trace, and with what {name_program('doctor')} prints",
    )


def _is_nowhere() -> bool:
    """Whether the current folder was deleted."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _explain_missing(exc: OSError) -> CmtEdgeError | None:
    """The error for a place that does not exist, where it is none that the command should have looked for."""
    if _is_nowhere():
        return InputError(
            "the folder that this command was started in does not exist any more",
            remedy="go to a folder that exists (cd), and run the command again",
        )
    if NO_TEMPORARY in str(exc.strerror):
        return OutputError(
            "there is no folder for temporary files that can be written to",
            why=exc.strerror,
            remedy="name one in the variable TMPDIR; in a container mount one: docker run --tmpfs /tmp",
        )
    return None


def _convert_to_typed(exc: Exception) -> CmtEdgeError | None:
    """``exc`` as one of our errors; ``None`` for what only a bug of ours can be."""
    if isinstance(exc, CmtEdgeError):
        return exc
    if not isinstance(exc, OSError):
        return None
    if exc.errno in FULL:
        discard_output()
        return make_output_error(exc, is_lost=True)
    if exc.errno == errno.ENOENT:
        return _explain_missing(exc)
    if exc.errno in UNUSABLE and exc.filename is not None:
        return InputError(
            "cannot be used",
            where=os.fsdecode(exc.filename) if isinstance(exc.filename, bytes) else exc.filename,
            why=exc.strerror,
            remedy="check the name and the permissions",
        )
    return None
