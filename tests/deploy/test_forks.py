"""A Predictor in a forked child, and in threads that are busy when the process ends."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork"),
]

SECONDS = 120
"""A process that takes longer hangs."""

START = """
import os, sys, threading, time
import numpy as np
from cmt_edge import Predictor
from cmt_edge.deploy.errors import InputError
path, backend = sys.argv[1:]
image = np.zeros((64, 64, 3), np.uint8)
predictor = Predictor.load(path, backend=backend)
predictor(image)
"""
"""Opens a bundle and predicts once."""

IN_CHILD = {
    "close": ("predictor.close(); os._exit(7)", 7),
    "exit": ("sys.exit(7)", 7),
    "use": (
        """
try:
    predictor(image)
except InputError as exc:
    assert "before the process was forked" in str(exc) and exc.remedy
    os._exit(7)
""",
        7,
    ),
    "load": (
        """
with Predictor.load(path, backend=backend) as own:
    own(image)
os._exit(7)
""",
        7,
    ),
}
"""What a forked child does -> its code, and the exit code that it must end with."""

BUSY = """
def work():
    try:
        while True:
            predictor(image)
    except InputError as exc:
        print("thread:", exc.what, flush=True)

threads = [threading.Thread(target=work, daemon=True) for _ in range(3)]
for thread in threads:
    thread.start()
time.sleep(0.3)
"""
"""Threads that predict without end."""


def run(code: str, bundle, backend: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", START + code, str(bundle.path), backend],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_a_forked_child_neither_hangs_nor_uses_what_its_parent_loaded(onnx_bundle, backend):
    code = ""
    for what, (child, expected) in IN_CHILD.items():
        indented = "\n".join(f"    {line}" for line in child.splitlines())
        code += f"""
print({what!r}, flush=True)
child = os.fork()
if child == 0:
{indented}
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == {expected}, {what!r}
"""
    code += "predictor(image); predictor.close()\n"  # the parent is not touched
    done = run(code, onnx_bundle, backend)
    assert done.returncode == 0, (done.stdout, done.stderr)


@pytest.mark.parametrize("end", ["", "predictor.close()"])
@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_threads_that_predict_do_not_abort_the_process_at_its_end(onnx_bundle, backend, end):
    done = run(BUSY + end, onnx_bundle, backend)
    assert done.returncode == 0, done.stderr
    assert "terminate called" not in done.stderr
    assert "closed" in done.stdout or "ending" in done.stdout or not end  # the last lines may be cut off
