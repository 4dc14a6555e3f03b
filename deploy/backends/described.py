"""Is the graph that a runtime opened the one that the manifest describes?

A bundle's hashes show that its files and its manifest were not changed, not that they belong together. A
runtime tells the inputs and outputs of a graph without parsing it once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..bundle import Bundle
from ..bundle.sections import BATCH, TensorEntry
from ..errors import BundleError

SHOWN_TENSORS = 5
"""The largest number of tensors that a message shows."""
ANY = "?"
"""How messages show a dimension that the graph leaves open."""


@dataclass(frozen=True)
class GraphTensor:
    """An input or output as a runtime tells it.

    Attributes:
        names: all its names.
        shape: ``None`` stands for a dimension that is not fixed.
        dtype: ``"float32"``, or the runtime's own name of another type.
    """

    names: tuple[str, ...]
    shape: tuple[int | None, ...]
    dtype: str

    def __str__(self) -> str:
        name = self.names[0] if self.names else "(no name)"
        return _format_tensor(
            name,
            self.dtype,
            [ANY if size is None else size for size in self.shape],
        )

    def is_described(self, entry: TensorEntry) -> bool:
        """Whether name, type, rank and every dimension are those of ``entry``.

        Only the batch may be dynamic; a runtime may not know another dimension of an output before it runs.
        """
        if entry.name not in self.names or entry.dtype != self.dtype or len(entry.shape) != len(self.shape):
            return False
        batch, *rest = zip(self.shape, entry.shape, strict=True)
        if not all(found in (None, expected) for found, expected in rest):
            return False
        found, expected = batch
        return found == (None if expected == BATCH else expected)


def require_described(
    bundle: Bundle,
    file: str,
    inputs: Sequence[GraphTensor],
    outputs: Sequence[GraphTensor],
) -> None:
    """Raise :class:`BundleError` where a graph is not the one that the bundle's manifest describes.

    Args:
        bundle: whose manifest counts.
        file: name of the graph's file in the bundle.
        inputs, outputs: of the graph, in its order.
    """
    manifest = bundle.manifest
    for what, found, described in (
        ("input is", inputs, (manifest.input,)),
        ("outputs are", outputs, manifest.outputs),
    ):
        same = len(found) == len(described)
        if same and all(map(GraphTensor.is_described, found, described)):
            continue
        raise BundleError(
            f"the graph's {what} not what the manifest says",
            where=bundle.path / file,
            why=f"the graph has {_format_list(found)}; the manifest says {_format_list(described)}",
            remedy="copy the whole bundle again, or export it again",
        )


def _format_list(tensors: Sequence[GraphTensor | TensorEntry]) -> str:
    texts = [
        str(tensor)
        if isinstance(tensor, GraphTensor)
        else _format_tensor(tensor.name, tensor.dtype, tensor.shape)
        for tensor in tensors[:SHOWN_TENSORS]
    ]
    more = len(tensors) - len(texts)
    return ", ".join(texts) + (f" and {more} more" if more > 0 else "")


def _format_tensor(name: str, dtype: str, shape: Sequence[int | str]) -> str:
    return f"{name} {dtype} ({', '.join(map(str, shape))})"
