"""What a checkpoint says of its model, as settings of an export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmt_edge.cmt.described import Description, describe_by_shapes, describe_checkpoint
from cmt_edge.deploy.errors import InputError

from .settings import NAMED_WEIGHTS


def describe_by_weights(
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


def _convert_to_settings(
    said: Description,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
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
