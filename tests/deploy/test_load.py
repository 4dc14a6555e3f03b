"""A Predictor under load: many threads get the answers of one, and neither memory nor descriptors grow.

``scripts/soak.py`` does the same for longer.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import closing

import numpy as np
import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends.fake import FakeSession
from helpers.bundles import SIZE, SPEC, copy_bundle, make_bundle
from helpers.load import (
    THREADS,
    Growth,
    answers_of,
    answers_of_threads,
    distinct_batches,
    distinct_images,
    leaking,
    slope,
    soak,
)
from helpers.paths import ROOT

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
EACH = 2 * THREADS
"""Distinct inputs of each kind, images and batches."""
CLASSES = 10
"""More than the colours of the fake runtime: its answers then differ for distinct inputs."""


def require_bf16() -> None:
    """Skip the test where the processor has no bfloat16."""
    openvino = pytest.importorskip("cmt_edge.deploy.backends.openvino")
    if not openvino.has_bf16():
        pytest.skip("this processor has no bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("throughput", [False, True], ids=["latency", "throughput"])
@pytest.mark.parametrize(
    ("fixture", "precision", "backend"),
    [
        ("fp32_bundle", "fp32", "openvino"),
        ("fp32_bundle", "bf16", "openvino"),
        ("int8_bundle", "int8", "openvino"),
        ("onnx_bundle", "fp32", "openvino"),
        ("fp32_bundle", "fp32", "onnxruntime"),
        ("int8_bundle", "int8", "onnxruntime"),
        ("onnx_bundle", "fp32", "onnxruntime"),
    ],
)
def test_32_threads_get_the_answers_of_one(request, tmp_path, fixture, precision, backend, throughput):
    bundle = request.getfixturevalue(fixture)
    if precision == "bf16":
        require_bf16()
        bundle = copy_bundle(bundle, tmp_path / "bf16", precision="bf16")
    with Predictor.load(bundle, backend=backend, throughput=throughput) as predictor:
        inputs = distinct_batches(EACH, predictor.spec.size) + distinct_images(EACH)
        expected = answers_of(predictor, inputs)
        assert len(set(expected)) == len(inputs), "equal answers would hide a mistaken one"
        assert answers_of_threads(predictor, inputs) == expected


class SharedBuffer(FakeSession):
    """A runtime that computes in one buffer for all threads, without a lock."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes, delay_s=1e-3)
        self.buffer = np.empty((1, 3, SIZE, SIZE), np.float32)

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        self.buffer[:] = batch
        return super().run(self.buffer)


@pytest.mark.parametrize(("session", "same"), [(FakeSession, True), (SharedBuffer, False)])
def test_a_runtime_that_mixes_threads_is_found(session, same):
    labels = [str(i) for i in range(CLASSES)]
    with Predictor(session(CLASSES), SPEC, labels, batch=1) as predictor:
        inputs = distinct_batches(EACH, SIZE) + distinct_images(EACH)
        expected = answers_of(predictor, inputs)
        assert (answers_of_threads(predictor, inputs) == expected) is same


def soak_in_a_child(bundle, backend: str, *arguments: str) -> dict[str, dict]:
    """The figures of ``scripts/soak.py`` by part; a process of its own, because memory that earlier tests
    freed would hide a leak."""
    command = [sys.executable, ROOT / "scripts" / "soak.py", bundle.path, "--backend", backend, "--json"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {figures["part"]: figures for figures in map(json.loads, done.stdout.splitlines())}


@LINUX
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fixture", "backend", "loads"), [("fp32_bundle", "openvino", "8"), ("onnx_bundle", "onnxruntime", "60")]
)
def test_predictions_and_loads_leave_nothing_behind(request, fixture, backend, loads):
    bundle = request.getfixturevalue(fixture)
    arguments = ["--rounds", "0", "--predictions", "3000", "--threads", "1", "--loads", loads]
    found = soak_in_a_child(bundle, backend, *arguments)
    assert list(found) == ["predictions", "predictions with a leak", "loads", "loads with a leak"]


@LINUX
def test_loads_of_the_fake_runtime_leave_nothing_behind(tmp_path):
    bundle = make_bundle(tmp_path / "bundle")
    found = soak_in_a_child(bundle, "fake", "--rounds", "1", "--predictions", "2000", "--loads", "200")
    assert found["predictions"]["steps"] == 2000
    assert found["loads"]["steps"] == 200


@LINUX
def test_an_open_descriptor_is_found():
    with closing(leaking(lambda number: None, descriptors_a_step=0.1)) as leaky:
        assert "descriptors grow" in soak(next(leaky), 80).complaint(most_bytes=1e9)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0] * 20, 0.0),
        ([float(2 * x) for x in range(20)], 2.0),
        ([1e6, *[5.0] * 19], 0.0),
        ([0.0] * 17 + [9.0] * 3, 0.0),
    ],
    ids=["flat", "a leak", "only at the start", "one jump at the end"],
)
def test_slope(values, expected):
    assert 0 <= slope(range(len(values)), values) <= expected
    if expected == 2.0:
        assert slope(range(len(values)), values) == expected


def test_a_complaint_names_what_grows():
    assert Growth(1000, 10.0, 0.0).complaint(100) == ""
    assert "200 bytes a step" in Growth(1000, 200.0, 0.0).complaint(100)
    assert "grow by 10 in 1000" in Growth(1000, 0.0, 0.01).complaint(100)
