"""What can be known to be wrong before even PyTorch is imported: values out of range, and paths that lead
nowhere. A user who mistyped one is told at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmt_edge.deploy.errors import InputError, WeightsError
from cmt_edge.deploy.scale.sources import require_place
from cmt_edge.startup import name_program

from .options import check_values
from .settings import MADE_IMAGES, NAMED_WEIGHTS, Settings

UNNAMED = "MODEL"
"""Stands for a model that no flag names: the checkpoint may say it."""


def take_first_look(given: Mapping[str, Any], where: object = None) -> None:
    """Raise the first error among what needs no import.

    Args:
        given: settings that were read from flags and a file, by their names.
        where: the file, for messages.

    Raises:
        FileNotFoundError: the current folder was deleted.
        InputError: no model was named, a value is empty, out of range or none of those known, or there is no
            such labels file.
        WeightsError: there is no such checkpoint.
        DataError: there is no such folder or archive of images.
    """
    Path.cwd()  # a folder that was deleted: PyTorch's libraries would end the process without a word of ours
    settings = Settings(**{"model": UNNAMED, **given})
    if settings.model == UNNAMED and settings.weights in NAMED_WEIGHTS:
        raise make_nameless_error(where)
    check_values(settings)
    require_checkpoint(settings.weights)
    if isinstance(settings.labels, str) and not Path(settings.labels).exists():
        raise InputError(
            "no such labels file", where=settings.labels, remedy="check the path given to --labels"
        )
    for place in (settings.data, settings.eval_data):
        if place is not None and place not in MADE_IMAGES and settings.ray is None:
            require_place(place)


def make_nameless_error(where: object = None, why: str | None = None) -> InputError:
    """The error where nothing names a model."""
    return InputError(
        "no model was named",
        where=where,
        why=why,
        remedy=f"--model NAME; {name_program('models')} prints them",
    )


def require_checkpoint(weights: str) -> None:
    """Raise :class:`WeightsError` where weights are a file that does not exist."""
    if weights not in NAMED_WEIGHTS and not Path(weights).is_file():
        raise WeightsError(
            "no such checkpoint file",
            where=weights,
            remedy="check the path; or use --weights pretrained or random",
        )
