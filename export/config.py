"""What an export is asked to do, checked before anything is loaded, and what follows from it."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from cmt_edge.calib import DEFAULT, Recipe
from cmt_edge.calib.data import SYNTHETIC
from cmt_edge.cmt import find_model
from cmt_edge.cmt.described import Description, describe_by_shapes, describe_checkpoint
from cmt_edge.cmt.features import require_head
from cmt_edge.cmt.outside import is_outside
from cmt_edge.cmt.spec import CPU, RTX, ModelSpec, check_size
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.bundle.record import find_text_fault
from cmt_edge.deploy.bundle.sections import AUTO_PRECISIONS, FORMATS, TYPED_FORMATS
from cmt_edge.deploy.bundle.signature import read_private_key
from cmt_edge.deploy.cache import is_cache_wanted
from cmt_edge.deploy.cli.ranges import CLASS_COUNTS, parse_finite
from cmt_edge.deploy.errors import InputError, WeightsError
from cmt_edge.deploy.escaping import SHOWN_CHARACTERS
from cmt_edge.deploy.measure.parity import MAX_DROP
from cmt_edge.deploy.preprocessing import MAX_SHORT_SIDE, RESAMPLING, Preprocess

from .labels import read_class_names
from .options import (
    check_values,
    list_changed_flags,
    read_defaults,
    read_mapping,
    require_choice,
    require_range,
)
from .settings import AUTO, AUTO_DROP, TENSORRT, Settings

OPSET = 20
"""Version of ONNX's operations: it has GELU as one operation, and it is the highest that TensorRT 10 and 11
parse completely."""
NAMED_WEIGHTS = ("pretrained", "random")
"""Weights that are not a checkpoint file."""
LONGEST_NAME = 200
"""Bytes of the longest name of a bundle's folder. File systems allow 255, and while the bundle is written the
name is longer."""
NOT_COMPUTED = {
    "onnx": "ONNX Runtime computes in it on no CPU",
    "trt": "its typed graphs are fp32, fp16 or int8",
    "rtx": "its typed graphs are fp32, fp16 or int8",
}
"""Format -> why it lacks a precision that others have."""
COMPUTE_CAPABILITIES = ("75", "80", "86", "89", "120", "121")
"""Compute capabilities that TensorRT for RTX 1.4 to 1.7 builds for, without the point."""


@dataclass(frozen=True)
class ExportConfig(Settings):
    """One export.

    The fields are the command line's flags with underscores; :class:`~cmt_edge.export.settings.Settings` and
    ``docs/cli.md`` say what each means. Only ``model`` has no default.

    >>> ExportConfig("cmt_nano", format="onnx", precision="int8", data="generated").folder
    'cmt_nano_int8_onnx'

    The model may also be a module object, which is copied and stays as it is. Its bundle cannot name it, so
    ``verify`` needs it again.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> config = ExportConfig(model=net, imgsz=64, labels=["cat", "dog"], mean=(0.5, 0.5, 0.5), std=(1, 1, 1))
    >>> config.folder
    'Sequential_fp32_openvino'
    >>> bundle = export(config)                                                             # doctest: +SKIP
    >>> verify(bundle, data=ImageSet("photos/test"), trusted_model=net)                     # doctest: +SKIP
    """

    @property
    def subject(self) -> str | nn.Module:
        """The model's name, or the module object.

        Raises:
            InputError: ``model`` is neither.
        """
        if isinstance(self.model, (str, nn.Module)):
            return self.model
        raise InputError(
            f"the model is a {type(self.model).__name__}, not a name and not a torch.nn.Module",
            remedy="give the name of a model, or the module object itself",
        )

    @cached_property
    def spec(self) -> ModelSpec:
        """The model's entry in the registry."""
        return find_model(self.subject, self.imgsz)

    @property
    def model_name(self) -> str:
        """What the model is called: in the registry, in Python, or by the class of a module object."""
        return self.spec.name

    @property
    def img_size(self) -> int:
        """Input height and width, pixels."""
        return self.spec.img_size if self.imgsz is None else self.imgsz

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.spec.num_classes if self.num_classes is None else self.num_classes

    @property
    def outputs(self) -> list[str]:
        """Names of the graph's outputs."""
        if self.head != "features":
            return [LOGITS]
        return [f"stage{i + 1}" for i in range(len(self.spec.strides))]

    @property
    def allowed_drop(self) -> float:
        """Allowed loss of top-1, percentage points."""
        if self.max_drop is not None:
            return self.max_drop
        return AUTO_DROP if self.precision == "auto" else MAX_DROP

    @property
    def kept_float(self) -> tuple[str, ...]:
        """Names in ``keep_float``."""
        names = (name.strip() for name in (self.keep_float or "").split(","))
        return tuple(name for name in names if name)

    @property
    def recipe(self) -> Recipe:
        """What stays float in int8."""
        return replace(DEFAULT, keep_float=self.kept_float)

    @property
    def is_typed(self) -> bool:
        """Whether the precision is written into the graph."""
        return self.has_engine or self.is_for_other_device

    @property
    def has_engine(self) -> bool:
        """Whether one of NVIDIA's compilers makes an engine of the graph."""
        return self.format in TYPED_FORMATS

    @property
    def is_for_other_device(self) -> bool:
        """Whether the bundle is for a device that this machine need not have: OpenVINO's fp16 is for GPUs and
        NPUs."""
        return self.format == "openvino" and self.precision == "fp16"

    @property
    def rewriting_target(self) -> str:
        """What the exact rewrites are chosen for."""
        return RTX if self.format == "rtx" else CPU

    @property
    def compute(self) -> tuple[str, ...]:
        """Compute capabilities that the engine is built for, without the point; empty for a portable one."""
        if self.compute_capability is None:
            return ()
        return tuple(part.strip().replace(".", "") for part in self.compute_capability.split(","))

    @property
    def quantizes(self) -> bool:
        """Whether an int8 graph is made."""
        return self.precision in ("int8", "auto")

    @property
    def verify_flags(self) -> list[str]:
        """Flags of ``cmt-verify`` that repeat the comparison of this export with its reference."""
        flags = ["--data", self.eval_data] if self.eval_data else []
        flags += ["--by-order"] if self.by_order else []
        flags += ["--limit", str(self.eval_limit)] if self.eval_limit else []
        flags += ["--weights", self.weights] if self.weights not in NAMED_WEIGHTS else []
        flags += ["--reference-model", self.model_name] if is_outside(self.model_name) else []
        flags += ["--max-drop", f"{self.max_drop:g}"] if self.max_drop is not None else []
        return flags + (["--atol", f"{self.atol:g}"] if self.atol is not None else [])

    @property
    def uses_cache(self) -> bool:
        """Whether results of earlier exports may be used, and those of this one kept."""
        return is_cache_wanted(self.cache)

    @property
    def keeps_results(self) -> bool:
        """Whether something that took long is kept for the next export."""
        engine = self.format == "trt" and self.build  # rtx keeps no timings
        return self.uses_cache and (self.quantizes or self.data == SYNTHETIC or engine)

    @property
    def preprocess(self) -> Preprocess:
        """The model's preprocessing, with what was asked to differ."""
        spec, size = self.spec, self.img_size
        ratio = spec.crop_ratio if self.crop_ratio is None else self.crop_ratio or None
        return Preprocess(
            size,
            None if ratio is None else int(size / ratio),
            spec.mean if self.mean is None else _parse_triple(self.mean),
            spec.std if self.std is None else _parse_triple(self.std),
            self.exif,
            spec.interpolation,
        )

    @property
    def folder(self) -> str:
        """Name of the bundle's folder: everything that distinguishes two builds of one checkpoint."""
        parts = [self.name or _make_folder_name(self.model_name)]
        if self.img_size != self.spec.img_size:
            parts.append(str(self.img_size))
        if self.head == "features":
            parts.append("features")
        parts += [self.precision, self.format]
        if self.batch != 1:
            parts.append("dynamic" if self.batch == 0 else f"b{self.batch}")
        return "_".join(parts)

    @property
    def target(self) -> Path:
        """The bundle's folder."""
        return Path(self.output) / self.folder

    @property
    def signing_key(self) -> Path | None:
        """File of the private key that signs the bundle, if one shall."""
        return None if self.sign is None else Path(self.sign)

    @property
    def targets(self) -> list[Path]:
        """Every folder that the export may make."""
        precisions = AUTO_PRECISIONS[self.format] if self.precision == "auto" else (self.precision,)
        return [replace(self, precision=precision).target for precision in precisions]

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: object = None) -> ExportConfig:
        """From a settings file's content; keys are field names or flags.

        Raises:
            UnknownNameError: a key is no option.
            InputError: a value has the wrong type, or no model was named.
        """
        found = read_mapping(values, cls, where)
        found = _describe_by_weights(found) | found
        found = find_settings_by_shapes(found) | found
        if "model" not in found:
            silent = found.get("weights", "pretrained") not in NAMED_WEIGHTS
            raise InputError(
                "no model was named",
                where=where,
                why=f"{found['weights']} does not say which model it belongs to" if silent else None,
                remedy="--model NAME; cmt-export --list-models prints them",
            )
        return cls(**found)

    def named(self, precision: str, keep_float: Sequence[str]) -> ExportConfig:
        """The export of one precision that ``auto`` chose."""
        quantizes = precision == "int8"
        return replace(
            self,
            precision=precision,
            keep_float=",".join(keep_float) or None,
            max_drop=self.allowed_drop,
            data=self.data if quantizes else None,
            calib_size=self.calib_size if quantizes else None,
            **read_defaults(type(self), AUTO),
        )

    # --- checks ---

    def check(self) -> None:
        """Raise the first :class:`~cmt_edge.deploy.errors.InputError` among everything that can be known
        without loading."""
        check_values(self)
        self._check_model()
        self._check_preprocessing()
        self._check_name()
        self._check_files()
        self._check_auto_options()
        self._check_auto()
        self._check_pair()
        self._check_data()

    def _check_model(self) -> None:
        """Size, head and classes that the model can have."""
        spec = self.spec
        check_size(spec, self.img_size)
        require_range("--num-classes", self.classes, CLASS_COUNTS)
        require_head(spec, self.head)
        if self.head != LOGITS and (self.eval_data is not None or self.labels is not None):
            raise InputError(
                "--eval-data and --labels are for classes, which feature maps do not have",
                remedy="leave them out, or use --head logits",
            )
        fixed = spec.resize is not None and not self.resize_position_bias
        if self.weights == "pretrained" and self.img_size != spec.img_size and fixed:
            raise InputError(
                f"the pretrained weights of {spec.name} are for {spec.img_size} pixels, not {self.img_size}",
                remedy="--resize-position-bias to interpolate them, then check the accuracy",
            )

    def _check_preprocessing(self) -> None:
        """Values and the filter that preprocessing can use."""
        if self.crop_ratio and self.img_size / self.crop_ratio > MAX_SHORT_SIDE:
            raise InputError(
                f"--crop-ratio {self.crop_ratio:g} would resize images to more than {MAX_SHORT_SIDE} pixels",
                remedy="give the share of the short side that the crop keeps, 0.875 for instance",
            )
        if min(self.preprocess.std) <= 0:
            raise InputError(
                "--std must be above 0",
                remedy="leave it out for the model's own",
            )
        if self.spec.interpolation not in RESAMPLING:
            raise InputError(
                f"{self.spec.name} resizes by {self.spec.interpolation!r}; known: {', '.join(RESAMPLING)}",
                remedy="change interpolation in the model's default_cfg",
            )

    def _check_name(self) -> None:
        """A name that is one part of a path, on every system, and shows in a listing."""
        if self.name is not None and not re.fullmatch(r"\w[\w.-]*", self.name):
            raise InputError(
                f"--name {self.name!r} is not the name of a folder",
                remedy="use letters, digits, '_', '-' and '.'; -o DIR says where the folder is made",
            )
        if len(self.folder.encode()) > LONGEST_NAME:
            raise InputError(
                f"the bundle's folder would have a name of {len(self.folder.encode())} bytes",
                remedy=f"give a --name that is short enough: {LONGEST_NAME} bytes in all",
            )

    def _check_files(self) -> None:
        """Files that exist and can be read."""
        if self.weights not in NAMED_WEIGHTS and not Path(self.weights).is_file():
            raise WeightsError(
                "no such checkpoint file",
                where=self.weights,
                remedy="check the path; or use --weights pretrained or random",
            )
        if self.signing_key is not None:
            read_private_key(self.signing_key)
        self.read_labels()

    def _check_auto_options(self) -> None:
        """Options of ``auto`` only with it, and those of int8 only without."""
        flags = list_changed_flags(self, AUTO)
        if flags and self.precision != "auto":
            raise InputError(
                f"{' and '.join(flags)}: only --precision auto measures and chooses",
                remedy="leave it out, or use --precision auto",
            )
        if self.keep_float is not None and self.precision != "int8":
            raise InputError(
                f"--keep-float is for int8, not {self.precision}",
                remedy="leave it out, or use --precision int8",
            )

    def _check_auto(self) -> None:
        """What ``auto`` needs."""
        if self.precision != "auto":
            return
        if self.format == "rtx":
            self._check_auto_by_compiler()
        if self.format == "trt":
            raise InputError(
                "--precision auto measures on this machine, but TensorRT engines run on their device",
                remedy="export fp16 and int8 with --no-build, then cmt-build and cmt-bench both on the"
                " device",
            )
        if self.head != LOGITS:
            raise InputError(
                "--precision auto judges by classes, which feature maps do not have",
                remedy="let it choose for --head logits, then export the maps with that --precision and"
                " --keep-float",
            )
        if self.data is None:
            raise InputError(
                "auto needs calibration images, for its int8 candidates",
                remedy="--data FOLDER with images like those the model will see; add --eval-data with"
                " labelled ones to judge by top-1",
            )
        if self.isa is not None and self.format != "openvino":
            raise InputError(
                "--isa needs --format openvino: ONNX Runtime asks the CPU itself and has no switch for it",
                remedy="leave --isa out, or use --format openvino",
            )

    def _check_auto_by_compiler(self) -> None:
        """What a compiler cannot tell, and that it is asked."""
        flags = list_changed_flags(self, AUTO)
        if flags:
            raise InputError(
                f"{' and '.join(flags)}: auto measures nothing with --format rtx",
                why="it chooses by the kernels and bytes that the compiler reports",
                remedy="leave it out",
            )
        if not self.build:
            raise InputError(
                "--precision auto with --format rtx asks the compiler, which --no-build leaves out",
                remedy="leave --no-build out, or name a --precision",
            )

    def _check_pair(self) -> None:
        """A format that has the precision, and no options of another format."""
        known = FORMATS[self.format]
        if self.precision not in ("auto", *known):
            others = [name for name, precisions in FORMATS.items() if self.precision in precisions]
            raise InputError(
                f"--format {self.format} has no {self.precision}: {NOT_COMPUTED[self.format]}",
                remedy=f"--format {' or '.join(others)}, or --precision {' or '.join(reversed(known))}",
            )
        flags = list_changed_flags(self, TENSORRT)
        if flags and not self.has_engine:
            raise InputError(
                f"{' and '.join(flags)}: only --format trt or rtx builds engines",
                remedy="leave it out, or use --format trt or rtx",
            )
        self._check_compute()

    def _check_compute(self) -> None:
        """Compute capabilities that exist, and no GPU where none is used."""
        if self.format == "rtx" and self.device is not None:
            raise InputError(
                "--device: --format rtx builds without a GPU",
                remedy="leave it out; --compute-capability names the GPUs that the engine is for",
            )
        if self.format != "rtx" and self.compute_capability is not None:
            raise InputError(
                "--compute-capability is for --format rtx; TensorRT builds for the GPU of the machine",
                remedy="leave it out, or use --format rtx",
            )
        for name in self.compute:
            require_choice("compute capability", name, COMPUTE_CAPABILITIES)

    def _check_data(self) -> None:
        """Images where they are needed, and only there."""
        if self.precision == "int8" and self.data is None:
            raise InputError(
                "int8 needs calibration images",
                remedy="--data FOLDER with images like those the model will see, or --data generated if there"
                " are none",
            )
        unused = self.data is not None or self.calib_size is not None
        if unused and not (self.quantizes or self.precision == "fp16"):
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

    def read_labels(self) -> list[str] | None:
        """The names in the labels file, ``None`` without one; raises :class:`InputError`."""
        if self.labels is None:
            return None
        if not isinstance(self.labels, str):
            self.require_labels(self.labels, "labels")
            return list(self.labels)
        names = read_class_names(Path(self.labels)).names
        self.require_labels(names, self.labels)
        return list(names)

    def read_label_ids(self) -> list[str] | None:
        """The IDs of the classes in the labels file, which are their names where it has no others; ``None``
        without one. Raises as :meth:`read_labels` does."""
        if not isinstance(self.labels, str):
            return self.read_labels()
        return list(read_class_names(Path(self.labels)).ids)

    @property
    def labels_note(self) -> str:
        """What was left out of the names in the labels file, in words; empty if nothing was."""
        return read_class_names(Path(self.labels)).note if isinstance(self.labels, str) else ""

    @property
    def label_count(self) -> int:
        """Number of labels: one a class, and two for a single logit."""
        return 2 if self.classes == 1 else self.classes

    def require_labels(self, names: Sequence[str], where: str) -> None:
        """Raise :class:`InputError` unless ``names`` are one name a class; a single logit takes the name of
        the positive class alone, too.

        Two classes may have the same name: ImageNet has two cranes.
        """
        if len(names) not in (self.classes, self.label_count):
            raise InputError(
                f"{len(names)} labels for {self.label_count} classes",
                where=where,
                remedy=f"give one name a class, each on its own line; or --num-classes {len(names)}",
            )
        for name in names:
            if fault := find_text_fault(name):
                raise InputError(
                    f"the label {name[:SHOWN_CHARACTERS]!r} {fault}",
                    where=where,
                    remedy="correct the name",
                )


def _describe_by_weights(
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The settings that a checkpoint holds of its model: all where no model is named, and size and classes
    where the same one is. What is asked for goes first."""
    weights = settings.get("weights", "pretrained")
    if weights in NAMED_WEIGHTS or not Path(weights).is_file():
        return {}
    said = describe_checkpoint(Path(weights))
    if said.model is None or settings.get("model", said.model) != said.model:
        return {}
    return _convert_to_settings(said, settings)


def find_settings_by_shapes(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the only model that the shapes of a checkpoint's weights fit, where neither the
    settings nor the checkpoint name one; empty where no model fits.

    Raises:
        InputError: several models fit.
    """
    weights = settings.get("weights", "pretrained")
    if "model" in settings or weights in NAMED_WEIGHTS or not Path(weights).is_file():
        return {}
    if describe_checkpoint(Path(weights)).model is not None:
        return {}
    fitting = describe_by_shapes(Path(weights))
    if len(fitting) > 1:
        names = [str(said.model) for said in fitting]
        raise InputError(
            "no model was named",
            where=weights,
            why=f"its weights have the shapes of {' and of '.join(names)}",
            remedy=f"--model {' or --model '.join(names)}",
        )
    return _convert_to_settings(fitting[0], settings) if fitting else {}


def _convert_to_settings(said: Description, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a checkpoint, as settings; raises :class:`InputError` for a mean or a deviation that
    it gives and that cannot be used, unless ``settings`` give both."""
    if said.fault is not None and not {"mean", "std"} <= settings.keys():
        raise InputError(
            "the mean and standard deviation in the checkpoint cannot be used",
            where=settings["weights"],
            why=said.fault,
            remedy="give both, of values from 0 to 1: --mean R,G,B --std R,G,B",
        )
    known = {
        "model": said.model,
        "imgsz": said.img_size,
        "num_classes": said.num_classes,
        "mean": said.mean,
        "std": said.std,
    }
    return {name: value for name, value in known.items() if value is not None}


def _make_folder_name(model: str) -> str:
    """A model's name as part of the name of a folder, which is never hidden: ``./net.py:small`` gives
    ``net.py_small``."""
    visible = re.sub(r"^\.[./\\]*", "", model)
    return re.sub(r"[^\w.-]+", "_", visible)


def _parse_triple(given: str | Sequence[float]) -> tuple[float, float, float]:
    """``"r,g,b"`` or three numbers as floats; raises :class:`InputError`."""
    parts = given.split(",") if isinstance(given, str) else given
    try:
        red, green, blue = (parse_finite(str(part)) for part in parts)
    except (ValueError, TypeError, ArgumentTypeError) as exc:
        raise InputError(
            f"{given!r} is not three numbers",
            remedy="give red, green and blue: 0.485,0.456,0.406",
        ) from exc
    return red, green, blue
