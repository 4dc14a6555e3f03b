"""``cmt-export --sign``: the key is checked first, and the bundle that comes out verifies."""

from __future__ import annotations

from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.cli import verify
from cmt_edge.deploy.errors import SignatureError
from helpers.cli import failed, succeeded

pytest.importorskip("cryptography", reason="signatures need the extra 'sign'")

from helpers.keys import write_pair

pytestmark = pytest.mark.usefixtures("one_trace")

NANO = ("--model", "cmt_nano", "--weights", "random", "--format", "onnx")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A private key; its public one lies beside it."""
    return write_pair(tmp_path, "sign")[0]


def test_a_signed_export(key: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    succeeded(capsys, *NANO, "--sign", key, "-o", tmp_path)
    made = tmp_path / "cmt_nano_fp32_onnx"
    assert verify.main([str(made), "--key", str(key.with_suffix(".pub"))]) == 0
    succeeded(capsys, *NANO, "-o", tmp_path)  # the same bundle again, unsigned: the old signature goes
    with pytest.raises(SignatureError, match="not signed"):
        Bundle.open(made, key=key.with_suffix(".pub"))


def test_a_wrong_key_is_refused_before_the_work(
    key: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out"
    for wrong in (key.with_suffix(".pub"), tmp_path / "none.key"):
        assert "no private Ed25519 key" in failed(capsys, *NANO, "--sign", wrong, "-o", output)
    assert not output.exists()
