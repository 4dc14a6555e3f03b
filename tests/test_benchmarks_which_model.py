"""``benchmarks/which_model.py``: its front, its budgets, its labels, and how slices are put together."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from helpers.paths import ROOT


@pytest.fixture
def which(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield import_module("which_model_report")
    for name in [name for name in sys.modules if name.startswith("which_model")]:
        del sys.modules[name]


@pytest.fixture
def figures(which) -> ModuleType:
    return import_module("which_model_points")


@pytest.fixture
def tables(which) -> ModuleType:
    return import_module("which_model_page")


@pytest.fixture
def points(figures):
    return [
        figures.Point("slow", True, 30.0, 84.0),
        figures.Point("fast", False, 5.0, 75.0),
        figures.Point("beaten", True, 12.0, 79.0),
        figures.Point("good", False, 10.0, 80.0),
        figures.Point("late", True, 10.0, 79.5),
        figures.Point("equal", True, 11.0, 80.0),
    ]


def test_the_front_has_what_nothing_beats(figures, points):
    assert [p.label for p in figures.find_front(points)] == ["fast", "good", "slow"]


def test_the_best_of_a_budget(figures, points):
    assert figures.find_best(points, 4.9) is None
    assert figures.find_best(points, 5).label == "fast"
    assert figures.find_best(points, 29).label == "good"  # as accurate as "equal", and faster
    assert figures.find_best(points, 30).label == "slow"


def test_the_tables_name_them(tables, points):
    table = tables.format_budgets({"fp32": points, "int8": points[:1]}, (10, 30)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[2] == ["10 ms", "good 80 (10.0 ms)", "-"]
    assert cells[3] == ["30 ms", "slow 84 (30.0 ms)", "slow 84 (30.0 ms)"]
    contest = tables.format_contest(points, (10,)).splitlines()[2]
    assert "late 79.5" in contest
    assert "-0.5" in contest


def test_labels_cover_nothing(which):
    plot = import_module("which_model_plot")
    room = (0.0, 0.0, 400.0, 300.0)
    spots = [(100.0 + 3 * i, 100.0 + 2 * i) for i in range(6)]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in spots]
    for spot in spots:
        _, box = plot.find_place(spot, (40.0, 8.0), taken, room)
        assert room[0] <= box[0]
        assert box[2] <= room[2]
        for other in taken:
            assert box[2] <= other[0] or other[2] <= box[0] or box[3] <= other[1] or other[3] <= box[1]
        taken.append(box)


REFERENCE = "timm:resnet50 fp32"
CONDITIONS = {
    "measured": "2026-01-02 03:04",
    "machine": {"cpu": "a CPU", "flags": ["avx2"], "cores": 2, "mhz": "1"},
    "versions": {"openvino": "1", "numpy": "1"},
    "threads": 2,
    "protocol": {},
}


def write_slice(folder: Path, name: str, base: float, **changes) -> None:
    """What ``measure`` writes: the reference, and a model that takes half of its time."""

    def row(p50: float, ratio: float) -> dict:
        latency = {"p50": p50}
        return {"latency": latency, "ratio": [ratio] * 3, "best_ratio": ratio, "deviation": 0.0}

    place = folder / "measure" / f"{name}.json"
    place.parent.mkdir(parents=True, exist_ok=True)
    rows = {REFERENCE: row(base, 1.0), f"{name} int8": row(base / 2, 2.0)}
    place.write_text(json.dumps(CONDITIONS | changes | {"rows": rows}))


def make_subjects(*names: str) -> list:
    subjects = import_module("which_model_subjects")
    return [subjects.Subject(name, name, "CMT", 64, 80.0, "paper") for name in names]


def test_slices_are_put_on_one_scale(which, figures, tmp_path):
    write_slice(tmp_path, "a", 10.0)
    write_slice(tmp_path, "b", 20.0)  # meanwhile the machine was half as fast
    results = which.collect(make_subjects("a", "b", "none"), tmp_path)
    assert [p.ms for p in figures.list_points(results, "int8")] == [7.5, 7.5]
    assert [p.label for p in figures.list_points(results, "int8")] == ["a", "b"]
    assert figures.list_points(results, "fp32") == figures.list_estimates(results) == []


def test_earlier_figures_stay_on_the_same_scale(which, figures, tmp_path):
    models = make_subjects("a", "b")
    write_slice(tmp_path / "first", "a", 10.0)
    (tmp_path / "first" / "export").mkdir()
    checks = {"int8": {"passed": True}}
    exported = {"params": 5, "macs": 6, "refined": True, "errors": {"bf16": "refused"}, "checks": checks}
    (tmp_path / "first" / "export" / "a.json").write_text(json.dumps(exported))
    earlier = which.collect(models, tmp_path / "first")
    write_slice(tmp_path / "second", "b", 20.0, versions={"openvino": "1", "numpy": "2"})
    results = which.collect(models, tmp_path / "second", earlier)
    assert [(p.label, p.ms) for p in figures.list_points(results, "int8")] == [("a", 7.5), ("b", 7.5)]
    assert [entry["reference_ms"] for entry in results["slices"]] == [10.0, 20.0]
    kept = results["models"][0]
    assert kept["precisions"]["int8"] == earlier["models"][0]["precisions"]["int8"] | {"ms": 7.5}
    assert (kept["params"], kept["macs"], kept["precisions"]["bf16"]["error"]) == (5, 6, "refused")
    assert kept["refined"] is True
    assert which.collect(models, tmp_path / "second", results) == results  # no slice counts twice


def test_the_figure_is_the_median_of_the_slices(which, tmp_path):
    models = make_subjects("a", "b")
    write_slice(tmp_path / "first", "a", 10.0)
    earlier = which.collect(models, tmp_path / "first")
    earlier["models"][0]["precisions"]["int8"]["runs"][0]["ratio"] = [9.0, 8.0, 10.0]
    write_slice(tmp_path / "second", "a", 20.0)
    write_slice(tmp_path / "second", "c", 30.0)
    twice = which.collect(models, tmp_path / "second", earlier)
    found = twice["models"][0]["precisions"]["int8"]
    assert [(run["slice"], run["ratio"][0]) for run in found["runs"]] == [(1, 9.0), (2, 2.0)]
    assert found["ms"] == pytest.approx(20.0 / 5.5)
    write_slice(tmp_path / "third", "a", 40.0)
    thrice = which.collect(models, tmp_path / "third", twice)["models"][0]["precisions"]["int8"]
    assert [run["slice"] for run in thrice["runs"]] == [1, 2, 4]
    assert thrice["ms"] == pytest.approx(25.0 / 2)


def test_the_page_says_on_which_slices_a_figure_stands(which, figures, tmp_path):
    slices = import_module("which_model_slices")
    models = make_subjects("a", "b")
    write_slice(tmp_path, "a", 10.0)
    write_slice(tmp_path, "b", 10.5)
    results = which.collect(models, tmp_path)
    runs = results["models"][0]["precisions"]["int8"]["runs"]
    runs[0]["ratio"] = [2.0, 1.6, 2.4]
    runs.append({**runs[0], "slice": 2, "ratio": [2.5, 2.5, 2.5]})
    first, second = slices.format_slices(results).splitlines()[2:]
    assert split_cells(first) == ["1", "2026-01-02 03:04", "10.00", "-", "20.0", "20.0 (a int8)", "a"]
    assert split_cells(second)[-1] == "a, b"
    rows = [split_cells(line) for line in slices.format_doubts(results, figures.PRECISIONS).splitlines()[2:]]
    assert rows[0] == ["a", "1, 2", "-", "-", "4.1 to 6.4", "25"]
    assert rows[1] == ["b", "2", "-", "-", "5.1 to 5.1", "-"]
    assert slices.measure_disagreement(runs[:1]) is None


def split_cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"versions": {"openvino": "2"}}, "version of OpenVINO: 2 and 1"),
        ({"threads": 1}, "number of threads"),
        ({"machine": CONDITIONS["machine"] | {"cpu": "another"}}, "processor: another and a CPU"),
        ({"machine": CONDITIONS["machine"] | {"flags": []}}, "features"),
        ({"protocol": {"seconds": 1}}, "way of measuring"),
    ],
)
def test_figures_of_another_machine_or_runtime_are_not_mixed(which, tmp_path, change, named):
    write_slice(tmp_path / "first", "a", 10.0)
    earlier = which.collect(make_subjects("a", "b"), tmp_path / "first")
    write_slice(tmp_path / "second", "b", 10.0, **change)
    with pytest.raises(SystemExit, match=named):
        which.collect(make_subjects("a", "b"), tmp_path / "second", earlier)


def test_slices_may_differ_in_the_number_of_calls(which, tmp_path):
    write_slice(tmp_path, "a", 10.0, protocol={"iters": 40})
    write_slice(tmp_path, "b", 10.5, protocol={"iters": 8})
    results = which.collect(make_subjects("a", "b"), tmp_path)
    lines = import_module("which_model_slices").format_slices(results).splitlines()[2:]
    assert [split_cells(line)[3] for line in lines] == ["40", "8"]


def test_another_machine_gets_a_file_of_its_own(which, figures, tables, tmp_path):
    models = make_subjects("a", "b")
    write_slice(tmp_path / "first", "a", 10.0)
    own = which.collect(models, tmp_path / "first")
    folder, elsewhere = tmp_path / "second", CONDITIONS["machine"] | {"flags": []}
    write_slice(folder, "b", 40.0, machine=elsewhere)
    (folder / "estimate").mkdir()
    estimates = [{"gpu": figures.GPU, "total_ms": 0.5}]
    (folder / "estimate" / "a.json").write_text(json.dumps({"estimates": estimates}))
    other = which.keep_measured(which.collect(models, folder))
    assert [(model["name"], [*model["precisions"]]) for model in other["models"]] == [("b", ["int8"])]
    assert "rtx" not in other["models"][0]
    taken = which.take_estimates(own, models, folder)
    assert [(p.label, p.ms) for p in figures.list_estimates(taken)] == [("a", 0.5)]
    assert [(p.label, p.ms) for p in figures.list_points(taken, "int8")] == [("a", 5.0)]
    (row,) = [split_cells(line) for line in tables.format_gains(other, taken).splitlines()[2:]]
    assert row == ["b", "-", "-", "-", "-"]
    page = tmp_path / "page.md"
    which.write_results(other, tables.locate_machine(page, "old"))
    which.write_results(taken, tables.locate_machine(page, ""))
    assert tables.read_others(page) == {"old": other}


def test_gains_are_told_in_units_of_each_machine(tables):
    def make(base: float, **ms: float) -> dict:
        model = {"name": "a", "label": "A", "macs": 1, "precisions": {k: {"ms": v} for k, v in ms.items()}}
        return {"reference_ms": base, "models": [model]}

    table = tables.format_gains(make(40.0, fp32=20.0, int8=16.0), make(10.0, fp32=8.0, int8=4.0))
    assert split_cells(table.splitlines()[2]) == ["A", "0.50", "0.80", "1.25", "2.00"]


def test_yardsticks_have_sources(which):
    subjects = import_module("which_model_subjects")
    yardsticks = subjects.read_yardsticks()
    assert all(subject.source and 70 < subject.top1 < 90 for subject in yardsticks)
    assert len({subject.key for subject in yardsticks}) == len(yardsticks) == 14


def test_a_page_without_the_comments_is_left_alone(tables, tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match="lacks the comments"):
        tables.replace_part("# A page\n", "budgets", "new", page)
    begin, end = tables.BEGIN.format("budgets"), tables.END.format("budgets")
    replaced = tables.replace_part(f"a\n{begin}\nold\n{end}\nb\n", "budgets", "new", page)
    assert replaced == f"a\n{begin}\nnew\n{end}\nb\n"


def test_estimates_of_the_other_table_are_read(which, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "| model | graph | estimate, ms |\n| :- | -: | -: |\n"
        "| cmt_xs | plain export, fp16 | 0.77 |\n| cmt_xs | ours, fp16 | 0.60 |\n"
        "| cmt_xs | ours, int8 | 1.02 |\n"
    )
    assert which.read_known_estimates(page) == {"cmt_xs": 0.6}
    assert which.read_known_estimates(which.KNOWN)["cmt_xs"] > 0
