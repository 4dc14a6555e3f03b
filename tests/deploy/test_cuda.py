"""CUDA calls through both ways: a fake ``cuda-bindings``, and a small library of C functions for
``ctypes``."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmt_edge.deploy.errors import RuntimeMissingError
from cmt_edge.deploy.tensorrt import cuda
from cmt_edge.deploy.tensorrt.cuda import TO_DEVICE, TO_HOST, CudaError, open_cuda
from helpers.paths import FAKES


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    """The fake ``libcudart``, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    path = tmp_path_factory.mktemp("cudart") / "libcudart.so.12"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", path, FAKES / "cudart.c"], check=True)
    return path


@pytest.fixture(params=["bindings", "ctypes"])
def device(request, monkeypatch):
    if request.param == "bindings":
        request.getfixturevalue("gpu_machine")
    else:
        monkeypatch.setattr(cuda, "LIBRARIES", (str(request.getfixturevalue("library")),))
        monkeypatch.setattr(cuda, "_ask_driver_name", lambda index: "Fake Orin")
        monkeypatch.setitem(sys.modules, "cuda", None)  # not installed
    return open_cuda()


def test_which_way_it_took(device):
    assert device.source.startswith(("cuda-bindings 13", "ctypes "))


def test_the_gpu_is_described(device):
    gpu = device.gpu(0)
    assert (gpu.name, gpu.sm, gpu.memory, gpu.integrated) == ("Fake Orin", "8.7", 8 << 30, True)
    assert device.runtime_version() == "12.6"
    assert device.driver_version() in ("12.6", "12.4")
    free, total = device.memory()
    assert 0 < free < total
    with pytest.raises(RuntimeMissingError, match="no GPU 1"):
        device.gpu(1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=20, deadline=None)
@given(values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=300))
def test_bytes_survive_the_device(device, values):
    """Host -> pinned -> device -> pinned gives the same floats."""
    source = np.array(values, np.float32)
    stream, there = device.stream(), device.device_memory(source.nbytes)
    pinned = device.pinned_memory(source.nbytes)
    back = np.ctypeslib.as_array((ctypes.c_float * len(source)).from_address(pinned))
    device.copy(there, source.ctypes.data, source.nbytes, TO_DEVICE, stream)
    device.copy(pinned, there, source.nbytes, TO_HOST, stream)
    device.synchronize(stream)
    np.testing.assert_array_equal(back, source)
    device.free_pinned_memory(pinned)
    device.free_device_memory(there)
    device.destroy_stream(stream)


def test_events_measure_time(device):
    stream, start, end = device.stream(), device.event(), device.event()
    device.record(start, stream)
    device.record(end, stream)
    assert 0 <= device.elapsed_ms(start, end) < 1000
    device.destroy_event(start)
    device.destroy_event(end)


def test_a_graph_is_captured_and_launched(device, monkeypatch):
    monkeypatch.setenv("FAKE_GRAPHS", "1")
    stream, target = device.stream(), device.pinned_memory(8)
    source = np.arange(2, dtype=np.float32)
    graph = device.capture(stream, lambda: device.copy(target, source.ctypes.data, 8, TO_DEVICE, stream))
    source += 5
    device.launch(graph, stream)
    device.synchronize(stream)
    if device.source.startswith("cuda"):  # the C library replays nothing
        np.testing.assert_array_equal(
            np.ctypeslib.as_array((ctypes.c_float * 2).from_address(target)), [5, 6]
        )
    device.destroy_graph(graph)


def test_what_cannot_be_captured_is_a_typed_error(device, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "no_capture")
    stream = device.stream()
    with pytest.raises(CudaError, match="cudaStreamEndCapture failed with CUDA error 900"):
        device.capture(stream, lambda: None)

    def fail() -> None:
        raise KeyError("inside")

    with pytest.raises(KeyError):
        device.capture(stream, fail)
    device.synchronize(stream)  # not capturing any more


def test_memory_that_is_not_there(device, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "no_memory")
    with pytest.raises(CudaError, match="CUDA error 2") as error:
        device.device_memory(1 << 40)
    assert error.value.code == 2
    assert "close other programs" in error.value.remedy


def test_a_driver_too_old_for_the_wheels_leads_to_the_library(gpu_machine, library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "old_driver")
    monkeypatch.setattr(cuda, "LIBRARIES", (str(library),))
    assert open_cuda().source.startswith("ctypes")


def test_no_way_says_what_each_lacked(gpu_machine, library, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "no_device")
    monkeypatch.setattr(cuda, "LIBRARIES", (str(library),))
    with pytest.raises(RuntimeMissingError) as error:
        open_cuda()
    assert "cuda-bindings 13.0.0: no device" in error.value.why
    assert "libcudart.so.12: no device" in error.value.why


def test_nothing_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda", None)
    monkeypatch.setattr(cuda, "LIBRARIES", ("libnothing.so",))
    monkeypatch.setattr(cuda.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RuntimeMissingError, match="no NVIDIA GPU") as error:
        open_cuda()
    assert "none of libnothing.so found" in error.value.why
    assert "cmt-edge[tensorrt]" in error.value.remedy


def test_the_real_wheels_without_a_driver():
    """Errors come back as codes, not exceptions: what the fallback relies on."""
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-bindings is not installed")
    from cuda.bindings import runtime

    code, count = runtime.cudaGetDeviceCount()
    if count:
        pytest.skip("there is a GPU here; see the tests marked gpu")
    assert int(code) in (35, 100)
    assert all(
        hasattr(runtime, name) for name in [*cuda.SIGNATURES, "cudaStreamEndCapture", "cudaGetErrorString"]
    )
    built = cuda.open_bindings()
    with pytest.raises(CudaError, match="insufficient"):
        built.device_memory(16)
    for call in (
        lambda: built.copy(0, 0, 0, TO_HOST, 0),
        lambda: built.capture(0, lambda: None),
        lambda: built.call("cudaDeviceGetAttribute", 75, 0),
    ):
        with pytest.raises(CudaError):
            call()
