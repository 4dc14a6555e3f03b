"""The kernels that TensorRT for RTX compiles on opening: kept for the next start, sealed, and never a reason
to fail. The compiler is a stand-in; nothing of this has met a GPU."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import cmt_edge.deploy.cli.build
import cmt_edge.deploy.tensorrt.build
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.cli import predict
from cmt_edge.deploy.errors import CacheWarning
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.tensorrt.bindings import RTX, TENSORRT
from cmt_edge.deploy.tensorrt.cuda import Gpu
from cmt_edge.deploy.tensorrt.engine import EngineTarget, make_seal
from cmt_edge.deploy.tensorrt.jit import KERNELS, SEAL_LENGTH, KernelStore, find_store
from helpers.bundles import SIZE
from helpers.images import RED
from helpers.trt import forget_fakes, make_rtx_bundle


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_rtx_bundle(tmp_path / "tiny_fp16_rtx")


@pytest.fixture
def compilations(gpu_machine, monkeypatch, tmp_path):
    """Gives the number of times that kernels were compiled."""
    trace = tmp_path / "compiled.log"
    monkeypatch.setenv("FAKE_RTX_TRACE", str(trace))
    return lambda: len(trace.read_text().splitlines()) if trace.exists() else 0


def start(bundle: Bundle) -> bool:
    """One process: load, answer, close. Whether it used the kernels of an earlier one."""
    with Predictor.load(bundle, trusted_engine=True) as predictor:
        assert predictor(RED).label == "red"
        return predictor.loading.is_from_cache


def find_kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob(f"*{KERNELS}"))


def test_the_second_start_compiles_nothing(compilations, bundle, tmp_path):
    assert not start(bundle)
    assert compilations() == 1
    (kept,) = find_kept(tmp_path)
    before = kept.read_bytes()
    assert start(bundle)
    assert compilations() == 1
    assert kept.read_bytes() == before, "nothing new was compiled"


@pytest.mark.parametrize("switch", ["argument", "environment", "flag"])
def test_who_wants_no_cache_gets_none(compilations, bundle, tmp_path, monkeypatch, switch):
    start(bundle)
    (kept,) = find_kept(tmp_path)
    kept.unlink()
    if switch == "environment":
        monkeypatch.setenv("CMT_EDGE_NO_CACHE", "1")
        assert not start(bundle)
    elif switch == "argument":
        with Predictor.load(bundle, trusted_engine=True, cache=False) as predictor:
            predictor(RED)
    else:
        (tmp_path / "red.png").write_bytes(RED)
        words = (bundle.path, tmp_path / "red.png", "--trust-engine", "--no-cache", "-q")
        assert predict.main([*map(str, words)]) == 0
    assert not find_kept(tmp_path)
    assert compilations() == 2


def test_only_its_user_can_read_it(compilations, bundle, tmp_path):
    start(bundle)
    (kept,) = find_kept(tmp_path)
    assert kept.stat().st_mode & 0o777 == 0o600


def test_it_is_kept_after_the_first_answer_already(compilations, bundle, tmp_path):
    """A service is killed more often than it is closed."""
    with Predictor.load(bundle, trusted_engine=True) as predictor:
        assert not find_kept(tmp_path)
        predictor(RED)
        assert find_kept(tmp_path)


def test_all_contexts_share_it(compilations, bundle):
    with Predictor.load(bundle, trusted_engine=True) as predictor:
        batch = np.zeros((1, 3, SIZE, SIZE), np.float32)
        predictor.session.run(batch)
        predictor.session.executed(batch, 1)  # in a context of its own
    assert compilations() == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\nmore",
        lambda data: data[:-1],
        lambda data: b"0" * SEAL_LENGTH + data[SEAL_LENGTH:],
        lambda data: data[:10],
        lambda data: b"",
        lambda data: b"\xff" * 100,
    ],
)
def test_what_this_machine_did_not_write_is_not_used(compilations, bundle, tmp_path, change):
    start(bundle)
    (kept,) = find_kept(tmp_path)
    good = kept.read_bytes()
    kept.write_bytes(change(good))
    with pytest.warns(CacheWarning, match="not as this machine wrote them"):
        assert not start(bundle)
    assert compilations() == 2
    assert kept.read_bytes() == good, "it was made again"
    assert start(bundle)


def test_another_machines_secret_seals_nothing(compilations, bundle, monkeypatch, tmp_path):
    start(bundle)
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "other"))
    with pytest.warns(CacheWarning, match="not as this machine wrote them"):
        assert not start(bundle)


def test_the_seal_of_an_engine_seals_no_kernels(compilations, bundle, tmp_path):
    """An engine that this machine sealed cannot be passed off as kernels."""
    store = _make_store(bundle)
    store.write(b"kernels")
    (kept,) = find_kept(tmp_path)
    content = b"another content"
    seal = make_seal(hashlib.sha256(content).hexdigest(), store.key)
    kept.write_bytes(seal.encode() + content)
    with pytest.warns(CacheWarning, match="not as this machine wrote them"):
        assert store.read() == b""


@pytest.mark.parametrize("mode", ["other_driver", "broken_cache"])
def test_nvidia_may_refuse_what_was_kept(compilations, bundle, monkeypatch, mode):
    """Its own check of release, device and driver; then it is compiled and kept again."""
    start(bundle)
    monkeypatch.setenv("FAKE_TRT", mode)
    assert not start(bundle)
    assert compilations() == 2
    assert start(bundle) == (mode == "other_driver")


def test_each_engine_and_each_device_has_its_own(compilations, bundle, tmp_path):
    store = _make_store(bundle)
    store.write(b"mine")
    others = [
        replace(store, engine="f" * 64),
        *(
            replace(store, key=replace(store.key, **{name: "other"}))
            for name in ("onnx", "tensorrt", "cuda", "driver", "gpu", "sm")
        ),
    ]
    assert [other.read() for other in others] == [b""] * len(others)
    assert store.read() == b"mine"
    (kept,) = find_kept(tmp_path)
    for other in others:  # not under a false name either
        other.write(b"theirs")
        theirs = next(file for file in find_kept(tmp_path) if file != kept)
        theirs.write_bytes(kept.read_bytes())
        with pytest.warns(CacheWarning, match="not as this machine wrote them"):
            assert other.read() == b""
        theirs.unlink()


def test_without_a_place_nothing_fails(compilations, bundle, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(CacheWarning, match="could not be kept"):
        assert not start(bundle)


def test_without_a_secret_nothing_fails(compilations, bundle, monkeypatch, tmp_path):
    start(bundle)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("CMT_EDGE_STATE", str(tmp_path / "file" / "state"))
    with pytest.warns(CacheWarning, match="could not be kept.*secret"):
        assert not start(bundle)


def test_cmt_build_leaves_them_for_the_first_start(compilations, bundle, monkeypatch, tmp_path):
    monkeypatch.setattr(cmt_edge.deploy.cli.build, "read_protocol", lambda *_: Protocol(5, 0.0, 1, 0.0))
    monkeypatch.setattr(cmt_edge.deploy.tensorrt.build, "POWER_SECONDS", 0.05)
    forget_fakes()
    assert cmt_edge.deploy.cli.build.main([str(bundle.path), "-q"]) == 0
    before = compilations()
    with Predictor.load(bundle.path) as predictor:
        assert predictor(RED).label == "red"
        assert predictor.session.compiled_kernels.is_from_cache
    assert compilations() == before


def test_tensorrt_has_none(bundle):
    assert find_store(TENSORRT, bundle, _make_target(), b"plan") is None
    assert find_store(RTX, bundle, _make_target(), b"plan") == _make_store(bundle)


def test_a_clean_start_warns_of_nothing(compilations, bundle):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(bundle)
        start(bundle)


def _make_target() -> EngineTarget:
    return EngineTarget("1.7.1.116", "12.9", "550.1", Gpu(0, "RTX 4090", "8.9", 128, 1 << 30, False, "0"))


def _make_store(bundle: Bundle) -> KernelStore:
    store = find_store(RTX, bundle, _make_target(), b"plan")
    assert store is not None
    return store
