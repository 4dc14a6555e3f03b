"""An ONNX graph with tensors inside it as further outputs. This needs ``onnx``, which comes with PyTorch's
side: where nothing can rebuild the reference, nothing is watched."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from ..bundle import ONNX, Bundle
from .base import make_lacking_error


def add_outputs(bundle: Bundle, tensors: Sequence[str]) -> bytes:
    """The bundle's graph, as the content of a file, which gives ``tensors`` behind its own outputs.

    Raises:
        BundleError: no operation of the graph makes one of them.
    """
    with bundle.kept():
        model = onnx.load(bundle.file(ONNX), load_external_data=False)
    made = {name for node in model.graph.node for name in node.output}
    for tensor in tensors:
        if tensor not in made:
            raise make_lacking_error(bundle, tensor)
        model.graph.output.add(name=tensor)  # without a type, which the runtime infers
    return bytes(model.SerializeToString())
