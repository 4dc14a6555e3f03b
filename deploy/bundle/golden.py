"""Golden vectors and reference answers: what the PyTorch reference made of known images."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import open_regular
from .manifest import make_bundle_error


@dataclass(frozen=True)
class Golden:
    """Generated inputs with what the PyTorch reference made of them.

    Attributes:
        sources: encoded PNG files, one an image.
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

    def save(self, path: Path) -> None:
        blobs: dict[str, Any] = {f"source{i}": np.frombuffer(s, np.uint8) for i, s in enumerate(self.sources)}
        blobs |= {f"output{i}": output for i, output in enumerate(self.outputs)}
        np.savez_compressed(path, pixels=self.pixels, **blobs)

    @classmethod
    def from_file(cls, path: Path) -> Golden:
        with open_npz(path) as data:
            sources = [data[f"source{i}"].tobytes() for i in range(len(data["pixels"]))]
            count = sum(name.startswith("output") for name in data.files)
            return cls(
                sources,
                data["pixels"],
                [data[f"output{i}"] for i in range(count)],
            )


def save_reference(path: Path, top1: dict[str, int]) -> None:
    """Write :data:`REFERENCE`: content digest -> top-1 class of the PyTorch reference."""
    np.savez_compressed(
        path,
        digest=np.array(list(top1), "U32"),
        top1=np.array(list(top1.values()), np.int32),
    )


@contextmanager
def open_npz(path: Path) -> Iterator[Any]:
    """An ``.npz`` opened without pickle, damage as a typed error."""
    try:
        with (
            open_regular(path) as file,
            np.load(file, allow_pickle=False) as data,
        ):  # closed after damage too
            yield data
    except (
        ValueError,
        KeyError,
        OSError,
        EOFError,
        zipfile.BadZipFile,
    ) as exc:
        raise make_bundle_error("cannot be read", path, exc) from exc
