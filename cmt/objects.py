"""Module objects as models: ``ExportConfig(model=net)`` in place of a name.

The object is copied whenever a model is asked for, so that neither an export nor ``load_weights`` changes it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from cmt_edge.deploy.errors import InputError

from .factories import Factory
from .outside import CUSTOM, Constructor, describe_factory
from .rewrites import fuse
from .spec import ModelSpec, Rewrite

WRAPPED_ATTRIBUTES = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
}
"""Class of a wrapper of PyTorch -> its attribute with the module inside."""


def make_object_spec(module: nn.Module, img_size: int | None = None) -> ModelSpec:
    """A registry entry for a module object.

    A module that :func:`cmt_edge.cmt.create_model` built keeps its entry, and with it the name, the
    preprocessing and the rewrites of its family. It loses the published labels, because nobody knows what the
    object was trained on.

    Args:
        module: an image classifier, in any mode and on any device. It stays as it is.
        img_size: height and width, in pixels, of the images that it is tried with, where it does not tell its
            own.

    Raises:
        InputError: the module cannot be copied, is no image classifier, or gives an image no single answer.
    """
    inner = unwrap(module)
    known = getattr(inner, "spec", None)
    name = known.name if isinstance(known, ModelSpec) else type(inner).__name__
    described = describe_factory(lambda: copy_of(inner), name, img_size)
    size, classes = described["img_size"], described["num_classes"]
    constructor = ObjectConstructor(name, size, classes, weakref.ref(inner))
    if not isinstance(known, ModelSpec):
        return ModelSpec(
            **described,
            constructor=constructor,
            family=CUSTOM,
            built_with_weights=True,
            labels=None,
        )
    described["rewrites"] = _choose_rewrites(known, inner, described["rewrites"])
    replaced = {name: described[name] for name in ("config", "img_size", "num_classes", "rewrites")}
    return replace(
        known,
        **replaced,
        constructor=constructor,
        built_with_weights=True,
        labels=None,
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile``, parallel training and averaging put around it."""
    while (attribute := WRAPPED_ATTRIBUTES.get(type(module).__name__)) is not None:
        module = getattr(module, attribute)
    return module


def copy_of(module: nn.Module) -> nn.Module:
    """A copy on the CPU that shares nothing with ``module``.

    Tensors that the module keeps from an earlier call are copied without their graph, which PyTorch refuses
    to copy.

    Raises:
        InputError: a part of the module cannot be copied.
    """
    kept = {id(tensor): tensor.detach().clone() for tensor in _find_kept_tensors(module)}
    try:
        return copy.deepcopy(module, kept).cpu()
    except Exception as exc:  # the user's objects: anything may happen
        raise InputError(
            f"the module {type(module).__name__} cannot be copied",
            why=f"{type(exc).__name__}: {exc}",
            remedy="remove what cannot be copied from its attributes, such as open files and locks",
        ) from exc


def _find_kept_tensors(module: nn.Module) -> Iterator[Tensor]:
    """Results of earlier calls among the attributes of a module, also in lists and dictionaries."""
    for part in module.modules():
        yield from _find_results(list(vars(part).values()))


def _find_results(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        if not values.is_leaf:
            yield values
    elif isinstance(values, Mapping):
        yield from _find_results(list(values.values()))
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from _find_results(value)


@dataclass(frozen=True)
class ObjectConstructor(Constructor):
    """:attr:`ModelSpec.constructor` of a module object, which it does not keep alive."""

    module: weakref.ref[nn.Module] | None = field(compare=False, repr=False)

    def factory(self) -> Factory:
        """Makes copies of the module."""
        module = self.module() if self.module is not None else None
        if module is None:
            raise InputError(
                f"the module object {self.name} does not exist any more",
                remedy="give the module object again",
            )
        return lambda: copy_of(module)

    def __deepcopy__(self, _: dict[int, Any]) -> ObjectConstructor:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it without the module, which lives in this process."""
        return ObjectConstructor, (self.name, self.size, self.classes, None)


def _choose_rewrites(
    known: ModelSpec,
    module: nn.Module,
    others: tuple[Rewrite, ...],
) -> tuple[Rewrite, ...]:
    """The rewrites of the family, or ``others`` where the user changed the model so that they do not fit."""
    copied = copy_of(module).eval()
    copied.spec = known  # type: ignore[assignment]  # a module keeps any attribute
    try:
        fuse(copied)
    except Exception:  # in a changed model, a rewrite looks for parts that are gone or of another kind
        return others
    return known.rewrites
