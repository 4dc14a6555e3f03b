"""The real thing: needs an NVIDIA GPU; some tests need TensorRT too. ``pytest -m gpu`` on the device."""

from __future__ import annotations

import importlib.util
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import cmt_edge.deploy.cli.build
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import get_runtime
from cmt_edge.deploy.errors import CmtEdgeError, RuntimeMissingError
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.deploy.telemetry.power import PowerMonitor
from cmt_edge.deploy.telemetry.state import read_state
from cmt_edge.deploy.tensorrt.cuda import TO_DEVICE, TO_HOST, CudaError, open_cuda
from helpers.bundles import SIZE
from helpers.trt import trt_bundle

pytestmark = pytest.mark.gpu

PORTABLE = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that an engine for none in particular runs on."""


@pytest.fixture(scope="module")
def device():
    try:
        cuda = open_cuda()
        cuda.gpu(0)
    except RuntimeMissingError as exc:
        pytest.skip(f"{exc.what}: {exc.why}")
    return cuda


@pytest.fixture
def tensorrt(device):
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("TensorRT is not installed; JetPack or NVIDIA's wheels bring it")


@pytest.fixture
def tensorrt_rtx(device):
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT for RTX is not installed (the extra rtx)")
    if not is_served(device):
        pytest.skip(f"TensorRT for RTX serves no GPU of compute capability {device.gpu(0).sm}")


def is_served(device) -> bool:
    """Whether TensorRT for RTX runs on this GPU."""
    from cmt_edge.deploy.tensorrt.bindings import RTX, open_bindings

    return open_bindings(RTX).serves(device.gpu(0).sm)


def test_the_gpu_describes_itself(device):
    gpu = device.gpu(0)
    assert gpu.name
    assert float(gpu.sm) >= 5
    free, total = device.memory()
    assert 0 < free <= total == gpu.memory
    assert device.runtime_version().split(".")[0] <= device.driver_version().split(".")[0]


def test_bytes_survive_the_device(device):
    source = np.random.default_rng(0).normal(size=1 << 20).astype(np.float32)
    stream, there, back = device.stream(), device.device_memory(source.nbytes), np.empty_like(source)
    pinned = device.pinned_memory(source.nbytes)
    start, end = device.event(), device.event()
    device.record(start, stream)
    device.copy(there, source.ctypes.data, source.nbytes, TO_DEVICE, stream)
    device.copy(back.ctypes.data, there, source.nbytes, TO_HOST, stream)
    device.record(end, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(back, source)
    assert 0 < device.elapsed_ms(start, end) < 1000
    for free, handle in (
        (device.free_pinned_memory, pinned),
        (device.free_device_memory, there),
        (device.destroy_event, start),
        (device.destroy_event, end),
        (device.destroy_stream, stream),
    ):
        free(handle)


def test_a_graph_of_copies(device):
    import ctypes

    stream, there, pinned = device.stream(), device.device_memory(64), device.pinned_memory(128)
    values = np.ctypeslib.as_array((ctypes.c_float * 32).from_address(pinned))

    def work() -> None:
        device.copy(there, pinned, 64, TO_DEVICE, stream)
        device.copy(pinned + 64, there, 64, TO_HOST, stream)

    graph = device.capture(stream, work)
    for value in (1.0, 7.0):
        values[:16] = value
        device.launch(graph, stream)
        device.synchronize(stream)
        assert (values[16:] == value).all()
    device.destroy_graph(graph)


def test_too_much_memory_is_a_typed_error(device):
    with pytest.raises(CudaError, match="out of memory") as error:
        device.device_memory(1 << 50)
    assert error.value.code == 2
    device.free_device_memory(device.device_memory(16))  # and the device still works


def test_what_cannot_be_captured_leaves_the_stream_usable(device):
    stream = device.stream()
    with pytest.raises(CudaError):
        device.capture(stream, lambda: device.synchronize(stream))
    fresh = device.stream()
    device.synchronize(fresh)


def test_the_state_of_the_device(device):
    state = read_state()
    assert state.kind in ("jetson", "dgpu"), state.notes
    with PowerMonitor(idle_s=0.3) as power:
        pass
    assert power.source is None or power.report().before.samples > 0


@pytest.fixture(params=["trt", "rtx"])
def product(request):
    """The format of each compiler that is installed."""
    request.getfixturevalue({"trt": "tensorrt", "rtx": "tensorrt_rtx"}[request.param])
    return request.param


@pytest.mark.parametrize("batch", [1, "batch"])
def test_build_verify_and_predict(product, tmp_path, batch, capsys):
    bundle = trt_bundle(tmp_path / f"tiny_fp16_{product}", batch=batch, format=product)
    assert cmt_edge.deploy.cli.build.main([str(bundle.path), "--seconds", "0.2"]) == 0
    print(capsys.readouterr().out)
    built = Bundle.open(bundle.path)
    assert verify(built).passed
    with Predictor.load(built) as ours, Predictor.load(built, backend="onnxruntime") as theirs:
        images = np.random.default_rng(0).normal(size=(5, 3, SIZE, SIZE)).astype(np.float32)
        np.testing.assert_allclose(ours.logits(images), theirs.logits(images), atol=5e-3)
        assert ours.session.executed(images[:1]).time_share


def test_threads_share_an_engine(product, tmp_path):
    bundle = trt_bundle(tmp_path / f"tiny_fp16_{product}", format=product)
    assert cmt_edge.deploy.cli.build.main([str(bundle.path), "--seconds", "0.1"]) == 0
    images = np.random.default_rng(0).normal(size=(64, 3, SIZE, SIZE)).astype(np.float32)
    with Predictor.load(bundle.path) as predictor, ThreadPoolExecutor(8) as pool:
        alone = [predictor.logits(image[None]) for image in images]
        for _ in range(5):
            together = list(pool.map(lambda image: predictor.logits(image[None]), images))
            np.testing.assert_array_equal(np.concatenate(together), np.concatenate(alone))


def test_kernels_are_kept_for_the_next_start(tensorrt_rtx, tmp_path, monkeypatch):
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    bundle = trt_bundle(tmp_path / "tiny_fp16_rtx", format="rtx")
    assert cmt_edge.deploy.cli.build.main([str(bundle.path), "--seconds", "0.2"]) == 0
    images = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    with Predictor.load(bundle.path) as predictor:
        assert predictor.session.compiled_kernels.is_from_cache
        answers = predictor.logits(images)
    shutil.rmtree(tmp_path / "cache")
    with Predictor.load(bundle.path) as predictor:
        assert not predictor.session.compiled_kernels.is_from_cache
        np.testing.assert_allclose(predictor.logits(images), answers, atol=5e-3)


def test_a_gpu_that_tensorrt_for_rtx_does_not_serve(device, tmp_path, capsys):
    if importlib.util.find_spec("tensorrt_rtx") is None or is_served(device):
        pytest.skip("needs TensorRT for RTX and a GPU that it does not serve, such as an H100")
    bundle = trt_bundle(tmp_path / "tiny_fp16_rtx", format="rtx")
    assert cmt_edge.deploy.cli.build.main([str(bundle.path), "--seconds", "0.2"]) == 3
    assert "does not serve this GPU" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cuda", "tensorrt", "rtx"])
def test_onnxruntime_on_the_gpu(device, tmp_path, name):
    bundle = trt_bundle(tmp_path / "tiny_fp16_trt")
    try:
        get_runtime("onnxruntime").check(name)
    except RuntimeMissingError as exc:
        pytest.skip(str(exc))
    images = np.random.default_rng(0).normal(size=(1, 3, SIZE, SIZE)).astype(np.float32)
    with (
        Predictor.load(bundle, backend="onnxruntime", device=name) as ours,
        Predictor.load(bundle, backend="onnxruntime") as cpu,
    ):
        assert ours.info.device == f"{name}:0"
        np.testing.assert_allclose(ours.logits(images), cpu.logits(images), atol=5e-3)
        assert "runs all" in ours.session.executed(images).source


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_cmt_nano(product, tmp_path, precision):
    from cmt_edge.export import ExportConfig, run

    data = "generated" if precision == "int8" else None
    made = run(ExportConfig("cmt_nano", format=product, precision=precision, data=data, output=str(tmp_path)))
    if product == "rtx":  # its export needs no GPU, so that the device's own engine is made by cmt-build
        assert cmt_edge.deploy.cli.build.main([str(made.path), "--seconds", "0.2"]) == 0
        made = Bundle.open(made.path)
    assert made.manifest.engine.golden.passed
    assert made.manifest.latency.p50_ms > 0


@pytest.mark.slow
def test_an_engine_from_the_laptop(tensorrt_rtx, device, tmp_path):
    from cmt_edge.export import ExportConfig, run

    made = run(ExportConfig("cmt_nano", format="rtx", precision="fp16", output=str(tmp_path)))
    images = np.random.default_rng(0).normal(size=(4, 3, 32, 32)).astype(np.float32)
    with Predictor.load(made.path, backend="onnxruntime") as cpu:
        expected = cpu.logits(images)
    if device.gpu(0).sm not in PORTABLE:
        with pytest.raises(CmtEdgeError, match="engine"):
            Predictor.load(made.path, trusted_engine=True)
        return
    with Predictor.load(made.path, trusted_engine=True) as predictor:
        np.testing.assert_allclose(predictor.logits(images), expected, atol=5e-2)
