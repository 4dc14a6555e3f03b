"""Which model of the registry a state dict belongs to, told by the names and shapes of its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .containers import BATCHES, Place, Undecided, WeightsCandidate, find_candidates, find_places
from .registry import find_model, list_models
from .spec import ModelSpec, StateDict

MIN_TENSORS = 20
"""Number of tensors in a place, at least, before the models of the registry are tried on it."""

MAX_TENSORS = 20_000
"""Number of tensors in all places together, at most, with which the models of the registry are tried; these
have up to a thousand."""


@dataclass(frozen=True)
class Recognised:
    """A model that has all names and shapes of a state dict.

    Attributes:
        name: in the registry.
        num_classes: number of logits, from the shape of the classifier; ``None`` where that does not tell.
    """

    name: str
    num_classes: int | None


def recognise(content: Any) -> list[Recognised]:
    """Every model of the registry, at its published size, that has the names and shapes of the weights in
    ``content``.

    The number of classes may differ. No values are copied: the shapes alone are compared.
    """
    large = [place for place in find_places(content) if len(place.state) >= MIN_TENSORS]
    if not large or sum(len(place.state) for place in large) > MAX_TENSORS:
        return []
    places = [_strip_values(place) for place in large]
    shapes = {".".join(place.way) or "state": place.state for place in places}
    found = (_try(find_model(name), shapes) for name in list_models())
    return [model for model in found if model is not None]


def _strip_values(place: Place) -> Place:
    """``place`` with tensors that have a shape and a type, and one value each, which takes no memory; those
    of the meta device are no weights to :func:`~cmt_edge.cmt.containers.find_places`."""
    state = {
        key: torch.zeros((), dtype=value.dtype).expand(value.shape) for key, value in place.state.items()
    }
    return Place(place.way, state)


def _try(spec: ModelSpec, shapes: dict[str, StateDict]) -> Recognised | None:
    target = _make_shapes(spec)
    try:
        candidates = find_candidates(shapes, spec, target)
    except Undecided:  # loading the weights will say so
        return None
    for candidate in candidates:
        if candidate.missing:
            return None  # the best one comes first
        if _fits(candidate, spec, target):
            return Recognised(spec.name, _count_classes(candidate, spec))
    return None


def _make_shapes(spec: ModelSpec) -> StateDict:
    """The state dict of a model at its published size; its parameters have no values."""
    with _EmptyOnMeta():
        model = spec.constructor(spec.config, img_size=spec.img_size, num_classes=spec.num_classes)
    return model.state_dict()


class _EmptyOnMeta(TorchFunctionMode):
    """Puts what ``torch.empty`` makes, which is every parameter of a layer, on the meta device.

    The meta device as the default would also take the numbers that constructors compute with.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty:
            options["device"] = "meta"
        return func(*args, **options)


def _fits(candidate: WeightsCandidate, spec: ModelSpec, target: StateDict) -> bool:
    """Whether nothing in the state is unknown to the model, and all shapes but the classifier's are its."""
    state = candidate.state
    if candidate.beside or any(key not in target for key in state):
        return False
    return all(_agree(key, state, target, spec) for key in _iterate_compared(state))


def _iterate_compared(state: StateDict) -> Iterator[str]:
    return (key for key in state if not key.endswith(BATCHES))


def _agree(
    key: str,
    state: StateDict,
    target: StateDict,
    spec: ModelSpec,
) -> bool:
    first = 1 if key in spec.head_keys else 0  # the number of classes
    return state[key].shape[first:] == target[key].shape[first:]


def _count_classes(candidate: WeightsCandidate, spec: ModelSpec) -> int | None:
    counts = {candidate.state[key].shape[0] for key in spec.head_keys if key in candidate.state}
    return counts.pop() if len(counts) == 1 else None
