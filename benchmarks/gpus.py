"""What runs on this machine's NVIDIA GPU: is it right, how fast, and how good was the estimate?

    pip install "cmt-edge[export,rtx]" "onnxruntime-gpu[cuda,cudnn]"
    python benchmarks/gpus.py [MODEL ...] [--runtimes rtx cuda torch] [--batch N] [--int8] [--json FILE]

Each model is exported as in ``rtx_compile.py``: as it is, with the rewrites for CPUs, with those for TensorRT
for RTX (ours), and with ``--int8`` ours in int8. Weights are random. What runs them:

* ``rtx``: an engine of TensorRT for RTX that is compiled for this GPU;
* ``cuda``: the CUDA provider of ONNX Runtime, in float32, too, and not in int8;
* ``torch``: PyTorch in float16, as it is and compiled (``torch.compile``, CUDA graphs).

Logits are compared with those of the float32 reference in ONNX Runtime on the CPU. Inferences are timed in
turn with those of the model's other rows.

"Host" is the time from a prepared array to logits in host memory, "GPU" that between two CUDA events around
the inference, where the runtime tells it. "Estimate" is what ``deploy/tensorrt/roofline.py`` says from the
data sheet of this GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from common import deviation, say, shorten_error, step
from rtx_compile import MODELS, PLAIN, Subject, TypedGraph, make_graphs
from torch import nn

from cmt_edge.cmt import fuse
from cmt_edge.cmt.spec import CPU
from cmt_edge.deploy.backends import LoadOptions
from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession
from cmt_edge.deploy.bundle import make_plain
from cmt_edge.deploy.bundle.sections import FLOAT32, EstimateEntry, KernelEntry, TensorEntry
from cmt_edge.deploy.errors import CmtEdgeError
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.report import format_table
from cmt_edge.deploy.tensorrt.bindings import RTX, open_bindings
from cmt_edge.deploy.tensorrt.building import PortableOptions, PortablePlan, build_portable_plan
from cmt_edge.deploy.tensorrt.compiled import describe_kernels
from cmt_edge.deploy.tensorrt.cuda import Cuda, open_cuda
from cmt_edge.deploy.tensorrt.kernels import read_kernels
from cmt_edge.deploy.tensorrt.roofline import GPUS, estimate_latency
from cmt_edge.deploy.tensorrt.session import TensorRTSession
from cmt_edge.export.to_onnx import INPUT, set_batch

RUNTIMES = ("rtx", "cuda", "torch")
"""What a GPU can run the models with."""
ROUNDS = 20
"""The number of turns that each graph gets."""
CALLS = 25
"""Timed inferences in a turn."""
SEED = 5
"""Of the images whose logits are compared."""


@dataclass
class Measured:
    """One graph of a model on this GPU.

    Attributes:
        model, graph: names.
        kernels: of the engine; empty for PyTorch.
        estimate: for this GPU, where its data sheet is in the table.
        build_s, open_s: seconds.
        difference: mean difference of logits from the float32 reference, in its standard deviations.
        gpu_ms, copies_ms, host_ms: of each inference.
        layers_ms: mean time of each layer by NVIDIA's profiler.
        notes: what the session says.
    """

    model: str
    graph: str
    kernels: tuple[KernelEntry, ...] = ()
    estimate: EstimateEntry | None = None
    build_s: float = 0.0
    open_s: float = 0.0
    difference: float = float("nan")
    gpu_ms: list[float] = field(default_factory=list)
    copies_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    layers_ms: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cells(self, base: Measured) -> list[str]:
        """The cells of the table; ``base`` is the first row of the model."""
        host = float(np.median(self.host_ms))
        gpu = float(np.median(self.gpu_ms)) if self.gpu_ms else None
        estimate = None if self.estimate is None or gpu is None else self.estimate.total_ms
        return [
            self.model,
            self.graph,
            str(len(self.kernels) or "-"),
            f"{host:.3f}",
            f"{float(np.median(base.host_ms)) / host:.2f}",
            "-" if gpu is None else f"{gpu:.3f}",
            "-" if estimate is None else f"{estimate:.3f}",
            "-" if estimate is None or gpu is None else f"{gpu / estimate:.2f}",
            f"{self.difference:.4f}",
        ]


HEADER = [
    "model",
    "graph",
    "kernels",
    "host, ms",
    "times as fast as the first",
    "GPU, ms",
    "estimate, ms",
    "GPU / estimate",
    "difference of logits",
]
"""Headings of :meth:`Measured.cells`."""


@dataclass
class Contender:
    """What is timed in turn with others.

    Attributes:
        result: where the figures go.
        run: float32 ``(N, 3, S, S)`` -> logits ``(N, classes)`` in host memory.
        time: the same batch, a number of calls -> milliseconds on the GPU, and with copies; none where the
            runtime does not tell.
    """

    result: Measured
    run: Callable[[np.ndarray], np.ndarray]
    time: Callable[[np.ndarray, int], tuple[Sequence[float], Sequence[float]]] = lambda images, count: (
        (),
        (),
    )


def compile_here(graph: TypedGraph, batch: int) -> PortablePlan:
    """The engine of ``graph`` for the GPU of this machine."""
    content = set_batch(graph.content, batch).SerializeToString(deterministic=True)
    size = graph.content.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    source = TensorEntry(name=INPUT, shape=(batch, 3, size, size), dtype=FLOAT32)
    with tempfile.TemporaryDirectory(prefix="cmt-edge-") as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(content)
        options = PortableOptions(("CURRENT",), aux_streams=graph.streams)
        digest = hashlib.sha256(content).hexdigest()
        return build_portable_plan(path, digest, source, options, progress=Progress(quiet=True))


@contextmanager
def open_engine(graph: TypedGraph, plan: PortablePlan, cuda: Cuda, batch: np.ndarray) -> Iterator[Contender]:
    """A session over an engine."""
    start = time.perf_counter()
    session = TensorRTSession(open_bindings(RTX), plan.plan, cuda)
    session.run(batch)
    kernels = read_kernels(plan.layers)
    known = [gpu for gpu in GPUS if f" {session.device}".endswith(f" {gpu.name}")]
    result = Measured(
        graph.model,
        f"{graph.label}, {session.runtime}",
        describe_kernels([kernel for kernel in kernels if not kernel.is_sync], {}),
        estimate_latency(kernels, known[0]) if known else None,
        plan.seconds,
        time.perf_counter() - start,
    )

    def measure(images: np.ndarray, count: int) -> tuple[Sequence[float], Sequence[float]]:
        times = session.device_times(images, count)
        return times.compute.tolist(), times.with_copies.tolist()

    try:
        yield Contender(result, lambda images: session.run(images)[0], measure)
        layers = session.time_layers(batch)
        result.layers_ms = {name: total / 10 for name, total in layers.items()}
        result.notes = list(session.notes)
    finally:
        session.close()


def open_torch(name: str, classifier: nn.Module, compiled: bool) -> Contender:
    """The reference model in float16 on the GPU, as it is or compiled."""
    model = classifier.eval().half().cuda()
    label = "PyTorch compiled, fp16" if compiled else "PyTorch, fp16"
    forward: Any = torch.compile(model, mode="reduce-overhead") if compiled else model

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return forward(torch.from_numpy(images).cuda().half()).float().cpu().numpy()

    def measure(images: np.ndarray, count: int) -> tuple[Sequence[float], Sequence[float]]:
        source = torch.from_numpy(images).cuda().half()
        times = []
        with torch.inference_mode():
            for _ in range(count):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                forward(source)
                end.record()
                end.synchronize()
                times.append(begin.elapsed_time(end))
        return times, times

    return Contender(Measured(name, label), run, measure)


@contextmanager
def open_cuda_provider(graph: TypedGraph, batch: int) -> Iterator[Contender]:
    """The CUDA provider of ONNX Runtime over a graph."""
    content = set_batch(graph.content, batch).SerializeToString(deterministic=True)
    start = time.perf_counter()
    session = OnnxRuntimeSession(content, LoadOptions(device="cuda"), graph.label.rpartition(" ")[2])
    result = Measured(graph.model, f"{graph.label}, {session.runtime}", open_s=time.perf_counter() - start)
    try:
        yield Contender(result, lambda images: session.run(images)[0])
    finally:
        session.close()


@dataclass(frozen=True)
class Plan:
    """What the command line asks for.

    Attributes:
        runtimes: some of :data:`RUNTIMES`.
        batch: images of an inference.
        int8: whether int8 is measured.
    """

    runtimes: tuple[str, ...]
    batch: int
    int8: bool


@dataclass(frozen=True)
class Prepared:
    """A model's graphs, and what they have to answer.

    Attributes:
        model: its name.
        graphs: with the type of every tensor, and where TensorRT for RTX is measured, the engine for this
            machine's GPU.
        images: float32 ``(N, 3, S, S)``.
        logits: of the float32 reference in ONNX Runtime on the CPU, ``(N, classes)``.
    """

    model: str
    graphs: tuple[tuple[TypedGraph, PortablePlan | None], ...]
    images: np.ndarray
    logits: np.ndarray


def prepare(name: str, plan: Plan) -> Prepared:
    """Export and compile a model; this takes minutes."""
    subject = Subject.load(name)
    size = subject.config.img_size
    images = np.random.default_rng(SEED).normal(size=(plan.batch, 3, size, size)).astype(np.float32)
    plain = subject.trace(subject.reference.classifier)
    session = onnxruntime.InferenceSession(plain.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = np.concatenate([np.asarray(session.run(None, {INPUT: image[None]})[0]) for image in images])
    graphs = list(make_graphs(subject, plan.int8))
    if "cuda" in plan.runtimes:
        ours = subject.trace(fuse(subject.reference.classifier, target=CPU))
        graphs = [
            subject.type(PLAIN, plain, "fp32"),
            subject.type("rewrites for CPUs", ours, "fp32"),
            *graphs,
        ]
    compiles = "rtx" in plan.runtimes
    engines = tuple((graph, attempt(graph, plan.batch) if compiles else None) for graph in graphs)
    return Prepared(name, engines, images, logits)


def attempt(graph: TypedGraph, batch: int) -> PortablePlan | None:
    """The engine, or ``None`` where the compiler refuses the graph; why is told."""
    try:
        return compile_here(graph, batch)
    except CmtEdgeError as exc:
        say(f"{graph.model}, {graph.label}: {shorten_error(exc)}")
        return None


def prepare_all(names: Sequence[str], plan: Plan, jobs: int) -> list[Prepared]:
    """Export and compile the models, ``jobs`` of them at a time, each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with step("export and compile"), ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(prepare, names, [plan] * len(names)))


def take_turns(contenders: Sequence[Contender], images: np.ndarray) -> None:
    """Time all, one turn each a round, the order reversed in every other round."""
    for contender in contenders:
        contender.time(images, CALLS)
    for turn in range(ROUNDS):
        for contender in contenders[:: 1 if turn % 2 else -1]:
            gpu, copies = contender.time(images, CALLS)
            contender.result.gpu_ms += gpu
            contender.result.copies_ms += copies
            for _ in range(CALLS):
                start = time.perf_counter()
                contender.run(images)
                contender.result.host_ms.append(1e3 * (time.perf_counter() - start))


def measure_model(prepared: Prepared, cuda: Cuda, plan: Plan) -> list[Measured]:
    """The rows of one model."""
    images = prepared.images
    with ExitStack() as stack:
        contenders = list(_open_all(prepared, cuda, plan, stack))
        for contender in contenders:
            contender.result.difference = deviation(contender.run(images), prepared.logits)
        take_turns(contenders, images)
    return [contender.result for contender in contenders]


def _open_all(prepared: Prepared, cuda: Cuda, plan: Plan, stack: ExitStack) -> Iterator[Contender]:
    """Everything that this GPU takes; what it refuses, and why, is told."""
    for graph, engine in prepared.graphs:
        try:
            if engine is not None:
                yield stack.enter_context(open_engine(graph, engine, cuda, prepared.images))
            if "cuda" in plan.runtimes and not graph.label.endswith("int8"):
                yield stack.enter_context(open_cuda_provider(graph, len(prepared.images)))
        except CmtEdgeError as exc:
            say(f"{graph.model}, {graph.label}: {shorten_error(exc)}")
    if "torch" in plan.runtimes:
        classifier = Subject.load(prepared.model).reference.classifier
        for compiled in (False, True):
            yield open_torch(prepared.model, classifier, compiled)


def describe_gpu(cuda: Cuda) -> str:
    """The line under the table."""
    gpu = cuda.gpu(0)
    return (
        f"{gpu.name}, compute capability {gpu.sm}, driver of CUDA {cuda.driver_version()};"
        f" medians of {ROUNDS * CALLS} inferences in {ROUNDS} turns."
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", default=MODELS)
    parser.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images of an inference (default 1)"
    )
    parser.add_argument("--int8", action="store_true", help="also measure int8")
    parser.add_argument(
        "--runtimes", nargs="+", choices=RUNTIMES, default=("rtx",), help="what is measured (default rtx)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="models exported at a time (default 1)"
    )
    parser.add_argument("--json", type=Path, help="write every figure there")
    args = parser.parse_args(argv)
    plan = Plan(tuple(args.runtimes), args.batch, args.int8)
    cuda = open_cuda()
    say(describe_gpu(cuda))
    rows: list[Measured] = []
    for prepared in prepare_all(args.models, plan, args.jobs):
        with step(prepared.model):
            rows += measure_model(prepared, cuda, plan)
        if args.json:
            args.json.write_text(json.dumps([make_plain(row) for row in rows]) + "\n")
    bases = {row.model: row for row in reversed(rows)}
    print(format_table(HEADER, [row.cells(bases[row.model]) for row in rows], markdown=True))
    print(f"\n({describe_gpu(cuda)} Batch {args.batch}.)")


if __name__ == "__main__":
    main()
