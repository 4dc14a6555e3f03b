"""The rows that ``peers.py`` compares: how each artefact is made from the PyTorch model on, and opened.

Nothing here loads PyTorch when it is imported: a process that only runs a model must not hold it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import open_onnxruntime, open_openvino
from peers_environments import HERE

from cmt_edge.deploy import Predictor, Preprocess
from cmt_edge.deploy.backends import Session

if TYPE_CHECKING:
    import onnx
    from torch import nn

ONNX, IR, WEIGHTS = "model.onnx", "openvino.xml", "weights.pt"
"""Names of the files that a row makes."""

OPENVINO_FILES = (IR, "openvino.bin")
"""What OpenVINO reads of the peers."""

IMAGES_FILE = "images.npy"
"""The images on which logits are compared: float32 ``(N, 3, S, S)``."""

CALIBRATION_FILE = "calibration.npy"
"""The images of the calibration for tools in other environments, which lack our reader: as above."""

INT8_OPERATIONS = ["Conv", "MatMul", "Gemm"]
"""Operations that ONNX Runtime quantizes: with all others as well its int8 is slower than its own float32."""


@dataclass(frozen=True)
class Job:
    """One model: where its artefacts go and what all rows have in common."""

    model: str
    folder: Path
    threads: int
    data: str
    calib_size: int | None
    batch: int = 1
    """Batch size of the graphs; 0 for any, which is measured with one image."""

    @property
    def size(self) -> int:
        """The number of images of one inference."""
        return self.batch or 1

    @property
    def preprocess(self) -> Preprocess:
        from cmt_edge.export import ExportConfig

        return ExportConfig(self.model).preprocess

    def images(self) -> np.ndarray:
        """The images of the check, float32 ``(N, 3, S, S)``; a file, so that children need not make them."""
        return np.load(self.folder / IMAGES_FILE)

    def calibration(self) -> np.ndarray:
        """The images of the calibration, float32 ``(N, 3, S, S)``, from a file."""
        return np.load(self.folder / CALIBRATION_FILE)

    def arguments(self) -> list[str]:
        """For a child process."""
        pairs = {
            "--model": self.model,
            "--folder": self.folder,
            "--threads": self.threads,
            "--data": self.data,
            "--batch": self.batch,
        }
        pairs |= {} if self.calib_size is None else {"--calib-size": self.calib_size}
        return [str(part) for pair in pairs.items() for part in pair]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        key: its name on the command line.
        label: its name in the table.
        about: what it is, in one sentence.
        files: names of the files that the runtime reads.
        make: ``make(job, folder)`` writes the artefact.
        load: ``load(job, folder, throughput)`` opens it.
        artefact: key of the row whose artefact this one opens too; empty for its own.
        home: where it runs: in the measuring process, in a child of its own, or in a child of an environment
            (:mod:`peers_environments`).
    """

    key: str
    label: str
    about: str
    files: tuple[str, ...]
    make: Callable[[Job, Path], None]
    load: Callable[[Job, Path, bool], Session]
    artefact: str = ""
    home: str = HERE

    @property
    def ours(self) -> bool:
        return self.key.startswith("ours")

    def folder(self, job: Job) -> Path:
        return job.folder / (self.artefact or self.key)


# --- making the artefacts: each from the PyTorch model on -----------------------------------------


def make_reference(name: str) -> nn.Module:
    """The unfused PyTorch model, with the same random weights wherever it is asked for (also by
    ``export.run``)."""
    from cmt_edge.cmt import create_model
    from cmt_edge.cmt.weights import randomize

    model = create_model(name, seed=0)
    randomize(model)
    return model


def export_plain_onnx(job: Job) -> onnx.ModelProto:
    """The reference as its user would export it: ``torch.onnx`` with its defaults, then onnxsim."""
    import onnxsim
    import torch

    from cmt_edge.export.config import OPSET

    size = job.preprocess.size
    program = torch.onnx.export(
        make_reference(job.model),
        (torch.zeros(job.batch or 2, 3, size, size),),
        dynamic_shapes=None if job.batch else ({0: torch.export.Dim("batch")},),
        dynamo=True,
        opset_version=OPSET,
        input_names=["input"],
        output_names=["logits"],
        external_data=False,
        verbose=False,
    )
    assert program is not None
    graph, ok = onnxsim.simplify(program.model_proto)
    if not ok:
        raise RuntimeError("onnxsim's own check did not pass")
    return graph


def collect_calibration(job: Job) -> Any:
    """The images that every int8 row is calibrated on, through the same reader: iterable, with a length."""
    from cmt_edge.calib import CalibrationSet
    from cmt_edge.calib.statistics import Batches

    return Batches(CalibrationSet.choose(job.data, job.calib_size, job.preprocess), job.preprocess, None)


def group_calibration(job: Job) -> list[np.ndarray]:
    """The same in batches of the size that the graph takes, without the last images if they fill none."""
    images = list(collect_calibration(job))
    count = len(images) // job.size
    return [np.concatenate(images[i * job.size : (i + 1) * job.size]) for i in range(count)]


def make_weights(job: Job, folder: Path) -> None:
    import torch

    torch.save(make_reference(job.model).state_dict(), folder / WEIGHTS)


def make_compiled(job: Job, folder: Path) -> None:
    make_weights(job, folder)
    load_compiled(job, folder, False)


def make_onnx(job: Job, folder: Path) -> None:
    import onnx

    onnx.save(export_plain_onnx(job), folder / ONNX)


def make_ort_optimised(job: Job, folder: Path) -> None:
    """The plain export after ONNX Runtime's own optimiser for transformers, told that it is a ViT."""
    import onnx

    onnx.save(_optimise(job), folder / ONNX)


def _optimise(job: Job) -> onnx.ModelProto:
    import onnx
    from onnxruntime.transformers import optimizer

    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.onnx"
        onnx.save(export_plain_onnx(job), plain)
        found: onnx.ModelProto = optimizer.optimize_model(str(plain), model_type="vit", opt_level=1).model
        return found


def make_ort_int8(job: Job, folder: Path, optimised: bool, seven_bits: bool = False) -> None:
    """As ONNX Runtime's documentation says for x86: pre-process, then Q/DQ with unsigned activations and
    signed weights, one scale a channel, in :data:`INT8_OPERATIONS` alone; ``seven_bits`` for weights as it
    says for processors without VNNI."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches = iter(group_calibration(job))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"input": batch}

    with tempfile.TemporaryDirectory() as scratch:
        plain, prepared = Path(scratch) / "plain.onnx", Path(scratch) / "prepared.onnx"
        onnx.save(_optimise(job) if optimised else export_plain_onnx(job), plain)
        quant_pre_process(plain, prepared, skip_symbolic_shape=optimised)
        quantize_static(
            prepared,
            folder / ONNX,
            Reader(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=INT8_OPERATIONS,
            per_channel=True,
            reduce_range=seven_bits,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def make_openvino(job: Job, folder: Path) -> None:
    import openvino as ov

    ov.save_model(_convert(job), folder / IR, compress_to_fp16=False)


def make_nncf(job: Job, folder: Path, preset: str | None = None) -> None:
    """``preset``: name of NNCF's preset; without one NNCF takes MIXED for transformers."""
    os.environ["NNCF_CI"] = "1"  # no telemetry
    import nncf
    import openvino as ov

    batches = group_calibration(job)
    model = nncf.quantize(
        _convert(job),
        nncf.Dataset(batches),
        preset=None if preset is None else nncf.QuantizationPreset[preset],
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
    ov.save_model(model, folder / IR, compress_to_fp16=False)


def _convert(job: Job) -> Any:
    import openvino as ov

    with tempfile.TemporaryDirectory() as scratch:
        make_onnx(job, Path(scratch))
        return ov.convert_model(Path(scratch) / ONNX)


def make_ours(job: Job, folder: Path, precision: str, form: str) -> None:
    """What ``cmt-export`` does, its checks and its quick measurement included; nothing is taken from the
    cache."""
    from cmt_edge.export import ExportConfig, run

    calibrated: dict[str, Any] = (
        {"data": job.data, "calib_size": job.calib_size} if precision == "int8" else {}
    )
    run(
        ExportConfig(
            job.model,
            form,
            precision,
            batch=job.batch,
            weights="random",
            output=str(folder),
            threads=job.threads,
            cache=False,
            atol=1e9,  # random weights would fail the int8 gate
            **calibrated,
        )
    )


# --- opening them ---------------------------------------------------------------------------------


def load_weights(job: Job, folder: Path) -> nn.Module:
    """The reference with the weights of the file."""
    import torch

    model = make_reference(job.model)
    model.load_state_dict(torch.load(folder / WEIGHTS))
    return model


def load_torch(job: Job, folder: Path, throughput: bool) -> Session:
    from cmt_edge.deploy.backends.torch import TorchSession

    return TorchSession(load_weights(job, folder), job.threads)


def load_compiled(job: Job, folder: Path, throughput: bool) -> Session:
    """Compiled at once, for one image; what the compiler makes is kept beside the artefact for the next
    process."""
    import torch

    from cmt_edge.deploy.backends.torch import TorchSession

    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder) + ".inductor"
    torch.set_num_threads(job.threads)  # is compiled in
    model = load_weights(job, folder)
    compiled: Any = torch.compile(model)
    session = TorchSession(compiled, job.threads)
    session.run(job.images()[:1])
    return session


def load_onnx(job: Job, folder: Path, throughput: bool) -> Session:
    return open_onnxruntime(folder / ONNX, job.threads, throughput)


def load_openvino(job: Job, folder: Path, throughput: bool, precision: str | None) -> Session:
    return open_openvino(folder / IR, job.threads, precision, throughput, rewritten=False)


def load_ours(job: Job, folder: Path, throughput: bool, backend: str) -> Session:
    (bundle,) = folder.iterdir()
    return Predictor.load(
        bundle, backend=backend, threads=job.threads, throughput=throughput, cache=False
    ).session


def _make_own_row(precision: str, form: str = "openvino") -> Row:
    key, name, backend = f"ours_{precision}", "OpenVINO", "openvino"
    if form == "onnx":
        key, name, backend = f"{key}_ort", "ONNX Runtime", "onnxruntime"
    about = (
        f"bundle of cmt-export --format {form} --precision {precision}; its export time includes verification"
        " and a quick measurement"
    )
    return Row(
        key,
        f"cmt-edge {precision} ({name})",
        about,
        (ONNX,),
        partial(make_ours, precision=precision, form=form),
        partial(load_ours, backend=backend),
    )


PLAIN_ROWS = {
    row.key: row
    for row in (
        Row(
            "torch",
            "PyTorch eager",
            "the unfused model in eval and inference mode",
            (WEIGHTS,),
            make_weights,
            load_torch,
        ),
        Row(
            "torch_compile",
            "torch.compile",
            "inductor with its defaults; nothing is shipped but the weights, each process compiles or "
            "reads a cache",
            (WEIGHTS,),
            make_compiled,
            load_compiled,
        ),
        Row(
            "ort_fp32",
            "ONNX Runtime fp32",
            "plain export: torch.onnx of the unfused model, then onnxsim",
            (ONNX,),
            make_onnx,
            load_onnx,
        ),
        Row(
            "ort_optimised",
            "ONNX Runtime fp32, optimiser",
            'the same after onnxruntime.transformers.optimizer, model_type="vit"',
            (ONNX,),
            make_ort_optimised,
            load_onnx,
        ),
        Row(
            "ort_int8",
            "ONNX Runtime int8 (own)",
            "plain export, quant_pre_process, quantize_static: Q/DQ, U8S8 by channel, Conv, MatMul, Gemm",
            (ONNX,),
            partial(make_ort_int8, optimised=False),
            load_onnx,
        ),
        Row(
            "ort_int8_optimised",
            "ONNX Runtime int8 (own), optimiser",
            "the same recipe on the optimised graph",
            (ONNX,),
            partial(make_ort_int8, optimised=True),
            load_onnx,
        ),
        Row(
            "ort_int8_seven",
            "ONNX Runtime int8 (own), 7 bits",
            "the recipe on the plain export with reduce_range, for processors without VNNI",
            (ONNX,),
            partial(make_ort_int8, optimised=False, seven_bits=True),
            load_onnx,
        ),
        Row(
            "ov_fp32",
            "OpenVINO fp32",
            "plain export, f32 hint: the base of all ratios",
            OPENVINO_FILES,
            make_openvino,
            partial(load_openvino, precision="fp32"),
        ),
        Row(
            "ov_bf16",
            "OpenVINO bf16",
            "the same file, bf16 hint",
            OPENVINO_FILES,
            make_openvino,
            partial(load_openvino, precision="bf16"),
            "ov_fp32",
        ),
        Row(
            "nncf_f32",
            "NNCF int8, f32 hint",
            "plain export, nncf.quantize(model_type=TRANSFORMER), the rest in float32",
            OPENVINO_FILES,
            make_nncf,
            partial(load_openvino, precision="fp32"),
        ),
        Row(
            "nncf_default",
            "NNCF int8, runtime default",
            "the same file without a hint: the rest in bfloat16 where the CPU has it",
            OPENVINO_FILES,
            make_nncf,
            partial(load_openvino, precision=None),
            "nncf_f32",
        ),
        Row(
            "nncf_performance",
            "NNCF int8, preset PERFORMANCE",
            "as NNCF int8 with the preset PERFORMANCE; the runtime's default precision",
            OPENVINO_FILES,
            partial(make_nncf, preset="PERFORMANCE"),
            partial(load_openvino, precision=None),
        ),
        _make_own_row("fp32"),
        _make_own_row("bf16"),
        _make_own_row("int8"),
        _make_own_row("fp32", "onnx"),
        _make_own_row("int8", "onnx"),
    )
}
