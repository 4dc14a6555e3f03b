"""The model that was exported, the tensors and the files of its graph, and the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from ..record import OMITTED, Between
from .values import (
    MAX_TOTAL,
    Count,
    DataType,
    Dimension,
    DynamicDimension,
    Head,
    OutputKind,
    Seed,
    Sha256,
    Size,
)


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle: its size in bytes and its hash."""

    size: Annotated[int, Between(0, MAX_TOTAL)]
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class WeightsEntry:
    """Where the model's weights came from.

    Attributes:
        source: ``"pretrained"``, ``"random"``, ``"as built"`` (a user's factory), or the file name of a
            checkpoint.
        sha256: over names, types, shapes and values of the weights.
        seed: of random and fresh weights.
        ema: whether the averaged weights of the checkpoint were taken.
        fresh: keys that were left at their initial values.
        resized: keys that were interpolated to the model's resolution.
        entry: where in the checkpoint they were, e.g. ``"state_dict_ema"``; ``None`` where they did not come
            from a file of the user's.
    """

    source: str
    sha256: Sha256
    seed: Seed
    ema: bool
    fresh: tuple[str, ...]
    resized: tuple[str, ...]
    entry: str | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """The model that was exported.

    Attributes:
        provider: entry point that can rebuild the PyTorch model.
        name: what the provider calls the model.
        family: architecture.
        img_size: height and width of the input in pixels.
        num_classes: number of logits; a single one has two labels.
        head: ``"logits"`` or ``"features"``.
        params: number of parameters.
        macs: multiply-accumulates of one image; ``None`` where they could not be counted.
        opset: ONNX opset of ``model.onnx``.
        weights: where the weights came from.
    """

    provider: str
    name: str
    family: str
    img_size: Size
    num_classes: Count
    head: Head
    params: Count
    macs: Count | None
    opset: Size
    weights: WeightsEntry


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """An input or output of the graph; ``"batch"`` stands in ``shape`` where the batch size is dynamic.

    ``kind`` is :data:`PROBABILITIES` or :data:`SCORES` of an output that is no logits any more, and ``None``
    of any other.
    """

    name: str
    shape: tuple[Dimension | DynamicDimension, ...]
    dtype: DataType
    kind: OutputKind | None = field(default=None, metadata=OMITTED)


@dataclass(frozen=True, kw_only=True)
class RuntimeEntry:
    """The runtime that the bundle was verified with; ``version`` is ``None`` where it has not run yet."""

    backend: str
    version: str | None


@dataclass(frozen=True, kw_only=True)
class Host:
    """The machine that something was made or measured on.

    Attributes:
        machine: architecture, for example ``"x86_64"``.
        system: operating system.
        python: version.
        cpu: model of the processor.
        flags: those of its instruction sets that matter here.
        cores: CPU cores that the process may use.
        mhz: clock of the first core in MHz, as the system writes it.
        governor: frequency governor of the first core.
        temperature_mc: of the first thermal zone, in thousandths of a degree Celsius, as the system writes
            it.
    """

    machine: str
    system: str
    python: str
    cpu: str
    flags: tuple[str, ...]
    cores: Size | None
    mhz: str | None = field(default=None, metadata=OMITTED)
    governor: str | None = field(default=None, metadata=OMITTED)
    temperature_mc: str | None = field(default=None, metadata=OMITTED)
