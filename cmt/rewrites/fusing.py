"""Applies a family's rewrites to a copy of its model."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import nn

from cmt_edge.deploy.errors import InputError

from ..layers import DropPath
from ..spec import CPU, ModelSpec, Rewrite
from .places import replace_modules

Model = TypeVar("Model", bound=nn.Module)
"""The class of a model, which :func:`fuse` keeps."""


def fuse(
    model: Model,
    *,
    target: str = CPU,
    without: Collection[str] = (),
) -> Model:
    """A new module with the logits of ``model`` (difference below 1e-5) and fewer operations.

    ``model`` stays as it is.

    Args:
        model: built by :func:`cmt_edge.cmt.create_model`, in eval mode.
        target: what the graph is made for, one of :data:`cmt_edge.cmt.spec.TARGETS`.
        without: names of rewrites to leave out, for measuring what each is worth.

    Raises:
        InputError: the model is in training mode (batch statistics cannot be folded), its family has no
            rewrites, or ``without`` names one that it does not have.
    """
    spec = _require_reference(model)
    rewrites = spec.choose_rewrites(target)
    _require_known(without, rewrites, spec)
    fused = copy.deepcopy(model, {id(spec): spec}).double()  # the copy shares the registry's entry
    with torch.no_grad():
        for rewrite in rewrites:
            if rewrite.name not in without and rewrite.apply(fused) == 0:
                raise ValueError(f"the rewrite {rewrite.name!r} finds no place in {spec.name}")
        replace_modules(fused, (nn.Dropout, DropPath), lambda _: nn.Identity())
    cast(Any, fused).fused = True
    return fused.to(next(model.parameters()).dtype)


def _require_reference(model: nn.Module) -> ModelSpec:
    """The specification of a model that can be fused: it has one, is not fused, and is in eval mode.

    Raises:
        InputError: it is another one.
    """
    spec: ModelSpec | None = getattr(model, "spec", None)
    if spec is None:
        raise InputError(
            f"{type(model).__name__} has no registered rewrite",
            remedy="build it with cmt.create_model",
        )
    if getattr(model, "fused", False):
        raise InputError(
            "the model is already fused",
            remedy="keep the reference model and fuse that",
        )
    if model.training:
        raise InputError(
            "a model in training mode cannot be fused",
            why="its batch norms use the statistics of each batch",
            remedy="call model.eval()",
        )
    return spec


def _require_known(
    names: Collection[str],
    rewrites: Sequence[Rewrite],
    spec: ModelSpec,
) -> None:
    """Raise :class:`InputError` where a name is of no rewrite."""
    known = [rewrite.name for rewrite in rewrites]
    if unknown := sorted(set(names) - set(known)):
        raise InputError(
            f"{spec.name} has no rewrite {unknown[0]!r}",
            remedy=f"choose from: {', '.join(known)}",
        )
