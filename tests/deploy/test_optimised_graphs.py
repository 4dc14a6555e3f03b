"""Graphs that ONNX Runtime has optimised: when they are kept, and what their key holds besides."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino")
pytest.importorskip("onnxruntime")

from cmt_edge.deploy.backends import keeping, onnxruntime_cache
from cmt_edge.deploy.backends import onnxruntime as runtime
from cmt_edge.deploy.backends.base import LoadOptions
from cmt_edge.deploy.bundle import ONNX
from cmt_edge.deploy.errors import CacheWarning
from helpers.bundles import make_bundle, make_calibration
from helpers.kept_models import WAYS, answer

pytestmark = pytest.mark.usefixtures("own_folders")


def test_exact_products_of_a_real_model_have_the_same_bits(int8_onnx_bundle, monkeypatch):
    monkeypatch.setattr(runtime, "can_overflow", lambda: True)
    manifest = replace(int8_onnx_bundle.manifest, calibration=make_calibration(None))
    bundle = replace(int8_onnx_bundle, manifest=manifest)
    size = bundle.preprocess.size
    batch = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    found = []
    for cache in (False, True, True):
        session = runtime.RUNTIME.load(bundle, LoadOptions(threads=1, cache=cache))
        found.append((session.is_from_cache, session.run(batch)[0].tobytes()))
    assert [is_from_cache for is_from_cache, _ in found] == [False, False, True]
    assert len({logits for _, logits in found}) == 1


def test_the_kept_graph_does_not_stay_in_memory_beside_the_session(tmp_path):
    bundle = WAYS["onnxruntime"].make_bundle(tmp_path / "tiny")
    answer(bundle)
    session = runtime.RUNTIME.load(bundle, LoadOptions())
    assert session.is_from_cache
    (entry,) = WAYS["onnxruntime"].list_entries()
    assert entry.read_bytes() not in vars(session.inference).values()


def test_an_optimised_float_graph_is_not_kept(tmp_path):
    """Hashing its weights takes as long as optimising it anew."""
    bundle = make_bundle(tmp_path / "tiny")
    answer(bundle)
    assert not answer(bundle)[1]
    assert WAYS["onnxruntime"].list_entries() == []


def test_where_the_processor_is_unknown_no_optimised_graph_is_kept(tmp_path, monkeypatch):
    """It holds memory layouts of one kind of processor."""
    monkeypatch.setattr(keeping, "PROCESSORS", tmp_path / "none")
    bundle = WAYS["onnxruntime"].make_bundle(tmp_path / "tiny")
    answer(bundle)
    assert not answer(bundle)[1]
    assert WAYS["onnxruntime"].list_entries() == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("place", ["missing", "full"])
def test_an_optimised_graph_that_cannot_be_written_keeps_nothing_from_opening(tmp_path, monkeypatch, place):
    bundle = WAYS["onnxruntime"].make_bundle(tmp_path / "tiny")
    expected, _ = answer(bundle, cache=False)
    if place == "full":
        (tmp_path / ONNX).symlink_to("/dev/full")
    folder = tmp_path if place == "full" else tmp_path / "missing"
    monkeypatch.setattr(onnxruntime_cache, "scratch_folder", lambda *_: contextlib.nullcontext(folder))
    with pytest.warns(CacheWarning, match="results are not kept") as told:
        assert answer(bundle) == (expected, False)
    assert len(told) == 1
    assert WAYS["onnxruntime"].list_entries() == []


def test_one_optimised_graph_serves_any_number_of_threads(tmp_path):
    """They do not change it."""
    bundle = WAYS["onnxruntime"].make_bundle(tmp_path / "tiny")
    answer(bundle, threads=1)
    for options in ({"threads": 2}, {"throughput": True}):
        assert answer(bundle, **options) == (answer(bundle, cache=False, **options)[0], True)


def test_exact_products_are_part_of_the_key(tmp_path, monkeypatch):
    """ONNX Runtime makes other graphs for them."""
    bundle = make_bundle(tmp_path / "tiny", precision="int8", calibration=make_calibration(None))
    for overflows in (True, False):
        monkeypatch.setattr(runtime, "can_overflow", lambda to=overflows: to)
        assert not answer(bundle)[1]
        assert answer(bundle)[1]


@pytest.mark.parametrize("fault", ["secret", "folder"])
def test_where_nothing_can_be_kept_no_graph_is_written(tmp_path, monkeypatch, fault):
    """It would cost time at every start."""
    bundle = WAYS["onnxruntime"].make_bundle(tmp_path / "tiny")
    expected, _ = answer(bundle, cache=False)
    (tmp_path / "file").write_text("in the way")
    name = "CMT_EDGE_STATE" if fault == "secret" else "CMT_EDGE_CACHE"
    monkeypatch.setenv(name, str(tmp_path / "file" / "folder"))
    monkeypatch.setattr(onnxruntime_cache, "_optimise", lambda *_: pytest.fail("it was written"))
    with pytest.warns(CacheWarning, match=name):
        assert answer(bundle) == (expected, False)
