"""The models that :mod:`which_model` compares: those of the registry, and the yardsticks of timm."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tomllib

YARDSTICKS = Path(__file__).with_name("which_model.toml")
"""The table of the yardsticks."""
EXTRA_DATA = "IN-22k"
"""What the source of a published figure says where the weights were first trained on more images."""
COUNTED = "; MACs and parameters counted on the official code"
"""What the source of a registry entry says of other figures than top-1."""


@dataclass(frozen=True)
class Subject:
    """One model.

    Attributes:
        name: as ``cmt-export --model`` takes it.
        label: in tables and plots.
        family: of the registry, ``"yardstick"`` for the others.
        imgsz: height and width of the input, pixels.
        top1: published ImageNet-1k top-1 in percent, ``None`` where none is published.
        source: of ``top1``.
        params: number of parameters, where the registry says it.
        macs: multiply-accumulates of an image, where the registry says it.
        extra_data: whether the weights of that figure saw more than ImageNet-1k.
    """

    name: str
    label: str
    family: str
    imgsz: int
    top1: float | None
    source: str
    extra_data: bool = False
    params: int | None = None
    macs: int | None = None

    @property
    def key(self) -> str:
        """The name as a part of file names."""
        return re.sub(r"[^\w.-]", "_", self.name)

    @property
    def is_ours(self) -> bool:
        """Whether the model is one of the registry."""
        return self.family != YARDSTICK


YARDSTICK = "yardstick"
"""The family of the models that are not in the registry."""


def read_yardsticks() -> list[Subject]:
    """The models of :data:`YARDSTICKS`."""

    content = tomllib.loads(YARDSTICKS.read_text(encoding="utf-8"))
    return [
        Subject(
            f"timm:{entry['name']}",
            entry["label"],
            YARDSTICK,
            entry["imgsz"],
            entry["top1"],
            entry["source"],
        )
        for entry in content[YARDSTICK]
    ]


def list_registry() -> list[Subject]:
    """Every model of the registry."""
    from cmt_edge.cmt import find_model, list_models

    return [
        Subject(
            spec.name,
            spec.name,
            spec.family,
            spec.img_size,
            None if spec.top1 is None else float(spec.top1),
            spec.source.replace(COUNTED, ""),
            EXTRA_DATA in spec.source,
            spec.params,
            spec.macs,
        )
        for spec in map(find_model, list_models())
    ]


def choose_subjects(names: Sequence[str]) -> list[Subject]:
    """All models, or those with a name among ``names``, in their order.

    Raises ``SystemExit`` for a name that is none.
    """
    known = {subject.name: subject for subject in [*list_registry(), *read_yardsticks()]}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"error: no such model: {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in names] or list(known.values())
