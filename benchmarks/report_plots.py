"""Compare the report's own plots with Matplotlib's: bytes in the page, and what drawing them takes.

usage: python benchmarks/report_plots.py [--plots N]

Both draw the same histogram of a latency. Needs the extra ``report``. The seconds are those of the processor,
the import of what draws included.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import files
from pathlib import Path

import numpy as np

from cmt_edge.deploy.measure.statistics import Latency, summarise
from cmt_edge.deploy.report import format_table

SAMPLES = 2000
"""Calls whose latencies are drawn."""
PIXELS_PER_INCH = 96
"""Of a browser."""


def draw_own(latency: Latency) -> str:
    """The histogram as reports draw it."""
    from cmt_edge.deploy.report.html.charts import draw_histogram

    return draw_histogram(latency, "model alone")


def draw_matplotlib(latency: Latency) -> str:
    """The same by Matplotlib, with text as text, for the width of a page."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    found = latency.histogram
    assert found is not None
    figure, axes = plt.subplots(figsize=(960 / PIXELS_PER_INCH, 128 / PIXELS_PER_INCH))
    edges = np.linspace(found.low, found.high, len(found.counts) + 1)
    axes.bar(edges[:-1], found.counts, width=np.diff(edges), align="edge")
    axes.axvline(latency.p50)
    axes.axvline(latency.p95)
    written = io.StringIO()
    figure.savefig(written, format="svg")
    plt.close(figure)
    return written.getvalue()


def measure_installed(package: str) -> float:
    """Megabytes of an installed package's files."""
    paths = [Path(str(file.locate())) for file in files(package) or ()]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def measure(name: str, draw: Callable[[Latency], str], latency: Latency, plots: int) -> list[str]:
    """A row: bytes of a plot, seconds of the first and of a further one, colours that it fixes."""
    begun = time.process_time()
    drawn = draw(latency)
    first = time.process_time() - begun
    begun = time.process_time()
    for _ in range(plots):
        draw(latency)
    further = (time.process_time() - begun) / plots
    colours = len(set(re.findall(r"#[0-9a-f]{6}", drawn)))
    return [name, f"{len(drawn) / 1e3:.1f}", f"{first:.3f}", f"{further:.4f}", str(colours)]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--plots", type=int, default=10, help="further plots that are timed (default 10)")
    options = parser.parse_args(arguments)
    samples = np.random.default_rng(0).gamma(4.0, 1e6, SAMPLES)
    latency = summarise(samples.astype(np.int64))
    rows = [
        measure("own", draw_own, latency, options.plots),
        measure("Matplotlib", draw_matplotlib, latency, options.plots),
    ]
    print(format_table(["drawn by", "kB", "first, s", "further, s", "fixed colours"], rows))
    print(f"Matplotlib installed: {measure_installed('matplotlib'):.0f} MB without what it needs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
