"""Exact algebraic rewrites: a reference model becomes a deployment model with the same logits and fewer
operations.

A rewrite has a name and its algebra, and changes a float64 copy of the model in place; a family subscribes to
a list of them (``ModelSpec.rewrites``). They are written for inference (eval mode). ``s`` and ``t`` are a
norm's scale and shift, folded in float64 and rounded once:

* :func:`batch_norm_after` a conv or linear:  ``s * (W x + b) + t  ==  (s W) x + (s b + t)``.
* :func:`affine_into` a conv or linear:  ``W (s x + t) + b  ==  (W s) x + (b + sum(W) t)``; for a conv only
  without padding, since zeros of the padding would become ``t``.
* :func:`shortcut_into_depthwise`:  ``DW x + x  ==  (DW + I) x``: one is added to the centre tap.
* :func:`scale_into`:  ``(q k^T) c  ==  (c q) k^T``: the attention's scale goes into the query projection.
* :func:`key_bias_dropped`, :func:`value_bias_into`: what a softmax does not see, and what passes it because
its rows sum to 1.
* :func:`attention_over_keys`: the projections of the many queries' tokens move to the few keys'.
* :func:`batch_norm_as_affine`: between an activation and a zero-padded conv a batch norm cannot be folded
  exactly; it stays as one scale-and-shift, which a runtime attaches to the conv before it.
* :func:`keys_and_values_as_one`: one product for both, ordered so that splitting it again is free. Queries
  stay apart: they are of other tokens, and where they are not, splitting three ways cost what the larger
  product saved.

Dropout and stochastic depth are the identity in eval mode and disappear.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cmt_edge.deploy.errors import InputError

from .layers import DropPath, ResidualDepthwise

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


@dataclass(frozen=True)
class Rewrite:
    """One exact change of a model.

    Attributes:
        name: what it is called in tables and in ``fuse(model, without=...)``.
        algebra: why it is exact, in one line.
        apply: changes a float64 copy in place and returns in how many places; raises ``ValueError`` where it
            would not be exact.
    """

    name: str
    algebra: str
    apply: Callable[[nn.Module], int]


def fuse(model: nn.Module, *, without: Collection[str] = ()) -> nn.Module:
    """A new module with the logits of ``model`` (difference below 1e-5) and fewer operations; ``model`` is
    untouched.

    Args:
        model: built by :func:`cmt_edge.cmt.create_model`, in eval mode.
        without: names of rewrites to leave out, for measuring what each is worth.

    Raises:
        InputError: the model is in training mode (batch statistics cannot be folded), its family has no
            rewrites, or ``without`` names one that it does not have.
    """
    spec = getattr(model, "spec", None)
    if spec is None:
        raise InputError(
            f"{type(model).__name__} has no registered rewrite", remedy="build it with cmt.create_model"
        )
    if getattr(model, "fused", False):
        raise InputError("the model is fused already", remedy="keep the reference model and fuse that")
    if model.training:
        raise InputError(
            "a model in training mode cannot be fused",
            why="its batch norms use the statistics of each batch",
            remedy="call model.eval()",
        )
    names = [rewrite.name for rewrite in spec.rewrites]
    if unknown := sorted(set(without) - set(names)):
        raise InputError(
            f"{spec.name} has no rewrite {unknown[0]!r}", remedy=f"choose from: {', '.join(names)}"
        )
    fused = copy.deepcopy(model, {id(spec): spec}).double()
    with torch.no_grad():
        for rewrite in spec.rewrites:
            if rewrite.name not in without and rewrite.apply(fused) == 0:
                raise ValueError(f"the rewrite {rewrite.name!r} finds no place in {spec.name}")
        replace_modules(fused, (nn.Dropout, DropPath), lambda _: nn.Identity())
    fused.fused = True  # type: ignore[assignment]
    return fused.to(next(model.parameters()).dtype)


# --- named rewrites that families share -----------------------------------------------------------


def batch_norm_after(layer: str, norm: str) -> Rewrite:
    """``norm(layer(x)) -> layer(x)``, in every submodule that has both attribute paths."""

    def apply(module: nn.Module) -> int:
        places = [m for m in having(module, layer, norm) if isinstance(_get(m, norm), nn.BatchNorm2d)]
        for place in places:
            _set(place, layer, affine_after(_get(place, layer), *norm_affine(_get(place, norm))))
            _set(place, norm, nn.Identity())
        return len(places)

    return Rewrite(f"{norm} into {layer}", "s (W x + b) + t == (s W) x + (s b + t)", apply)


def affine_into(norm: str, *layers: str, unless: str | None = None) -> Rewrite:
    """The affine part of ``norm`` goes into the ``layers`` that read it, in every submodule that has all
    these attribute paths.

    ``layers`` must be all that read it: submodules with the path ``unless``, where others do, are left alone.
    """

    def apply(module: nn.Module) -> int:
        places = [
            m
            for m in having(module, norm, *layers)
            if isinstance(_get(m, norm), (nn.BatchNorm2d, nn.LayerNorm))
        ]
        places = [m for m in places if unless is None or not _has(m, unless)]
        for place in places:
            old = _get(place, norm)
            for layer in layers:
                _set(place, layer, affine_before(_get(place, layer), *norm_affine(old)))
            _set(place, norm, PlainNorm(old) if isinstance(old, nn.LayerNorm) else nn.Identity())
        return len(places)

    return Rewrite(
        f"affine of {norm} into {', '.join(layers)}", "W (s x + t) + b == (W s) x + (b + sum(W) t)", apply
    )


def scale_into(layer: str, scale: str = "scale") -> Rewrite:
    """The number ``scale`` of a submodule goes into its ``layer``; the attribute becomes 1."""

    def apply(module: nn.Module) -> int:
        places = [m for m in having(module, layer, scale) if _get(m, scale) != 1.0]
        for place in places:
            factor = torch.tensor(_get(place, scale), dtype=torch.float64)
            _set(place, layer, affine_after(_get(place, layer), factor, factor * 0))
            _set(place, scale, 1.0)
        return len(places)

    return Rewrite(f"{scale} into {layer}", "(q k^T) c == (c q) k^T", apply)


def key_bias_dropped(layer: str) -> Rewrite:
    """The bias of the linear ``layer`` that makes keys adds ``q b`` to all scores of a query: softmax does
    not see it."""

    def apply(module: nn.Module) -> int:
        places = [cast(nn.Linear, _get(m, layer)) for m in having(module, f"{layer}.bias")]
        for place in places:
            place.bias = cast(Any, None)
        return len(places)

    return Rewrite(f"bias of {layer} dropped", "softmax_j(q (k_j + b)) == softmax_j(q k_j)", apply)


def value_bias_into(layer: str, proj: str) -> Rewrite:
    """The bias of the linear ``layer`` that makes values passes the attention, whose rows sum to 1, and goes
    into ``proj``."""

    def apply(module: nn.Module) -> int:
        places = having(module, f"{layer}.bias", proj)
        for place in places:
            values, out = _get(place, layer), _get(place, proj)
            weight, bias = doubled(out)
            _set(place, proj, with_weights(out, weight, bias + weight @ values.bias.double()))
            values.bias = cast(Any, None)
        return len(places)

    return Rewrite(
        f"bias of {layer} into {proj}", "P (A (V + 1 b)) + c == P A V + (P b + c), as A 1 == 1", apply
    )


def attention_over_keys(
    blocks: str, norm: str, attention: str, position_bias: str = "position_bias"
) -> Rewrite:
    """The linears ``q`` and ``proj`` of an attention go into ``k`` and ``v``, which run on fewer tokens;
    ``q`` and ``reduce`` read the ``norm``.

    For head ``h``, with keys and values ``K_h x_j``, ``V_h x_j`` of reduced tokens ``x_j``, both factors of a
    product meet in one matrix:

    * scores: ``(Q_h x_i)^T (K_h x_j) == x_i^T (Q_h^T K_h x_j)``;
    * output: ``P [A_1 V_1; ..; A_h V_h] + c == sum_h A_h (P_h V_h) + c``, and as the rows of every ``A_h``
      sum to 1, ``c / heads`` goes into each head's values.

    What is left of the bias of ``q`` is one number for each key, ``d_j``. A normalised token sums to 0, so
    adding 1/2 to each of its channels makes its product with ``1`` a constant, which carries that number:
    ``a_j`` is such that ``c sum(Q' k_j + a_j 1) == d_j``.

    A key gets a row of all channels for each head. That is done in the stages (submodules with ``blocks`` and
    ``position_bias``) where it needs neither more weights (up to two heads) nor more multiplications; the
    bias is reordered with the rows, from ``(heads, N, Nk)`` to ``(Nk heads, N)``.
    """

    def apply(module: nn.Module) -> int:
        places = [
            m for m in having(module, blocks, position_bias) if _pays(m, blocks, attention, position_bias)
        ]
        for place in places:
            bias = cast(Tensor, _get(place, position_bias))
            _set(
                place, position_bias, nn.Parameter(bias.detach().permute(2, 0, 1).flatten(0, 1).contiguous())
            )
            for block in _get(place, blocks):
                if isinstance(_get(block, norm), nn.LayerNorm):  # otherwise it has been folded before
                    affine_into(norm, f"{attention}.q", f"{attention}.reduce").apply(block)
                _get(block, norm).shift = QUERY_SHIFT
                _project_keys_alone(_get(block, attention))
        return len(places)

    algebra = (
        "softmax_j((Q x_i + b) k_j) == softmax_j((x_i + c 1) (Q' k_j + a_j 1)), as sum(x_i) == 0; P (A V) + c"
        " == A (P V + 1 c), as A 1 == 1"
    )
    return Rewrite("q and proj into k and v", algebra, apply)


def _pays(stage: nn.Module, blocks: str, attention: str, position_bias: str) -> bool:
    """Whether the products of an attention become fewer and its weights no more."""
    attn = _get(_get(stage, blocks)[0], attention)
    if not _has(attn, "reduce"):
        return False
    (heads, queries, keys), width = cast(Tensor, _get(stage, position_bias)).shape, attn.q.in_features
    before = 2 * queries * width**2 + 2 * keys * width**2 + 2 * queries * keys * width
    after = 2 * heads * keys * width**2 + 2 * heads * queries * keys * width
    return heads <= 2 and after < before


def _project_keys_alone(attn: Any) -> None:
    """Of one attention with ``q``, ``k``, ``v``, ``proj`` and ``reduce`` that reads plain normalised tokens;
    its input gets :data:`QUERY_SHIFT`."""
    one = torch.ones(attn.reduce.in_channels, dtype=torch.float64)
    attn.reduce = affine_before(attn.reduce, one, -QUERY_SHIFT * one)
    (query, query_bias), (outer, constant) = doubled(attn.q), doubled(attn.proj)
    (key, key_bias), (value, value_bias) = doubled(attn.k), doubled(attn.v)
    width, heads = query.shape[1], attn.heads
    rows = torch.arange(query.shape[0]).chunk(heads)

    def with_query(k: Tensor, head: Tensor) -> Tensor:  # (d, columns) -> (width, columns)
        plain = query[head].T @ k
        return plain + (query_bias[head] @ k / QUERY_SHIFT - plain.sum(0)) / width

    keys = [(with_query(key[h], h), with_query(key_bias[h, None], h)[:, 0]) for h in rows]
    values = [(outer[:, h] @ value[h], outer[:, h] @ value_bias[h] + constant / heads) for h in rows]
    wide = nn.Linear(attn.k.in_features, heads * width, dtype=torch.float64)
    attn.k, attn.v = (
        with_weights(wide, torch.cat([w for w, _ in parts]), torch.cat([b for _, b in parts]))
        for parts in (keys, values)
    )
    attn.q = attn.proj = nn.Identity()
    attn.over_keys = True


def keys_and_values_as_one() -> Rewrite:
    """The linears ``k`` and ``v``, which read the same tokens, become one, ``kv``: keys first, so that heads
    split it without moving values."""

    def apply(module: nn.Module) -> int:
        places = [cast(Any, m) for m in having(module, "k.weight", "v.weight", "heads") if hasattr(m, "kv")]
        for place in places:
            (weight, bias), (weight_v, bias_v) = doubled(place.k), doubled(place.v)
            both = nn.Linear(place.k.in_features, 2 * place.k.out_features, dtype=torch.float64)
            place.kv = with_weights(both, torch.cat([weight, weight_v]), torch.cat([bias, bias_v]))
            place.k = place.v = nn.Identity()
        return len(places)

    return Rewrite("k and v as one", "[X K, X V] == X [K, V]", apply)


QUERY_SHIFT = 0.5
"""Half the standard deviation of what it is added to: it costs little of a quantizer's range and keeps
``a_j`` small."""


def class_token_only() -> Rewrite:
    """The last block computes the class token alone, which is all that the head reads: models with the switch
    ``class_only``."""

    def apply(module: nn.Module) -> int:
        places = [m for m in module.modules() if getattr(m, "class_only", None) is False]
        for place in places:
            cast(Any, place).class_only = True
        return len(places)

    return Rewrite("class token only in the last block", "(X + f(A X))[0] == X[0] + f(A[0] X)", apply)


def in_order(*rewrites: Rewrite) -> Rewrite:
    """``rewrites`` as one, where a later one works on what an earlier one makes; each must find the same
    number of places."""

    def apply(module: nn.Module) -> int:
        counts = [rewrite.apply(module) for rewrite in rewrites]
        if len({*counts}) > 1:
            raise ValueError(f"{', '.join(r.name for r in rewrites)} find different places: {counts}")
        return counts[0]

    return Rewrite("; ".join(r.name for r in rewrites), "; ".join(r.algebra for r in rewrites), apply)


def shortcut_into_depthwise() -> Rewrite:
    """``x + conv(x)`` of a depthwise conv becomes one depthwise conv."""

    def plain(module: nn.Module) -> nn.Module:
        old = cast(ResidualDepthwise, module)
        new = nn.Conv2d(
            old.in_channels,
            old.out_channels,
            cast(Any, old.kernel_size),
            cast(Any, old.stride),
            cast(Any, old.padding),
            cast(Any, old.dilation),
            old.groups,
            bias=old.bias is not None,
        )
        new.load_state_dict(old.state_dict())
        return with_identity(new.double())

    return replaced("shortcut into depthwise conv", "DW x + x == (DW + I) x", ResidualDepthwise, plain)


def batch_norm_as_affine() -> Rewrite:
    """Batch norms that no layer can take become one multiplication and one addition."""
    return replaced("batch norm as affine", "norm(x) == s x + t", nn.BatchNorm2d, ScaleShift)


def global_pool_as_mean() -> Rewrite:
    """For a channels-last map torch.onnx writes ``AdaptiveAvgPool2d(1)`` with a gather by computed indices,
    the mean as one operation."""

    def apply(module: nn.Module) -> int:
        places = [
            (parent, name)
            for parent in module.modules()
            for name, child in parent.named_children()
            if type(child) is nn.AdaptiveAvgPool2d and child.output_size in (1, (1, 1))
        ]
        for parent, name in places:
            setattr(parent, name, GlobalMean())
        return len(places)

    return Rewrite("global pooling as mean", "pool(x) == sum(x) / (H W)", apply)


def replaced(
    name: str, algebra: str, kind: type[nn.Module], make: Callable[[nn.Module], nn.Module]
) -> Rewrite:
    """Every submodule of exactly the type ``kind`` becomes ``make(submodule)``, with the same inputs and
    outputs."""
    return Rewrite(name, algebra, lambda module: replace_modules(module, (kind,), make))


def replace_modules(
    root: nn.Module, kinds: tuple[type[nn.Module], ...], make: Callable[[nn.Module], nn.Module]
) -> int:
    """Replace every submodule of exactly these types; the number of places."""
    places = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if type(child) in kinds
    ]
    for parent, name, child in places:
        setattr(parent, name, make(child))
    return len(places)


def having(root: nn.Module, *paths: str) -> list[nn.Module]:
    """The submodules of ``root``, itself included, that have all these attribute paths."""
    return [m for m in root.modules() if all(_has(m, path) for path in paths)]


def _has(module: nn.Module, path: str) -> bool:
    try:
        return _get(module, path) is not None
    except AttributeError:
        return False


def _get(module: nn.Module, path: str) -> Any:
    return attrgetter(path)(module)


def _set(module: nn.Module, path: str, value: object) -> None:
    owner, _, name = path.rpartition(".")
    setattr(attrgetter(owner)(module) if owner else module, name, value)


# --- rewrites of single layers: each returns a new float64 module ---------------------------------


def norm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift, both ``(C,)`` float64, of a batch norm in eval mode or of a layer norm's affine
    part."""
    weight, bias = cast(Tensor, norm.weight).double(), cast(Tensor, norm.bias).double()
    if isinstance(norm, nn.BatchNorm2d):
        scale = weight / (cast(Tensor, norm.running_var).double() + norm.eps).sqrt()
        return scale, bias - cast(Tensor, norm.running_mean).double() * scale
    return weight, bias


def with_weights(layer: Layer, weight: Tensor, bias: Tensor) -> Layer:
    """A copy of ``layer`` with new weights (float64)."""
    new = copy.deepcopy(layer)
    new.weight, new.bias = nn.Parameter(weight.detach()), nn.Parameter(bias.detach())
    return new


def doubled(layer: nn.Conv2d | nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias in float64; a missing bias is zero."""
    weight = layer.weight.double()
    return weight, weight.new_zeros(weight.shape[0]) if layer.bias is None else layer.bias.double()


def unchanged(layer: Layer) -> Layer:
    """A copy in float64."""
    return with_weights(layer, *doubled(layer))


def affine_after(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """``scale * layer(x) + shift`` as one layer."""
    weight, bias = doubled(layer)
    return with_weights(layer, weight * scale.reshape(-1, *[1] * (weight.ndim - 1)), bias * scale + shift)


def affine_before(layer: Layer, scale: Tensor, shift: Tensor) -> Layer:
    """``layer(scale * x + shift)`` as one layer; refuses a zero-padded conv, where it would be wrong at the
    borders."""
    weight: Tensor
    weight, bias = doubled(layer)
    per_channel = [1, -1, *[1] * (weight.ndim - 2)]
    if isinstance(layer, nn.Conv2d):
        if layer.padding != (0, 0) and bool(shift.any()):
            raise ValueError("an affine before a zero-padded conv cannot be folded exactly")
        if is_depthwise(layer):
            per_channel = [-1, 1, 1, 1]  # such a filter reads the one input channel of its own number
        elif layer.groups > 1:
            raise ValueError("only dense and depthwise convs are folded")
    constant = (weight * shift.reshape(per_channel)).flatten(1).sum(1)
    return with_weights(layer, weight * scale.reshape(per_channel), bias + constant)


def is_depthwise(conv: nn.Conv2d) -> bool:
    """One filter a channel."""
    return conv.groups == conv.in_channels == conv.out_channels


def with_identity(depthwise: nn.Conv2d) -> nn.Conv2d:
    """``depthwise(x) + x`` as one depthwise conv (odd kernel, stride 1, same padding)."""
    kh, kw = depthwise.kernel_size
    same = (
        depthwise.stride == (1, 1)
        and depthwise.padding == (kh // 2, kw // 2)
        and depthwise.dilation == (1, 1)
    )
    if not (is_depthwise(depthwise) and same and kh % 2 and kw % 2):
        raise ValueError(
            "the shortcut can be folded only into a depthwise conv of stride 1 with same padding"
        )
    weight, bias = doubled(depthwise)
    weight = weight.clone()
    weight[:, 0, kh // 2, kw // 2] += 1
    return with_weights(depthwise, weight, bias)


class ScaleShift(nn.Module):
    """A batch norm that could not be folded: ``x * scale + shift`` per channel of ``(B, C, H, W)``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        scale, shift = norm_affine(norm)
        self.scale, self.shift = (nn.Parameter(t.reshape(1, -1, 1, 1)) for t in (scale, shift))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class GlobalMean(nn.Module):
    """Mean over the map: ``(B, C, H, W)`` -> ``(B, C, 1, 1)``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class PlainNorm(nn.Module):
    """Layer norm over the last axis without an affine part, but for one number ``shift`` that is added to
    all."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps, self.shift = norm.normalized_shape, norm.eps, 0.0

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x, self.shape, eps=self.eps)
        return normed + self.shift if self.shift else normed
