"""Scores of a folder: the Predictor's, complete or absent, resumed after an interruption."""

from __future__ import annotations

import csv
import json
import os
import sys

import pytest

from cmt_edge.deploy import Predictor
from helpers.bundles import LABELS, make_bundle
from helpers.images import coloured, coloured_folder

pytestmark = pytest.mark.usefixtures("served_by_fake")


@pytest.fixture(scope="module")
def module(example):
    return example("batch/score_folder.py")


@pytest.fixture
def bundle(tmp_path):
    return str(make_bundle(tmp_path / "bundle").path)


@pytest.fixture
def folder(tmp_path):
    return str(coloured_folder(tmp_path / "photos"))


def read(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_holds_the_answers_of_the_predictor(module, bundle, folder, tmp_path, capsys):
    table = tmp_path / "scores.csv"
    assert module.main([bundle, folder, "-o", str(table), "--topk", "2"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "table": str(table),
        "images": 9,
        "unreadable": 0,
        "computed": 9,
    }
    rows = read(table)
    assert [row["image"] for row in rows] == sorted(f"{name}/{i:03}.png" for name in LABELS for i in range(3))
    with Predictor.load(bundle) as predictor:
        for row in rows:
            (first, p1), (second, p2) = predictor(f"{folder}/{row['image']}").top(2)
            assert (row["label_1"], float(row["probability_1"])) == (first, p1)
            assert (row["label_2"], float(row["probability_2"])) == (second, p2)
            assert row["image"].startswith(first)
    assert {path.name for path in tmp_path.glob("scores*")} == {"scores.csv"}


def test_bad_images_are_listed_and_change_the_exit_code(module, bundle, folder, tmp_path, capsys):
    table, listed = tmp_path / "scores.csv", tmp_path / "scores.csv.bad.csv"
    (tmp_path / "photos" / "red" / "torn.png").write_bytes(coloured("red")[:50])
    assert module.main([bundle, folder, "-o", str(table)]) == 2
    assert f"1 of 10 images could not be read: {listed}" in capsys.readouterr().err
    assert len(read(table)) == 9
    (bad,) = read(listed)
    assert bad["image"] == "red/torn.png"
    assert bad["error"]
    (tmp_path / "photos" / "red" / "torn.png").write_bytes(coloured("red"))
    assert module.main([bundle, folder, "-o", str(table)]) == 0
    assert len(read(table)) == 10
    assert not listed.exists()


@pytest.fixture
def interrupted(module, bundle, folder, tmp_path, monkeypatch):
    """A command that was stopped after four images."""
    command = [bundle, folder, "-o", str(tmp_path / "scores.csv"), "--json"]

    def count(_, done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.Progress, "count", count)
        assert module.main(command) == 130
    assert not (tmp_path / "scores.csv").exists()
    assert (tmp_path / "scores.csv.part").exists()
    return command


def finish(module, command, capsys) -> dict:
    """What a run prints that ends well."""
    capsys.readouterr()
    assert module.main(command) == 0
    return json.loads(capsys.readouterr().out)


def test_an_interrupted_run_computes_only_the_rest(module, interrupted, tmp_path, capsys):
    assert finish(module, interrupted, capsys)["computed"] == 5
    resumed = (tmp_path / "scores.csv").read_bytes()
    assert not (tmp_path / "scores.csv.part").exists()
    assert finish(module, interrupted, capsys)["computed"] == 9
    assert (tmp_path / "scores.csv").read_bytes() == resumed


def test_an_image_that_changed_meanwhile_is_computed_again(module, interrupted, folder, tmp_path, capsys):
    changed = tmp_path / "photos" / "blue" / "000.png"
    changed.write_bytes(coloured("red", 1))
    os.utime(changed, (1, 1))
    assert finish(module, interrupted, capsys)["computed"] == 6
    assert read(tmp_path / "scores.csv")[0] | {"probability_1": ""} == {
        "image": "blue/000.png",
        "label_1": "red",
        "probability_1": "",
    }


def test_a_torn_last_line_is_computed_again(module, interrupted, tmp_path, capsys):
    part = tmp_path / "scores.csv.part"
    part.write_bytes(part.read_bytes()[:-7])
    assert finish(module, interrupted, capsys)["computed"] == 6
    assert len(read(tmp_path / "scores.csv")) == 9


def test_notes_of_another_command_are_not_used(module, interrupted, tmp_path, capsys):
    assert module.main([*interrupted, "--topk", "3"]) == 2
    assert "why: another topk" in capsys.readouterr().err
    other = str(make_bundle(tmp_path / "other", labels=("a", "b", "c")).path)
    assert module.main([other, *interrupted[1:]]) == 2
    assert "why: another bundle" in capsys.readouterr().err
    (tmp_path / "scores.csv.part").write_text("5\n{}\n", encoding="utf-8")
    assert module.main(interrupted) == 2
    assert "is damaged" in capsys.readouterr().err


def test_parquet_holds_the_same_as_csv(module, bundle, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: pip install 'cmt-edge[examples]'")
    for name in ("scores.csv", "scores.parquet"):
        assert module.main([bundle, folder, "-o", str(tmp_path / name), "--topk", "2", "-q"]) == 0
    rows = parquet.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [{key: str(value) for key, value in row.items()} for row in rows] == read(tmp_path / "scores.csv")


def test_parquet_without_pyarrow_is_refused_before_the_work(
    module, bundle, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert module.main([bundle, folder, "-o", str(tmp_path / "scores.parquet")]) == 3
    assert "cmt-edge[examples]" in capsys.readouterr().err
    assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"table": "scores.txt"}, "must end in .csv or .parquet"),
        ({"folder": "none"}, "none"),
        ({"folder": "photos.tar"}, "this example reads folders"),
        ({"table": "no/folder/scores.csv"}, "cannot write here"),
    ],
)
def test_what_cannot_be_done_is_a_message(module, bundle, folder, tmp_path, capsys, change, message):
    (tmp_path / "photos.tar").write_bytes(b"\0" * 10240)
    given = {"folder": "photos", "table": "scores.csv"} | change
    command = [bundle, str(tmp_path / given["folder"]), "-o", str(tmp_path / given["table"])]
    assert module.main(command) == 2
    assert message in capsys.readouterr().err
