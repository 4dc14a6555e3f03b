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

from .biases import (
    QUERY_SHIFT,
    absorb_biases,
    drop_key_bias,
    fold_scale,
    fold_value_bias,
    remove_attention_biases,
)
from .blocks import (
    fold_shortcut,
    keep_class_token,
    replace_global_pools,
)
from .fusing import (
    fuse,
)
from .heads import (
    merge_keys_and_values,
    pad_heads,
)
from .norms import (
    fold_affine,
    fold_batch_norm,
    replace_batch_norms,
)
from .places import (
    chain_rewrites,
    find_modules,
    replace_each,
)
from .queries import (
    attend_over_keys,
    attend_with_tokens,
)

__all__ = [
    "QUERY_SHIFT",
    "absorb_biases",
    "attend_over_keys",
    "attend_with_tokens",
    "chain_rewrites",
    "drop_key_bias",
    "find_modules",
    "fold_affine",
    "fold_batch_norm",
    "fold_scale",
    "fold_shortcut",
    "fold_value_bias",
    "fuse",
    "keep_class_token",
    "merge_keys_and_values",
    "pad_heads",
    "remove_attention_biases",
    "replace_batch_norms",
    "replace_each",
    "replace_global_pools",
]
