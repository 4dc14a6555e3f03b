"""Published weights of MViT: their keys, their layout, and other resolutions."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...spec import KeyRenames, StateDict

RENAMES: KeyRenames = [
    (re.compile(r"^patch_embed\.proj\."), "embed."),
    (re.compile(r"^pos_embed$"), "position_embedding"),
    (re.compile(r"^cls_token$"), "class_token"),
    (re.compile(r"^(blocks\.\d+)\.proj\."), r"\1.shortcut."),
    (
        re.compile(r"\.attn\.pool_([qkv])\.weight$"),
        r".attn.pool_\1.conv.weight",
    ),
    (re.compile(r"\.attn\.norm_([qkv])\."), r".attn.pool_\1.norm."),
    (re.compile(r"\.attn\.rel_pos_h$"), ".attn.relative.rows"),
    (re.compile(r"\.attn\.rel_pos_w$"), ".attn.relative.columns"),
    (re.compile(r"^head\.projection\."), "head."),
]
"""Published key -> ours; ``attn.qkv`` keeps its name until :func:`adapt` takes it apart."""


def adapt(state: StateDict) -> StateDict:
    """``state`` with ``attn.qkv`` taken apart into ``q``, ``k``, ``v``, and with 4-D convs.

    The official code of MViTv1 is that of the video model, whose convs are 5-D; for images their third axis,
    time, has length 1.
    """
    result: StateDict = {}
    for key, value in state.items():
        stacked = re.fullmatch(r"(.*\.attn\.)qkv(\.weight|\.bias)", key)
        if stacked and value.ndim and value.shape[0] and value.shape[0] % 3 == 0:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                result[f"{stacked[1]}{name}{stacked[2]}"] = part
        elif value.ndim == 5 and value.shape[2] == 1:
            result[key] = value.squeeze(2)
        else:
            result[key] = value
    return result


def resize_relative(table: Tensor, rows: int) -> Tensor:
    """Resize ``(L, d)`` to ``(rows, d)``: linear along the distances, as facebookresearch/SlowFast does.

    Equal sizes return the same tensor object.
    """
    if len(table) == rows:
        return table
    return F.interpolate(table.T[None], rows, mode="linear", align_corners=False)[0].T.contiguous()


def resize_position_embedding(embedding: Tensor, tokens: int) -> Tensor:
    """Resize ``(1, 1 + H*W, C)`` to ``(1, tokens, C)``: bilinear over the square grid.

    The class token's row is kept. The official code interpolates over time, height and width, which is the
    same for one frame. Equal sizes return the same tensor object.
    """
    _, old, dim = embedding.shape
    if old == tokens:
        return embedding
    side, new = math.isqrt(old - 1), math.isqrt(tokens - 1)
    grid = embedding[:, 1:].reshape(1, side, side, dim).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (new, new), mode="bilinear", align_corners=False)
    return torch.cat(
        (
            embedding[:, :1],
            grid.permute(0, 2, 3, 1).reshape(1, new * new, dim),
        ),
        1,
    )


def resize(
    model: nn.Module,
    state: StateDict,
) -> tuple[StateDict, list[str]]:
    """Move all positions of ``state`` (our keys) to the size that ``model`` was built for.

    Returns the new state and the changed keys.
    """
    state, changed = dict(state), []
    for key, target in model.state_dict().items():
        old, new = (
            state[key].shape if key in state else torch.Size(),
            target.shape,
        )
        if old == new or len(old) != len(new) or old[-1] != new[-1]:
            continue
        if re.search(r"\.relative\.(rows|columns)$", key) and old[0] > 0:
            state[key] = resize_relative(state[key].float(), new[0])
            changed.append(key)
        elif key == "position_embedding" and old[0] == 1 and _is_square(old[1] - 1):
            state[key] = resize_position_embedding(state[key].float(), new[1])
            changed.append(key)
    return state, changed


def _is_square(count: int) -> bool:
    """Whether ``count`` patches make a square grid."""
    return count > 0 and math.isqrt(count) ** 2 == count
