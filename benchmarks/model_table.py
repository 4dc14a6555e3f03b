"""The table of models in docs/models.md: figures of the registry, and what rewriting and precision make of
each model on this machine.

    python benchmarks/model_table.py [NAME ...] [--threads 2] [--output docs/models.md]

Random weights, generated calibration images; latencies are interleaved medians at batch 1, so trust the
ratios. Without names all models below 12 GMACs are measured; the others appear with their figures only.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import onnx

from cmt_edge.cmt import create_model, find_model, list_models
from cmt_edge.cmt.spec import ModelSpec
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.backends.openvino import has_bf16
from cmt_edge.deploy.bundle import ONNX, Bundle
from cmt_edge.deploy.files import write_atomic
from cmt_edge.deploy.measure.benchmark import benchmark
from cmt_edge.deploy.measure.host import describe_host
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.report import format_table
from cmt_edge.export import ExportConfig
from cmt_edge.export.config import OPSET
from cmt_edge.export.pipeline import finish
from cmt_edge.export.preparation import prepare
from cmt_edge.export.to_onnx import export_onnx, simplify

GIANT_MACS = 12e9
"""Models with more multiply-adds than this are not measured."""

CALIBRATED_ON = 8
"""Images; enough for latencies, which do not depend on ranges."""

HEADER = [
    "model",
    "input",
    "M params",
    "GMACs",
    "published top-1 %",
    "ONNX nodes, plain",
    "rewritten",
    "MB fp32 / int8",
    "fp32 ms",
    "bf16",
    "int8",
]
"""Heads of the table."""


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("names", nargs="*")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--output", type=Path)
    args = p.parse_args()
    rows = []
    for name in list_models():
        spec = find_model(name)
        measured = name in args.names if args.names else (spec.macs or 0) < GIANT_MACS
        rows.append(format_figures(spec) + (measure(spec, args.threads) if measured else ["-"] * 6))
        print(f"{name} done", file=sys.stderr, flush=True)
        gc.collect()
    sources = sorted({f"- {spec.family}: {spec.source}" for spec in map(find_model, list_models())})
    text = "\n".join(
        [
            format_table(HEADER, rows, markdown=True),
            "",
            *sources,
            "",
            f"Machine: {describe_host().cpu}, {args.threads} threads.",
        ]
    )
    if args.output:
        write_atomic(args.output, (PREFACE + text + "\n").encode())
    print(text)


PREFACE = f"""# Models

Made by `python benchmarks/model_table.py --output docs/models.md`. "bf16" and "int8" are speed-ups against
our fp32 (OpenVINO, batch 1, interleaved, random weights); models above {GIANT_MACS / 1e9:g} GMACs are not
measured.

"""
"""What stands above the table."""


def format_figures(spec: ModelSpec) -> list[str]:
    return [
        spec.name,
        str(spec.img_size),
        f"{(spec.params or 0) / 1e6:.2f}",
        f"{(spec.macs or 0) / 1e9:.2f}",
        spec.top1 or "-",
    ]


def export_both(name: str, folder: str, threads: int) -> list[Bundle]:
    """The model as fp32 and int8, traced once."""
    config = ExportConfig(
        name,
        "openvino",
        "int8",
        weights="random",
        data="generated",
        calib_size=CALIBRATED_ON,
        output=folder,
        threads=threads,
    )
    progress = Progress(quiet=True)
    prepared = prepare(config, progress)
    plain = replace(config, precision="fp32", data=None, calib_size=None)
    return [finish(chosen, prepared, None, progress) for chosen in (plain, config)]


def measure(spec: ModelSpec, threads: int) -> list[str]:
    model = create_model(spec.name)
    randomize(model)
    plain = len(simplify(export_onnx(model, spec.img_size, OPSET)).graph.node)
    with tempfile.TemporaryDirectory() as folder:
        fp32, int8 = export_both(spec.name, folder, threads)
        rewritten = len(onnx.load(fp32.file(ONNX)).graph.node)
        bf16 = Bundle(fp32.path, replace(fp32.manifest, precision="bf16"))  # the same files, another demand
        bundles = [fp32, *([bf16] if has_bf16() else []), int8]
        result = benchmark(bundles, threads=threads, protocol=Protocol(50, 3.0), with_throughput=False)
        sizes = [b.path.joinpath("model.onnx").stat().st_size / 1e6 for b in bundles]
    ratios = {r.precision: f"{r.ratio:.2f}" for r in result.results}
    return [
        str(plain),
        str(rewritten),
        f"{sizes[0]:.1f} / {sizes[-1]:.1f}",
        f"{result.results[0].model.p50:.2f}",
        ratios.get("bf16", "-"),
        ratios["int8"],
    ]


if __name__ == "__main__":
    main()
