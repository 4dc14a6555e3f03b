"""One API over every runtime: images in, labelled probabilities (or feature maps) out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .arrays import check_color
from .backends import (
    RUNTIME_OF_FORMAT,
    LoadOptions,
    Runtime,
    Session,
    get_runtime,
)
from .backends.base import make_open_error, read_batch_limit
from .bundle import LOGITS, Bundle
from .bundle.bundle import read_whole
from .bundle.sections import RanOn
from .cache import is_cache_wanted
from .decoding import ImageLike, list_images, take_snapshot
from .errors import BundleError, CmtEdgeError, ImageError, InputError
from .lanes import Lanes
from .locks import Hold
from .prediction import Prediction
from .preprocessing import Preprocess, preprocess
from .stream import stream
from .values import require_batch, require_finite, require_kind


@dataclass(frozen=True)
class Loading:
    """Where the time of :meth:`Predictor.load` went, in seconds.

    Attributes:
        opening: reading the manifest and hashing the files.
        importing: importing the runtime.
        compiling: compiling the model, or opening what an earlier start had compiled.
        is_from_cache: whether an earlier start had compiled the model.
    """

    opening: float
    importing: float
    compiling: float
    is_from_cache: bool


class Predictor:
    """A bundle, opened by one runtime. Thread-safe; a context manager.

    >>> with Predictor.load("cmt_nano_fp32_openvino") as p:
    ...     p("ship.jpg").label
    'ship'
    """

    def __init__(
        self,
        session: Session,
        preprocess: Preprocess,
        labels: Sequence[str],
        *,
        batch: int = 1,
        head: str = LOGITS,
        kind: str = LOGITS,
        color: str = "rgb",
        where: object = None,
    ) -> None:
        """``batch``: the fixed batch size of ``session``, ``0`` if it takes any. ``where``: the bundle, for
        messages. Most callers want :meth:`load`."""
        self.color = check_color(color)
        self.spec = preprocess
        self.labels = list(labels)
        self.head = head
        self.kind = kind
        self._where = where
        self.loading: Loading | None = None
        """How long :meth:`load` took; ``None`` for what was not loaded from a bundle."""
        self._hold: Hold | None = None  # keeps the folder of a packed bundle, which profiling opens again
        self.lanes = Lanes(session, batch, preprocess.size, where)
        """Run every inference."""

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
        trusted_model: object = None,
        trusted_engine: bool = False,
        cache: bool = True,
        color: str = "rgb",
        key: str | Path | None = None,
    ) -> Predictor:
        """Open a bundle and check the hash of every file.

        >>> predictor = Predictor.load("cmt_nano_fp32_openvino", threads=1)
        >>> len(predictor.labels), predictor.spec.size
        (10, 64)
        >>> predictor.close()

        Args:
            path: bundle folder.
            backend: name of a runtime: ``"openvino"``, ``"onnxruntime"``, ``"tensorrt"``, ``"torch"`` or
                ``"fake"``; default: the one of the bundle's format.
            device, threads, throughput, weights, trusted_model, trusted_engine: see
                :class:`~cmt_edge.deploy.backends.base.LoadOptions`.
            cache: take what an earlier start has compiled from the cache folder, and keep what is compiled
                now. The answers are the same bits. The environment variable ``CMT_EDGE_NO_CACHE=1`` says no
                for the whole process.
            color: order of the channels of images that are arrays, ``"rgb"`` or ``"bgr"``, unless a call says
                otherwise. OpenCV's arrays are ``"bgr"``. Encoded images and Pillow images know their order.
            key: file of the public key that the bundle must be signed with, if you demand one.

        Raises:
            BundleError: the bundle is damaged.
            SignatureError: the bundle is not signed with ``key``, or was changed after that.
            RuntimeMissingError: the runtime or device is missing here.
            UnknownNameError: there is no such backend.
            InputError: the runtime cannot run the bundle's precision, ``threads`` is below 1, or ``color`` is
                unknown.
        """
        check_color(color)
        _check_threads(threads)
        kept = is_cache_wanted(cache)
        options = LoadOptions(device, threads, throughput, weights, trusted_model, trusted_engine, kept)
        opening = partial(
            cls._open_bundle,
            backend=backend,
            options=options,
            color=color,
            start=time.perf_counter(),
        )
        return read_whole(path, opening, key=key, cache=kept)

    @classmethod
    def _open_bundle(
        cls,
        bundle: Bundle,
        backend: str | None,
        options: LoadOptions,
        color: str,
        start: float,
    ) -> Predictor:
        opened = time.perf_counter()
        runtime = get_runtime(backend or RUNTIME_OF_FORMAT[bundle.manifest.format])
        imported = time.perf_counter()
        session = _load(runtime, bundle, options)
        loaded = time.perf_counter()
        batch = 0 if runtime.any_batch else read_batch_limit(bundle)
        predictor = cls(
            session,
            bundle.preprocess,
            bundle.labels,
            batch=batch,
            head=bundle.head,
            kind=bundle.kind,
            color=color,
            where=bundle.path,
        )
        predictor._hold = bundle.hold
        predictor.loading = Loading(
            opening=opened - start,
            importing=imported - opened,
            compiling=loaded - imported,
            is_from_cache=session.is_from_cache,
        )
        return predictor

    @property
    def session(self) -> Session:
        """The loaded model."""
        return self.lanes.session

    @property
    def batch(self) -> int:
        """The fixed batch size of the session, ``0`` if it takes any."""
        return self.lanes.batch

    @property
    def info(self) -> RanOn:
        """Runtime with its version, and device."""
        return self.session.info

    def __call__(self, image: ImageLike, *, color: str | None = None) -> Prediction:
        """Classify one image.

        Args:
            image: a path, encoded bytes, a file object, a Pillow image, or a uint8 array or tensor:
                ``(H, W, 3)``, grey ``(H, W)`` or ``(H, W, 1)``, with alpha ``(H, W, 2)`` or ``(H, W, 4)``.
            color: order of an array's channels; default: what :meth:`load` was told.

        Raises:
            ImageError: the image cannot be read.
            InputError: a closed Predictor, a bundle of feature maps, or an unknown ``color``.
            BundleError: the model gives more or fewer answers than images, one that is not finite, or no
                probabilities where the bundle says so.
        """
        self._require(LOGITS)
        decode = self._make_decoder(color)
        with self.lanes.take(1) as lane:
            source = decode(image, lane.batch[0])
            logits = lane.run(1)[0][0]
        return self._make_prediction(logits, source)

    def predict(
        self,
        images: Iterable[ImageLike],
        *,
        color: str | None = None,
    ) -> list[Prediction]:
        """Classify several images, in the caller's thread. A single image gives a list of one.

        >>> with Predictor.load("cmt_nano_fp32_openvino") as predictor:
        ...     [answer.label for answer in predictor.predict(["ship.jpg", "truck.jpg"])]
        ['ship', 'truck']

        Raises:
            ImageError: an image cannot be read; the first such image is named.
            InputError: a closed Predictor, a bundle of feature maps, or an unknown ``color``.
        """
        return list(self.stream(images, workers=0, in_flight=1, color=color))

    def stream(
        self,
        images: Iterable[ImageLike],
        *,
        workers: int = 2,
        in_flight: int | None = None,
        color: str | None = None,
        copy: bool = True,
    ) -> Iterator[Prediction]:
        """Predictions in order, one by one: threads decode ahead while the runtime computes.

        >>> with Predictor.load("cmt_nano_fp32_openvino") as predictor:
        ...     for answer in predictor.stream(["ship.jpg", "truck.jpg"]):
        ...         print(answer.source, answer.label)
        ship.jpg ship
        truck.jpg truck

        ``images`` is read in the caller's thread, and only as far ahead as is worth it, so an endless
        iterable is fine: at most ``in_flight * batch + max(batch, 2 * workers)`` images are held (a dynamic
        batch counts as 8). Closing the stream, or leaving the loop, ends its threads.

        Arrays, Pillow images, buffers and file objects are copied when they are taken from ``images``,
        because a camera may fill one buffer again and again. A path is read when its image is decoded: give
        ``Path(...).read_bytes()`` where a program writes the same file again and again.

        Args:
            images: as :meth:`predict`; may be endless.
            workers: threads that decode; ``0`` decodes in the caller's thread.
            in_flight: inferences at once; default: as many as the runtime gains from, which is 1 unless the
                bundle was loaded with ``throughput=True``.
            color: order of an array's channels; default: what :meth:`load` was told.
            copy: ``False`` promises that nobody changes or closes an image after ``images`` gave it, and
                saves the copy.

        Raises:
            ImageError: an image cannot be read. It is raised at its turn, after the predictions of all
                images before it, like errors of the runtime and of ``images``. The Predictor stays usable.
            InputError: ``in_flight`` below 1, a closed Predictor, feature maps, or an unknown ``color``.
        """
        decode = self._make_decoder(color)
        settings = _StreamSettings(workers, in_flight, copy)
        for source, logits in self._iterate_answers(images, decode, settings):
            yield self._make_prediction(logits, source)

    def attempt(
        self,
        images: Iterable[ImageLike],
        *,
        workers: int = 2,
        in_flight: int | None = None,
        color: str | None = None,
        copy: bool = True,
    ) -> Iterator[Prediction | ImageError]:
        """As :meth:`stream`, but an image that cannot be read gives its :class:`ImageError` in place of a
        prediction, and the images after it are answered.

        >>> with Predictor.load("cmt_nano_fp32_openvino") as predictor:
        ...     [type(answer).__name__ for answer in predictor.attempt([b"no image", "ship.jpg"])]
        ['ImageError', 'Prediction']
        """
        decode = self._make_decoder(color)

        def decode_or_explain(
            image: ImageLike,
            row: np.ndarray,
        ) -> str | ImageError | None:
            try:
                return decode(image, row)
            except ImageError as exc:
                row[:] = 0  # its answer is thrown away
                return exc.with_traceback(None)

        settings = _StreamSettings(workers, in_flight, copy)
        for source, logits in self._iterate_answers(images, decode_or_explain, settings):
            if isinstance(source, ImageError):
                yield source
            else:
                yield self._make_prediction(logits, source)

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """Preprocessed float32 ``(N, 3, H, W)`` -> float32 ``(N, classes)``; any ``N``, in the model's own
        batches. A model that ends in a softmax or a sigmoid gives probabilities here.

        >>> with Predictor.load("cmt_nano_fp32_openvino") as predictor:
        ...     predictor.logits(predictor.prepare(["ship.jpg", "truck.jpg"])).shape
        (2, 10)

        Raises:
            InputError: another dtype or shape, values that are not finite, or a bundle of feature maps.
            BundleError: the model gives values that are not finite, other logits than there are labels, or no
                probabilities where the bundle says that it does.
        """
        self._require(LOGITS)
        logits = require_finite(self.outputs(batch), self._where)[0]
        self._require_labelled(logits.shape[1:])
        require_kind(logits, self.kind, self._where)
        return logits

    def features(self, batch: np.ndarray) -> list[np.ndarray]:
        """Preprocessed float32 ``(N, 3, H, W)`` -> the stage maps, float32 ``(N, C, H / stride, W /
        stride)``, the finest first.

        Raises:
            InputError: as :meth:`logits`, or a bundle of a classifier.
            BundleError: the model gives values that are not finite.
        """
        self._require("features")
        return require_finite(self.outputs(batch), self._where)

    def outputs(self, batch: np.ndarray) -> list[np.ndarray]:
        """What the model gives, whatever its head and its values: see :meth:`logits` and :meth:`features`,
        which refuse NaN and infinity."""
        require_batch(batch, self.spec.size)
        return self.lanes.run(np.ascontiguousarray(batch))

    def prepare(
        self,
        images: Iterable[ImageLike],
        *,
        color: str | None = None,
    ) -> np.ndarray:
        """Decode, resize, crop and normalise: the float32 batch ``(N, 3, H, W)`` that :meth:`logits` and
        :meth:`features` take. Raises :class:`~cmt_edge.deploy.errors.ImageError`."""
        decode = self._make_decoder(color)
        size = self.spec.size
        images = list_images(images)
        if not isinstance(images, Sequence):  # each image may be gone once the next is asked for
            order = color or self.color
            rows = [preprocess(image, self.spec, color=order) for image in images]
            return np.stack(rows) if rows else np.empty((0, 3, size, size), np.float32)
        batch = np.empty((len(images), 3, size, size), np.float32)
        for image, row in zip(images, batch, strict=True):
            decode(image, row)
        return batch

    def close(self) -> None:
        """Free the runtime's resources once running inferences have ended. Further calls raise
        :class:`~cmt_edge.deploy.errors.InputError`."""
        self.lanes.close()
        self._hold = None

    def __repr__(self) -> str:
        """What serves how many classes, and how many inferences run now: for a service's log."""
        return f"Predictor({len(self.labels)} labels, {self.session.runtime}, {self.lanes!r})"

    def __enter__(self) -> Predictor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _make_prediction(self, logits: np.ndarray, source: str | None) -> Prediction:
        """One answer."""
        self._require_labelled(logits.shape)
        require_finite([logits], self._where)
        require_kind(logits[None], self.kind, self._where)
        return Prediction(logits, self.labels, source, self.kind)

    def _require_labelled(self, shape: tuple[int, ...]) -> None:
        """Check the shape of one image's logits; a graph that leaves it open may give more or fewer logits
        than there are labels."""
        if shape != (len(self.labels),):
            raise BundleError(
                f"the graph gives logits of shape {shape}, but there are {len(self.labels)} labels",
                where=self._where,
                remedy="copy the whole bundle again, or export it again",
            )

    def _iterate_answers(
        self,
        images: Iterable[ImageLike],
        decode: Callable[[ImageLike, np.ndarray], Any],
        settings: _StreamSettings,
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """What ``decode`` returned for each image, and its logits."""
        self._require(LOGITS)
        in_flight = settings.choose_in_flight(self.session)
        images = list_images(images)
        if (
            settings.copy and settings.workers > 0
        ):  # without threads an image is decoded before the next one is asked for
            images = self._take_each(images)
        return stream(
            images,
            self.lanes,
            decode,
            workers=settings.workers,
            in_flight=in_flight,
        )

    def _take_each(self, images: Iterable[ImageLike]) -> Iterator[Any]:
        """Each image as it is when it is taken; in place of one that cannot be read, its error."""
        for image in images:
            try:
                taken: Any = take_snapshot(image, self.spec.exif)
            except ImageError as exc:
                taken = exc
            yield taken

    def _make_decoder(self, color: str | None) -> Callable[[ImageLike, np.ndarray], str | None]:
        """What preprocesses an image into a row and returns its path, where it is given as one."""
        order = self.color if color is None else check_color(color)

        def decode(image: ImageLike, row: np.ndarray) -> str | None:
            if isinstance(image, ImageError):  # it could not be copied when it was taken
                raise image
            preprocess(image, self.spec, row, order)
            return str(image) if isinstance(image, (str, Path)) else None

        return decode

    def _require(self, head: str) -> None:
        if self.head == head:
            return
        wanted, use = "feature maps", "logits() or predict()"
        if head == LOGITS:
            wanted, use = "classes", "features()"
        raise InputError(
            f"this bundle gives {self.head}, not {wanted}",
            remedy=f"use {use}, or export with --head {head}",
        )


@dataclass(frozen=True)
class _StreamSettings:
    """How a stream runs; see :meth:`Predictor.stream`."""

    workers: int
    in_flight: int | None
    copy: bool

    def choose_in_flight(self, session: Session) -> int:
        """The number of inferences at once: what was asked for, or as many as the runtime gains from.

        Raises:
            InputError: fewer than 1 were asked for.
        """
        if self.in_flight is not None and self.in_flight < 1:
            raise InputError(
                f"{self.in_flight} inferences in flight were asked for",
                remedy="ask for 1 or more, or leave it out",
            )
        return self.in_flight or max(1, session.parallelism)


def _load(runtime: Runtime, bundle: Bundle, options: LoadOptions) -> Session:
    """The session of a bundle; whatever a runtime raises of its own becomes a :class:`BundleError`."""
    try:
        return runtime.load(bundle, options)
    except CmtEdgeError:
        raise
    except Exception as exc:  # each runtime has exceptions of its own, some of them undocumented
        raise make_open_error(bundle.path, exc) from exc


def _check_threads(threads: int | None) -> None:
    """Raise :class:`InputError` below 1."""
    if threads is not None and threads < 1:
        raise InputError(
            f"{threads} threads were asked for",
            remedy="ask for 1 or more, or leave it out for all cores",
        )
