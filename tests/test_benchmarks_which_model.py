"""``benchmarks/which_model.py``: its front, its budgets, its labels, and how slices are put together."""

from __future__ import annotations

import json
import sys
from importlib import import_module
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
def points(which):
    return [
        which.Point("slow", True, 30.0, 84.0),
        which.Point("fast", False, 5.0, 75.0),
        which.Point("beaten", True, 12.0, 79.0),
        which.Point("good", False, 10.0, 80.0),
        which.Point("late", True, 10.0, 79.5),
        which.Point("equal", True, 11.0, 80.0),
    ]


def test_the_front_has_what_nothing_beats(which, points):
    assert [p.label for p in which.find_front(points)] == ["fast", "good", "slow"]


def test_the_best_of_a_budget(which, points):
    assert which.find_best(points, 4.9) is None
    assert which.find_best(points, 5).label == "fast"
    assert which.find_best(points, 29).label == "good"  # as accurate as "equal", and faster
    assert which.find_best(points, 30).label == "slow"


def test_the_tables_name_them(which, points):
    table = which.format_budgets({"fp32": points, "int8": points[:1]}, (10, 30)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[2] == ["10 ms", "good 80 (10.0 ms)", "-"]
    assert cells[3] == ["30 ms", "slow 84 (30.0 ms)", "slow 84 (30.0 ms)"]
    contest = which.format_contest(points, (10,)).splitlines()[2]
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


def test_slices_are_put_on_one_scale(which, tmp_path):
    subjects = import_module("which_model_subjects")
    models = [subjects.Subject(name, name, "CMT", 64, 80.0, "paper") for name in ("a", "b", "none")]
    reference = "timm:resnet50 fp32"
    common = {"machine": {}, "versions": {}, "threads": 2, "protocol": {}, "calibrated_on": 8}

    def row(p50: float, ratio: float) -> dict:
        latency = {"p50": p50}
        return {"latency": latency, "ratio": [ratio] * 3, "best_ratio": ratio, "deviation": 0.0}

    for name, base in (("a", 10.0), ("b", 20.0)):  # while b was measured, the machine was half as fast
        place = tmp_path / "measure" / f"{name}.json"
        place.parent.mkdir(exist_ok=True)
        rows = {reference: row(base, 1.0), f"{name} int8": row(base / 2, 2.0)}
        place.write_text(json.dumps(common | {"rows": rows}))
    results = which.collect(models, tmp_path)
    assert [p.ms for p in which.list_points(results, "int8")] == [7.5, 7.5]
    assert [p.label for p in which.list_points(results, "int8")] == ["a", "b"]
    assert which.list_points(results, "fp32") == which.list_estimates(results) == []


def test_yardsticks_have_sources(which):
    subjects = import_module("which_model_subjects")
    yardsticks = subjects.read_yardsticks()
    assert all(subject.source and 70 < subject.top1 < 90 for subject in yardsticks)
    assert len({subject.key for subject in yardsticks}) == len(yardsticks) == 12


def test_a_page_without_the_comments_is_left_alone(which, tmp_path):
    page = tmp_path / "page.md"
    with pytest.raises(SystemExit, match="lacks the comments"):
        which.replace_part("# A page\n", "budgets", "new", page)
    begin, end = which.BEGIN.format("budgets"), which.END.format("budgets")
    replaced = which.replace_part(f"a\n{begin}\nold\n{end}\nb\n", "budgets", "new", page)
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
