"""``--precision auto`` from end to end on the real cmt_nano: verdict, bundle, cache, gates, limits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cmt_edge.deploy import Bundle, report
from cmt_edge.deploy.backends.openvino import has_bf16
from cmt_edge.deploy.errors import InputError, RuntimeMissingError
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.measure import isa
from cmt_edge.deploy.measure.child import MeasuringProcess
from cmt_edge.deploy.measure.host import describe_host
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.export import pipeline, run
from cmt_edge.export.auto import choose, workbench
from helpers.cli import failed, succeeded
from helpers.exports import content, nano
from helpers.images import labelled

pytestmark = pytest.mark.usefixtures("one_trace")

MEASURED = ("logits", "benchmark", "kernels")


@pytest.fixture(scope="module", autouse=True)
def short_measurements():
    with pytest.MonkeyPatch.context() as patch:
        short = Protocol(iters=5, seconds=0.05, warmup_iters=2, warmup_seconds=0.05)
        for module in (choose, workbench):
            patch.setattr(module, "SEARCH_PROTOCOL", short)
        yield


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of what was really measured."""
    made: list[str] = []
    for name in MEASURED:
        real = getattr(MeasuringProcess, name)

        def counted(self, *args, _name=name, _real=real, **kwargs):
            made.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(MeasuringProcess, name, counted)
    return made


@pytest.fixture
def two_groups(monkeypatch):
    """Only two groups are ranked, for speed."""
    real = workbench.group_nodes
    monkeypatch.setattr(workbench, "group_nodes", lambda *args: dict(list(real(*args).items())[:2]))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return labelled(tmp_path_factory.mktemp("auto") / "images", ["cat", "dog", "ship"], 4)


def asked(output: Path, **settings):
    """All pass whatever the answers are, so only speed decides."""
    return nano(
        output,
        **{
            "precision": "auto",
            "data": "generated",
            "calib_size": 6,
            "threads": 1,
            "max_drop": 100.0,
            **settings,
        },
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory, images) -> Bundle:
    return run(asked(tmp_path_factory.mktemp("out"), eval_data=str(images)))


def as_json(result):
    """As ``--json`` and reports show it."""
    return json.loads(report.to_json(result))


def names(verdict) -> list[str]:
    return [c.variant.name for c in verdict.candidates]


# --- verdict and bundle ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundle_is_an_ordinary_one_of_the_winner(finished):
    bundle = Bundle.open(finished.path)
    manifest, verdict = bundle.manifest, bundle.manifest.verdict
    assert manifest.precision == verdict.winner.precision
    assert bundle.path.name == f"cmt_nano_{manifest.precision}_openvino"
    assert [p.name for p in bundle.path.parent.iterdir()] == [bundle.path.name]
    assert manifest.verification.data.max_drop == 100.0
    assert (manifest.calibration is not None) == (manifest.precision == "int8")
    if manifest.calibration:
        assert manifest.calibration.keep_float == verdict.winner.keep_float
    assert json.loads((bundle.path / "report.json").read_text())["verdict"] == as_json(verdict)


@pytest.mark.slow
def test_everything_measured_is_in_the_verdict(finished):
    verdict = finished.manifest.verdict
    int8s = ["int8", "int8, depthwise float", "int8, linears float"]
    # what the processor cannot run is listed last
    assert names(verdict) == (["fp32", "bf16", *int8s] if has_bf16() else ["fp32", *int8s, "bf16"])
    for c in verdict.candidates:
        if c.variant.name == "bf16" and not has_bf16():
            assert "no hardware" in c.why_not
            continue
        assert c.accuracy.images == 12
        assert c.speed.p50 > 0
        assert c.speed.ratio_ci[0] <= c.speed.ratio <= c.speed.ratio_ci[1] * 1.2
    float32, int8 = (verdict.candidates[names(verdict).index(name)] for name in ("fp32", "int8"))
    assert (
        float32.accuracy.drop,
        float32.accuracy.agreement,
        float32.accuracy.deviation,
    ) == (0, 100, 0)
    assert int8.speed.size_bytes < 0.5 * float32.speed.size_bytes
    groups = [s.group for s in verdict.sensitivity]
    assert sorted(groups) == sorted(
        ["stem", *(f"stages.{s}.{k}" for s in range(4) for k in ("embed", "attn", "ffn")), "head"]
    )
    deviations = [s.accuracy.deviation for s in verdict.sensitivity]
    assert deviations == sorted(deviations, reverse=True)
    assert 0 < max(deviations) < int8.accuracy.deviation
    assert verdict.float_already == tuple(f"stages.{s}.lpu" for s in range(4))


@pytest.mark.slow
def test_the_report_recommends_with_intervals(finished):
    text, page = report.describe_bundle(finished), (finished.path / "report.md").read_text()
    for part in ("recommended: ", "95 % CI", "sensitivity", "stages.2.ffn", "int8, linears float"):
        assert part in text
        assert part in page
    assert f"## Why {finished.manifest.precision}" in page
    assert as_json(report.make_bundle_json(finished))["verdict"] == as_json(finished.manifest.verdict)


@pytest.mark.slow
def test_a_second_run_measures_nothing(finished, images, tmp_path, calls):
    again = run(asked(tmp_path, eval_data=str(images)))
    assert calls == []
    old, new = finished.manifest.verdict, again.manifest.verdict
    assert replace(new, host=old.host) == old


class Measured(Exception):
    """Something was measured."""


@pytest.mark.slow
@pytest.mark.usefixtures("finished")
def test_settings_of_the_runtime_are_measured_anew(images, tmp_path, monkeypatch):
    """They change what OpenVINO compiles: what was measured without them says nothing."""

    def refuse(*args, **kwargs):
        raise Measured

    for name in MEASURED:
        monkeypatch.setattr(MeasuringProcess, name, refuse)
    monkeypatch.setenv("OV_CPU_MAX_ISA", "AVX2")
    with pytest.raises(Measured):
        run(asked(tmp_path, eval_data=str(images)))


@pytest.mark.slow
def test_what_cannot_be_read_is_measured_again(finished, images, tmp_path, calls, monkeypatch):
    """One kept measurement has the entries of another version: only that one is made anew."""
    shutil.copytree(find_cache_folder(), tmp_path / "cache")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    kept = [file for file in (tmp_path / "cache" / "search").iterdir() if "ratio_ci" in file.read_text()]
    assert kept
    for file in kept:
        file.write_text(file.read_text().replace("ratio_ci", "ratio_interval"))
    again = run(asked(tmp_path / "out", eval_data=str(images)))
    assert calls == ["benchmark"]
    assert names(again.manifest.verdict) == names(finished.manifest.verdict)


@pytest.mark.slow
@pytest.mark.giant
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch, calls, two_groups):
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    real, answered = MeasuringProcess.logits, []

    def logits(self, *args):
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.append(args)
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(MeasuringProcess, "logits", logits)
        with pytest.raises(KeyboardInterrupt):
            run(asked(tmp_path / "out"))
    assert content(tmp_path / "out") == {}
    before = calls.count("logits")
    run(asked(tmp_path / "out"))
    resumed = calls.count("logits") - before
    calls.clear()
    run(asked(tmp_path / "out", cache=False))
    assert (
        calls.count("logits") == before + resumed - 1
    )  # the float32 logits were made again, to compare with
    assert "benchmark" in calls


# --- what is asked --------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_passes(capsys, finished, images, tmp_path):
    flags = [
        "--model",
        "cmt_nano",
        "--precision",
        "auto",
        "--data",
        "generated",
        "--calib-size",
        6,
        "--threads",
        1,
        "--eval-data",
        images,
    ]
    err = failed(capsys, *flags, "--latency-budget", 1e-6, "--max-drop", 100, "-o", tmp_path / "out", code=1)
    assert "no precision passes" in err
    assert err.count("slower than 1e-06 ms") == 4 + has_bf16()
    assert "recommended: none of these passes" in err
    assert content(tmp_path) == {} or content(tmp_path) == {"out": "folder"}


@pytest.mark.slow
def test_without_labels_disagreement_decides(tmp_path, two_groups):
    bundle = run(asked(tmp_path, max_drop=20.0))
    verdict = bundle.manifest.verdict
    assert verdict.labelled is False
    assert any("disagreement" in note for note in verdict.notes)
    assert all(c.accuracy.top1 is None and c.accuracy.images == 6 for c in verdict.candidates if c.accuracy)
    assert "disagreement (95 % CI)" in report.describe_verdict(verdict)


@pytest.mark.slow
def test_onnx_has_no_bf16_candidate(tmp_path):
    bundle = run(asked(tmp_path, format="onnx", time_budget=0.001))
    verdict = bundle.manifest.verdict
    assert "bf16" not in names(verdict)
    assert bundle.manifest.format == "onnx"
    assert any("time budget" in note for note in verdict.notes)
    assert (bundle.manifest.precision, verdict.candidates[1].why_not) == (
        "fp32",
        "not measured: no time left",
    )


@pytest.mark.slow
def test_an_older_cpu(tmp_path):
    if "avx2" not in describe_host().flags:
        pytest.skip("needs AVX2")
    try:
        bundle = run(asked(tmp_path, isa="avx2", time_budget=1.0))
    except RuntimeMissingError as exc:
        pytest.skip(str(exc))
    verdict = bundle.manifest.verdict
    bf16 = next(c for c in verdict.candidates if c.variant.name == "bf16")
    assert bf16.why_not.startswith("no hardware: this processor has no bfloat16")
    assert verdict.isa == "avx2"
    assert any("limited to avx2" in note for note in verdict.notes)
    assert any("VNNI" in note for note in verdict.notes)


def test_an_instruction_set_that_is_missing_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(isa, "describe_host", lambda: SimpleNamespace(flags=["sse2"], cpu="old"))
    monkeypatch.setattr(pipeline, "prepare", lambda *_: pytest.fail("the long work began"))
    with pytest.raises(RuntimeMissingError, match="no avx2"):
        run(asked(tmp_path, isa="avx2"))
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_groups_kept_float_by_name(tmp_path):
    settings = {"precision": "int8", "data": "generated", "calib_size": 6}
    bundle = run(nano(tmp_path, keep_float="stem, @products", **settings))
    assert bundle.manifest.calibration.keep_float == ("stem", "@products")
    with pytest.raises(InputError, match="no group of operations 'stam'"):
        run(nano(tmp_path / "no", keep_float="stam", **settings))


AUTO = ["--model", "cmt_nano", "--precision", "auto"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (AUTO, "--data"),
        ([*AUTO, "--data", "generated", "--format", "trt"], "cmt-build and cmt-bench"),
        ([*AUTO, "--data", "generated", "--isa", "avx3"], "did you mean avx2"),
        ([*AUTO, "--data", "generated", "--isa", "avx2", "--format", "onnx"], "no switch"),
        ([*AUTO, "--data", "generated", "--latency-budget", "0"], "give more than 0"),
        ([*AUTO, "--data", "generated", "--time-budget", "nan"], "not a finite number"),
        ([*AUTO, "--data", "generated", "--max-drop", "-1"], "--max-drop"),
        ([*AUTO, "--data", "generated", "--keep-float", "stem"], "--keep-float is for int8"),
        (["--model", "cmt_nano", "--latency-budget", "5"], "only --precision auto"),
        (["--model", "cmt_nano", "--isa", "avx2", "--time-budget", "5"], "--time-budget and --isa"),
        ([*AUTO, "--data", "generated", "--eval-data", "gone"], "gone"),
    ],
    ids=lambda v: " ".join(v[2:]) if isinstance(v, list) else "",
)
def test_faulty_requests_exit_with_2(capsys, tmp_path, argv, message):
    assert message in failed(capsys, *argv, "-o", tmp_path)
    assert content(tmp_path) == {}


def test_the_default_drop_is_stricter():
    assert asked(Path(), max_drop=None).allowed_drop == 0.3
    assert nano(Path()).allowed_drop == 1.0


def test_dry_run(capsys, tmp_path):
    argv = (
        *AUTO,
        "--data",
        "generated",
        "--calib-size",
        5,
        "--isa",
        "avx2",
        "--dry-run",
        "-o",
        tmp_path / "out",
    )
    plan = json.loads(succeeded(capsys, *argv, "--json"))
    assert plan["allowed"] == {"drop": 0.3, "latency_ms": None, "time_s": None, "isa": "avx2"}
    assert plan["calibration"]["images"] == 5
    assert all(f"cmt_nano_{p}_openvino" in plan["bundle"] for p in ("fp32", "bf16", "int8"))
    assert "measure the latencies, interleaved" in plan["steps"]
    assert "nothing was written" in succeeded(capsys, *argv)
    assert content(tmp_path) == {}


def test_something_in_the_way_of_any_candidate_stops_before_the_work(tmp_path):
    (tmp_path / "cmt_nano_bf16_openvino").mkdir()
    with pytest.raises(InputError, match="not a bundle"):
        run(asked(tmp_path))
