"""The two ways in which a runtime keeps what it has made of a graph, for tests of both."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime as ort
import openvino as ov
import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import onnxruntime_cache, openvino_cache

from .bundles import SIZE, make_bundle, make_calibration

BATCH = np.random.default_rng(0).random((1, 3, SIZE, SIZE), dtype=np.float32)


def patch_opening(patch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let ``action`` happen where ONNX Runtime would open what was kept."""
    opened = ort.InferenceSession

    def take(model, *args, **named):
        return action() if isinstance(model, bytes) else opened(model, *args, **named)

    patch.setattr(ort, "InferenceSession", take)


def patch_optimising(patch: pytest.MonkeyPatch, action: Callable[[], object], *, first: bool = False) -> None:
    """Let ``action`` happen instead of ONNX Runtime's optimising a file, or after it."""
    opened = ort.InferenceSession

    def take(model, *args, **named):
        if isinstance(model, bytes):
            return opened(model, *args, **named)
        session = opened(model, *args, **named) if first else None
        done = action()
        return session or done

    patch.setattr(ort, "InferenceSession", take)


def patch_importing(patch: pytest.MonkeyPatch, action: Callable[[], object]) -> None:
    """Let ``action`` happen where OpenVINO would open what was kept."""
    patch.setattr(ov.Core, "import_model", lambda *_: action())


def patch_compiling(patch: pytest.MonkeyPatch, action: Callable[[], object], *, first: bool = False) -> None:
    """Let ``action`` happen instead of OpenVINO's compiling, or after it."""
    compile_model = ov.Core.compile_model

    def take(*args):
        compiled = compile_model(*args) if first else None
        done = action()
        return compiled or done

    patch.setattr(ov.Core, "compile_model", take)


@dataclass(frozen=True)
class Way:
    """How one runtime keeps what it has made of a graph: format and precision of a bundle, the module that
    keeps, what it calls an entry, and how to interfere with making and opening one."""

    format: str
    precision: str
    module: ModuleType
    what: str
    suffix: str
    instead_of_making: Callable[..., None]
    instead_of_opening: Callable[..., None]

    def make_bundle(self, target: Path, **changes) -> Bundle:
        calibration = make_calibration(True) if self.precision == "int8" else None
        return make_bundle(
            target, format=self.format, precision=self.precision, calibration=calibration, **changes
        )

    @property
    def folder(self) -> Path:
        return Path(os.environ["CMT_EDGE_CACHE"]) / self.module.FOLDER

    def list_entries(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{self.suffix}"))

    def list_suffixes(self) -> list[str]:
        return sorted(path.suffix for path in self.folder.iterdir())


WAYS = {
    "openvino": Way(
        "openvino", "fp32", openvino_cache, "compiled model", ".blob", patch_compiling, patch_importing
    ),
    "onnxruntime": Way(
        "onnx", "int8", onnxruntime_cache, "optimised graph", ".graph", patch_optimising, patch_opening
    ),
}


def answer(bundle: Bundle | Path, **options) -> tuple[bytes, bool]:
    """The bits of an answer, and whether the model came from the cache."""
    path = bundle.path if isinstance(bundle, Bundle) else bundle
    with Predictor.load(path, **options) as predictor:
        assert predictor.loading.is_from_cache == predictor.session.is_from_cache
        return predictor.logits(BATCH).tobytes(), predictor.loading.is_from_cache
