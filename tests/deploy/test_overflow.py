"""int8 products are computed exactly where they could overflow, and as fast as possible elsewhere."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cmt_edge.deploy.backends import onnxruntime as backend
from cmt_edge.deploy.backends import overflow
from helpers.bundles import make_calibration

CASES = [
    ("x86_64", "flags\t: sse2 avx2 avx512f", True),
    ("AMD64", "flags\t: avx2 avx_vnni", False),
    ("x86_64", "flags\t: avx512f avx512_vnni", False),
    ("x86_64", None, True),
    ("aarch64", "Features\t: fp asimd", False),
]


@pytest.mark.parametrize(("machine", "flags", "expected"), CASES)
def test_x86_without_vnni_can_overflow(tmp_path, monkeypatch, machine, flags, expected):
    place = tmp_path / "cpuinfo"
    if flags is not None:
        place.write_text(flags)
    monkeypatch.setattr(overflow, "PROCESSORS", place)
    monkeypatch.setattr(overflow.platform, "machine", lambda: machine)
    assert overflow.can_overflow.__wrapped__() is expected


@pytest.mark.parametrize("overflows", [True, False])
def test_onnx_runtime_is_told_only_there(monkeypatch, onnx_bundle, overflows):
    monkeypatch.setattr(backend, "can_overflow", lambda: overflows)
    session = backend.OnnxRuntimeSession(
        onnx_bundle.file("model.onnx"), backend.LoadOptions(threads=1)
    ).inference
    assert is_told(session) is overflows


def is_told(session: backend.ort.InferenceSession) -> bool:
    """Whether a session computes int8 products by slower kernels."""
    try:
        return session.get_session_options().get_session_config_entry(backend.EXACT_INT8) == "1"
    except RuntimeError:
        return False


@pytest.mark.parametrize("fits", [True, None])
def test_weights_that_fit_16_bits_need_no_slower_kernels(monkeypatch, onnx_bundle, fits):
    monkeypatch.setattr(backend, "can_overflow", lambda: True)
    bundle = replace(onnx_bundle, manifest=replace(onnx_bundle.manifest, calibration=make_calibration(fits)))
    session = backend.RUNTIME.load(bundle, backend.LoadOptions(threads=1))
    assert is_told(session.inference) is (fits is None)
