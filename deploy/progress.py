"""Steps and bars on standard error; silent where that is not a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm


class Progress:
    """Steps and bars on standard error; silent where that is not a terminal, or ``quiet``."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.off = quiet or sys.stderr is None or not sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
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
                print(
                    f"\r{name:<34} {time.perf_counter() - start:6.1f} s",
                    file=sys.stderr,
                    flush=True,
                )

    def tell(self, note: str) -> None:
        """Print a note that also logs should hold, unless it is empty or ``quiet``."""
        if note and not self.quiet:
            self.finish()
            print(f"note: {note}", file=sys.stderr, flush=True)

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
                total=100,
                desc=phase or None,
                bar_format="{desc} {percentage:3.0f}%|{bar:20}| {elapsed}",
                leave=False,
            )
        self._bar.n = round(100 * share)
        self._bar.refresh()

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
