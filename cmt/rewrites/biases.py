"""Rewrites of an attention's scale and biases, which go into the weights beside them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from ..folding import fold_affine_after, fold_affine_before, read_weights, remove_bias, replace_weights
from ..spec import Rewrite
from .norms import fold_affine
from .places import find_modules, get_value, has_path, set_value

QUERY_SHIFT = 0.5
"""Added to each channel of a normalised token where a product carries a number (:func:`attend_over_keys`).

Half the standard deviation of the token: it costs little of a quantizer's range and keeps ``a_j`` small.
"""


def fold_scale(layer: str, scale: str = "scale") -> Rewrite:
    """The number ``scale`` of a submodule goes into its ``layer``; the attribute becomes 1."""

    def apply(module: nn.Module) -> int:
        found = find_modules(module, layer, scale)
        places = [m for m in found if get_value(m, scale) != 1.0]
        for place in places:
            factor = torch.tensor(get_value(place, scale), dtype=torch.float64)
            set_value(
                place,
                layer,
                fold_affine_after(get_value(place, layer), factor, factor * 0),
            )
            set_value(place, scale, 1.0)
        return len(places)

    return Rewrite(f"{scale} into {layer}", "(q k^T) c == (c q) k^T", apply)


def drop_key_bias(layer: str) -> Rewrite:
    """The linear ``layer``, which makes keys, loses its bias ``b``: it adds ``q b`` to all scores of a query,
    and the softmax does not see that."""

    def apply(module: nn.Module) -> int:
        places = find_modules(module, f"{layer}.bias")
        for place in places:
            remove_bias(get_value(place, layer))
        return len(places)

    return Rewrite(
        f"bias of {layer} dropped",
        "softmax_j(q (k_j + b)) == softmax_j(q k_j)",
        apply,
    )


def fold_value_bias(layer: str, proj: str) -> Rewrite:
    """The bias of the linear ``layer``, which makes values, goes into ``proj``: it passes through the
    attention, because its rows sum to 1."""

    def apply(module: nn.Module) -> int:
        places = find_modules(module, f"{layer}.bias", proj)
        for place in places:
            values = cast(nn.Linear, get_value(place, layer))
            out = cast(nn.Linear, get_value(place, proj))
            weight, bias = read_weights(out)
            set_value(
                place,
                proj,
                replace_weights(out, weight, bias + weight @ values.bias.double()),
            )
            remove_bias(values)
        return len(places)

    algebra = "P (A (V + 1 b)) + c == P A V + (P b + c), as A 1 == 1"
    return Rewrite(f"bias of {layer} into {proj}", algebra, apply)


def remove_attention_biases(norm: str, attention: str) -> Rewrite:
    """The linears ``q``, ``k`` and ``v`` of an attention lose their biases.

    The attention must be all that reads ``norm``. Adding ``c`` = :data:`QUERY_SHIFT` to each of the ``C``
    channels of a normalised token, which sums to 0, makes its product with ``1`` the constant ``c C``. That
    carries the queries' bias:

    * queries: ``Q x + b == (Q + r 1^T) (x + c 1)`` with ``r = (b - c Q 1) / (c C)``;
    * keys: their bias, and what the shift adds to them, are the same for all keys, so that the softmax does
      not see them;
    * values: theirs go into ``proj``, because the rows of the softmax sum to 1;
    * a conv ``reduce`` without padding, which makes the keys' tokens, takes the shift back.
    """

    def apply(module: nn.Module) -> int:
        layers = (f"{attention}.{name}.weight" for name in ("q", "k", "v", "proj"))
        places = find_modules(module, norm, *layers)
        for place in places:
            shift_tokens(place, norm, attention)
            _remove_biases(get_value(place, attention))
        return len(places)

    algebra = (
        "Q x + b == (Q + r 1^T) (x + c 1), as sum(x) == 0; softmax_j(q (k_j + b)) == softmax_j(q k_j);"
        " P (A (V + 1 b)) + c == P A V + (P b + c), as A 1 == 1"
    )
    return Rewrite("attention without biases", algebra, apply)


def _remove_biases(attn: Any) -> None:
    """Change one attention whose tokens have :data:`QUERY_SHIFT` added from now on, in place."""
    value, value_bias = read_weights(attn.v)
    outer, constant = read_weights(attn.proj)
    if has_path(attn, "reduce.weight"):
        one = torch.ones(value.shape[1], dtype=torch.float64)
        attn.reduce = fold_affine_before(attn.reduce, one, -QUERY_SHIFT * one)
    else:
        value_bias = value_bias - QUERY_SHIFT * value.sum(1)
    attn.q = _absorb_bias(attn.q)
    attn.proj = replace_weights(attn.proj, outer, constant + outer @ value_bias)
    for layer in (attn.k, attn.v):
        remove_bias(layer)


def absorb_biases(norm: str, *layers: str, unless: str | None = None) -> Rewrite:
    """The biases of the linears ``layers``, which must be all that reads ``norm``, go into their weights, as
    those of the queries in :func:`remove_attention_biases`; in every submodule that has all these paths, and
    not the path ``unless``. The norm's affine part goes into the layers first, unless that has been done."""

    def apply(module: nn.Module) -> int:
        found = find_modules(module, norm, *layers)
        places = [m for m in found if unless is None or not has_path(m, unless)]
        for place in places:
            if isinstance(get_value(place, norm), nn.LayerNorm):
                fold_affine(norm, *layers).apply(place)
            get_value(place, norm).shift = QUERY_SHIFT
            for layer in layers:
                set_value(place, layer, _absorb_bias(get_value(place, layer)))
        return len(places)

    name = f"biases behind {norm} into {', '.join(layers)}"
    return Rewrite(name, "W x + b == (W + r 1^T) (x + c 1), as sum(x) == 0", apply)


def _absorb_bias(layer: nn.Linear) -> nn.Linear:
    """``layer`` without a bias, for normalised tokens that have :data:`QUERY_SHIFT` added from now on."""
    weight, bias = read_weights(layer)
    of_shift = QUERY_SHIFT * weight.sum(1)
    carried = (bias - of_shift) / (QUERY_SHIFT * weight.shape[1])
    absorbed = replace_weights(layer, weight + carried[:, None], bias)
    remove_bias(absorbed)
    return absorbed


def shift_tokens(block: nn.Module, norm: str, attention: str) -> None:
    """Add :data:`QUERY_SHIFT` to the normalised tokens that an attention reads, whose affine part goes into
    the layers that read them."""
    if isinstance(get_value(block, norm), nn.LayerNorm):  # unless an earlier rewrite has folded it
        reduces = has_path(block, f"{attention}.reduce.weight")
        readers = ("q", "reduce") if reduces else ("q", "k", "v")
        fold_affine(norm, *(f"{attention}.{name}" for name in readers)).apply(block)
    get_value(block, norm).shift = QUERY_SHIFT
