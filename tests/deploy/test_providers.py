"""ONNX Runtime beyond the CPU: the whole graph on the device that was asked for, or an error.

The devices are stand-ins, but for OpenVINO's provider where ``onnxruntime-openvino`` is installed in place of
``onnxruntime``: ``make test-providers``.
"""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import EPFail, Fail

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import get_runtime
from cmt_edge.deploy.backends.providers import PROVIDERS, Demand, parse_place
from cmt_edge.deploy.bundle import ONNX
from cmt_edge.deploy.bundle.sections import RanOn
from cmt_edge.deploy.cli import bench, predict, verify
from cmt_edge.deploy.errors import BundleError, InputError, RuntimeMissingError
from helpers.bundles import SIZE, make_bundle
from helpers.images import RED
from helpers.providers import Machine, make_device

CUDA = "CUDAExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
RTX = "NvTensorRTRTXExecutionProvider"
NAME = f"onnxruntime {onnxruntime.__version__}"
needs_openvino = pytest.mark.skipif(
    OPENVINO not in onnxruntime.get_available_providers(), reason="onnxruntime-openvino is not installed"
)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "b")


def rtx_machine(**more) -> Machine:
    devices = [make_device(RTX, number) for number in (0, 1)]
    return Machine(plugins={"onnxruntime_ep_nv_tensorrt_rtx": devices}, **more)


# --- what was asked for is what runs --------------------------------------------------------------


def test_a_provider_of_onnxruntime_itself(monkeypatch, bundle):
    machine = Machine(built_in=(CUDA,)).install(monkeypatch)
    with Predictor.load(bundle, device="CUDA:1") as predictor:
        assert predictor.info == RanOn(f"{NAME}, {CUDA}", "cuda:1")
        assert predictor(RED).label == "red"
        assert predictor.session.parallelism == 1
    assert machine.opened[-1] == (CUDA, {"device_id": "1", "use_tf32": "0"})
    with Predictor.load(bundle, device="cuda", throughput=True) as predictor:
        assert predictor.info.device == "cuda:0"
        assert predictor.session.parallelism == 2


def test_a_plugin_is_registered_once(monkeypatch, bundle):
    machine = rtx_machine().install(monkeypatch)
    for device, number in (("rtx", "0"), ("rtx:1", "1")):
        with Predictor.load(bundle, device=device) as predictor:
            assert predictor.info.runtime == f"{NAME}, {RTX} 7.1"
            assert predictor(RED).label == "red"
        assert machine.opened[-1] == (RTX, {"number": number})
    assert machine.registered == ["/opt/onnxruntime_ep_nv_tensorrt_rtx.so"]


def test_cudas_runtime_beside_a_plugin_is_loaded_first(monkeypatch, bundle, tmp_path):
    """NVIDIA's plug-in 0.5.0 brings it under a name that its own library does not ask for."""
    (tmp_path / "libcudart.so.12.9.79").write_bytes(b"a library")
    loaded = []

    def load(name: str, mode: int) -> None:
        loaded.append((name, list(machine.registered)))
        raise OSError("wrong ELF class")  # which the plug-in's own error would tell

    machine = rtx_machine(folder=str(tmp_path)).install(monkeypatch)
    monkeypatch.setattr("cmt_edge.deploy.backends.provider_sessions.ctypes.CDLL", load)
    with Predictor.load(bundle, device="rtx"):
        assert loaded == [(str(tmp_path / "libcudart.so.12.9.79"), [])]
        assert len(machine.registered) == 1


def test_a_plugin_that_the_program_registered_itself(monkeypatch, bundle):
    machine = Machine(devices=[make_device(RTX)]).install(monkeypatch)
    with Predictor.load(bundle, device="rtx"):
        assert machine.registered == []


@pytest.mark.parametrize(
    ("device", "number"), [("openvino:gpu", 1), ("openvino:GPU.1", 2), ("openvino:CPU", 0)]
)
def test_a_device_of_openvinos_plugin(monkeypatch, bundle, device, number):
    found = [make_device(OPENVINO, i, ov_device=name) for i, name in enumerate(("CPU", "GPU.0", "GPU.1"))]
    machine = Machine(plugins={"onnxruntime_ep_openvino": found}).install(monkeypatch)
    with Predictor.load(bundle, device=device, threads=3) as predictor:
        assert predictor.info.device == f"openvino:{device.partition(':')[2].upper()}"
    name, settings = machine.opened[-1]
    assert (name, settings["number"]) == (OPENVINO, str(number))
    properties = {"EXECUTION_MODE_HINT": "ACCURACY"}
    kind = "CPU" if number == 0 else "GPU"
    properties |= {"INFERENCE_NUM_THREADS": 3} if kind == "CPU" else {}
    assert json.loads(settings["load_config"]) == {kind: properties}


@pytest.mark.parametrize(
    ("kind", "demand", "expected"),
    [
        ("tensorrt", Demand("0", "fp32", None), {"trt_fp16_enable": "0", "trt_int8_enable": "0"}),
        ("tensorrt", Demand("0", "fp16", None), {"trt_fp16_enable": "1", "trt_int8_enable": "0"}),
        ("tensorrt", Demand("2", "int8", None), {"trt_int8_enable": "1", "device_id": "2"}),
        ("tensorrt", Demand("0", "int8", None), {"trt_engine_cache_enable": "0"}),
        ("openvino", Demand("GPU", "fp32", 3), {"device_type": "GPU", "precision": "ACCURACY"}),
        ("openvino", Demand("CPU", "fp32", 3), {"device_type": "CPU", "num_of_threads": "3"}),
        ("rtx", Demand("1", "fp16", None), {"device_id": "1"}),
    ],
)
def test_the_options_keep_the_precision(kind, demand, expected):
    settings = PROVIDERS[kind].make_settings(demand)
    assert expected.items() <= settings.items()


def test_the_bundles_precision_reaches_the_provider(monkeypatch, tmp_path):
    machine = Machine(built_in=("TensorrtExecutionProvider",)).install(monkeypatch)
    with Predictor.load(make_bundle(tmp_path / "b", precision="int8"), device="tensorrt"):
        assert machine.opened[-1][1]["trt_int8_enable"] == "1"


def test_what_ran_is_told(monkeypatch, bundle):
    Machine(built_in=(CUDA,)).install(monkeypatch)
    batch = np.zeros((1, 3, SIZE, SIZE), np.float32)
    with Predictor.load(bundle, device="cuda") as predictor:
        found = predictor.session.executed(batch, 1)
    assert found.time_share == {}, "the host's times say little of a device"
    assert found.operations.keys() == {"fp32"}
    nodes = sum(found.operations.values())
    assert found.source == f"{CUDA} runs all {nodes} nodes"


def test_a_compiled_graph_tells_no_precision(monkeypatch, bundle):
    Machine(built_in=(CUDA,), compiles=True).install(monkeypatch)
    with Predictor.load(bundle, device="cuda") as predictor:
        found = predictor.session.executed(np.zeros((1, 3, SIZE, SIZE), np.float32), 1)
    assert found.summary() == "unknown"
    assert "does not tell their precisions" in found.source


def test_the_cpu_needs_no_provider(monkeypatch, bundle):
    machine = Machine(built_in=(CUDA,)).install(monkeypatch)
    for device in (None, "cpu", "CPU"):
        with Predictor.load(bundle, device=device) as predictor:
            assert predictor.info == RanOn(NAME, "CPU")
    assert machine.opened == []


@pytest.mark.parametrize("command", [predict, verify, bench])
def test_the_commands_take_a_device(monkeypatch, bundle, tmp_path, capsys, command):
    Machine(built_in=(CUDA,)).install(monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table is folded
    (tmp_path / "red.png").write_bytes(RED)
    more = [str(tmp_path / "red.png")] if command is predict else []
    more += ["--iters", "2", "--seconds", "0", "--no-throughput"] if command is bench else []
    assert command.main([str(bundle.path), *more, "--device", "cuda", "--json"]) == 0
    shown = capsys.readouterr()
    json.loads(shown.out)
    assert "libcudnn" in shown.err, "what NVIDIA's libraries lack is told, but not among the answers"
    if command is predict:
        return
    assert f'"runtime": "{NAME}, {CUDA}"' in shown.out
    assert command.main([str(bundle.path), *more, "--device", "cuda"]) == 0
    assert f"{NAME}, {CUDA} (cuda:0)" in capsys.readouterr().out


# --- never the CPU in its place -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("cuda", ("no CUDAExecutionProvider", "onnxruntime-gpu")),
        ("tensorrt:1", ("no TensorrtExecutionProvider", "onnxruntime-gpu")),
        ("rtx", ("no NvTensorRTRTXExecutionProvider", "onnxruntime-ep-nv-tensorrt-rtx-cu12")),
        ("openvino:GPU", ("no OpenVINOExecutionProvider", "onnxruntime-ep-openvino")),
    ],
)
def test_without_the_package_the_remedy_names_it(monkeypatch, bundle, device, words):
    Machine().install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match=f"--device {device}") as caught:
        Predictor.load(bundle, device=device)
    what, package = words
    assert what in caught.value.what
    assert f"pip install {package}" in caught.value.remedy or f'pip install "{package}' in caught.value.remedy
    with pytest.raises(RuntimeMissingError, match=what):
        get_runtime("onnxruntime").check(device)


@pytest.mark.parametrize(
    "device",
    [
        "GPU",
        "cuda:x",
        "cuda:-1",
        "cuda:\u0663",
        "rtx:GPU",
        "openvino",
        "openvino:XPU",
        "openvino:AUTO",
        "hip",
        "",
    ],
)
def test_an_unknown_device_lists_the_known_ones(device):
    """OpenVINO's own provider would start for ``XPU``, on the device that it takes by default."""
    with pytest.raises(RuntimeMissingError, match="has no device") as caught:
        parse_place(device)
    assert "--device" in caught.value.remedy


def test_a_provider_that_does_not_start(monkeypatch, bundle):
    machine = Machine(built_in=(CUDA,), starts=False).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="could not be started for --device cuda:0") as caught:
        Predictor.load(bundle, device="cuda")
    assert "standard error" in caught.value.why
    assert len(machine.opened) == 1, "the bundle's graph was not opened"
    with pytest.raises(RuntimeMissingError, match="could not be started"):
        get_runtime("onnxruntime").check("cuda")


def test_a_device_that_is_not_there(monkeypatch, bundle):
    """ONNX Runtime 1.31.1 says no more than this on a machine with one GPU."""
    machine = Machine(built_in=(CUDA,), absent=("3",)).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="finds no device 'cuda:3' here") as caught:
        Predictor.load(bundle, device="cuda:3")
    assert "device 0 starts" in caught.value.why
    assert "Parse Failed" in caught.value.why
    with Predictor.load(bundle, device="cuda"):
        pass
    assert machine.severity == 3, "its warnings about plug-ins would reach every user"


def test_no_device_at_all(monkeypatch, bundle):
    Machine(built_in=(CUDA,), absent=("0", "3")).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="could not be started for --device cuda:3"):
        Predictor.load(bundle, device="cuda:3")


def test_a_provider_that_raises(monkeypatch, bundle):
    error = RuntimeError("\x1b[31mPlease install\nTensorRT libraries\x1b[0m")
    Machine(built_in=(CUDA,), error=error).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="could not be started") as caught:
        Predictor.load(bundle, device="cuda")
    assert caught.value.why == "RuntimeError: Please install TensorRT libraries"


@pytest.mark.parametrize("left", [{"MatMul"}, {"MatMul", "ReduceMean"}])
def test_a_part_of_the_graph_that_the_cpu_would_run(monkeypatch, bundle, left):
    Machine(devices=[make_device(RTX)], left=frozenset(left)).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match=rf"would leave {len(left)} of \d+ nodes") as caught:
        Predictor.load(bundle, device="rtx")
    for operator in left:
        assert operator in caught.value.what
    assert "--device CPU" in caught.value.remedy


def test_a_provider_is_told_to_be_strict(monkeypatch, bundle):
    """OpenVINO's provider would compile for the CPU, by itself and unrecorded, what an NPU cannot compile."""
    found = [make_device(OPENVINO, ov_device="NPU")]
    machine = Machine(plugins={"onnxruntime_ep_openvino": found}).install(monkeypatch)
    with Predictor.load(bundle, device="openvino:NPU"):
        (entries,) = machine.entries
    entries.pop("session.x64quantprecision", None)  # where this CPU needs it
    assert entries == {
        "session.disable_cpu_ep_fallback": "1",
        "session.load_model_format": "ONNX",
        "session.record_ep_graph_assignment_info": "1",
    }


def test_the_record_decides_where_the_setting_is_not_heeded(monkeypatch, bundle):
    machine = Machine(devices=[make_device(RTX)], left=frozenset({"MatMul"}), heeds_strict=False)
    machine.install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match=r"would leave 1 of \d+ nodes"):
        Predictor.load(bundle, device="rtx")
    assert len(machine.opened) == 1


def test_a_session_without_a_record(monkeypatch, bundle):
    machine = Machine(devices=[make_device(RTX)]).install(monkeypatch)
    monkeypatch.setattr("helpers.providers.StandInSession.list_assigned", lambda _: [])
    machine.install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="could not be started") as caught:
        Predictor.load(bundle, device="rtx")
    assert "no record" in caught.value.why


def test_an_old_release_cannot_tell(monkeypatch, bundle):
    machine = Machine(built_in=(CUDA,), records=False).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="does not tell which nodes run on cuda:0") as caught:
        Predictor.load(bundle, device="cuda")
    assert "1.24" in caught.value.remedy
    assert machine.opened == []


def test_an_inference_that_fails_is_not_repeated_on_the_cpu(monkeypatch, bundle):
    error = EPFail("[ONNXRuntimeError] : 11 : EP_FAIL : out of memory")
    Machine(built_in=(CUDA,), run_error=error).install(monkeypatch)
    with (
        Predictor.load(bundle, device="cuda") as predictor,
        pytest.raises(BundleError, match="failed while it ran") as caught,
    ):
        predictor(RED)
    assert "EP_FAIL" in caught.value.why


def test_a_plugin_without_the_device(monkeypatch, bundle):
    found = [make_device(OPENVINO, ov_device="CPU")]
    machine = Machine(plugins={"onnxruntime_ep_openvino": found}).install(monkeypatch)
    for device in ("openvino:GPU", "openvino:NPU", "openvino:CPU.1"):
        with pytest.raises(RuntimeMissingError, match="no device") as caught:
            Predictor.load(bundle, device=device)
    assert machine.opened == []
    with pytest.raises(RuntimeMissingError) as caught:
        Predictor.load(bundle, device="openvino:GPU")
    assert caught.value.why == "its devices are: CPU"
    Machine(devices=[make_device(RTX)]).install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="finds no device 'rtx:1'") as caught:
        Predictor.load(bundle, device="rtx:1")
    assert caught.value.why == "its devices are: GPU"


def test_a_device_that_can_only_be_compiled_for(monkeypatch, bundle):
    found = [make_device(OPENVINO, ov_device="NPU", is_virtual="1")]
    Machine(plugins={"onnxruntime_ep_openvino": found}).install(monkeypatch)
    for _ in range(2):  # the library is known the second time
        with pytest.raises(RuntimeMissingError, match="finds no device 'openvino:NPU'") as caught:
            Predictor.load(bundle, device="openvino:NPU")
        assert caught.value.why == "its devices are: none"


def test_a_plugin_without_devices_can_be_asked_again(monkeypatch, bundle):
    machine = Machine(plugins={"onnxruntime_ep_openvino": []}).install(monkeypatch)
    for _ in range(2):
        with pytest.raises(RuntimeMissingError, match="finds no device"):
            Predictor.load(bundle, device="openvino:CPU")
    assert len(machine.registered) == 1


def test_a_plugin_that_cannot_be_loaded(monkeypatch, bundle):
    machine = rtx_machine().install(monkeypatch)

    def fail(name: str, library: str) -> None:
        raise Fail("Failed to load library libcudart.so.12")

    monkeypatch.setattr(machine, "register_execution_provider_library", fail)
    machine.install(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="installed but cannot be loaded") as caught:
        Predictor.load(bundle, device="rtx")
    assert "libcudart" in caught.value.why
    assert "onnxruntime-ep-nv-tensorrt-rtx" in caught.value.remedy


def test_a_broken_graph_is_the_bundles_fault(monkeypatch, tmp_path):
    broken = make_bundle(tmp_path / "b")
    session = Machine(devices=[make_device(RTX)]).install(monkeypatch)
    opened = Bundle.open(broken.path)
    (broken.path / ONNX).write_bytes(b"no graph")
    with pytest.raises(BundleError, match="cannot open the bundle's graph"):
        Predictor.load(opened, device="rtx")
    assert session.opened == []


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_precision_that_a_device_lacks(monkeypatch, tmp_path, precision):
    machine = Machine(built_in=(CUDA,)).install(monkeypatch)
    bundle = make_bundle(tmp_path / "b", precision=precision)
    with pytest.raises(InputError, match=r"int8 kernels|bfloat16") as caught:
        Predictor.load(bundle, device="cuda")
    assert caught.value.where == str(bundle.path)
    assert machine.opened == []


# --- the real thing -------------------------------------------------------------------------------


@needs_openvino
def test_openvinos_provider_runs_the_whole_graph(bundle):
    batch = np.random.default_rng(0).random((1, 3, SIZE, SIZE), np.float32)
    with Predictor.load(bundle) as cpu, Predictor.load(bundle, device="openvino:CPU", threads=1) as predictor:
        assert predictor.info == RanOn(f"{NAME}, {OPENVINO}", "openvino:CPU")
        np.testing.assert_allclose(predictor.outputs(batch)[0], cpu.outputs(batch)[0], atol=1e-5)
        assert f"{OPENVINO} runs all" in predictor.session.executed(batch, 1).source
    assert verify.main([str(bundle.path), "--device", "openvino:CPU", "-q"]) == 0


@needs_openvino
@pytest.mark.parametrize("device", ["openvino:GPU.7", "openvino:NPU.7"])
def test_a_device_that_openvinos_provider_lacks(bundle, device):
    with pytest.raises(RuntimeMissingError, match="could not be started"):
        Predictor.load(bundle, device=device)
