"""Drive the build and run code of ``deploy`` through NVIDIA's real Python bindings over a backend that
computes nothing.

``scripts/check_tensorrt_bindings.sh`` runs this once for each supported version. The bindings check every
name, argument type and overload; what they return is meaningless (every name is "DCBA", every shape empty),
so the places that read such a value are replaced, and so is copying the bytes of a plan. CUDA is the fake of
``tests/fakes``.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NAME = "DCBA"
PARSER_ERROR = ("code", "desc", "file", "func", "line", "node", "node_name", "node_operator")


def build(folder: Path) -> None:
    """A static and a dynamic engine, with and without a timing cache and TF32."""
    from cmt_edge.deploy.tensorrt import builder as engine_builder
    from cmt_edge.deploy.tensorrt.bindings import TENSORRT, make_monitor, open_bindings
    from cmt_edge.deploy.tensorrt.engine import BuildRequest

    bindings = open_bindings(TENSORRT)
    engine_builder.read_blob = lambda memory: b"plan"
    (folder / "model.onnx").write_bytes(b"onnx")
    for tf32, profile in ((False, None), (True, (1, 2, 8))):
        digest = hashlib.sha256(b"onnx").hexdigest()
        request = BuildRequest(
            format="trt",
            onnx=str(folder / "model.onnx"),
            sha256=digest,
            plan=str(folder / "plan"),
            layers=None,
            timing_folder=str(folder / "timing"),
            timing_key="timings",
            input=NAME,
            shape=(1, 3, 64, 64),
            workspace=1 << 30,
            level=3,
            tf32=tf32,
            profile=profile,
            device=0,
            compute=(),
            aux_streams=0 if tf32 else None,
            memory=None,
        )
        seen: list[str] = []
        engine_builder.build_engine(request, lambda phase, share, seen=seen: seen.append(phase), bindings)
        assert (folder / "plan").read_bytes() == b"plan"
    monitor = make_monitor(bindings.trt, lambda phase, share: None)
    monitor.phase_start("phase", None, 2)
    assert monitor.step_complete("phase", 0) is True
    monitor.phase_finish("phase")


def run() -> None:
    """Open, run with a CUDA graph and without, time, profile and inspect."""
    from cmt_edge.deploy.errors import StepError
    from cmt_edge.deploy.tensorrt import session as backend
    from cmt_edge.deploy.tensorrt.bindings import TENSORRT, make_layer_times, open_bindings
    from cmt_edge.deploy.tensorrt.cuda import open_cuda

    bindings = open_bindings(TENSORRT)
    backend.TensorRTSession._find_largest_batch = lambda self: 8
    require(
        StepError, "not one float32 input", lambda: backend.TensorRTSession(bindings, b"plan", open_cuda())
    )
    backend.TensorRTSession._find_names = lambda self, expected: (NAME, [NAME, NAME])
    batch = np.zeros((2, 3, 64, 64), np.float32)
    for graphs in (True, False):
        session = backend.TensorRTSession(bindings, b"plan", open_cuda(), graphs=graphs)
        session.run(batch)
        times = session.device_times(batch, 3)
        assert times.compute.shape == (3,)
        assert isinstance(session.inspect(), str)
        require(StepError, "inspection", lambda session=session: session.executed(batch, 2))
    session._engine.get_tensor_profile_shape(NAME, 0)
    profiler = make_layer_times(bindings.trt)
    profiler.report_layer_time("layer", 0.5)
    bindings.words.clear()
    for severity in ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"):
        bindings.log.log(getattr(bindings.trt.Logger.Severity, severity), severity)
    assert (len(bindings.words.errors), len(bindings.words.warnings)) == (2, 1)


def require(kind: type[Exception], word: str, call: Callable[[], object]) -> None:
    """``call`` must end in this error: so far the real bindings led it."""
    try:
        call()
    except kind as exc:
        if word in str(exc):
            return
        raise
    raise AssertionError(f"no {kind.__name__} about {word}")


def main() -> int:
    """1 where a step fails; ends the process at once, because destroying objects of the null backend is
    undefined."""
    sys.path[:0] = [str(ROOT)]
    sys.path.append(str(ROOT / "tests" / "fakes"))  # after the real bindings: only its `cuda` is wanted
    os.environ["CMT_EDGE_CACHE"] = os.environ["CMT_EDGE_STATE"] = tempfile.mkdtemp()
    found = PathFinder.find_spec("tensorrt")
    if found is None or "fakes" in str(found.origin):
        print(
            "error: the real bindings are not on the path; run scripts/check_tensorrt_bindings.sh",
            file=sys.stderr,
        )
        return 3
    import tensorrt as trt

    missing = [name for name in PARSER_ERROR if not hasattr(trt.ParserError, name)]
    if missing:
        print(f"ParserError lacks {', '.join(missing)}", file=sys.stderr)
        return 1
    try:
        with tempfile.TemporaryDirectory() as folder:
            build(Path(folder))
        run()
    except BaseException:
        traceback.print_exc()
        return 1
    print(f"tensorrt {trt.__version__}: build and run code accepted")
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
