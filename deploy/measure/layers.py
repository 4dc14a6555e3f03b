"""Where a bundle departs from the reference: the output of every block, compared with PyTorch in float64.

The manifest says which tensor of the graph is the output of which block, as the export found out by comparing
values (``cmt_edge.export.steps.blocks``). Every bundle runs twice on every runtime: as it is, and with these
tensors as further outputs. What the second one changes in the model's own output is reported beside the
errors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ..backends import RUNTIME_OF_FORMAT, LoadOptions, Session, get_runtime
from ..backends.base import read_batch_limit
from ..bundle import Bundle
from ..bundle.sections import BlockPlace, LayerError, LayerRun
from ..decoding import NamedBytes
from ..errors import BundleError, InputError, RuntimeMissingError
from ..images import choose_evenly
from ..preprocessing import normalise, preprocess
from .labels import LabelledImages
from .layouts import Distance, restore_layout

if TYPE_CHECKING:
    from ..backends.torch_blocks import Seen

RUNTIMES = ("openvino", "onnxruntime")
"""The runtimes that show what they compute inside a graph."""

MOST_IMAGES = 16
"""The largest number of images that blocks are compared on; more hardly change a relative error."""

THRESHOLDS = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1, "int8": 0.2}
"""Precision -> the relative error of a block beyond which it is named, if no other threshold is given. Sound
bundles stay below at every block (docs/layers.md)."""


@dataclass(frozen=True)
class Layers:
    """The result of :func:`compare_layers`.

    Attributes:
        errors: of every block, one bundle and runtime after the other.
        runs: what they say of each bundle and runtime as a whole.
        notes: what was left out, or is not as asked, one sentence each.
    """

    errors: tuple[LayerError, ...]
    runs: tuple[LayerRun, ...]
    notes: tuple[str, ...]


def compare_layers(
    bundles: Sequence[Bundle],
    *,
    data: LabelledImages | None = None,
    limit: int | None = None,
    backend: str | None = None,
    options: LoadOptions | None = None,
    threshold: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Layers:
    """Compare the output of every block with the reference's.

    Args:
        bundles: of the same weights and preprocessing.
        data: images; default: the golden images of the first bundle.
        limit: the largest number of images, at most :data:`MOST_IMAGES`.
        backend: the only runtime; default: each of :data:`RUNTIMES` that runs a bundle here.
        options: how to open bundles and reference; a device is one of ``backend``, or of the runtime that
            serves the bundle.
        threshold: relative error beyond which a block is named; default: :data:`THRESHOLDS`.
        progress: called with images done and total.

    Raises:
        InputError: a bundle does not know its blocks, or the bundles do not belong together.
        RuntimeMissingError: PyTorch is missing here, or no runtime runs a bundle.
    """
    options = replace(options or LoadOptions(), cache=False)
    _require_comparable(bundles)
    images = _Images.of(bundles[0], data, limit)
    reference = _Reference.open(bundles, options)
    notes: list[str] = []
    sides = [side for bundle in bundles for side in _open_sides(bundle, backend, options, notes)]
    try:
        for i, image in enumerate(images):
            outputs, seen = reference.run(image)
            for side in sides:
                side.add(image, outputs, seen)
            if progress:
                progress(i + 1, len(images))
    finally:
        for side in sides:
            side.close()
    summaries = [side.summarise(len(images), threshold) for side in sides]
    return Layers(
        tuple(error for errors, _ in summaries for error in errors),
        tuple(run for _, run in summaries),
        (*reference.notes, *notes),
    )


def _require_comparable(bundles: Sequence[Bundle]) -> None:
    """Raise :class:`InputError` where blocks are not known, or bundles are of different models."""
    first = bundles[0].manifest
    for bundle in bundles:
        manifest = bundle.manifest
        if not any(place.tensor for place in manifest.blocks or ()):
            raise InputError(
                "the bundle does not say which tensors of its graph are the outputs of the model's blocks",
                where=bundle.path,
                why="it was made without their names, or by an earlier version",
                remedy="export it again; without --layers it can be verified as it is",
            )
        same_model = manifest.model.weights.sha256 == first.model.weights.sha256
        if not same_model or (manifest.preprocess, manifest.model.head) != (
            first.preprocess,
            first.model.head,
        ):
            raise InputError(
                "was made from other weights, for other images or with another head",
                where=bundle.path,
                remedy="compare bundles of one checkpoint, exported with the same settings of the images",
            )


@dataclass(frozen=True)
class _Images:
    """The images, preprocessed one at a time, float32 ``(1, 3, S, S)``."""

    bundle: Bundle
    data: LabelledImages | None
    chosen: Sequence[Any]

    @classmethod
    def of(cls, bundle: Bundle, data: LabelledImages | None, limit: int | None) -> _Images:
        everything: list[Any] = list(range(len(bundle.golden().pixels))) if data is None else list(data.items)
        return cls(bundle, data, choose_evenly(everything, min(limit or MOST_IMAGES, MOST_IMAGES)))

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[np.ndarray]:
        spec = self.bundle.preprocess
        if self.data is None:
            pixels = self.bundle.golden().pixels
            yield from (normalise(pixels[[i]], spec) for i in self.chosen)
            return
        for item in self.chosen:
            yield preprocess(NamedBytes(self.data.read(item), item.name), spec)[None]


class _Reference:
    """The PyTorch model in float64, with its blocks watched."""

    def __init__(self, module: Any, places: Sequence[BlockPlace], where: object) -> None:
        self.notes: tuple[str, ...] = ()
        self._single = module
        self._outputs = list(dict.fromkeys(place.name for place in places if not place.before))
        self._inputs = list(dict.fromkeys(f"{p.name}.{p.before}" for p in places if p.before))
        self._prefix = _find_prefix(module, [*self._outputs, *self._inputs], where)
        self._model = copy.deepcopy(module).double()
        self._type: Any = np.float64

    @classmethod
    def open(cls, bundles: Sequence[Bundle], options: LoadOptions) -> _Reference:
        """Rebuild the model. Raises as :meth:`cmt_edge.deploy.backends.base.Runtime.load`."""
        alone = LoadOptions(
            threads=options.threads,
            weights=options.weights,
            trusted_model=options.trusted_model,
        )
        session: Any = get_runtime("torch").load(bundles[0], alone)
        places = [place for bundle in bundles for place in bundle.manifest.blocks or () if place.tensor]
        return cls(session.module, places, bundles[0].path)

    def run(self, image: np.ndarray) -> tuple[list[np.ndarray], Seen]:
        """The model's outputs, and what its blocks read and returned."""
        try:
            return self._watch(image)
        except RuntimeError as exc:  # of PyTorch: the model's own code asks for another type
            if self._type is np.float32:
                raise
            self._model, self._type = self._single, np.float32
            self.notes = (f"the reference computes in float32, because it fails in float64: {exc}",)
            return self._watch(image)

    def _watch(self, image: np.ndarray) -> tuple[list[np.ndarray], Seen]:
        from ..backends.torch_blocks import watch

        root = self._model.get_submodule(self._prefix)
        return watch(self._model, image.astype(self._type), self._outputs, self._inputs, root)


def _find_prefix(module: Any, paths: Sequence[str], where: object) -> str:
    """The path of the module inside ``module`` in which ``paths`` begin: a head may be wrapped around the
    model."""
    known = dict(module.named_modules(remove_duplicate=False))
    for prefix in ("", "model"):
        if all(f"{prefix}.{path}".removeprefix(".") in known for path in paths):
            return prefix
    lost = next(path for path in paths if path not in known)
    raise BundleError(
        f"the reference has no block {lost!r}, which the manifest names",
        where=where,
        remedy="export the bundle again with this version",
    )


def _open_sides(
    bundle: Bundle,
    backend: str | None,
    options: LoadOptions,
    notes: list[str],
) -> list[_Side]:
    """A bundle on every runtime that runs it; ``notes`` gets why another one does not.

    A device is one of the runtime that serves the bundle, unless another runtime is named.
    """
    if backend is None and options.device is not None:
        backend = RUNTIME_OF_FORMAT[bundle.manifest.format]
    if backend is not None:
        return [_Side(bundle, backend, options)]
    refusals: list[InputError | RuntimeMissingError] = []
    sides = []
    for name in RUNTIMES:
        try:
            get_runtime(name).float_precision(bundle.manifest.precision, options.device)
        except (InputError, RuntimeMissingError) as exc:
            refusals.append(exc)
            notes.append(f"{bundle.title} is not compared on {name}: {exc.what}")
            continue
        sides.append(_Side(bundle, name, options))
    if not sides:
        raise refusals[0]
    return sides


class _Side:
    """A bundle on a runtime: as it runs, and with its blocks watched."""

    def __init__(self, bundle: Bundle, backend: str, options: LoadOptions) -> None:
        self.bundle, self.backend = bundle, backend
        self._names = list(bundle.outputs)
        self._places = [place for place in bundle.manifest.blocks or () if place.tensor]
        extra = [place.tensor for place in self._places if place.tensor not in self._names]
        self._names += [name for name in dict.fromkeys(extra) if name]
        runtime = get_runtime(backend)
        self._watched: Session = runtime.open_watched(bundle, options, self._names[len(bundle.outputs) :])
        self._plain: Session = runtime.load(bundle, options)
        self._errors = {place.name: Distance() for place in self._places}
        self._hidden = {place.name: place.missing for place in bundle.manifest.blocks or () if place.missing}
        self._output, self._watched_output, self._moved = Distance(), Distance(), Distance()

    def add(self, image: np.ndarray, outputs: Sequence[np.ndarray], seen: Seen) -> None:
        """Take in one image and what the reference makes of it."""
        batch = np.repeat(image, read_batch_limit(self.bundle) or 1, axis=0)
        plain = [values[:1] for values in self._plain.run(batch)]
        watched = [values[:1] for values in self._watched.run(batch)]
        for expected, ours, shown in zip(outputs, plain, watched, strict=False):
            self._output.add(ours, expected)
            self._watched_output.add(shown, expected)
            self._moved.add(shown, ours)
        values = dict(zip(self._names, watched, strict=True))
        for place in self._places:
            if place.tensor is not None and place.name not in self._hidden:
                self._add_block(place, values[place.tensor], seen)

    def _add_block(self, place: BlockPlace, tensor: np.ndarray, seen: Seen) -> None:
        path = f"{place.name}.{place.before}" if place.before else place.name
        expected = seen.find_input(path) if place.before else seen.find_output(path)
        if isinstance(expected, str):
            self._hidden[place.name] = expected
            return
        expected = expected[:, : place.rows] if place.rows else expected
        try:
            ours = restore_layout(tensor, place.layout, expected.shape)
        except ValueError as exc:
            raise BundleError(
                f"the tensor {place.tensor!r} is not the output of the block {place.name}",
                where=self.bundle.path,
                why=exc,
                remedy="export the bundle again",
            ) from exc
        self._errors[place.name].add(ours, expected)

    def summarise(self, images: int, threshold: float | None) -> tuple[list[LayerError], LayerRun]:
        """The errors of all blocks, and what they say as a whole."""
        precision = self.bundle.manifest.precision
        limit = THRESHOLDS[precision] if threshold is None else threshold
        errors = [
            LayerError(
                name=place.name,
                precision=precision,
                backend=self.backend,
                relative_error=self._errors[place.name].relative_error,
                cosine=self._errors[place.name].cosine,
                images=images,
                worst=self._errors[place.name].worst,
                before=place.before,
                rows=place.rows,
            )
            for place in self._places
            if place.name not in self._hidden
        ]
        return errors, LayerRun(
            bundle=self.bundle.title,
            precision=precision,
            backend=self.backend,
            runtime=self._plain.info.summary(),
            threshold=limit,
            first=next((error.name for error in errors if error.relative_error > limit), None),
            grows=_find_steepest(errors),
            output=self._output.relative_error,
            watched=self._watched_output.relative_error,
            moved=self._moved.relative_error,
            hidden=self._hidden,
        )

    def close(self) -> None:
        """Free both sessions."""
        self._plain.close()
        self._watched.close()


def _find_steepest(errors: Sequence[LayerError]) -> str | None:
    """The block whose error exceeds that of the block before it most."""
    before = [0.0, *(error.relative_error for error in errors)]
    rises = [(after.relative_error - low, after.name) for low, after in zip(before, errors, strict=False)]
    rise, name = max(rises, default=(0.0, ""), key=lambda found: found[0])
    return name if rise > 0 else None
