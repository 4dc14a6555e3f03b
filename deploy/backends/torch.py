"""PyTorch: the float32 reference that every other runtime is compared with.

``deploy`` knows no model. The package that exported the bundle registers an entry point in the group
:data:`ENTRY_POINTS`: ``rebuild(model_entry_of_the_manifest, weights, trusted_model)``, which returns a
``torch.nn.Module`` in eval mode and the fingerprint of its weights. It must import nothing that only the
manifest names.
"""

from __future__ import annotations

from importlib import metadata

import numpy as np
import torch

from ..bundle import Bundle
from ..bundle.sections import ExecutedPrecision
from ..errors import BundleError, RuntimeMissingError
from .base import LoadOptions, Runtime, Session

ENTRY_POINTS = "cmt_edge.reference"
"""Group of the entry points that rebuild a model from its entry in the manifest."""

PRECISION_OF_DTYPE = {
    "torch.float32": "fp32",
    "torch.bfloat16": "bf16",
    "torch.float16": "fp16",
}
"""PyTorch's name of a type -> ours."""


class TorchSession(Session):
    """Wraps a module. It also lets a Predictor use a model that is still in training code."""

    device = "CPU"

    def __init__(
        self,
        module: torch.nn.Module,
        threads: int | None = None,
    ) -> None:
        self.runtime = RUNTIME.check()
        self.module = module.eval()
        if threads:
            torch.set_num_threads(threads)

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            given = self.module(torch.from_numpy(batch))
            outputs = (given,) if isinstance(given, torch.Tensor) else given
            return [output.numpy() for output in outputs]

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        dtypes = {str(parameter.dtype) for parameter in self.module.parameters()}
        label = "+".join(sorted(PRECISION_OF_DTYPE.get(dtype, dtype) for dtype in dtypes))
        return ExecutedPrecision(
            {label: 1.0},
            {label: 1},
            source="parameter types",
        )


class PyTorch(Runtime):
    """Rebuilds the reference model of a bundle in float32, whatever the bundle's precision is."""

    any_batch = True

    def check(self, device: str | None = None) -> str:
        """Name and version of the runtime; only the CPU is served."""
        if device is not None and device.upper() != "CPU":
            raise RuntimeMissingError(
                f"the torch backend has no device {device!r}",
                remedy="use --device CPU",
            )
        return f"torch {torch.__version__}"

    def float_precision(self, precision: str, device: str | None = None) -> str:
        return "fp32"

    def load(self, bundle: Bundle, options: LoadOptions) -> Session:
        """Rebuild the reference model; its weights must hash to what the manifest says.

        Raises:
            RuntimeMissingError: no package that can rebuild the model is installed.
            BundleError: the weights are not those that the bundle was made from.
        """
        self.check(options.device)
        entry = bundle.manifest.model
        providers = {point.name: point for point in metadata.entry_points(group=ENTRY_POINTS)}
        if entry.provider not in providers:
            raise RuntimeMissingError(
                f"nothing here can rebuild the PyTorch model {entry.name!r}",
                remedy='pip install "cmt-edge[export]"',
            )
        rebuild = providers[entry.provider].load()
        module, fingerprint = rebuild(entry, options.weights, options.trusted_model)
        if fingerprint != entry.weights.sha256:
            raise BundleError(
                "these are not the weights that the bundle was made from",
                where=options.weights or bundle.path,
                remedy="give the same checkpoint as at export: --weights PATH",
            )
        return TorchSession(module, options.threads)


RUNTIME = PyTorch()
"""What the table of runtimes gives for ``"torch"``."""
