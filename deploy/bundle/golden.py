"""Golden vectors and reference answers: what the PyTorch reference made of known images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..folders import MAX_ITEMS
from .manifest import make_bundle_error
from .npz import Arrays, open_arrays

MAX_GOLDEN = 256 << 20
"""The largest size in bytes of all golden arrays together."""
MAX_IMAGES = 256
"""The largest number of golden images."""
MAX_REFERENCE = MAX_ITEMS * 132 + 4096
"""The largest size in bytes of all reference answers: as many as there may be images, with their digests."""
MAX_OUTPUT = 1e9
"""The largest absolute value of a golden output; no model that classifies gives one."""
LAST_OF_ASCII = 127
"""The largest number of a character in a digest."""


@dataclass(frozen=True)
class Golden:
    """Generated inputs with what the PyTorch reference made of them.

    Attributes:
        sources: encoded PNG or JPEG files, one an image.
        pixels: ``(K, S, S, 3)`` uint8, the sources after decode, resize and crop.
        outputs: float32 ``(K, ...)``, what the reference makes of the normalised pixels, in the order of the
            manifest's outputs.
    """

    sources: list[bytes]
    pixels: np.ndarray
    outputs: list[np.ndarray]

    @property
    def logits(self) -> np.ndarray:
        """``(K, classes)``, of a classifier."""
        return self.outputs[0]

    def select(self, images: Sequence[int]) -> Golden:
        """Some of the images alone, by their numbers."""
        chosen = list(images)
        return Golden(
            [self.sources[i] for i in chosen],
            self.pixels[chosen],
            [output[chosen] for output in self.outputs],
        )

    def save(self, path: Path) -> None:
        blobs: dict[str, Any] = {}
        for i, source in enumerate(self.sources):
            blobs[f"source{i}"] = np.frombuffer(source, np.uint8)
        blobs |= {f"output{i}": output for i, output in enumerate(self.outputs)}
        np.savez_compressed(path, pixels=self.pixels, **blobs)

    @classmethod
    def from_file(cls, path: Path, size: int) -> Golden:
        """The golden data of a model of ``size`` x ``size`` pixels.

        Raises:
            BundleError: the file is damaged, too large, or holds arrays of other types or shapes, or values
                that are NaN, infinite or beyond :data:`MAX_OUTPUT`.
        """
        with open_arrays(path, MAX_GOLDEN) as arrays:
            count = arrays.require("pixels", "|u1", (None, size, size, 3))[0]
            if not 0 < count <= MAX_IMAGES:
                raise make_bundle_error(f"holds {count} golden images, expected 1 to {MAX_IMAGES}", path)
            for i in range(count):
                arrays.require(f"source{i}", "|u1", (None,))
            return cls(
                [arrays.read(f"source{i}").tobytes() for i in range(count)],
                arrays.read("pixels"),
                [_read_output(arrays, name, path) for name in _require_outputs(arrays, count, path)],
            )


def _require_outputs(arrays: Arrays, images: int, path: Path) -> list[str]:
    """Names of the outputs, which are float32 with one row an image."""
    count = sum(name.startswith("output") for name in arrays.layouts)
    names = [f"output{i}" for i in range(count)]
    for name in names:
        layout = arrays.layouts.get(name)
        if layout is None or layout.dtype != "<f4" or layout.shape[:1] != (images,):
            found = "missing" if layout is None else f"{layout.dtype} {layout.shape}"
            raise make_bundle_error(f"the array {name!r} is {found}, expected <f4 with {images} rows", path)
    return names


def _read_output(arrays: Arrays, name: str, path: Path) -> np.ndarray:
    """A golden output, whose values are numbers that a model may give."""
    values = arrays.read(name)
    if not (np.abs(values) <= MAX_OUTPUT).all():  # also where a value is NaN
        raise make_bundle_error(f"the array {name!r} holds values that are no answer of a model", path)
    return values


def save_reference(path: Path, top1: dict[str, int]) -> None:
    """Write :data:`REFERENCE`: content digest -> top-1 class of the PyTorch reference."""
    np.savez_compressed(
        path,
        digest=np.array(list(top1), "U32"),
        top1=np.array(list(top1.values()), np.int32),
    )


def read_reference(path: Path, classes: int) -> dict[str, int]:
    """The content of :data:`REFERENCE`, for a model of ``classes`` classes.

    Raises:
        BundleError: the file is damaged, too large, or holds arrays of other types, shapes or values.
    """
    with open_arrays(path, MAX_REFERENCE) as arrays:
        rows = arrays.require("digest", "<U32", (None,))
        arrays.require("top1", "<i4", rows)
        answers = arrays.read("top1")
        if rows[0] and not 0 <= answers.min() <= answers.max() < classes:
            raise make_bundle_error(f"holds answers that are none of the model's {classes} classes", path)
        digests = arrays.read("digest")
        if rows[0] and digests.view(np.uint32).max() > LAST_OF_ASCII:
            raise make_bundle_error("holds digests that are no text", path)
        return dict(zip(digests.tolist(), answers.tolist(), strict=True))
