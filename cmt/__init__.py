"""Reference models of hybrid CNN-transformer classifiers, their weights, and exact rewrites for deployment.

>>> from cmt_edge.cmt import create_model, fuse, load_weights
>>> model = create_model("cmt_xs", img_size=192, num_classes=1000)
>>> load_weights(model, "cmt_xs.pth")            # completely or not at all; runs no code
>>> deployable = fuse(model)                     # same logits, fewer operations
"""

from .analysis import count_params, macs, try_macs
from .features import FeatureMaps, choose_head
from .registry import create_model, labels_of, list_models, model_spec
from .rewrites import fuse
from .spec import Classifier, ModelSpec
from .weights import load_pretrained, load_weights, weights_fingerprint

__all__ = [
    "Classifier",
    "FeatureMaps",
    "ModelSpec",
    "choose_head",
    "count_params",
    "create_model",
    "fuse",
    "labels_of",
    "list_models",
    "load_pretrained",
    "load_weights",
    "macs",
    "model_spec",
    "try_macs",
    "weights_fingerprint",
]
