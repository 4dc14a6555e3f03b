"""Where the time of a bundle goes: per-node times of OpenVINO's execution graph, added up by kind of layer,
kernel and precision.

    python benchmarks/node_times.py BUNDLE [BUNDLE ...] --threads 2

Counting costs time itself, so the sum is above the latency that ``cmt-bench`` measures. Nodes that took no
time (views) are left out.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends.openvino import SKIPPED, OpenVINOSession
from cmt_edge.deploy.measure.benchmark import make_golden_batch
from cmt_edge.deploy.report import format_table

ENTRIES = ("layerType", "primitiveType", "runtimePrecision")
"""Entries of OpenVINO's execution graph that are printed for each node."""

REPEATS = 50
"""Profiled inferences."""


def format_rows(path: Path, threads: int) -> list[list[str]]:
    """One line a kind, the slowest first, and the sum."""
    bundle = Bundle.open(path)
    with Predictor.load(bundle.path, threads=threads, cache=False) as predictor:
        session = predictor.session
        if not isinstance(session, OpenVINOSession):
            raise SystemExit(f"{path}: only OpenVINO bundles have an execution graph with times")
        times, known = session.node_times(make_golden_batch(bundle, predictor), REPEATS, ENTRIES)
    kinds: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for node in known[0]:
        kind = tuple(entry[node] for entry in known)
        if kind[0] not in SKIPPED and times[node] > 0:
            kinds[kind].append(1000 * times[node] / REPEATS)
    total = sum(map(sum, kinds.values()))
    ordered = sorted(kinds.items(), key=lambda item: -sum(item[1]))
    found = [
        [*kind, str(len(ms)), f"{sum(ms):.2f}", f"{100 * sum(ms) / total:.0f} %"] for kind, ms in ordered
    ]
    return [*found, ["all", "", "", str(sum(map(len, kinds.values()))), f"{total:.2f}", "100 %"]]


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("bundles", nargs="+", type=Path)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    for path in args.bundles:
        print(f"**{path.name}**, {args.threads} threads\n")
        print(
            format_table(
                ["layer", "kernel", "precision", "nodes", "ms", "share"],
                format_rows(path, args.threads),
                markdown=True,
            ),
            end="\n\n",
        )


if __name__ == "__main__":
    main()
