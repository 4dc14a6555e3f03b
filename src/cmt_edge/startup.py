"""How a command begins. It imports next to nothing, so that Ctrl-C in the first moments prints no trace.

The console scripts start here: ``cmt-edge`` is :func:`edge`, ``cmt-export`` is :func:`export`, and so on.
"""

from __future__ import annotations

import atexit
import os
import sys
import time

TYPE_CHECKING = False
"""What checkers of types take for true."""

if TYPE_CHECKING:
    import signal
else:
    # The same functions; ``signal`` itself imports seven more modules for the names of numbers.
    import _signal as signal  # noqa: PLC2701

ENDED_BY = ("SIGINT", "SIGTERM", "SIGHUP")
"""Names of the signals that ask the process to end; a system may lack some."""

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""Environment variable of NumPy's matrix products, and its value for a command that computes none. Otherwise
the threads are started all the same, and wait busily while the command starts."""
CONVERTERS = ("openvino.tools.ovc",)
"""Packages that convert models. OpenVINO imports this one with itself where it can, which takes as long as
the rest of its import; a command that only opens models has no use for it."""

began_s: list[float] = []
"""When this process began to be a command, seconds of ``time.perf_counter``; empty where it is none."""

ended: list[int] = []
"""The exit code of the command that this process has run; empty until then, and where it is no command."""

front: list[str] = []
"""What the user types before the name of a command, ``"cmt-edge"`` for instance; empty where the commands
have names of their own, ``cmt-export``."""

OWN_SCRIPTS = ("export", "predict", "verify", "bench", "build", "report")
"""Commands that are also installed under a name of their own, ``cmt-export``."""
STANDARD_STREAMS = (0, 1, 2)
"""Descriptors of standard input, standard output and standard error."""
STANDARD_ERROR = STANDARD_STREAMS[-1]
"""Descriptor of standard error."""
SIGN = b"start ..."
"""What a terminal shows while a command is imported. It stays on its line, and is removed after that."""
QUIET = ("-q", "--quiet")
"""Words of a command line that ask for no progress."""

sign: list[bytes] = []
"""What stands on the terminal now, at most one; see :func:`show_sign`."""


def edge() -> int:
    """``cmt-edge``."""
    front.append("cmt-edge")
    return run(sys.argv[1:])


def export() -> int:
    """``cmt-export``."""
    return run(["export", *sys.argv[1:]])


def predict() -> int:
    """``cmt-predict``."""
    return run(["predict", *sys.argv[1:]])


def verify() -> int:
    """``cmt-verify``."""
    return run(["verify", *sys.argv[1:]])


def bench() -> int:
    """``cmt-bench``."""
    return run(["bench", *sys.argv[1:]])


def build() -> int:
    """``cmt-build``."""
    return run(["build", *sys.argv[1:]])


def report() -> int:
    """``cmt-report``."""
    return run(["report", *sys.argv[1:]])


def name_program(command: str) -> str:
    """What the user types for a command, in usage lines, examples, remedies and next steps: the same as for
    the command that runs now."""
    if front:
        return f"{front[-1]} {command}"
    return f"cmt-{command}" if command in OWN_SCRIPTS else f"cmt-edge {command}"


def run(arguments: list[str]) -> int:
    """Run ``python -m cmt_edge`` with these arguments in this process; its exit code."""
    prepare()
    from importlib import import_module

    code: int = import_module("cmt_edge.__main__").main(arguments)
    ended.append(code)
    return code


def prepare() -> None:
    """What every command does first."""
    began_s.append(time.perf_counter())
    atexit.register(end_without_freeing)  # before all others, so that it is called after them
    end_at_once_on_signals()
    occupy_closed_descriptors()


def end_without_freeing() -> None:
    """End the process with the code of the command that it has run, if any: everything has been written, and
    the system takes the memory. Python would look for garbage and free every object, which among those of
    torch takes a second or two, in which a command that was done, or interrupted, still seems to work."""
    if not ended:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        return  # Python tells it
    os._exit(ended[-1])


def lighten() -> None:
    """Start less than usual, for a command that only opens models. Call it before NumPy is imported.

    NumPy starts no threads, unless the user has said how many, and converters of models are not imported.
    """
    for name, value in ONE_THREAD.items():
        os.environ.setdefault(name, value)
    for package in CONVERTERS:
        # Python then says that there is no such package.
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]


def occupy_closed_descriptors() -> None:
    """Open nothing in place of each standard stream that is closed. Otherwise the next file that is opened
    gets its number, and a library that writes messages there writes into that file."""
    for descriptor in STANDARD_STREAMS:
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number, which is this one


def end_at_once_on_signals() -> None:
    """From now on SIGINT, SIGTERM and SIGHUP end the process at once and without a word: a command that only
    imports has nothing to clean up. A signal that is ignored stays ignored (``nohup``)."""
    for name in ENDED_BY:
        number = getattr(signal, name, None)
        if number is None:
            continue
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end_at_once)


def end_at_once(number: int, frame: object) -> None:
    """The handler of a signal: end with 128 and its number."""
    remove_sign()
    os._exit(128 + number)


def show_sign(arguments: list[str]) -> None:
    """Show on a terminal that a command has started, unless ``arguments`` ask for no progress: what a command
    imports before it can show its own progress takes some tenths of a second."""
    if began_s and os.isatty(STANDARD_ERROR) and not any(word in QUIET for word in arguments):
        sign.append(SIGN)
        write_on_terminal(SIGN)


def remove_sign() -> None:
    """Remove what :func:`show_sign` has shown; nothing happens where it has shown nothing. It is also called
    while a signal is handled, where Python's buffered streams must not be used."""
    if sign:
        write_on_terminal(b"\r" + b" " * len(sign.pop()) + b"\r")


def write_on_terminal(text: bytes) -> None:
    """Write to standard error past its buffer; a terminal that is gone takes nothing, which is no failure."""
    try:  # noqa: SIM105, because contextlib would be imported first
        os.write(STANDARD_ERROR, text)
    except OSError:
        pass
