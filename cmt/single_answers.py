"""A model from outside is tried: how many classes it has, and whether an image has one answer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import (
    CmtEdgeError,
    InputError,
)

from .outputs import PROBED, settle_output

MANY_CALLS = 64
"""How often a model that draws random numbers is asked before its answers count as equal."""

SAME = 1e-5
"""Difference of answers to equal batches, as a share of the largest logit, that rounding explains."""

ALIKE = 1e-3
"""The same for batches of different sizes, for which libraries choose other kernels."""

OTHER_CONTRAST = 5.0
"""The contrast of the other image beside which an image is asked about again, in that of the first one."""

NORMS = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
)
"""Modules that use statistics of the batch where they track none."""

MAX_SUSPECTS = 4
"""Number of modules that a message names."""


def count_classes(model: nn.Module, size: int, name: str) -> int:
    """Number of logits, which ``model`` then returns as a float32 tensor.

    Raises:
        InputError: ``model`` does not classify images of ``size`` pixels, or an image has no single answer.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(PROBED, 3, size, size, generator=generator)
    before = torch.get_rng_state()
    try:
        classes = settle_output(model, images, name)
        with torch.inference_mode():
            logits: Tensor = model(images)
    except CmtEdgeError:
        raise
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            f"{name} does not take images of {size} pixels",
            why=f"{type(exc).__name__}: {exc}",
            remedy="give its size with --imgsz, or set the attribute img_size, an int, on the model",
        ) from exc
    drawn = not torch.equal(before, torch.get_rng_state())
    _require_one_answer(model, images, logits, drawn, name)
    return classes


def _require_one_answer(
    model: nn.Module,
    images: Tensor,
    logits: Tensor,
    drawn: bool,
    name: str,
) -> None:
    """Raise :class:`InputError` where an answer depends on chance, on the calls before or on other images.

    ``drawn`` tells that the first call drew random numbers; the model is then asked more often, because a
    rare drop shows in few calls.
    """
    other = OTHER_CONTRAST * images[1:].flip(-1) + 1
    others = torch.cat([images[:1], other])
    with torch.inference_mode():
        again = [model(images) for _ in range(MANY_CALLS if drawn else 1)]
        alone = model(images[:1])
        beside_others = model(others)
    if any(_differ(logits, other, SAME) for other in again):
        cause = "it draws random numbers" if drawn else "it keeps something from call to call"
        raise InputError(
            f"{name} answers differently when it is asked twice in eval mode",
            why=f"{cause}, though model.eval() was called: {_list_suspects(model)}",
            remedy="let it depend on self.training: F.dropout(x, p, self.training),"
            " dropout_p=p if self.training else 0.0",
        )
    if alone.shape != logits[:1].shape:
        raise InputError(
            f"{name} answers one image with the shape {tuple(alone.shape)}, not {tuple(logits[:1].shape)}",
            why="the batch axis is lost with a batch of one image, as squeeze() loses it",
            remedy="name the axes: flatten(1), or squeeze(-1) in place of squeeze()",
        )
    if _differ(logits[:1], beside_others[:1], SAME) or _differ(logits[:1], alone, ALIKE):
        raise InputError(
            f"{name} answers differently to one image alone and beside another one",
            why=f"it uses statistics of the batch in eval mode: {_list_suspects(model)}",
            remedy="use track_running_stats=True in batch norms, and take means over an image, not the batch",
        )


def _differ(first: Tensor, second: Tensor, share: float) -> bool:
    """Whether two answers differ by more than ``share`` of the largest value."""
    if first.shape != second.shape:
        return True
    one, other = first.double(), second.double()
    difference = (one - other).nan_to_num(0.0)
    largest = float(difference.abs().max())
    scale = float(one.nan_to_num(0.0).abs().max())
    return largest > share * max(scale, 1e-12)


def _list_suspects(model: nn.Module) -> str:
    """Modules that often are the cause, with their names in ``model``; dropout comes first."""
    found = [
        (name, type(module).__name__)
        for name, module in model.named_modules()
        if name and (module.training or (isinstance(module, NORMS) and module.running_mean is None))
    ]
    found.sort(key=lambda pair: "drop" not in pair[1].lower())
    shown = [f"{name} ({kind})" for name, kind in found[:MAX_SUSPECTS]]
    return ", ".join(shown) or f"look into {type(model).__name__}.forward"
