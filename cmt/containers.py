"""Where a checkpoint keeps a model's weights.

Training programs nest a state dict under keys of their own (``state_dict``, ``net``, ``params_ema``), and
put prefixes in front of its names (``module.``, ``model.``, ``backbone.``). There is no list of programs
here, but a few rules. A *place* is a mapping in the file that holds tensors. It fits where all keys of the
model are found in it behind one prefix. Words in the keys on the way tell averaged weights from others. Two
places that fit with different values are refused, unless only one of them has a name that everybody uses.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .key_words import USUAL, is_of_training, is_training_only, names_average, split_words
from .spec import ModelSpec, StateDict
from .unpickling import PlainArray

WRAPPERS = {
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
"""Parts of names that torch.compile, FSDP and activation checkpointing put in anywhere."""

AVERAGE_COUNTER = "n_averaged"
"""What torch.optim.swa_utils.AveragedModel keeps beside averaged weights."""

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
"""Number of values, at most, that all tensors of a file together have without having a place in it for each:
sparse ones, and those that repeat a value. Those beyond it are not read."""

MAX_PREFIX = 6
"""Number of parts of a prefix, at most."""

MAX_VISITS = 8
"""How often one mapping or list is entered, at most, where several ways lead to it or it holds itself.
Programs keep a state dict under two or three names."""

MAX_COMPARED = 2_000_000
"""Number of names, at most, that all comparisons of places and prefixes with a model look at. A checkpoint of
3,000 names with 30 prefixes needs 90,000."""

_Visit = tuple[tuple[int, ...], tuple[str, ...], Any]
"""A value of a checkpoint: its place in the order of the file, the keys on the way to it, and itself."""


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
        parts = [*self.way, *self.prefix.split(".")]
        return ".".join(filter(None, parts)) or "the top level"


@dataclass(frozen=True)
class Place:
    """A mapping with tensors, and the keys on the way to it."""

    way: tuple[str, ...]
    state: StateDict


def find_candidates(
    content: Any,
    spec: ModelSpec,
    target: StateDict,
) -> list[WeightsCandidate]:
    """Every place of ``content`` with every prefix that may belong to the model; the best one first.

    Raises:
        Undecided: there are more of them than a training program writes.
    """
    pairs = list(_pair_with_prefixes(find_places(content), len(target)))
    found = [_compare(place, prefix, spec, target) for place, prefix in pairs]
    return sorted(
        found,
        key=lambda candidate: (
            candidate.missing,
            len(candidate.beside),
            not candidate.usual,
        ),
    )


def _pair_with_prefixes(places: Iterable[Place], wanted: int) -> Iterator[tuple[Place, str]]:
    """Every place with each of its prefixes, if they can be compared in seconds."""
    compared = 0
    for place in places:
        for prefix in _find_prefixes(place.state, wanted):
            compared += len(place.state)
            if compared > MAX_COMPARED:
                raise Undecided(
                    "has more places where the model's weights may be than can be compared",
                    f"the names of its tensors have {MAX_COMPARED} beginnings or more",
                    "save the weights alone: torch.save(model.state_dict(), NEW)",
                )
            yield place, prefix


def find_places(content: Any) -> Iterator[Place]:
    """Every mapping in ``content`` that holds tensors or arrays."""
    reader = TensorReader()
    for way, held in walk(content, is_skipped=is_of_training):
        if not isinstance(held, Mapping):
            continue
        state = {
            str(key): tensor for key, value in held.items() if (tensor := reader.read(value)) is not None
        }
        if state:
            yield Place(way, _unwrap(state))


def walk(
    content: Any,
    is_skipped: Callable[[str], bool],
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The mappings and short lists of a checkpoint with the keys on the way to them, at most :data:`MAX_WAY`,
    in the order of the file; not those below a key that ``is_skipped``.

    A file of some kilobytes may lead to one mapping by millions of ways, or to itself: the shortest ways to
    each are taken, :data:`MAX_VISITS` of them.
    """
    found: list[_Visit] = []
    visits: Counter[int] = Counter()
    level: list[_Visit] = [((), (), content)] if _is_walked(content) else []
    for _ in range(MAX_WAY + 1):
        inner: list[_Visit] = []
        for place, way, held in level:
            visits[id(held)] += 1
            if visits[id(held)] > MAX_VISITS:
                continue
            found.append((place, way, held))
            inner += [
                ((*place, index), (*way, key), value)
                for index, (key, value) in enumerate(_list_items(held))
                if _is_walked(value) and visits[id(value)] < MAX_VISITS and not is_skipped(key)
            ]
        level = inner
    return ((way, held) for _, way, held in sorted(found, key=itemgetter(0)))


def _is_walked(held: object) -> bool:
    """Whether places are looked for in a value."""
    return isinstance(held, Mapping) or (isinstance(held, (list, tuple)) and len(held) <= MAX_LIST)


def _list_items(held: Any) -> Iterator[tuple[str, Any]]:
    """What a mapping or a list holds, by key."""
    if isinstance(held, Mapping):
        return ((str(key), value) for key, value in held.items())
    return ((f"[{index}]", value) for index, value in enumerate(held))


class TensorReader:
    """Reads the tensors of one file, with one budget for values that have no place of their own in it."""

    def __init__(self) -> None:
        self._left = MAX_DENSE

    def read(self, value: object) -> Tensor | None:
        """A tensor or an array of numbers as a dense tensor with values; ``None`` for anything else, and
        beyond the budget."""
        if isinstance(value, Tensor):
            return self._make_dense(value.detach())
        array = value.value if isinstance(value, PlainArray) else value
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "biufc":
            return None
        native = array.astype(array.dtype.newbyteorder("="))  # a copy that may be written to
        try:
            return torch.from_numpy(native)
        except TypeError:  # torch lacks the type
            return None

    def _make_dense(self, value: Tensor) -> Tensor | None:
        """``value`` as layers hold it; ``None`` where it has no values, or more than are left."""
        if value.is_meta or value.is_nested:
            return None
        is_strided = value.layout == torch.strided
        kept = value.untyped_storage().nbytes() // max(1, value.itemsize) if is_strided else 0
        self._left -= (made := max(0, value.numel() - kept))
        if self._left < 0 < made:
            return None
        return value if is_strided else value.to_dense()


def is_layer(value: Tensor) -> bool:
    """Whether ``value`` may be the kernel of a layer: real numbers in two dimensions or more.

    Metrics, criteria and preprocessing keep a number, or one a class or channel.
    """
    return value.is_floating_point() and sum(length > 1 for length in value.shape) > 1


def _unwrap(state: StateDict) -> StateDict:
    """``state`` without :data:`WRAPPERS` in its names."""
    names = {key: _unwrap_name(key) for key in state}
    if len(set(names.values())) < len(names):
        return state
    return {names[key]: value for key, value in state.items()}


def _unwrap_name(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def _find_prefixes(state: StateDict, wanted: int) -> list[str]:
    """No prefix, and each one that enough of the names begin with."""
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")[:-1][:MAX_PREFIX]
        prefixes = (".".join(parts[: i + 1]) for i in range(len(parts)))
        counts.update(f"{prefix}." for prefix in prefixes)
    least = max(1, MIN_SHARE * wanted)
    return ["", *(prefix for prefix, count in counts.items() if count >= least)]


def _compare(
    place: Place,
    prefix: str,
    spec: ModelSpec,
    target: StateDict,
) -> WeightsCandidate:
    inside = {
        key.removeprefix(prefix): value
        for key, value in place.state.items()
        if key.startswith(prefix)  # all keys for no prefix
    }
    state = _name_as_model(inside, spec, target)
    required = [key for key in target if not key.endswith(BATCHES)]
    missing = sum(key not in state for key in required)
    others = [key for key in place.state if not key.startswith(prefix)]
    outside = [key for key in others if not is_training_only(key)]
    layers = [key for key in outside if missing or is_layer(place.state[key])]
    way = [*place.way, *prefix.split(".")]
    averaged = any(names_average(part) for part in way)
    return WeightsCandidate(
        way=place.way,
        prefix=prefix,
        state=state,
        beside=tuple(layers),
        left_out=tuple(key for key in outside if key not in set(layers)),
        missing=missing,
        shared=sum(key in state for key in required),
        averaged=averaged or _has_average_counter(place.state, prefix),
        usual=all(map(_is_usual, way)),
    )


def _is_usual(part: str) -> bool:
    """Whether a key on the way is one that weights usually have."""
    return names_average(part) or split_words(part) <= USUAL or part.startswith("[")


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
    is_inside = not any(key in target for key in ours)
    if len(firsts) == 1 and is_inside:  # the factory wraps the net that was saved
        (first,) = firsts
        ours = {f"{first}.{key}": value for key, value in ours.items()}
    return {key: value for key, value in ours.items() if key in target or not is_training_only(key)}


class Undecided(Exception):
    """No single candidate can be taken; ``reason`` and ``remedy`` say why and what to do."""

    def __init__(self, what: str, reason: str | None, remedy: str) -> None:
        super().__init__(what)
        self.what, self.reason, self.remedy = what, reason, remedy


def choose_candidate(
    candidates: list[WeightsCandidate],
    ema: bool | None,
) -> WeightsCandidate:
    """The candidate to load; it may still lack names, where none has all of them.

    Args:
        candidates: of :func:`find_candidates`, at least one.
        ema: ``True`` for averaged weights, ``False`` for others, ``None`` for averaged ones where there are
            some.

    Raises:
        Undecided: several fit with different values, or the kind that was asked for is absent.
    """
    near = [c for c in candidates if c.shared >= c.missing and c.shared]
    averaged = [c for c in near if c.averaged]
    plain = [c for c in near if not c.averaged]
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
    lacks = bool(averaged) and averaged[0].missing > 0
    if ema is None and lacks and any(not c.missing for c in plain):
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


def _drop_siblings(
    chosen: WeightsCandidate,
    complete: list[WeightsCandidate],
) -> WeightsCandidate:
    """``chosen``, where names beside it that are a whole model too are not counted as strange."""
    neighbours = [c for c in complete if c.way == chosen.way]
    siblings = {c.prefix for c in neighbours if c.prefix != chosen.prefix}
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
    pairs = [(first[key], second[key]) for key in shared]
    return all(one.shape == other.shape and torch.equal(one, other) for one, other in pairs)


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
