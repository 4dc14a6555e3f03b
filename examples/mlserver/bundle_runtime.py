"""A bundle in MLServer: a runtime class around our Predictor, for the gRPC and HTTP of KServe's protocol.

Start it with the settings that :func:`write_settings` writes::

    python examples/mlserver/bundle_runtime.py cmt_xs_int8_openvino served
    mlserver start served

and check it with ``cmt-edge verify BUNDLE --backend kserve --device localhost:8081/cmt_xs_int8_openvino``.
Source: MLServer documentation, "Writing Custom Inference Runtimes".
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse

from cmt_edge.deploy import Bundle, Predictor


class BundleRuntime(MLModel):
    """Opens the bundle that ``parameters.uri`` names, and answers batches that the client has prepared."""

    async def load(self) -> bool:
        self._predictor = Predictor.load(self.settings.parameters.uri)
        return True

    async def unload(self) -> bool:
        self._predictor.close()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        if len(payload.inputs) != 1:
            raise InferenceError(f"expected one input, got {len(payload.inputs)}")
        given = payload.inputs[0]
        expected = self.inputs[0]
        if given.datatype != "FP32" or not _fits(given.shape, expected.shape):
            raise InferenceError(f"expected FP32 {expected.shape}, got {given.datatype} {given.shape}")
        batch = np.ascontiguousarray(NumpyCodec.decode_input(given), np.float32)
        # in a thread, so that the server answers health checks meanwhile
        answers = await asyncio.to_thread(self._predictor.session.run, batch)
        return InferenceResponse(
            model_name=self.name,
            model_version=self.version,
            outputs=[
                NumpyCodec.encode_output(tensor.name, values)
                for tensor, values in zip(self.outputs, answers, strict=True)
            ],
        )


def _fits(shape: list[int], expected: list[int]) -> bool:
    return len(shape) == len(expected) and all(
        size == wanted or (wanted < 0 and size > 0) for size, wanted in zip(shape, expected, strict=True)
    )


def write_settings(bundle: Path, folder: Path) -> None:
    """Write what MLServer reads to serve a bundle under the name of its folder."""
    manifest = Bundle.open(bundle).manifest

    def describe(entry):
        shape = [size if isinstance(size, int) else -1 for size in entry.shape]
        return {"name": entry.name, "datatype": "FP32", "shape": shape}

    settings = {
        "name": bundle.resolve().name,
        "implementation": "bundle_runtime.BundleRuntime",
        "inputs": [describe(manifest.input)],
        "outputs": [describe(entry) for entry in manifest.outputs],
        "parameters": {"uri": str(bundle.resolve())},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model-settings.json").write_text(json.dumps(settings, indent=2))
    server = {"parallel_workers": 0, "host": "127.0.0.1", "metrics_endpoint": None}
    (folder / "settings.json").write_text(json.dumps(server, indent=2))


if __name__ == "__main__":
    write_settings(Path(sys.argv[1]), Path(sys.argv[2]))
