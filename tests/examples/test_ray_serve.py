"""A bundle in Ray Serve, on a cluster that really runs: batches, damaged images, a replica that is killed.

``make test-ray-serve`` runs this in an environment of its own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import Predictor
from helpers.bundles import make_bundle
from helpers.paths import ROOT
from helpers.running import is_running

if not all(map(find_spec, ("ray", "grpc", "starlette"))):
    pytest.skip("needs Ray Serve: make test-ray-serve", allow_module_level=True)

pytestmark = pytest.mark.slow

LIMIT_S = 180
"""Seconds in which the cluster must have started, or ended."""
WAIT_MS = 400
"""Milliseconds that a replica waits for more images: whoever is killed meanwhile holds some."""
CLIENTS = 6


def make_png(colour) -> bytes:
    target = BytesIO()
    Image.new("RGB", (20, 20), colour).save(target, "png")
    return target.getvalue()


IMAGES = [make_png(colour) for colour in ("red", "lime", "blue")]


@pytest.fixture(scope="module")
def load(example):
    return example("service/load.py")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "tiny")


def start(bundle, folder, *flags):
    """The program as a process, its port, and the file that it writes to."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = folder / "log.txt"
    command = [sys.executable, ROOT / "examples" / "ray_serve.py", bundle.path, "--port", str(port), *flags]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)
    return process, port, log


@contextmanager
def serving(bundle, folder, *flags):
    """The program's address; at the end it must stop in order."""
    process, port, log = start(bundle, folder, *flags)
    try:
        until = time.monotonic() + LIMIT_S
        while "listening on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == 128 + signal.SIGTERM, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def server(bundle, tmp_path_factory):
    flags = ["--replicas", "2:2", "--wait-ms", str(WAIT_MS)]
    with serving(bundle, tmp_path_factory.mktemp("log"), *flags) as address:
        yield address


def test_answers_are_those_of_the_predictor(bundle, server, load):
    replies = load.ask(server, IMAGES, 6, CLIENTS)
    with Predictor.load(bundle) as predictor:
        for reply in replies:
            expected = predictor(IMAGES[reply.number % len(IMAGES)])
            assert reply.status == 200
            assert reply.content["label"] == expected.label
            np.testing.assert_array_equal(np.float32(reply.content["logits"]), expected.logits)


def test_a_damaged_image_spoils_no_other(server, load):
    replies = load.ask(server, [IMAGES[0], b"no image"], 6, CLIENTS)
    assert [reply.status for reply in replies] == [200, 400] * 3
    assert "image" in replies[1].content["error"]


def test_no_request_is_lost_when_a_replica_is_killed(bundle, server, load):
    before = load.ask(server, IMAGES, 2 * CLIENTS, CLIENTS)
    replicas = Counter(reply.content["process"] for reply in before)
    victim = replicas.most_common(1)[0][0]
    timer = threading.Timer(WAIT_MS / 2000, os.kill, [victim, signal.SIGKILL])
    timer.start()
    replies = load.ask(server, IMAGES, 8 * CLIENTS, CLIENTS)
    timer.join()
    assert Counter(reply.status for reply in replies) == {200: 8 * CLIENTS}
    assert max(reply.content["asked"] for reply in replies) > 1, "the dead replica held requests"
    assert replies[-1].content["process"] != victim
    with Predictor.load(bundle) as predictor:
        labels = [predictor(image).label for image in IMAGES]
    assert [reply.content["label"] for reply in replies] == [labels[i % 3] for i in range(len(replies))]


def test_the_dead_replica_is_replaced(server, load):
    """Two answer again, and neither is the one that died."""
    until = time.monotonic() + LIMIT_S
    while len({reply.content["process"] for reply in load.ask(server, IMAGES, 2 * CLIENTS, CLIENTS)}) < 2:
        assert time.monotonic() < until


def test_no_request_is_lost_when_a_replica_hangs(server, load, monkeypatch):
    """It has begun requests, and never ends: Ray kills it once it has failed its health checks."""
    monkeypatch.setattr(load, "TIME_LIMIT_S", LIMIT_S)
    before = load.ask(server, IMAGES, 2 * CLIENTS, CLIENTS)
    victim = Counter(reply.content["process"] for reply in before).most_common(1)[0][0]
    timer = threading.Timer(WAIT_MS / 2000, os.kill, [victim, signal.SIGSTOP])
    timer.start()
    replies = load.ask(server, IMAGES, 2 * CLIENTS, CLIENTS)
    timer.join()
    assert Counter(reply.status for reply in replies) == {200: 2 * CLIENTS}
    assert max(reply.content["asked"] for reply in replies) > 1, "the replica held requests"


def test_other_paths(server, load):
    connection = load.http.client.HTTPConnection(server.removeprefix("http://"), timeout=30)
    for method, path, status in [("GET", "/health", 200), ("GET", "/predict", 404), ("POST", "/x", 404)]:
        connection.request(method, path, b"" if method == "POST" else None)
        response = connection.getresponse()
        response.read()
        assert response.status == status
    connection.close()


def test_load_starts_a_second_replica(bundle, load, tmp_path):
    with serving(bundle, tmp_path, "--replicas", "1:2", "--batch", "1") as address:
        seen = {load.ask(address, IMAGES, 1, 1)[0].content["process"]}
        assert len(seen) == 1
        until = time.monotonic() + LIMIT_S
        while len(seen) < 2:
            seen |= {reply.content["process"] for reply in load.ask(address, IMAGES, 20 * CLIENTS, CLIENTS)}
            assert time.monotonic() < until


def list_children(pid: int) -> list[int]:
    """The processes that a process has started; empty once it has ended."""
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
        found = [Path(f"/proc/{pid}/task/{task}/children").read_text() for task in tasks]
    except OSError:
        return []
    return [int(child) for children in found for child in children.split()]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_ray_starts_ends_all_in_order(bundle, tmp_path, number):
    process, _, log = start(bundle, tmp_path)
    until = time.monotonic() + LIMIT_S
    try:
        while not (children := list_children(process.pid)):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.05)
        assert "listening on" not in log.read_text()
        process.send_signal(number)
        assert process.wait(LIMIT_S) == 128 + number, log.read_text()
        assert "Traceback" not in log.read_text()
        until = time.monotonic() + LIMIT_S
        while any(map(is_running, children)):
            assert time.monotonic() < until, "processes of Ray are left"
            time.sleep(0.1)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
