"""The images that calibrate int8 and that activations are observed on."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from cmt_edge.calib import CalibrationSet
from cmt_edge.calib.data import SYNTHETIC
from cmt_edge.calib.synthetic import choose_default_count, make_synthetic_set
from cmt_edge.cmt import compute_weights_fingerprint
from cmt_edge.deploy.files import find_cache_folder

from ..config import ExportConfig

ProgressCallback = Callable[[int, int], None]
"""Called with how many are done, and of how many."""

OBSERVED_IMAGES = 32
"""Number of images that activations are observed on; the ranges hardly grow with more, and
:data:`~cmt_edge.export.typed.SAFETY` covers the rest."""


def choose_images(config: ExportConfig) -> CalibrationSet | None:
    """The calibration images that were asked for; ``None`` without any, and for synthetic ones, which
    :func:`make_images` makes."""
    if config.data is None or config.data == SYNTHETIC:
        return None
    return CalibrationSet.choose(
        config.data,
        config.calib_size,
        config.preprocess,
        config.seed,
    )


def count_synthetic(config: ExportConfig) -> int:
    """How many synthetic images an export makes: those asked for, for fp16 never more than are observed."""
    count = choose_default_count(config.preprocess) if config.calib_size is None else config.calib_size
    return count if config.quantizes else min(count, OBSERVED_IMAGES)


def make_images(
    config: ExportConfig,
    classifier: nn.Module,
    count: int,
    progress: ProgressCallback,
) -> CalibrationSet:
    """``count`` images made from the batch norms of ``classifier``.

    Raises:
        InputError: the model has no batch norm with statistics of training.
    """
    return make_synthetic_set(
        classifier,
        count,
        config.preprocess,
        config.seed,
        weights=f"{config.model_name} {compute_weights_fingerprint(classifier)}",
        cache=find_cache_folder() / "synthetic" if config.uses_cache else None,
        progress=progress,
    )
