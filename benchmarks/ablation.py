"""What each exact rewrite and each choice of the int8 recipe is worth, each on its own.

    python benchmarks/ablation.py --model cmt_xs --threads 2 --json ablation.json --markdown ablation.md

Rewrites: only this one, against none; and all but this one, against all; in float32 and in bfloat16
(OpenVINO, where the CPU has it).
Recipe: the default with one choice changed, as int8, against the default. Variants are measured in groups
that fit memory, each group interleaved with the same bases, so that a ratio never compares two runs.
``--backend onnxruntime`` measures there (no bfloat16).

A quick look: ``--model cmt_nano --only "scale into q" "inner depthwise float" --iters 20 --seconds 0.2
--warmup 0.1 --calib-size 16``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import tempfile
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import (
    Ratio,
    add_protocol_arguments,
    check_images,
    deviation,
    format_latency,
    format_machine,
    format_ratio,
    logits,
    make_progress,
    open_onnxruntime,
    open_openvino,
    ratio,
    read_protocol,
    say,
    shorten_error,
    step,
)
from torch import nn

from cmt_edge.calib import CalibrationSet
from cmt_edge.calib.quantize import calibrate
from cmt_edge.calib.recipe import DEFAULT, Recipe
from cmt_edge.calib.statistics import Batches, LocalStatistics
from cmt_edge.cmt import find_model, fuse
from cmt_edge.cmt.reference import load_reference
from cmt_edge.deploy.backends import Session
from cmt_edge.deploy.backends.openvino import has_bf16
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.bundle import make_plain
from cmt_edge.deploy.files import write_atomic
from cmt_edge.deploy.measure.benchmark import bind_inference
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.measure.statistics import Latency, summarise
from cmt_edge.deploy.measure.timing import Protocol, time_interleaved
from cmt_edge.deploy.report import format_table
from cmt_edge.export import ExportConfig
from cmt_edge.export.config import OPSET
from cmt_edge.export.to_onnx import export_onnx, set_batch, simplify

NONE, ALL = "none", "all"
"""Names of the variants without any rewrite, and with all of them."""

ONLY, BUT = "only: ", "all but: "
"""Beginnings of the names of the other variants; the name of a rewrite follows."""

DEFAULT_RECIPE, SIGNED = "default recipe", "signed inputs of convs"
"""Names of two recipes that are more than settings: the default, and the one that
OpenVINO reads unchanged."""

IMAGES = 16
"""Generated images on which logits are compared with PyTorch's."""

RECIPES: dict[str, dict[str, Any]] = {
    "not equalized": {"equalize": False},
    "inner depthwise float": {"depthwise": False},
    "attention products int8": {"attention": True},
    "smooth-quant 0.5": {"smooth_quant": 0.5},
    "smooth-quant 0.95": {"smooth_quant": 0.95},
    "no bias correction": {"bias_correction": False},
    "no shifts": {"shift": False},
    "mean ranges": {"range_estimator": "mean_minmax"},
}
"""Names of the rows and what they change in the default recipe."""


@dataclass
class Variant:
    """One graph in one precision; ``rewritten`` as OpenVINO bundles are, ``ratios`` are speed-ups over each
    base, ``note`` says why it was not measured."""

    name: str
    part: str
    precision: str
    graph: Path | None = None
    rewritten: bool = True
    note: str = ""
    nodes: int | None = None
    bytes: int | None = None
    latency: Latency | None = None
    ratios: dict[str, Ratio] = field(default_factory=dict)
    deviation: float | None = None
    executed: str = ""


@dataclass(frozen=True)
class Bench:
    """What all variants have in common; ``truth`` is what PyTorch answers to ``images``."""

    model: nn.Module
    images: np.ndarray
    truth: np.ndarray
    folder: Path
    args: argparse.Namespace
    protocol: Protocol

    def open(self, variant: Variant) -> Session:
        assert variant.graph is not None
        if self.args.backend == "onnxruntime":
            return open_onnxruntime(variant.graph, self.args.threads)
        return open_openvino(variant.graph, self.args.threads, variant.precision, rewritten=variant.rewritten)

    @property
    def precisions(self) -> list[str]:
        return ["fp32", *(["bf16"] if self.args.backend == "openvino" and has_bf16() else [])]


# --- making the graphs ----------------------------------------------------------------------------


def fuse_graph(bench: Bench, without: Collection[str]) -> onnx.ModelProto:
    """The simplified float32 graph with these rewrites left out."""
    return simplify(export_onnx(fuse(bench.model, without=without), bench.images.shape[-1], OPSET))


def store(bench: Bench, graph: onnx.ModelProto, name: str) -> dict[str, Any]:
    """The graph for a batch of one as a file; fields of its :class:`Variant`."""
    path = bench.folder / f"{len(list(bench.folder.iterdir()))}.onnx"
    onnx.save(set_batch(graph, 1), path)
    return {"name": name, "graph": path, "nodes": len(graph.graph.node), "bytes": path.stat().st_size}


def rewrite_graphs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Fields of the variants: none, all, then each rewrite alone and left out."""
    names = [r.name for r in find_model(bench.args.model).rewrites]
    chosen = [n for n in names if not bench.args.only or n in bench.args.only]
    left_out: dict[str, list[str]] = {NONE: names, ALL: []}
    for name in chosen:
        left_out |= {ONLY + name: [n for n in names if n != name], BUT + name: [name]}
    for label, without in left_out.items() if chosen else ():
        with step(f"graph of {label}"):
            try:
                yield store(bench, fuse_graph(bench, without), label)
            except Exception as exc:  # some rewrites need others before them
                yield {"name": label, "note": shorten_error(exc)}
        gc.collect()


def make_recipe_graphs(bench: Bench) -> Iterator[Variant]:
    """The default recipe, each choice changed, and the float graph they are made from."""
    chosen = {
        name: changes for name, changes in RECIPES.items() if not bench.args.only or name in bench.args.only
    }
    signed = bench.args.backend == "openvino" and (not bench.args.only or SIGNED in bench.args.only)
    if not chosen and not signed:
        return
    graph = fuse_graph(bench, ())
    spec = ExportConfig(bench.args.model).preprocess
    data = CalibrationSet.choose(bench.args.data, bench.args.calib_size, spec)
    for name, changes in {DEFAULT_RECIPE: {}, **chosen}.items():
        with step(f"quantize with {name}"):
            recipe: Recipe = replace(DEFAULT, **changes)
            try:  # not quantize: the rules of cmt_edge.calib.lint forbid what some of these choices do
                quantized = calibrate(graph, LocalStatistics(Batches(data, spec, None)), recipe).model
                fields = store(bench, quantized, name)
                yield Variant(part="recipe", precision="int8", **fields)
                if name == DEFAULT_RECIPE and signed:
                    yield Variant(
                        part="recipe", precision="int8", rewritten=False, **(fields | {"name": SIGNED})
                    )
            except Exception as exc:
                yield Variant(name, "recipe", "int8", note=shorten_error(exc))
    fields = store(bench, graph, "not quantized")
    for precision in bench.precisions:
        yield Variant(
            part="recipe", precision=precision, **(fields | {"name": f"not quantized, {precision}"})
        )


# --- measuring ------------------------------------------------------------------------------------


def measure(bench: Bench, variants: Sequence[Variant], bases: Sequence[str], phase: str) -> None:
    """Fill in the figures of ``variants``, in groups with the bases; those are reported over all groups."""
    named = {v.name: v for v in variants if v.graph}
    if missing := [b for b in bases if b not in named]:
        raise SystemExit(
            f"the base {missing[0]!r} cannot be measured:"
            f" {next(v.note for v in variants if v.name == missing[0])}"
        )
    others = [name for name in named if name not in bases]
    size = max(1, bench.args.group)
    groups = [others[i : i + size] for i in range(0, len(others), size)] or [[]]
    pooled: dict[str, list[np.ndarray]] = {base: [] for base in bases}
    for i, group in enumerate(groups):
        samples = run_group(
            bench, [named[n] for n in (*bases, *group)], f"{phase}, group {i + 1} of {len(groups)}"
        )
        for name in group:
            named[name].latency = summarise(samples[name])
            named[name].ratios = {base: ratio(samples[base], samples[name]) for base in bases}
        for base in bases:
            pooled[base].append(samples[base])
        gc.collect()
    whole = {base: np.concatenate(parts) for base, parts in pooled.items()}
    for base in bases:
        named[base].latency = summarise(whole[base])
        named[base].ratios = {b: ratio(whole[b], whole[base]) for b in bases}


def run_group(bench: Bench, variants: Sequence[Variant], phase: str) -> dict[str, np.ndarray]:
    """Nanoseconds of each call, interleaved; deviation and executed precisions on the way."""
    with contextlib.ExitStack() as stack:
        calls = {}
        for v in variants:
            session = bench.open(v)
            stack.callback(session.close)
            if v.deviation is None:
                v.deviation = deviation(logits(session, bench.images), bench.truth)
                v.executed = session.executed(bench.images[:1]).summary()
            calls[v.name] = bind_inference(session, bench.images[:1])
        return time_interleaved(calls, bench.protocol, make_progress(phase))


# --- writing --------------------------------------------------------------------------------------


def rewrite_table(variants: Sequence[Variant], precisions: Sequence[str]) -> str:
    """One line a rewrite: worth alone and cost of leaving it out, for each precision."""
    found = {(v.name, v.precision): v for v in variants}
    names = list(dict.fromkeys(v.name.removeprefix(ONLY) for v in variants if v.name.startswith(ONLY)))
    header = [
        "rewrite",
        *(f"{p}: {what}" for p in precisions for what in ("alone, over none", "left out, over all")),
        "logits off, std",
    ]
    rows = []
    for label in (NONE, ALL):
        of = [found[label, p] for p in precisions]
        rows.append(
            [
                f"{label} of them",
                *(c for v in of for c in (_compare_with(v, NONE), _compare_with(v, ALL))),
                _describe_deviation(of),
            ]
        )
    for name in names:
        pairs = [(found[ONLY + name, p], found[BUT + name, p]) for p in precisions]
        cells = [c for alone, out in pairs for c in (_compare_with(alone, NONE), _compare_with(out, ALL))]
        rows.append([name, *cells, _describe_deviation([v for pair in pairs for v in pair])])
    times = [
        f"- {label} of them, {p}: {format_latency(found[label, p].latency)} ms, {found[label, p].nodes} ONNX"
        " nodes"
        for label in (NONE, ALL)
        for p in precisions
    ]
    return format_table(header, rows, markdown=True) + "\n\n" + "\n".join(times)


def _compare_with(v: Variant, base: str) -> str:
    return format_ratio(v.ratios.get(base))


def _describe_deviation(variants: Sequence[Variant]) -> str:
    """The largest deviation in float32: exact rewrites stay near 1e-6."""
    return max(
        (f"{v.deviation:.1e}" for v in variants if v.deviation is not None and v.precision == "fp32"),
        key=float,
        default="-",
    )


def format_recipe_table(variants: Sequence[Variant]) -> str:
    header = [
        "recipe",
        "p50 ms",
        "over the default (95 % CI)",
        "logits off, std",
        "MB",
        "ONNX nodes",
        "what really ran",
    ]
    rows = []
    for v in variants:
        off, mb = (
            "-" if x is None else f"{x:.{n}g}" for x, n in ((v.deviation, 2), (v.bytes and v.bytes / 1e6, 3))
        )
        rows.append(
            [
                v.name,
                format_latency(v.latency),
                _compare_with(v, DEFAULT_RECIPE),
                off,
                mb,
                str(v.nodes or "-"),
                v.executed or "-",
            ]
        )
    return format_table(header, rows, markdown=True)


def format_markdown(bench: Bench, variants: Sequence[Variant], content: dict[str, Any]) -> str:
    args = bench.args
    parts = [f"# {args.model}, {args.backend}, weights: {args.weights}"]
    rewrites, recipes = ([v for v in variants if v.part == part] for part in ("rewrites", "recipe"))
    if rewrites:
        parts += ["## Exact rewrites", rewrite_table(rewrites, bench.precisions)]
    if recipes:
        parts += ["## Recipe of int8", format_recipe_table(recipes)]
    parts += ["\n".join(f"- {v.name} ({v.precision}) left out: {v.note}" for v in variants if v.note)]
    parts += [
        (
            f"Logits off: mean absolute difference from PyTorch on {IMAGES} generated images, in standard"
            " deviations of the logits."
        ),
        format_machine(content["machine"], content["versions"], args.threads, bench.protocol),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


# --- the command ----------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument(
        "--model", default="cmt_xs", help="any name of cmt-export --list-models whose family has rewrites"
    )
    p.add_argument("--weights", default="random", help="random (default), pretrained or a checkpoint file")
    p.add_argument("--backend", choices=("openvino", "onnxruntime"), default="openvino")
    add_protocol_arguments(p)
    p.add_argument("--only", nargs="+", metavar="NAME", help="these rewrites and recipe rows; default: all")
    p.add_argument(
        "--group", type=int, default=4, help="variants measured at once besides the bases (default 4)"
    )
    p.add_argument("--json", type=Path, help="write everything here")
    p.add_argument("--markdown", type=Path, help="write the tables here too")
    args = p.parse_args()
    known = [r.name for r in find_model(args.model).rewrites] + [*RECIPES, SIGNED]
    if unknown := [n for n in args.only or () if n not in known]:
        p.error(f"unknown: {unknown[0]!r}; choose from: {', '.join(known)}")
    return args


def main() -> None:
    args = parse_arguments()
    model, _ = load_reference(args.model, args.weights)
    images = check_images(ExportConfig(args.model).preprocess, IMAGES)
    truth = logits(TorchSession(model, args.threads), images)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(model, images, truth, Path(folder), args, read_protocol(args))
        variants = ablate(bench)
    content = {
        "machine": make_plain(describe_host()),
        "versions": read_versions(),
        "threads": args.threads,
        "protocol": asdict(bench.protocol),
        "model": args.model,
        "weights": args.weights,
        "backend": args.backend,
        "variants": [asdict(v) for v in variants],
    }
    for entry in content["variants"]:
        del entry["graph"]  # a temporary file
    text = format_markdown(bench, variants, content)
    if args.json:
        write_atomic(args.json, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    if args.markdown:
        write_atomic(args.markdown, text.encode())
    print(text)


def ablate(bench: Bench) -> list[Variant]:
    """All variants, measured."""
    graphs = list(rewrite_graphs(bench))
    variants: list[Variant] = []
    for precision in bench.precisions if graphs else ():
        part = [Variant(part="rewrites", precision=precision, **fields) for fields in graphs]
        measure(bench, part, (NONE, ALL), f"rewrites in {precision}")
        variants += part
    recipes = list(make_recipe_graphs(bench))
    if recipes:
        measure(bench, recipes, (DEFAULT_RECIPE,), "recipe")
        variants += recipes
    for v in variants:
        if v.note:
            say(f"{v.name} ({v.precision}) left out: {v.note}")
    return variants


if __name__ == "__main__":
    main()
