"""Shows where ONNX Runtime's answers depend on the number of threads: cmt-edge has no part in it.

    python scripts/compare_threads.py BUNDLE [--images N] [--threads N ...]

Bare ONNX Runtime opens the bundle's ``model.onnx`` with 1 thread and with others, once as it is and once with
``use_deterministic_compute``, and is asked about the same inputs. For each the script prints how many answers
differ in a bit from those of one thread, and for the first of them the first operation of the optimised graph
whose result differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import numpy as np
import onnx
import onnxruntime as ort

from cmt_edge.deploy import Bundle, Predictor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers.load import distinct_batches, distinct_images


def main() -> int:
    """Compare; returns 0."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("bundle", type=Path)
    p.add_argument("--images", type=int, default=128, help="inputs of each kind (default %(default)s)")
    p.add_argument("--threads", type=int, nargs="+", default=[2, 3, 4])
    args = p.parse_args()
    bundle = Bundle.open(args.bundle)
    graph = bundle.file("model.onnx")
    with Predictor.load(bundle, backend="onnxruntime", threads=1) as predictor:
        inputs = distinct_batches(args.images, predictor.spec.size)
        inputs += [predictor.prepare([image]) for image in distinct_images(args.images)]
    expected = answer(graph, inputs, 1)
    for threads in args.threads:
        for deterministic in (False, True):
            answers = answer(graph, inputs, threads, deterministic=deterministic)
            pairs = zip(answers, expected, strict=True)
            different = [i for i, (ours, others) in enumerate(pairs) if not np.array_equal(ours, others)]
            where = find_first_difference(graph, inputs[different[0]], threads) if different else ""
            how = "with" if deterministic else "without"
            print(
                f"{threads} threads, {how} use_deterministic_compute:"
                f" {len(different)} of {len(inputs)} answers differ from those of one thread{where}",
                flush=True,
            )
    return 0


def open_session(
    graph: Path, threads: int, optimised: Path | None = None, **more: bool
) -> ort.InferenceSession:
    """The graph in bare ONNX Runtime; ``optimised`` receives what it makes of the graph."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.use_deterministic_compute = more.get("deterministic", False)
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if more.get("as_it_is"):
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def answer(graph: Path, inputs: list[np.ndarray], threads: int, **more: bool) -> list[np.ndarray]:
    """The logits of each input."""
    session = open_session(graph, threads, **more)
    name = session.get_inputs()[0].name
    return [session.run(None, {name: batch})[0] for batch in inputs]


def find_first_difference(graph: Path, batch: np.ndarray, threads: int) -> str:
    """The first operation of the optimised graph whose result depends on the threads, in words."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "optimised.onnx"
        open_session(graph, 1, place)
        model = onnx.load(place)
        names = [name for node in model.graph.node for name in node.output if name]
        given = {output.name for output in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in given)
        onnx.save(model, place)
        results = []
        for count in (1, threads):
            session = open_session(place, count, as_it_is=True)
            results.append(session.run(names, {session.get_inputs()[0].name: batch}))
    made_by = {name: node for node in model.graph.node for name in node.output}
    for name, one, other in zip(names, *results, strict=True):
        if not np.array_equal(one, other):
            most = np.abs(np.subtract(one, other, dtype=np.float64)).max()
            return f"; first at {made_by[name].op_type} of {one.shape}, by {most:.1e}"
    return "; at no operation when each result is kept"


if __name__ == "__main__":
    sys.exit(main())
