"""Small pictures inside a page: SVG that scales with it. Text stands outside, where it stays legible."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ...measure.statistics import Histogram, Latency
from .elements import Markup, make

LENGTH = 100.0
"""Length of a full bar, in the units of its drawing."""
HEIGHT = 100.0
"""Height of the highest column of a histogram, in the units of its drawing."""
LINE = 0.35
"""Width of a line in a histogram, in the units of its drawing."""
FILLED = 0.9
"""Share of a histogram's bin that its column fills."""
SMALLEST_SPAN = 1e-12
"""A scale counts as at least this long, so that it can be divided by."""


def make_key(name: str) -> Markup:
    """A spot in the colour of a plot's mark, before the words that explain it."""
    return make("span", class_=f"key {name}-key", aria_hidden="true")


def draw_bar(share: float, limit: float | None = None) -> Markup:
    """A bar that fills a ``share``, 0 to 1, of its place, with a line at a ``limit``. The figure stands in
    the cell beside it."""
    length = LENGTH * min(max(share, 0.0), 1.0)
    line = [] if limit is None else [_draw_rectangle(LENGTH * limit - 0.25, 0, 0.5, 10, "limit")]
    return _draw_in_cell(_draw_rectangle(0, 2, length, 6), *line)


def draw_interval(
    value: float, interval: tuple[float, float], scale: tuple[float, float], limit: float
) -> Markup:
    """A value and its interval on a scale, with a line at the limit that it must not pass."""
    low, high = scale
    span = max(high - low, SMALLEST_SPAN)

    def place(number: float) -> float:
        return LENGTH * min(max((number - low) / span, 0.0), 1.0)

    first, last = map(place, interval)
    return _draw_in_cell(
        _draw_rectangle(first, 4, max(last - first, 0.5), 2),
        _draw_rectangle(place(value) - 0.5, 1, 1, 8),
        _draw_rectangle(place(limit) - 0.25, 0, 0.5, 10, "limit"),
    )


def draw_histogram(latency: Latency, what: str, scale: tuple[float, float] | None = None) -> Markup:
    """The distribution of a latency with lines at its median and its 95th percentile.

    Args:
        latency: nothing is drawn where its histogram was not recorded.
        what: was timed.
        scale: milliseconds at the left and the right edge; ``None`` for those of the histogram.
    """
    found = latency.histogram
    if found is None or not found.counts:
        return Markup()
    summary = (
        f"{what}: histogram of {latency.count} calls between {found.low:.2f} and {found.high:.2f} ms,"
        f" {found.beyond} beyond; median {latency.p50:.2f} ms, 95th percentile {latency.p95:.2f} ms"
    )
    low, high = scale or (found.low, found.high)
    picture = make(
        "svg",
        *_draw_columns(found, low, high),
        *_draw_marks({"median": latency.p50, "tail": latency.p95}, low, high),
        viewBox=f"0 0 {LENGTH:g} {HEIGHT:g}",
        preserveAspectRatio="none",
        role="img",
        aria_label=summary,
        class_="histogram",
    )
    ticks = (f"{tick:.2f} ms" for tick in (low, (low + high) / 2, high))
    axis = make("div", *(make("span", tick) for tick in ticks), class_="axis", aria_hidden="true")
    caption = make("figcaption", *_explain_histogram(latency, found, what))
    return make("figure", picture, axis, caption)


def _explain_histogram(latency: Latency, found: Histogram, what: str) -> Iterator[str]:
    """What the columns and the lines mean, with the figures of the lines."""
    yield f"{what}: {latency.count} calls"
    if found.beyond:
        yield f", {found.beyond} of them slower than {found.high:.2f} ms and not drawn"
    yield f"; the highest column is {max(found.counts)} calls. "
    yield make("span", make_key("median"), f"median {latency.p50:.2f} ms", class_="unbroken")
    yield " "
    yield make("span", make_key("tail"), f"95th percentile {latency.p95:.2f} ms", class_="unbroken")


def _draw_columns(found: Histogram, low: float, high: float) -> list[Markup]:
    """A column a bin, as high as its count and as wide as its part of the scale, with a small gap."""
    most = max(1, *found.counts)
    width = (found.high - found.low) / len(found.counts)
    unit = LENGTH / max(high - low, SMALLEST_SPAN)
    return [
        _draw_rectangle(
            unit * (found.low + place * width - low),
            HEIGHT * (1 - count / most),
            FILLED * unit * width,
            HEIGHT * count / most,
        )
        for place, count in enumerate(found.counts)
        if count
    ]


def _draw_marks(marks: Mapping[str, float], low: float, high: float) -> list[Markup]:
    """A line at each value that lies within the scale."""
    unit = LENGTH / max(high - low, SMALLEST_SPAN)
    return [
        _draw_rectangle(unit * (value - low) - LINE / 2, 0, LINE, HEIGHT, name)
        for name, value in marks.items()
        if low <= value <= high
    ]


def _draw_in_cell(*marks: Markup) -> Markup:
    """A drawing that fills the width of a cell and that a screen reader skips."""
    return make(
        "svg",
        *marks,
        viewBox=f"0 0 {LENGTH:g} 10",
        preserveAspectRatio="none",
        aria_hidden="true",
        class_="bar",
    )


def _draw_rectangle(x: float, y: float, width: float, height: float, class_: str = "fill") -> Markup:
    numbers = {"x": x, "y": y, "width": width, "height": height}
    return make("rect", class_=class_, **{name: f"{number:.4g}" for name, number in numbers.items()})
