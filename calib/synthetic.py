"""Calibration images made from the model itself: every batch norm sees the statistics of its training data.

A batch norm keeps the mean and variance that each of its input channels had in training. Images are optimised
so that a batch of them has the same statistics (Cai et al., "ZeroQ", CVPR 2020; Yin et al., "Dreaming to
Distill" (DeepInversion), CVPR 2020, section 3.2; Haroush et al., "The Knowledge Within", CVPR 2020). They
start from the dead leaves of :mod:`cmt_edge.calib.generated`, not from noise, and end as 8-bit images that go
through the same preprocessing as photographs.

This is the only module of ``calib`` that needs torch; only the export imports it.
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
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from cmt_edge.deploy.bundle.sections import SynthesisEntry
from cmt_edge.deploy.cache import Cache, Files
from cmt_edge.deploy.errors import InputError, StepError
from cmt_edge.deploy.preprocessing import Preprocess, decode_pixels

from .data import SYNTHETIC, CalibrationSet
from .generated import generate

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
"""The modules that keep statistics of their training data."""

SYNTHETIC_COUNT = 64
"""Number of images unless another one is asked for; above 128 pixels half of it, because they take longer.

Ranges are means over images, and more images do not change them.
"""

STEPS = 20
"""Optimisation steps of each batch."""

LEARNING_RATE = 0.02
"""Of Adam, in pixel values from 0 to 1; it falls to 0 along a cosine."""

FALL = 1.5
"""The amplitude of what is added to an image falls with the frequency to this power."""

TIME_LIMIT_S = 240.0
"""Seconds after which no further step starts."""

IMAGE_SEED = 40
"""Seed of the images at the start; the seed that is asked for is added to it."""

CACHED_SETS = 10
"""Number of sets of images that the cache keeps; the oldest go first."""

VERSION = 1
"""Number of the algorithm, part of the cache's key."""

BATCH_PIXELS = 400_000
"""Pixels that a batch of images may have."""

SMALLEST_BATCH = 8
"""Least number of images in a batch, whatever their size: fewer have no useful statistics."""

LARGEST_BATCH = 50
"""Largest number of images in a batch, however small they are."""


@dataclass(frozen=True)
class Synthesis:
    """How the images were made, for the manifest.

    Attributes:
        seed: of the images at the start.
        steps: optimisation steps taken, of the batch with the fewest.
        steps_asked: optimisation steps asked for; more than ``steps`` where the time was up.
        loss_before: distance of the batch statistics from the model's (see :func:`synthesise`) at the start.
        loss_after: the same distance of the finished 8-bit images.
    """

    seed: int
    steps: int
    steps_asked: int
    loss_before: float
    loss_after: float

    @property
    def stopped_early(self) -> bool:
        """Whether the time was up before all steps were taken."""
        return self.steps < self.steps_asked


def choose_default_count(spec: Preprocess) -> int:
    """Number of images unless another one is asked for."""
    return SYNTHETIC_COUNT if spec.size <= 128 else SYNTHETIC_COUNT // 2


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
    """Images, uint8 ``(count, S, S, 3)``, whose statistics at the batch norms of ``model`` are those of its
    training data, and how they were made.

    The loss is the mean over batch norms of ``mean_c(((m - M) / S)^2 + (s / S - 1)^2)`` with mean ``m`` and
    deviation ``s`` of a batch's input, running mean ``M`` and deviation ``S``. Equal arguments give equal
    pixels with the same machine, torch and number of threads, unless the time ran out.

    Args:
        model: takes float32 ``(N, 3, S, S)``; it stays as it is.
        count: number of images.
        spec: the model's preprocessing.
        seed: of the first images.
        steps: optimisation steps of each batch.
        time_limit_s: seconds after which no further step starts.
        progress: called with steps done and their number.

    Raises:
        InputError: the model has no batch norm with statistics of training.
        StepError: the loss is not finite.
    """
    norms = require_statistics(model)
    batches = _make_starting_batches(count, spec, seed)
    distance = _Distance(model, norms, spec, batches[0][:1])
    begin, share = time.monotonic(), time_limit_s / len(batches)
    made = []
    for i, batch in enumerate(batches):
        tick = _make_tick(progress, i * steps, len(batches) * steps)
        deadline = begin + share * (i + 1)
        made.append(_synthesise_batch(distance, batch, steps, deadline, tick))
    return _join_images(made), _summarise(made, seed, steps)


def _join_images(made: list[_Batch]) -> np.ndarray:
    """All images, uint8 ``(count, S, S, 3)``."""
    images = torch.cat([batch.images for batch in made])
    return images.permute(0, 2, 3, 1).contiguous().numpy()


def _make_tick(
    progress: Callable[[int, int], None] | None,
    earlier: int,
    total: int,
) -> Callable[[int], None]:
    """A function that tells ``progress`` the steps of all batches, from the steps of one batch."""

    def tick(step: int) -> None:
        if progress is not None:
            progress(earlier + step, total)

    return tick


@dataclass(frozen=True)
class _Batch:
    """Finished images, uint8 ``(N, 3, S, S)``, and how they were made (see :class:`Synthesis`)."""

    images: Tensor
    steps: int
    loss_before: float
    loss_after: float


def _synthesise_batch(
    distance: _Distance,
    start: Tensor,
    steps: int,
    deadline: float,
    tick: Callable[[int], None],
) -> _Batch:
    before = distance.of(start)
    values, taken = _optimise(distance, start, steps, deadline, tick)
    images = values.mul(255).round().to(torch.uint8)
    return _Batch(images, taken, before, distance.of(images / 255))


def _summarise(batches: list[_Batch], seed: int, steps: int) -> Synthesis:
    """How all images were made; raises :class:`StepError` if a loss is not finite."""
    sizes = [len(batch.images) for batch in batches]
    before = _average([batch.loss_before for batch in batches], sizes)
    after = _average([batch.loss_after for batch in batches], sizes)
    if not (math.isfinite(before) and math.isfinite(after)):
        raise StepError(
            "synthetic images cannot be made: the statistics of the model's activations are not finite",
            remedy="check the weights; or calibrate with --data FOLDER or --data generated",
        )
    return Synthesis(
        seed,
        min(batch.steps for batch in batches),
        steps,
        before,
        after,
    )


def _average(losses: list[float], sizes: list[int]) -> float:
    """The mean over images of what is known of batches."""
    return float(np.average(losses, weights=sizes))


def _make_starting_batches(count: int, spec: Preprocess, seed: int) -> list[Tensor]:
    """Generated images as float32 ``(N, 3, S, S)`` with values from 0 to 1, in batches of nearly equal
    size."""
    encoded = generate(count, spec.size, seed=IMAGE_SEED + seed)
    decoded = [decode_pixels(blob, spec) for blob in encoded]
    images = torch.from_numpy(np.stack(decoded))
    values = images.permute(0, 3, 1, 2).float() / 255
    largest = max(SMALLEST_BATCH, min(LARGEST_BATCH, BATCH_PIXELS // spec.size**2))
    return list(torch.split(values, split_into_batches(count, largest)))


def split_into_batches(count: int, largest: int) -> list[int]:
    """Sizes of batches of at most ``largest`` for ``count`` images, as equal as possible."""
    parts = -(-count // largest)
    return [count // parts + (i < count % parts) for i in range(parts)]


def make_synthetic_set(
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
    """The images of :func:`synthesise` as a calibration set, made once for the same weights and settings.

    Args:
        weights: identifies the model and its weights, for the cache.
        cache: folder of the sets of images; ``None`` keeps none.
        model, count, spec, seed, steps, time_limit_s, progress: as for :func:`synthesise`, which also says
            what is raised.
    """
    require_statistics(model)

    def make() -> Made:
        images, how = synthesise(
            model,
            count,
            spec,
            seed,
            steps=steps,
            time_limit_s=time_limit_s,
            progress=progress,
        )
        return Made(images, how, cached=False)

    key = _make_cache_key(weights, count, spec, seed, steps, time_limit_s)
    made = make() if cache is None else _find_or_make(cache, key, count, spec, make)
    return convert_to_set(made, spec)


def _find_or_make(
    cache: Path,
    key: str,
    count: int,
    spec: Preprocess,
    make: Callable[[], Made],
) -> Made:
    """The images of an earlier run, or those that ``make`` gives now, which are kept."""
    shape = (count, spec.size, spec.size, 3)
    return Cache(cache, (".npz",), CACHED_SETS).get(
        key,
        decode=lambda files: _read_file(files[0], shape),
        make=make,
        encode=_convert_to_files,
    )


def _make_cache_key(
    weights: str,
    count: int,
    spec: Preprocess,
    seed: int,
    steps: int,
    time_limit_s: float,
) -> str:
    """The name of a set in the cache: whatever decides its pixels, hashed."""
    parts = [weights, count, spec, seed, steps, time_limit_s, LEARNING_RATE, FALL, VERSION]
    parts += [str(torch.__version__), np.__version__, PIL.__version__]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Made:
    """Images that were made from a model.

    Attributes:
        images: uint8 ``(count, S, S, 3)``.
        how: how they were made.
        cached: whether an earlier run made them.
    """

    images: np.ndarray
    how: Synthesis
    cached: bool


def _convert_to_files(made: Made) -> Files:
    buffer = io.BytesIO()
    np.savez(
        buffer,
        images=made.images,
        synthesis=json.dumps(asdict(made.how)),
    )
    return (buffer.getvalue(),)


def _read_file(content: bytes, shape: tuple[int, ...]) -> Made | None:
    """An entry of the cache; ``None`` where its images have another shape."""
    with np.load(io.BytesIO(content), allow_pickle=False) as stored:
        images, how = (
            stored["images"],
            Synthesis(**json.loads(str(stored["synthesis"]))),
        )
    if images.shape != shape or images.dtype != np.uint8:
        return None
    return Made(images, how, cached=True)


def require_statistics(model: nn.Module) -> list[BatchNorm]:
    """The batch norms of ``model`` that have statistics of training.

    Raises :class:`InputError` where there is none.
    """
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    trained = [norm for norm in norms if _has_statistics(norm)]
    if trained:
        return trained
    why = "it has no batch norm, and the images are made from the statistics of batch norms"
    if norms:
        why = f"its {len(norms)} batch norms hold no statistics of training (mean 0, variance 1)"
    raise InputError(
        "synthetic images cannot be made for this model",
        why=why,
        remedy="--data FOLDER with typical images, or --data generated",
    )


def _has_statistics(norm: BatchNorm) -> bool:
    mean, variance = norm.running_mean, norm.running_var
    if mean is None or variance is None:
        return False
    return not bool((mean == 0).all() and (variance == 1).all())


class _Distance:
    """The loss of :func:`synthesise`, on a copy of the model."""

    def __init__(
        self,
        model: nn.Module,
        norms: list[BatchNorm],
        spec: Preprocess,
        sample: Tensor,
    ) -> None:
        ids = {id(norm) for norm in norms}
        chosen = {name for name, module in model.named_modules() if id(module) in ids}
        self._model = copy.deepcopy(model).eval().requires_grad_(False)
        for name, module in self._model.named_modules():
            if name in chosen:
                module.register_forward_pre_hook(self._observe)
        self._mean = torch.tensor(spec.mean).reshape(1, 3, 1, 1)
        self._std = torch.tensor(spec.std).reshape(1, 3, 1, 1)
        self._terms: list[Tensor] = []
        self.layout = torch.channels_last  # the faster layout on CPUs
        try:
            self.of(sample)
        except RuntimeError:  # a model that takes views of its maps needs the other layout
            self.layout = torch.contiguous_format

    def __call__(self, values: Tensor) -> Tensor:
        """``(N, 3, S, S)`` in 0..1 -> scalar."""
        self._terms = []
        normalised = (values - self._mean) / self._std
        self._model(normalised.contiguous(memory_format=self.layout))
        terms, self._terms = self._terms, []
        return torch.stack(terms).mean()

    def of(self, values: Tensor) -> float:
        """The value alone."""
        with torch.no_grad():
            return float(self(values))

    def _observe(self, norm: BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        assert norm.running_mean is not None
        assert norm.running_var is not None
        all_but_channels = [d for d in range(x.ndim) if d != 1]
        variance, mean = torch.var_mean(x, all_but_channels, correction=0)
        expected = (norm.running_var + norm.eps).sqrt()
        shift = (mean - norm.running_mean) / expected
        spread = (variance + norm.eps).sqrt() / expected
        term = shift.square() + (spread - 1).square()
        self._terms.append(term.mean())


def _optimise(
    distance: _Distance,
    start: Tensor,
    steps: int,
    deadline: float,
    tick: Callable[[int], None],
) -> tuple[Tensor, int]:
    """Images ``(N, 3, S, S)`` with values from 0 to 1, and the number of steps taken until the deadline.

    What is added to ``start`` is optimised as a spectrum in which fine detail weighs less, as in photographs
    (Olah et al., "Feature Visualization", Distill 2017, "preconditioning"). Optimised pixels turn into a
    grain that sets ranges of its own.
    """
    n, channels, size, _ = start.shape
    amplitude = _compute_amplitude(size)
    spectrum = torch.zeros(n, channels, *amplitude.shape, 2, requires_grad=True)
    adam = torch.optim.Adam([spectrum], lr=LEARNING_RATE)

    def values() -> Tensor:
        added = torch.fft.irfft2(
            torch.view_as_complex(spectrum) * amplitude,
            s=(size, size),
            norm="ortho",
        )
        image: Tensor = (start + added).clamp(0, 1)
        return image

    taken = 0
    while taken < steps and time.monotonic() < deadline:
        cosine = math.cos(math.pi * taken / steps)
        adam.param_groups[0]["lr"] = LEARNING_RATE * (1 + cosine) / 2
        adam.zero_grad()
        torch.autograd.backward(distance(values()))
        adam.step()
        taken += 1
        tick(taken)
    return values().detach(), taken


def _compute_amplitude(size: int) -> Tensor:
    """``(size, size // 2 + 1)``: 1 / frequency ** ``FALL``, of mean square 1."""
    rows = torch.fft.fftfreq(size)[:, None]
    columns = torch.fft.rfftfreq(size)[None]
    amplitude = torch.hypot(rows, columns).clamp_min(1 / size).pow(-FALL)
    return amplitude / amplitude.square().mean().sqrt()


def convert_to_set(made: Made, spec: Preprocess) -> CalibrationSet:
    """The images as a calibration set."""
    early = made.how.stopped_early
    story = SynthesisEntry(
        **asdict(made.how),
        stopped_early=early,
        cached=made.cached,
    )
    return CalibrationSet.of_blobs(
        SYNTHETIC,
        _encode(made.images, spec),
        story,
    )


def _encode(images: np.ndarray, spec: Preprocess) -> Iterator[bytes]:
    """PNGs that preprocessing turns into exactly ``images``: they have a frame, which the centre crop takes
    away."""
    edge = (spec.short_side or spec.size) - spec.size
    near = round(edge / 2)
    for image in images:
        buffer = io.BytesIO()
        framed = np.pad(
            image,
            ((near, edge - near), (near, edge - near), (0, 0)),
            mode="edge",
        )
        Image.fromarray(framed).save(buffer, "PNG", compress_level=1)
        yield buffer.getvalue()
