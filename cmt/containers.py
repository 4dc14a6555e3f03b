"""Where a checkpoint keeps a model's weights.

Training programs nest a state dict under keys of their own (``state_dict``, ``net``, ``params_ema``), and
put prefixes in front of its names (``module.``, ``model.``, ``backbone.``). There is no list of programs
here, but a few rules. A *place* is a mapping in the file that holds tensors. It fits where all keys of the
model are found in it behind one prefix. Words in the keys on the way tell averaged weights from others. Two
places that fit with different values are refused, unless only one of them has a name that everybody uses.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .spec import ModelSpec, StateDict
from .strangers import Stranger, find_strangers
from .unpickling import PlainArray

AVERAGE = re.compile(
    r"(?:^|[^a-z])(?:model|net|params)?_?(?:ema|swa|avg|averaged?|averaging|polyak|shadow)"
    r"(?:model|net|params|weights)?(?:[^a-z]|$)",
    re.IGNORECASE,
)
"""Fits keys that name weights averaged over training: ``model_ema``, ``ema_state_dict``, ``swa_model``."""

USUAL = {
    "model",
    "models",
    "module",
    "state",
    "dict",
    "statedict",
    "net",
    "network",
    "param",
    "params",
    "parameter",
    "parameters",
    "weight",
    "weights",
    "backbone",
    "checkpoint",
    "ckpt",
    "best",
    "last",
    "latest",
    "final",
}
"""Words of which the keys of weights are usually made. Nobody but the user knows whether the best or the last
ones are meant, so that none of them is more usual than the others."""

OTHERS = {
    "optimizer",
    "optimizers",
    "optim",
    "scheduler",
    "schedulers",
    "scaler",
    "amp",
    "rng",
    "grad",
    "grads",
    "gradients",
    "momentum",
    "loops",
    "discriminator",
}
"""Words in keys below which no weights of the model are looked for."""

WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
"""Parts of names that torch.compile, FSDP and activation checkpointing put in anywhere."""

COUNTERS = {
    "total_ops",
    "total_params",
    "n_averaged",
    "num_updates",
    "initted",
    "step",
    "global_step",
    "epoch",
    "decay",
}
"""Last parts of names of what profilers (thop) and averaging put beside weights."""

AVERAGE_COUNTER = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside averaged weights."""

TRAINING = {
    "criterion",
    "criterions",
    "loss",
    "losses",
    "metric",
    "metrics",
    "acc",
    "accuracy",
    "auroc",
    "confmat",
    "train",
    "val",
    "valid",
    "validation",
    "test",
    "teacher",
    "aux",
    "auxiliary",
    "discriminator",
}
"""Words in the first part of names that belong to training, not to the model."""

BATCHES = "num_batches_tracked"
"""Last part of the name of a batch norm's counter, which only training reads."""

MAX_WAY = 4
"""Number of keys on the way to a place, at most."""

MAX_LIST = 16
"""Length of a list in which places are looked for, at most."""

MIN_SHARE = 0.3
"""Share of the model's keys that a prefix needs before it is tried. Published files may hold fewer keys
than the model, because they keep projections stacked."""

MAX_KEYS = 8
"""Number of top-level keys that a message names."""

MAX_DENSE = 2**28
"""Number of values, at most, of a sparse tensor that is made dense."""

MAX_PREFIX = 6
"""Number of parts of a prefix, at most."""


@dataclass(frozen=True)
class WeightsCandidate:
    """A place and a prefix, compared with a model.

    Attributes:
        way: keys on the way to the place.
        prefix: of the names in the place.
        state: its values under the model's names.
        beside: names outside the prefix that may be layers of a larger model.
        left_out: other names outside the prefix, which belong to the program that trained the model although
            nothing in them says so.
        missing: number of the model's names that it lacks.
        shared: number of the model's names that it has; counters of batch norms do not count.
        averaged: whether it holds averaged weights.
        usual: whether the way to it is made of usual words.
    """

    way: tuple[str, ...]
    prefix: str
    state: StateDict
    beside: tuple[str, ...]
    left_out: tuple[str, ...]
    missing: int
    shared: int
    averaged: bool
    usual: bool

    @property
    def entry(self) -> str:
        """The way and the prefix, as a message names them."""
        return ".".join(filter(None, [*self.way, *self.prefix.split(".")])) or "the top level"


@dataclass(frozen=True)
class Place:
    """A mapping with tensors, and the keys on the way to it."""

    way: tuple[str, ...]
    state: StateDict


def find_candidates(content: Any, spec: ModelSpec, target: StateDict) -> list[WeightsCandidate]:
    """Every place of ``content`` with every prefix that may belong to the model; the best one first."""
    found = [
        _compare(place, prefix, spec, target)
        for place in find_places(content)
        for prefix in _find_prefixes(place.state, len(target))
    ]
    return sorted(
        found,
        key=lambda candidate: (
            candidate.missing,
            len(candidate.beside),
            not candidate.usual,
        ),
    )


def find_places(content: Any, way: tuple[str, ...] = ()) -> Iterator[Place]:
    """Every mapping in ``content`` that holds tensors or arrays."""
    if len(way) > MAX_WAY or (way and OTHERS & split_words(way[-1])):
        return
    if isinstance(content, Mapping):
        state = {
            str(key): tensor
            for key, value in content.items()
            if (tensor := convert_to_tensor(value)) is not None
        }
        if state:
            yield Place(way, _unwrap(state))
        for key, value in content.items():
            yield from find_places(value, (*way, str(key)))
    elif isinstance(content, (list, tuple)) and len(content) <= MAX_LIST:
        for index, value in enumerate(content):
            yield from find_places(value, (*way, f"[{index}]"))


def convert_to_tensor(value: object) -> Tensor | None:
    """A tensor or an array of numbers as a dense tensor with values; ``None`` for anything else."""
    if isinstance(value, Tensor):
        return _make_dense(value.detach())
    array = value.value if isinstance(value, PlainArray) else value
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
        return None
    native = array.astype(array.dtype.newbyteorder("="))  # a copy that may be written to
    try:
        return torch.from_numpy(native)
    except TypeError:  # torch lacks the type
        return None


def _make_dense(value: Tensor) -> Tensor | None:
    """``value`` as layers hold it; ``None`` where it has no values, or more than a layer has."""
    if value.is_meta or value.is_nested:
        return None
    if value.layout == torch.strided:
        return value
    return value.to_dense() if value.numel() <= MAX_DENSE else None


def split_words(key: str) -> set[str]:
    """The words that a key is made of, in lower case."""
    split = re.sub(r"([a-z])([A-Z])", r"\1_\2", key)
    return {word for word in re.split(r"[^a-z0-9]+", split.lower()) if word}


def is_training_only(key: str) -> bool:
    """Whether a name beside a model's belongs to its training, and not to its answers."""
    parts = key.split(".")
    return parts[-1] in COUNTERS or bool(TRAINING & split_words(parts[0]))


def is_layer(value: Tensor) -> bool:
    """Whether ``value`` may be the kernel of a layer: real numbers in two dimensions or more.

    Metrics, criteria and preprocessing keep a number, or one a class or channel.
    """
    return value.is_floating_point() and sum(length > 1 for length in value.shape) > 1


def find_nameless_average(content: Any, way: tuple[str, ...] = ()) -> tuple[str, ...] | None:
    """The way to averaged weights that are kept as a list, in the order of ``model.parameters()`` and without
    names, as torch_ema and diffusers keep ``shadow_params``; ``None`` where there are none."""
    if not isinstance(content, Mapping) or len(way) > MAX_WAY:
        return None
    for key, value in content.items():
        inner = (*way, str(key))
        if isinstance(value, (list, tuple)):
            layers = [item for item in value if isinstance(item, Tensor) and is_layer(item)]
            if layers and any(AVERAGE.search(part) for part in inner):
                return inner
        elif (found := find_nameless_average(value, inner)) is not None:
            return found
    return None


def find_hidden_layers(content: Any) -> Iterator[tuple[tuple[str, ...], str]]:
    """The way to every object of another program's class that holds layers, and the name of the class.

    Layers that also stand in a state dict are no loss, and neither are those of an optimizer or a criterion.
    """
    strangers = [
        (way, stranger)
        for way, stranger in find_strangers(content)
        if not any((OTHERS | TRAINING) & split_words(part) for part in way)
    ]
    if not strangers:
        return
    known = {_identify_memory(value) for place in find_places(content) for value in place.state.values()}
    for way, stranger in strangers:
        if any(_identify_memory(value) not in known for value in _find_layers(stranger, set())):
            yield way, stranger.title


def _find_layers(held: Any, seen: set[int]) -> Iterator[Tensor]:
    """The kernels of layers among what an object holds, at any depth."""
    if id(held) in seen:
        return
    seen.add(id(held))
    tensor = convert_to_tensor(held)
    if tensor is not None:
        if is_layer(tensor):
            yield tensor
        return
    values = held.held if isinstance(held, Stranger) else held
    if isinstance(values, Mapping):
        values = values.values()
    elif not isinstance(values, (list, tuple)):
        return
    for value in values:
        yield from _find_layers(value, seen)


def _identify_memory(value: Tensor) -> int:
    """Where the values of a dense tensor lie; tensors that share them were one in the program."""
    return value.data_ptr()


def _unwrap(state: StateDict) -> StateDict:
    """``state`` without :data:`WRAPPERS` in its names."""
    names = {key: ".".join(part for part in key.split(".") if part not in WRAPPERS) for key in state}
    if len(set(names.values())) < len(names):
        return state
    return {names[key]: value for key, value in state.items()}


def _find_prefixes(state: StateDict, wanted: int) -> list[str]:
    """No prefix, and each one that enough of the names begin with."""
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")[:-1][:MAX_PREFIX]
        counts.update(".".join(parts[: i + 1]) + "." for i in range(len(parts)))
    return [
        "",
        *(prefix for prefix, count in counts.items() if count >= max(1, MIN_SHARE * wanted)),
    ]


def _compare(place: Place, prefix: str, spec: ModelSpec, target: StateDict) -> WeightsCandidate:
    inside = {key[len(prefix) :]: value for key, value in place.state.items() if key.startswith(prefix)}
    state = _name_as_model(inside, spec, target)
    required = [key for key in target if not key.endswith(BATCHES)]
    missing = sum(key not in state for key in required)
    outside = [key for key in place.state if not key.startswith(prefix) and not is_training_only(key)]
    layers = [key for key in outside if missing or is_layer(place.state[key])]
    way = [*place.way, *prefix.split(".")]
    averaged = any(AVERAGE.search(part) for part in way)
    return WeightsCandidate(
        way=place.way,
        prefix=prefix,
        state=state,
        beside=tuple(layers),
        left_out=tuple(key for key in outside if key not in set(layers)),
        missing=missing,
        shared=sum(key in state for key in required),
        averaged=averaged or _has_average_counter(place.state, prefix),
        usual=all(split_words(AVERAGE.sub(" ", part)) <= USUAL or part.startswith("[") for part in way),
    )


def _has_average_counter(state: StateDict, prefix: str) -> bool:
    """Whether the counter of an average stands beside the prefix ``module.``, or behind the prefix."""
    outer = prefix.removesuffix("module.")
    return f"{outer}{AVERAGE_COUNTER}" in state or f"{prefix}{AVERAGE_COUNTER}" in state


def _name_as_model(state: StateDict, spec: ModelSpec, target: StateDict) -> StateDict:
    """``state`` under the model's names, without what belongs to training."""
    ours = {spec.rename(key): value for key, value in state.items()}
    if spec.adapt is not None:
        ours = spec.adapt(ours)
    firsts = {key.split(".")[0] for key in target}
    if len(firsts) == 1 and not any(
        key in target for key in ours
    ):  # the factory wraps the net that was saved
        (first,) = firsts
        ours = {f"{first}.{key}": value for key, value in ours.items()}
    return {key: value for key, value in ours.items() if key in target or not is_training_only(key)}


# --- choosing -------------------------------------------------------------------------------------


class Undecided(Exception):
    """No single candidate can be taken; ``reason`` and ``remedy`` say why and what to do."""

    def __init__(self, what: str, reason: str | None, remedy: str) -> None:
        super().__init__(what)
        self.what, self.reason, self.remedy = what, reason, remedy


def choose_candidate(candidates: list[WeightsCandidate], ema: bool | None) -> WeightsCandidate:
    """The candidate to load; it may still lack names, where none has all of them.

    Args:
        candidates: of :func:`find_candidates`, at least one.
        ema: ``True`` for averaged weights, ``False`` for others, ``None`` for averaged ones where there are
            some.

    Raises:
        Undecided: several fit with different values, or the kind that was asked for is absent.
    """
    near = [c for c in candidates if 2 * c.shared >= c.shared + c.missing and c.shared]
    averaged, plain = (
        [c for c in near if c.averaged],
        [c for c in near if not c.averaged],
    )
    if ema and not averaged:
        raise Undecided(
            "has no averaged weights (model_ema)",
            None,
            "load it without --ema",
        )
    if ema is False and averaged and not plain:
        what = f"has only averaged weights ({averaged[0].entry})"
        raise Undecided(what, None, "load it without --no-ema")
    wanted = averaged if averaged and ema is not False else plain
    if ema is None and averaged and averaged[0].missing and any(not c.missing for c in plain):
        raise Undecided(
            f"the averaged weights ({averaged[0].entry}) lack {averaged[0].missing} of the model's names",
            None,
            f"--no-ema takes the others ({plain[0].entry})",
        )
    complete = [c for c in candidates if not c.missing]
    return _choose_only([_drop_siblings(c, complete) for c in wanted or candidates])


def _choose_only(candidates: list[WeightsCandidate]) -> WeightsCandidate:
    """The best of ``candidates``; raises :class:`Undecided` where others are as good and differ."""
    complete = [c for c in candidates if not c.missing]
    if not complete:
        return max(candidates, key=lambda c: (c.shared, -c.missing, c.usual))
    clean = [c for c in complete if not c.beside] or complete
    equals = [c for c in clean if c.usual] or clean
    for other in equals[1:]:
        if not _are_same(equals[0].state, other.state):
            entries = sorted({c.entry for c in equals})
            raise Undecided(
                f"holds different weights of the model: {', '.join(entries)}",
                None,
                "save the ones that you mean alone: torch.save(checkpoint[KEY], NEW)",
            )
    return equals[0]


def _drop_siblings(chosen: WeightsCandidate, complete: list[WeightsCandidate]) -> WeightsCandidate:
    """``chosen``, where names beside it that are a whole model too are not counted as strange."""
    siblings = {c.prefix for c in complete if c.way == chosen.way and c.prefix != chosen.prefix}
    siblings = {prefix for prefix in siblings if prefix and not chosen.prefix.startswith(prefix)}
    if not siblings:
        return chosen
    beside, left_out = (
        tuple(key for key in keys if not key.startswith(tuple(siblings)))
        for keys in (chosen.beside, chosen.left_out)
    )
    return replace(chosen, beside=beside, left_out=left_out)


def _are_same(first: StateDict, second: StateDict) -> bool:
    shared = first.keys() & second.keys()
    return all(
        first[key].shape == second[key].shape and torch.equal(first[key], second[key]) for key in shared
    )


# --- messages -----------------------------------------------------------------------------------


def describe_keys(content: Any) -> str:
    """The keys at the top of a checkpoint, for a message."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    keys = [str(key) for key in content]
    rest = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
    return ", ".join(keys[:MAX_KEYS]) + rest if keys else "nothing"


def describe_nearest_entry(candidate: WeightsCandidate) -> str:
    """Where the best match is and how good it is, for a message."""
    total = candidate.shared + candidate.missing
    return f"{candidate.entry} has {candidate.shared} of the model's {total} names"
