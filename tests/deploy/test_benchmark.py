"""Benchmarks: the statistics are NumPy's, the order is A B A B, nothing is clipped, and reports say what was
run."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import asdict
from functools import partial

import numpy as np
import pytest

from cmt_edge.deploy import Predictor, report
from cmt_edge.deploy.backends import ExecutedPrecision, fake
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.measure.benchmark import benchmark, list_precision_warnings, measure_throughput
from cmt_edge.deploy.measure.statistics import summarise
from cmt_edge.deploy.measure.timing import Protocol, time_interleaved
from helpers.bundles import LABELS, SPEC, make_bundle, tiny_golden
from helpers.cli import strict

QUICK = Protocol(iters=5, seconds=0.05, warmup_iters=2, warmup_seconds=0.01, settle_seconds=0)
ONCE = Protocol(iters=4, seconds=0, warmup_iters=1, warmup_seconds=0, settle_seconds=0)


def numbers(value):
    """Every number inside a plain structure."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 7, 200, 1500])
def test_summary_is_numpys(count):
    ns = np.random.default_rng(count).lognormal(14, 0.5, count).astype(np.int64)
    got, ms = summarise(ns), ns / 1e6
    assert got.count == count
    assert got.mean == pytest.approx(ms.mean())
    assert got.max == ms.max()
    for q in (50, 90, 95):
        assert getattr(got, f"p{q}") == pytest.approx(np.percentile(ms, q))
    assert got.ci[0] <= got.p50 <= got.ci[1]
    assert got == summarise(ns.tolist())


def test_known_samples():
    got = summarise(np.arange(1, 101) * 1_000_000)
    assert (got.p50, got.max, got.mean) == (50.5, 100.0, 50.5)
    assert got.p90 == pytest.approx(90.1)
    assert got.drift == pytest.approx(75.5 / 25.5 - 1)


@pytest.mark.parametrize(("count", "shown"), [(1, False), (999, False), (1000, True), (2500, True)])
def test_p99_needs_a_thousand_samples(count, shown):
    ns = np.random.default_rng(0).integers(10**6, 10**7, count)
    got = summarise(ns)
    assert (got.p99 is not None) == shown
    if shown:
        assert got.p99 == pytest.approx(np.percentile(ns / 1e6, 99))


def test_outliers_stay():
    ns = np.full(300, 1_000_000)
    ns[150] = 5_000_000_000
    got = summarise(ns)
    assert got.max == 5000.0
    assert got.mean == pytest.approx((299 + 5000) / 300)
    assert got.p50 == 1.0
    assert got.count == 300


def test_confidence_interval_narrows_with_samples_and_covers_the_median():
    rng = np.random.default_rng(0)
    few, many = (summarise(rng.normal(1e7, 1e6, n)) for n in (20, 2000))
    assert few.ci[1] - few.ci[0] > 3 * (many.ci[1] - many.ci[0])
    assert many.ci[0] < 10.0 < many.ci[1]
    assert many.ci[1] - many.ci[0] < 0.3


@pytest.mark.parametrize(("last", "drift"), [(1.0, 0.0), (1.2, 0.2), (0.5, -0.5)])
def test_drift_compares_the_first_and_last_hundred(last, drift):
    ns = np.concatenate([np.full(100, 1e6), np.full(500, 7e6), np.full(100, last * 1e6)])
    assert summarise(ns).drift == pytest.approx(drift)


# --- order and duration ---------------------------------------------------------------------------


def test_much_faster_variants_run_several_times_a_round():
    """Or the slow one would run for minutes until the fast one has its seconds."""
    log = []
    calls = {
        "slow": lambda: (log.append("s"), time.sleep(0.02)),
        "fast": lambda: (log.append("f"), time.sleep(0.001)),
    }
    samples = time_interleaved(calls, ONCE)
    assert len(samples["slow"]) == ONCE.iters
    assert len(samples["fast"]) >= 2 * len(samples["slow"])
    tail = "".join(log[-len(samples["fast"]) :])
    assert "ssf" in tail  # one uncounted, one counted
    assert "fs" in tail  # still in turns


def test_variants_take_turns():
    log = []
    samples = time_interleaved(
        {"a": lambda: log.append("a"), "b": lambda: log.append("b"), "c": lambda: log.append("c")}, ONCE
    )
    assert "".join(log[-24:]) == 4 * "aabbcc"  # the first of each turn is not counted
    assert all(len(v) == 4 for v in samples.values())
    assert log.index("b") > log.index("a")


def test_turns_settle_before_they_count(monkeypatch):
    now, log = 0.0, []

    def call(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        log.append(name)

    monkeypatch.setattr("cmt_edge.deploy.measure.timing.time.perf_counter", lambda: now)
    monkeypatch.setattr("cmt_edge.deploy.measure.timing.time.perf_counter_ns", lambda: round(1e9 * now))
    calls = {"a": partial(call, "a", 0.004), "b": partial(call, "b", 0.005)}
    protocol = Protocol(iters=9, seconds=0, warmup_iters=1, warmup_seconds=0, settle_seconds=0.021)
    samples = time_interleaved(calls, protocol)
    turns = [(name, len(list(group))) for name, group in itertools.groupby(log)][2:]  # after the warm-up
    assert turns == 3 * [
        ("a", 6 + 5),
        ("b", 5 + 4),
    ]  # 0.024 and 0.025 s uncounted, then as many as fit into 0.021 s
    assert {name: len(ns) for name, ns in samples.items()} == {"a": 15, "b": 12}


def test_samples_are_in_order_and_in_nanoseconds():
    pauses = iter([0.001, 0.001, 0.03, 0.001, 0.001])
    samples = time_interleaved({"a": lambda: time.sleep(next(pauses))}, ONCE)["a"]
    assert samples.dtype == np.int64
    assert int(samples.argmax()) == 1
    assert samples.max() >= 30_000_000
    assert samples.min() >= 1_000_000


def test_both_limits_must_be_met():
    calls = {"fast": lambda: time.sleep(0.002), "slow": lambda: time.sleep(0.004)}
    by_time = time_interleaved(
        calls, Protocol(iters=1, seconds=0.03, warmup_iters=1, warmup_seconds=0, settle_seconds=0)
    )
    assert by_time["slow"].sum() >= 0.03e9
    assert by_time["fast"].sum() >= 0.03e9
    by_count = time_interleaved(
        {"slow": calls["slow"]}, Protocol(iters=12, seconds=0.0, warmup_iters=1, warmup_seconds=0)
    )
    assert len(by_count["slow"]) == 12


def test_warm_up_is_not_counted():
    count = 0

    def call():
        nonlocal count
        count += 1

    samples = time_interleaved({"a": call}, Protocol(iters=5, seconds=0, warmup_iters=12, warmup_seconds=0))[
        "a"
    ]
    assert len(samples) == 5
    assert count >= 17


def test_warm_up_lasts_its_time():
    start = time.perf_counter()
    time_interleaved(
        {"a": lambda: time.sleep(0.001)}, Protocol(iters=1, seconds=0, warmup_iters=1, warmup_seconds=0.1)
    )
    assert time.perf_counter() - start >= 0.1


def test_error_of_a_variant_comes_through():
    with pytest.raises(ZeroDivisionError):
        time_interleaved({"a": lambda: 1 / 0}, ONCE)


def test_progress_ends_at_one():
    shares = []
    time_interleaved(
        {"a": lambda: None}, Protocol(iters=100, seconds=0, warmup_iters=1, warmup_seconds=0), shares.append
    )
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_throughput_counts_images():
    p = Predictor(FakeSession(3, delay_s=0.01), SPEC, LABELS, batch=4)
    rate = measure_throughput(p, np.zeros((4, 3, 16, 16), np.float32), 0.2)
    assert 40 < rate <= 410


def test_throughput_uses_what_the_runtime_recommends():
    session = FakeSession(3, delay_s=0.01)
    session.parallelism = 4
    rate = measure_throughput(
        Predictor(session, SPEC, LABELS, batch=1), np.zeros((1, 3, 16, 16), np.float32), 0.3
    )
    assert 110 < rate <= 410


# --- whole benchmarks -----------------------------------------------------------------------------


@pytest.fixture
def slow_and_fast(tmp_path, monkeypatch, served_by_fake):
    """Two bundles served by fakes, the first four times slower."""
    delays = {"slow": 0.008, "fast": 0.002}
    monkeypatch.setattr(
        fake.RUNTIME, "load", lambda b, options: FakeSession(len(b.labels), delays.get(b.path.name, 0.0))
    )
    return [make_bundle(tmp_path / name) for name in delays]


def test_ratios(slow_and_fast):
    result = benchmark(
        slow_and_fast,
        protocol=Protocol(iters=15, seconds=0.03, warmup_iters=2, warmup_seconds=0),
        with_throughput=False,
    )
    slow, fast = result.results
    assert (slow.name, fast.name) == ("slow", "fast")
    assert slow.ratio == 1.0
    assert 2 < fast.ratio < 5
    assert fast.ratio_ci[0] <= fast.ratio <= fast.ratio_ci[1]
    assert slow.model.p50 >= 8
    assert slow.end_to_end.p50 > slow.model.p50 * 0.9
    assert slow.throughput is fast.throughput is None
    back = benchmark(slow_and_fast[::-1], protocol=QUICK, with_throughput=False).results[1]
    assert 0.2 < back.ratio < 0.5


@pytest.mark.usefixtures("served_by_fake")
def test_drift_is_warned_about(tmp_path, monkeypatch):
    class Tiring(FakeSession):
        def run(self, batch):
            self.delay_s += 2e-4
            return super().run(batch)

    monkeypatch.setattr(fake.RUNTIME, "load", lambda bundle, options: Tiring(3))
    protocol = Protocol(iters=30, seconds=0, warmup_iters=1, warmup_seconds=0)
    result = benchmark([make_bundle(tmp_path / "b")], protocol=protocol, with_throughput=False)
    assert any("drifted by +" in w for w in result.results[0].warnings)
    assert "drifted" in report.describe_benchmark(result)


def test_the_same_bundle_twice_keeps_both(tmp_path):
    bundle = make_bundle(tmp_path / "b")
    names = [
        r.name for r in benchmark([bundle, bundle, bundle], protocol=QUICK, with_throughput=False).results
    ]
    assert len(set(names)) == 3
    assert names[0] == "b"


@pytest.mark.usefixtures("served_by_fake")
def test_sessions_are_closed_also_after_an_error(tmp_path, monkeypatch):
    opened, closed = [], []

    class Watched(FakeSession):
        def close(self):
            closed.append(self)

        def executed(self, batch, repeats=10):
            raise RuntimeError("profiling failed")

    monkeypatch.setattr(fake.RUNTIME, "load", lambda bundle, options: opened.append(Watched(3)) or opened[-1])
    with pytest.raises(RuntimeError, match="profiling"):
        benchmark([make_bundle(tmp_path / "a"), make_bundle(tmp_path / "b")], protocol=QUICK)
    assert len(opened) == 2
    assert sorted(map(id, closed)) == sorted(map(id, opened))


def test_given_images_are_what_is_measured_end_to_end(tmp_path, monkeypatch):
    import cmt_edge.deploy.predictor

    seen = []
    original = cmt_edge.deploy.predictor.preprocess
    monkeypatch.setattr(
        cmt_edge.deploy.predictor, "preprocess", lambda s, *a: seen.append(s.getvalue()) or original(s, *a)
    )
    images = tiny_golden().sources
    benchmark([make_bundle(tmp_path / "b")], images=images[:1], protocol=QUICK, with_throughput=False)
    assert set(seen) == {images[0]}


@pytest.mark.usefixtures("served_by_fake")
def test_options_reach_the_runtime(tmp_path, monkeypatch):
    options = []
    monkeypatch.setattr(fake.RUNTIME, "load", lambda b, o: options.append(o) or FakeSession(3))
    benchmark([make_bundle(tmp_path / "b")], threads=3, device="X", protocol=QUICK)
    assert [(o.threads, o.device, o.throughput) for o in options] == [(3, "X", False), (3, "X", True)]


@pytest.fixture(scope="module")
def real(fp32_bundle, onnx_bundle, int8_bundle):
    return benchmark([fp32_bundle, onnx_bundle, int8_bundle], protocol=QUICK)


def test_real_bundles_have_every_figure(real, fp32_bundle, int8_bundle):
    assert len(real.results) == 3
    for r in real.results:
        assert all(math.isfinite(n) for n in numbers(asdict(r)))
        assert 0 < r.model.p50 <= r.model.p90 <= r.model.p95 <= r.model.max
        assert r.model.count >= 5
        assert r.end_to_end.count >= 5
        assert r.throughput > 0
        assert r.batch == 1
        assert sum(r.executed.time_share.values()) == pytest.approx(1)
        assert r.ratio_ci[0] <= r.ratio_ci[1]
    first = real.results[0]
    assert first.size_bytes == sum((fp32_bundle.path / n).stat().st_size for n in fp32_bundle.manifest.files)
    assert first.ratio == 1.0
    assert [r.precision for r in real.results] == ["fp32", "fp32", "int8"]
    assert [r.runtime.runtime.split()[0] for r in real.results] == ["openvino", "onnxruntime", "openvino"]
    assert set(first.executed.time_share) == {"fp32"}
    assert "int8" in real.results[2].executed.time_share


def test_machine_and_versions_are_recorded(real):
    assert real.host.cpu
    assert real.host.cores >= 1
    assert {"numpy", "openvino", "onnxruntime"} <= set(real.versions)
    assert real.protocol == QUICK


def test_report_is_strict_json(real):
    content = strict(report.to_json(real))
    assert [r["name"] for r in content["results"]] == [r.name for r in real.results]
    assert content["results"][0]["model"]["p50"] == real.results[0].model.p50
    assert content["protocol"]["iters"] == 5
    assert "\n" not in report.to_json(real)


@pytest.mark.parametrize("markdown", [False, True])
def test_tables_say_what_ran(real, markdown):
    text = report.describe_benchmark(real, markdown=markdown)
    for r in real.results:
        assert text.count(r.name) >= 2
        assert f"{r.model.p50:.2f}" in text
        assert r.executed.summary() in text
        assert r.runtime.runtime in text
    assert real.host.cpu in text
    assert "at least 5 iterations" in text
    if markdown:
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) == 2 * (2 + 3)
        assert {line.count("|") for line in rows[:5]} == {11}


def test_missing_figures_are_dashes_not_zeros(tmp_path):
    result = benchmark([make_bundle(tmp_path / "b")], protocol=ONCE, with_throughput=False)
    row = next(
        line
        for line in report.describe_benchmark(result, markdown=True).splitlines()
        if line.startswith("| b ")
    )
    cells = [c.strip() for c in row.strip("|").split("|")]
    assert cells[5] == "-"
    assert cells[8] == "-"


# --- precision ------------------------------------------------------------------------------------

RAN = {
    "as asked": ("int8", {"int8": 0.8, "bf16": 0.2}, False),
    "more than any other": ("int8", {"int8": 0.4, "bf16": 0.35, "fp32": 0.25}, False),
    "less than another": ("int8", {"int8": 0.4, "fp32": 0.6}, True),
    "hardly": ("int8", {"int8": 0.05, "fp32": 0.95}, True),
    "not at all": ("bf16", {"fp32": 1.0}, True),
    "silently lower": ("fp32", {"bf16": 0.99, "fp32": 0.01}, True),
    "unknown": ("int8", {}, False),
}


@pytest.mark.parametrize(("asked", "share", "warned"), RAN.values(), ids=RAN.keys())
def test_precision_warnings(asked, share, warned):
    warnings = list_precision_warnings(asked, ExecutedPrecision(share))
    assert bool(warnings) == warned
    assert all(asked in w for w in warnings)


@pytest.mark.usefixtures("served_by_fake")
def test_precision_warning_reaches_the_report(tmp_path):
    """The fake runtime says fp32, whatever was asked for."""
    result = benchmark([make_bundle(tmp_path / "b", precision="int8")], protocol=QUICK, with_throughput=False)
    assert "int8 was asked for" in report.describe_benchmark(result)


@pytest.mark.parametrize(
    ("executed", "text"),
    [
        (ExecutedPrecision({"int8": 0.58, "bf16": 0.42}), "int8 58 % + bf16 42 %"),
        (ExecutedPrecision({"bf16": 0.004, "fp32": 0.996}), "fp32 100 %"),
        (ExecutedPrecision(operations={"fp32": 3, "int8": 1}), "fp32 75 % + int8 25 %"),
        (ExecutedPrecision(), "unknown"),
    ],
)
def test_summary_of_precisions(executed, text):
    assert executed.summary() == text
