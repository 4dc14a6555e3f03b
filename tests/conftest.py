"""What several test modules share: where the shared data lies, and bundles made once a session."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CMT_EDGE_SHARED", ROOT.parent / "shared"))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Tests never read or write the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["CMT_EDGE_CACHE"] = str(folder)
    return folder


def shared(name: str) -> Path:
    """A file or folder of the shared data; skips the test where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} of the shared data, set CMT_EDGE_SHARED to its folder")
    return path


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The CIFAR-10 archive; append ``/train`` or ``/test``."""
    return shared("data/cifar10.tar")


def _export(tmp_path_factory, **settings):
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


TRACED: dict[tuple, bytes] = {}


@contextmanager
def traced_once():
    """torch.onnx takes ten seconds: equal weights are traced once a session."""
    import onnx

    from cmt_edge.cmt import weights_fingerprint
    from cmt_edge.export import pipeline

    real = pipeline.export_onnx

    def export_onnx(model, img_size, opset, outputs, check):
        key = weights_fingerprint(model), img_size, opset, tuple(outputs)
        if key not in TRACED:
            TRACED[key] = real(model, img_size, opset, outputs).SerializeToString()
        graph = onnx.load_from_string(TRACED[key])
        check(graph)
        return graph

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "export_onnx", export_onnx)
        yield patch


@pytest.fixture(scope="module")
def one_trace():
    """See :func:`traced_once`."""
    with traced_once():
        yield


FAKES = ROOT / "tests" / "fakes"


@pytest.fixture
def gpu_machine(monkeypatch, tmp_path):
    """A machine with a fake GPU and a fake TensorRT, its own secret and its own cache; the path of a log of
    deserialised engines.

    Child processes see the fakes too. ``FAKE_TRT`` and ``FAKE_CUDA`` in the environment make them fail.
    """
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("PYTHONPATH", str(FAKES))
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    trace = tmp_path / "deserialized.log"
    monkeypatch.setenv("FAKE_TRT_TRACE", str(trace))
    forget_fakes()
    yield trace
    forget_fakes()


def forget_fakes() -> None:
    """Import TensorRT, CUDA and the backend over them anew."""
    for name in [*sys.modules]:
        if name.split(".")[0] in ("tensorrt", "cuda") or name in (
            "cmt_edge.deploy.tensorrt.session",
            "cmt_edge.deploy.tensorrt.builder",
        ):
            del sys.modules[name]


GIANT_MACS = 9e9
"""Models above this are tested on demand (``pytest -m giant``): their goldens and exports take minutes and
gigabytes."""


def marked_models(names=None):
    """Registry names for ``parametrize``; giant ones carry the marker ``giant``."""
    from cmt_edge.cmt import list_models, model_spec

    names = list_models() if names is None else names
    return [
        pytest.param(n, marks=pytest.mark.giant) if (model_spec(n).macs or 0) > GIANT_MACS else n
        for n in names
    ]
