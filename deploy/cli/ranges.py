"""The numbers that flags take: which are possible is written once, and refused before any work."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from ..escaping import SHOWN_CHARACTERS
from ..folders import MAX_ITEMS


@dataclass(frozen=True)
class Range:
    """The numbers from ``least`` to ``most``; with ``above``, ``least`` itself is too small."""

    least: float
    most: float
    above: bool = False

    def find_fault(self, value: float) -> str:
        """What is wrong with ``value``, empty for a number in the range."""
        if isinstance(value, float) and not math.isfinite(value):
            return "is not a finite number"
        if value < self.least or (self.above and value == self.least):
            return "is too small"
        return "is too large" if value > self.most else ""

    def __str__(self) -> str:
        start = (
            f"more than {_write_number(self.least)}, at most"
            if self.above
            else f"{_write_number(self.least)} to"
        )
        return f"{start} {_write_number(self.most)}"

    def parse_whole(self, text: str) -> int:
        """The whole number in ``text``, for ``type=`` of a flag."""
        try:
            value = int(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"{_quote(text)} is not a whole number") from exc
        self._require(value, text)
        return value

    def parse_number(self, text: str) -> float:
        """The number in ``text``, for ``type=`` of a flag."""
        value = parse_finite(text)
        self._require(value, text)
        return value

    def _require(self, value: float, text: str) -> None:
        if fault := self.find_fault(value):
            raise argparse.ArgumentTypeError(f"{_quote(text)} {fault}: give {self}")


THREADS = Range(1, 1024)
"""CPU threads of one inference; no machine that we know of has more."""
WORKERS = Range(1, 100_000)
"""Workers of a cluster."""
SEED = Range(0, 2**64 - 1)
"""Seeds: what fits in 64 bits, as PyTorch takes them."""
IMAGES = Range(1, MAX_ITEMS)
"""A number of images of a collection."""
CLASS_COUNTS = Range(1, 100_000)
"""A number of classes; a manifest could not hold the names of many more."""
BATCH_SIZES = Range(0, 4096)
"""Batch sizes of a graph; 0 stands for any."""
SERVED_BATCHES = Range(1, 4096)
"""The largest batch that a server makes of requests."""
INSTANCES = Range(1, 1024)
"""Copies of a model that a server runs at once."""
MICROSECONDS = Range(0, 10_000_000)
"""Microseconds that a request may wait, up to ten seconds."""
VERSIONS = Range(1, 2**31 - 1)
"""The number of a model's version in a server."""
ITERATIONS = Range(1, 10_000_000)
"""Iterations of a measurement."""
SECONDS = Range(0, 30 * 86400)
"""Seconds of a measurement or a build, up to a month."""
MILLISECONDS = Range(0, 86_400_000, above=True)
"""Milliseconds that an answer may take, up to a day."""
RATES = Range(0.1, 100_000)
"""Images a second that LoadGen asks for: it sleeps between two queries whatever signal comes, and prepares
all of a test before it begins."""
POINTS = Range(0, 100)
"""A loss of top-1 in percentage points."""
DIFFERENCE = Range(0, 1e9)
"""An allowed difference of outputs."""
GIBIBYTES = Range(0, 4096, above=True)
"""Memory of a GPU in GiB."""


def parse_finite(text: str) -> float:
    """The number in ``text``, for ``type=`` of a flag; refuses NaN and infinity, which no flag can mean."""
    try:
        number = float(text)
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{_quote(text)} is not a number") from exc
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{_quote(text)} is not a finite number")
    return number


def _quote(text: str) -> str:
    return repr(text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}...")


def _write_number(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
