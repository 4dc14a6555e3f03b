"""The registry of models: every command and every parametrised test reads it.

Each family ends with ``SPECS``, a tuple of its variants. Nothing else in the project knows a model by name.
"""

from __future__ import annotations

import copyreg
import difflib
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from importlib import import_module, resources
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from cmt_edge.deploy.errors import InputError, UnknownNameError

from .factories import require_no_file
from .objects import make_object_spec
from .outside import is_outside, make_outside_spec
from .spec import Classifier, ModelSpec, check_size

FAMILIES = (
    "cmt_edge.cmt.families.cmt",
    "cmt_edge.cmt.families.cvt",
    "cmt_edge.cmt.families.convit",
    "cmt_edge.cmt.families.mvit",
    "cmt_edge.cmt.families.xformer",
)
"""The module or package of each family, in the order of :func:`list_models`; each has a tuple ``SPECS``."""


@lru_cache(maxsize=4)
def collect(families: tuple[str, ...]) -> Mapping[str, ModelSpec]:
    """The ``SPECS`` of all ``families`` by name, in order; the modules are imported by the first call.

    Raises ``ValueError`` where two variants have the same name.
    """
    specs: dict[str, ModelSpec] = {}
    for family in families:
        for spec in import_module(family).SPECS:
            if spec.name in specs:
                raise ValueError(f"two models have the name {spec.name!r}, the second one in {family}")
            specs[spec.name] = spec
    return MappingProxyType(specs)


def list_models() -> list[str]:
    """Names of all models, in the order of :data:`FAMILIES` and of each family's ``SPECS``.

    >>> {"cmt_nano", "cvt_13", "mvitv2_t"} <= set(list_models())
    True
    """
    return list(collect(FAMILIES))


def find_model(name: str | nn.Module, img_size: int | None = None) -> ModelSpec:
    """The registry's entry of ``name``, in any case; one is made for ``module:factory``, ``timm:NAME`` and a
    module object.

    ``img_size`` is for these alone, see :func:`cmt_edge.cmt.outside.make_outside_spec`.

    Raises:
        UnknownNameError: no model has this name; the error names the closest ones.
        InputError, RuntimeMissingError: see :func:`cmt_edge.cmt.outside.make_outside_spec` and
            :func:`cmt_edge.cmt.objects.make_object_spec`.
    """
    if isinstance(name, nn.Module):
        return make_object_spec(name, img_size)
    if is_outside(name):
        return make_outside_spec(name, img_size)
    specs = collect(FAMILIES)
    folded = name if name in specs else name.lower()
    if folded not in specs:
        require_no_file(name)
        close = difflib.get_close_matches(folded, specs, n=3, cutoff=0.4)
        raise UnknownNameError("model", name, close, list(specs))
    return specs[folded]


def _reduce_spec(spec: ModelSpec) -> Any:
    """Pickle an entry of the registry as its name, because its rewrites hold functions that cannot be
    pickled. The entry of a model from outside holds none of these."""
    if collect(FAMILIES).get(spec.name) is spec:
        return find_model, (spec.name,)
    return object.__reduce_ex__(spec, pickle.HIGHEST_PROTOCOL)


copyreg.pickle(ModelSpec, _reduce_spec)


def create_model(
    name: str | nn.Module,
    *,
    img_size: int | None = None,
    num_classes: int | None = None,
    seed: int | None = None,
    **overrides: Any,
) -> Classifier:
    """Build a reference model with random weights, in eval mode.

    >>> model = create_model("cmt_nano", num_classes=3, seed=0)
    >>> model.spec.name, model.training
    ('cmt_nano', False)

    Args:
        name: a name of :func:`list_models`, ``module:factory`` or ``timm:NAME``; or a module object, of which
            a copy with its weights is returned.
        img_size: input height and width in pixels (default: the published size); a multiple of
            ``size_multiple``.
        num_classes: number of logits (default: the published number).
        seed: seeds the initialisation without touching the global generator; ``None`` draws from the global
            one.
        overrides: fields of the family's config dataclass, e.g. ``drop_path=0.1`` for training.

    Returns:
        A module mapping float32 ``(N, 3, img_size, img_size)`` to logits ``(N, num_classes)``; its attribute
        ``spec`` is its registry entry.

    Raises:
        UnknownNameError: no such model.
        InputError: ``img_size`` or ``num_classes`` is impossible.
    """
    spec = find_model(name, img_size)
    img_size = spec.img_size if img_size is None else img_size
    num_classes = spec.num_classes if num_classes is None else num_classes
    check_size(spec, img_size)
    _check_classes(spec, num_classes)
    config = replace(spec.config, **overrides)
    with _seeded(seed):
        built = spec.constructor(config, img_size=img_size, num_classes=num_classes)
    model = cast(Classifier, built)
    model.spec = spec
    return model.eval()


def _check_classes(spec: ModelSpec, num_classes: int) -> None:
    """Raise :class:`InputError` below 1."""
    if num_classes < 1:
        raise InputError(
            f"{num_classes} classes were asked of {spec.name}",
            where="num_classes",
            remedy="ask for 1 class or more",
        )


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed PyTorch's generator, and put it back afterwards; ``None`` leaves it alone."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def find_published_labels(
    spec: ModelSpec,
    num_classes: int,
) -> list[tuple[str, str]] | None:
    """``[(class id, readable name), ...]`` of the published classes.

    The id is the name of the class folder in the data set (an ImageNet synset such as ``n01440764``). A data
    set without ids has the name in both places. ``None`` where ``num_classes`` is not the published number.
    """
    if spec.labels is None or num_classes != spec.num_classes:
        return None
    file = resources.files("cmt_edge.cmt") / "data" / spec.labels
    lines = file.read_text(encoding="utf-8").splitlines()
    pairs = [line.split(" ", 1) for line in lines if line]
    return [(pair[0], pair[-1]) for pair in pairs]
