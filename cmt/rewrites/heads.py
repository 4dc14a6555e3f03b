"""Rewrites of the products that make an attention's heads: their width, and how many they are."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..folding import read_weights, replace_weights
from ..spec import Rewrite
from .places import find_modules, get_value, set_value


def pad_heads(multiple: int = 8) -> Rewrite:
    """Zeros make the width of each head of ``q``, ``k``, ``v`` and ``proj`` a multiple of ``multiple``; heads
    that are one already stay. The attention's scale must have been folded."""

    def apply(module: nn.Module) -> int:
        places = find_modules(module, "q.weight", "k.weight", "v.weight", "proj.weight", "heads")
        for place in places:
            attn = cast(Any, place)
            for name in ("q", "k", "v"):
                padded = _pad_rows(get_value(place, name), attn.heads, multiple)
                set_value(place, name, padded)
            attn.proj = _pad_columns(attn.proj, attn.heads, multiple)
        return len(places)

    return Rewrite(f"heads padded to {multiple}", "[q, 0] [k, 0]^T == q k^T; [P, 0] [v, 0] == P v", apply)


def _pad_rows(layer: nn.Linear, heads: int, multiple: int) -> nn.Linear:
    """``layer``, whose outputs are ``heads`` times as many channels, with zeros behind those of each head."""
    weight, bias = read_weights(layer)
    split = weight.reshape(heads, -1, weight.shape[1])  # (heads, d, C)
    more = -split.shape[1] % multiple
    padded = nn.functional.pad(split, (0, 0, 0, more)).flatten(0, 1)
    biases = nn.functional.pad(bias.reshape(heads, -1), (0, more)).flatten()
    return _make_linear(padded, None if layer.bias is None else biases)


def _pad_columns(layer: nn.Linear, heads: int, multiple: int) -> nn.Linear:
    """``layer`` for inputs with zeros behind the channels of each head."""
    weight, bias = read_weights(layer)
    split = weight.reshape(weight.shape[0], heads, -1)  # (C, heads, d)
    padded = nn.functional.pad(split, (0, -split.shape[2] % multiple)).flatten(1)
    return _make_linear(padded, bias)


def _make_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear with these float64 weights."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, dtype=torch.float64)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def merge_keys_and_values() -> Rewrite:
    """The linears ``k`` and ``v``, which read the same tokens, become one, ``kv``.

    The keys come first, so that heads split the result without moving values.
    """

    def apply(module: nn.Module) -> int:
        found = find_modules(module, "k.weight", "v.weight", "heads")
        places = [m for m in found if hasattr(m, "kv")]
        for place in places:
            attn = cast(Any, place)
            both = nn.Linear(
                attn.k.in_features,
                2 * attn.k.out_features,
                dtype=torch.float64,
            )
            attn.kv = stack_rows(both, [read_weights(attn.k), read_weights(attn.v)])
            attn.k = attn.v = nn.Identity()
        return len(places)

    return Rewrite("k and v as one", "[X K, X V] == X [K, V]", apply)


def stack_rows(
    layer: nn.Linear,
    parts: list[tuple[Tensor, Tensor]],
) -> nn.Linear:
    """``layer`` with the weights and biases of ``parts``, one below the other."""
    weights, biases = zip(*parts, strict=True)
    return replace_weights(layer, torch.cat(weights), torch.cat(biases))
