"""Lets the C++ program and the Predictor classify the same images, and compares their logits.

python examples/cpp/compare.py BUNDLE build/cpp/classify [IMAGE ...]

Without images these are the golden images of the bundle, and PyTorch's logits of them are compared too. The
exit code is 1 if the largest difference is above ``--atol``.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import get_runtime
from cmt_edge.deploy.bundle import GOLDEN, Golden
from cmt_edge.deploy.cli.console import make_parser, run_command
from cmt_edge.deploy.cli.output import say
from cmt_edge.deploy.cli.ranges import parse_finite
from cmt_edge.deploy.errors import BundleError, GateError, InputError
from cmt_edge.deploy.preprocessing import normalise
from cmt_edge.deploy.report import to_json

PRECISIONS = {"fp32": "f32", "bf16": "bf16"}
"""What the Predictor computes float operations in -> the program's word for it."""

TIME_LIMIT_S = 120
"""Seconds after which the program has failed."""


def run_program(program: Path, bundle: Path, batch: np.ndarray, precision: str) -> np.ndarray:
    """The logits ``(N, classes)`` float32 that the C++ program computes of ``(N, 3, H, W)`` float32.

    Raises:
        InputError: it fails.
    """
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "input.f32", Path(name) / "logits.f32"
        batch.astype(np.float32).tofile(source)
        command = [str(program), str(bundle), str(source), str(target), precision]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        except (OSError, subprocess.TimeoutExpired) as exc:
            raise InputError("the program cannot be run", where=program, why=exc, remedy="build it") from exc
        if done.returncode:
            raise InputError(f"the program ended with exit code {done.returncode}", why=done.stderr.strip())
        return np.fromfile(target, np.float32).reshape(len(batch), -1)


def measure(name: str, ours: np.ndarray, theirs: np.ndarray) -> dict[str, object]:
    """How far two sets of logits lie apart."""
    return {
        "beside": name,
        "largest_difference": float(np.abs(ours - theirs).max()),
        "equal_top1": int((ours.argmax(1) == theirs.argmax(1)).sum()),
        "same_bits": ours.tobytes() == theirs.tobytes(),
    }


def compare(args: argparse.Namespace) -> int:
    """Print the differences; returns the exit code."""
    bundle = Bundle.open(args.bundle)
    precision = PRECISIONS[get_runtime("openvino").float_precision(bundle.manifest.precision)]
    with Predictor.load(bundle, backend="openvino") as predictor:
        golden = None
        if args.images:
            batch = predictor.prepare(args.images)
        else:
            golden = Golden.from_file(bundle.file(GOLDEN), predictor.spec.size)
            batch = normalise(golden.pixels, predictor.spec)
        expected = predictor.logits(batch)
    found = run_program(args.program, args.bundle, batch, precision)
    if found.shape != expected.shape:
        raise BundleError(f"the program gives logits of shape {found.shape}, expected {expected.shape}")
    rows = [measure("Predictor", found, expected)]
    rows += [] if golden is None else [measure("PyTorch", found, golden.logits)]
    say(to_json({"images": len(batch), "compared": rows}))
    worst = max(float(str(row["largest_difference"])) for row in rows)
    if not worst <= args.atol:
        raise GateError(f"the logits differ by {worst:.3g}, more than {args.atol:g}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    p = make_parser("compare.py", "Compare the logits of the C++ program with those of the Predictor.")
    p.add_argument("bundle", type=Path)
    p.add_argument("program", type=Path, help="the built program, build/cpp/classify")
    p.add_argument("images", type=Path, nargs="*", help="encoded images (default: the golden ones)")
    p.add_argument(
        "--atol", type=parse_finite, default=1e-4, help="largest difference of a logit (default 1e-4)"
    )
    return run_command(compare, p.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
