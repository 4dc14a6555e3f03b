"""The device report: what is written is read again, damage is named, and the text shows its fields."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import pytest

from cmt_edge.deploy import report
from cmt_edge.deploy.bundle.sections import (
    BuildOptions,
    CompiledEntry,
    EngineKey,
    EstimateEntry,
    ExecutedPrecision,
    GoldenCheck,
    Host,
    RanOn,
)
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.measure.benchmark import Benchmark, Measured, OnDevice
from cmt_edge.deploy.measure.device import DeviceState, DGpu, Power
from cmt_edge.deploy.measure.device_report import DeviceReport, DeviceStates, SustainedPower
from cmt_edge.deploy.measure.statistics import Latency
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.telemetry.state import read_state
from helpers.jetson import CLOCKS, NVPMODEL, plant

LATENCY = Latency(5, 1.0, (0.9, 1.1), 1.2, 1.3, None, 1.4, 1.05, 0.01)
"""Milliseconds of five calls."""
MEASURED = Measured(
    name="tiny",
    precision="fp16",
    runtime=RanOn("tensorrt 10.3.0", "Orin"),
    batch=1,
    size_bytes=1000,
    executed=ExecutedPrecision({"fp16": 0.75, "fp32": 0.25}, {"fp16": 3, "fp32": 1}, 0.5, "inspector"),
    model=LATENCY,
    end_to_end=replace(LATENCY, p50=2.5),
    throughput=1500.0,
    ratio=1.0,
    ratio_ci=(1.0, 1.0),
    warnings=["it drifted"],
    on_device=OnDevice(replace(LATENCY, p50=0.5), replace(LATENCY, p50=0.7), replace(LATENCY, p50=0.1)),
)
"""The latencies of one engine."""
GPU = DGpu(0, "RTX", 115.0, 1830, 3105, 8501, 8501, 51, "P2", ["software power cap"])
"""A graphics card at work."""


@pytest.fixture
def found(tmp_path) -> DeviceReport:
    """A report of a Jetson whose clocks may move."""
    answers = {"nvpmodel": NVPMODEL["agx-orin"], "jetson_clocks": CLOCKS["agx-orin-l4t36-locked"]}
    state = read_state(plant("agx-orin", tmp_path), lambda command: answers[command[0]])
    assert state.clocks
    return DeviceReport(
        bundle="tiny",
        key=EngineKey(
            onnx="0" * 64,
            tensorrt="10.3.0",
            cuda="12.6",
            driver="12.6",
            gpu="Orin, 8 multiprocessors",
            sm="8.7",
            options=BuildOptions(workspace=None, level=3, profile=(1, 1, 8), tf32=False),
        ),
        built_s=12.0,
        reused=False,
        replaces=("driver: built for 1, here 2",),
        engine_bytes=2_000_000,
        low_precision_share=0.8,
        golden=GoldenCheck(4, 0, 0.01, 0.1, True),
        benchmark=Benchmark(
            [MEASURED],
            Host(machine="aarch64", system="Linux", python="3.10", cpu="Arm", flags=(), cores=8),
            {"numpy": "1.26"},
            None,
            Protocol(),
        ),
        power=SustainedPower(
            source="VDD_IN",
            interval_s=0.1,
            before=Power(5.0, 10),
            during=Power(20.0, 30),
            after=Power(None, 0),
            notes=["a reading failed"],
            images=300,
            joules_per_image=0.05,
        ),
        state=DeviceStates(state, replace(state, temperatures_c={"tj-thermal": 61.0})),
        warnings=("a weight was rounded",),
    )


def test_what_is_written_is_read_again(found):
    data = found.to_bytes()
    again = DeviceReport.from_bytes(data, "report.json")
    assert again.to_bytes() == data
    assert again.state.before.clocks == found.state.before.clocks
    assert again.benchmark.results[0].on_device == MEASURED.on_device
    assert data.decode() == report.to_json(found) + "\n"


def test_the_keys_of_the_json(found):
    """Scripts of users read them."""
    content = json.loads(found.to_bytes())
    assert list(content) == [
        "bundle",
        "key",
        "built_s",
        "reused",
        "replaces",
        "engine_bytes",
        "low_precision_share",
        "golden",
        "benchmark",
        "power",
        "state",
        "warnings",
    ]
    assert list(content["power"]) == [
        "source",
        "interval_s",
        "before",
        "during",
        "after",
        "notes",
        "images",
        "joules_per_image",
    ]
    assert list(content["state"]) == ["before", "after"]


def test_fields_cannot_be_changed(found):
    with pytest.raises(FrozenInstanceError):
        found.reused = True


def make_compiled(product="tensorrt_rtx") -> CompiledEntry:
    """What a compiler made of a graph of one product, with estimates for three GPUs."""
    return CompiledEntry(
        product=product,
        version="1.7",
        targets=("8.9",),
        seconds=2.0,
        engine=None,
        engine_bytes=10,
        kernels={"gemm": 1},
        sync_nodes=0,
        fused=0,
        attention=0,
        conversions=0,
        types={"fp16 -> fp16": 1},
        activation_bytes=4,
        weight_bytes=4,
        blocks=(),
        estimates=tuple(
            EstimateEntry(gpu=gpu, total_ms=ms, memory_ms=ms, arithmetic_ms=0, launch_ms=0)
            for gpu, ms in (("L4", 1.0), ("RTX 4090", 0.4), ("H100", 2.0))
        ),
        details=None,
    )


@pytest.mark.parametrize(
    ("gpu", "ratio"),
    [
        (
            "NVIDIA GeForce RTX 4090",
            "0.40 ms; measured were 0.50 ms (GPU, inference alone, p50), which is 1.25",
        ),
        ("NVIDIA L4", "which is 0.50 times"),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
    ],
)
def test_the_estimate_is_held_against_the_measurement(found, gpu, ratio):
    key = replace(found.key, gpu=f"{gpu}, 128 multiprocessors")
    text = report.describe_device_report(replace(found, key=key, compiled=make_compiled()))
    assert "TensorRT for RTX 10.3.0" in text
    assert ("the estimate from the data sheet" in text) == (ratio is not None)
    assert (ratio or "") in text
    assert "the estimate from the data sheet" not in report.describe_device_report(replace(found, key=key))


DAMAGE = {
    "a text for a number": (("power", "during", "watts"), "20", "power.during.watts is '20'"),
    "null": (("state", "before"), None, "state.before is null"),
    "a negative share": (("low_precision_share",), -1, "low_precision_share is -1, expected 0 to 1.001"),
    "not a number": (("built_s",), float("nan"), "built_s is nan, expected a finite number"),
    "a wrong list": (("benchmark", "results"), {}, "benchmark.results is an empty object"),
    "an unknown entry": (("colour",), 1, "the device report holds unknown entries: 'colour'"),
}


@pytest.mark.parametrize(("way", "value", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_named(found, way, value, message):
    content = json.loads(found.to_bytes())
    *above, last = way
    holder = content
    for part in above:
        holder = holder[part]
    holder[last] = value
    with pytest.raises(BundleError) as caught:
        DeviceReport.from_bytes(json.dumps(content).encode(), "report.json")
    assert message in str(caught.value)
    assert caught.value.where == "report.json"


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\xff"])
def test_what_is_no_json_is_one_error(data):
    with pytest.raises(BundleError, match="the device report cannot be read"):
        DeviceReport.from_bytes(data, "report.json")


def test_the_text_shows_the_fields(found):
    text = report.describe_device_report(found)
    for line in (
        "engine: built in 12 s, 2.0 MB; TensorRT 10.3.0, CUDA 12.6, driver 12.6, Orin, 8 multiprocessors"
        " (sm 8.7)",
        "replaced: driver: built for 1, here 2",
        "golden images: 4; logits differ by 0.01 (allowed 0.1): ok",
        "layers at the asked precision or below: 80 %; ran as: fp16 75 % + fp32 25 %, 50 % of the time on"
        " conversions",
        "throughput: 1500 images/s; batch 1",
        "power (VDD_IN): before 5.00 W, during 20.00 W; 50.00 mJ an image, idle power included",
        "note: a reading failed",
        "device: NVIDIA Jetson AGX Orin Developer Kit, L4T 36.4.4, JetPack 6.2.1, power mode MODE_30W,"
        " clocks locked",
        "hottest sensor: 52 °C before, 61 °C after",
        "warning: it drifted",
        "warning: a weight was rounded",
    ):
        assert line in text.splitlines()
    cells = {line[:26].strip(): line[26:].split()[0] for line in text.splitlines() if " - " in line}
    assert cells["GPU, inference alone"] == "0.50"
    assert cells["GPU, with copies"] == "0.70"
    assert cells["host, starting it"] == "0.10"
    assert cells["host, one call"] == "1.00"
    assert cells["host, image file to answer"] == "2.50"


def test_the_text_of_a_graphics_card_without_sensors(found):
    before, after = DeviceState("dgpu", notes=["no thermal zone"]), DeviceState("dgpu", dgpu=GPU)
    unknown = replace(found.power, source=None, joules_per_image=None)
    text = report.describe_device_report(replace(found, state=DeviceStates(before, after), power=unknown))
    assert "power: not known here" in text
    assert "GPU: 51 °C, 1830 of 3105 MHz, held back by software power cap" in text
    assert "note: no thermal zone" in text
    assert "device:" not in text
    assert "hottest" not in text
