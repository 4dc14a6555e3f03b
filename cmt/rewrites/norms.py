"""Rewrites of norms: their scale and shift go into the layers beside them."""

from __future__ import annotations

from torch import nn

from ..folding import PlainNorm, ScaleShift, fold_affine_after, fold_affine_before, read_affine
from ..spec import Rewrite
from .places import find_modules, get_value, has_path, replace_each, set_value


def fold_batch_norm(layer: str, norm: str) -> Rewrite:
    """``norm(layer(x)) -> layer(x)``, in every submodule that has both attribute paths."""

    def apply(module: nn.Module) -> int:
        found = find_modules(module, layer, norm)
        places = [m for m in found if isinstance(get_value(m, norm), nn.BatchNorm2d)]
        for place in places:
            scale, shift = read_affine(get_value(place, norm))
            set_value(
                place,
                layer,
                fold_affine_after(get_value(place, layer), scale, shift),
            )
            set_value(place, norm, nn.Identity())
        return len(places)

    return Rewrite(
        f"{norm} into {layer}",
        "s (W x + b) + t == (s W) x + (s b + t)",
        apply,
    )


def fold_affine(norm: str, *layers: str, unless: str | None = None) -> Rewrite:
    """The affine part of ``norm`` goes into the ``layers`` that read it, in every submodule that has all
    these attribute paths.

    ``layers`` must be all layers that read the norm. Submodules with the path ``unless``, in which another
    layer reads it too, stay as they are.
    """

    def is_place(module: nn.Module) -> bool:
        has_affine = isinstance(get_value(module, norm), (nn.BatchNorm2d, nn.LayerNorm))
        return has_affine and (unless is None or not has_path(module, unless))

    def apply(module: nn.Module) -> int:
        places = [m for m in find_modules(module, norm, *layers) if is_place(m)]
        for place in places:
            old = get_value(place, norm)
            scale, shift = read_affine(old)
            for layer in layers:
                set_value(
                    place,
                    layer,
                    fold_affine_before(get_value(place, layer), scale, shift),
                )
            set_value(
                place,
                norm,
                PlainNorm(old) if isinstance(old, nn.LayerNorm) else nn.Identity(),
            )
        return len(places)

    name = f"affine of {norm} into {', '.join(layers)}"
    return Rewrite(name, "W (s x + t) + b == (W s) x + (b + sum(W) t)", apply)


def replace_batch_norms() -> Rewrite:
    """Batch norms that no layer can take become one multiplication and one addition."""
    return replace_each(
        "batch norm as affine",
        "norm(x) == s x + t",
        nn.BatchNorm2d,
        ScaleShift,
    )
