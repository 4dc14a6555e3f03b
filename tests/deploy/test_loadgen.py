"""MLPerf LoadGen asks a bundle: its figures are ours within the noise, and a failure ends the test."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from cmt_edge.deploy import Predictor, report
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle import read_record
from cmt_edge.deploy.cli import bench
from cmt_edge.deploy.errors import InputError, OutputError, RuntimeMissingError
from cmt_edge.deploy.measure import loadgen
from cmt_edge.deploy.measure.benchmark import benchmark, measure_throughput
from cmt_edge.deploy.measure.loadgen import LoadGenOptions, run_loadgen
from cmt_edge.deploy.measure.loadgen_driver import DETAIL, OneAtATime, Pool, Query, read_figures, run_test
from cmt_edge.deploy.measure.loadgen_result import SCENARIOS, LoadGenResult
from cmt_edge.deploy.measure.timing import Protocol
from helpers.bundles import LABELS, SIZE, SPEC, make_bundle
from helpers.cli import strict

BRIEF = Protocol(iters=40, seconds=0.4, warmup_iters=2, warmup_seconds=0.05)
DELAY_S = 0.004
"""Duration of an inference of the tests' session in seconds, far above what handing a request over takes."""

needs_loadgen = pytest.mark.skipif(find_spec("mlperf_loadgen") is None, reason='needs the extra "loadgen"')


@pytest.fixture(autouse=True)
def _brief_warm_up(monkeypatch):
    """A warm-up lasts until the latency is stable; on a busy machine that is for seconds."""
    monkeypatch.setattr("cmt_edge.deploy.measure.timing.WARMUP_LIMIT_S", 0.2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


class Recorded(FakeSession):
    """Remembers the images that it was asked for; two threads give the best throughput."""

    parallelism = 2

    def __init__(self) -> None:
        super().__init__(len(LABELS), delay_s=DELAY_S)
        self.seen: list[bytes] = []

    def run(self, batch):
        self.seen += [image.tobytes() for image in batch]
        return super().run(batch)


def open_with(session, batch=1):
    @contextmanager
    def opened(bundle, *, throughput):
        with Predictor(session, SPEC, LABELS, batch=batch) as predictor:
            yield predictor

    return opened


def ask(bundle, tmp_path, scenarios, session, protocol=BRIEF, **options):
    asked = LoadGenOptions(scenarios, tmp_path / "logs", **options)
    return run_loadgen(bundle, "tiny", open_with(session), asked, protocol)


# --- with the real LoadGen ------------------------------------------------------------------------


@needs_loadgen
def test_figures_agree_with_ours(bundle, tmp_path):
    session = Recorded()
    single, offline, server = ask(bundle, tmp_path, SCENARIOS, session, rate=100.0, limit_ms=500.0)
    for compared in (single, offline):
        assert compared.agrees == (abs(compared.ratio - 1) <= compared.noise)
    assert min(single.p50, *single.ours) >= 1e3 * DELAY_S
    assert max(offline.rate, *offline.ours) <= 2 / DELAY_S
    assert single.valid
    assert server.agrees is None
    assert server.ours is None
    assert server.p50 >= 1e3 * DELAY_S
    assert len(set(session.seen)) == len(bundle.golden().pixels), "every image is asked for"


@needs_loadgen
def test_its_own_logs_are_kept(bundle, tmp_path):
    (result,) = ask(bundle, tmp_path, ("SingleStream",), Recorded())
    folder = tmp_path / "logs" / "tiny" / "SingleStream"
    assert result.logs == str(folder)
    assert "MLPerf Results Summary" in (folder / "mlperf_log_summary.txt").read_text()
    found = read_figures(folder / DETAIL)
    assert result.p50 == found["result_50.00_percentile_latency_ns"] / 1e6
    assert result.images == found["result_query_count"] >= BRIEF.iters


@needs_loadgen
def test_a_limit_that_is_not_kept_is_told_in_its_words(bundle, tmp_path):
    (result,) = ask(bundle, tmp_path, ("Server",), Recorded(), rate=50.0, limit_ms=1.0)
    assert not result.valid
    assert "Reduce target QPS" in result.reason


@needs_loadgen
def test_batches_are_filled_up(bundle, tmp_path):
    session = Recorded()
    images = np.arange(5 * 3 * 4, dtype=np.float32).reshape(5, 1, 3, 2, 2)
    run_test(Query("Offline", 0.1, 1, rate=50.0), Pool(session, images, 4), tmp_path / "logs")
    assert len(session.seen) % 4 == 0
    assert {image.tobytes() for image in images} == set(session.seen)


class Broken(Recorded):
    """Fails after some answers."""

    def run(self, batch):
        if len(self.seen) > 20:
            raise ValueError("the device is gone")
        return super().run(batch)


IMAGES = np.zeros((2, 1, 3, 2, 2), np.float32)
"""Two images as a graph takes them."""


@needs_loadgen
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_failure_is_raised_once_the_test_has_ended(tmp_path, scenario):
    answerer = OneAtATime(Broken(), IMAGES) if scenario == "SingleStream" else Pool(Broken(), IMAGES, 1)
    with pytest.raises(ValueError, match="the device is gone"):
        run_test(Query(scenario, 0.3, 50, expected_ms=2.0, rate=300.0, limit_ms=50.0), answerer, tmp_path)


def test_a_failure_while_our_own_rate_is_measured_is_raised():
    with Predictor(Broken(), SPEC, LABELS) as predictor, pytest.raises(ValueError, match="device is gone"):
        measure_throughput(predictor, np.zeros((1, 3, SIZE, SIZE), np.float32), seconds=600.0)


@needs_loadgen
def test_an_interrupt_ends_a_test(bundle, tmp_path):
    """Offline has asked for the images of ten minutes when the signal comes."""
    session = Recorded()
    timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run_test(Query("Offline", 600.0, 1, rate=500.0), Pool(session, IMAGES, 1), tmp_path / "logs")
    timer.join()
    assert len(session.seen) < 2000


@needs_loadgen
def test_logs_that_cannot_be_written(bundle, tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(OutputError, match="cannot write here"):
        ask(bundle, tmp_path, ("SingleStream",), Recorded())


@needs_loadgen
def test_the_command(bundle, tmp_path, capsys, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    flags = [str(bundle.path), "--iters", "5", "--warmup", "1", "--seconds", "0.01", "--no-throughput", "-q"]
    assert bench.main([*flags, "--json", "--loadgen", "singlestream, Offline"]) == 0
    (measured,) = strict(capsys.readouterr().out)["results"]
    assert [one["scenario"] for one in measured["loadgen"]] == ["SingleStream", "Offline"]
    assert (tmp_path / "loadgen_logs" / "tiny" / "Offline" / DETAIL).is_file()


# --- without it -----------------------------------------------------------------------------------


def test_without_loadgen_the_extra_is_named(bundle, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    assert bench.main([str(bundle.path), "--loadgen", "Offline"]) == RuntimeMissingError.exit_code
    assert "cmt-edge[loadgen]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--loadgen", "ofline"], "did you mean Offline?"),
        (["--loadgen", "SingleStream,"], "choose one of: SingleStream, Offline, Server"),
        (["--loadgen-rate", "5"], "add --loadgen,"),
        (["--loadgen", "Offline", "--loadgen-limit", "5"], "add --loadgen Server"),
    ],
)
def test_what_cannot_be_asked(bundle, flags, told, capsys):
    assert bench.main([str(bundle.path), *flags]) == InputError.exit_code
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("scenario", ["SingleStream", "Server"])
def test_a_graph_of_batches_is_not_asked_for_one_image(bundle, scenario):
    with Predictor(Recorded(), SPEC, LABELS, batch=4) as predictor:
        with pytest.raises(InputError, match="4 images at a time"):
            loadgen.require_single_images(bundle, predictor, scenario)
        loadgen.require_single_images(bundle, predictor, "Offline")


@pytest.mark.parametrize("text", ["", ":::MLLOG {", ':::MLLOG {"key": "result_query_count", "value": 3}'])
def test_a_log_without_a_result(tmp_path, text):
    path = tmp_path / DETAIL
    with pytest.raises(OutputError, match="no complete log"):
        read_figures(path)
    path.write_text(text)
    with pytest.raises(OutputError, match="no complete log"):
        read_figures(path)


def make_result(**changes) -> LoadGenResult:
    made = LoadGenResult(
        scenario="SingleStream",
        version="6",
        valid=True,
        reason="",
        images=200,
        p50=5.0,
        p90=6.0,
        p99=7.0,
        mean=5.5,
        rate=180.0,
        asked_rate=None,
        limit_ms=None,
        ours=(4.9, 5.1),
        ratio=1.0,
        noise=0.05,
        agrees=True,
        note="",
        logs="logs",
    )
    return replace(made, **changes)


def describe(bundle, *results):
    found = benchmark(
        [bundle],
        backend="fake",
        protocol=Protocol(iters=3, seconds=0, warmup_iters=1, warmup_seconds=0),
        with_throughput=False,
    )
    (measured,) = found.results
    quiet = replace(measured, loadgen=results, warnings=[])
    return report.describe_benchmark(replace(found, results=[quiet]))


def test_the_report_says_what_agrees_and_what_does_not(bundle):
    text = describe(bundle, make_result())
    assert "not verified by MLCommons" in text
    assert "warning" not in text
    text = describe(bundle, make_result(ratio=1.3, agrees=False))
    assert "differ by 30 %, more than the 5 %" in text
    served = make_result(scenario="Server", ours=None, ratio=None, noise=None, agrees=None, valid=False)
    text = describe(bundle, replace(served, reason="too\x1b[2J slow", note=loadgen.NOT_COMPARABLE))
    assert "holds the waiting for requests that came before" in text
    assert "invalid: too" in text
    assert "\x1b" not in text
    assert "LoadGen" not in describe(bundle)


def test_figures_files_keep_it(bundle):
    for result in (make_result(), make_result(scenario="Offline", p50=None, ours=None, agrees=None)):
        assert read_record(LoadGenResult, json.loads(report.to_json(result)), "figures.json") == result
