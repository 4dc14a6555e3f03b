"""Speed as users feel it.

    python benchmarks/felt.py --what cold BUNDLE IMAGE [--rounds 10] [--before SRC]
    python benchmarks/felt.py --what graph MODEL.onnx [--rounds 10]
    python benchmarks/felt.py --what form BUNDLE [--rounds 10]
    python benchmarks/felt.py --what sizes MODEL ... [--precision fp32 int8]
    python benchmarks/felt.py --what stream BUNDLE FOLDER [--rounds 10] [--seconds 4]
    python benchmarks/felt.py --what folder BUNDLE FOLDER [--rounds 10] [--links 10000]
    python benchmarks/felt.py --what service BUNDLE FOLDER [--rounds 10] [--seconds 4]

``cold``: from the start of a process that runs ``cmt-predict`` on one image to its label. In every round a
process without the cache, one that fills an empty cache, and one that finds it filled, so that a busy machine
disturbs all alike. ``--before`` adds a row for another checkout: its folder ``src``.

``graph``: what ONNX Runtime would gain from keeping the graph that it has optimised: from the start of a
process to the first answer with the file as it is, and with the optimised one.

``form``: the first start of a bundle for OpenVINO, from the start of a bare process to the first answer:
``model.onnx`` is read and rewritten, the same graph is read in OpenVINO's own format, or the compiled model
is opened that is kept for later starts.

``sizes``: the bundles of models (random weights) for OpenVINO beside the weights in their precision, and how
large they would be with OpenVINO's own format of the graph beside ``model.onnx``, as they once were; and
what ``--slim`` and ``--pack`` make of them.

``stream``: the images of a folder enlarged to 1920 x 1080 as JPEG files, through ``Predictor.stream()``,
beside the model alone, decoding alone, and a loop by hand (``by_hand.py``).

``folder``: ``cmt-predict`` over a folder of very many files (hard links to the images of a folder), its
memory, and its time beside the loop by hand.

``service``: latencies of several clients that share one ``Predictor``, beside OpenVINO by hand.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median

import onnx
import openvino
from common import make_environment
from felt_service import measure_service
from felt_streams import LINKS, PREDICT, measure_folder, measure_stream

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.backends.openvino_graph import read
from cmt_edge.deploy.bundle import BundleWriter
from cmt_edge.deploy.bundle.slim import choose_golden, leave_out
from cmt_edge.deploy.report import format_table

WITH_IMAGES = {"stream": measure_stream, "folder": measure_folder, "service": measure_service}
"""What is measured with a bundle and a folder of images -> what makes its table."""

RUN_GRAPH = """
import hashlib
import sys
import numpy as np
import onnxruntime as ort
source, level, target, is_kept = sys.argv[1:]
options = ort.SessionOptions()
options.log_severity_level = 3
options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
if target:
    options.optimized_model_filepath = target
if is_kept:
    with open(source, "rb") as file:
        source = file.read()
    hashlib.sha256(source).digest()
session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
first = session.get_inputs()[0]
answer = session.run(None, {first.name: np.zeros(first.shape, np.float32)})
print(answer[0].argmax(), flush=True)
"""
"""Opens an ONNX file in ONNX Runtime and runs it once: source, level of optimisation, where the optimised
graph goes, and whether the file is read and hashed first, as what a cache keeps is."""


RUN_FORM = """
import sys
import numpy as np
import openvino as ov
source, form = sys.argv[1:]
core = ov.Core()
config = {"INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
if form == "compiled":
    with open(source, "rb") as file:
        compiled = core.import_model(file.read(), "CPU", config)
else:
    if form == "onnx":
        from pathlib import Path
        from cmt_edge.deploy.backends.openvino_graph import read
        model = read(Path(source))
    else:
        model = core.read_model(source)
    compiled = core.compile_model(model, "CPU", config)
answer = compiled(np.zeros(list(compiled.input(0).shape), np.float32))
print(answer[0].argmax(), flush=True)
"""
"""Opens a graph in OpenVINO and runs it once: file, and whether it is ``onnx``, ``ir`` or ``compiled``."""


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
        own = make_environment(CMT_EDGE_STATE=f"{folder}/state", CMT_EDGE_CACHE=f"{folder}/cache")
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
        environment = make_environment()
        run_process([*program, str(model), "ORT_ENABLE_ALL", kept, ""], environment)

        def start_plain(spent: Spent | None) -> None:
            run_process([*program, str(model), "ORT_ENABLE_ALL", "", ""], environment, spent)

        def start_kept(spent: Spent | None) -> None:
            run_process([*program, kept, "ORT_DISABLE_ALL", "", "kept"], environment, spent)

        return format_spent(take_rounds(rounds, {"as it is": start_plain, "kept": start_kept}))


def measure_forms(bundle: Path, rounds: int) -> str:
    """The table of ``--what form``."""
    source = Bundle.open(bundle).file("model.onnx")
    with tempfile.TemporaryDirectory() as folder:
        own, kept = f"{folder}/model.xml", f"{folder}/compiled"
        graph = read(source)
        openvino.save_model(graph, own, compress_to_fp16=False)
        config = {"INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
        Path(kept).write_bytes(openvino.Core().compile_model(graph, "CPU", config).export_model().getvalue())
        files = {"model.onnx": (source, "onnx"), "OpenVINO's own format": (own, "ir")}
        files["the compiled model"] = (kept, "compiled")

        def start(file: str, form: str, spent: Spent | None) -> None:
            run_process([sys.executable, "-c", RUN_FORM, file, form], make_environment(), spent)

        ways = {name: partial(start, str(file), form) for name, (file, form) in files.items()}
        return format_spent(take_rounds(rounds, ways))


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
                rows.append([model, precision, *compare_sizes(bundle, Path(folder))])
                print(rows[-1], file=sys.stderr, flush=True)
                shutil.rmtree(bundle.path)
    header = ["model", "precision", "weights", "golden vectors", "bundle", "packed", "of weights"]
    header += ["slim", "its golden vectors", "packed", "of weights", "once"]
    return format_table(header, rows, markdown=True)


def compare_sizes(bundle: Bundle, folder: Path) -> list[str]:
    """Sizes of the weights in their precision, and of the bundle as it is, slim, and with OpenVINO's own
    format; "of weights" is without the golden vectors."""
    graph = onnx.load(bundle.file("model.onnx")).graph
    weights = sum(len(tensor.raw_data) for tensor in graph.initializer)
    golden, whole, packed = weigh(bundle)
    lean = make_slim(bundle, folder / "slim")
    own_golden, own_whole, own_packed = weigh(lean)
    shutil.rmtree(lean.path)
    with tempfile.TemporaryDirectory() as made:
        openvino.save_model(read(bundle.file("model.onnx")), Path(made) / "g.xml", compress_to_fp16=False)
        own = sum(path.stat().st_size for path in Path(made).iterdir())
    return [
        *(f"{size / 1e6:.2f}" for size in (weights, golden, whole, packed)),
        f"{(whole - golden) / weights:.3f}",
        *(f"{size / 1e6:.2f}" for size in (own_whole, own_golden, own_packed)),
        f"{(own_whole - own_golden) / weights:.3f}",
        f"{(whole + own) / 1e6:.2f}",
    ]


def weigh(bundle: Bundle) -> tuple[int, int, int]:
    """Bytes of the golden vectors, of the folder with its manifest, and of the packed file."""
    whole = sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "packed.cmt.zip"
        bundle.pack(file)
        return bundle.manifest.files["golden.npz"].size, whole, file.stat().st_size


def make_slim(bundle: Bundle, target: Path) -> Bundle:
    """What ``--slim`` makes of the bundle, unverified."""
    golden = bundle.golden()
    kept = choose_golden(golden)
    with BundleWriter(target) as writer:
        for name in bundle.manifest.files:
            shutil.copy(bundle.file(name), writer.folder)
        kept.save(writer.folder / "golden.npz")
        staged = writer.staged(bundle.manifest)
        return writer.commit(leave_out(staged, len(golden.sources) - len(kept.sources)))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--what", choices=["cold", "form", "graph", "sizes", *WITH_IMAGES], required=True)
    p.add_argument("paths", nargs="+", metavar="PATH_OR_MODEL")
    p.add_argument("--precision", nargs="+", default=["fp32", "int8"])
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--before", type=Path, help="folder 'src' of another checkout")
    p.add_argument("--threads", default="2")
    p.add_argument("--seconds", type=float, default=4.0, help="how long a turn of a stream or service lasts")
    p.add_argument("--links", type=int, default=LINKS, help="number of files in the folder")
    args = p.parse_args()
    if len(args.paths) != {"form": 1, "graph": 1, "sizes": len(args.paths)}.get(args.what, 2):
        taken = {"form": "a bundle", "graph": "an ONNX file"}.get(args.what, "a bundle and images")
        p.error(f"{args.what} takes {taken}")
    paths = list(map(Path, args.paths))
    if args.what == "cold":
        extra = ["--threads", args.threads]
        print(measure_cold_start(*paths, args.rounds, args.before, extra))
    elif args.what == "form":
        print(measure_forms(paths[0], args.rounds))
    elif args.what == "graph":
        print(measure_kept_graph(paths[0], args.rounds))
    elif args.what in WITH_IMAGES:
        more = args.links if args.what == "folder" else args.seconds
        print(WITH_IMAGES[args.what](*paths, args.rounds, int(args.threads), more))
    else:
        print(measure_sizes(args.paths, args.precision))


if __name__ == "__main__":
    main()
