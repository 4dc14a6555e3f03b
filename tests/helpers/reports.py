"""What the HTML reports are tested on: bundles with everything that a page shows, and pages of them."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
from PIL import Image

from cmt_edge.deploy.backends.profile import NodeRun, Profile
from cmt_edge.deploy.bundle.sections import (
    DataCheck,
    ExecutedPrecision,
    GoldenCheck,
    Host,
    LatencyEntry,
    LayerError,
    RanOn,
    VerificationEntry,
)
from cmt_edge.deploy.measure.benchmark import Benchmark, Measured
from cmt_edge.deploy.measure.breakdown import break_down
from cmt_edge.deploy.measure.flipped import FlippedImage
from cmt_edge.deploy.measure.memory import Memory
from cmt_edge.deploy.measure.stages import Stages
from cmt_edge.deploy.measure.statistics import summarise
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.report.html import Subject, make_subject
from helpers.bundles import tiny_manifest


def check(**changes) -> DataCheck:
    made = DataCheck(1000, 90.0, 90.2, 99.0, 0.2, (-0.3, 0.7), 1.0, True, "torch", 0.5, 0.01)
    return replace(made, **changes)


def subject(data: DataCheck | None = None, *, passed: bool = True, name: str = "tiny", **changes) -> Subject:
    """A bundle of trained weights that was verified and measured."""
    golden = GoldenCheck(5, 0, 0.1 if passed else 9.0, 0.5, passed)
    latency = LatencyEntry(
        p50_ms=2.5,
        ci_ms=(2.4, 2.6),
        p95_ms=3.0,
        end_to_end_p50_ms=4.0,
        batch=1,
        threads=None,
        executed=ExecutedPrecision({"int8": 0.75, "fp32": 0.25}, {"int8": 3, "fp32": 9}, 0.1, "a runtime"),
        warnings=("it drifted",),
    )
    verification = VerificationEntry(
        bundle=name,
        precision="fp32",
        runtime=RanOn("fake 1", "CPU"),
        golden=golden,
        data=data,
        notes=(data.doubt,) if data and data.doubt else (),
        passed=passed and (data is None or data.passed),
        steps={"onnx": 1e-6},
    )
    manifest = tiny_manifest(**{"verification": verification, "latency": latency} | changes)
    model = manifest.model
    trained = replace(model, weights=replace(model.weights, source="trained.pt"))
    kept = manifest if "model" in changes else replace(manifest, model=trained)
    return make_subject(name, name, kept, None)


def measured(name: str, ratio: float, interval: tuple[float, float]) -> Measured:
    latency = summarise(np.arange(1000, 3000) * 1000)
    return Measured(
        name=name,
        precision="fp32",
        runtime=RanOn("fake 1", "CPU"),
        batch=1,
        size_bytes=1000,
        executed=ExecutedPrecision({"fp32": 1.0}),
        model=latency,
        end_to_end=latency,
        throughput=100.0,
        ratio=ratio,
        ratio_ci=interval,
    )


def run_of(*results: Measured) -> Benchmark:
    host = Host(machine="m", system="s", python="3", cpu="a processor", flags=(), cores=2)
    return Benchmark(list(results), host, {"numpy": "2"}, None, Protocol())


def full_subject(name: str = "tiny") -> Subject:
    """A bundle of which everything is known that a page shows."""
    data = check(confusion=((5, 2, 0), (1, 6, 0), (0, 0, 7)))
    made = subject(data, name=name).with_speed(run_of(full_measured(name)), 0)
    layers = tuple(
        LayerError(
            name=f"stages.{place}",
            precision="int8",
            backend="openvino",
            relative_error=error,
            cosine=0.99,
            images=2,
            worst=error,
        )
        for place, error in enumerate((1e-9, 1e-4, 1.0))
    )
    return replace(made, flipped=(flipped("a/b.jpg", 0, 0, 1), flipped("c.jpg", 1, 0, 1)), layers=layers)


def full_measured(name: str, ratio: float = 1.0) -> Measured:
    """A bundle that was measured in every way."""
    latency = summarise(np.arange(1000, 3000) * 1000)
    nodes = (
        NodeRun("reorder", "Reorder", "fp32", 1.0, True),
        NodeRun("conv", "Convolution", "int8", 3.0, False, ("node_conv",)),
        NodeRun("matmul", "MatMul", "bf16", 4.0, False, ("node_conv", "node_matmul")),
        NodeRun("end", "Softmax", "bf16", 0.0, False, ("unknown",)),
    )
    return replace(
        measured(name, ratio, (ratio, ratio)),
        stages=Stages(latency, latency, latency),
        breakdown=break_down(Profile(nodes, "a profile"), {"node_conv": "stem", "node_matmul": "stages.0"}),
        memory=Memory(200_000_000, 100_000_000),
    )


def flipped(name: str, label: int, reference: int, bundle: int) -> FlippedImage:
    """A green image with two answers."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "green").save(file, "JPEG")
    return FlippedImage(name, label, reference, bundle, base64.b64encode(file.getvalue()).decode())
