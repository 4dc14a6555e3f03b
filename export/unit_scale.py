"""Refuses a mean or a deviation of values from 0 to 255, as other libraries write them."""

from __future__ import annotations

from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.errors import InputError

GREY_LEVELS = 255
"""The largest value of a pixel before it is divided."""

MAX_MEAN = 1.0
"""A mean above this is no mean of values from 0 to 1."""

MAX_STD = 2.0
"""A deviation above this is none of values from 0 to 1, whose deviation is at most one half."""

MAX_RECIPROCAL = 0.03
"""A deviation of values from 0 to 1 is hardly ever below this; the reciprocals of grey levels are."""

LEAST_RECIPROCAL = 0.005
"""The least such reciprocal. A deviation of 1 / 255 leaves the values as they are in the file, and is
meant so."""


def require_unit_scale(spec: Preprocess) -> None:
    """Raise :class:`InputError` where ``spec`` normalises with a mean or deviation of values from 0 to 255.

    Values are from 0 to 1 here, so that no mean lies above 1 and no deviation above one half; a deviation of
    1 changes nothing.
    """
    if max(spec.mean) <= MAX_MEAN and max(spec.std) <= MAX_STD:
        _require_no_reciprocal(spec)
        _require_applicable(spec)
        return
    if _mixes_scales(spec.mean, MAX_MEAN) or _mixes_scales(spec.std, MAX_STD):
        raise InputError(
            f"mean {_format_list(spec.mean)} and std {_format_list(spec.std)} are not of values from 0 to 1",
            why="they mix two scales: some of them are of pixels from 0 to 1, others of pixels from 0 to 255",
            remedy="give --mean and --std of all three channels for pixels from 0 to 1",
        )
    mean = _describe_conversion(spec.mean, MAX_MEAN)
    std = _describe_conversion(spec.std, MAX_STD)
    raise InputError(
        f"mean {_format_list(spec.mean)} and std {_format_list(spec.std)} are not of values from 0 to 1",
        why="they look like those of values from 0 to 255; the pixels are divided by 255 first",
        remedy=f"give both of values from 0 to 1: --mean {mean} --std {std}",
    )


def _mixes_scales(values: tuple[float, float, float], most: float) -> bool:
    """Whether some of three values are of pixels from 0 to 1, the largest of which is ``most``, and others
    are not. A mean of 0 is one of either scale."""
    small = [value for value in values if value != 0 and value <= most]
    return bool(small) and max(values) > most


def _describe_conversion(values: tuple[float, float, float], most: float) -> str:
    """A mean or deviation of values from 0 to 1. It is divided by 255 where it is above ``most``; where it
    is the reciprocal of a deviation of values from 0 to 255, the deviation is worked out.

    The default, which is of values from 0 to 1 already, stays as it is.
    """
    if max(values) > most:
        red, green, blue = values
        values = (red / GREY_LEVELS, green / GREY_LEVELS, blue / GREY_LEVELS)
    elif most == MAX_STD and _looks_reciprocal(values):
        red, green, blue = values
        values = (
            1 / (red * GREY_LEVELS),
            1 / (green * GREY_LEVELS),
            1 / (blue * GREY_LEVELS),
        )
    return ",".join(f"{value:.5g}" for value in values)


def _looks_reciprocal(std: tuple[float, float, float]) -> bool:
    """Whether deviations look like 1 / 58.8: the factor that some libraries multiply grey levels with."""
    return all(LEAST_RECIPROCAL < value < MAX_RECIPROCAL for value in std)


def _require_no_reciprocal(spec: Preprocess) -> None:
    if not _looks_reciprocal(spec.std):
        return
    std = _describe_conversion(spec.std, MAX_STD)
    raise InputError(
        f"std {_format_list(spec.std)} looks like the reciprocal of a deviation of values from 0 to 255",
        why="a deviation of pixels from 0 to 1 is seldom below 0.03; 0.017 is 1 / 58.8",
        remedy=f"give the deviation of values from 0 to 1: --std {std}",
    )


def _require_applicable(spec: Preprocess) -> None:
    if fault := spec.fault():
        raise InputError(
            f"the preprocessing cannot be applied: {fault}",
            remedy="change --mean, --std, --imgsz or --crop-ratio, or leave them out for the model's own",
        )


def _format_list(values: tuple[float, float, float]) -> str:
    return ",".join(f"{value:g}" for value in values)
