"""What int8 is worth in ONNX Runtime, beside float32 of the same model and the setting that widens products.

    python benchmarks/onnxruntime_int8.py cmt_xs_fp32_onnx cmt_xs_int8_onnx --batch 1 8 0 --threads 2 1

Both bundles are of ``cmt-edge export --format onnx``. Every graph holds for every batch size, so only the
dimension of the input is changed; 0 is a graph for any batch size, which answers one image. "Widened" is with
``session.x64quantprecision``, which bundles demand whose sums may exceed 16 bits; it changes nothing on
processors with VNNI. ``--former`` adds an int8 bundle of another version. Latencies are interleaved; ratios
above 1 are faster than float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from common import (
    check_images,
    deviation,
    format_ratio,
    logits,
    make_progress,
    ratio,
    read_protocol,
)

from cmt_edge.deploy.backends import LoadOptions
from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession
from cmt_edge.deploy.bundle import ONNX, Bundle
from cmt_edge.deploy.measure.benchmark import Protocol, bind_inference, time_interleaved
from cmt_edge.deploy.measure.statistics import NS_PER_MS
from cmt_edge.deploy.report import format_table

ANY = "batch"
"""Name of the first dimension of graphs for any batch size."""

IMAGES = 8
"""The number of images whose logits are compared: batch sizes must divide it."""

FLOAT, INT8, WIDENED, FORMER = "fp32", "int8", "int8, widened", "int8, former"
"""Names of the rows."""


def set_batch(path: Path, batch: int) -> bytes:
    """The graph of a bundle for another batch size."""
    model = onnx.load(path)
    for value in (*model.graph.input, *model.graph.output):
        first = value.type.tensor_type.shape.dim[0]
        first.Clear()
        if batch:
            first.dim_value = batch
        else:
            first.dim_param = ANY
    del model.graph.value_info[:]
    return model.SerializeToString()


def compare(
    bundles: Sequence[Bundle], batch: int, threads: int, images: np.ndarray, protocol: Protocol
) -> list[tuple[str, ...]]:
    """A line a row: batch, threads, name, medians and best calls in milliseconds, ratios, distance.

    ``bundles``: in float32 and in int8, and another one in int8 if there is one.
    """
    options = LoadOptions(threads=threads)
    graphs = [set_batch(bundle.file(ONNX), batch) for bundle in bundles]
    sessions = {
        FLOAT: OnnxRuntimeSession(graphs[0], options),
        INT8: OnnxRuntimeSession(graphs[1], options, "int8", fits_16_bits=True),
        WIDENED: OnnxRuntimeSession(graphs[1], options, "int8"),
    }
    for graph in graphs[2:]:
        sessions[FORMER] = OnnxRuntimeSession(graph, options, "int8", fits_16_bits=True)
    size = batch or 1
    calls = {name: bind_inference(session, images[:size]) for name, session in sessions.items()}
    truth = logits(sessions[FLOAT], images, size)
    samples = time_interleaved(calls, protocol, make_progress(f"batch {batch}, {threads} threads"))
    rows = []
    for name, taken in samples.items():
        best = samples[FLOAT].min() / taken.min()
        off = "-" if name == FLOAT else f"{deviation(logits(sessions[name], images, size), truth):.4f}"
        times = (f"{np.median(taken) / NS_PER_MS:.2f}", f"{taken.min() / NS_PER_MS:.2f}")
        ratios = (format_ratio(ratio(samples[FLOAT], taken)), f"{best:.2f}")
        rows.append((str(batch or "any"), str(threads), name, *times, *ratios, off))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("floats", type=Path, help="bundle of --format onnx --precision fp32")
    parser.add_argument("ints", type=Path, help="bundle of the same model, --precision int8")
    parser.add_argument("--former", type=Path, help="another int8 bundle of the model, of another version")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="batch sizes, 0 for any (1)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2], help="CPU threads (default 2)")
    parser.add_argument("--iters", type=int, default=60, help="least number of timed calls (default 60)")
    parser.add_argument("--seconds", type=float, default=2, help="least time of each row (default 2)")
    parser.add_argument("--warmup", type=float, default=0.5, help="warm-up of each, seconds (default 0.5)")
    args = parser.parse_args()
    paths = [args.floats, args.ints, *([args.former] if args.former else [])]
    bundles = [Bundle.open(path) for path in paths]
    images = check_images(bundles[0].preprocess, IMAGES)
    head = ("batch", "threads", "row", "median ms", "best ms", "speed-up", "best calls", "logits off, std")
    for batch in args.batch:
        for threads in args.threads:
            found = compare(bundles, batch, threads, images, read_protocol(args))
            print(format_table(head, found), flush=True)


if __name__ == "__main__":
    main()
