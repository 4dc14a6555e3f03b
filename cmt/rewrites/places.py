"""Where a rewrite applies: the submodules with an attribute path, and how they are replaced."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import nn

from ..spec import Rewrite


def find_modules(root: nn.Module, *paths: str) -> list[nn.Module]:
    """The submodules of ``root``, itself included, that have all these attribute paths."""
    return [m for m in root.modules() if all(has_path(m, path) for path in paths)]


def has_path(module: nn.Module, path: str) -> bool:
    """Whether a module has this attribute path, and not ``None`` there."""
    try:
        return get_value(module, path) is not None
    except AttributeError:
        return False


def get_value(module: nn.Module, path: str) -> Any:
    """What lies at an attribute path, ``"attention.q"``."""
    return attrgetter(path)(module)


def set_value(module: nn.Module, path: str, value: object) -> None:
    """Put ``value`` at an attribute path."""
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(module) if owner else module, name, value)


def replace_modules(
    root: nn.Module,
    kinds: tuple[type[nn.Module], ...],
    make: Callable[[nn.Module], nn.Module],
) -> int:
    """Replace every submodule of exactly these types, and return the number of places."""
    places = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if type(child) in kinds
    ]
    for parent, name, child in places:
        setattr(parent, name, make(child))
    return len(places)


def replace_each(
    name: str,
    algebra: str,
    kind: type[nn.Module],
    make: Callable[[nn.Module], nn.Module],
) -> Rewrite:
    """Every submodule of exactly the type ``kind`` becomes ``make(submodule)``, with the same inputs and
    outputs."""
    return Rewrite(
        name,
        algebra,
        lambda module: replace_modules(module, (kind,), make),
    )


def chain_rewrites(*rewrites: Rewrite) -> Rewrite:
    """``rewrites`` as one, where a later one works on what an earlier one makes.

    Each must find the same number of places.
    """

    def apply(module: nn.Module) -> int:
        counts = [rewrite.apply(module) for rewrite in rewrites]
        if len({*counts}) > 1:
            raise ValueError(f"{', '.join(r.name for r in rewrites)} find different places: {counts}")
        return counts[0]

    return Rewrite(
        "; ".join(r.name for r in rewrites),
        "; ".join(r.algebra for r in rewrites),
        apply,
    )
