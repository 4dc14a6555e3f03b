"""What a user names for an answer is written to, and never replaced where it is no regular file."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import subprocess
import sys
import threading

import pytest

from cmt_edge.deploy.cli import bench
from cmt_edge.deploy.errors import OutputError
from cmt_edge.deploy.files import require_writable, write_atomic, write_output
from helpers.bundles import make_bundle
from helpers.paths import ROOT

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the special files of POSIX")

CONTENT = b"content\n" * 20_000
"""More than a named pipe holds."""
BRIEF = ("--iters", "2", "--seconds", "0", "--warmup", "1", "--no-throughput", "-q")
"""Flags of a short measurement."""

WRITE = """
import sys
from pathlib import Path
from cmt_edge.deploy.files import write_output
print("before", flush=True)
write_output(Path(sys.argv[1]), b"written\\n")
print("after", flush=True)
"""
"""Writes to a path between two lines on standard output."""


def make_device(path, minor):
    """A copy of one of the harmless devices of memory, number 3 for /dev/null and 7 for /dev/full."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        os.close(os.open(path, os.O_WRONLY))
    except OSError:
        pytest.skip("needs the right to make and open devices")
    return path


def test_a_file_is_replaced_and_a_link_stays(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to("target")
    write_output(link, CONTENT)
    assert link.is_symlink()
    assert target.read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["link", "target"]


def test_a_link_to_nothing_makes_the_file_that_it_names(tmp_path):
    link = tmp_path / "link"
    link.symlink_to("absent")
    write_output(link, CONTENT)
    assert (tmp_path / "absent").read_bytes() == CONTENT


def test_a_link_into_a_folder_that_is_absent_is_refused(tmp_path):
    (tmp_path / "link").symlink_to("absent/file")
    with pytest.raises(OutputError, match="folder does not exist"):
        write_output(tmp_path / "link", CONTENT)


def test_a_named_pipe_is_written_through(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    seen = []
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()), daemon=True)
    reader.start()
    while reader.is_alive():
        with contextlib.suppress(OutputError):  # until the reader is there
            write_output(pipe, CONTENT)
            break
    reader.join(60)
    assert seen == [CONTENT]
    assert stat.S_ISFIFO(os.lstat(pipe).st_mode)


def test_a_named_pipe_without_a_reader_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError):
        write_output(tmp_path / "pipe", CONTENT)
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)


def test_a_device_is_written_through_and_stays(tmp_path):
    device = make_device(tmp_path / "null", 3)
    write_output(device, CONTENT)
    assert stat.S_ISCHR(os.lstat(device).st_mode)


def test_a_device_that_is_full_is_an_error_and_stays(tmp_path):
    device = make_device(tmp_path / "full", 7)
    with pytest.raises(OutputError, match="No space left"):
        write_output(device, CONTENT)
    assert stat.S_ISCHR(os.lstat(device).st_mode)


def test_a_socket_and_a_folder_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        for name in ("socket", "folder"):
            with pytest.raises(OutputError, match=f"it is a {name}"):
                require_writable(tmp_path / name)
            with pytest.raises(OutputError, match=f"it is a {name}"):
                write_output(tmp_path / name, CONTENT)
    assert stat.S_ISSOCK(os.lstat("socket").st_mode)


def test_no_writer_replaces_a_special_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OutputError, match="not replaced"):
        write_atomic(tmp_path / "pipe", CONTENT)
    assert os.listdir(tmp_path) == ["pipe"]
    assert stat.S_ISFIFO(os.lstat(tmp_path / "pipe").st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/stdout"), reason="needs /dev/stdout")
def test_standard_output_that_is_a_file_is_not_replaced(tmp_path):
    """Otherwise what is printed afterwards goes to a file without a name."""
    with open(tmp_path / "out", "wb") as out:
        command = [sys.executable, "-c", WRITE, "/dev/stdout"]
        subprocess.run(command, stdout=out, check=True, env=os.environ | {"PYTHONPATH": str(ROOT / "src")})
    assert (tmp_path / "out").read_bytes() == b"before\nwritten\nafter\n"


@pytest.mark.parametrize("flag", ["--markdown", "--plot"])
def test_bench_keeps_a_named_pipe_and_refuses_it_before_it_measures(tmp_path, monkeypatch, capsys, flag):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    monkeypatch.setattr(bench, "run_benchmark", lambda *_, **__: pytest.fail("it measured"))
    bundle = make_bundle(tmp_path / "tiny").path
    with socket.socket(socket.AF_UNIX) as listening:
        monkeypatch.chdir(tmp_path)
        listening.bind("socket.svg")
        assert bench.main([str(bundle), *BRIEF, flag, "socket.svg"]) == 2
    assert "it is a socket" in capsys.readouterr().err
    assert stat.S_ISSOCK(os.lstat("socket.svg").st_mode)


@pytest.mark.parametrize("flag", ["--markdown", "--plot"])
def test_bench_refuses_a_link_into_a_bundle(tmp_path, capsys, flag):
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    bundle = make_bundle(tmp_path / "tiny").path
    before = (bundle / "manifest.json").read_bytes()
    (tmp_path / "link.svg").symlink_to(bundle / "manifest.json")
    assert bench.main([str(bundle), *BRIEF, flag, str(tmp_path / "link.svg")]) == 2
    assert "inside the bundle" in capsys.readouterr().err
    assert (bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("name", ["$x^$", "a\tb", "x" * 200])
def test_bench_draws_bundles_of_any_name(tmp_path, name):
    """Also two of one name: each has a bar of its own."""
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    bundles = [make_bundle(tmp_path / place / name).path for place in ("first", "second")]
    target = tmp_path / "plot.svg"
    assert bench.main([*map(str, bundles), *BRIEF, "--plot", str(target)]) == 0
    assert target.read_text().count(" ms -->") == 2
