"""Reference models of hybrid CNN-transformer classifiers, their weights, and exact rewrites for deployment.

>>> from cmt_edge.cmt import create_model, fuse, load_weights
>>> model = create_model("cmt_nano", img_size=64, num_classes=10)
>>> loaded = load_weights(model, "cmt_nano.pth")  # completely or not at all; runs no code
>>> deployable = fuse(model)                      # same logits, fewer operations
"""

from .analysis import count_macs, count_params, try_macs
from .features import FeatureMaps, choose_head
from .registry import create_model, find_model, find_published_labels, list_models
from .rewrites import fuse
from .spec import Classifier, ModelSpec
from .weights import compute_weights_fingerprint, load_pretrained, load_weights

__all__ = [
    "Classifier",
    "FeatureMaps",
    "ModelSpec",
    "choose_head",
    "compute_weights_fingerprint",
    "count_macs",
    "count_params",
    "create_model",
    "find_model",
    "find_published_labels",
    "fuse",
    "list_models",
    "load_pretrained",
    "load_weights",
    "try_macs",
]
