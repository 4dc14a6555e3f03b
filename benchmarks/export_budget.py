"""Time and peak memory of exporting CMT-XS, each precision in a process of its own.

    python benchmarks/export_budget.py [--model cmt_xs] [--calib-size 300]

Budget: fp32 under 30 s, int8 with 300 images under 90 s, peak memory under 4 GB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from cmt_edge.deploy.report import format_table


def measure(arguments: list[str]) -> tuple[float, float]:
    """Wall seconds and peak resident GB of one ``cmt-export``."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", "from cmt_edge.export.cli import main; raise SystemExit(main())", *arguments],
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"cmt-export {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss / 1e6


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="cmt_xs")
    p.add_argument("--calib-size", default="300")
    args = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "bf16", "int8"):
            extra = (
                ["--data", "generated", "--calib-size", args.calib_size, "--no-cache"]
                if precision == "int8"
                else []
            )
            command = [
                "--model",
                args.model,
                "--weights",
                "random",
                "--precision",
                precision,
                "-o",
                folder,
                *extra,
            ]
            seconds, gigabytes = measure(command)
            rows.append([precision, f"{seconds:.1f}", f"{gigabytes:.2f}"])
    print(format_table(["precision", "wall s", "peak GB"], rows, markdown=True))


if __name__ == "__main__":
    main()
