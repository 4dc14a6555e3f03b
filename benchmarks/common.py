"""What ``peers.py`` and ``ablation.py`` share.

It loads no PyTorch when it is imported: children that only run a model must stay small.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.backends import LoadOptions, Session
from cmt_edge.deploy.measure.statistics import Latency, compare_medians
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.preprocessing import decode_pixels, normalise
from cmt_edge.deploy.report import describe_protocol

CHECK_SEED = 91
"""Of the images on which logits are compared: other ones than those for calibration."""
MARGIN = 1.3
"""How much larger than the model's input the images are."""

Ratio = tuple[float, float, float]
"""A ratio of medians and the two ends of its 95 % interval."""


def say(text: str) -> None:
    """Progress, on standard error."""
    print(text, file=sys.stderr, flush=True)


def make_environment(**others: str) -> dict[str, str]:
    """The environment of a program that is started to be measured, with ``others`` besides.

    Python keeps the compiled modules there, as an installation does. Where ``PYTHONDONTWRITEBYTECODE``
    forbids it, every start compiles those of a checkout anew, which takes a tenth of a second.
    """
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return kept | others


@contextmanager
def step(text: str) -> Iterator[None]:
    """Announce a step when it starts and its duration when it is done."""
    say(f"{text} ...")
    start = time.perf_counter()
    yield
    say(f"{text}: {time.perf_counter() - start:.1f} s")


def make_progress(phase: str) -> Callable[[float], None]:
    """A progress callback that says a line every tenth of the way."""
    said = 0

    def progress(share: float) -> None:
        nonlocal said
        if int(10 * share) > said:
            said = int(10 * share)
            say(f"{phase}: {10 * said} %")

    return progress


def add_protocol_arguments(parser: argparse.ArgumentParser) -> None:
    """``--threads``, ``--iters``, ``--seconds``, ``--warmup`` and the calibration images."""
    default = Protocol()
    parser.add_argument(
        "--threads", type=int, default=2, help="CPU threads of one inference, in every runtime (default 2)"
    )
    parser.add_argument(
        "--iters", type=int, default=default.iters, help=f"least number of timed calls ({default.iters})"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=default.seconds,
        help=f"least time of each variant, seconds ({default.seconds:g})",
    )
    parser.add_argument(
        "--warmup", type=float, default=default.warmup_seconds, help="warm-up of each, seconds (1)"
    )
    parser.add_argument(
        "--data",
        default="generated",
        help="calibration images: a folder, ARCHIVE.tar, or generated (default)",
    )
    parser.add_argument(
        "--calib-size",
        type=int,
        help="number of calibration images (default 300, or all where there are fewer)",
    )


def read_protocol(args: argparse.Namespace) -> Protocol:
    return Protocol(args.iters, args.seconds, warmup_seconds=args.warmup)


def check_images(spec: Preprocess, count: int) -> np.ndarray:
    """Generated images, preprocessed: float32 ``(count, 3, S, S)``."""
    from cmt_edge.calib.generated import generate

    sources = generate(count, round(MARGIN * spec.size), seed=CHECK_SEED)
    return normalise(np.stack([decode_pixels(source, spec) for source in sources]), spec)


def logits(session: Session, images: np.ndarray, size: int = 1) -> np.ndarray:
    """In batches of ``size`` images, which divides their number: float32 ``(N, classes)``."""
    parts = [images[i : i + size] for i in range(0, len(images), size)]
    return np.concatenate([_take_first(session.run(part)) for part in parts])


def _take_first(outputs: Any) -> np.ndarray:
    return outputs if isinstance(outputs, np.ndarray) else outputs[0]


def deviation(ours: np.ndarray, reference: np.ndarray) -> float:
    """Mean absolute difference of logits ``(N, classes)`` in standard deviations of the reference's."""
    return float(np.abs(ours - reference).mean() / reference.std(axis=1).mean())


def ratio(base: np.ndarray, other: np.ndarray) -> Ratio:
    """Speed of ``other`` over ``base`` (above 1 is faster) from samples in nanoseconds, as
    ``cmt-bench`` computes it."""
    value, low, high = compare_medians(base, other)
    return value, low, high


def open_openvino(
    model: Path, threads: int, precision: str | None, throughput: bool = False, rewritten: bool = True
) -> Session:
    """OpenVINO on the CPU; ``precision`` is ``"fp32"``, ``"bf16"`` or ``"int8"`` as in bundles, ``None`` the
    runtime's own choice.

    An ONNX file is ``rewritten`` as in bundles.
    """
    from cmt_edge.deploy.backends.openvino import RUNTIME, OpenVINOSession
    from cmt_edge.deploy.backends.openvino_core import open_core
    from cmt_edge.deploy.backends.openvino_devices import HINTS
    from cmt_edge.deploy.backends.openvino_graph import read

    config: dict[str, Any] = {
        "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = HINTS[RUNTIME.float_precision(precision)]

    def read_model() -> Any:
        return read(model) if rewritten else open_core().read_model(model)

    compiled = open_core().compile_model(read_model(), "CPU", config)
    return OpenVINOSession(compiled, read_model, "CPU", config)


def open_onnxruntime(model: Path, threads: int, throughput: bool = False) -> Session:
    """ONNX Runtime on the CPU with the settings that bundles get."""
    from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession

    return OnnxRuntimeSession(model, LoadOptions(threads=threads, throughput=throughput))


def format_ratio(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2f} ({value[1]:.2f}-{value[2]:.2f})"


def format_latency(latency: Latency | None) -> str:
    return "-" if latency is None else f"{latency.p50:.2f}"


def format_machine(
    host: dict[str, Any],
    versions: dict[str, str],
    threads: int,
    protocol: Protocol,
    batch: str = "batch 1",
) -> str:
    """The line under a table: what was measured on, with and how."""
    named = ", ".join(
        f"{k} {versions[k]}" for k in ("openvino", "nncf", "onnxruntime", "torch") if k in versions
    )
    return (
        f"{host['cpu']}, {host['cores']} cores ({', '.join(host['flags']) or 'no flags of note'}); {named};"
        f" threads: {threads}; {batch}; {describe_protocol(protocol)}."
    )


def shorten_error(exc: BaseException, limit: int = 240) -> str:
    """An exception in one line."""
    text = " ".join(line.strip() for line in str(exc).splitlines() if line.strip())
    return f"{type(exc).__name__}: {text}"[:limit]
