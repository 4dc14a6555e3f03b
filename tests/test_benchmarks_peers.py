"""The comparing benchmarks run end to end on the smallest model and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from cmt_edge.deploy.backends import Session
from helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
TINY = ("--threads", "1", "--iters", "5", "--seconds", "0.05", "--warmup", "0.05", "--calib-size", "8")

pytestmark = pytest.mark.slow


def run(script: str, folder: Path, *arguments: str) -> tuple[dict, str]:
    """The JSON and the Markdown that a benchmark wrote."""
    files = folder / "result.json", folder / "result.md"
    command = [
        sys.executable,
        str(BENCHMARKS / script),
        *arguments,
        *TINY,
        "--json",
        str(files[0]),
        "--markdown",
        str(files[1]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    text = files[1].read_text(encoding="utf-8")
    assert text.strip() == done.stdout.strip()
    return json.loads(files[0].read_text(encoding="utf-8")), text


@pytest.mark.giant
def test_peers_measures_rows_against_the_base(tmp_path):
    plot = tmp_path / "speed.svg"
    content, text = run(
        "peers.py", tmp_path, "--models", "cmt_nano", "--only", "ort_fp32", "ours_fp32", "--plot", str(plot)
    )
    rows = {r["key"]: r for r in content["models"]["cmt_nano"]}
    assert list(rows) == ["ort_fp32", "ov_fp32", "ours_fp32"]
    for row in rows.values():
        assert not row["note"]
        assert row["deviation"] < 1e-4
        assert row["latency"]["count"] >= 5
        assert row["images_per_second"] > 0
        assert 10e6 > row["bytes_on_disk"] >= row["bytes_read"] > 1e6 or row["ours"]
        assert min(row["export_s"], row["export_peak"], row["running_peak"]) > 0
    assert rows["ov_fp32"]["ratio"][0] == 1
    assert rows["ov_fp32"]["running_peak"] < rows["ov_fp32"]["export_peak"]  # which includes PyTorch
    assert "## cmt_nano" in text
    assert "| cmt-edge fp32 (OpenVINO) |" in text
    assert content["machine"]["cpu"] in text
    assert "ONNX Runtime fp32" in plot.read_text(encoding="utf-8") or plot.stat().st_size > 1000


@pytest.mark.giant
def test_a_row_that_cannot_be_made_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    content, text = run("peers.py", tmp_path, "--models", "cmt_nano", "--only", "torch_compile")
    compiled, base = content["models"]["cmt_nano"]
    assert "compiler" in compiled["note"].lower()
    assert compiled["latency"] is None
    assert base["latency"]
    assert "- torch.compile: left out: " in text


@pytest.mark.giant
def test_ablation_measures_a_rewrite_alone_and_left_out(tmp_path):
    content, text = run(
        "ablation.py", tmp_path, "--model", "cmt_nano", "--only", "scale into q", "attention products int8"
    )
    found = {(v["name"], v["precision"]): v for v in content["variants"]}
    for name in ("none", "all", "only: scale into q", "all but: scale into q"):
        row = found[name, "fp32"]
        assert row["deviation"] < 1e-4
        assert set(row["ratios"]) == {"none", "all"}
    assert found["none", "fp32"]["ratios"]["none"][0] == 1
    assert {n for n, p in found if p == "int8"} == {"default recipe", "attention products int8"}
    assert found["attention products int8", "int8"]["ratios"]["default recipe"][0] > 0
    assert "| scale into q " in text
    assert "| attention products int8 " in text


def test_ablation_refuses_an_unknown_rewrite(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "ablation.py"), "--model", "cmt_nano", "--only", "magic"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "scale into q" in done.stderr


def stored(folder: Path, model: str, **changes) -> Path:
    """The JSON of a run, as ``--json`` writes it."""
    latency = {
        "count": 9,
        "p50": 2.0,
        "ci": [1.9, 2.1],
        "p90": 3.0,
        "p95": 3.0,
        "p99": None,
        "max": 4.0,
        "mean": 2.0,
        "drift": 0.0,
    }
    row = {
        "key": "ov_fp32",
        "label": "OpenVINO fp32",
        "ours": False,
        "latency": latency,
        "ratio": [1.0, 0.9, 1.1],
        "executed": "fp32 100 %",
    }
    content = {
        "machine": {"cpu": "a CPU", "cores": 2, "flags": ["avx2"]},
        "versions": {"openvino": "1"},
        "threads": 2,
        "base": "ov_fp32",
        "protocol": {"iters": 100, "seconds": 3.0, "warmup_iters": 10, "warmup_seconds": 1.0},
        "calibration": {"source": "generated", "images": 32},
        "models": {model: [row]},
    } | changes
    path = folder / f"{model}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def again(folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    files = ("--markdown", str(folder / "all.md"), "--plot", str(folder / "all.svg"))
    command = [sys.executable, str(BENCHMARKS / "peers.py"), "--again", *map(str, paths), *files]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def test_earlier_runs_go_into_one_document(tmp_path):
    done = again(
        tmp_path,
        stored(tmp_path, "cmt_ti"),
        stored(tmp_path, "cmt_s", calibration={"source": "generated", "images": 64}),
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "all.md").read_text(encoding="utf-8")
    assert text.index("## cmt_ti") < text.index("## cmt_s")
    assert text.count("| OpenVINO fp32 |   2.00 |   1.00 (0.90-1.10) |") == 2
    assert "generated, 32, 64." in text
    assert (tmp_path / "all.svg").stat().st_size > 1000


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 1},
        {"batch": 8},
        {"isa": "avx2"},
        {"versions": {"openvino": "2"}},
        {"machine": {"cpu": "another", "cores": 2, "flags": []}},
    ],
)
def test_runs_that_differ_are_not_mixed(tmp_path, change):
    done = again(tmp_path, stored(tmp_path, "cmt_ti"), stored(tmp_path, "cmt_s", **change))
    assert done.returncode != 0
    assert "do not belong into one table" in done.stderr
    assert not (tmp_path / "all.md").exists()


def test_rows_of_one_model_measured_in_several_runs_stand_in_one_table(tmp_path):
    first = stored(tmp_path, "cmt_ti")
    run = json.loads(first.read_text(encoding="utf-8"))
    base = run["models"]["cmt_ti"][0]
    other = base | {"key": "ncnn_fp32", "label": "ncnn fp32", "best": 1.5, "best_ratio": 1.25}
    second = tmp_path / "second.json"
    run["models"]["cmt_ti"] = [base | {"label": "the base again"}, other]
    second.write_text(json.dumps(run), encoding="utf-8")
    done = again(tmp_path, first, second)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "all.md").read_text(encoding="utf-8")
    assert text.count("## cmt_ti") == 1
    assert "| 1.50 (1.25) |" in " ".join(text.split())
    assert "the base again" not in text


def test_runs_in_one_file_give_the_table_of_a_page(tmp_path, monkeypatch):
    report = load_benchmark("peers_report", monkeypatch)
    first, second = (json.loads(stored(tmp_path, "cmt_ti").read_text(encoding="utf-8")) for _ in range(2))
    slow = second["models"]["cmt_ti"][0] | {"key": "torch", "label": "PyTorch", "ratio": [0.5, 0.4, 0.6]}
    second["models"]["cmt_ti"].append(slow)
    kept, page = tmp_path / "runs.json", tmp_path / "page.md"
    kept.write_text(json.dumps({report.RUNS: [first, second, second]}), encoding="utf-8")
    begin, end = report.BEGIN.format("old CPU"), report.END.format("old CPU")
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n", encoding="utf-8")
    report.write_part(page, "old CPU", report.read_runs([kept]))
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"before\n{begin}\n| row ")
    assert text.endswith(f"\n{end}\nafter\n")
    assert text.index("| PyTorch ") < text.index("| OpenVINO fp32 ")
    assert "- OpenVINO fp32 in the runs, ms: 2.00, 2.00, 2.00\n" in text
    assert "- PyTorch in the runs that have it: 0.50 (0.40-0.60), 0.50 (0.40-0.60)\n" in text
    with pytest.raises(SystemExit, match="lacks the comments"):
        report.write_part(page, "another CPU", report.read_runs([kept]))
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("part", ["avx2", "xeon"])
def test_the_table_of_the_page_is_that_of_its_runs(tmp_path, monkeypatch, part):
    report = load_benchmark("peers_report", monkeypatch)
    written = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    page = tmp_path / "peers.md"
    page.write_text(written, encoding="utf-8")
    report.write_part(page, part, report.read_runs([ROOT / "docs" / f"peers-{part}.json"]))
    assert page.read_text(encoding="utf-8") == written


def load_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of the benchmarks' folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module(name)


CHILD = """
import sys
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[1])
from cmt_edge.deploy.backends import ExecutedPrecision
from peers_remote import serve

class Doubles:
    def executed(self, batch):
        return ExecutedPrecision({"int8": 1.0}, {"int8": 3})

    def kernels(self, batch):
        return {"jit_avx2": 0.75, "gemm_mlas_f32": 0.25}

    def run(self, batch):
        print("a tool that prints")
        return [2 * batch.reshape(len(batch), -1)[:, :3]]

serve(Doubles, Path(sys.argv[2]), (1, 3, 2, 2))
"""
"""A child that answers with twice the first three numbers, and prints where answers go."""


def open_remote(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Session:
    remote = load_benchmark("peers_remote", monkeypatch)
    shared = folder / "shared"
    command = [sys.executable, "-c", code, str(BENCHMARKS), str(shared)]
    return remote.RemoteSession(command, dict(os.environ), shared, (1, 3, 2, 2), folder / "log")


def test_a_session_in_another_process_answers_for_what_lies_in_the_shared_file(tmp_path, monkeypatch):
    session = open_remote(CHILD, tmp_path, monkeypatch)
    batch = np.arange(12, dtype=np.float32).reshape(1, 3, 2, 2)
    np.testing.assert_array_equal(session.run(batch)[0], [[0, 2, 4]])
    binding = session.bind(batch.shape)
    binding.batch[:] = batch + 1
    np.testing.assert_array_equal(binding.run()[0], [[2, 4, 6]])
    assert session.executed(batch).summary() == "int8 100 %"
    assert session.kernels(batch) == {"jit_avx2": 0.75, "gemm_mlas_f32": 0.25}
    session.close()
    assert "a tool that prints" in (tmp_path / "log").read_text(encoding="utf-8")


def test_a_session_whose_process_ends_names_its_log(tmp_path, monkeypatch):
    with pytest.raises(RuntimeError, match=r"the process of the session ended; .*log says why"):
        open_remote("raise SystemExit('broken')", tmp_path, monkeypatch)
    assert "broken" in (tmp_path / "log").read_text(encoding="utf-8")


def test_an_environment_that_would_bring_cuda_is_refused(tmp_path, monkeypatch):
    module = load_benchmark("peers_environments", monkeypatch)
    report = {"install": [{"metadata": {"name": n}} for n in ("torch", "nvidia-cublas", "triton")]}
    answer = subprocess.CompletedProcess([], 0, stdout=json.dumps(report), stderr="")
    monkeypatch.setattr(module.subprocess, "run", lambda *a, **k: answer)
    monkeypatch.setattr(module.venv, "create", lambda place, **k: place.mkdir())
    with pytest.raises(module.MissingEnvironment, match="CUDA: nvidia-cublas, triton"):
        module.Environments(tmp_path).find("ncnn")


def test_an_environment_that_cannot_be_installed_gives_pips_error_each_time(tmp_path, monkeypatch):
    module = load_benchmark("peers_environments", monkeypatch)
    calls = []

    def fail(command, **options):
        calls.append(command)
        return subprocess.CompletedProcess(
            command, 1, stdout="", stderr="WARNING: x\nERROR: no such package\n"
        )

    monkeypatch.setattr(module.subprocess, "run", fail)
    monkeypatch.setattr(module.venv, "create", lambda place, **k: place.mkdir())
    environments = module.Environments(tmp_path)
    for _ in range(2):
        with pytest.raises(module.MissingEnvironment, match="ERROR: no such package"):
            environments.find("ncnn")
    assert len(calls) == 1
    assert not (tmp_path / "ncnn" / "complete").exists()


class Stand:
    """A session whose kernels are known."""

    def __init__(self, **kernels: float) -> None:
        self._kernels = kernels

    def kernels(self, batch: np.ndarray) -> dict[str, float]:
        return self._kernels


def test_only_rows_that_keep_to_an_instruction_set_are_limited(monkeypatch):
    peers = load_benchmark("peers", monkeypatch)
    with pytest.raises(SystemExit, match="cannot be limited, or need bfloat16: ov_bf16, ort_fp32"):
        peers.choose_rows(["ov_bf16", "ort_fp32", "ours_int8"], False, "avx2")
    chosen = [row.key for row in peers.choose_rows(["ours_int8", "nncf_frontend"], False, "avx2")]
    assert chosen == ["ov_fp32", "ours_int8", "nncf_frontend"]
    everything = [row.key for row in peers.choose_rows(None, True, "avx2")]
    assert set(everything) == set(peers.LIMITED_ROWS)
    assert len(peers.choose_rows(None, True)) == len(peers.ROWS)


def test_a_row_that_does_not_keep_to_the_limit_is_refused(monkeypatch):
    peers = load_benchmark("peers", monkeypatch)
    batch = np.zeros((1, 3, 2, 2), np.float32)
    results = {"ov_fp32": peers.Result("ov_fp32", "OpenVINO fp32", False)}
    sessions = {"ov_fp32": Stand(jit_avx2=0.75, gemm_mlas_f32=0.25)}
    peers.check_limit(sessions, results, batch, "avx2")
    assert results["ov_fp32"].warnings == [
        "25 % of the time went to kernels (MLAS) that may have used newer instructions"
    ]
    with pytest.raises(SystemExit, match="does not keep to avx2: it ran brgconv_avx512"):
        peers.check_limit({"ov_fp32": Stand(brgconv_avx512=1.0)}, results, batch, "avx2")


def test_a_limit_is_set_for_children_and_named_in_the_document(monkeypatch):
    isa = load_benchmark("peers_isa", monkeypatch)
    report = load_benchmark("peers_report", monkeypatch)
    asked = []
    monkeypatch.setattr(isa, "require_isa", asked.append)
    for switch in isa.SWITCHES:
        monkeypatch.setenv(switch, "")
    isa.set_limit("avx2")
    assert asked == ["avx2"]
    assert {os.environ[switch] for switch in isa.SWITCHES} == {"AVX2"}
    assert "--isa avx2" in report.name_limit({"isa": "avx2"})
    assert report.name_limit({"isa": None}) == report.name_limit({}) == ""


def test_a_machine_that_changed_under_most_rows_is_one_remark(monkeypatch):
    report = load_benchmark("peers_report", monkeypatch)
    rows = [report.Result(key, key, True) for key in "abc"]
    rows[0].warnings = ["latency drifted by -12 % from the first to the last 100 calls"]
    assert report.list_remarks(rows) == [f"- a: {rows[0].warnings[0]}"]
    rows[1].warnings = ["latency drifted by +7 % from the first to the last 100 calls", "something else"]
    folded = "- 2 latencies drifted by -12 to +7 % from the first to the last 100 calls"
    assert report.list_remarks(rows) == ["- b: something else", folded]
