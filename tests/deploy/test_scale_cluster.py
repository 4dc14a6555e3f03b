"""Evaluation on a real Ray cluster of two nodes: the table of a serial run, whatever is killed meanwhile."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.cli import verify
from cmt_edge.deploy.errors import ClusterError, ImageError
from cmt_edge.deploy.images import ImageSet
from helpers.bundles import LABELS, make_bundle, recorded_bundle
from helpers.collections import archive
from helpers.images import COLOURS, coloured, folder_of

pytest.importorskip("ray", reason='needs the extra "ray"')
pytest.importorskip("pyarrow", reason='needs the extra "ray"')
pytest.importorskip("onnxruntime", reason="the workers of these tests run ONNX Runtime")

from pyarrow import parquet

from cmt_edge.deploy.scale import passes
from cmt_edge.deploy.scale.answers import AnswersFolder
from cmt_edge.deploy.scale.cluster import KNOWN_WARNINGS, Cluster, connected, make_cluster_error
from cmt_edge.deploy.scale.evaluation import pack_bundle
from cmt_edge.deploy.scale.passes import Plan, answer_all
from cmt_edge.deploy.scale.sources import open_source
from cmt_edge.deploy.scale.worker import Answerer, Subject
from helpers.cluster import DEADLY, Deadly, Slow, find_workers, is_worker, two_nodes

pytestmark = [
    pytest.mark.slow,
    *(pytest.mark.filterwarnings(f"ignore:{message}") for message in KNOWN_WARNINGS),
]

IMAGES = 160
"""Images of the test set; ten tasks where one has 16."""


ENDING_S = 60
"""Seconds in which a worker must be gone once its cluster has ended."""


@pytest.fixture(scope="module")
def nodes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with two_nodes() as cluster:
            yield cluster


@pytest.fixture(scope="module")
def ray(nodes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with connected(nodes.address) as ray:
            yield ray


@pytest.fixture
def cluster(ray, monkeypatch):
    """The cluster, with small tasks."""
    monkeypatch.setattr(passes, "TASK_IMAGES", 16)
    return Cluster("unused, because there is a connection")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders; the last digit of a shade makes most images different files."""
    folder = tmp_path_factory.mktemp("photos")
    per_class = IMAGES // len(COLOURS) + 1
    folder_of(folder, {name: [coloured(name, i % 50) for i in range(per_class)] for name in COLOURS})
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


@pytest.fixture(scope="module")
def expected(bundle, photos) -> np.ndarray:
    """The logits of a serial run."""
    images = ImageSet(photos)
    with Predictor.load(bundle, threads=1) as predictor:
        return predictor.logits(predictor.prepare([images.read(item) for item in images.items[:IMAGES]]))


@pytest.fixture
def run(cluster, bundle, photos, tmp_path):
    """Answer the images; returns the answers. Each of the ``workers`` takes seconds to start."""

    def start(answerer=Answerer, source=photos, progress=None, workers=1):
        found = open_source(str(source))
        subject = Subject(bundle.title, pack_bundle(bundle), source=found.address)
        plan = Plan(found.items[:IMAGES], 16, workers, LABELS, progress, answerer)
        with cluster:
            return answer_all(cluster, subject, plan, AnswersFolder(tmp_path / "answers", {"of": "test"}))

    return start


def list_parts(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.parquet")}


def test_the_command_starts_ray_here_and_ends_it(tmp_path, capfd):
    """Before the cluster of the other tests, which would be used."""
    bundle = recorded_bundle(tmp_path / "tiny")
    data = tmp_path / "known"
    folder_of(data, {name: [coloured(name, i) for i in range(5)] for name in COLOURS})
    flags = [str(bundle.path), "--data", str(data), "--answers", str(tmp_path / "answers"), "--threads", "1"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    run_alone = [sys.executable, "-m", "cmt_edge", "verify", *flags]
    ours = subprocess.run([*run_alone, "--ray"], env=environment, capture_output=True, text=True, check=False)
    assert (ours.returncode, ours.stderr) == (0, "")
    assert verify.main(flags[:3] + flags[-2:]) == 0
    assert capfd.readouterr().out == ours.stdout
    (part,) = (tmp_path / "answers").rglob("*.parquet")
    pid = json.loads(parquet.read_schema(part).metadata[b"worker"])["pid"]
    deadline = time.monotonic() + ENDING_S
    while is_worker(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not is_worker(pid)


@pytest.mark.parametrize("has_record", [True, False])
def test_the_table_is_that_of_a_serial_run(cluster, photos, tmp_path, capsys, has_record):
    bundle = recorded_bundle(tmp_path / "tiny")
    data, more = photos, ["--reference", str(bundle.path)]
    if has_record:
        data, more = tmp_path / "known", []
        folder_of(data, {name: [coloured(name, i) for i in range(5)] for name in COLOURS})
    flags = [str(bundle.path), "--data", str(data), "--json", "--threads", "1", *more]
    codes = verify.main(flags), verify.main([*flags, "--workers", "1", "--ray"])
    serial, ours = capsys.readouterr().out.splitlines()
    assert (codes, ours) == ((0, 0), serial)
    found = json.loads(serial)["data"]
    assert found["images"] == (15 if has_record else IMAGES + 2)
    assert (found["reference_source"] == "the bundle's record") is has_record


def test_shards_are_answered_alike(run, tmp_path, expected, bundle):
    shards = tmp_path / "shards"
    shards.mkdir()
    for name in COLOURS:
        members = {f"{i:02}.png": coloured(name, i) for i in range(20)}
        members |= {f"{i:02}.cls": str(LABELS.index(name)).encode() for i in range(20)}
        archive(shards / f"{name}.tar", members)
    answers = run(source=f"local://{shards}")
    truth = [int(item.label) for item in open_source(str(shards)).items]
    assert answers.logits.argmax(1).tolist() == truth
    assert answers.computed == 60


def test_what_is_there_is_not_computed_again(run, expected, tmp_path):
    first = run()
    assert first.logits.tobytes() == expected.tobytes()
    parts = list_parts(tmp_path)
    lost = sorted((tmp_path / "answers").glob("*.parquet"))[3]
    lost.write_bytes(lost.read_bytes()[:-9])
    again = run()
    assert again.logits.tobytes() == expected.tobytes()
    assert (first.computed, again.computed) == (IMAGES, 16)
    changed = {name for name, time in list_parts(tmp_path).items() if parts[name] != time}
    assert changed == {lost.name}


def test_a_corrupt_image_is_named_and_the_others_are_answered(run, photos, expected, tmp_path):
    victims = [photos / "blue" / "003.png", photos / "green" / "007.png"]
    before = [path.read_bytes() for path in victims]
    for path in victims:
        path.write_bytes(before[0][:40])
    try:
        with pytest.raises(ImageError) as caught:
            run()
    finally:
        for path, data in zip(victims, before, strict=True):
            path.write_bytes(data)
    assert "blue/003.png" in str(caught.value)
    assert "so are green/007.png" in str(caught.value)
    again = run()
    assert again.logits.tobytes() == expected.tobytes()
    assert again.computed == 32


def kill_once(progress_at: int, act):
    """A report of progress that acts once, when a number of images is done."""
    acted = threading.Event()

    def report_progress(done: int, total: int) -> None:
        if done >= progress_at and not acted.is_set():
            acted.set()
            act()

    return report_progress, acted


def test_a_killed_worker_changes_nothing(run, expected):
    killed: list[int] = []

    def kill() -> None:
        killed.extend(find_workers()[:1])
        os.kill(killed[0], signal.SIGKILL)

    progress, acted = kill_once(16, kill)
    answers = run(Slow, progress=progress, workers=2)
    assert acted.is_set()
    assert len(killed) == 1
    assert answers.logits.tobytes() == expected.tobytes()


def test_an_image_that_ends_every_worker_is_one_error(run, photos, tmp_path):
    folder = tmp_path / "photos"
    names = {f"{name}/{i:02}.png": coloured(name, i) for name in COLOURS for i in range(20)}
    names[f"red/{DEADLY}.png"] = coloured("red")
    for name, data in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with pytest.raises(ClusterError, match="lost a worker or a node") as caught:
        run(Deadly, source=folder, workers=2)
    assert caught.value.exit_code == 3
    assert len(list_parts(tmp_path / "answers")) >= 2


@pytest.mark.parametrize(
    ("name", "words", "code"),
    [
        ("OutOfDiskError", "memory or disk is full", 3),
        ("OutOfMemoryError", "memory or disk is full", 3),
        ("NodeDiedError", "lost a worker or a node", 3),
        ("RaySystemError", "lost a worker or a node", 3),
        ("RayError", "internal failure on a worker", 4),
    ],
)
def test_failures_of_ray_are_one_clear_error(ray, name, words, code):
    error = make_cluster_error(ray, getattr(ray.exceptions, name)("its own words"), "do that again")
    assert words in error.what
    assert ("do that again" in error.remedy) is (code == 3)
    assert error.exit_code == code
    assert "its own words" in f"{error.what} {error.why}"


CONNECTED = """
import sys, time
from cmt_edge.deploy.scale.cluster import LOCAL, connected
from cmt_edge.deploy.signals import unwound_by_signals
with unwound_by_signals(), connected(LOCAL):
    print("ready", file=sys.__stdout__, flush=True)
    try:
        time.sleep(60)
    finally:
        time.sleep(4)
        print("cleaned", file=sys.__stdout__, flush=True)
"""
"""A program that starts Ray and takes a while to clean up."""


def test_sigterm_unwinds_the_program_and_nothing_else_happens():
    """Ray's own code would print a trace, and end the process three seconds later, cleaned up or not."""
    with subprocess.Popen(
        [sys.executable, "-c", CONNECTED], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout.readline() == "ready\n"
        program.terminate()
        out, err = program.communicate(timeout=120)
    assert out == "cleaned\n"
    assert "SIGTERM received" not in err
    assert err.rstrip().endswith("stopped by SIGTERM")


def test_a_full_store_changes_nothing(ray, run, expected):
    held = [ray.put(np.zeros(30 << 20, np.uint8)) for _ in range(4)]
    assert run().logits.tobytes() == expected.tobytes()
    assert len(held) == 4


@pytest.fixture
def uncollected():
    """Python collects no cycles by itself: what waits in one must be collected by who needs it."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_a_node_that_goes_changes_nothing(run, nodes, expected):
    """The last test of this module: the node does not come back."""
    progress, acted = kill_once(
        32, lambda: nodes.remove_node(nodes.worker_nodes.copy().pop(), allow_graceful=False)
    )
    answers = run(Slow, progress=progress, workers=2)
    assert acted.is_set()
    assert answers.logits.tobytes() == expected.tobytes()
