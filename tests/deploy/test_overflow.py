"""int8 products are computed exactly where they could overflow, and as fast as possible elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


def pretend(patch: pytest.MonkeyPatch, folder: Path, machine: str, flags: str | None) -> None:
    """Let the processor be a ``machine`` with some flags; ``None`` where the system does not tell them."""
    place = folder / "cpuinfo"
    if flags is not None:
        place.write_text(flags)
    patch.setattr(overflow, "PROCESSORS", place)
    patch.setattr(overflow.platform, "machine", lambda: machine)
    for name in ("read_flags", "can_overflow"):
        patch.setattr(overflow, name, getattr(overflow, name).__wrapped__)


@pytest.mark.parametrize(("machine", "flags", "expected"), CASES)
def test_x86_without_vnni_can_overflow(tmp_path, monkeypatch, machine, flags, expected):
    pretend(monkeypatch, tmp_path, machine, flags)
    assert overflow.can_overflow() is expected


WIDE = "avx512f avx512bw avx512dq avx512vl"
SLOW = [
    ("x86_64", "sse2 avx2", None, True),
    ("x86_64", "sse2 avx2 avx_vnni", None, False),
    ("x86_64", f"sse2 avx2 {WIDE}", None, False),
    ("x86_64", "sse2 avx2 avx512f avx512er", None, True),
    ("x86_64", f"sse2 avx2 {WIDE} avx512_vnni", None, False),
    ("x86_64", f"sse2 avx2 {WIDE} avx512_vnni", "AVX2", True),
    ("x86_64", f"sse2 avx2 {WIDE} avx512_vnni", "avx512_core", False),
    ("x86_64", f"sse2 avx2 {WIDE} avx512_vnni", "AVX2_VNNI", True),
    ("x86_64", f"sse2 avx2 {WIDE} avx512_vnni avx_vnni", "AVX2_VNNI", False),
    ("x86_64", f"sse2 avx2 {WIDE} avx512_vnni", "no such set", False),
    ("x86_64", "sse2 avx2 avx_vnni", "AVX2_VNNI", False),
    ("x86_64", None, None, False),
    ("x86_64", None, "AVX2", True),
    ("aarch64", "fp asimd", "AVX2", False),
]


@pytest.mark.parametrize(("machine", "flags", "limit", "expected"), SLOW)
def test_int8_products_of_matrices_are_slow_with_neither_vnni_nor_avx512(
    tmp_path, monkeypatch, machine, flags, limit, expected
):
    pretend(monkeypatch, tmp_path, machine, flags)
    for name in overflow.LIMITS:
        monkeypatch.delenv(name, raising=False)
        if limit:
            monkeypatch.setenv(name, limit)
    assert overflow.multiplies_matrices_slowly() is expected


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
