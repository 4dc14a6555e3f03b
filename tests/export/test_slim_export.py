"""``cmt-export --slim``: the bundle that comes out, packed and signed too, verifies without what it lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import GOLDEN, REPORT_JSON, REPORT_PAGE, REPORT_TEXT
from cmt_edge.deploy.cli import verify
from helpers.cli import succeeded

pytest.importorskip("cryptography", reason="signatures need the extra 'sign'")

from helpers.keys import write_pair

pytestmark = pytest.mark.usefixtures("one_trace")

NANO = ("--model", "cmt_nano", "--weights", "random", "--format", "onnx")


def test_a_slim_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = write_pair(tmp_path, "sign")[0]
    said = succeeded(capsys, *NANO, "--slim", "--pack", "--sign", key, "-o", tmp_path)
    assert "left out of this slim bundle: report.md (" in said
    made = tmp_path / "cmt_nano_fp32_onnx_slim"
    bundle = Bundle.open(made)
    assert sorted(bundle.manifest.files) == [GOLDEN, "model.onnx"]
    assert set(bundle.manifest.slim.files) == {REPORT_TEXT, REPORT_JSON, REPORT_PAGE}
    assert len(bundle.golden().sources) == 2
    assert bundle.manifest.verification.golden.images == 2  # what was verified is what lies there
    for path in (made, made.with_suffix(".cmt.zip")):
        assert verify.main([str(path), "--key", str(key.with_suffix(".pub"))]) == 0
