"""Steps and bars on standard error; silent where that is not a terminal.

Progress is never a reason to fail: what standard error does not take is left out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from .escaping import escape, escape_line
from .folding import find_terminal_width, fold
from .signals import raise_swallowed

if TYPE_CHECKING:
    from tqdm import tqdm


LEAST_SHARE = 0.05
"""The time that is left is told from this share on; less says nothing of the speed."""
LEAST_SECONDS = 2.0
"""The time left is shown after this number of seconds; a shorter step needs no estimate."""


def describe_left(share: float, seconds: float) -> str:
    """The time that is left of a phase of which ``share`` took ``seconds``; empty where nobody can know.

    It supposes that the rest goes at the same speed.
    """
    if share < LEAST_SHARE or share >= 1 or seconds < LEAST_SECONDS:
        return ""
    left = round(seconds * (1 - share) / share)
    return f"about {left // 60} min {left % 60:02d} s left" if left >= 60 else f"about {left} s left"


class Progress:
    """Steps and bars on standard error; silent where that is not a terminal, or ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.off = quiet or sys.stderr is None or not sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._phase = ""
        self._begun = 0.0  # when the phase began, seconds of time.perf_counter
        self._sign = ""  # what a terminal shows until there is a bar

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Announce a step, and its duration once it is done. A signal that was swallowed in it ends it."""
        name, start = escape_line(name), time.perf_counter()
        if not self.off:
            _print(f"{name} ...", end="")
        try:
            yield
            raise_swallowed()
        finally:
            self.finish()
            if not self.off:
                _print(f"\r{name:<34} {time.perf_counter() - start:6.1f} s")

    @contextmanager
    def shown(self, name: str) -> Iterator[None]:
        """Show ``name`` until there is a bar; at the end, also in an error, nothing of it is left."""
        if not self.off:
            self._sign = f"{escape_line(name)} ..."
            _print(self._sign, end="")
        try:
            yield
            raise_swallowed()
        finally:
            self.finish()

    def tell(self, note: str) -> None:
        """Print a note that also logs should hold, unless it is empty or ``quiet``."""
        if note and not self.quiet:
            self.finish()
            _print(fold(f"note: {escape(note)}", find_terminal_width(sys.stderr)))

    def count(self, done: int, total: int) -> None:
        """Progress of a countable step."""
        self.share("", done / max(1, total))

    def share(self, phase: str, share: float) -> None:
        """Progress of a phase, 0 to 1."""
        if not self.off:
            with suppress(OSError):
                self._draw(phase, share)

    def _draw(self, phase: str, share: float) -> None:
        if self._bar is None or phase != self._phase:
            self.finish()
            self._phase, self._begun = phase, time.perf_counter()
            from tqdm import tqdm  # here, because a command that shows no bar need not load it

            self._bar = tqdm(
                total=100,
                desc=escape_line(phase) or None,
                bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}",
                leave=False,
            )
        self._bar.n = round(100 * share)
        self._bar.set_postfix_str(describe_left(share, time.perf_counter() - self._begun), refresh=False)
        self._bar.refresh()

    def finish(self) -> None:
        """Remove the bar, or what stands in its place."""
        if self._sign:
            _print(f"\r{' ' * len(self._sign)}\r", end="")
            self._sign = ""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            with suppress(OSError):
                bar.close()


def _print(text: str, end: str = "\n") -> None:
    """Print safe text on standard error, if there is one that takes it."""
    if sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(text, end=end, file=sys.stderr, flush=True)
