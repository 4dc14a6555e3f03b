"""The base of ``benchmarks/decoders.py`` is what a Predictor does, and differences are counted from it."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.preprocessing import compute_geometry, decode_pixels
from helpers.paths import ROOT

SPEC = Preprocess(224, 256, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def tools(monkeypatch):
    """The scripts, which import each other by their own names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import decoders
    import decoders_child

    yield decoders, decoders_child
    for name in ("decoders", "decoders_child"):
        sys.modules.pop(name, None)


def make_photograph(width: int, height: int) -> bytes:
    noise = np.random.default_rng(width).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [(1920, 1080), (1080, 1920), (640, 480), (1601, 1203)])
@pytest.mark.parametrize("how", ["full", "reduced"])
def test_pillows_rows_are_what_a_predictor_does(tools, size, how):
    _, child = tools
    data = make_photograph(*size)
    spec = replace(SPEC, decode=how, reducing_gap=float(child.GAP))
    new, box = compute_geometry(*size, spec, data)
    found = child.make_way(f"pillow:{how}", "")(data, new, box)
    np.testing.assert_array_equal(found, decode_pixels(data, spec))


def test_a_tool_is_asked_and_compared(tools, tmp_path):
    decoders, _ = tools
    with decoders.started(sys.executable, "pillow:full", "") as row:
        table = decoders.measure([make_photograph(640, 480)], {"a row": row}, tmp_path)
    assert table.splitlines()[2].split("|")[1].strip() == "a row"
    assert [cell.strip() for cell in table.splitlines()[2].split("|")[3:7]] == ["1.00", "0.00", "0.00", "0"]


def test_a_tool_that_cannot_start_says_why(tools):
    decoders, _ = tools
    with (
        pytest.raises(RuntimeError, match="no-such-tool"),
        decoders.started(sys.executable, "no-such-tool:full", ""),
    ):
        pass
