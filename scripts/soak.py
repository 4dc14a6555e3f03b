"""Shows that Predictors keep flat in memory and descriptors, and that many threads get the answers of one.

    python scripts/soak.py BUNDLE [--backend NAME] [--predictions N] [--loads N] [--rounds N] [--json]

Three parts, each of which is left out with 0. ``--rounds`` times, 32 threads predict 256 distinct inputs in
both modes, and every answer must equal that of a single thread bit for bit. ``--predictions`` are made by
``--threads`` threads with one Predictor. The bundle is loaded, used and closed ``--loads`` times. The last
two parts are repeated with a leak, which must be found: otherwise the measurement proves nothing. It needs
Linux. The exit code is 0 if all of that held.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

from cmt_edge.deploy import Bundle, Predictor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.load import (
    BUSY,
    Growth,
    Work,
    answers_of,
    answers_of_threads,
    distinct_batches,
    distinct_images,
    leaking,
    loading,
    predicting,
    soak,
)

PREDICTIONS_MAY_TAKE = 5 << 20
"""The most bytes by which all the predictions together may grow the process: 262 each of 20,000."""
LOADS_MAY_TAKE = 12 << 20
"""The most bytes by which all the loads together may grow the process: 63 thousand each of 200."""
CONTROL_LEAK = 4
"""How often the control leaks what a step may take."""
CONTROL_PART = 2
"""The number of steps of the run for which the control takes one."""
EACH = 128
"""Distinct inputs of each kind, images and batches."""


def main() -> int:
    """Run the parts; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", type=Path)
    p.add_argument("--backend", help="openvino or onnxruntime (default: the one of the bundle's format)")
    p.add_argument("--predictions", type=int, default=20_000)
    p.add_argument("--threads", type=int, default=BUSY, help="threads that make the predictions")
    p.add_argument("--loads", type=int, default=200)
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--json", action="store_true", help="print one JSON object a part")
    args = p.parse_args()
    broken = 0
    for name, run in list_parts(args):
        start = time.monotonic()
        figures = run()
        figures = {"part": name, **figures, "seconds": round(time.monotonic() - start, 1)}
        broken += bool(figures["complaint"])
        print(json.dumps(figures) if args.json else format_figures(figures), flush=True)
    return 1 if broken else 0


def format_figures(figures: dict) -> str:
    """One line for a part."""
    return ", ".join(f"{name} {value}" for name, value in figures.items() if value != "")


def list_parts(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict]]]:
    """Name of each part that was asked for, and what runs it."""
    bundle = Bundle.open(args.bundle)
    images = bundle.golden().sources
    backend = args.backend
    if args.rounds:
        for throughput in (False, True):
            mode = "throughput" if throughput else "latency"
            yield f"threads, {mode}", lambda t=throughput: compare(bundle, backend, t, args.rounds)
    if args.predictions:
        with Predictor.load(bundle, backend=backend) as predictor:
            work = predicting(predictor, images)
            run = args.predictions, PREDICTIONS_MAY_TAKE, args.threads
            yield "predictions", lambda: watch(work, *run)
            yield "predictions with a leak", lambda: run_control(work, *run)
    if args.loads:
        loads = loading(args.bundle, backend, images[0])
        yield "loads", lambda: watch(loads, args.loads, LOADS_MAY_TAKE)
        yield "loads with a leak", lambda: run_control(loads, args.loads, LOADS_MAY_TAKE)


def compare(bundle: Bundle, backend: str | None, throughput: bool, rounds: int) -> dict:
    """Answers of 32 threads against those of one."""
    with Predictor.load(bundle, backend=backend, throughput=throughput) as predictor:
        inputs = distinct_batches(EACH, predictor.spec.size) + distinct_images(EACH)
        expected = answers_of(predictor, inputs)
        different = 0
        for _ in range(rounds):
            answers = answers_of_threads(predictor, inputs)
            different += sum(a != e for a, e in zip(answers, expected, strict=True))
    complaint = "answers differ" if different or len(set(expected)) != len(expected) else ""
    return {"answers": rounds * len(inputs), "different": different, "complaint": complaint}


def watch(work: Work, steps: int, may_take: int, threads: int = 1) -> dict:
    """The growth of a run, and whether it is within the allowed number of bytes."""
    return describe_growth(soak(work, steps, threads), may_take / steps)


def run_control(work: Work, steps: int, may_take: int, threads: int = 1) -> dict:
    """As :func:`watch`, of work that leaks memory: only its absence is complained of."""
    most = may_take / steps
    with closing(leaking(work, bytes_a_step=int(CONTROL_LEAK * most))) as leaky:
        figures = describe_growth(soak(next(leaky), steps // CONTROL_PART, threads), most)
    return {**figures, "complaint": "" if figures["complaint"] else "the leak was not found"}


def describe_growth(growth: Growth, most_bytes: float) -> dict:
    """The figures of a run, with the number of bytes that a step may take."""
    return {
        "steps": growth.steps,
        "bytes_a_step": round(growth.bytes_a_step, 1),
        "at_most": round(most_bytes, 1),
        "descriptors_a_step": round(growth.descriptors_a_step, 4),
        "complaint": growth.complaint(most_bytes),
    }


if __name__ == "__main__":
    sys.exit(main())
