"""A bundle as a server gets it: its graph in a form that the server opens, and what its settings need."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backends import get_runtime
from ..backends.base import read_batch_limit
from ..bundle import ONNX, Bundle
from ..errors import InputError
from ..preprocessing import normalise

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""A model's name that every server, URL and file system takes."""
DEFAULT_MAX_BATCH = 8
"""Largest batch that a server makes of requests for a dynamic graph, unless told otherwise."""


@dataclass(frozen=True)
class Options:
    """How the models of a repository are served.

    Attributes:
        runtime: what runs the graphs in the server, by our name; ``None`` is the bundle format's.
        version: number of the folder that a graph lies in.
        max_batch: largest batch that the server makes of requests; ``None`` is :data:`DEFAULT_MAX_BATCH`
            for a dynamic graph. A fixed graph takes its own batch size alone.
        instances: copies of each model that run at once.
        threads: CPU threads of one inference; ``None`` leaves it to the server.
        queue_delay_us: microseconds that a request may wait for others to make a batch with.
        allow_bf16: let the server compute in bfloat16 what the bundle computes in float32.
    """

    runtime: str | None = None
    version: int = 1
    max_batch: int | None = None
    instances: int = 1
    threads: int | None = None
    queue_delay_us: int = 100
    allow_bf16: bool = False


@dataclass(frozen=True)
class Served:
    """A bundle in a repository.

    Attributes:
        name: of the model, as clients ask for it.
        bundle: where it comes from.
        runtime: what runs its graph in the server, by our name.
        max_batch: largest batch that the server makes of requests; 0 where it makes none.
        notes: what differs from running the bundle with our own Predictor, one sentence each.
    """

    name: str
    bundle: Bundle
    runtime: str
    max_batch: int
    notes: tuple[str, ...] = ()

    def make_batch(self) -> np.ndarray:
        """The first golden images as the graph takes them: float32 ``(N, 3, H, W)``, where ``N`` is the
        graph's batch size, or 1."""
        count = read_batch_limit(self.bundle) or 1
        pixels = self.bundle.golden().pixels
        chosen = [i % len(pixels) for i in range(count)]
        return normalise(pixels[chosen], self.bundle.preprocess)


def name_model(bundle: Bundle) -> str:
    """The name under which a server offers a bundle: that of its folder or file.

    Raises:
        InputError: servers do not take it.
    """
    name = bundle.name
    if NAME.fullmatch(name):
        return name
    raise InputError(
        "has a name that model servers do not take",
        where=bundle.path,
        why="it becomes the model's name in URLs",
        remedy="rename it: letters, digits, '_', '-' and '.', beginning with a letter or a digit",
    )


def choose_max_batch(bundle: Bundle, asked: int | None) -> int:
    """Largest batch that the server makes of requests; 0 where the graph's batch size is fixed.

    Raises:
        InputError: a fixed graph was asked to take batches.
    """
    fixed = read_batch_limit(bundle)
    if not fixed:
        return asked or DEFAULT_MAX_BATCH
    if asked is None:
        return 0
    raise InputError(
        f"has a graph for batches of {fixed} alone, so a server cannot batch its requests",
        where=bundle.path,
        remedy="export it with --batch 0, or leave out --max-batch and raise --instances",
    )


def copy_onnx(bundle: Bundle, folder: Path) -> None:
    """Put the portable graph of a bundle into a folder as ``model.onnx``."""
    shutil.copyfile(bundle.file(ONNX), folder / "model.onnx")


def write_ir(bundle: Bundle, folder: Path) -> None:
    """Write the graph as OpenVINO compiles it for a bundle, with our rewriting, as ``model.xml`` and
    ``model.bin``. Int8 linears stay int8, since the server's processor may be another one than this.

    Raises:
        RuntimeMissingError: OpenVINO is not installed here.
        BundleError: it cannot read the graph.
    """
    get_runtime("openvino")
    import openvino as ov

    from ..backends.openvino_graph import read

    model = read(bundle.file(ONNX), keep_linears=True)
    ov.save_model(model, str(folder / "model.xml"), compress_to_fp16=False)


def copy_engine(bundle: Bundle, folder: Path) -> None:
    """Put the TensorRT engine that was built on this machine into a folder as ``model.plan``.

    Raises:
        RuntimeMissingError: TensorRT or the engine is missing, or the engine is not from this machine.
        BundleError: the engine was changed.
    """
    get_runtime("tensorrt")
    from ..tensorrt.bindings import TENSORRT, open_bindings
    from ..tensorrt.engine import read_engine
    from ..tensorrt.session import find_engine_target

    _, target = find_engine_target(open_bindings(TENSORRT))
    (folder / "model.plan").write_bytes(read_engine(bundle, target))


WRITERS = {"onnxruntime": copy_onnx, "openvino": write_ir, "tensorrt": copy_engine}
"""Name of a runtime -> what writes the graph in its form."""
