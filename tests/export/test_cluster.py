"""What an export asks of a cluster, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from cmt_edge.calib import CalibrationSet
from cmt_edge.deploy.bundle.sections import Variant
from cmt_edge.deploy.errors import InputError, OutputError, RuntimeMissingError
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.scale.sources import Source, open_source
from cmt_edge.export import ExportConfig, run, steps
from cmt_edge.export.auto.questions import make_questions
from cmt_edge.export.auto.workbench import Workbench
from cmt_edge.export.cli import build_parser
from cmt_edge.export.options import read_flags
from cmt_edge.export.pipeline import check_preconditions
from cmt_edge.export.settings import Settings
from cmt_edge.export.steps import Evaluation
from helpers.bundles import make_bundle
from helpers.cluster import find_workers
from helpers.exports import content, nano
from helpers.images import COLOURS, coloured_folder, labelled

AUTO = ExportConfig("cmt_nano", precision="auto", data="generated", eval_data="photos")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--ray"], {"ray": "local"}),
        (["--ray", "--int8"], {"ray": "local", "precision": "int8"}),
        (["--ray=head:6379"], {"ray": "head:6379"}),
        (["--ray", "auto", "--workers", "3"], {"ray": "auto", "workers": 3}),
    ],
)
def test_an_address_may_be_left_out(argv, expected):
    assert read_flags(build_parser().parse_args(argv), Settings) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(AUTO, workers=2), "--workers means nothing without --ray"),
        (replace(AUTO, answers="kept"), "--answers means nothing without --ray"),
        (replace(AUTO, ray_wait=9.0), "--ray-wait means nothing without --ray"),
        (replace(AUTO, ray="local", isa="avx2"), "--isa limits the runtime on this machine"),
        (replace(AUTO, ray="local", answers="kept", eval_data=None), "--answers keeps"),
        (replace(AUTO, ray="local", answers="kept", precision="int8"), "--answers keeps"),
        (ExportConfig("cmt_nano", ray="local", eval_data="photos"), "fp32 needs neither"),
    ],
)
def test_what_does_not_go_together_is_refused(config, words):
    with pytest.raises(InputError, match=words):
        config.check()


def test_a_cluster_that_does_not_answer_ends_the_export_early():
    pytest.importorskip("ray", reason='needs the extra "ray"')
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and it does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(RuntimeMissingError, match="no Ray cluster answers"):
            steps.check_cluster(replace(AUTO, ray=address))
    steps.check_cluster(AUTO)


def test_answers_that_cannot_be_kept_are_refused_before_the_long_work(tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "check_cluster", lambda config: None)  # whatever is installed
    (tmp_path / "file").write_text("in the way")
    for name, words in (("file", "cannot write here"), ("file/deeper", "cannot write here")):
        with pytest.raises(OutputError, match=words) as caught:
            check_preconditions(replace(AUTO, ray="local", answers=str(tmp_path / name)))
        assert caught.value.remedy.endswith(": --answers DIR")
    bundle = make_bundle(tmp_path / "tiny")
    with pytest.raises(OutputError, match="lies inside the bundle"):
        check_preconditions(replace(AUTO, ray="local", answers=str(bundle.path)))


def test_no_cluster_is_opened_unless_one_was_asked_for():
    with steps.open_cluster(AUTO) as cluster:
        assert cluster is None
    assert (
        steps.make_statistics(None, AUTO, CalibrationSet.of_blobs("x", [b"y"]), Progress(quiet=True)) is None
    )


class Unread(Source):
    """Images that must not be read on this machine."""

    def read(self, item) -> bytes:
        raise AssertionError(f"{item.name} was read")


@pytest.mark.parametrize("is_elsewhere", [False, True])
def test_images_that_workers_read_are_not_read_here(tmp_path, is_elsewhere):
    found = open_source(coloured_folder(tmp_path / "photos"))
    source = Unread(found.path, found.address, found.items) if is_elsewhere else found
    targets = {name: i for i, name in enumerate(COLOURS)}
    data = CalibrationSet.choose("generated", 2, AUTO.preprocess)
    asked = make_questions(tmp_path, data, Evaluation(source, targets), 6, AUTO.preprocess, is_elsewhere)
    assert [record.name for record in asked.judged.records] == (
        [record.name for record in found.items if record in asked.judged.records] if is_elsewhere else []
    )
    assert len(asked.judged.records) == (6 if is_elsewhere else 0)
    assert asked.probes.records == ()
    assert np.bincount(asked.truth).tolist() == [2, 2, 2]


class Acting(Progress):
    """Acts once, when a part of the images of a candidate is answered, but not all; ``act`` returns whether
    it could."""

    def __init__(self, act: Callable[[], bool], total: int) -> None:
        super().__init__(quiet=True)
        self.act, self.total, self.has_acted = act, total, False

    def count(self, done: int, total: int) -> None:
        if total == self.total and 0 < done < total and not self.has_acted:
            self.has_acted = self.act()


def interrupt() -> bool:
    """Ctrl-C."""
    signal.raise_signal(signal.SIGINT)
    return True


def kill_worker() -> bool:
    """Kill a process that holds a model, if one has started yet."""
    workers = find_workers()
    for pid in workers[:1]:
        os.kill(pid, signal.SIGKILL)
    return bool(workers)


EACH = 34
"""Labelled images of a class: each candidate answers four tasks of 32 images at most."""


@pytest.mark.slow
@pytest.mark.usefixtures("one_trace")
def test_auto_goes_on_where_it_was_interrupted_and_lets_workers_die(tmp_path, monkeypatch):
    """The same candidates and graph as without a cluster; what was answered is not computed again."""
    pytest.importorskip("ray", reason='needs the extra "ray"')
    from cmt_edge.deploy.scale import passes
    from cmt_edge.deploy.scale.cluster import connected
    from helpers.cluster import two_nodes

    images = labelled(tmp_path / "images", ["cat", "dog", "ship"], EACH)
    monkeypatch.setattr(passes, "TASK_IMAGES", 32)
    monkeypatch.setattr(Workbench, "variants", list_two_variants)
    monkeypatch.setattr("cmt_edge.export.auto.workbench.group_nodes", lambda *_: {})
    short = Protocol(iters=5, seconds=0.05, warmup_iters=2, warmup_seconds=0.05)
    for module in ("choose", "workbench"):
        monkeypatch.setattr(f"cmt_edge.export.auto.{module}.SEARCH_PROTOCOL", short)
    alone = nano(
        tmp_path / "out", precision="auto", data="generated", calib_size=6, threads=1, max_drop=100.0
    )
    alone = replace(alone, eval_data=str(images))
    expected = run(alone).manifest
    shutil.rmtree(tmp_path / "out")
    shared = replace(alone, ray="auto", answers=str(tmp_path / "answers"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with two_nodes() as nodes, connected(nodes.address):
            with pytest.raises(KeyboardInterrupt):
                run(shared, Acting(interrupt, 3 * EACH))
            assert not (tmp_path / "out").exists()
            kept = content(tmp_path / "answers")
            times = {path: path.stat().st_mtime_ns for path in (tmp_path / "answers").rglob("*.parquet")}
            assert 0 < len(times) < 4
            shutil.rmtree(find_cache_folder() / "search")
            kill = Acting(kill_worker, 3 * EACH)
            found = run(shared, kill).manifest
    assert kill.has_acted
    assert [c.accuracy for c in found.verdict.candidates] == [c.accuracy for c in expected.verdict.candidates]
    assert kept.items() <= content(tmp_path / "answers").items()
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(list((tmp_path / "answers").rglob("*.parquet"))) == 8


def list_two_variants(self: Workbench) -> list[Variant]:
    """The float graph and int8 as a whole."""
    return [Variant("fp32", "fp32"), Variant("int8", "int8")]
