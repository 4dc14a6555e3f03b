"""What NVIDIA's compiler makes of our graphs and of a plain export, without a GPU.

    pip install "cmt-edge[rtx]"
    python benchmarks/rtx_compile.py [MODEL ...] [--ablation] [--int8] [--json FILE] [--page docs/tensorrt.md]

Each model is exported in float16 as it is (with the compiler's own choice of streams), with the rewrites for
CPUs, and with those for TensorRT for RTX; ``--int8`` adds int8, calibrated on four generated images;
``--ablation`` leaves out, in turn, each rewrite that only TensorRT for RTX gets. Weights are random: kernels
do not depend on them. The compiler tells the kernels of every graph, and the bytes that they read and write.
Nothing is measured. A model takes two to four minutes on two cores, most of it for tracing.

``--page`` writes the table between the two comments of a Markdown page that name this script.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from common import say, step
from torch import nn

from cmt_edge.calib import DEFAULT, CalibrationSet
from cmt_edge.cmt import fuse
from cmt_edge.cmt.spec import CPU, RTX
from cmt_edge.deploy.bundle import make_plain
from cmt_edge.deploy.bundle.sections import CompiledEntry
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.report import format_table
from cmt_edge.deploy.tensorrt.bindings import RTX as PRODUCT
from cmt_edge.export import ExportConfig, steps
from cmt_edge.export.config import OPSET
from cmt_edge.export.rtx import compile_graph
from cmt_edge.export.to_onnx import export_onnx, simplify
from cmt_edge.export.typed import observe, type_graph

MODELS = ("cmt_nano", "cmt_xs", "cvt_13", "convit_tiny", "mvitv2_t", "mvitv1_b16", "xformer_reading")
"""One or two models of each family."""
IMAGES = 4
"""The number of generated images that calibrate."""
PLAIN = "plain export"
"""The graph without any rewrite, and with as many streams as the compiler likes."""
OURS = "ours"
"""The graph with the rewrites for TensorRT for RTX."""
GPU = "RTX 4090"
"""The GPU of the estimate in the table."""
BEGIN, END = "<!-- benchmarks/rtx_compile.py: begin -->", "<!-- benchmarks/rtx_compile.py: end -->"
"""The comments between which a page holds the table."""


@dataclass(frozen=True)
class Row:
    """What the compiler made of one graph of a model."""

    model: str
    graph: str
    compiled: CompiledEntry

    def cells(self) -> list[str]:
        """The cells of the table."""
        found = self.compiled
        estimate = next(e.total_ms for e in found.estimates if e.gpu == GPU)
        return [
            self.model,
            self.graph,
            f"{found.kernel_count} + {found.sync_nodes}",
            f"{found.activation_bytes / 1e6:.1f}",
            f"{found.weight_bytes / 1e6:.1f}",
            f"{found.attention} of {found.attentions}",
            f"{found.engine_bytes / 1e6:.1f}",
            f"{estimate:.2f}",
        ]


HEADER = [
    "model",
    "graph",
    "kernels + signals",
    "activations, MB",
    "weights, MB",
    "attentions fused",
    "engine, MB",
    f"estimate for {GPU}, ms",
]
"""Headings of :meth:`Row.cells`."""


@dataclass(frozen=True)
class TypedGraph:
    """A graph as the compiler gets it.

    Attributes:
        model: its name.
        label: what distinguishes the graph from the model's others.
        content: with the type of every tensor.
        streams: the largest number of streams besides the caller's, ``None`` for the compiler's choice.
    """

    model: str
    label: str
    content: onnx.ModelProto
    streams: int | None


@dataclass(frozen=True)
class Subject:
    """A model with random weights, and its golden images."""

    config: ExportConfig
    reference: steps.Reference

    @classmethod
    def load(cls, name: str) -> Subject:
        config = ExportConfig(name, weights="random", format="rtx", precision="fp16")
        return cls(config, steps.make_reference(config))

    def trace(self, model: nn.Module) -> onnx.ModelProto:
        """The float32 graph of the reference or of a rewritten model."""
        return simplify(export_onnx(model, self.config.img_size, OPSET))

    def type(
        self,
        label: str,
        graph: onnx.ModelProto,
        precision: str = "fp16",
        streams: int | None = PRODUCT.aux_streams,
    ) -> TypedGraph:
        """``graph`` with the type of every tensor."""
        images = np.split(self.reference.batch, len(self.reference.batch))
        typed = type_graph(graph, precision, observe(graph, images)).model
        return TypedGraph(str(self.config.model), f"{label}, {precision}", typed, streams)

    def quantize(self, graph: onnx.ModelProto) -> onnx.ModelProto:
        """``graph`` in int8."""
        spec = self.config.preprocess
        data = CalibrationSet.choose("generated", IMAGES, spec, 0)
        return steps.calibrate_graph(graph, data, spec, DEFAULT, False, lambda *_: None).model


def make_graphs(subject: Subject, int8: bool) -> Iterator[TypedGraph]:
    """The plain export, the graph for CPUs, and ours, in float16; ours in int8, too."""
    model = subject.reference.classifier
    yield subject.type(PLAIN, subject.trace(model), streams=None)
    yield subject.type("rewrites for CPUs", subject.trace(fuse(model, target=CPU)))
    ours = subject.trace(fuse(model, target=RTX))
    yield subject.type(OURS, ours)
    if int8:
        yield subject.type(OURS, subject.quantize(ours), "int8")


def leave_out(subject: Subject) -> Iterator[TypedGraph]:
    """Ours without each rewrite that only TensorRT for RTX gets, in turn."""
    spec = subject.config.spec
    for rewrite in spec.choose_rewrites(RTX):
        if rewrite not in spec.rewrites:
            model = fuse(subject.reference.classifier, target=RTX, without=[rewrite.name])
            yield subject.type(f"{OURS} without {rewrite.name!r}", subject.trace(model))


def compare(name: str, ablation: bool, int8: bool) -> Iterator[Row]:
    """The rows of one model."""
    subject = Subject.load(name)
    for graph in (*make_graphs(subject, int8), *(leave_out(subject) if ablation else ())):
        with step(f"{graph.model}: {graph.label}"):
            compiled = compile_graph(graph.content, 1, Progress(quiet=True), aux_streams=graph.streams)
        row = Row(graph.model, graph.label, compiled)
        say(" | ".join(row.cells()))
        yield row


def write_page(page: Path, table: str) -> None:
    """Put the table between the two comments of a page; raises ``SystemExit`` where they are missing."""
    text = page.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"error: {page} lacks the comments {BEGIN} and {END}")
    before, _, rest = text.partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument("--ablation", action="store_true", help="leave out each rewrite in turn")
    parser.add_argument("--int8", action="store_true", help="also compile int8")
    parser.add_argument("--json", type=Path, help="write every figure there")
    parser.add_argument("--page", type=Path, help="write the table into this Markdown page")
    args = parser.parse_args(argv)
    rows = [row for name in args.models for row in compare(name, args.ablation, args.int8)]
    table = format_table(HEADER, [row.cells() for row in rows], markdown=True)
    print(table)
    if args.json:
        args.json.write_text(json.dumps([make_plain(row) for row in rows], indent=1) + "\n")
    if args.page:
        write_page(args.page, table)


if __name__ == "__main__":
    main()
