"""A bundle for a device that this machine need not have: OpenVINO's fp16, for GPUs and NPUs."""

from __future__ import annotations

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends.openvino import open_as_float32

from .config import ExportConfig


def open_here(config: ExportConfig, bundle: Bundle) -> Predictor:
    """The bundle's graph on the processor, which computes in float32 with the float16 weights.

    What the roundings between them change was checked when the precision was written into the graph.
    """
    return Predictor(
        open_as_float32(bundle, config.threads),
        config.preprocess,
        bundle.labels,
        batch=config.batch,
        head=config.head,
    )
