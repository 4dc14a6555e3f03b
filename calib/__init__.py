"""INT8 calibration: images, the recipe of what stays float, quantization to a Q/DQ graph, and its linter."""

from .data import CalibrationSet
from .lint import lint
from .quantize import Quantized, quantize
from .recipe import DEFAULT, Recipe

__all__ = [
    "DEFAULT",
    "CalibrationSet",
    "Quantized",
    "Recipe",
    "lint",
    "quantize",
]
