"""What runs on the device: bundles, the Predictor, verification and measurement. Needs NumPy, Pillow and one
runtime.

>>> from cmt_edge.deploy import Predictor
>>> with Predictor.load("cmt_nano_int8_openvino") as p:
...     p("ship.jpg").top(3)
"""

from .bundle import Bundle
from .errors import CmtEdgeError
from .predictor import Prediction, Predictor
from .preprocessing import Preprocess, preprocess

__all__ = [
    "Bundle",
    "CmtEdgeError",
    "Prediction",
    "Predictor",
    "Preprocess",
    "preprocess",
]
