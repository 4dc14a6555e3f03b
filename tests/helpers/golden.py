"""The official code of the models: its state dicts, logits and figures, from the shared folder."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import numpy as np
import torch
from torch import nn

from cmt_edge.cmt import create_model, find_model
from helpers.shared import shared


@dataclass(frozen=True)
class Variant:
    """A model that the official code builds for one input size.

    ``name`` is that of its golden files, ``model`` its name in the registry, ``size`` its height and width in
    pixels. All have figures; ``logits`` says whether the shared data has logits and keys too.
    """

    name: str
    model: str
    size: int
    logits: bool = True

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the model at its published size, which may be another than ``size``."""
        return find_model(self.model).macs or 0


# fmt: off
VARIANTS = (
    Variant("cmt_ti",          "cmt_ti",       160),
    Variant("cmt_ti_224",      "cmt_ti",       224),
    Variant("cmt_xs",          "cmt_xs",       192),
    Variant("cmt_s",           "cmt_s",        224, logits=False),
    Variant("cmt_s_192",       "cmt_s",        192, logits=False),
    Variant("cmt_b",           "cmt_b",        256),
    Variant("cvt_13_224",      "cvt_13",       224),
    Variant("cvt_21_224",      "cvt_21",       224, logits=False),
    Variant("cvt_13_384",      "cvt_13_384",   384),
    Variant("cvt_21_384",      "cvt_21_384",   384),
    Variant("cvt_w24_384",     "cvt_w24",      384),
    Variant("convit_tiny",     "convit_tiny",  224),
    Variant("convit_tiny_256", "convit_tiny",  256),
    Variant("convit_small",    "convit_small", 224, logits=False),
    Variant("convit_base",     "convit_base",  224),
    Variant("mvitv1_b16",      "mvitv1_b16",   224),
    Variant("mvitv1_b16_256",  "mvitv1_b16",   256, logits=False),
    Variant("mvitv2_t",        "mvitv2_t",     224),
    Variant("mvitv2_t_256",    "mvitv2_t",     256),
    Variant("mvitv2_s",        "mvitv2_s",     224, logits=False),
    Variant("mvitv2_b",        "mvitv2_b",     224),
    Variant("mvitv2_l",        "mvitv2_l",     224),
)
# fmt: on
"""Every variant that the shared data describes, in the order of the registry."""

WITHOUT_OFFICIAL_CODE = ("cmt_nano", "xformer_reading")
"""Models that are ours alone, so that nothing official can be compared."""


@lru_cache(maxsize=1)
def golden() -> ModuleType:
    """The module golden.py of the shared data."""
    spec = importlib.util.spec_from_file_location("golden", shared("golden/golden.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def official_figures() -> dict[str, dict]:
    """Parameters, MACs and input size of each variant, by its name."""
    return {f["variant"]: f for f in json.loads(shared("golden/models.json").read_text())}


def official_array(name: str, key: str) -> np.ndarray:
    """An array that was recorded from variant ``name``, e.g. ``logits_f64`` ``(2, 1000)`` float64."""
    with np.load(shared(f"golden/{name}.npz")) as data:
        return data[key]


def published(name: str, rule: str = "fanin") -> dict[str, torch.Tensor]:
    """The official state dict that the golden logits of variant ``name`` were made with."""
    shared(f"golden/{name}.npz")
    return {k: torch.from_numpy(np.array(v)) for k, v in golden().weights(name, rule).items()}


def ours(spec, state):
    """A published state dict under our names and in our layout."""
    renamed = {spec.rename(key): value for key, value in state.items()}
    return spec.adapt(renamed) if spec.adapt else renamed


def official_model(variant: Variant, rule: str = "fanin") -> nn.Module:
    """Our model with the official state dict, in eval mode and float32."""
    model = create_model(variant.model, img_size=variant.size)
    model.load_state_dict(ours(model.spec, published(variant.name, rule)))
    return model


@lru_cache(maxsize=1)
def kept_model(name: str) -> nn.Module:
    """:func:`official_model` of variant ``name``, kept for the next test, which must not change it."""
    (variant,) = (v for v in VARIANTS if v.name == name)
    return official_model(variant)
