"""The TensorRT session on a fake GPU, and the names it uses against those that all versions have."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
import threading
from enum import EnumMeta, IntEnum

import numpy as np
import pytest

from cmt_edge.deploy.errors import InputError, RuntimeMissingError, StepError
from helpers.bundles import SIZE
from helpers.nvidia_names import CODE, RECEIVERS, RTX_ALONE, find_module, list_uses
from helpers.paths import ROOT
from helpers.shared import shared
from helpers.trt import forget_fakes, tiny_graph

NAMES = json.loads((ROOT / "tests" / "data" / "tensorrt_names.json").read_text())
ENUMS = {name.rpartition(".")[2]: set(members) for name, members in NAMES["enums"].items()}
CLASSES = {name: set(members) for name, members in NAMES["classes"].items()} | {"Logger": {"Severity"}}


def test_every_name_we_use_is_in_all_versions():
    seen: set[str] = set()
    for expression, name in list_uses():
        receiver = find_module(expression)
        if (receiver, name) in RTX_ALONE or (receiver, name) == ("trt", "ComputeCapability"):
            continue
        if receiver == "trt":
            assert name in CLASSES or name in ENUMS or name == "__version__", name
        elif receiver.startswith("trt."):
            owner = receiver.rpartition(".")[2]
            assert name in ENUMS.get(owner, set()) | CLASSES.get(owner, set()) | {"__init__"}, (
                f"{receiver}.{name}"
            )
        elif receiver in RECEIVERS:
            seen.add(receiver)
            assert name in CLASSES[RECEIVERS[receiver]], f"{RECEIVERS[receiver]}.{name}"
    assert seen | {"context"} == set(RECEIVERS) | {"context"}, "an expression is gone; update RECEIVERS"


def test_callbacks_have_the_names_tensorrt_calls():
    for base, methods in (
        ("IProgressMonitor", ("phase_start", "step_complete", "phase_finish")),
        ("ILogger", ("log",)),
        ("IProfiler", ("report_layer_time",)),
    ):
        assert set(methods) <= CLASSES[base]
        defined = [
            {f.name for f in node.body if isinstance(f, ast.FunctionDef)}
            for path in CODE
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef) and any(ast.unparse(b) == f"trt.{base}" for b in node.bases)
        ]
        assert defined
        assert all(set(methods) <= names for names in defined)


def test_the_fake_offers_no_more_than_the_real_ones(gpu_machine):
    fake = importlib.import_module("tensorrt")
    checked = 0
    for name, value in vars(fake).items():
        if isinstance(value, EnumMeta) and value is not IntEnum:
            assert set(value.__members__) <= ENUMS[name], name
        elif isinstance(value, type) and value.__module__ == "tensorrt" and not isinstance(value, EnumMeta):
            public = {n for n in vars(value) if not n.startswith("_")}
            assert public <= CLASSES[name], f"{name}: {public - CLASSES[name]}"
            checked += len(public)
    assert checked > 30


def test_the_committed_table_is_what_the_bindings_have():
    real = json.loads(shared("trt/api_names.json").read_text())
    assert NAMES["versions"] == real["versions"]
    for name, members in NAMES["classes"].items():
        if name != "ParserError":
            assert set(members) <= set(real["classes"][name]["methods"] + real["classes"][name]["properties"])
    for name, members in NAMES["enums"].items():
        assert set(members) <= set(real["enums"][name])


@pytest.mark.slow
def test_the_real_bindings_accept_our_code():
    script = shared("trt/with_bindings.sh")
    cached = all(
        os.path.exists(f"{os.environ.get('TRT_NULL_CACHE', '/tmp/trt-null')}/{v}/ready")
        for v in NAMES["versions"]
    )
    if sys.version_info[:2] != (3, 11) or not cached:
        pytest.skip("needs CPython 3.11 and the bindings; scripts/check_tensorrt_bindings.sh fetches them")
    done = subprocess.run(
        [ROOT / "scripts" / "check_tensorrt_bindings.sh", sys.executable],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"WITH_BINDINGS": str(script)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("build and run code accepted") == len(NAMES["versions"])


# --- sessions -------------------------------------------------------------------------------------


@pytest.fixture
def backend(gpu_machine):
    return importlib.import_module("cmt_edge.deploy.tensorrt.session")


def make_plan(batch=1, profile=None, half=True) -> bytes:
    header = {
        "typed": True,
        "detailed": True,
        "profile": profile and {"input": [[n, 3, SIZE, SIZE] for n in profile]},
    }
    return b"FAKEPLAN" + json.dumps(header).encode() + b"\n" + tiny_graph(batch, half).SerializeToString()


def session(backend, **options):
    from cmt_edge.deploy.tensorrt.cuda import open_cuda

    settings = {k: options.pop(k) for k in ("batch", "profile", "half") if k in options}
    return backend.TensorRTSession(open_fake_bindings(), make_plan(**settings), open_cuda(), **options)


def open_fake_bindings():
    """The bindings of the fake TensorRT, imported after :func:`forget_fakes`."""
    from cmt_edge.deploy.tensorrt.bindings import TENSORRT, open_bindings

    return open_bindings(TENSORRT)


def expected(batch: np.ndarray) -> np.ndarray:
    from cmt_edge.deploy.backends.fake import FakeSession

    return FakeSession(3).run(batch)[0]


def random_batch(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 3, SIZE, SIZE)).astype(np.float32)


@pytest.mark.parametrize("graphs", [True, False])
def test_it_computes_what_its_graph_says(backend, graphs):
    with_graph = session(backend, graphs=graphs, half=False)
    for seed in range(3):  # the second run replays the graph on new values
        batch = random_batch(1, seed)
        np.testing.assert_allclose(with_graph.run(batch)[0], expected(batch), atol=1e-6)


def test_a_new_shape_is_captured_anew(backend):
    dynamic = session(backend, batch="batch", profile=(1, 2, 4), half=False)
    for count in (1, 3, 4, 9, 1, 3):
        batch = random_batch(count, count)
        np.testing.assert_allclose(dynamic.run(batch)[0], expected(batch), atol=1e-6)


def test_results_are_the_callers_own(backend):
    opened = session(backend, half=False)
    first = opened.run(random_batch(1, 0))
    kept = first.copy()
    opened.run(random_batch(1, 1))
    np.testing.assert_array_equal(first, kept)


def test_a_batch_below_the_profile_is_refused(backend):
    with pytest.raises(InputError, match="--profile"):
        session(backend, batch="batch", profile=(2, 2, 4)).run(random_batch(1))


def test_threads_share_a_session(backend):
    opened = session(backend, half=False)
    batches = [random_batch(1, seed) for seed in range(8)]
    failures: list[int] = []

    def work(index: int) -> None:
        for _ in range(20):
            if not np.allclose(opened.run(batches[index])[0], expected(batches[index]), atol=1e-6):
                failures.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert 1 <= len(opened.workers) <= 8


def test_nothing_is_left_behind(backend):
    runtime = importlib.import_module("cuda.bindings.runtime")
    opened = session(backend, batch="batch", profile=(1, 2, 4))
    for count in (1, 2, 4):
        opened.run(random_batch(count))
        opened.device_times(random_batch(count), 2)
    assert runtime.memory
    opened.executed(random_batch(1), 2)
    opened.close()
    assert [runtime.memory, runtime.streams, runtime.events, runtime.graphs] == [{}, {}, {}, {}]


def test_device_times(backend):
    times = session(backend).device_times(random_batch(1), 7)
    for column in (times.compute, times.with_copies, times.enqueue):
        assert column.shape == (7,)
        assert (column > 0).all()
    assert (times.with_copies >= times.compute).all()


def test_where_a_graph_cannot_be_captured_it_runs_without(backend, monkeypatch):
    monkeypatch.setenv("FAKE_CUDA", "no_capture")
    opened = session(backend, half=False)
    np.testing.assert_allclose(opened.run(random_batch(1))[0], expected(random_batch(1)), atol=1e-6)
    assert not opened.graphs
    assert "no CUDA graph" in opened.notes[0]


@pytest.mark.parametrize("version", ["10.3.0", "11.4.0.106"])
def test_what_ran_is_read_back(backend, monkeypatch, version):
    monkeypatch.setenv("FAKE_TRT_VERSION", version)
    forget_fakes()
    executed = session(importlib.import_module("cmt_edge.deploy.tensorrt.session")).executed(
        random_batch(1), 3
    )
    assert executed.operations == {"fp16": 2}
    assert executed.time_share["fp16"] == pytest.approx(
        0.8
    )  # pool, flatten, product and the cast back of five layers
    assert executed.conversion_share == pytest.approx(0.6)
    assert "profiler" in executed.source


def test_types_of_a_dynamic_engine_are_known(backend):
    executed = session(backend, batch="batch", profile=(1, 2, 4)).executed(random_batch(2), 3)
    assert executed.operations == {"fp16": 2}
    assert "other" not in executed.time_share


def test_an_empty_batch(backend):
    assert session(backend).run(np.empty((0, 3, SIZE, SIZE), np.float32))[0].shape == (0, 3)


def test_two_gpus_in_one_thread(backend, monkeypatch):
    monkeypatch.setenv("FAKE_GPUS", "2")
    runtime = importlib.import_module("cuda.bindings.runtime")
    first = session(backend)
    monkeypatch.setattr(
        runtime,
        "cudaMalloc",
        lambda size, real=runtime.cudaMalloc: (seen.append(runtime.current()), real(size))[1],
    )
    seen: list[int] = []
    first.run(random_batch(1))
    assert set(seen) == {0}
    runtime.cudaSetDevice(1)  # somebody else's doing
    first.workers[0].shape = ()
    first.run(random_batch(1))
    assert set(seen) == {0}


def test_what_is_no_engine_is_refused(backend):
    from cmt_edge.deploy.tensorrt.cuda import open_cuda

    with pytest.raises(StepError, match="refused the engine") as error:
        backend.TensorRTSession(open_fake_bindings(), b"not an engine", open_cuda())
    assert "magic tag" in error.value.why


def test_no_memory_for_a_context(backend, monkeypatch):
    opened = session(backend)
    monkeypatch.setenv("FAKE_TRT", "no_context")
    with pytest.raises(RuntimeMissingError, match="free memory"):
        opened.run(random_batch(1))


@pytest.mark.parametrize(
    ("device", "index"), [(None, 0), ("0", 0), ("2", 2), ("cuda", 0), ("cuda:1", 1), ("GPU", 0), ("gpu:3", 3)]
)
def test_names_of_devices(backend, device, index):
    assert backend.parse_gpu_index(device) == index


@pytest.mark.parametrize("device", ["cpu", "-1", "cuda:x", "1.5"])
def test_names_that_are_no_device(backend, device):
    with pytest.raises(InputError, match="no device"):
        backend.parse_gpu_index(device)
