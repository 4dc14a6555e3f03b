"""What several test modules share: where the shared data lies, and bundles made once a run."""

from __future__ import annotations

import gc
import os
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT
from helpers.exports import traced_once
from helpers.made_once import copy_once_made, find_run_folder
from helpers.measuring import brief_commands, brief_exports
from helpers.paths import FAKES, ROOT
from helpers.shared import shared
from helpers.trt import forget_fakes

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports PyTorch
"""PyTorch computes on one thread, here and in child processes: the workers share the cores, and on small
tensors threads that wait for each other take longer."""

os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
"""Child processes keep their compiled modules, as an installation does; every command that a test starts
would compile those of the checkout anew."""

LONGEST_FIRST = (
    "tests/export/test_rtx.py",
    "tests/export/test_auto.py",
    "tests/export/test_cli.py",
    "tests/export/test_pipeline.py",
    "tests/export/test_trt.py",
    "tests/deploy/test_load.py",
    "tests/cmt/test_fuse.py",
    "tests/test_packaging.py",
    "tests/export/test_outputs.py",
    "tests/export/test_families.py",
    "tests/calib/test_quantize.py",
    "tests/calib/test_restore.py",
    "tests/calib/test_synthetic.py",
    "tests/deploy/test_offline.py",
    "tests/export/test_checkpoint_alone.py",
    "tests/export/test_features.py",
    "tests/cmt/test_official.py",
    "tests/cmt/test_own_models.py",
    "tests/deploy/test_crash.py",
)
"""The test modules that take longest, the longest first. A worker that began one of them last would work
alone at the end, because a module is not divided between workers."""


def pytest_configure():
    """Take back what ``nohup`` and shells that start something in the background do: child processes would
    inherit that SIGHUP or SIGINT is ignored, and tests send them these signals."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_collection_modifyitems(config, items):
    """Begin with the longest modules. ``make quick`` has an order of its own."""
    if not config.pluginmanager.has_plugin("quick_deadline"):
        rank = {path: number for number, path in enumerate(LONGEST_FIRST)}
        items.sort(key=lambda item: rank.get(item.nodeid.partition("::")[0], len(rank)))


def pytest_collection_finish():
    """Collect garbage less often, and never look at what was imported: with PyTorch in memory, one collection
    takes half a second, and exports of models make much that is collected."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def pytest_unconfigure():
    """Extension modules complain at the end of objects that nobody has freed."""
    gc.unfreeze()


@pytest.fixture
def script(monkeypatch):
    """A function that imports a file of ``scripts/``."""

    monkeypatch.syspath_prepend(ROOT / "scripts")  # what scripts share lies beside them

    def load(name: str):
        spec = spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory, run_folder):
    """Tests never read or write the user's cache, nor the secret that seals what lies there. The workers of a
    run share the secret and the traced graphs, so that child processes trace each model once, too."""
    folder = tmp_path_factory.mktemp("cache")
    shared_traces = run_folder / "cache" / "traced"
    os.environ["CMT_EDGE_CACHE"] = str(folder)
    os.environ["CMT_EDGE_STATE"] = str(run_folder / "state")
    shared_traces.mkdir(parents=True, exist_ok=True)
    (folder / shared_traces.name).symlink_to(shared_traces)
    return folder


@pytest.fixture(scope="session", autouse=True)
def any_width():
    """What commands print is not folded: pytest-xdist tells its workers the width of its own terminal."""
    os.environ.pop("COLUMNS", None)


@pytest.fixture(scope="session", autouse=True)
def brief_bench():
    """``cmt-bench`` does not warm up for a second."""
    with brief_commands():
        yield


@pytest.fixture(scope="session")
def cifar() -> Path:
    """The CIFAR-10 archive; append ``/train`` or ``/test``."""
    return shared("data/cifar10.tar")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A folder that all workers of this run share."""
    return find_run_folder(tmp_path_factory)


@pytest.fixture(scope="session")
def traced(run_folder) -> Path:
    """The folder of traced graphs; see :func:`traced_once`."""
    return run_folder / "traced"


@pytest.fixture(scope="session")
def exported(run_folder, traced, tmp_path_factory):
    """Gives a worker its own copy of a bundle of cmt_nano that is exported once a run."""

    def give(name: str, **settings):
        pytest.importorskip("torch", reason="needs torch, which makes the bundle")
        from cmt_edge.deploy import Bundle
        from cmt_edge.export import ExportConfig, run

        def make(folder: Path) -> None:
            with traced_once(traced):
                run(ExportConfig("cmt_nano", output=str(folder), **settings))

        target = run_folder / "bundles" / name
        (bundle,) = copy_once_made(target, tmp_path_factory.mktemp("bundles"), make).iterdir()
        return Bundle.open(bundle)

    return give


@pytest.fixture(scope="session")
def fp32_bundle(exported):
    """cmt_nano, OpenVINO, fp32."""
    return exported("fp32")


@pytest.fixture(scope="session")
def onnx_bundle(exported):
    """cmt_nano, ONNX, fp32, any batch size."""
    return exported("onnx", format="onnx", batch=0)


@pytest.fixture(scope="session")
def int8_bundle(exported):
    """cmt_nano, OpenVINO, int8, calibrated on generated images."""
    return exported("int8", precision="int8", data="generated", calib_size=32)


@pytest.fixture(scope="session")
def int8_onnx_bundle(exported):
    """cmt_nano, ONNX Runtime, int8, calibrated on generated images."""
    return exported("int8_onnx", format="onnx", precision="int8", data="generated", calib_size=32)


@pytest.fixture(scope="module")
def one_thread():
    """PyTorch on one thread: as the golden data was made, and much faster where other work keeps the cores
    busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def brief_measurements():
    """See :func:`brief_exports`; to the end of the run, once a test has asked for it."""
    with brief_exports():
        yield


@pytest.fixture(scope="module")
def one_trace(traced):
    """See :func:`traced_once`."""
    with traced_once(traced):
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
