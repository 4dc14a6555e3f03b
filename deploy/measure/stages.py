"""What an answer consists of: decoding, resizing, inference."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..decoding import NamedBytes, decode_at_least
from ..predictor import Predictor
from ..preprocessing import make_least_size, normalise, resize
from .statistics import Latency, summarise

WARM_UP_CALLS = 2
"""Calls at the beginning that do not count."""


@dataclass(frozen=True)
class Stages:
    """Milliseconds of the parts of one answer, a batch at a time, one after the other in one thread.

    Attributes:
        decode: encoded images to pixels.
        resize: to the model's size, cropped, normalised, and laid out as the model reads them.
        infer: the runtime's inference, with the copies to and from the runtime.
    """

    decode: Latency
    resize: Latency
    infer: Latency


def measure_stages(
    predictor: Predictor,
    images: Sequence[tuple[bytes, str]],
    calls: int,
) -> Stages:
    """Time the parts of ``calls`` answers.

    Args:
        predictor: of the bundle.
        images: encoded images with what messages call each, which take turns.
        calls: number of answers.

    Raises:
        ImageError: an image cannot be decoded.
    """
    size = predictor.batch or 1
    times = []
    for call in range(calls + WARM_UP_CALLS):
        chosen = [images[(call * size + place) % len(images)] for place in range(size)]
        times.append(_time_parts(predictor, [NamedBytes(*image) for image in chosen]))
    decode, resizing, infer = (np.array(column) for column in zip(*times[WARM_UP_CALLS:], strict=True))
    return Stages(summarise(decode), summarise(resizing), summarise(infer))


def _time_parts(predictor: Predictor, images: Sequence[NamedBytes]) -> tuple[int, int, int]:
    """Nanoseconds of the three parts."""
    spec = predictor.spec
    begin = time.perf_counter_ns()
    decoded = [decode_at_least(image, spec.exif, least=make_least_size(spec, image)) for image in images]
    read = time.perf_counter_ns()
    pixels = [resize(found, spec, image) for found, image in zip(decoded, images, strict=True)]
    batch = normalise(np.stack(pixels), spec)
    made = time.perf_counter_ns()
    predictor.outputs(batch)
    return read - begin, made - read, time.perf_counter_ns() - made
