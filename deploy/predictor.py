"""One API over every runtime: images in, labelled probabilities (or feature maps) out."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .backends import FORMATS, LoadOptions, Session, backend
from .backends.base import Binding, batch_limit
from .bundle import LOGITS, Bundle
from .errors import InputError
from .preprocessing import ImageLike, Preprocess, preprocess
from .stream import Stages, stream

DYNAMIC_CHUNK = 8
"""Images a call of a dynamic-batch model: bounds memory; larger batches gained nothing on CPUs."""
KEPT_BINDINGS = 4
"""Bound inputs of one size that a Predictor keeps for the next calls."""


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        logits: float32 ``(classes,)``.
        labels: class names in logit order.
        source: the path, where the image was given as one.
    """

    logits: np.ndarray
    labels: Sequence[str] = field(repr=False)
    source: str | None = None

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits, float32 ``(classes,)``."""
        e = np.exp(self.logits - self.logits.max())
        return e / e.sum()

    @property
    def label(self) -> str:
        """Name of the most probable class."""
        return self.labels[int(self.logits.argmax())]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The ``k`` most probable classes as ``(label, probability)``, best first; fewer where there are
        fewer classes."""
        p = self.probabilities
        return [(self.labels[i], float(p[i])) for i in np.argsort(-p, kind="stable")[: max(k, 0)]]


class Predictor:
    """A bundle, opened by one runtime. Thread-safe; a context manager.

    >>> with Predictor.load("cmt_nano_int8_openvino") as p:
    ...     p("ship.jpg").top(3)
    """

    def __init__(
        self,
        session: Session,
        preprocess: Preprocess,
        labels: Sequence[str],
        *,
        batch: int = 1,
        head: str = LOGITS,
    ) -> None:
        """``batch``: the fixed batch size of ``session``, ``0`` if any size goes. Most callers want
        :meth:`load`."""
        self.session, self.spec, self.labels, self.batch, self.head = (
            session,
            preprocess,
            list(labels),
            batch,
            head,
        )
        self._closed, self._running, self._lock = False, 0, threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._bound: dict[int, list[Binding]] = {}  # by number of images; not in use now

    @classmethod
    def load(
        cls,
        path: str | Path | Bundle,
        *,
        backend: str | None = None,
        device: str | None = None,
        threads: int | None = None,
        throughput: bool = False,
        weights: str | Path | None = None,
    ) -> Predictor:
        """Open a bundle, checking every hash.

        Args:
            path: bundle folder.
            backend: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt"``, ``"torch"`` or ``"fake"``; default:
                the one of the bundle's format.
            device, threads, throughput, weights: see :class:`~cmt_edge.deploy.backends.base.LoadOptions`.

        Raises:
            BundleError: the bundle is damaged. RuntimeMissingError: the runtime or device is not here.
            UnknownNameError: no such backend. InputError: the runtime cannot run the bundle's precision.
        """
        bundle = path if isinstance(path, Bundle) else Bundle.open(path)
        name = backend or FORMATS.get(bundle.manifest.format, bundle.manifest.format)
        if threads is not None and threads < 1:
            raise InputError(
                f"{threads} threads were asked for", remedy="ask for 1 or more, or leave it out for all cores"
            )
        session = _backend(name).load(bundle, LoadOptions(device, threads, throughput, weights))
        fixed = 0 if name in ("torch", "fake") else batch_limit(bundle)
        return cls(session, bundle.preprocess, bundle.labels, batch=fixed, head=bundle.head)

    def __call__(self, image: ImageLike) -> Prediction:
        """Classify one image: path, encoded bytes, file object, Pillow image, or HWC uint8 RGB array."""
        self._require(LOGITS)
        binding = self._take(self.batch or 1)
        source = self._decode(image, binding.batch[0])
        logits = self._infer(binding, 1)[0]
        self._give(binding)
        return Prediction(logits, self.labels, source)

    def predict(self, images: Iterable[ImageLike]) -> list[Prediction]:
        """Classify several images; raises :class:`~cmt_edge.deploy.errors.ImageError` at the first that
        cannot be read."""
        return list(self.stream(images, workers=0, in_flight=1))

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """Preprocessed float32 ``(N, 3, H, W)`` -> float32 ``(N, classes)``; any ``N``, in the model's own
        batches.

        Raises:
            InputError: another dtype or shape, values that are not finite, or a bundle of feature maps.
        """
        self._require(LOGITS)
        return self.outputs(batch)[0]

    def features(self, batch: np.ndarray) -> list[np.ndarray]:
        """Preprocessed float32 ``(N, 3, H, W)`` -> the stage maps, float32 ``(N, C, H / stride, W /
        stride)``, finest first.

        Raises:
            InputError: as :meth:`logits`, or a bundle of a classifier.
        """
        self._require("features")
        return self.outputs(batch)

    def prepare(self, images: Iterable[ImageLike]) -> np.ndarray:
        """Decode, resize, crop and normalise: the float32 batch ``(N, 3, H, W)`` that :meth:`logits` and
        :meth:`features` take."""
        if not isinstance(images, Sequence):
            arrays = [preprocess(image, self.spec) for image in images]
            return np.stack(arrays) if arrays else self._rows(0)
        batch = self._rows(len(images))
        for image, row in zip(images, batch, strict=True):
            preprocess(image, self.spec, row)
        return batch

    def outputs(self, batch: np.ndarray) -> list[np.ndarray]:
        """What the model gives, whatever its head: see :meth:`logits` and :meth:`features`."""
        size = self.spec.size
        if (
            not isinstance(batch, np.ndarray)
            or batch.dtype != np.float32
            or batch.ndim != 4
            or batch.shape[1:] != (3, size, size)
        ):
            got = f"{batch.dtype} {batch.shape}" if isinstance(batch, np.ndarray) else type(batch).__name__
            raise InputError(
                f"expected a float32 array (N, 3, {size}, {size}), got {got}",
                remedy="preprocess images with cmt_edge.deploy.preprocessing, or pass them to predict()",
            )
        if not _finite(batch):
            raise InputError("the input holds NaN or infinite values", remedy="check how it was normalised")
        return self._run(batch)

    def stream(
        self, images: Iterable[ImageLike], *, workers: int = 2, in_flight: int | None = None
    ) -> Iterator[Prediction]:
        """Predictions in order, one by one: threads decode ahead while the runtime computes.

        ``images`` is read in the caller's thread, and only as far ahead as is worth it, so an endless
        iterable is fine: at most ``in_flight * batch + max(batch, 2 * workers)`` images are held (a dynamic
        batch counts as 8). Closing the stream, or leaving the loop, ends its threads.

        Args:
            images: as :meth:`predict`; may be endless.
            workers: threads that decode; ``0`` decodes in the caller's thread.
            in_flight: inferences at once; default: what the runtime gains from, which is 1 unless the bundle
                was loaded with ``throughput=True``.

        Raises:
            ImageError: an image cannot be read. Raised at its turn, after the predictions of all images
                before it, like errors of the runtime and of ``images`` itself.
            InputError: ``in_flight`` below 1, a closed Predictor, or a bundle of feature maps.
        """
        self._require(LOGITS)
        if in_flight is not None and in_flight < 1:
            raise InputError(
                f"{in_flight} inferences in flight were asked for",
                remedy="ask for 1 or more, or leave it out",
            )
        size = self.batch or DYNAMIC_CHUNK
        stages = Stages(size, self._decode, self._infer, lambda: self._take(size), self._give)
        several = in_flight or max(1, self.session.parallelism)
        for source, logits in stream(images, stages, workers=workers, in_flight=several):
            yield Prediction(logits, self.labels, source)

    def _decode(self, image: ImageLike, row: np.ndarray) -> str | None:
        """Preprocess into ``row``; the path, where the image is given as one."""
        preprocess(image, self.spec, row)
        return str(image) if isinstance(image, (str, Path)) else None

    def _infer(self, binding: Binding, count: int) -> np.ndarray:
        """Logits of the first ``count`` images."""
        if count == len(binding.batch):
            return self._counted(binding.run)[0]
        if not self.batch:
            return self._counted(self.session.run, binding.batch[:count])[0]
        binding.batch[count:] = 0
        return self._counted(binding.run)[0][:count]

    def _take(self, count: int) -> Binding:
        """The input of an inference of so many images, for one thread at a time."""
        try:
            return self._bound[count].pop()
        except LookupError:
            with self._lock:
                if self._closed:  # said in its turn, by the inference
                    return Binding(self._rows(count), list)
                return self.session.bind((count, 3, self.spec.size, self.spec.size))

    def _give(self, binding: Binding) -> None:
        kept = self._bound.setdefault(len(binding.batch), [])
        if len(kept) < KEPT_BINDINGS and not self._closed:
            kept.append(binding)

    def _rows(self, count: int) -> np.ndarray:
        return np.empty((count, 3, self.spec.size, self.spec.size), np.float32)

    def _require(self, head: str) -> None:
        if self.head != head:
            wanted, use = (
                ("classes", "features()") if head == LOGITS else ("feature maps", "logits() or predict()")
            )
            raise InputError(
                f"this bundle gives {self.head}, not {wanted}",
                remedy=f"use {use}, or export with --head {head}",
            )

    def _run(self, batch: np.ndarray) -> list[np.ndarray]:
        batch = np.ascontiguousarray(batch)
        if self.batch == 0 or len(batch) == self.batch:
            return self._counted(self.session.run, batch)
        if not len(batch):  # nothing to run, but the shapes are the model's
            return [output[:0] for output in self._padded(batch)]
        parts = [self._padded(batch[i : i + self.batch]) for i in range(0, len(batch), self.batch)]
        return [np.concatenate(output) for output in zip(*parts, strict=True)]

    def _padded(self, part: np.ndarray) -> list[np.ndarray]:
        """Run ``part``, at most one fixed batch; missing images are zeros whose answers are dropped."""
        missing = self.batch - len(part)
        full = np.concatenate([part, np.zeros((missing, *part.shape[1:]), np.float32)]) if missing else part
        return [output[: len(part)] for output in self._counted(self.session.run, full)]

    def _counted(self, infer: Callable[..., list[np.ndarray]], *batch: np.ndarray) -> list[np.ndarray]:
        """One inference, which :meth:`close` waits for."""
        with self._lock:
            if self._closed:
                raise InputError("this Predictor is closed", remedy="load the bundle again")
            self._running += 1
        try:
            return infer(*batch)
        finally:
            with self._lock:
                self._running -= 1
                if self._closed:
                    self._idle.notify_all()

    @property
    def info(self) -> dict[str, Any]:
        """Runtime, version and device."""
        return self.session.info

    def close(self) -> None:
        """Free the runtime's resources once running inferences are done. Further calls raise
        :class:`~cmt_edge.deploy.errors.InputError`."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: not self._running)
        self._bound.clear()
        self.session.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _finite(batch: np.ndarray) -> bool:
    """Whether no value is NaN or infinite; in one pass without a temporary, because small models take a
    millisecond."""
    with np.errstate(all="ignore"):
        total = np.add.reduce(batch, axis=None)
    return math.isfinite(total) or bool(np.isfinite(batch).all())  # finite values may have an infinite sum


_backend = backend  # `load` has a parameter of that name
