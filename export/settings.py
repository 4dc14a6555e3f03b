"""Every option of an export, once: its default, its help, its choices and its group.

``cmt-export --help``, the keys of a settings file and ``docs/cli.md`` are made from this table. It imports
neither PyTorch nor ONNX, so that ``--help`` is quick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from cmt_edge.deploy.backends import FORMAT_ALIASES
from cmt_edge.deploy.bundle.sections import FORMATS
from cmt_edge.deploy.cli.cluster import LOCAL, WAIT_S
from cmt_edge.deploy.cli.ranges import (
    BATCH_SIZES,
    CLASS_COUNTS,
    DIFFERENCE,
    GIBIBYTES,
    IMAGES,
    POINTS,
    SECONDS,
    SEED,
    THREADS,
    WORKERS,
    Range,
)
from cmt_edge.deploy.measure.isa import ISAS
from cmt_edge.deploy.measure.parity import MAX_DROP
from cmt_edge.deploy.preprocessing import DECODE_POLICIES, MAX_SIZE, REDUCING_GAP, REDUCING_GAPS

from .options import KEY, Option, fold_names, make_option

PRECISION_CHOICES = ("fp32", "fp16", "bf16", "int8", "auto")
"""What can be asked for; ``auto`` measures the precisions of the format and chooses one."""
HEAD_CHOICES = ("logits", "features")
"""What the exported model gives: class logits, or the feature maps of its stages."""
EXIF = ("apply", "ignore")
"""What becomes of the orientation that a photograph records."""
AUTO_DROP = 0.3
"""Allowed loss of top-1 where ``auto`` chooses, percentage points. It is stricter than for a named precision
because ``auto`` has other candidates."""

MODEL, DATA, OUTPUT, GATES, AUTO, TENSORRT, MACHINE, CLUSTER = (
    "model",
    "data",
    "output",
    "gates",
    "auto",
    "tensorrt",
    "machine",
    "cluster",
)
"""Keys of the groups of options."""

GROUPS = {
    MODEL: "model",
    DATA: "data and calibration",
    OUTPUT: "output and format",
    GATES: "accuracy gates",
    AUTO: "--precision auto",
    TENSORRT: "TensorRT (--format trt or rtx)",
    MACHINE: "machine",
    CLUSTER: "cluster",
}
"""Group of options -> its heading in ``--help``, in this order."""


class TorchModule(Protocol):
    """A ``torch.nn.Module``, said without PyTorch."""

    def eval(self) -> Any: ...
    def modules(self) -> Iterator[Any]: ...


NAMED_WEIGHTS = ("pretrained", "random")
"""Weights that are not a checkpoint file."""
MADE_IMAGES = ("generated", "synthetic")
"""Calibration images that are made, so that no folder holds them."""


@dataclass(frozen=True)
class Settings:
    """What an export is asked to do, unchecked; see :class:`cmt_edge.export.config.ExportConfig`.

    Flags and settings files write text and numbers. Python may also give a module object as ``model``, three
    numbers as ``mean`` and ``std``, and a list of names as ``labels``.
    """

    model: str | TorchModule = field(
        metadata={
            KEY: Option(
                "model name, see --list-models; or MODULE:FACTORY of your own, or timm:NAME (default: what"
                " the checkpoint says)",
                MODEL,
            )
        }
    )
    format: str = make_option(
        "openvino",
        help="runtime that serves the bundle; onnx: ONNX Runtime; trt: TensorRT (also engine, tensorrt);"
        " rtx: TensorRT for RTX (also tensorrt_rtx)",
        group=OUTPUT,
        choices=(*FORMATS, *FORMAT_ALIASES),
    )
    precision: str = make_option(
        "fp32",
        help="fp16 needs trt, rtx or openvino (there for GPUs and NPUs), bf16 openvino; auto: measure them"
        " here and take the fastest that passes",
        group=OUTPUT,
        choices=PRECISION_CHOICES,
        shortcuts=(
            ("--int8", "int8", "same as --precision int8"),
            ("--half", "fp16", "same as --precision fp16"),
        ),
    )
    head: str = make_option(
        "logits",
        help="features: the stage maps (strides 4 to 32) for detection and segmentation, instead of classes",
        group=MODEL,
        choices=HEAD_CHOICES,
    )
    weights: str = make_option(
        "pretrained",
        help="pretrained, random, or a checkpoint file",
        group=MODEL,
        names=NAMED_WEIGHTS,
    )
    ema: bool | None = make_option(
        None,
        help="take a checkpoint's averaged weights, or not (default: take them where it has them)",
        group=MODEL,
    )
    fresh_head: bool = make_option(
        False,
        help="start a new classifier where the checkpoint has another class count",
        group=MODEL,
    )
    resize_position_bias: bool = make_option(
        False,
        help="interpolate a checkpoint of another resolution",
        group=MODEL,
    )
    num_classes: int | None = make_option(
        None,
        help="number of classes of the checkpoint (default: as published)",
        group=MODEL,
        range=CLASS_COUNTS,
    )
    imgsz: int | None = make_option(
        None,
        help="input height and width, pixels (default: as published)",
        group=MODEL,
        range=Range(1, MAX_SIZE),
    )
    labels: str | Sequence[str] | None = make_option(
        None,
        help="text file with one class name a line, in the order of the logits, or JSON",
        group=MODEL,
        written=(list,),
        is_list=True,
    )
    data: str | None = make_option(
        None,
        help="calibration images (int8; fp16: for the ranges): folder, ARCHIVE.tar[/FOLDER], tar shards,"
        " Parquet, a URL of these, 'generated', or 'synthetic' (made from the model's batch norms, takes up"
        " to some minutes)",
        group=DATA,
        names=MADE_IMAGES,
    )
    calib_size: int | None = make_option(
        None,
        help="number of calibration images (default: 300, or all; synthetic: 64, above 128 pixels 32)",
        group=DATA,
        range=Range(1, 100_000),
    )
    eval_data: str | None = make_option(
        None,
        help="labelled images to measure top-1 on: class folders, ARCHIVE.tar[/FOLDER], tar shards, Parquet,"
        " or a URL of these",
        group=DATA,
    )
    eval_limit: int | None = make_option(
        None,
        help="largest number of labelled images to use, evenly spread",
        group=DATA,
        range=IMAGES,
    )
    by_order: bool = make_option(
        False,
        help="match class folders to labels in sorted order",
        group=DATA,
    )
    max_drop: float | None = make_option(
        None,
        help=f"allowed loss of top-1, percentage points (default: {MAX_DROP}; auto: {AUTO_DROP})",
        group=GATES,
        range=POINTS,
    )
    atol: float | None = make_option(
        None,
        help="allowed difference of the golden logits (default: by precision)",
        group=GATES,
        range=DIFFERENCE,
    )
    batch: int = make_option(
        1,
        help="batch size of the graph, 0 for any",
        group=OUTPUT,
        range=BATCH_SIZES,
    )
    mean: str | Sequence[float] | None = make_option(
        None,
        help="mean of the values 0..1 (default: the model's)",
        group=MODEL,
        metavar="R,G,B",
        written=(list,),
    )
    std: str | Sequence[float] | None = make_option(
        None,
        help="standard deviation of the values 0..1 (default: the model's)",
        group=MODEL,
        metavar="R,G,B",
        written=(list,),
    )
    crop_ratio: float | None = make_option(
        None,
        help="share of the short side that the centre crop keeps, 0 for no crop (default: the model's)",
        group=MODEL,
        range=Range(0, 1),
    )
    exif: str = make_option(
        "apply",
        help="what to do with the orientation of photographs",
        group=MODEL,
        choices=EXIF,
        what="EXIF policy",
    )
    decode: str = make_option(
        "full",
        help="reduced: decode large JPEG images at a half, a quarter or an eighth of their size, in a"
        " fraction of the time; the export measures what that changes",
        group=MODEL,
        choices=DECODE_POLICIES,
        what="decoding",
    )
    reducing_gap: float = make_option(
        REDUCING_GAP,
        help="least width and height of a reduced image, as a multiple of those that it is then resized to",
        group=MODEL,
        range=Range(*REDUCING_GAPS),
    )
    threads: int | None = make_option(
        None,
        help="CPU threads for verification and measurement (default: all cores)",
        group=MACHINE,
        range=THREADS,
    )
    seed: int = make_option(
        0,
        help="seed of random weights and of the choice of images",
        group=MACHINE,
        range=SEED,
    )
    build: bool = make_option(
        True,
        help="write the bundle without an engine; the build command makes it on the device",
        group=TENSORRT,
    )
    device: str | None = make_option(
        None,
        help="number of the GPU (default: 0); trt alone",
        group=TENSORRT,
        written=(int,),
    )
    compute_capability: str | None = make_option(
        None,
        help="compute capabilities that an rtx engine is built for, 86,89,120 for instance (default: one"
        " portable engine for 8.0, 8.6, 8.9, 12.0 and later)",
        group=TENSORRT,
        metavar="LIST",
        written=(int, list),
    )
    workspace: float | None = make_option(
        None,
        help="scratch memory of the engine (default: for trt 40 % of what is free, for rtx the compiler's)",
        group=TENSORRT,
        metavar="GiB",
        range=GIBIBYTES,
    )
    output: str = make_option(
        ".",
        help="folder in which the bundle's folder is made",
        group=OUTPUT,
        short="-o",
    )
    name: str | None = make_option(
        None,
        help="stands for the model in the name of the bundle's folder, so that two checkpoints of one model"
        " have two folders (default: the model's name)",
        group=OUTPUT,
    )
    sign: str | None = make_option(
        None,
        help="sign the bundle with this private Ed25519 key, a PEM file; verify --key checks it",
        group=OUTPUT,
        metavar="KEY",
    )
    pack: bool = make_option(
        False,
        help="also write the bundle as one file beside its folder; every command opens it like the folder",
        group=OUTPUT,
    )
    slim: bool = make_option(
        False,
        help="leave out what a device does not need: reports, the reference's answers, most golden images;"
        " the manifest names it",
        group=OUTPUT,
    )
    thumbnails: bool = make_option(
        True,
        help="keep no small copies of images with another answer than the reference's in the report",
        group=OUTPUT,
    )
    cache: bool = make_option(
        True,
        help="do not reuse traced and calibrated graphs, synthetic images and measurements of earlier runs",
        group=MACHINE,
    )
    keep_float: str | None = make_option(
        None,
        help="int8: groups of operations that stay float, by commas (auto names them)",
        group=DATA,
        metavar="GROUPS",
        written=(list,),
    )
    latency_budget: float | None = make_option(
        None,
        help="allowed median latency of one batch, milliseconds",
        group=AUTO,
        metavar="MS",
        range=Range(0, 1e6, above=True),
    )
    time_budget: float | None = make_option(
        None,
        help="seconds after which nothing is refined any more",
        group=AUTO,
        metavar="S",
        range=Range(0, SECONDS.most, above=True),
    )
    isa: str | None = make_option(
        None,
        help="limit the runtime to an older CPU's instructions while it is measured (openvino)",
        group=AUTO,
        choices=tuple(ISAS),
        what="instruction set",
    )

    ray: str | None = make_option(
        None,
        help="calibrate with Ray, and let it answer --eval-data for auto: on the cluster at ADDRESS"
        " (HOST:PORT, or auto inside it), or with one worker a core of this machine",
        group=CLUSTER,
        metavar="ADDRESS",
        bare=LOCAL,
    )
    answers: str | None = make_option(
        None,
        help="with --ray and auto: keep the answers to --eval-data here, as Parquet; a run that was"
        " interrupted goes on with them",
        group=CLUSTER,
        metavar="DIR",
    )
    workers: int | None = make_option(
        None,
        help="with --ray: largest number of workers (default: one a core)",
        group=CLUSTER,
        range=WORKERS,
    )
    ray_wait: float | None = make_option(
        None,
        help=f"with --ray: how long to wait for a cluster that has no free cores (default {WAIT_S:g})",
        group=CLUSTER,
        metavar="SECONDS",
        range=SECONDS,
    )

    def __post_init__(self) -> None:
        for name, value in fold_names(self).items():
            object.__setattr__(self, name, value)
        object.__setattr__(
            self,
            "format",
            FORMAT_ALIASES.get(self.format, self.format),
        )
