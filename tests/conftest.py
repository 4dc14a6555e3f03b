"""What several test modules share: where the shared data lies, and bundles made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT
from helpers.exports import traced_once
from helpers.paths import FAKES
from helpers.shared import shared
from helpers.trt import forget_fakes


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests never read or write the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CMT_EDGE_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The CIFAR-10 archive; append ``/train`` or ``/test``."""
    return shared("data/cifar10.tar")


def _export(tmp_path_factory, **settings):
    pytest.importorskip("torch", reason="needs torch, which makes the bundle")
    from cmt_edge.export import ExportConfig, run

    return run(ExportConfig("cmt_nano", output=str(tmp_path_factory.mktemp("bundles")), **settings))


@pytest.fixture(scope="session")
def fp32_bundle(tmp_path_factory):
    """cmt_nano, OpenVINO, fp32."""
    return _export(tmp_path_factory)


@pytest.fixture(scope="session")
def onnx_bundle(tmp_path_factory):
    """cmt_nano, ONNX, fp32, any batch size."""
    return _export(tmp_path_factory, format="onnx", batch=0)


@pytest.fixture(scope="session")
def int8_bundle(tmp_path_factory):
    """cmt_nano, OpenVINO, int8, calibrated on generated images."""
    return _export(tmp_path_factory, precision="int8", data="generated", calib_size=32)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread: as the golden data was made, and much faster where other work keeps the cores
    busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one_trace():
    """See :func:`traced_once`."""
    with traced_once():
        yield


@pytest.fixture
def served_by_fake(monkeypatch):
    """Bundles of every format are opened by the fake runtime, as no manifest can ask for."""
    for form in RUNTIME_OF_FORMAT:
        monkeypatch.setitem(RUNTIME_OF_FORMAT, form, "fake")


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """A machine with a fake GPU and a fake TensorRT, its own secret and its own cache; the path of a log of
    deserialised engines.

    Child processes see the fakes too. ``FAKE_TRT`` and ``FAKE_CUDA`` in the environment make them fail.
    """
    monkeypatch.syspath_prepend(str(FAKES))
    children = [str(FAKES), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(children))
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    trace = tmp_path / "deserialized.log"
    monkeypatch.setenv("FAKE_TRT_TRACE", str(trace))
    forget_fakes()
    yield trace
    forget_fakes()
