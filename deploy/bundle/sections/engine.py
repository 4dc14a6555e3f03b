"""The engine that ``cmt-build`` made, and what it depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..record import Between
from .values import Sha256, Share, Size
from .verification import GoldenCheck

Level = Annotated[int, Between(0, 5)]
"""TensorRT's builder optimization level."""
Gibibytes = Annotated[float, Between(0)]
"""Scratch memory of a build, GiB."""


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """The options that an engine depends on; ``profile`` is ``None`` where the batch size is fixed."""

    workspace: Gibibytes | None
    level: Level
    profile: tuple[Size, Size, Size] | None
    tf32: bool


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """Everything that an engine depends on; equal keys mean that an engine may be used again.

    Attributes:
        onnx: SHA-256 of ``model.onnx``.
        tensorrt, cuda, driver: versions.
        gpu: name and number of multiprocessors.
        sm: compute capability, for example ``"8.7"``.
        options: of the build.
    """

    onnx: Sha256
    tensorrt: str
    cuda: str
    driver: str
    gpu: str
    sm: str
    options: BuildOptions


@dataclass(frozen=True, kw_only=True)
class EngineEntry:
    """The engine that ``cmt-build`` made.

    Attributes:
        file: name of the engine in the bundle.
        key: what it depends on.
        seal: proof that this machine built it.
        report, text: names of the device report in the bundle, as JSON and as Markdown.
        golden: the check of the golden images.
        low_precision_share: share of the layers that compute in the asked precision or below.
    """

    file: str
    key: EngineKey
    seal: str
    report: str
    text: str
    golden: GoldenCheck
    low_precision_share: Share
