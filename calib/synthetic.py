"""Calibration images made from the model itself: optimised until what every batch norm sees looks like its
training data.

A batch norm keeps the mean and variance that each of its input channels had in training. Images are optimised
so that a batch of them has the same statistics (Cai et al., "ZeroQ", CVPR 2020; Yin et al., "Dreaming to
Distill" (DeepInversion), CVPR 2020, section 3.2; Haroush et al., "The Knowledge Within", CVPR 2020). They
start from the dead leaves of :mod:`cmt_edge.calib.generated`, not from noise, and end as 8-bit images that go
through the same preprocessing as photographs.

The only module of this package that needs torch; nothing here imports it but the export.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from cmt_edge.deploy.bundle.sections import SynthesisEntry
from cmt_edge.deploy.cache import Cache, Files
from cmt_edge.deploy.errors import InputError, StepError
from cmt_edge.deploy.images import digest
from cmt_edge.deploy.preprocessing import Preprocess, pixels

from .data import SYNTHETIC, CalibrationSet, fingerprint
from .generated import generate

DEFAULT_SIZE = 64
"""Images made unless told otherwise, half of it above 128 pixels for the time it takes; ranges are means over
images, and need no more."""
STEPS = 20
LEARNING_RATE = 0.02
"""Of Adam, in pixel values 0..1, falling to 0 along a cosine."""
FALL = 1.5
"""The amplitude of what is added to an image falls with the frequency to this power."""
TIME_LIMIT_S = 240.0
SEED = 40
CACHED_SETS = 10
"""So many sets of images are kept; the oldest go first."""
VERSION = 1
"""Of the algorithm; part of the cache's key."""

_BATCH_PIXELS, _SMALLEST_BATCH, _LARGEST_BATCH = 400_000, 8, 50


@dataclass(frozen=True)
class Synthesis:
    """How the images came about, for the manifest.

    Attributes:
        seed: of the images they started from.
        steps, steps_asked: of the optimisation; fewer where the time was up, then the least of all batches.
        loss_before, loss_after: distance of the batch statistics from the model's (:func:`synthesise`), of
            8-bit images.
    """

    seed: int
    steps: int
    steps_asked: int
    loss_before: float
    loss_after: float

    @property
    def stopped_early(self) -> bool:
        return self.steps < self.steps_asked


def default_size(spec: Preprocess) -> int:
    """How many images are made unless told otherwise."""
    return DEFAULT_SIZE if spec.size <= 128 else DEFAULT_SIZE // 2


def synthesise(
    model: nn.Module,
    count: int,
    spec: Preprocess,
    seed: int = 0,
    *,
    steps: int = STEPS,
    time_limit_s: float = TIME_LIMIT_S,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, Synthesis]:
    """Images whose statistics at the batch norms of ``model`` are those of its training data.

    The loss is the mean over batch norms of ``mean_c(((m - M) / S)^2 + (s / S - 1)^2)`` with mean ``m`` and
    deviation ``s`` of a batch's input, running mean ``M`` and deviation ``S``. Equal arguments give equal
    pixels on the same machine, torch and number of threads (float sums depend on these), unless the time ran
    out.

    Args:
        model: takes float32 ``(N, 3, S, S)``; not modified.
        count: number of images.
        spec: the model's preprocessing.
        seed: of the images to start from.
        steps: optimisation steps of each batch.
        time_limit_s: seconds after which no further step starts.
        progress: called with steps done and their number.

    Returns:
        ``(count, size, size, 3)`` uint8 and how they came about.

    Raises:
        InputError: the model has no batch norm with statistics of training.
        StepError: the loss is not finite.
    """
    norms = require_statistics(model)
    start = np.stack([pixels(blob, spec) for blob in generate(count, spec.size, seed=SEED + seed)])
    values = torch.from_numpy(start).permute(0, 3, 1, 2).float() / 255  # (N, 3, S, S)
    batches = values.split(
        _even(count, max(_SMALLEST_BATCH, min(_LARGEST_BATCH, _BATCH_PIXELS // spec.size**2)))
    )
    distance = _Distance(model, norms, spec, batches[0][:1])
    begin, made, taken, before, after = time.monotonic(), [], [], [], []
    for i, batch in enumerate(batches):
        before.append(distance.of(batch))
        deadline = begin + time_limit_s * (i + 1) / len(batches)
        tick = (
            None if progress is None else (lambda step, i=i: progress(i * steps + step, len(batches) * steps))
        )
        result, done = _optimise(distance, batch, steps, deadline, tick)
        made.append(result.mul(255).round().to(torch.uint8))
        taken.append(done)
        after.append(distance.of(made[-1] / 255))
    sizes = [len(b) for b in batches]
    losses = [float(np.average(all_, weights=sizes)) for all_ in (before, after)]
    if not all(map(math.isfinite, losses)):
        raise StepError(
            "synthetic images cannot be made: the statistics of the model's activations are not finite",
            remedy="check the weights; or calibrate with --data FOLDER or --data generated",
        )
    images = torch.cat(made).permute(0, 2, 3, 1).contiguous().numpy()
    return images, Synthesis(seed, min(taken), steps, *losses)


def synthetic_set(
    model: nn.Module,
    count: int,
    spec: Preprocess,
    seed: int = 0,
    *,
    weights: str,
    cache: Path | None = None,
    steps: int = STEPS,
    time_limit_s: float = TIME_LIMIT_S,
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationSet:
    """The images of :func:`synthesise` as a calibration set; made once for the same weights and settings.

    Args:
        weights: identifies the model and its weights, for the cache.
        cache: folder of sets of images.
        model, count, spec, seed, steps, time_limit_s, progress: as :func:`synthesise`, which also says what
            is raised.
    """
    require_statistics(model)

    def make() -> _Made:
        images, how = synthesise(
            model, count, spec, seed, steps=steps, time_limit_s=time_limit_s, progress=progress
        )
        return _Made(images, how, cached=False)

    if cache is None:
        return _as_set(make(), spec)
    parts = [weights, count, spec, seed, steps, time_limit_s, LEARNING_RATE, FALL, VERSION]
    parts += [metadata.version("torch"), metadata.version("numpy"), metadata.version("pillow")]
    shape = (count, spec.size, spec.size, 3)
    made = Cache(cache, (".npz",), CACHED_SETS).get(
        hashlib.sha256(repr(parts).encode()).hexdigest(),
        decode=lambda files: _from_file(files[0], shape),
        make=make,
        encode=_as_files,
    )
    return _as_set(made, spec)


@dataclass(frozen=True)
class _Made:
    """Images, uint8 ``(count, S, S, 3)``, how they were made, and whether that was in an earlier run."""

    images: np.ndarray
    how: Synthesis
    cached: bool


def _as_files(made: _Made) -> Files:
    buffer = io.BytesIO()
    np.savez(buffer, images=made.images, synthesis=json.dumps(asdict(made.how)))
    return (buffer.getvalue(),)


def _from_file(content: bytes, shape: tuple[int, ...]) -> _Made | None:
    """An entry of the cache; ``None`` where its images have another shape."""
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        images, how = stored["images"], Synthesis(**json.loads(str(stored["synthesis"])))
    if images.shape != shape or images.dtype != np.uint8:
        return None
    return _Made(images, how, cached=True)


def require_statistics(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms of ``model`` that training has given statistics; raises :class:`InputError` where there
    is none."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    trained = [m for m in norms if _has_statistics(m)]
    if not trained:
        why = (
            "it has no batch norm, whose statistics the images are made from"
            if not norms
            else (f"its {len(norms)} batch norms hold no statistics of training (mean 0, variance 1)")
        )
        raise InputError(
            "synthetic images cannot be made for this model",
            why=why,
            remedy="--data FOLDER with typical images, or --data generated",
        )
    return trained


def _has_statistics(norm: _BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    return mean is not None and variance is not None and not bool((mean == 0).all() and (variance == 1).all())


class _Distance:
    """The loss of :func:`synthesise`, on a copy of the model."""

    def __init__(self, model: nn.Module, norms: list[_BatchNorm], spec: Preprocess, sample: Tensor) -> None:
        chosen = {name for name, module in model.named_modules() if any(module is n for n in norms)}
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        for name, module in self._model.named_modules():
            if name in chosen:
                module.register_forward_pre_hook(self._observe)
        self._mean, self._std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in (spec.mean, spec.std))
        self._terms: list[Tensor] = []
        self.layout = torch.channels_last  # the faster one on CPUs
        try:
            self.of(sample)
        except RuntimeError:  # a model that takes views of its maps needs the other one
            self.layout = torch.contiguous_format

    def __call__(self, values: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in 0..1 -> scalar."""
        self._terms = []
        self._model(((values - self._mean) / self._std).contiguous(memory_format=self.layout))
        terms, self._terms = self._terms, []
        return torch.stack(terms).mean()

    def of(self, values: Tensor) -> float:
        """The value alone."""
        with torch.no_grad():
            return float(self(values))

    def _observe(self, norm: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        variance, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1], correction=0)
        expected = (norm.running_var + norm.eps).sqrt()
        shift, spread = (mean - norm.running_mean) / expected, (variance + norm.eps).sqrt() / expected
        self._terms.append((shift.square() + (spread - 1).square()).mean())


def _optimise(
    distance: _Distance, start: Tensor, steps: int, deadline: float, tick: Callable[[int], None] | None
) -> tuple[Tensor, int]:
    """``(N, 3, S, S)`` in 0..1, and the steps taken until the deadline.

    What is added to ``start`` is optimised as a spectrum in which fine detail weighs less, as in photographs
    (Olah et al., "Feature Visualization", Distill 2017, "preconditioning"). Optimised pixels turn into a
    grain that sets ranges of its own.
    """
    n, channels, size, _ = start.shape
    amplitude = _amplitude(size)
    spectrum = torch.zeros(n, channels, *amplitude.shape, 2, requires_grad=True)
    adam = torch.optim.Adam([spectrum], lr=LEARNING_RATE)

    def values() -> Tensor:
        added = torch.fft.irfft2(torch.view_as_complex(spectrum) * amplitude, s=(size, size), norm="ortho")
        return (start + added).clamp(0, 1)

    taken = 0
    while taken < steps and time.monotonic() < deadline:
        adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + math.cos(math.pi * taken / steps)) / 2
        adam.zero_grad()
        distance(values()).backward()
        adam.step()
        taken += 1
        if tick:
            tick(taken)
    return values().detach(), taken


def _amplitude(size: int) -> Tensor:
    """``(size, size // 2 + 1)``: 1 / frequency ** ``FALL``, of mean square 1."""
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size)[None]).clamp_min(
        1 / size
    )
    amplitude = frequency**-FALL
    return amplitude / amplitude.square().mean().sqrt()


def _even(count: int, largest: int) -> list[int]:
    """Sizes of batches of at most ``largest``, as equal as can be."""
    parts = -(-count // largest)
    return [count // parts + (i < count % parts) for i in range(parts)]


def _as_set(made: _Made, spec: Preprocess) -> CalibrationSet:
    blobs = tuple(_encoded(made.images, spec))
    early = made.how.stopped_early
    story = SynthesisEntry(**asdict(made.how), stopped_early=early, cached=made.cached)
    return CalibrationSet(SYNTHETIC, fingerprint(map(digest, blobs)), len(blobs), story, _blobs=blobs)


def _encoded(images: np.ndarray, spec: Preprocess) -> Iterator[bytes]:
    """PNGs of which preprocessing gives exactly ``images``: what the centre crop takes away is added around
    them."""
    edge = (spec.short_side or spec.size) - spec.size
    near = round(edge / 2)
    for image in images:
        buffer = io.BytesIO()
        framed = np.pad(image, ((near, edge - near), (near, edge - near), (0, 0)), mode="edge")
        Image.fromarray(framed).save(buffer, "PNG", compress_level=1)
        yield buffer.getvalue()
