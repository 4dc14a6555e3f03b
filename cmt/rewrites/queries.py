"""Rewrites that move the projections of an attention's many queries to its few keys."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..folding import fold_affine_before, read_weights, remove_bias
from ..spec import Rewrite
from .biases import QUERY_SHIFT, shift_tokens
from .heads import stack_rows
from .places import find_modules, get_value, has_path, set_value


def attend_over_keys(
    blocks: str,
    norm: str,
    attention: str,
    position_bias: str = "position_bias",
) -> Rewrite:
    """The linears ``q`` and ``proj`` of an attention go into ``k`` and ``v``, which run on fewer tokens.

    ``q`` and ``reduce`` must be all that reads the ``norm``. For head ``h``, with keys and values ``K_h x_j``
    and ``V_h x_j`` of reduced tokens ``x_j``, both factors of a product meet in one matrix:

    * scores: ``(Q_h x_i)^T (K_h x_j) == x_i^T (Q_h^T K_h x_j)``;
    * output: ``P [A_1 V_1; ..; A_h V_h] + c == sum_h A_h (P_h V_h) + c``, and because the rows of every
      ``A_h`` sum to 1, ``c / heads`` goes into each head's values.

    What is left of the bias of ``q`` is one number for each key, ``d_j``. A normalised token sums to 0, so
    adding ``c`` = :data:`QUERY_SHIFT` to each of its channels makes its product with ``1`` a constant, which
    carries that number: ``a_j`` is such that ``c sum(Q' k_j + a_j 1) == d_j``.

    A key gets a row of all channels for each head. That is done in the stages (submodules with ``blocks`` and
    ``position_bias``) where it needs neither more weights (up to two heads) nor more multiplications; the
    bias is reordered with the rows, from ``(heads, N, Nk)`` to ``(Nk heads, N)``.
    """

    def apply(module: nn.Module) -> int:
        stages = find_modules(module, blocks, position_bias)
        places = [stage for stage in stages if _pays(stage, blocks, attention, position_bias)]
        for place in places:
            bias = cast(Tensor, get_value(place, position_bias)).detach()
            by_key = bias.permute(2, 0, 1).flatten(0, 1).contiguous()
            set_value(place, position_bias, nn.Parameter(by_key))
            for block in get_value(place, blocks):
                _attend_over_keys(block, norm, attention)
        return len(places)

    algebra = (
        "softmax_j((Q x_i + b) k_j) == softmax_j((x_i + c 1) (Q' k_j + a_j 1)), as sum(x_i) == 0; P (A V) + c"
        " == A (P V + 1 c), as A 1 == 1"
    )
    return Rewrite("q and proj into k and v", algebra, apply)


def _attend_over_keys(block: nn.Module, norm: str, attention: str) -> None:
    """Change one block whose position bias has a row for each key, in place."""
    shift_tokens(block, norm, attention)
    _project_keys_alone(get_value(block, attention))


def _pays(
    stage: nn.Module,
    blocks: str,
    attention: str,
    position_bias: str,
) -> bool:
    """Whether the products of an attention become fewer and its weights no more."""
    attn = get_value(get_value(stage, blocks)[0], attention)
    if not has_path(attn, "reduce"):
        return False
    heads, queries, keys = cast(Tensor, get_value(stage, position_bias)).shape
    width = cast(int, attn.q.in_features)
    products = 2 * queries * keys * width  # the scores and the sums of values
    before = 2 * (queries + keys) * width**2 + products
    after = 2 * heads * keys * width**2 + heads * products
    return heads <= 2 and after < before


def attend_with_tokens(norm: str, attention: str) -> Rewrite:
    """The linears ``q`` and ``proj`` of an attention with a single head go into ``k`` and ``v``, which run on
    fewer tokens; the attention keeps its form, with the normalised tokens themselves as queries.

    The algebra is that of :func:`attend_over_keys`. That is done where the keys' tokens are reduced. What the
    keys' own bias adds is the same for all keys of a query, so that the softmax does not see it.
    """

    def apply(module: nn.Module) -> int:
        found = find_modules(module, norm, f"{attention}.reduce.weight", f"{attention}.q.weight")
        places = [place for place in found if get_value(place, attention).heads == 1]
        for place in places:
            attn = get_value(place, attention)
            shift_tokens(place, norm, attention)
            _project_keys_alone(attn)
            attn.over_keys = False
            remove_bias(attn.k)
        return len(places)

    algebra = (
        "softmax_j((Q x_i + b) (k_j + d)) == softmax_j((x_i + c 1) (Q' k_j)), as sum(x_i) == 0;"
        " P (A V) + c == A (P V + 1 c), as A 1 == 1"
    )
    return Rewrite("q and proj into k and v of single heads", algebra, apply)


def _project_keys_alone(attn: Any) -> None:
    """Change one attention that has ``q``, ``k``, ``v``, ``proj`` and ``reduce``, in place.

    It reads normalised tokens without an affine part, and from now on with :data:`QUERY_SHIFT` added.
    """
    one = torch.ones(attn.reduce.in_channels, dtype=torch.float64)
    attn.reduce = fold_affine_before(attn.reduce, one, -QUERY_SHIFT * one)
    query, query_bias = read_weights(attn.q)
    outer, constant = read_weights(attn.proj)
    key, key_bias = read_weights(attn.k)
    value, value_bias = read_weights(attn.v)
    width, heads = query.shape[1], attn.heads
    rows = torch.arange(query.shape[0]).chunk(heads)  # the channels of each head

    def with_query(k: Tensor, head: Tensor) -> Tensor:  # (d, columns) -> (width, columns)
        plain = query[head].T @ k
        number = query_bias[head] @ k / QUERY_SHIFT
        return plain + (number - plain.sum(0)) / width

    keys = [(with_query(key[h], h), with_query(key_bias[h, None], h)[:, 0]) for h in rows]
    values = [
        (
            outer[:, h] @ value[h],
            outer[:, h] @ value_bias[h] + constant / heads,
        )
        for h in rows
    ]
    wide = nn.Linear(attn.k.in_features, heads * width, dtype=torch.float64)
    attn.k = stack_rows(wide, keys)
    attn.v = stack_rows(wide, values)
    attn.q = attn.proj = nn.Identity()
    attn.over_keys = True
