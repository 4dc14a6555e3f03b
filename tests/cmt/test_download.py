"""Fetching published weights: resumable, checked, never half-written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.cmt import download as download_module
from cmt_edge.cmt import load_pretrained
from cmt_edge.cmt.download import fetch
from cmt_edge.cmt.spec import Pretrained
from cmt_edge.deploy.cache import CacheWarning
from cmt_edge.deploy.errors import DownloadError
from cmt_edge.deploy.locks import LOCK
from helpers.weights import holds, nano, release, saved, state_of

CONTENT = np.random.default_rng(0).bytes(300_000)
HASH = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``content`` under any name; what goes wrong is set by attributes."""

    def __init__(self, content: bytes = CONTENT) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.cut, self.ranges, self.status, self.chunked = content, None, True, 200, False
        self.seen: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/release/model.pth"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        server = self.server
        asked = self.headers.get("Range")
        server.seen.append(asked)
        self.close_connection = True
        start = int(asked.split("=")[1].split("-")[0]) if asked and server.ranges else 0
        if server.status != 200:
            self.send_error(server.status)
            return
        if start and start >= len(server.content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(server.content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        body = server.content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
            )
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        body = body[: server.cut]
        if server.chunked:
            self.wfile.write(
                f"{len(body):x}\r\n".encode() + body + (b"\r\n" if server.cut else b"\r\n0\r\n\r\n")
            )
        else:
            self.wfile.write(body)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as s:
        thread = threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield s
        s.shutdown()


def files(folder: Path) -> list[str]:
    """What is in ``folder``, lock files aside."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def failed(published: Pretrained, folder: Path) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        fetch(published, folder)
    error = caught.value
    assert error.exit_code == 2
    assert published.url in str(error)
    assert "--weights PATH" in error.remedy
    assert "--weights random" in error.remedy
    return error


@pytest.mark.parametrize("chunked", [False, True])
def test_full_download_happens_once(server, tmp_path, chunked):
    server.chunked = chunked
    published = Pretrained(server.url, size=len(CONTENT), sha256=HASH)
    path = fetch(published, tmp_path / "new" / "folder")
    assert path.read_bytes() == CONTENT
    assert files(path.parent) == ["model.pth"]
    assert fetch(published, path.parent) == path
    assert server.seen == [None]


def test_two_downloads_at_once_make_one_request(server, tmp_path):
    paths = []
    threads = [
        threading.Thread(target=lambda: paths.append(fetch(Pretrained(server.url), tmp_path)))
        for _ in range(3)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert len(paths) == 3
    assert paths[0].read_bytes() == CONTENT
    assert server.seen == [None]


def test_a_cut_connection_is_an_error_and_the_next_run_goes_on(server, tmp_path):
    server.cut = 100_000
    error = failed(Pretrained(server.url, sha256=HASH), tmp_path)
    assert "100000 of 300000" in error.why
    assert files(tmp_path) == ["model.pth.partial"]
    assert (tmp_path / "model.pth.partial").read_bytes() == CONTENT[:100_000]
    failed(Pretrained(server.url, sha256=HASH), tmp_path)  # cut again, behind what is there
    assert (tmp_path / "model.pth.partial").stat().st_size == 200_000
    server.cut = None
    assert fetch(Pretrained(server.url, sha256=HASH), tmp_path).read_bytes() == CONTENT
    assert server.seen == [None, "bytes=100000-", "bytes=200000-"]
    assert files(tmp_path) == ["model.pth"]


def test_a_cut_chunked_connection_is_a_download_error(server, tmp_path):
    server.chunked, server.cut = True, 1000
    failed(Pretrained(server.url), tmp_path)
    assert "model.pth" not in files(tmp_path)


def test_a_server_that_does_not_speak_http(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer():
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                connection.recv(1000)
                connection.sendall(b"hello\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        failed(Pretrained(f"http://127.0.0.1:{listener.getsockname()[1]}/model.pth"), tmp_path)
        thread.join(5)


def test_a_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path / "model.pth.partial").write_bytes(b"x" * 1000)
    server.ranges = False
    assert fetch(Pretrained(server.url), tmp_path).read_bytes() == CONTENT
    assert server.seen == ["bytes=1000-"]


def test_a_complete_partial_file_is_taken_and_a_stale_one_dropped(server, tmp_path):
    (tmp_path / "model.pth.partial").write_bytes(CONTENT)
    assert fetch(Pretrained(server.url, sha256=HASH), tmp_path).read_bytes() == CONTENT
    (tmp_path / "model.pth").unlink()
    (tmp_path / "model.pth.partial").write_bytes(CONTENT + b"more")
    assert fetch(Pretrained(server.url, sha256=HASH), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("size", "sha256", "word"),
    [(299_999, None, "bytes"), (len(CONTENT), "0" * 64, "SHA-256"), (None, HASH[::-1], "SHA-256")],
)
def test_a_file_that_fails_its_check_is_not_kept(server, tmp_path, size, sha256, word):
    assert word in failed(Pretrained(server.url, size=size, sha256=sha256), tmp_path).why
    assert files(tmp_path) == []


@pytest.mark.parametrize("status", [404, 403, 500])
def test_http_errors(server, tmp_path, status):
    server.status = status
    (tmp_path / "model.pth.partial").write_bytes(CONTENT[:10])
    assert str(status) in failed(Pretrained(server.url), tmp_path).why
    assert files(tmp_path) == ["model.pth.partial"]  # what was there is still worth having


def test_no_network(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    failed(Pretrained(f"http://127.0.0.1:{port}/model.pth"), tmp_path)
    assert files(tmp_path) == []


def test_more_than_the_cap_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "MAX_DOWNLOAD_BYTES", 1000)
    assert "cap" in failed(Pretrained(server.url), tmp_path).why
    assert "model.pth" not in files(tmp_path)


def test_an_unusable_cache_folder_is_a_download_error(server, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    failed(Pretrained(server.url), tmp_path / "file" / "weights")


def test_without_a_cache_a_download_serves_this_run(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "file"))
    with pytest.warns(CacheWarning, match="results are not kept"):
        path = fetch(Pretrained(server.url))
    assert path.is_file()
    assert tmp_path not in path.parents


def test_load_pretrained_downloads_into_the_cache(tmp_path, monkeypatch):
    state, model = state_of(1), nano()
    content = saved(tmp_path, release(state, None)).read_bytes()
    monkeypatch.setenv("CMT_EDGE_CACHE", str(tmp_path / "cache"))
    with Server(content) as s:
        threading.Thread(target=s.serve_forever, args=(0.02,), daemon=True).start()
        model.spec = replace(model.spec, pretrained=Pretrained(s.url))
        assert load_pretrained(model).source == "model.pth"
        s.shutdown()
    assert holds(model, state)
    assert files(tmp_path / "cache" / "weights") == ["model.pth"]


def test_a_lock_that_a_killed_process_left_goes_with_the_next_use(server, tmp_path):
    published, folder = Pretrained(url=server.url), tmp_path / "weights"
    target = fetch(published, folder)
    lock = target.with_name(f"{target.name}{LOCK}")
    lock.touch()
    fetch(published, folder)
    assert lock.exists(), "a new one may be about to be locked"
    os.utime(lock, (0, 0))
    fetch(published, folder)
    assert os.listdir(folder) == [target.name]
