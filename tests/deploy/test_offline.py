"""No command reaches for the network, and none leaves a file behind that nobody asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.faults import Faults, compiler
from helpers.images import encoded, plain
from helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        compiler() is None, reason="needs gcc on Linux, which builds the library that watches"
    ),
]

EXPORT = ("export", "-o", "out", "--quiet")
"""An export without its model and precision."""

NET = """
from torch import nn
def small():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    net.img_size = 32
    return net
"""
"""A model of the user's own that is traced and quantized in a moment."""


LOOK_UP = """
import contextlib, socket
with contextlib.suppress(OSError):
    socket.create_connection(("nowhere.invalid", 80))
"""
"""A program that uses the network."""


class Watched:
    """Runs commands in a folder, with a home and a temporary folder of their own."""

    def __init__(self, folder):
        self.folder = folder
        self.faults = Faults(folder, folder / "nowhere")
        self.faults.arm(None, ())
        self.private = [folder / name for name in ("home", "temporary")]
        for place in self.private:
            place.mkdir()

    def run(self, *command: str, **environment: str) -> None:
        """Run Python with ``command``; it must succeed."""
        unset = {"ORT_DISABLE_TELEMETRY", "NNCF_CI", "CI", "XDG_CACHE_HOME"}
        kept = {name: value for name, value in os.environ.items() if name not in unset}
        home, temporary = map(str, self.private)
        done = subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=kept
            | self.faults.environment
            | {"PYTHONPATH": str(ROOT / "src"), "HOME": home, "TMPDIR": temporary}
            | environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def left(self) -> list[str]:
        """Files and folders that lie in the home and among the temporary files."""
        return [str(path.relative_to(self.folder)) for place in self.private for path in place.rglob("*")]


@pytest.fixture
def watched(tmp_path):
    return Watched(tmp_path)


def test_the_watch_sees_what_the_runtime_does_unasked(watched):
    """Left alone, ONNX Runtime and NNCF leave files; and a program that looks a name up is noticed."""
    watched.run("-c", "import onnxruntime as ort; ort.get_available_providers()")
    assert any("onnxruntime" in name for name in watched.left())
    watched.run("-c", "import nncf")
    assert any("intel" in name for name in watched.left())
    watched.run("-c", LOOK_UP)
    assert watched.faults.network


def test_a_user_may_turn_telemetry_on(watched):
    code = "import os, cmt_edge; assert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    watched.run("-c", code, ORT_DISABLE_TELEMETRY="0")


def test_no_command_uses_the_network_or_leaves_files(watched):
    (watched.folder / "image.png").write_bytes(encoded(plain("red", (64, 64))))
    (watched.folder / "net.py").write_text(NET)
    registered, own = "out/cmt_nano_fp32_onnx", "out/net.py_small_int8_openvino"
    commands = [
        (*EXPORT, "--model", "cmt_nano", "--format", "onnx"),
        (
            *EXPORT,
            "--model",
            "net.py:small",
            "--precision",
            "int8",
            "--data",
            "generated",
            "--calib-size",
            "8",
        ),
        ("predict", registered, "image.png"),
        ("predict", own, "image.png"),
        ("verify", own, "--backend", "onnxruntime"),
        ("bench", own, "--seconds", "0.1", "--iters", "5"),
    ]
    cache = str(watched.folder / "cache")
    for command in commands:
        watched.run("-m", "cmt_edge", *command, CMT_EDGE_CACHE=cache)
        assert watched.left() == [], command
        assert watched.faults.network == 0, watched.faults.lines
