"""The sizes of an engine for any batch size, of which its compiler leaves dimensions open.

An open dimension is not always the number of images. A compiler merges it with others: rows of a product are
``(images * tokens, channels)``, heads of an attention ``(images * heads, tokens, width)``. How many there are
for one image is found in the graph, among the shapes of what the kernel's operations read and write.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from .kernels import OPEN, Kernel, TensorUse

Shapes = Mapping[str, Sequence[tuple[int, ...]]]
"""Name of an operation -> the shapes of what it reads and writes, for one image."""


def close_sizes(kernels: Sequence[Kernel], shapes: Shapes) -> list[Kernel]:
    """The kernels with the sizes that they have for one image.

    Args:
        kernels: of an engine for any batch size.
        shapes: of the graph that it was made of.
    """
    named = [[shape for node in kernel.nodes for shape in shapes.get(node, ())] for kernel in kernels]
    return [
        _close_kernel(kernel, named[i], [shape for near in named[max(0, i - 1) : i + 2] for shape in near])
        for i, kernel in enumerate(kernels)
    ]


def _close_kernel(
    kernel: Kernel,
    own: Sequence[tuple[int, ...]],
    near: Sequence[tuple[int, ...]],
) -> Kernel:
    """The kernel by the shapes of its ``own`` operations; one without any moves what the kernels ``near`` it
    read and write.

    Tensors that no shape explains, such as the result of products that were merged, have as many rows as the
    kernel's others.
    """
    tensors = [tensor for tensor in (*kernel.inputs, *kernel.outputs) if OPEN in tensor.dims]
    shapes = own if any(_find_rows(tensor, own) for tensor in tensors) else near
    found = [rows for tensor in tensors if (rows := _find_rows(tensor, shapes))]
    usual = Counter(found).most_common(1)[0][0] if found else 1

    def close(tensors: Sequence[TensorUse]) -> tuple[TensorUse, ...]:
        return tuple(_close_tensor(tensor, _find_rows(tensor, shapes) or usual) for tensor in tensors)

    return replace(kernel, inputs=close(kernel.inputs), outputs=close(kernel.outputs))


def _close_tensor(tensor: TensorUse, rows: int) -> TensorUse:
    return replace(tensor, dims=tuple(rows if size == OPEN else size for size in tensor.dims))


def _find_rows(tensor: TensorUse, shapes: Sequence[tuple[int, ...]]) -> int:
    """The size of the open dimension for one image, 0 where no shape tells it."""
    if len(tensor.dims) > 2 and tensor.dims[-1] == 1:  # means of a norm, whose channels were summed up
        return 1
    fixed = Counter(_list_sizes(tensor.dims))
    if not fixed:
        return 0
    rests = [Counter(_list_sizes(shape)) for shape in shapes]
    fitting = [math.prod((rest - fixed).elements()) for rest in rests if not fixed - rest]
    return min(fitting, default=0)


def _list_sizes(dims: Sequence[int]) -> Iterator[int]:
    """The dimensions that are neither open nor 1."""
    return (size for size in dims if size not in (OPEN, 1))
