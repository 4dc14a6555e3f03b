"""Time and peak memory of exporting CMT-XS, each precision in a process of its own.

    python benchmarks/export_budget.py [--model cmt_xs] [--calib-size 300] [--rounds 1]

"first" begins with an empty cache; "again" is the same export once more, "other" the same weights for ONNX
Runtime. Medians of rounds, in each of which every precision has its turn. Budget of the first: fp32 under
30 s, int8 with 300 images under 90 s, peak memory under 4 GB.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from common import make_environment

from cmt_edge.deploy.report import format_table

PRECISIONS = ("fp32", "bf16", "int8")
"""In the order of the table."""
RUNS = {"first": "openvino", "again": "openvino", "other": "onnx"}
"""Column -> format of the bundle, in the order of the runs."""


def measure(arguments: list[str], folder: str) -> tuple[float, float]:
    """Wall seconds and peak resident GB of one ``cmt-export`` whose cache lies in ``folder``."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from cmt_edge.export.cli import main; raise SystemExit(main())", *arguments],
        stdout=subprocess.DEVNULL,
        env=make_environment(CMT_EDGE_CACHE=f"{folder}/cache", CMT_EDGE_STATE=f"{folder}/state"),
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"cmt-export {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def measure_all(model: str, precision: str, calib_size: str) -> dict[str, tuple[float, float]]:
    """:data:`RUNS` -> seconds and GB, with a cache that is empty before the first."""
    data = ["--data", "generated", "--calib-size", calib_size] if precision == "int8" else []
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for run, form in RUNS.items():
            if form == "onnx" and precision == "bf16":  # which ONNX Runtime has not on a CPU
                continue
            command = ["--model", model, "--weights", "random", "--precision", precision, "--format", form]
            found[run] = measure([*command, *data, "--quiet", "-o", folder], folder)
    return found


def show(found: list[dict[str, tuple[float, float]]]) -> list[str]:
    """The cells of a row: the seconds of each run, how much of the first the second takes, the most GB."""
    seconds = {run: statistics.median(one[run][0] for one in found) for run in found[0]}
    peak = max(gigabytes for one in found for _, gigabytes in one.values())
    shown = [f"{seconds[run]:.1f}" if run in seconds else "-" for run in RUNS]
    return [*shown, f"{seconds['again'] / seconds['first']:.2f}", f"{peak:.2f}"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="cmt_xs")
    p.add_argument("--calib-size", default="300")
    p.add_argument("--rounds", type=int, default=1)
    p.add_argument("--only", nargs="+", default=PRECISIONS, choices=PRECISIONS, metavar="PRECISION")
    args = p.parse_args()
    rounds = [
        {precision: measure_all(args.model, precision, args.calib_size) for precision in args.only}
        for _ in range(args.rounds)
    ]
    rows = [[precision, *show([one[precision] for one in rounds])] for precision in args.only]
    heads = ["precision", *(f"{run} s" for run in RUNS), "again, ratio", "peak GB"]
    print(format_table(heads, rows, markdown=True))


if __name__ == "__main__":
    main()
