"""The optional rows of ``peers.py``: tools with environments of their own, and OpenVINO's PyTorch frontend.

Each follows its tool's own documentation: the recipes for static int8 with one scale a channel of weights.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from peers_environments import CHILD
from peers_rows import (
    IR,
    OPENVINO_FILES,
    WEIGHTS,
    Job,
    Row,
    collect_calibration,
    load_openvino,
    load_weights,
    make_reference,
    make_weights,
)

from cmt_edge.deploy.backends import ExecutedPrecision, Session

if TYPE_CHECKING:
    import torch
    from torch import nn

PTE, TFLITE, PROGRAM = "model.pte", "model.tflite", "model.pt2"
"""Names of the files that ExecuTorch, LiteRT and PT2E make."""

NCNN_FILES = ("model.ncnn.param", "model.ncnn.bin")
"""What ncnn reads: the graph and the weights."""

EXPORTED_IMAGES = 16
"""The number of calibration images, the first ones, that PT2E's observers see. They make a histogram of every
tensor on every image, in Python."""


class CallSession(Session):
    """A tool's own call, which takes one image and gives its logits."""

    device = "CPU"

    def __init__(self, call: Callable[[np.ndarray], np.ndarray], runtime: str) -> None:
        self._call, self.runtime = call, runtime

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        return [self._call(batch)]

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        return ExecutedPrecision({}, {}, source="not told")


def make_model(job: Job, rewritten: bool) -> nn.Module:
    """The reference, or our rewritten graph of it (``cmt_edge.cmt.fuse``)."""
    from cmt_edge.cmt import fuse

    model = make_reference(job.model).eval()
    return fuse(model) if rewritten else model


def give_example(job: Job) -> tuple[torch.Tensor]:
    """One image, ``(1, 3, S, S)``, as the arguments of the model."""
    import torch

    return (torch.from_numpy(job.images()[:1]),)


# --- PT2E: PyTorch's quantization of exported programs --------------------------------------------


def quantize_exported(job: Job, model: nn.Module, quantizer: Any) -> nn.Module:
    """Calibrate and convert with ``quantizer``, as PyTorch's documentation of PT2E says."""
    import torch
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = give_example(job)
    prepared = prepare_pt2e(torch.export.export(model, example).module(), quantizer)
    with torch.no_grad():
        for batch in job.calibration()[:EXPORTED_IMAGES]:
            prepared(torch.from_numpy(batch[None]))
    converted: nn.Module = convert_pt2e(prepared)
    return converted


def make_pt2e(job: Job, folder: Path) -> None:
    """Int8 for inductor on x86; the weights are kept in the program, which is compiled once for the cache."""
    import torch
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    model = quantize_exported(job, make_model(job, rewritten=False), quantizer)
    torch.export.save(torch.export.export(model, give_example(job)), folder / PROGRAM)
    load_pt2e(job, folder, False)


def load_pt2e(job: Job, folder: Path, throughput: bool) -> Session:
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401  (registers operations)

    return compile_frozen(job, folder, torch.export.load(folder / PROGRAM).module())


def compile_frozen(job: Job, folder: Path, model: nn.Module) -> Session:
    """Compile for one image with freezing, which the whole process must have: as an option of one call it
    leaves the parameters inputs."""
    import torch

    from cmt_edge.deploy.backends.torch import TorchSession

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder) + ".inductor"
    torch.set_num_threads(job.threads)  # is compiled in
    settings: Any = import_module("torch._inductor.config")
    settings.freezing = True
    model = model if hasattr(model, "graph") else model.eval()
    compiled: Any = torch.compile(model)

    class Whole(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():  # freezing demands it
                found: torch.Tensor = compiled(x)
                return found.float()

    session = TorchSession(Whole(), job.threads)
    session.run(job.images()[:1])
    return CallSession(lambda batch: session.run(batch)[0], "inductor")  # has no parameters to tell types by


def load_frozen(job: Job, folder: Path, throughput: bool, bf16: bool) -> Session:
    """The reference under freezing, also under autocast to bfloat16 as inductor's guide for CPUs says."""
    import torch

    model = load_weights(job, folder).eval()
    if not bf16:
        return compile_frozen(job, folder, model)

    class Cast(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                found: torch.Tensor = self.inner(x)
                return found

    return compile_frozen(job, folder, Cast())


def make_frozen(job: Job, folder: Path, bf16: bool) -> None:
    make_weights(job, folder)
    load_frozen(job, folder, False, bf16)


# --- ExecuTorch -----------------------------------------------------------------------------------


def make_executorch(job: Job, folder: Path, int8: bool, rewritten: bool) -> None:
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.quantizer import xnnpack_quantizer as xnnpack
    from executorch.exir import to_edge_transform_and_lower

    model = make_model(job, rewritten)
    if int8:
        quantizer = xnnpack.XNNPACKQuantizer()
        quantizer.set_global(xnnpack.get_symmetric_quantization_config(is_per_channel=True))
        model = quantize_exported(job, model, quantizer)
    program = torch.export.export(model, give_example(job))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    (folder / PTE).write_bytes(lowered.to_executorch().buffer)


def load_executorch(job: Job, folder: Path, throughput: bool) -> Session:
    """It takes as many threads as the machine has cores: its Python package offers no setting."""
    import torch
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / PTE).load_method("forward")

    def call(batch: np.ndarray) -> np.ndarray:
        found: np.ndarray = method.execute([torch.from_numpy(batch)])[0].numpy()
        return found

    return CallSession(call, "executorch")


# --- LiteRT ---------------------------------------------------------------------------------------


def make_litert(job: Job, folder: Path, int8: bool, rewritten: bool) -> None:
    import litert_torch

    converted = litert_torch.convert(make_model(job, rewritten), give_example(job))
    plain = folder.parent / f"{folder.name}.float.tflite" if int8 else folder / TFLITE
    converted.export(str(plain))
    if int8:
        quantize_litert(job, plain, folder / TFLITE)
        plain.unlink()


def quantize_litert(job: Job, plain: Path, result: Path) -> None:
    """The quantizer's own recipe of static int8: weights by channel, activations by tensor."""
    from ai_edge_litert.interpreter import Interpreter
    from ai_edge_quantizer import quantizer, recipe

    ((name, signature),) = Interpreter(str(plain)).get_signature_list().items()
    (given,) = signature["inputs"]
    ours = quantizer.Quantizer(str(plain), recipe.static_wi8_ai8())
    found = ours.calibrate({name: [{given: image[None]} for image in job.calibration()]})
    ours.quantize(found).export_model(str(result), overwrite=True)


def load_litert(job: Job, folder: Path, throughput: bool) -> Session:
    """XNNPACK runs what it can: the interpreter's default. Int8 models take and give int8."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(folder / TFLITE), num_threads=job.threads)
    interpreter.allocate_tensors()
    (given,), (found,) = interpreter.get_input_details(), interpreter.get_output_details()

    def call(batch: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], _pack(batch, given))
        interpreter.invoke()
        return _unpack(interpreter.get_tensor(found["index"]), found)

    return CallSession(call, "litert")


def _pack(values: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """Floats in the type of an interpreter's tensor."""
    if tensor["dtype"] == np.float32:
        return values
    scale, zero = tensor["quantization"]
    return np.clip(np.rint(values / scale + zero), -128, 127).astype(np.int8)


def _unpack(values: np.ndarray, tensor: dict[str, Any]) -> np.ndarray:
    """An interpreter's tensor as floats."""
    if tensor["dtype"] == np.float32:
        return values
    scale, zero = tensor["quantization"]
    return (values.astype(np.float32) - np.float32(zero)) * np.float32(scale)


# --- ncnn -----------------------------------------------------------------------------------------


def make_ncnn(job: Job, folder: Path) -> None:
    """The weights stay in float32; without ``fp16=False`` its converter halves them."""
    import pnnx

    os.chdir(folder)  # it writes beside the given file, and into the current folder
    pnnx.export(make_model(job, rewritten=False), "model.pt", give_example(job), fp16=False)
    if not (folder / NCNN_FILES[0]).exists():
        raise RuntimeError("pnnx wrote no ncnn files")


def load_ncnn(job: Job, folder: Path, throughput: bool, bf16: bool) -> Session:
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = job.threads
    net.opt.use_bf16_storage = bf16
    net.opt.use_fp16_storage = net.opt.use_fp16_packed = net.opt.use_fp16_arithmetic = False
    if net.load_param(str(folder / NCNN_FILES[0])) or net.load_model(str(folder / NCNN_FILES[1])):
        raise RuntimeError("ncnn does not read the files that pnnx wrote")

    def call(batch: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        extractor.input("in0", ncnn.Mat(batch[0]))
        status, found = extractor.extract("out0")
        if status:
            raise RuntimeError(f"ncnn ended an inference with status {status}")
        return np.array(found)[None]

    return CallSession(call, "ncnn")


# --- OpenVINO's frontend of PyTorch ---------------------------------------------------------------


def make_openvino_frontend(job: Job, folder: Path, quantized: str) -> None:
    """Converted by OpenVINO from the module; int8 by NNCF on the ``graph`` or on the ``module``, or none."""
    import openvino as ov

    model: Any = make_model(job, rewritten=False)
    if quantized == "module":
        model = _quantize_by_nncf(job, model)
    graph = ov.convert_model(model, example_input=give_example(job)[0], input=[1, *job.images().shape[1:]])
    if quantized == "graph":
        graph = _quantize_by_nncf(job, graph)
    ov.save_model(graph, folder / IR, compress_to_fp16=False)


def _quantize_by_nncf(job: Job, model: Any) -> Any:
    # On a module NNCF compiles C++ code, for which a busy machine may need more than its limit of 60 s.
    os.environ["NNCF_EXTENSION_LOAD_TIMEOUT"] = "0"
    os.environ["TORCH_EXTENSIONS_DIR"] = str(job.folder / "extensions")
    import nncf
    import torch

    batches = list(collect_calibration(job))
    is_module = isinstance(model, torch.nn.Module)
    given = [torch.from_numpy(batch) for batch in batches] if is_module else batches
    return nncf.quantize(
        model, nncf.Dataset(given), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches)
    )


# --- the table ------------------------------------------------------------------------------------


def _make_tool_rows(
    key: str,
    tool: str,
    files: Sequence[str],
    make: Callable[..., None],
    load: Callable[..., Session],
    recipe: str,
) -> list[Row]:
    """A tool's rows: fp32 and int8, of the plain model and of our rewritten graph."""
    rows = []
    for rewritten in (False, True):
        for precision in ("fp32", "int8"):
            name = f"ours_{key}_{precision}" if rewritten else f"{key}_{precision}"
            label = f"{tool} {precision}" + (", our rewritten graph" if rewritten else "")
            source = "the graph that our rewrites give" if rewritten else "the unfused model"
            about = f"{source}, {recipe if precision == 'int8' else 'XNNPACK'}"
            partly = partial(make, int8=precision == "int8", rewritten=rewritten)
            rows.append(Row(name, label, about, tuple(files), partly, load, home=key))
    return rows


OPTIONAL = {
    row.key: row
    for row in (
        Row(
            "torch_frozen",
            "torch.compile, freezing",
            "inductor with torch._inductor.config.freezing set for the whole process",
            (WEIGHTS,),
            partial(make_frozen, bf16=False),
            partial(load_frozen, bf16=False),
            home=CHILD,
        ),
        Row(
            "torch_bf16",
            "torch.compile bf16, freezing",
            "the same under autocast to bfloat16",
            (WEIGHTS,),
            partial(make_frozen, bf16=True),
            partial(load_frozen, bf16=True),
            home=CHILD,
        ),
        Row(
            "pt2e_int8",
            "torch.compile int8 (PT2E), freezing",
            "torchao's X86InductorQuantizer with its default configuration, then inductor",
            (PROGRAM,),
            make_pt2e,
            load_pt2e,
            home="pt2e",
        ),
        Row(
            "ov_frontend",
            "OpenVINO fp32, PyTorch frontend",
            "ov.convert_model of the module, f32 hint",
            OPENVINO_FILES,
            partial(make_openvino_frontend, quantized=""),
            partial(load_openvino, precision="fp32"),
        ),
        Row(
            "nncf_frontend",
            "NNCF int8, PyTorch frontend",
            "nncf.quantize(model_type=TRANSFORMER) on that graph, the runtime's default precision",
            OPENVINO_FILES,
            partial(make_openvino_frontend, quantized="graph"),
            partial(load_openvino, precision=None),
        ),
        Row(
            "nncf_module",
            "NNCF int8, torch module",
            "nncf.quantize(model_type=TRANSFORMER) on the module, then ov.convert_model; no hint",
            OPENVINO_FILES,
            partial(make_openvino_frontend, quantized="module"),
            partial(load_openvino, precision=None),
        ),
        *_make_tool_rows(
            "executorch",
            "ExecuTorch",
            [PTE],
            make_executorch,
            load_executorch,
            "XNNPACKQuantizer (PT2E), by channel, then XNNPACK",
        ),
        *_make_tool_rows(
            "litert",
            "LiteRT",
            [TFLITE],
            make_litert,
            load_litert,
            "static_wi8_ai8 of ai-edge-quantizer, then XNNPACK",
        ),
        Row(
            "ncnn_fp32",
            "ncnn fp32",
            "pnnx with fp16=False",
            NCNN_FILES,
            make_ncnn,
            partial(load_ncnn, bf16=False),
            home="ncnn",
        ),
        Row(
            "ncnn_bf16",
            "ncnn bf16",
            "the same files with use_bf16_storage",
            NCNN_FILES,
            make_ncnn,
            partial(load_ncnn, bf16=True),
            "ncnn_fp32",
            home="ncnn",
        ),
    )
}
"""The rows beside those of :mod:`peers_rows`; ``--optional`` or ``--only`` measures them."""
