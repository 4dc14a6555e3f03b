"""Speed as users feel it.

    python benchmarks/felt.py --what cold BUNDLE IMAGE [--rounds 10] [--before SRC]
    python benchmarks/felt.py --what graph MODEL.onnx [--rounds 10]
    python benchmarks/felt.py --what sizes MODEL ... [--precision fp32 int8]

``cold``: from the start of a process that runs ``cmt-predict`` on one image to its label. In every round a
process without the cache, one that fills an empty cache, and one that finds it filled, so that a busy machine
disturbs all alike. ``--before`` adds a row for another checkout: its folder ``src``.

``graph``: what ONNX Runtime would gain from keeping the graph that it has optimised: from the start of a
process to the first answer with the file as it is, and with the optimised one.

``sizes``: the bundles of models (random weights) for OpenVINO beside the weights in their precision, and how
large they would be with OpenVINO's own format of the graph beside ``model.onnx``, as they once were.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import onnx
import openvino

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.backends.openvino_graph import read
from cmt_edge.deploy.report import format_table

PREDICT = "from cmt_edge.startup import predict; raise SystemExit(predict())"
"""The program of ``cmt-predict``."""

RUN_GRAPH = """
import sys
import numpy as np
import onnxruntime as ort
source, level, target = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 3
options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
if target:
    options.optimized_model_filepath = target
session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
first = session.get_inputs()[0]
answer = session.run(None, {first.name: np.zeros(first.shape, np.float32)})
print(answer[0].argmax(), flush=True)
"""
"""Opens an ONNX file in ONNX Runtime and runs it once: source, level of optimisation, where the optimised
graph goes."""


@dataclass
class Spent:
    """Seconds of each start: to the first line of its answer by the clock, and to its end on all processors
    together."""

    answer: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def run_process(command: list[str], environment: dict[str, str], spent: Spent | None = None) -> None:
    """Run a process that prints an answer to its end, and note in ``spent`` what it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None, "it was asked for"
        line = process.stdout.readline()
        seconds = time.perf_counter() - start
    if process.returncode or not line:
        raise SystemExit(f"{' '.join(command)} failed")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if spent is not None:
        spent.answer.append(seconds)
        spent.cpu.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)


def take_rounds(rounds: int, ways: dict[str, Callable[[Spent | None], None]]) -> dict[str, Spent]:
    """Time the ``ways`` in turn, after one round that does not count."""
    spent = {name: Spent() for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            way(spent[name] if number else None)
    return spent


def format_spent(spent: dict[str, Spent]) -> str:
    """The medians, and their ratios to the first row."""
    base = next(iter(spent.values()))
    rows = [
        [
            name,
            f"{median(taken.answer):.2f}",
            f"{median(taken.answer) / median(base.answer):.2f}",
            f"{median(taken.cpu):.2f}",
            f"{median(taken.cpu) / median(base.cpu):.2f}",
        ]
        for name, taken in spent.items()
    ]
    header = ["start", "to the answer s", "ratio", "processor s", "ratio"]
    return format_table(header, rows, markdown=True)


def measure_cold_start(bundle: Path, image: Path, rounds: int, before: Path | None, extra: list[str]) -> str:
    """The table of ``--what cold``."""
    with tempfile.TemporaryDirectory() as folder:
        own = os.environ | {"CMT_EDGE_STATE": f"{folder}/state", "CMT_EDGE_CACHE": f"{folder}/cache"}
        command = [sys.executable, "-c", PREDICT, str(bundle), str(image), *extra]

        def start_old(spent: Spent | None) -> None:
            run_process(command, own | {"PYTHONPATH": str(before)}, spent)

        def start_without_cache(spent: Spent | None) -> None:
            run_process([*command, "--no-cache"], own, spent)

        def start_first(spent: Spent | None) -> None:
            shutil.rmtree(f"{folder}/cache", ignore_errors=True)
            run_process(command, own, spent)

        def start_second(spent: Spent | None) -> None:
            run_process(command, own, spent)

        ways = {"before": start_old} if before else {}
        ways |= {"without cache": start_without_cache, "first": start_first, "second": start_second}
        return format_spent(take_rounds(rounds, ways))


def measure_kept_graph(model: Path, rounds: int) -> str:
    """The table of ``--what graph``."""
    with tempfile.TemporaryDirectory() as folder:
        kept = f"{folder}/optimised.onnx"
        program = [sys.executable, "-c", RUN_GRAPH]
        environment = dict(os.environ)
        run_process([*program, str(model), "ORT_ENABLE_ALL", kept], environment)

        def start_plain(spent: Spent | None) -> None:
            run_process([*program, str(model), "ORT_ENABLE_ALL", ""], environment, spent)

        def start_kept(spent: Spent | None) -> None:
            run_process([*program, kept, "ORT_DISABLE_ALL", ""], environment, spent)

        return format_spent(take_rounds(rounds, {"as it is": start_plain, "optimised": start_kept}))


def measure_sizes(models: list[str], precisions: list[str]) -> str:
    """The table of ``--what sizes``, in MB."""
    from cmt_edge.export import ExportConfig, run

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in models:
            for precision in precisions:
                config = ExportConfig(model, precision=precision, weights="random")
                if precision == "int8":
                    config = replace(config, data="generated", calib_size=16)
                bundle = run(replace(config, output=folder, atol=1e9))
                rows.append([model, precision, *compare_sizes(bundle)])
                print(rows[-1], file=sys.stderr, flush=True)
                shutil.rmtree(bundle.path)
    header = ["model", "precision", "weights", "golden vectors", "bundle", "without them, of weights", "once"]
    return format_table(header, rows, markdown=True)


def compare_sizes(bundle: Bundle) -> list[str]:
    """Sizes of the weights in their precision, of the golden vectors and of the bundle, and what it would
    have with OpenVINO's own format."""
    graph = onnx.load(bundle.file("model.onnx")).graph
    weights = sum(len(tensor.raw_data) for tensor in graph.initializer)
    golden = bundle.manifest.files["golden.npz"].size
    whole = bundle.manifest.size_bytes
    with tempfile.TemporaryDirectory() as folder:
        openvino.save_model(read(bundle.file("model.onnx")), Path(folder) / "g.xml", compress_to_fp16=False)
        own = sum(path.stat().st_size for path in Path(folder).iterdir())
    share = (whole - golden) / weights
    return [
        *(f"{size / 1e6:.2f}" for size in (weights, golden, whole)),
        f"{share:.2f}",
        f"{(whole + own) / 1e6:.2f}",
    ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--what", choices=["cold", "graph", "sizes"], required=True)
    p.add_argument("paths", nargs="+", metavar="PATH_OR_MODEL")
    p.add_argument("--precision", nargs="+", default=["fp32", "int8"])
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--before", type=Path, help="folder 'src' of another checkout")
    p.add_argument("--threads", default="2")
    args = p.parse_args()
    if len(args.paths) != {"cold": 2, "graph": 1}.get(args.what, len(args.paths)):
        p.error("cold takes a bundle and an image, graph takes an ONNX file")
    paths = list(map(Path, args.paths))
    if args.what == "cold":
        extra = ["--threads", args.threads]
        print(measure_cold_start(*paths, args.rounds, args.before, extra))
    elif args.what == "graph":
        print(measure_kept_graph(paths[0], args.rounds))
    else:
        print(measure_sizes(args.paths, args.precision))


if __name__ == "__main__":
    main()
