"""``cmt-export --pack``: the file beside the folder is opened by every command."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from cmt_edge.deploy.cli import predict, verify
from helpers.cli import failed, strict, succeeded

pytestmark = pytest.mark.usefixtures("one_trace")

NANO = ("--model", "cmt_nano", "--weights", "random", "--format", "onnx", "--pack")


def test_a_packed_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = strict(succeeded(capsys, *NANO, "--json", "-o", tmp_path))
    file = Path(said["packed"])
    assert file == tmp_path / "cmt_nano_fp32_onnx.cmt.zip"
    assert verify.main([str(file)]) == 0
    assert str(file) in capsys.readouterr().out
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    assert predict.main([str(file), str(tmp_path / "a.png")]) == 0


def test_something_else_of_its_name_is_not_replaced(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = tmp_path / "cmt_nano_fp32_onnx.cmt.zip"
    other.mkdir()
    assert "is not replaced" in failed(capsys, *NANO, "-o", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [other.name]
