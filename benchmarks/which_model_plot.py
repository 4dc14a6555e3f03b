"""The plots of :mod:`which_model`: published top-1 against latency, with the Pareto front."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from which_model_points import GPU, Point, find_front, list_estimates, list_points

from cmt_edge.deploy.files import write_atomic

OURS, OTHERS, FRONT = "#b8405e", "#4477aa", "#999999"
"""Colours of the models of the registry, of the yardsticks, and of the front."""
DISTANCES = (7, 13, 20, 28, 38)
"""How far from its marker a label may lie, points."""
DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
"""Where from its marker a label may lie."""
MARKER = 9
"""Width of a marker with some room, points."""

LINE = 2
"""Half of the width that the front's line takes, pixels."""
DPI = 130
"""Pixels of an inch."""

Box = tuple[float, float, float, float]
"""Left, bottom, right and top."""


def draw_measured(results: dict[str, Any], path: Path) -> None:
    """A panel for fp32 and one for int8."""
    panels = {precision: list_points(results, precision) for precision in ("fp32", "int8")}
    flags = ", ".join(results["machine"]["flags"])
    machine = f"{results['machine']['cpu']} ({flags}), {results['threads']} threads, batch 1, OpenVINO"
    _draw(
        panels,
        "median latency of one inference, ms",
        f"Published top-1 and measured latency\n{machine}",
        path,
    )


def draw_estimates(results: dict[str, Any], path: Path) -> None:
    """One panel of the estimates."""
    _draw(
        {f"fp16, {GPU}: an estimate, nothing was measured": list_estimates(results)},
        "estimate of one inference by the data sheet, ms",
        "Published top-1 and the estimate from what TensorRT for RTX compiles, batch 1",
        path,
    )


def _draw(panels: dict[str, list[Point]], unit: str, caption: str, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 0.6 + 5.6 * len(panels)), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    everything = [point for points in panels.values() for point in points]
    for panel, (title, points) in zip(axes, panels.items(), strict=True):
        _draw_panel(panel, title, points)
        panel.set_xlim(0.75 * min(p.ms for p in everything), 1.6 * max(p.ms for p in everything))
        panel.set_ylim(min(p.top1 for p in everything) - 1, max(p.top1 for p in everything) + 1)
    axes[-1].set_xlabel(unit, fontsize=9)
    figure.suptitle(caption, fontsize=10)
    figure.canvas.draw()  # lays the panels out: labels need their places
    for panel, points in zip(axes, panels.values(), strict=True):
        _label(figure, panel, points)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix.lstrip(".") or "png", dpi=DPI)
    write_atomic(path, buffer.getvalue())


def _draw_panel(panel: Any, title: str, points: list[Point]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    front = find_front(point for point in points if not point.extra_data)
    xs, ys = [point.ms for point in front], [point.top1 for point in front]
    panel.step(xs, ys, where="post", color=FRONT, linewidth=1.2, zorder=1, label="Pareto front")
    for ours, colour, marker, label in (
        (True, OURS, "o", "hybrids of the registry"),
        (False, OTHERS, "s", "yardsticks"),
    ):
        for extra in (False, True):
            shown = [p for p in points if p.is_ours == ours and p.extra_data == extra]
            panel.plot(
                [p.ms for p in shown],
                [p.top1 for p in shown],
                marker,
                color=colour,
                markersize=5.5,
                fillstyle="none" if extra else "full",
                label=("pre-trained on IN-22k" if extra else label) if shown else None,
                zorder=3,
            )
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.xaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
    panel.tick_params(labelsize=8, labelbottom=True)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_ylabel("published ImageNet-1k top-1, %", fontsize=9)
    panel.set_title(title, loc="left", fontsize=10, fontweight="bold")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(fontsize=8, loc="lower right", frameon=False)


def _label(figure: Any, panel: Any, points: Sequence[Point]) -> None:
    """Name every point where its name covers no marker and no other name; on the front in bold."""
    scale = figure.dpi / 72
    renderer = figure.canvas.get_renderer()
    front = find_front(point for point in points if not point.extra_data)
    spots = {point: tuple(panel.transData.transform((point.ms, point.top1))) for point in points}
    half = MARKER / 2 * scale
    taken: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in spots.values()]
    legend = panel.get_legend().get_window_extent(renderer)
    taken.append((legend.x0, legend.y0, legend.x1, legend.y1))
    taken += list_steps([spots[point] for point in front])
    area = panel.get_window_extent(renderer)
    room = (area.x0, area.y0, area.x1, area.y1)
    for point, spot in sorted(spots.items(), key=lambda item: item[0] not in front):
        text = panel.annotate(
            point.label,
            (point.ms, point.top1),
            (0, 0),
            textcoords="offset points",
            fontsize=7.5,
            color=OURS if point.is_ours else OTHERS,
            fontweight="bold" if point in front else "normal",
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#bbbbbb", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
            zorder=4,
        )
        shift, box = find_place(spot, _measure(text, renderer), taken, room, scale)
        text.set_position((shift[0] / scale, shift[1] / scale))
        taken.append(box)


def _measure(text: Any, renderer: Any) -> tuple[float, float]:
    """Width and height of the words alone, without the line to the marker."""
    from matplotlib.text import Text

    extent = Text.get_window_extent(text, renderer)
    return extent.width, extent.height


def list_steps(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """The boxes of the line that runs right from each corner and then up to the next one."""
    boxes: list[Box] = []
    for (left, low), (right, high) in itertools.pairwise(corners):
        boxes.append((left, low - LINE, right + LINE, low + LINE))
        boxes.append((right - LINE, low, right + LINE, high))
    return boxes


def find_place(
    spot: tuple[float, float],
    size: tuple[float, float],
    taken: Sequence[Box],
    room: Box,
    scale: float = 1.0,
) -> tuple[tuple[float, float], Box]:
    """How far the centre of a label lies from its marker, and the label's box.

    Args:
        spot: centre of the marker, pixels.
        size: width and height of the label, pixels.
        taken: boxes that it must not cover.
        room: the box that it must lie in.
        scale: pixels of a point.

    The nearest free place is taken; where none is free, the one that covers least.
    """
    width, height = size
    tried = []
    for distance in DISTANCES:
        for right, up in DIRECTIONS:
            shift = (
                right * (width / 2 + distance * scale) if right else 0.0,
                up * (height / 2 + distance * scale) if up else 0.0,
            )
            x, y = spot[0] + shift[0], spot[1] + shift[1]
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            covered = sum(_overlap(box, other) for other in taken)
            outside = width * height - _overlap(box, room)
            tried.append((covered + outside, shift, box))
            if covered + outside < 1e-6:
                return shift, box
    _, shift, box = min(tried, key=lambda item: item[0])
    return shift, box


def _overlap(one: Box, other: Box) -> float:
    """The area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
