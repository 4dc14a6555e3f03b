"""What follows from the settings of an export: sizes, names, folders and labels."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from cmt_edge.calib import DEFAULT, Recipe
from cmt_edge.calib.data import GENERATED, SYNTHETIC
from cmt_edge.cmt import find_model
from cmt_edge.cmt.outside import OUTSIDE_FAMILIES, is_outside
from cmt_edge.cmt.spec import CPU, RTX, ModelSpec
from cmt_edge.deploy.bundle import LOGITS
from cmt_edge.deploy.bundle.record import find_text_fault
from cmt_edge.deploy.bundle.sections import AUTO_PRECISIONS, TYPED_FORMATS
from cmt_edge.deploy.cache import is_cache_wanted
from cmt_edge.deploy.cli.ranges import parse_finite
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.escaping import SHOWN_CHARACTERS
from cmt_edge.deploy.measure.parity import MAX_DROP
from cmt_edge.deploy.preprocessing import Preprocess
from cmt_edge.deploy.scale.places import hide_credentials

from .labels import read_class_names
from .settings import AUTO_DROP, NAMED_WEIGHTS, Settings

DOTTED = re.compile(r"^(\d+)\.(\d)$")
"""A compute capability with its point, ``8.6``."""


@dataclass(frozen=True)
class DerivedSettings(Settings):
    """The settings of an export with what follows from them; see
    :class:`cmt_edge.export.config.ExportConfig`."""

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
        parts = (self.keep_float or "").split(",")
        names = (name.strip() for name in parts)
        return tuple(name for name in names if name)

    @property
    def recipe(self) -> Recipe:
        """How int8 is calibrated, and what stays float."""
        return replace(
            DEFAULT,
            fits_16_bits=self.fits_16_bits,
            float_trunk=not self.has_engine,
            equalize=self.data != GENERATED,
            keep_float=self.kept_float,
        )

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
        parts = [part.strip() for part in self.compute_capability.split(",")]
        names = [DOTTED.sub(r"\1\2", part) for part in parts]
        return tuple(dict.fromkeys(names))

    @property
    def quantizes(self) -> bool:
        """Whether an int8 graph is made."""
        return self.precision in ("int8", "auto")

    @property
    def answers_elsewhere(self) -> bool:
        """Whether the workers of a cluster answer the labelled images for ``auto``."""
        measures = self.precision == "auto" and self.format != "rtx"
        return measures and self.ray is not None and self.eval_data is not None

    @property
    def computes_by_pairs(self) -> bool:
        """Whether the runtime needs pairs behind int8 layers: see :mod:`cmt_edge.calib.integer_layers`."""
        return self.quantizes and self.format == "onnx"

    @property
    def fits_16_bits(self) -> bool:
        """Whether int8 weights are rounded for processors without VNNI: :mod:`cmt_edge.calib.pair_sums`."""
        return self.quantizes and not self.has_engine

    @property
    def verify_flags(self) -> list[str]:
        """Flags of ``cmt-verify`` that repeat the comparison of this export with its reference."""
        flags = ["--data", hide_credentials(self.eval_data)] if self.eval_data else []
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
        takes_long = self.quantizes or self.data == SYNTHETIC or engine
        return self.uses_cache and (takes_long or self.keeps_trace)

    @property
    def keeps_trace(self) -> bool:
        """Whether the traced graph may be one of an earlier export (:mod:`cmt_edge.export.kept_traces`): of a
        model that is named in the registry."""
        is_named = isinstance(self.model, str) and self.spec.family not in OUTSIDE_FAMILIES
        return self.uses_cache and is_named

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
            self.decode,
            self.reducing_gap,
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
        if self.slim:
            parts.append("slim")
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
        if not isinstance(self.labels, str):
            return ""
        return read_class_names(Path(self.labels)).note

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
