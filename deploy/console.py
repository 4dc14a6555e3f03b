"""What the command lines share: flags, progress on standard error, one place where errors become exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

from tqdm import tqdm

from .errors import CmtEdgeError

INTERNAL = 4
INTERRUPTED = 130


def version() -> str:
    """Version of the installed distribution."""
    try:
        return metadata.version("cmt-edge")
    except metadata.PackageNotFoundError:
        return "unknown (not installed)"


def parser(prog: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """An argument parser with the flags every command has."""
    p = argparse.ArgumentParser(
        prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("--version", action="version", version=f"cmt-edge {version()}")
    p.add_argument("--json", action="store_true", help="print one machine-readable object last on standard output")
    p.add_argument("-v", "--verbose", action="store_true", help="show the trace of an error")
    p.add_argument("-q", "--quiet", action="store_true", help="no progress")
    return p


def add_runtime_flags(p: argparse.ArgumentParser) -> None:
    """``--backend``, ``--device``, ``--threads``."""
    p.add_argument("--backend", help="runtime to use (default: the one of the bundle's format)")
    p.add_argument("--device", help="the runtime's device (default: CPU; TensorRT: GPU 0)")
    p.add_argument("--threads", type=int, help="CPU threads of one inference (default: all cores)")


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
        print(
            f"error: internal failure: {type(exc).__name__}: {exc}\n  remedy: please report it with this trace", file=sys.stderr
        )
        return INTERNAL


class Progress:
    """Steps and bars on standard error; silent where that is not a terminal, or ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.off = quiet or not sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._phase = ""

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step, and its duration once it is done."""
        start = time.perf_counter()
        if not self.off:
            print(f"{name} ...", end="", file=sys.stderr, flush=True)
        try:
            yield
        finally:
            self.finish()
            if not self.off:
                print(f"\r{name:<34} {time.perf_counter() - start:6.1f} s", file=sys.stderr, flush=True)

    def count(self, done: int, total: int) -> None:
        """Progress of a countable step."""
        self.share("", done / max(1, total))

    def share(self, phase: str, share: float) -> None:
        """Progress of a phase, 0 to 1."""
        if self.off:
            return
        if self._bar is None or phase != self._phase:
            self.finish()
            self._phase = phase
            self._bar = tqdm(
                total=100, desc=phase or None, bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}", leave=False
            )
        self._bar.n = round(100 * share)
        self._bar.refresh()

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
