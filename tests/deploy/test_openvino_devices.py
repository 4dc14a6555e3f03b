"""OpenVINO's other devices, through a stand-in for what their plugins tell (helpers/openvino_machine.py)."""

from __future__ import annotations

import numpy as np
import pytest

ov = pytest.importorskip("openvino")

from cmt_edge.deploy import Predictor  # noqa: E402
from cmt_edge.deploy.backends import openvino  # noqa: E402
from cmt_edge.deploy.backends.openvino import RUNTIME  # noqa: E402
from cmt_edge.deploy.cli import bench as cmt_bench  # noqa: E402
from cmt_edge.deploy.cli import predict as cmt_predict  # noqa: E402
from cmt_edge.deploy.cli import verify as cmt_verify  # noqa: E402
from cmt_edge.deploy.errors import BundleError, RuntimeMissingError  # noqa: E402
from helpers.bundles import SIZE, make_bundle  # noqa: E402
from helpers.images import coloured_folder  # noqa: E402
from helpers.openvino_machine import LAPTOP, SERVER, Machine  # noqa: E402

BATCH = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)

pytestmark = pytest.mark.usefixtures("own_folders")


@pytest.fixture
def machine(monkeypatch):
    """Replaces this machine by another one."""

    def replace(devices, **chooses) -> Machine:
        found = Machine(devices, **chooses)
        monkeypatch.setattr(ov, "Core", found)
        return found

    return replace


@pytest.fixture
def bundle(tmp_path):
    """Gives a bundle of one precision; its graph is float32 in each."""

    def make(precision: str):
        return make_bundle(tmp_path / precision, format="openvino", precision=precision)

    return make


@pytest.mark.parametrize(
    ("devices", "device", "precision", "hint"),
    [
        (LAPTOP, "CPU", "int8", "f32"),
        (SERVER, "CPU", "int8", "bf16"),
        (LAPTOP, "GPU", "int8", "f16"),
        (LAPTOP, "gpu", "fp16", "f16"),
        (LAPTOP, "GPU.0", "fp32", "f32"),
        (SERVER, "GPU.1", "fp16", "f16"),
        (LAPTOP, "NPU", "int8", "f16"),
        (LAPTOP, "NPU", "fp16", "f16"),
        (SERVER, None, "bf16", "bf16"),
    ],
)
def test_each_device_computes_in_the_precision_that_it_has(machine, bundle, devices, device, precision, hint):
    found = machine(devices)
    with Predictor.load(bundle(precision).path, device=device, threads=1) as predictor:
        assert predictor.logits(BATCH).shape == (1, 3)
        assert predictor.info.device.split(".")[0] == (device or "CPU").upper().split(".")[0]
    ((name, config),) = found.compiled
    assert name == (device or "CPU").upper()
    assert config["INFERENCE_PRECISION_HINT"] == hint
    assert ("INFERENCE_NUM_THREADS" in config) == (name == "CPU"), "only the processor has threads of ours"
    rounds = config.get("DYNAMIC_QUANTIZATION_GROUP_SIZE") != 0
    assert rounds == (name != "CPU" or precision != "int8"), "float activations stay float"


@pytest.mark.parametrize(
    ("threads", "cores", "bound"), [(1, 4, False), (3, 4, False), (4, 4, True), (8, 4, True)]
)
def test_threads_are_bound_to_cores_only_where_they_take_all(
    machine, bundle, monkeypatch, threads, cores, bound
):
    """Otherwise two processes with half of the threads each would share one half of the cores."""
    monkeypatch.setattr(openvino, "count_cores", lambda: cores)
    found = machine(SERVER)
    with Predictor.load(bundle("fp32").path, threads=threads):
        pass
    ((_, config),) = found.compiled
    assert config.get("ENABLE_CPU_PINNING", True) is bound


@pytest.mark.parametrize(
    ("devices", "precision", "name"),
    [
        (LAPTOP, "int8", "GPU"),
        (LAPTOP, "fp32", "GPU"),
        (SERVER, "fp16", "GPU.0"),
        (SERVER, "bf16", "CPU"),
        ({"CPU": LAPTOP["CPU"], "NPU": LAPTOP["NPU"]}, "int8", "CPU"),
        ({"CPU": LAPTOP["CPU"]}, "fp32", "CPU"),
    ],
)
def test_auto_takes_the_best_device_that_computes_in_it_and_tells_which(
    machine, bundle, devices, precision, name
):
    found = machine(devices)
    with Predictor.load(bundle(precision).path, device="auto") as predictor:
        assert predictor.info.device == name
    assert [device for device, _ in found.compiled] == [name]


@pytest.mark.parametrize(
    ("more", "remedy"),
    [
        ({}, "use --precision int8 or fp32 on this machine"),
        ({"NPU": ("INT8", "FP16")}, "use --device NPU"),  # which AUTO never takes by itself
    ],
)
def test_auto_finds_none(machine, bundle, more, remedy):
    machine({"CPU": LAPTOP["CPU"]} | more)
    with pytest.raises(
        RuntimeMissingError, match="no GPU and no processor here computes in float16"
    ) as caught:
        Predictor.load(bundle("fp16").path, device="AUTO")
    assert ", ".join(["CPU", *more]) in caught.value.why
    assert caught.value.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("devices", "device", "precision", "what", "remedy"),
    [
        (LAPTOP, None, "fp16", "this processor has no float16", "--device GPU or NPU"),
        (LAPTOP, "CPU", "bf16", "this processor has no bfloat16", "--precision int8 or fp32"),
        (LAPTOP, "GPU", "bf16", "GPU does not compute in bfloat16", "--precision int8 or fp16 or fp32"),
        (LAPTOP, "NPU", "fp32", "NPU does not compute in float32", "--device CPU or GPU"),
        (SERVER, "GPU.1", "bf16", "GPU.1 does not compute in bfloat16", "--device CPU"),
        ({"CPU": LAPTOP["CPU"]}, "CPU", "fp16", "this processor has no float16", "--backend onnxruntime"),
    ],
)
def test_a_precision_that_a_device_lacks_is_refused(
    machine, bundle, devices, device, precision, what, remedy
):
    found = machine(devices)
    with pytest.raises(RuntimeMissingError, match=what) as caught:
        Predictor.load(bundle(precision).path, device=device)
    assert remedy in caught.value.remedy
    assert found.compiled == []


@pytest.mark.parametrize("device", ["GPU", "NPU", "GPU.1", "GPU9", "MULTI", "CPU.0"])
def test_a_device_that_the_machine_lacks_is_refused_and_never_replaced(machine, bundle, fails, device):
    found = machine({"CPU": LAPTOP["CPU"]})
    path = bundle("fp32").path
    image = next(coloured_folder(path.parent / "images").rglob("*.png"))
    for command, *arguments in ((cmt_predict.main, image), (cmt_verify.main,), (cmt_bench.main,)):
        text = fails(3, command, path, *arguments, "--device", device)
        assert f"no device '{device}' here" in text
        assert "available: CPU" in text
    assert found.compiled == []


def test_a_driver_that_chooses_another_precision_or_device_is_refused(machine, bundle):
    """OpenVINO's CPU, asked for float16, silently computes in bfloat16."""
    machine(LAPTOP, INFERENCE_PRECISION_HINT=ov.Type.bf16)
    with pytest.raises(RuntimeMissingError, match="does not compute in float16 on GPU as asked") as caught:
        Predictor.load(bundle("fp16").path, device="GPU", cache=False)
    assert "bf16" in caught.value.why
    machine(SERVER, EXECUTION_DEVICES=["GPU.0"])
    with Predictor.load(bundle("fp32").path, device="GPU", cache=False) as predictor:
        assert predictor.info.device == "GPU.0"
    with pytest.raises(RuntimeMissingError, match=r"does not run the model on GPU.1 as asked"):
        Predictor.load(bundle("fp32").path, device="GPU.1", cache=False)
    machine(LAPTOP, EXECUTION_DEVICES=["CPU"])
    with pytest.raises(RuntimeMissingError, match="does not run the model on GPU as asked") as caught:
        Predictor.load(bundle("fp32").path, device="GPU", cache=False)
    assert "CPU" in caught.value.why


def test_what_a_device_compiled_is_kept_for_it_alone(machine, bundle):
    found = machine(LAPTOP)
    path = bundle("int8").path
    with Predictor.load(path, device="GPU") as predictor:
        expected = predictor.logits(BATCH).tobytes()
    for device, is_kept in (("GPU", True), ("CPU", False), ("NPU", False), ("GPU", True), ("AUTO", True)):
        with Predictor.load(path, device=device) as predictor:
            assert predictor.loading.is_from_cache == is_kept, device
            assert predictor.logits(BATCH).tobytes() == expected
    assert [name for name, _ in found.opened] == ["GPU", "GPU", "GPU"]


def test_a_new_driver_compiles_anew(machine, bundle):
    found = machine(LAPTOP)
    path = bundle("int8").path
    for driver, is_kept in (("1.0", False), ("1.0", True), ("2.0", False), ("1.0", True)):
        found.driver = driver
        with Predictor.load(path, device="GPU") as predictor:
            assert predictor.loading.is_from_cache == is_kept, driver


def test_a_driver_that_does_not_tell_its_precision_is_noted(machine, bundle):
    machine(LAPTOP, INFERENCE_PRECISION_HINT=RuntimeError("unsupported"))
    with Predictor.load(bundle("fp16").path, device="NPU") as predictor:
        (note,) = predictor.session.notes
    assert note == "NPU does not tell whether it computes in float16"


def test_a_device_that_gives_no_compiled_model_keeps_none(machine, bundle):
    found = machine({"CPU": LAPTOP["CPU"], "GPU": ("FP32", "FP16", "INT8")})
    path = bundle("int8").path
    for _ in range(2):
        with Predictor.load(path, device="GPU") as predictor:
            assert not predictor.loading.is_from_cache
    assert len(found.compiled) == 2


def test_a_device_that_cannot_compile_the_graph_is_an_error(machine, bundle, monkeypatch):
    """Nothing else computes in its place."""
    found = machine(LAPTOP)

    def fail(model, device, config):
        raise RuntimeError("[GPU] out of resources")

    monkeypatch.setattr(found, "compile_model", fail)
    for device in ("GPU", "AUTO"):
        with pytest.raises(BundleError, match="cannot open the bundle's graph"):
            Predictor.load(bundle("fp32").path, device=device)


def test_the_profile_is_of_the_same_device(machine, bundle):
    found = machine(SERVER)
    with Predictor.load(bundle("fp16").path, device="GPU.1") as predictor:
        predictor.session.executed(BATCH, repeats=1)
    assert [name for name, _ in found.compiled] == ["GPU.1", "GPU.1"]
    assert found.compiled[1][1] == found.compiled[0][1] | {"PERF_COUNT": True}


def test_this_machine_says_what_it_computes_in():
    """The real plugin of the CPU: what the stand-in imitates."""
    core = ov.Core()
    capabilities = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    assert {"FP32", "INT8", "EXPORT_IMPORT"} <= set(capabilities)
    assert RUNTIME.float_precision("int8") == ("bf16" if "BF16" in capabilities else "fp32")
    assert RUNTIME.float_precision("int8", "auto") in {"bf16", "fp16", "fp32"}
