"""Exact algebraic rewrites: a reference model becomes a deployment model with the same logits and fewer
operations.

A rewrite has a name and its algebra, and changes a float64 copy of the model in place; a family lists those
that apply to it (``ModelSpec.rewrites``). They are written for inference (eval mode). ``s`` and ``t`` are a
norm's scale and shift, folded in float64 and rounded once:

* :func:`fold_batch_norm` a conv or linear:  ``s * (W x + b) + t  ==  (s W) x + (s b + t)``.
* :func:`fold_affine` a conv or linear:  ``W (s x + t) + b  ==  (W s) x + (b + sum(W) t)``; for a conv only
  without padding, because zeros of the padding would become ``t``.
* :func:`fold_shortcut`:  ``DW x + x  ==  (DW + I) x``: one is added to the centre tap.
* :func:`fold_scale`:  ``(q k^T) c  ==  (c q) k^T``: the attention's scale goes into the query projection.
* :func:`drop_key_bias` and :func:`fold_value_bias`: the softmax does not see the first, and the second
  passes through it because its rows sum to 1.
* :func:`remove_attention_biases`: the queries' bias goes into their weights as well, because a normalised
  token sums to 0. TensorRT for RTX then reads queries, keys and values where their products leave them.
* :func:`pad_heads`: channels of zeros make the width of a head a multiple of 8, which GPUs read at once.
* :func:`attend_over_keys` and :func:`attend_with_tokens`: the projections of the many queries' tokens move to
  the few keys'.
* :func:`replace_batch_norms`: between an activation and a zero-padded conv a batch norm cannot be folded
  exactly; it stays as one scale-and-shift, which a runtime attaches to the conv before it.
* :func:`merge_keys_and_values`: one product for both, ordered so that splitting it again is free. Queries
  stay apart: in general they come from other tokens. Where they come from the same tokens, splitting three
  ways costs what the larger product saves.

Dropout and stochastic depth are the identity in eval mode and disappear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import InputError

from .folding import (
    GlobalMean,
    PlainNorm,
    ScaleShift,
    fold_affine_after,
    fold_affine_before,
    fold_identity,
    read_affine,
    read_weights,
    remove_bias,
    replace_weights,
)
from .layers import DropPath, ResidualDepthwise
from .spec import CPU, Rewrite

Model = TypeVar("Model", bound=nn.Module)
"""The class of a model, which :func:`fuse` keeps."""

QUERY_SHIFT = 0.5
"""Added to each channel of a normalised token where a product carries a number (:func:`attend_over_keys`).

Half the standard deviation of the token: it costs little of a quantizer's range and keeps ``a_j`` small.
"""


def fuse(model: Model, *, target: str = CPU, without: Collection[str] = ()) -> Model:
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
    spec = getattr(model, "spec", None)
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
    rewrites = spec.choose_rewrites(target)
    names = [rewrite.name for rewrite in rewrites]
    if unknown := sorted(set(without) - set(names)):
        raise InputError(
            f"{spec.name} has no rewrite {unknown[0]!r}",
            remedy=f"choose from: {', '.join(names)}",
        )
    keep_spec = {id(spec): spec}  # the copy shares the registry's entry
    fused = copy.deepcopy(model, keep_spec).double()
    with torch.no_grad():
        for rewrite in rewrites:
            if rewrite.name not in without and rewrite.apply(fused) == 0:
                raise ValueError(f"the rewrite {rewrite.name!r} finds no place in {spec.name}")
        replace_modules(fused, (nn.Dropout, DropPath), lambda _: nn.Identity())
    cast(Any, fused).fused = True
    return fused.to(next(model.parameters()).dtype)


# --- named rewrites that families share -----------------------------------------------------------


def fold_batch_norm(layer: str, norm: str) -> Rewrite:
    """``norm(layer(x)) -> layer(x)``, in every submodule that has both attribute paths."""

    def apply(module: nn.Module) -> int:
        places = [m for m in find_modules(module, layer, norm) if isinstance(_get(m, norm), nn.BatchNorm2d)]
        for place in places:
            scale, shift = read_affine(_get(place, norm))
            _set_module(
                place,
                layer,
                fold_affine_after(_get(place, layer), scale, shift),
            )
            _set_module(place, norm, nn.Identity())
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
        has_affine = isinstance(_get(module, norm), (nn.BatchNorm2d, nn.LayerNorm))
        return has_affine and (unless is None or not _has(module, unless))

    def apply(module: nn.Module) -> int:
        places = [m for m in find_modules(module, norm, *layers) if is_place(m)]
        for place in places:
            old = _get(place, norm)
            scale, shift = read_affine(old)
            for layer in layers:
                _set_module(
                    place,
                    layer,
                    fold_affine_before(_get(place, layer), scale, shift),
                )
            _set_module(
                place,
                norm,
                PlainNorm(old) if isinstance(old, nn.LayerNorm) else nn.Identity(),
            )
        return len(places)

    name = f"affine of {norm} into {', '.join(layers)}"
    return Rewrite(name, "W (s x + t) + b == (W s) x + (b + sum(W) t)", apply)


def fold_scale(layer: str, scale: str = "scale") -> Rewrite:
    """The number ``scale`` of a submodule goes into its ``layer``; the attribute becomes 1."""

    def apply(module: nn.Module) -> int:
        places = [m for m in find_modules(module, layer, scale) if _get(m, scale) != 1.0]
        for place in places:
            factor = torch.tensor(_get(place, scale), dtype=torch.float64)
            _set_module(
                place,
                layer,
                fold_affine_after(_get(place, layer), factor, factor * 0),
            )
            _set_module(place, scale, 1.0)
        return len(places)

    return Rewrite(f"{scale} into {layer}", "(q k^T) c == (c q) k^T", apply)


def drop_key_bias(layer: str) -> Rewrite:
    """The linear ``layer``, which makes keys, loses its bias ``b``: it adds ``q b`` to all scores of a query,
    and the softmax does not see that."""

    def apply(module: nn.Module) -> int:
        places = find_modules(module, f"{layer}.bias")
        for place in places:
            remove_bias(_get(place, layer))
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
            values = cast(nn.Linear, _get(place, layer))
            out = cast(nn.Linear, _get(place, proj))
            weight, bias = read_weights(out)
            _set_module(
                place,
                proj,
                replace_weights(out, weight, bias + weight @ values.bias.double()),
            )
            remove_bias(values)
        return len(places)

    algebra = "P (A (V + 1 b)) + c == P A V + (P b + c), as A 1 == 1"
    return Rewrite(f"bias of {layer} into {proj}", algebra, apply)


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
            bias = cast(Tensor, _get(place, position_bias)).detach()
            by_key = bias.permute(2, 0, 1).flatten(0, 1).contiguous()
            _set_module(place, position_bias, nn.Parameter(by_key))
            for block in _get(place, blocks):
                _attend_over_keys(block, norm, attention)
        return len(places)

    algebra = (
        "softmax_j((Q x_i + b) k_j) == softmax_j((x_i + c 1) (Q' k_j + a_j 1)), as sum(x_i) == 0; P (A V) + c"
        " == A (P V + 1 c), as A 1 == 1"
    )
    return Rewrite("q and proj into k and v", algebra, apply)


def _attend_over_keys(block: nn.Module, norm: str, attention: str) -> None:
    """Change one block whose position bias has a row for each key, in place."""
    _shift_tokens(block, norm, attention)
    _project_keys_alone(_get(block, attention))


def _shift_tokens(block: nn.Module, norm: str, attention: str) -> None:
    """Add :data:`QUERY_SHIFT` to the normalised tokens that an attention reads, whose affine part goes into
    the layers that read them."""
    if isinstance(_get(block, norm), nn.LayerNorm):  # unless an earlier rewrite has folded it
        reduces = _has(block, f"{attention}.reduce.weight")
        readers = ("q", "reduce") if reduces else ("q", "k", "v")
        fold_affine(norm, *(f"{attention}.{name}" for name in readers)).apply(block)
    _get(block, norm).shift = QUERY_SHIFT


def _pays(stage: nn.Module, blocks: str, attention: str, position_bias: str) -> bool:
    """Whether the products of an attention become fewer and its weights no more."""
    attn = _get(_get(stage, blocks)[0], attention)
    if not _has(attn, "reduce"):
        return False
    heads, queries, keys = cast(Tensor, _get(stage, position_bias)).shape
    width = cast(int, attn.q.in_features)
    before = 2 * queries * width**2 + 2 * keys * width**2 + 2 * queries * keys * width
    after = 2 * heads * keys * width**2 + 2 * heads * queries * keys * width
    return heads <= 2 and after < before


def attend_with_tokens(norm: str, attention: str) -> Rewrite:
    """The linears ``q`` and ``proj`` of an attention with a single head go into ``k`` and ``v``, which run on
    fewer tokens; the attention keeps its form, with the normalised tokens themselves as queries.

    The algebra is that of :func:`attend_over_keys`. That is done where the keys' tokens are reduced. What the
    keys' own bias adds is the same for all keys of a query, so that the softmax does not see it.
    """

    def apply(module: nn.Module) -> int:
        found = find_modules(module, norm, f"{attention}.reduce.weight", f"{attention}.q.weight")
        places = [place for place in found if _get(place, attention).heads == 1]
        for place in places:
            attn = _get(place, attention)
            _shift_tokens(place, norm, attention)
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
        return plain + (query_bias[head] @ k / QUERY_SHIFT - plain.sum(0)) / width

    keys = [(with_query(key[h], h), with_query(key_bias[h, None], h)[:, 0]) for h in rows]
    values = [
        (
            outer[:, h] @ value[h],
            outer[:, h] @ value_bias[h] + constant / heads,
        )
        for h in rows
    ]
    wide = nn.Linear(attn.k.in_features, heads * width, dtype=torch.float64)
    attn.k = _stack(wide, keys)
    attn.v = _stack(wide, values)
    attn.q = attn.proj = nn.Identity()
    attn.over_keys = True


def _stack(layer: nn.Linear, parts: list[tuple[Tensor, Tensor]]) -> nn.Linear:
    """``layer`` with the weights and biases of ``parts``, one below the other."""
    weights, biases = zip(*parts, strict=True)
    return replace_weights(layer, torch.cat(weights), torch.cat(biases))


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
            _shift_tokens(place, norm, attention)
            _remove_biases(_get(place, attention))
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
    if _has(attn, "reduce.weight"):
        one = torch.ones(value.shape[1], dtype=torch.float64)
        attn.reduce = fold_affine_before(attn.reduce, one, -QUERY_SHIFT * one)
    else:
        value_bias = value_bias - QUERY_SHIFT * value.sum(1)
    attn.q = _absorb_bias(attn.q)
    attn.proj = replace_weights(attn.proj, outer, constant + outer @ value_bias)
    for layer in (attn.k, attn.v):
        remove_bias(layer)


def _absorb_bias(layer: nn.Linear) -> nn.Linear:
    """``layer`` without a bias, for normalised tokens that have :data:`QUERY_SHIFT` added from now on."""
    weight, bias = read_weights(layer)
    carried = (bias - QUERY_SHIFT * weight.sum(1)) / (QUERY_SHIFT * weight.shape[1])
    absorbed = replace_weights(layer, weight + carried[:, None], bias)
    remove_bias(absorbed)
    return absorbed


def absorb_biases(norm: str, *layers: str, unless: str | None = None) -> Rewrite:
    """The biases of the linears ``layers``, which must be all that reads ``norm``, go into their weights, as
    those of the queries in :func:`remove_attention_biases`; in every submodule that has all these paths, and
    not the path ``unless``. The norm's affine part goes into the layers first, unless that has been done."""

    def apply(module: nn.Module) -> int:
        places = [m for m in find_modules(module, norm, *layers) if unless is None or not _has(m, unless)]
        for place in places:
            if isinstance(_get(place, norm), nn.LayerNorm):
                fold_affine(norm, *layers).apply(place)
            _get(place, norm).shift = QUERY_SHIFT
            for layer in layers:
                _set_module(place, layer, _absorb_bias(_get(place, layer)))
        return len(places)

    name = f"biases behind {norm} into {', '.join(layers)}"
    return Rewrite(name, "W x + b == (W + r 1^T) (x + c 1), as sum(x) == 0", apply)


def pad_heads(multiple: int = 8) -> Rewrite:
    """Zeros make the width of each head of ``q``, ``k``, ``v`` and ``proj`` a multiple of ``multiple``; heads
    that are one already stay. The attention's scale must have been folded."""

    def apply(module: nn.Module) -> int:
        places = find_modules(module, "q.weight", "k.weight", "v.weight", "proj.weight", "heads")
        for place in places:
            attn = cast(Any, place)
            for name in ("q", "k", "v"):
                _set_module(place, name, _pad_rows(_get(place, name), attn.heads, multiple))
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
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, dtype=torch.float64)
    layer.weight = nn.Parameter(weight.detach())
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach())
    return layer


def merge_keys_and_values() -> Rewrite:
    """The linears ``k`` and ``v``, which read the same tokens, become one, ``kv``.

    The keys come first, so that heads split the result without moving values.
    """

    def apply(module: nn.Module) -> int:
        places = [m for m in find_modules(module, "k.weight", "v.weight", "heads") if hasattr(m, "kv")]
        for place in places:
            attn = cast(Any, place)
            both = nn.Linear(
                attn.k.in_features,
                2 * attn.k.out_features,
                dtype=torch.float64,
            )
            attn.kv = _stack(both, [read_weights(attn.k), read_weights(attn.v)])
            attn.k = attn.v = nn.Identity()
        return len(places)

    return Rewrite("k and v as one", "[X K, X V] == X [K, V]", apply)


def keep_class_token() -> Rewrite:
    """The last block computes the class token alone, because the head reads nothing else.

    For models that have the switch ``class_only``.
    """

    def apply(module: nn.Module) -> int:
        places = [m for m in module.modules() if getattr(m, "class_only", None) is False]
        for place in places:
            cast(Any, place).class_only = True
        return len(places)

    return Rewrite(
        "class token only in the last block",
        "(X + f(A X))[0] == X[0] + f(A[0] X)",
        apply,
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


def fold_shortcut() -> Rewrite:
    """``x + conv(x)`` of a depthwise conv becomes one depthwise conv."""

    def plain(module: nn.Module) -> nn.Module:
        old = cast(ResidualDepthwise, module)
        kernel = old.kernel_size[0]
        conv = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            kernel,
            padding=kernel // 2,
            groups=old.groups,
        )
        conv.load_state_dict(old.state_dict())
        return fold_identity(conv.double())

    return replace_each(
        "shortcut into depthwise conv",
        "DW x + x == (DW + I) x",
        ResidualDepthwise,
        plain,
    )


def replace_batch_norms() -> Rewrite:
    """Batch norms that no layer can take become one multiplication and one addition."""
    return replace_each(
        "batch norm as affine",
        "norm(x) == s x + t",
        nn.BatchNorm2d,
        ScaleShift,
    )


def replace_global_pools() -> Rewrite:
    """``AdaptiveAvgPool2d(1)`` becomes a mean.

    For a channels-last map torch.onnx writes the pooling with a gather by computed indices, and the mean as
    one operation. The rewrite can be pickled, as models from outside the registry can.
    """
    return Rewrite("global pooling as mean", "pool(x) == sum(x) / (H W)", _replace_pools_by_means)


def _replace_pools_by_means(module: nn.Module) -> int:
    places = [
        (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1))
    ]
    for parent, name in places:
        setattr(parent, name, GlobalMean())
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


def find_modules(root: nn.Module, *paths: str) -> list[nn.Module]:
    """The submodules of ``root``, itself included, that have all these attribute paths."""
    return [m for m in root.modules() if all(_has(m, path) for path in paths)]


def _has(module: nn.Module, path: str) -> bool:
    try:
        return _get(module, path) is not None
    except AttributeError:
        return False


def _get(module: nn.Module, path: str) -> Any:
    return attrgetter(path)(module)


def _set_module(module: nn.Module, path: str, value: object) -> None:
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(module) if owner else module, name, value)
