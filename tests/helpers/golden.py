"""The official code's state dicts and logits, from the shared folder."""

from __future__ import annotations

import importlib.util
import json
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch

from cmt_edge.cmt import list_models
from helpers.shared import shared

RENAMED = {"cvt_13_224": "cvt_13", "cvt_21_224": "cvt_21", "cvt_w24_384": "cvt_w24"}
"""Golden variants whose registry name is not their own, or their own without a size."""


@lru_cache(maxsize=1)
def golden() -> ModuleType:
    """The module golden.py of the shared data."""
    spec = importlib.util.spec_from_file_location("golden", shared("golden/golden.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(variant: str) -> str:
    """Registry name of a golden variant, e.g. ``cmt_ti`` of ``cmt_ti_224``."""
    if variant in list_models():
        return variant
    return RENAMED.get(variant, "_".join(variant.split("_")[:2]))


def described(variant: str) -> dict:
    return json.loads(shared(f"golden/{variant}.json").read_text())


def published(variant: str, rule: str = "fanin") -> dict[str, torch.Tensor]:
    """The official state dict that the golden logits of ``variant`` were made with."""
    shared(f"golden/{variant}.npz")
    return {k: torch.from_numpy(np.array(v)) for k, v in golden().weights(variant, rule).items()}


def ours(spec, state):
    """A published state dict under our names and in our layout."""
    renamed = {spec.rename(key): value for key, value in state.items()}
    return spec.adapt(renamed) if spec.adapt else renamed
