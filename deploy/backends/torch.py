"""PyTorch: the float32 reference that every other runtime is compared with.

``deploy`` knows no model. The package that exported the bundle registers an entry point in the group
``cmt_edge.reference``: ``rebuild(model_entry_of_the_manifest, weights) -> torch.nn.Module`` in eval mode.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import numpy as np
import torch

from ..bundle import Bundle
from ..bundle.sections import ExecutedPrecision
from ..errors import BundleError, RuntimeMissingError
from .base import LoadOptions, Session

GROUP = "cmt_edge.reference"


def check(device: str | None = None) -> str:
    """Name and version of the runtime; only the CPU is served."""
    if device is not None and device.upper() != "CPU":
        raise RuntimeMissingError(f"the torch backend has no device {device!r}", remedy="use --device CPU")
    return f"torch {torch.__version__}"


def compile(onnx: Path, folder: Path) -> list[Path]:
    """Nothing to prepare: the reference is rebuilt from its weights."""
    return []


class TorchSession(Session):
    """Wraps a module; also the way to use the Predictor with a model that is still in training code."""

    device = "CPU"

    def __init__(self, module: torch.nn.Module, threads: int | None = None) -> None:
        self.runtime = check()
        self.module = module.eval()
        if threads:
            torch.set_num_threads(threads)

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        with torch.inference_mode():
            given = self.module(torch.from_numpy(batch))
            return [output.numpy() for output in ((given,) if isinstance(given, torch.Tensor) else given)]

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        dtypes = {str(p.dtype) for p in self.module.parameters()}
        names = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}
        label = "+".join(sorted(names.get(d, d) for d in dtypes))
        return ExecutedPrecision({label: 1.0}, {label: 1}, source="parameter types")


def load(bundle: Bundle, options: LoadOptions) -> Session:
    """Rebuild the reference model; its weights must hash to what the manifest says.

    Raises:
        RuntimeMissingError: no package that can rebuild the model is installed.
        BundleError: other weights than the bundle was made from.
    """
    check(options.device)
    entry = bundle.manifest.model
    providers = {e.name: e for e in metadata.entry_points(group=GROUP)}
    if entry.provider not in providers:
        raise RuntimeMissingError(
            f"nothing here can rebuild the PyTorch model {entry.name!r}",
            remedy='pip install "cmt-edge[export]"',
        )
    module, fingerprint = providers[entry.provider].load()(entry, options.weights)
    if fingerprint != entry.weights.sha256:
        raise BundleError(
            "these are not the weights the bundle was made from",
            where=options.weights or bundle.path,
            remedy="give the same checkpoint as at export: --weights PATH",
        )
    return TorchSession(module, options.threads)
