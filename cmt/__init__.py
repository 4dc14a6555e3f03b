"""Reference models of hybrid CNN-transformer classifiers, their weights, and exact rewrites for deployment.

>>> from cmt import create_model, fuse, load_weights
>>> model = create_model("cmt_xs", img_size=192, num_classes=1000)
>>> load_weights(model, "cmt_xs.pth")            # strict, safe
>>> deployable = fuse(model)                     # same logits, fewer operations
"""

from .analysis import count_params, macs
from .features import FeatureMaps, with_head
from .registry import ModelSpec, create_model, labels_of, list_models, model_spec
from .rewrites import fuse
from .weights import load_pretrained, load_weights, weights_fingerprint

__all__ = [
    "FeatureMaps",
    "ModelSpec",
    "count_params",
    "create_model",
    "fuse",
    "labels_of",
    "list_models",
    "load_pretrained",
    "load_weights",
    "macs",
    "model_spec",
    "weights_fingerprint",
    "with_head",
]
