"""From a PyTorch checkpoint to a verified bundle.

>>> from export import ExportConfig, run
>>> bundle = run(ExportConfig("cmt_nano", format="openvino", precision="fp32"))
"""

from .config import ExportConfig
from .pipeline import run

__all__ = ["ExportConfig", "run"]
