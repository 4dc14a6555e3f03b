"""The plan of an export: what it names, and that a run keeps to it."""

from __future__ import annotations

import pytest

from cmt_edge.deploy.progress import Progress
from cmt_edge.export import ExportConfig
from cmt_edge.export.auto.search import Phase
from cmt_edge.export.plan import Journal, Step, format_plan, list_steps

QUIET = Progress(quiet=True)
PREPARE = [Step.LOAD, Step.FUSE, Step.TRACE, Step.SIMPLIFY]
CHOOSE = [Step.COMPARE, Step.RANK, Step.REFINE, Step.TIME, Step.CHOOSE]


def names(**settings) -> list[str]:
    return [step.name for step in list_steps(ExportConfig("cmt_nano", **settings))]


def take(planned: list[Step], taken: list[Step]) -> None:
    with Journal(planned, QUIET) as journal:
        for step in taken:
            journal.take(step)


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, "LOAD FUSE TRACE SIMPLIFY FILES VERIFY MEASURE WRITE"),
        (
            {"format": "onnx", "precision": "int8"},
            "LOAD FUSE TRACE SIMPLIFY CALIBRATE FILES VERIFY MEASURE WRITE",
        ),
        (
            {"precision": "int8", "data": "synthetic"},
            "LOAD SYNTHESISE FUSE TRACE SIMPLIFY CALIBRATE FILES VERIFY MEASURE WRITE",
        ),
        (
            {"precision": "auto", "data": "generated"},
            "LOAD FUSE TRACE SIMPLIFY CALIBRATE COMPARE RANK REFINE TIME CHOOSE FILES VERIFY MEASURE WRITE",
        ),
        ({"format": "trt"}, "LOAD FUSE TRACE SIMPLIFY TYPE FILES BUILD VERIFY WRITE"),
        (
            {"format": "trt", "precision": "fp16", "build": False},
            "LOAD FUSE TRACE SIMPLIFY OBSERVE TYPE FILES VERIFY WRITE",
        ),
        (
            {"format": "trt", "precision": "int8", "data": "generated", "build": False},
            "LOAD FUSE TRACE SIMPLIFY CALIBRATE OBSERVE TYPE FILES VERIFY WRITE",
        ),
    ],
)
def test_steps(settings, steps):
    assert names(**settings) == steps.split()


def test_the_phases_of_a_search_are_steps():
    assert [Step[phase.name] for phase in Phase] == CHOOSE


def test_a_run_that_keeps_to_its_plan():
    with Journal(PREPARE, QUIET) as journal:
        for step in PREPARE:
            assert step in journal
            with journal.step(step):
                pass
            assert step not in journal


@pytest.mark.parametrize("taken", [[Step.FUSE], [Step.LOAD, Step.LOAD], [*PREPARE, Step.WRITE]])
def test_a_step_out_of_turn(taken):
    with pytest.raises(RuntimeError, match="was planned"):
        take(PREPARE, taken)


def test_steps_left_out():
    with pytest.raises(RuntimeError, match="left out TRACE, SIMPLIFY"):
        take(PREPARE, [Step.LOAD, Step.FUSE])


@pytest.mark.parametrize("optional", [[], [Step.RANK], [Step.RANK, Step.REFINE]])
def test_a_search_may_need_no_ranking_and_no_refining(optional):
    take(CHOOSE, [Step.COMPARE, *optional, Step.TIME, Step.CHOOSE])


def test_an_error_in_a_step_is_not_hidden_by_the_steps_it_prevented():
    with pytest.raises(KeyError), Journal(PREPARE, QUIET):
        raise KeyError


def test_a_plan_is_read_without_knowing_python():
    images = {"source": "photos/train", "images": 1, "fingerprint": "f" * 64}
    plan = {
        "replaces": True,
        "calibration": {"source": "generated", "images": 300, "fingerprint": "f" * 64},
        "ranges": images,
        "evaluation": {"images": 6, "classes": 2},
        "allowed": {"drop": 0.5, "latency_ms": None, "time_s": 600.0, "isa": "avx2"},
        "input": ["batch", 3, 64, 64],
        "steps": ["fuse", "simplify"],
        "weights": "odd\x1b.pth",
    }
    text = format_plan(plan)
    for line in (
        "replaces     a bundle that exists",
        "calibration  300 generated images",
        "ranges       1 image from photos/train",
        "evaluation   6 images of 2 classes",
        "allowed      a drop of 0.5 percentage points of top-1, a search of 600 s, instructions up to avx2",
        "input        batch x 3 x 64 x 64",
        "steps        fuse, simplify",
    ):
        assert line in text.splitlines()
    assert not set("{}[]'\x1b") & set(text)
    assert "nothing" in format_plan(plan | {"replaces": False})
