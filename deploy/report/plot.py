"""Results as pictures."""

from __future__ import annotations

import io
from pathlib import Path

from ..errors import RuntimeMissingError
from ..escaping import escape_line
from ..files import write_output
from ..measure.benchmark import Benchmark

LONGEST_NAME = 48
"""Characters of the longest name beside a bar; a longer one would leave no room for the bars."""


def draw_latency_plot(result: Benchmark, path: Path) -> None:
    """Horizontal bars of p50 with whiskers to p95, model only, written as PNG or SVG.

    Raises:
        RuntimeMissingError: matplotlib is not installed.
    """
    require_matplotlib()
    from matplotlib.figure import Figure

    results = list(reversed(result.results))
    figure = Figure(figsize=(8, 1.2 + 0.6 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    p50 = [r.model.p50 for r in results]
    upper = [r.model.p95 - r.model.p50 for r in results]
    rows = range(len(results))  # two bundles may have the same name
    bars = axes.barh(
        rows,
        p50,
        xerr=[[0.0] * len(p50), upper],
        color="#4477aa",
        capsize=3,
    )
    names = [_shorten(escape_line(r.name)) for r in results]
    axes.set_yticks(rows, labels=names, parse_math=False)  # a name such as $x^$ is no formula
    axes.bar_label(
        bars,
        [f"{v:.2f} ms" for v in p50],
        label_type="center",
        color="white",
    )
    axes.set_xlabel("latency of one inference, ms (bar: median; whisker: 95th percentile)")
    axes.set_title(escape_line(result.host.cpu), parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    image_format = path.suffix.lower().lstrip(".") or "png"
    figure.savefig(buffer, format=image_format, dpi=120)
    write_output(path, buffer.getvalue())


def _shorten(name: str) -> str:
    """``name``, without its middle where it is too long."""
    if len(name) <= LONGEST_NAME:
        return name
    half = (LONGEST_NAME - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def require_matplotlib() -> None:
    """Raise :class:`RuntimeMissingError` where nothing here can draw."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as exc:
        raise RuntimeMissingError(
            "plots need matplotlib",
            remedy='pip install "cmt-edge[report]"',
        ) from exc
