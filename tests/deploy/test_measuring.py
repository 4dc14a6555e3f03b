"""The process that measures: answers, typed errors across the border, crashes, limits."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.errors import BundleError, RuntimeMissingError, StepError, UnknownNameError
from cmt_edge.deploy.measure import child as measuring
from cmt_edge.deploy.measure import isa as instruction_sets
from cmt_edge.deploy.measure.child import MeasuringProcess
from cmt_edge.deploy.measure.isa import ISAS, has_int8_hardware
from cmt_edge.deploy.measure.timing import Protocol
from helpers.bundles import make_bundle

SHORT = Protocol(iters=3, seconds=0.0, warmup_iters=1, warmup_seconds=0.0)


@pytest.fixture(scope="module")
def process():
    with MeasuringProcess() as p:
        yield p


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "bundle")


def test_logits_are_those_of_a_predictor(process, bundle, tmp_path):
    predictor = Predictor.load(bundle)
    size = predictor.spec.size
    batch = np.random.default_rng(0).random((40, 3, size, size), np.float32)
    pixels = bundle.golden().pixels
    expected = predictor.logits(batch), predictor.logits(predictor.prepare(bundle.golden().sources))
    files = [tmp_path / "batch.npy", tmp_path / "pixels.npy"]
    for file, array in zip(files, (batch, pixels), strict=True):
        np.save(file, array)
    for places in ([0], [1], [0, 1], [1, 0, 1]):
        found = process.logits(bundle.path, [files[place] for place in places], None)
        for place, logits in zip(places, found, strict=True):
            assert np.array_equal(logits, expected[place])


def test_latencies_refer_to_the_first(process, bundle, tmp_path):
    other = make_bundle(tmp_path / "other")
    result = process.benchmark([bundle.path, other.path], SHORT, None)
    assert [r.name for r in result.results] == ["bundle", "other"]
    assert result.protocol == SHORT
    assert result.results[0].model.count >= 3
    assert process.kernels(bundle.path, None) == {}  # the fake runtime tells none


def test_runtimes_and_their_precisions(process):
    assert process.runtime("fake") == "fake 1"
    assert process.missing("fake", "bf16") == ""
    with pytest.raises(UnknownNameError, match="unknown runtime 'opnvino'") as error:
        process.runtime("opnvino")
    assert "did you mean openvino" in (error.value.remedy or "")
    assert process.runtime("fake") == "fake 1"  # an error does not end the process


def test_errors_keep_their_kind_and_words(process, tmp_path):
    with pytest.raises(BundleError) as error:
        process.kernels(tmp_path / "nothing", None)
    assert error.value.where == str(tmp_path / "nothing")
    assert "cmt-export" in (error.value.remedy or "")


def test_other_failures_are_typed_too(process, bundle, tmp_path):
    with pytest.raises(StepError, match="measuring failed in the runtime") as error:
        process.logits(bundle.path, [tmp_path / "gone.npy"], None)
    assert "FileNotFoundError" in (error.value.why or "")


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ({"text": 5}, "text is 5, expected text"),
        ({}, "the answer to 'runtime' lacks entries: text"),
        (None, "the answer to 'runtime' is null, expected an object"),
        ({"text": "fake 1", "more": 1}, "the answer to 'runtime' holds unknown entries: 'more'"),
    ],
)
def test_an_answer_of_another_kind_is_one_typed_error(monkeypatch, answer, why):
    with MeasuringProcess() as process:
        monkeypatch.setattr(process.child, "request", lambda call, **arguments: answer)
        with pytest.raises(StepError, match="do not understand each other") as error:
            process.runtime("fake")
        assert error.value.why == why


def test_a_request_of_another_kind_is_one_typed_error(process):
    with pytest.raises(StepError, match="do not understand each other") as error:
        process.child.request("kernels", bundle=5, threads=None)
    assert error.value.why == "bundle is 5, expected text"


def test_a_crash_is_one_typed_error():
    with MeasuringProcess() as process:
        process.runtime("fake")
        os.kill(process.child.pid, signal.SIGSEGV)
        with pytest.raises(StepError, match=r"crashed .* SIGSEGV"):
            process.runtime("fake")
        assert process.runtime("fake") == "fake 1"  # in another process


@pytest.mark.parametrize("isa", ISAS)
def test_a_limit_that_this_cpu_has_not(monkeypatch, isa):
    monkeypatch.setattr(instruction_sets, "describe_host", lambda: SimpleNamespace(flags=["sse2"], cpu="old"))
    with pytest.raises(RuntimeMissingError, match=f"no {isa}"):
        MeasuringProcess(isa)


def test_kernels_beyond_the_limit_are_refused(monkeypatch):
    monkeypatch.setattr(
        instruction_sets,
        "describe_host",
        lambda: SimpleNamespace(flags=[i.flag for i in ISAS.values()], cpu="new"),
    )
    with MeasuringProcess("avx2") as process:
        process.check_limit({"brgconv_avx2_f32": 0.9, "gemm_mlas_f32": 0.1})
        with pytest.raises(RuntimeMissingError, match="brgconv_avx512_f32"):
            process.check_limit({"brgconv_avx512_f32": 0.01})
    with MeasuringProcess() as process:
        process.check_limit({"brgconv_avx512_f32": 1.0})


def test_the_switches_are_set_in_the_child_only(monkeypatch):
    monkeypatch.setattr(instruction_sets, "describe_host", lambda: SimpleNamespace(flags=["avx2"], cpu="new"))
    with MeasuringProcess("avx2") as limited, MeasuringProcess() as unlimited:
        assert limited.child.environment == dict.fromkeys(measuring.SWITCHES, "AVX2")
        assert not set(measuring.SWITCHES) & set(os.environ)
        assert unlimited.child.environment == {}


def test_int8_hardware(monkeypatch):
    def describe():
        return SimpleNamespace(flags=flags, cpu="x")

    monkeypatch.setattr(instruction_sets, "describe_host", describe)
    flags = ["avx2", "avx512_vnni"]
    assert has_int8_hardware(None)
    assert not has_int8_hardware("avx2")
    assert has_int8_hardware("avx2_vnni")
    flags = ["avx2"]
    assert not has_int8_hardware(None)
