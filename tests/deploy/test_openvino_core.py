"""One Core of OpenVINO a process: several, ended one after the other, leave no stack for signal handlers."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("openvino")

from cmt_edge.deploy.backends.openvino_core import open_core

SEVERAL = """
import gc, os, signal, sys, time
from pathlib import Path
from cmt_edge.deploy import Predictor

first = Predictor.load(sys.argv[1], backend="openvino", cache=False)
second = Predictor.load(sys.argv[1], backend="openvino", cache=False)
for predictor in (first, second):
    predictor.close()
del first, second, predictor
gc.collect()
taken = [bytearray(1 << size) for size in range(8, 20) for _ in range(20)]
signal.signal(signal.SIGTERM, lambda number, frame: print("handled", flush=True))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.1)
print("alive")
"""
"""Loads two Predictors, ends them in this order, and gets a signal."""


@pytest.mark.skipif(sys.platform != "linux", reason="stacks for signal handlers are looked at on Linux")
def test_a_signal_after_several_predictors_is_handled(fp32_bundle):
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, fp32_bundle.path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["handled", "alive"]), done.stderr


def test_there_is_one_core():
    assert open_core() is open_core()
