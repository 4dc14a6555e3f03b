"""An export says before the long work what its runtime will not give."""

from __future__ import annotations

import pytest

from cmt_edge.export import ExportConfig
from cmt_edge.export.steps import write_notes_on_runtime


def test_int8_for_onnx_runtime_is_said_to_be_slower():
    (note,) = write_notes_on_runtime(ExportConfig("cmt_nano", "onnx", "int8", data="generated"))
    assert "1.8 times as long" in note
    assert "--format openvino" in note


@pytest.mark.parametrize(("form", "precision"), [("onnx", "fp32"), ("openvino", "int8"), ("onnx", "auto")])
def test_other_exports_say_nothing(form, precision):
    data = "generated" if precision != "fp32" else None
    assert write_notes_on_runtime(ExportConfig("cmt_nano", form, precision, data=data)) == []
