"""Runs commands of cmt-edge in forks of one process that has imported everything: seconds less for each.

It reads JSON objects from standard input, one a line: ``argv``, ``stdout``, ``stderr`` (paths). It answers
each with the exit code, or minus the number of the signal that ended the command. What takes seconds and
touches no file is shortened: the model is traced once, and latencies are measured on a few inferences.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import nncf  # noqa: F401  # imported here, so that no command imports it
import onnx
import onnxruntime  # noqa: F401
import openvino  # noqa: F401
import torch._dynamo  # noqa: F401
import torch._inductor.compiler_bisector  # noqa: F401
import torch.onnx  # noqa: F401

from cmt_edge.__main__ import main
from cmt_edge.deploy.cli import measuring
from cmt_edge.deploy.measure.benchmark import Protocol
from cmt_edge.deploy.tensorrt import build
from cmt_edge.export import pipeline, steps  # noqa: F401

KEPT = Path(sys.argv[1])
"""The folder of the traced models."""


@dataclass(frozen=True)
class Brief(Protocol):
    """The protocol without its second of warm-up, which no flag sets."""

    warmup_seconds: float = 0.0


def trace_once(model, img_size, opset, outputs, check):
    """As ``export_onnx``, from a file after the first time."""
    file = KEPT / f"{img_size}-{opset}-{'-'.join(outputs)}.onnx"
    if not file.exists():
        file.write_bytes(real(model, img_size, opset, outputs).SerializeToString())
    graph = onnx.load_from_string(file.read_bytes())
    check(graph)
    return graph


def run(argv: list[str], stdout: str, stderr: str) -> None:
    """Run one command in this process, and end it."""
    code = 99
    try:
        for number, path in ((1, stdout), (2, stderr)):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, number)
        code = main(argv)
    except SystemExit as exc:
        code = exc.code if isinstance(exc.code, int) else 2
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


real = steps.export_onnx
steps.export_onnx = trace_once
steps.EXPORT_PROTOCOL = Protocol(iters=3, seconds=0.0, warmup_seconds=0.0)
measuring.Protocol = Brief
build.POWER_SECONDS = 0.05
print("ready", flush=True)
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        run(**request)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
