"""What an export is asked to do, checked before anything is loaded."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from cmt_edge.calib import DEFAULT, Recipe
from cmt_edge.calib.data import SYNTHETIC
from cmt_edge.cmt import model_spec
from cmt_edge.cmt.features import HEADS, require_head
from cmt_edge.cmt.spec import ModelSpec, check_size
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.errors import InputError, UnknownNameError, WeightsError
from cmt_edge.deploy.measure.isa import ISAS
from cmt_edge.deploy.measure.parity import MAX_DROP
from cmt_edge.deploy.preprocessing import RESAMPLING, Preprocess
from cmt_edge.deploy.tensorrt.engine import EngineOptions

FORMATS = {"onnx": ("fp32", "int8"), "openvino": ("fp32", "bf16", "int8"), "trt": ("fp32", "fp16", "int8")}
"""Format -> the precisions it can have."""
ALIASES = {"engine": "trt", "tensorrt": "trt"}
PRECISIONS = ("fp32", "fp16", "bf16", "int8", "auto")
AUTO_DROP = 0.3
"""Allowed drop of ``precision="auto"``, which has others to choose from; percentage points."""
OPSET = 20
"""Has GELU as one operation; the highest that TensorRT 10 and 11 parse completely."""


@dataclass(frozen=True)
class ExportConfig:
    """One export. Field names are the command line's flags with underscores.

    Attributes:
        model: a name of :func:`cmt_edge.cmt.list_models`.
        format: ``"onnx"`` (served by ONNX Runtime), ``"openvino"`` or ``"trt"`` (also ``"engine"``,
            ``"tensorrt"``).
        precision: ``"fp32"``, ``"fp16"`` (trt), ``"bf16"`` (openvino), ``"int8"``, or ``"auto"``: measure
            them here and take the fastest that passes, see :mod:`cmt_edge.export.auto.choose`.
        head: ``"logits"``, or ``"features"``: the stage maps of a hierarchical model, for detection and
            segmentation.
        weights: ``"pretrained"``, ``"random"``, or a checkpoint file.
        ema: which weights of a training checkpoint, see :func:`cmt_edge.cmt.load_weights`.
        fresh_head, resize_position_bias: allow a checkpoint of another class count or resolution.
        num_classes, imgsz: default: as published.
        labels: text file with one class name a line, in logit order.
        data: calibration images for int8: folder, ``ARCHIVE.tar[/FOLDER]``, ``"generated"``, or
            ``"synthetic"`` (made from the model's batch norms); for fp16, images whose activations decide
            what stays float32 (default: generated ones).
        calib_size: number of calibration images; default 300, or all where there are fewer; of synthetic ones
            64, above 128 pixels 32.
        eval_data: labelled images; top-1 of bundle and reference is measured on them.
        eval_limit: use only so many of them, evenly spread.
        by_order: match class folders to labels in sorted order.
        max_drop: allowed loss of top-1, percentage points; default: 1, ``"auto"``: 0.3.
        atol: allowed difference of golden logits; default by precision.
        batch: batch size of the graph; ``0`` accepts any.
        mean, std: of the red, green and blue values scaled to 0..1, as ``"0.5,0.5,0.5"``; default: the
            model's.
        crop_ratio: share of the short side that the centre crop keeps; ``0`` resizes to exactly the input
            size; default: the model's.
        exif: ``"apply"`` or ``"ignore"`` the orientation of photographs.
        threads: CPU threads for verification and measurement.
        seed: of random weights and of the choice of calibration images.
        build: trt only: build the engine here; without, the bundle is finished on the device by
            ``cmt-build``.
        device: trt only: number of the GPU to build on.
        workspace: trt only: GiB of scratch memory for the builder.
        output: folder in which the bundle's folder is made.
        cache: reuse calibrated graphs, synthetic images and measurements of earlier runs.
        keep_float: int8 only: groups of operations that stay float, as ``"stem,stages.0.attn"`` (``"auto"``
            names them).
        latency_budget: auto only: allowed median latency of one batch, milliseconds.
        time_budget: auto only: seconds after which nothing more is refined.
        isa: auto only: limit the runtime to the instructions of an older CPU while it is measured, a key of
            :data:`cmt_edge.deploy.measure.isa.ISAS`.
    """

    model: str
    format: str = "openvino"
    precision: str = "fp32"
    head: str = "logits"
    weights: str = "pretrained"
    ema: bool | None = None
    fresh_head: bool = False
    resize_position_bias: bool = False
    num_classes: int | None = None
    imgsz: int | None = None
    labels: str | None = None
    data: str | None = None
    calib_size: int | None = None
    eval_data: str | None = None
    eval_limit: int | None = None
    by_order: bool = False
    max_drop: float | None = None
    atol: float | None = None
    batch: int = 1
    mean: str | None = None
    std: str | None = None
    crop_ratio: float | None = None
    exif: str = "apply"
    threads: int | None = None
    seed: int = 0
    build: bool = True
    device: str | None = None
    workspace: float | None = None
    output: str = "."
    cache: bool = True
    keep_float: str | None = None
    latency_budget: float | None = None
    time_budget: float | None = None
    isa: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "format", ALIASES.get(self.format, self.format))

    @property
    def spec(self) -> ModelSpec:
        return model_spec(self.model)

    @property
    def img_size(self) -> int:
        return self.spec.img_size if self.imgsz is None else self.imgsz

    @property
    def classes(self) -> int:
        return self.spec.num_classes if self.num_classes is None else self.num_classes

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        return (
            [f"stage{i + 1}" for i in range(len(self.spec.strides))] if self.head == "features" else [LOGITS]
        )

    @property
    def allowed_drop(self) -> float:
        """Percentage points of top-1."""
        if self.max_drop is not None:
            return self.max_drop
        return AUTO_DROP if self.precision == "auto" else MAX_DROP

    @property
    def recipe(self) -> Recipe:
        names = (name.strip() for name in (self.keep_float or "").split(","))
        return replace(DEFAULT, keep_float=tuple(name for name in names if name))

    @property
    def preprocess(self) -> Preprocess:
        spec, size = self.spec, self.img_size
        ratio = spec.crop_ratio if self.crop_ratio is None else self.crop_ratio or None
        mean, std = (
            own if given is None else _triple(given)
            for given, own in ((self.mean, spec.mean), (self.std, spec.std))
        )
        return Preprocess(
            size, None if ratio is None else int(size / ratio), mean, std, self.exif, spec.interpolation
        )

    @property
    def name(self) -> str:
        """Folder name of the bundle: everything that distinguishes two builds of one checkpoint."""
        parts = [re.sub(r"[^\w.-]+", "_", self.model)]
        parts += [str(self.img_size)] if self.img_size != self.spec.img_size else []
        parts += ["features"] if self.head == "features" else []
        parts += [self.precision, self.format]
        parts += [] if self.batch == 1 else ["dynamic" if self.batch == 0 else f"b{self.batch}"]
        return "_".join(parts)

    @property
    def target(self) -> Path:
        return Path(self.output) / self.name

    @property
    def targets(self) -> list[Path]:
        """Every folder that the export may make."""
        precisions = FORMATS[self.format] if self.precision == "auto" else (self.precision,)
        return [replace(self, precision=precision).target for precision in precisions]

    def check(self) -> None:
        """Raise the first :class:`~cmt_edge.deploy.errors.InputError` among everything that can be known
        without loading."""
        _choice("format", self.format, (*FORMATS, *ALIASES))
        _choice("precision", self.precision, PRECISIONS)
        _choice("head", self.head, HEADS)
        _choice("EXIF policy", self.exif, ("apply", "ignore"))
        _at_least("--batch", self.batch, 0)
        for flag, value in (
            ("--calib-size", self.calib_size),
            ("--eval-limit", self.eval_limit),
            ("--threads", self.threads),
        ):
            _at_least(flag, 1 if value is None else value, 1)
        for flag, bound in (("--max-drop", self.allowed_drop), ("--atol", self.atol or 0.0)):
            if not bound >= 0:
                raise InputError(
                    f"{flag} {bound} is negative", remedy="give the allowed difference, 0 or more"
                )
        self._check_model()
        self._check_files()
        self._check_auto()
        self._check_pair()
        if self.precision == "int8" and self.data is None:
            raise InputError(
                "int8 needs calibration images",
                remedy=(
                    "--data FOLDER with images like those the model will see, "
                    "or --data generated if there are none"
                ),
            )
        if self.precision not in ("int8", "fp16", "auto") and (
            self.data is not None or self.calib_size is not None
        ):
            raise InputError(
                f"--data and --calib-size are for int8 calibration and fp16 ranges, not {self.precision}",
                remedy="leave them out; to measure accuracy use --eval-data",
            )
        if self.data == SYNTHETIC and self.weights == "random":
            raise InputError(
                "synthetic images need trained weights",
                why="they are made from the statistics that training left in the batch norms",
                remedy="--weights PATH or pretrained, or --data generated",
            )

    def _check_model(self) -> None:
        """Size, head, classes and preprocessing that the model can have."""
        spec = self.spec
        check_size(spec, self.img_size)
        _at_least("--num-classes", self.classes, 1)
        require_head(spec, self.head)
        if self.head != LOGITS and (self.eval_data is not None or self.labels is not None):
            raise InputError(
                "--eval-data and --labels are for classes, which feature maps do not have",
                remedy="leave them out, or use --head logits",
            )
        if min(self.preprocess.std) <= 0 or not 0 <= (self.crop_ratio or 0) <= 1:
            raise InputError(
                "--std must be above 0 and --crop-ratio 0 to 1", remedy="leave them out for the model's own"
            )
        if spec.interpolation not in RESAMPLING:
            raise InputError(
                f"{spec.name} resizes by {spec.interpolation!r}; known: {', '.join(RESAMPLING)}",
                remedy="change interpolation in the model's default_cfg",
            )
        fixed = spec.resize is not None and not self.resize_position_bias
        if self.weights == "pretrained" and self.img_size != spec.img_size and fixed:
            raise InputError(
                f"the pretrained weights of {self.model} are for {spec.img_size} pixels, not {self.img_size}",
                remedy="--resize-position-bias to interpolate them, then check the accuracy",
            )

    def _check_auto(self) -> None:
        """Settings of ``auto`` and what it needs."""
        given = [
            flag
            for flag, value in (
                ("--latency-budget", self.latency_budget),
                ("--time-budget", self.time_budget),
                ("--isa", self.isa),
            )
            if value is not None
        ]
        if self.precision != "auto" and given:
            raise InputError(
                f"{' and '.join(given)}: only --precision auto measures and chooses",
                remedy="leave it out, or use --precision auto",
            )
        if self.precision != "int8" and self.keep_float is not None:
            raise InputError(
                f"--keep-float is for int8, not {self.precision}",
                remedy="leave it out, or use --precision int8",
            )
        if self.precision != "auto":
            return
        if self.format == "trt":
            raise InputError(
                "--precision auto measures on this machine, but TensorRT engines run on their device",
                remedy=(
                    "export fp16 and int8 with --no-build, then cmt-build and cmt-bench both on the device"
                ),
            )
        if self.head != LOGITS:
            raise InputError(
                "--precision auto judges by classes, which feature maps do not have",
                remedy=(
                    "let it choose for --head logits, then export the maps with that --precision and"
                    " --keep-float"
                ),
            )
        if self.data is None:
            raise InputError(
                "auto needs calibration images, for its int8 candidates",
                remedy=(
                    "--data FOLDER with images like those the model "
                    "will see; add --eval-data with labelled ones to judge by top-1"
                ),
            )
        for flag, value in (("--latency-budget", self.latency_budget), ("--time-budget", self.time_budget)):
            if value is not None and not value > 0:
                raise InputError(
                    f"{flag} {value:g} is not above 0",
                    remedy="give milliseconds (latency) or seconds (time), or leave it out",
                )
        if self.isa is not None:
            _choice("instruction set", self.isa, tuple(ISAS))
            if self.format != "openvino":
                raise InputError(
                    "--isa needs --format openvino: ONNX Runtime asks the CPU itself and has no switch"
                    " for it",
                    remedy="leave --isa out, or use --format openvino",
                )

    def _check_pair(self) -> None:
        """Formats and precisions that do not go together, and settings of another format."""
        if self.precision != "auto" and self.precision not in FORMATS[self.format]:
            why = {
                "onnx": "ONNX Runtime computes in it on no CPU",
                "openvino": "OpenVINO computes in it on no CPU",
                "trt": "its typed graphs are fp32, fp16 or int8",
            }[self.format]
            others = [f for f, known in FORMATS.items() if self.precision in known]
            raise InputError(
                f"--format {self.format} has no {self.precision}: {why}",
                remedy=(
                    f"--format {' or '.join(others)}, or --precision"
                    f" {' or '.join(reversed(FORMATS[self.format]))}"
                ),
            )
        given = [
            flag
            for flag, value in (
                ("--no-build", not self.build),
                ("--workspace", self.workspace),
                ("--device", self.device),
            )
            if value
        ]
        if self.format != "trt" and given:
            raise InputError(
                f"{' and '.join(given)}: only --format trt builds engines",
                remedy="leave it out, or use --format trt",
            )
        if self.format == "trt":
            EngineOptions(self.workspace).check()

    def _check_files(self) -> None:
        if self.weights not in ("pretrained", "random") and not Path(self.weights).is_file():
            raise WeightsError(
                "no such checkpoint file",
                where=self.weights,
                remedy="check the path; or use --weights pretrained or random",
            )
        self.read_labels()

    def read_labels(self) -> list[str] | None:
        """The names in the labels file, ``None`` without one; raises :class:`InputError`."""
        if self.labels is None:
            return None
        try:
            lines = Path(self.labels).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise InputError(
                "the labels file cannot be read",
                where=self.labels,
                why=exc,
                remedy="give a text file with one class name a line",
            ) from exc
        names = [line.strip() for line in lines if line.strip()]
        self.require_labels(names, self.labels)
        return names

    def require_labels(self, names: Sequence[str], where: str) -> None:
        """Raise :class:`InputError` unless ``names`` are one distinct name a class."""
        if len(names) != self.classes or len(set(names)) != len(names):
            raise InputError(
                f"{len(names)} labels ({len(set(names))} different) for {self.classes} classes",
                where=where,
                remedy=f"one distinct name a class; or --num-classes {len(names)}",
            )

    @classmethod
    def from_mapping(cls, values: dict[str, Any], where: object = None) -> ExportConfig:
        """From a configuration file's content; keys are field names or flags. Raises :class:`InputError`."""
        known = {f.name for f in fields(cls)}
        hints = get_type_hints(cls)
        clean: dict[str, Any] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in known:
                raise UnknownNameError(
                    "setting", key, difflib.get_close_matches(name, known, n=2), sorted(known)
                )
            kinds = get_args(hints[name]) or (hints[name],)
            if type(value) not in (*kinds, int if float in kinds else None):
                names = " or ".join(k.__name__ for k in kinds if k is not type(None))
                raise InputError(
                    f"{key} = {value!r} should be {names}", where=where, remedy="correct the file"
                )
            clean[name] = value
        if "model" not in clean:
            raise InputError(
                "no model was named", where=where, remedy="--model NAME; cmt-export --list-models prints them"
            )
        return cls(**clean)


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a TOML file; raises :class:`InputError`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise InputError(
            "the configuration file cannot be read", where=path, why=exc, remedy="it must be TOML"
        ) from exc


def _choice(kind: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UnknownNameError(kind, value, difflib.get_close_matches(value, known, n=2, cutoff=0.4), known)


def _triple(text: str) -> tuple[float, float, float]:
    """``"r,g,b"`` as numbers; raises :class:`InputError`."""
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError as exc:
        raise InputError(
            f"{text!r} is not three numbers", remedy="give red, green and blue: 0.485,0.456,0.406"
        ) from exc
    return red, green, blue


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{flag} {value} is too small", remedy=f"give {least} or more")
