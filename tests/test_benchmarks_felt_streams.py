"""Streams, folders and services of ``felt.py``: what they compare, and that they notice a failure."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor
from helpers.bundles import SPEC, make_bundle
from helpers.images import coloured
from helpers.paths import ROOT

pytest.importorskip("openvino")


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A flat folder of images."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    for shade, name in enumerate(("red", "green", "blue")):
        (folder / f"{shade}.png").write_bytes(coloured(name, shade))
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "b", format="openvino")


def read_rows(text: str) -> list[list[str]]:
    """The cells of tables without their heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_loop_by_hand_gives_the_same_answers(bundle: Bundle, photographs: Path) -> None:
    from by_hand import Preparation, classify_all, compile_bundle

    files = [path for _ in range(7) for path in sorted(photographs.iterdir())]
    compiled = compile_bundle(bundle, 1, throughput=True)
    theirs = list(classify_all(compiled, Preparation(SPEC), files))
    with Predictor.load(bundle, threads=1) as predictor:
        ours = [answer.logits for answer in predictor.stream(files)]
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_a_stream_is_compared_with_its_parts(bundle: Bundle, photographs: Path) -> None:
    from felt_streams import measure_stream

    rows = read_rows(measure_stream(bundle.path, photographs, 1, 1, 0.01))
    ways = ["model alone", "decoding alone", "both, by hand", "stream()", "sum of the two alone"]
    assert [row[0] for row in rows if row[0] in ways] == 2 * ways
    assert {row[3] for row in rows if row[0] == ways[4]} == {"1.00"}


def test_clients_are_answered_at_once(bundle: Bundle, photographs: Path) -> None:
    from felt_service import measure_service

    rows = read_rows(measure_service(bundle.path, photographs, 1, 1, 0.02))
    assert [row[0] for row in rows if row[0].isdigit()] == ["2", "4", "8"] * 2


def test_a_process_is_watched_to_its_last_answer() -> None:
    from felt_streams import watch_answers

    command = [sys.executable, "-c", "print('source,a'); [print(i) for i in range(20)]"]
    watched = watch_answers(command, 20)
    assert watched.start_s > 0
    assert watched.largest >= watched.settled >= 0
    assert watched.memory[0][0] == 1
    with pytest.raises(SystemExit, match="failed after 20 answers"):
        watch_answers(command, 21)


def test_links_are_names_of_a_few_files(photographs: Path, tmp_path: Path) -> None:
    from felt_streams import link_images

    folder = link_images(photographs, tmp_path, 10)
    assert len(list(folder.iterdir())) == 10
    assert len({path.stat().st_ino for path in folder.iterdir()}) == 3
