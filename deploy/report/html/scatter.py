"""The plot of what was lost against the time that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .elements import Markup, join, make

WIDTH, HEIGHT = 320.0, 200.0
"""Size of the drawing in its own units, which are nearly pixels on a phone."""
LEFT, RIGHT, TOP, BOTTOM = 40.0, 16.0, 12.0, 22.0
"""Margins around the points, which hold the figures of the axes."""
NUMBER = 11.0
"""Height of a number, and the least distance of two of them, in the units of the drawing."""
FEWEST = 2
"""Fewer points make no plot."""


@dataclass(frozen=True)
class Point:
    """A bundle or a candidate: median latency in milliseconds, and drop in points with its interval."""

    name: str
    latency: float
    drop: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class _Axes:
    """The latency at the right edge, whose left one is 0, and the drops at the two ends of the other axis."""

    slowest: float
    low: float
    high: float

    def find_x(self, latency: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * latency / self.slowest

    def find_y(self, drop: float) -> float:
        share = (drop - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def draw_scatter(points: Sequence[Point], limit: float, what: str) -> Markup:
    """Points by latency and loss, with a line at the allowed loss; numbers stand for the names below.

    Args:
        points: measured in the same run; nothing is drawn of fewer than :data:`FEWEST`.
        limit: the allowed drop, points.
        what: the drop is called.
    """
    if len(points) < FEWEST:
        return Markup()
    ends = [limit, 0.0, *(end for point in points for end in point.interval)]
    axes = _Axes(max(point.latency for point in points) or 1.0, min(ends), max(ends) or 1.0)
    summary = f"{what} against median latency; left is faster, lower loses less; the line is what is allowed"
    picture = make(
        "svg",
        *_draw_axes(axes, limit),
        *(_draw_point(axes, point) for point in points),
        *_write_numbers(axes, points),
        viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}",
        role="img",
        aria_label=summary,
        class_="scatter",
    )
    names = ", ".join(f"{number} {point.name}" for number, point in enumerate(points, 1))
    return make("figure", picture, make("figcaption", f"{summary}: {names}"))


def _draw_axes(axes: _Axes, limit: float) -> list[Markup]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    return [
        _draw_rectangle(LEFT, TOP, 0.5, bottom - TOP, "axis-line"),
        _draw_rectangle(LEFT, bottom, right - LEFT, 0.5, "axis-line"),
        _draw_rectangle(LEFT, axes.find_y(limit) - 0.5, right - LEFT, 1, "limit"),
        _write(LEFT - 4, bottom, f"{axes.low:+.2f}", "end"),
        _write(LEFT - 4, TOP + 8, f"{axes.high:+.2f}", "end"),
        _write(LEFT, HEIGHT - 6, "0 ms", "start"),
        _write(right, HEIGHT - 6, f"{axes.slowest:.2f} ms", "end"),
    ]


def _draw_point(axes: _Axes, point: Point) -> Markup:
    """A dot with its interval."""
    x, y = axes.find_x(point.latency), axes.find_y(point.drop)
    low, high = map(axes.find_y, point.interval)
    return join(
        [
            _draw_rectangle(x - 0.6, high, 1.2, low - high, "fill"),
            make("circle", cx=f"{x:.2f}", cy=f"{y:.2f}", r="4", class_="fill"),
        ]
    )


def _write_numbers(axes: _Axes, points: Sequence[Point]) -> list[Markup]:
    """The number of each dot, on the side that has room; one that would lie on another moves away."""
    taken: list[tuple[float, float]] = []
    for point in points:
        x, y = axes.find_x(point.latency), axes.find_y(point.drop) - 3
        side = 1.0 if y > HEIGHT / 2 else -1.0  # to the middle, where there is room
        while any(abs(x - left) < NUMBER and abs(y - top) < NUMBER for left, top in taken):
            y -= side * NUMBER
        taken.append((x, y))
    return [
        _write(x + (-7 if x > WIDTH / 2 else 7), y, str(number), "end" if x > WIDTH / 2 else "start")
        for number, (x, y) in enumerate(taken, 1)
    ]


def _draw_rectangle(x: float, y: float, width: float, height: float, class_: str) -> Markup:
    numbers = {"x": x, "y": y, "width": width, "height": height}
    return make("rect", class_=class_, **{name: f"{number:.2f}" for name, number in numbers.items()})


def _write(x: float, y: float, text: str, anchor: str) -> Markup:
    return make("text", text, x=f"{x:.2f}", y=f"{y:.2f}", text_anchor=anchor)
