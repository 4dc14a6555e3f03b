"""Weights of a checkpoint that cannot be read as a state dict: lists without names, and objects of other
programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from .containers import TensorReader, find_places, is_layer, walk
from .key_words import OTHERS, TRAINING, names_average, split_words
from .strangers import Stranger, find_strangers


def find_nameless_average(content: Any) -> tuple[str, ...] | None:
    """The way to averaged weights that are kept as a list, in the order of ``model.parameters()`` and without
    names, as torch_ema and diffusers keep ``shadow_params``; ``None`` where there are none."""
    with_layers: dict[int, bool] = {}
    for way, held in walk(content, is_skipped=lambda key: key.startswith("[")):
        for key, value in held.items() if isinstance(held, Mapping) else ():
            inner = (*way, str(key))
            if not isinstance(value, (list, tuple)) or not any(map(names_average, inner)):
                continue
            if id(value) not in with_layers:
                with_layers[id(value)] = any(isinstance(item, Tensor) and is_layer(item) for item in value)
            if with_layers[id(value)]:
                return inner
    return None


def find_hidden_layers(content: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The way to every object of another program's class that holds layers, and the name of the class.

    Layers that also stand in a state dict are no loss, and neither are those of an optimizer or a criterion.
    Matrices in shapes that no layer beside them has, such as a confusion matrix, are not of the model.
    """
    strangers = [
        (way, stranger)
        for way, stranger in find_strangers(content)
        if not any((OTHERS | TRAINING) & split_words(part) for part in way)
    ]
    if not strangers:
        return
    states = [place.state for place in find_places(content)]
    read = [value for state in states for value in state.values()]
    known = {_identify_memory(value) for value in read}
    shapes = {value.shape for value in read if is_layer(value)}
    for way, stranger in strangers:
        layers = _find_layers(stranger, set())
        hidden = [value for value in layers if _identify_memory(value) not in known]
        if any(value.shape in shapes or not shapes for value in hidden):
            yield way, stranger.title


def _find_layers(held: Any, seen: set[int]) -> Iterator[Tensor]:
    """The kernels of layers among what an object holds, at any depth."""
    pending, reader = [held], TensorReader()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        tensor = reader.read(value)
        if tensor is not None:
            if is_layer(tensor):
                yield tensor
            continue
        inner = value.held if isinstance(value, Stranger) else value
        if isinstance(inner, Mapping):
            pending += list(inner.values())[::-1]
        elif isinstance(inner, (list, tuple)):
            pending += inner[::-1]


def _identify_memory(value: Tensor) -> int:
    """Where the values of a dense tensor lie; tensors that share them were one in the program."""
    return value.data_ptr()
