"""The service: it answers as the Predictor does, refuses what it cannot hold, and stops without losing
answers."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from helpers.bundles import tiny
from helpers.images import BLUE, GREEN, RED, coloured
from helpers.load import distinct_images
from helpers.paths import ROOT

pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'cmt-edge[examples]'")
pytest.importorskip("uvicorn", reason="needs uvicorn: pip install 'cmt-edge[examples]'")
pytest.importorskip("prometheus_client", reason="needs prometheus-client: pip install 'cmt-edge[examples]'")

LIMIT_S = 30
"""Seconds after which a test gives up waiting."""


@pytest.fixture(scope="module")
def module(example):
    return example("service/service.py")


@pytest.fixture(scope="module")
def load(example):
    return example("service/load.py")


@contextmanager
def running(module, predictor, **settings):
    """A service in a thread of this process, and its port."""
    service = module.Service(predictor, **settings)
    server = module.make_server(service, connections=32)
    with module.listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield service, listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(LIMIT_S)


def call(port: int, method: str, path: str, body: bytes | None = None):
    """Status, headers and text of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()
    finally:
        connection.close()


def read_metric(port: int, line: str) -> float:
    """The value of a metric, 0 where it is absent."""
    text = call(port, "GET", "/metrics")[2]
    found = [entry.split()[-1] for entry in text.splitlines() if entry.startswith(line + " ")]
    return float(found[0]) if found else 0.0


def test_answers_health_and_metrics(module):
    with running(module, tiny(), topk=2) as (_, port):
        status, headers, text = call(port, "POST", "/predict", RED)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        answer = json.loads(text)
        assert answer["label"] == "red"
        assert answer["top"][0]["label"] == "red"
        assert len(answer["top"]) == 2
        assert "logits" not in answer
        status, _, text = call(port, "GET", "/health")
        assert (status, json.loads(text)["status"]) == (200, "ok")
        assert read_metric(port, 'cmt_edge_requests_total{status="200"}') == 1
        assert read_metric(port, "cmt_edge_answer_seconds_count") == 1
        assert read_metric(port, "cmt_edge_images_held") == 0


@pytest.mark.parametrize(("body", "status", "what"), [(b"no image", 400, "error"), (b"", 400, "error")])
def test_what_is_no_image_is_a_fault_of_the_client(module, body, status, what):
    with running(module, tiny()) as (_, port):
        found, _, text = call(port, "POST", "/predict", body)
        assert found == status
        assert json.loads(text)[what]
        assert read_metric(port, f'cmt_edge_requests_total{{status="{status}"}}') == 1
        assert call(port, "POST", "/predict", RED)[0] == 200


def test_a_body_that_is_too_large_is_refused(module, monkeypatch):
    monkeypatch.setattr(module, "MAX_BODY", 1000)
    with running(module, tiny()) as (_, port):
        status, _, text = call(port, "POST", "/predict", b"x" * 1001)
        assert (status, json.loads(text)["error"]) == (413, "an image may have 1000 bytes")


def test_a_bug_is_an_answer_too(module, monkeypatch):
    predictor = tiny()
    monkeypatch.setattr(type(predictor), "__call__", lambda *_: 1 / 0)
    monkeypatch.setattr(module.LOG, "exception", lambda *_: None)
    with running(module, predictor) as (_, port):
        assert call(port, "POST", "/predict", RED)[0] == 500
        assert read_metric(port, 'cmt_edge_requests_total{status="500"}') == 1
        assert read_metric(port, "cmt_edge_images_held") == 0


class Held:
    """A Predictor whose answers wait until the test lets them go."""

    def __init__(self) -> None:
        self.inner = tiny()
        self.info, self.labels = self.inner.info, self.inner.labels
        self.begun = threading.Semaphore(0)
        self.go = threading.Event()

    def __call__(self, image):
        self.begun.release()
        assert self.go.wait(LIMIT_S)
        return self.inner(image)


def ask_in_thread(port: int, image: bytes, statuses: list[int]) -> threading.Thread:
    thread = threading.Thread(target=lambda: statuses.append(call(port, "POST", "/predict", image)[0]))
    thread.start()
    return thread


def wait_until(condition) -> None:
    """Wait for what another thread is about to do."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_full_queue_refuses_and_answers_what_it_took(module):
    predictor, statuses = Held(), []
    with running(module, predictor, workers=1, queue=1) as (_, port):
        threads = [ask_in_thread(port, RED, statuses)]
        assert predictor.begun.acquire(timeout=LIMIT_S)
        threads.append(ask_in_thread(port, GREEN, statuses))
        wait_until(lambda: read_metric(port, "cmt_edge_images_held") == 2)
        status, headers, text = call(port, "POST", "/predict", BLUE)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(text)["error"] == "the queue is full"
        predictor.go.set()
        for thread in threads:
            thread.join(LIMIT_S)
        assert statuses == [200, 200]
        assert call(port, "POST", "/predict", BLUE)[0] == 200
        assert read_metric(port, 'cmt_edge_requests_total{status="503"}') == 1


def test_a_stopping_service_takes_no_image_and_says_so(module):
    with running(module, tiny()) as (service, port):
        service.stop()
        assert call(port, "GET", "/health")[0] == 503
        status, _, text = call(port, "POST", "/predict", RED)
        assert (status, json.loads(text)["error"]) == (503, "the service is stopping")


def test_connections_send_at_once(module):
    """Otherwise the body of each answer waits for the client's acknowledgement of its head."""
    with (
        module.listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        connection, _ = listening.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(("answers", "told"), [(999, False), (1000, True)])
def test_the_99th_percentile_needs_many_answers(load, answers, told):
    found = load.summarise([load.Reply(number, 200, {}, 0.001) for number in range(answers)], 1.0)
    assert ("p99_ms" in found) == told


def test_a_load_test_counts_refusals_and_failures(module, load, capsys, tmp_path):
    (tmp_path / "red.png").write_bytes(RED)
    (tmp_path / "no.png").write_bytes(b"no image")
    with running(module, tiny()) as (_, port):
        url = f"http://127.0.0.1:{port}"
        good = [url, str(tmp_path / "red.png"), "--requests", "9", "--clients", "2", "--json"]
        assert load.main(good) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["requests"], found["statuses"]) == (9, {"200": 9})
        assert read_metric(port, 'cmt_edge_requests_total{status="200"}') == 9
        bad = [url, str(tmp_path / "red.png"), str(tmp_path / "no.png"), "--requests", "5"]
        assert load.main(bad) == 1
        assert "2 of 5 requests failed" in capsys.readouterr().err
    assert load.main(good) == 2
    assert "the service does not answer" in capsys.readouterr().err


def encode(image: np.ndarray) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_the_real_service_answers_bit_for_bit_and_stops_gracefully(load, fp32_bundle):
    """In a process of its own, with OpenVINO: many clients at once get the bits that one Predictor gives."""
    from cmt_edge.deploy import Predictor

    images = [encode(image) for image in distinct_images(12)]
    with Predictor.load(fp32_bundle.path) as predictor:
        expected = [predictor(image).logits for image in images]
    command = [
        sys.executable,
        str(ROOT / "examples/service/service.py"),
        str(fp32_bundle.path),
        "--port",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            url = process.stderr.readline().split()[-1]
            assert url.startswith("http://127.0.0.1:")
            replies = load.ask(url, images, requests=72, clients=8)
        finally:
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=LIMIT_S)
    assert [reply.status for reply in replies] == [200] * 72
    for reply in replies:
        logits = np.array(reply.content["logits"], np.float32)
        assert logits.tobytes() == expected[reply.number % len(images)].tobytes()
    assert (process.returncode, err) == (0, "stopped; every image that was taken has been answered\n")


@pytest.mark.slow
def test_the_real_service_answers_what_it_took_before_it_stops(fp32_bundle, tmp_path):
    """SIGTERM comes while an image is being computed: its client still gets the answer."""
    hook = tmp_path / "sitecustomize.py"
    flag = tmp_path / "computing"
    hook.write_text(
        "import pathlib, time\n"
        "from cmt_edge.deploy import Predictor\n"
        "call = Predictor.__call__\n"
        "def slow(self, image):\n"
        f"    pathlib.Path({str(flag)!r}).touch()\n"
        "    time.sleep(0.3)\n"
        "    return call(self, image)\n"
        "Predictor.__call__ = slow\n"
    )
    command = [
        sys.executable,
        str(ROOT / "examples/service/service.py"),
        str(fp32_bundle.path),
        "--port",
        "0",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "src")])}
    statuses: list[int] = []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        port = int(process.stderr.readline().rpartition(":")[2])
        client = ask_in_thread(port, coloured("red"), statuses)
        wait_until(flag.exists)
        process.send_signal(signal.SIGTERM)
        client.join(LIMIT_S)
        process.communicate(timeout=LIMIT_S)
    assert (statuses, process.returncode) == ([200], 0)


@pytest.mark.slow
def test_a_bundle_that_is_not_there_is_a_message(module, capsys, tmp_path):
    assert module.main([str(tmp_path / "none")]) == 2
    assert "remedy" in capsys.readouterr().err
