"""Signed bundles: what a signature covers, and what each wrong one is called."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import BundleWriter
from cmt_edge.deploy.bundle.manifest import ENGINES
from cmt_edge.deploy.bundle.sections import ExecutedPrecision, LatencyEntry
from cmt_edge.deploy.bundle.signature import MAX_SIGNATURE, SIGNATURE, read_private_key
from cmt_edge.deploy.cli import bench, predict, verify
from cmt_edge.deploy.errors import BundleError, InputError, RuntimeMissingError, SignatureError
from helpers.bundles import edit_manifest, make_bundle, tiny_manifest

pytest.importorskip("cryptography", reason="signatures need the extra 'sign'")

from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
)

from helpers.keys import write_pair


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("keys"), "sign")


@pytest.fixture
def signed(tmp_path: Path, keys: tuple[Path, Path]) -> Bundle:
    """A small bundle, signed."""
    plain = make_bundle(tmp_path / "plain")
    with BundleWriter(tmp_path / "signed") as writer:
        for name in plain.manifest.files:
            (writer.folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(plain.path / name, writer.folder / name)
        return writer.commit(plain.manifest, keys[0])


def test_the_right_key_opens(signed: Bundle, keys: tuple[Path, Path]) -> None:
    assert Bundle.open(signed.path, key=keys[1]).manifest.files == signed.manifest.files
    assert Bundle.open(signed.path).signed_by == signed.signed_by is not None


def test_an_unsigned_bundle_is_refused_only_where_a_key_is_demanded(
    tmp_path: Path, keys: tuple[Path, Path]
) -> None:
    plain = make_bundle(tmp_path / "b")
    assert Bundle.open(plain.path).signed_by is None
    with pytest.raises(SignatureError, match="is not signed") as caught:
        Bundle.open(plain.path, key=keys[1])
    assert caught.value.exit_code == 1


def test_another_key_is_named(signed: Bundle, tmp_path: Path) -> None:
    _, other = write_pair(tmp_path, "other")
    with pytest.raises(SignatureError, match=r"another key than .*other\.pub"):
        Bundle.open(signed.path, key=other)


def change_label(content: dict) -> None:
    content["labels"][0][1] = "a friendly dog"


def change_mean(content: dict) -> None:
    content["preprocess"]["mean"][0] = 0.25


def add_version(content: dict) -> None:
    content["versions"]["more"] = "1"


def drop_verification(content: dict) -> None:
    content.pop("verification", None)
    content["labels_source"] = "file"


@pytest.mark.parametrize(
    "change", [change_label, change_mean, add_version, drop_verification], ids=lambda f: f.__name__
)
def test_a_changed_manifest_with_a_right_checksum_is_found(
    signed: Bundle,
    keys: tuple[Path, Path],
    change: Callable[[dict], None],
) -> None:
    edit_manifest(signed, change)
    Bundle.open(signed.path)  # hashes alone do not show it
    with pytest.raises(SignatureError, match="changed after it was signed"):
        Bundle.open(signed.path, key=keys[1])


def test_a_replaced_member_with_a_right_hash_is_found(signed: Bundle, keys: tuple[Path, Path]) -> None:
    name = next(iter(signed.manifest.files))
    (signed.path / name).write_bytes(b"hostile")
    with pytest.raises(BundleError, match="was changed"):
        Bundle.open(signed.path, key=keys[1])

    def follow(content: dict) -> None:
        content["files"][name] = {"size": 7, "sha256": hashlib.sha256(b"hostile").hexdigest()}

    edit_manifest(signed, follow)
    Bundle.open(signed.path)
    with pytest.raises(SignatureError, match="changed after it was signed"):
        Bundle.open(signed.path, key=keys[1])


def test_a_signature_of_another_bundle_does_not_fit(
    signed: Bundle,
    tmp_path: Path,
    keys: tuple[Path, Path],
) -> None:
    other = make_bundle(tmp_path / "other", labels_source="file")
    shutil.copyfile(signed.path / SIGNATURE, other.path / SIGNATURE)
    with pytest.raises(SignatureError, match="changed after it was signed"):
        Bundle.open(other.path, key=keys[1])


def test_what_a_build_adds_on_the_device_leaves_the_signature_right(
    signed: Bundle,
    keys: tuple[Path, Path],
) -> None:
    speed = LatencyEntry(
        p50_ms=1.0,
        ci_ms=(0.9, 1.1),
        p95_ms=1.2,
        end_to_end_p50_ms=2.0,
        batch=1,
        threads=None,
        executed=ExecutedPrecision(operations={"fp16": 3}),
        warnings=(),
    )
    manifest = replace(signed.manifest, latency=speed)
    updated = signed.update(manifest, {f"{ENGINES}/new.engine": b"engine"})
    assert f"{ENGINES}/new.engine" in updated.manifest.files
    assert Bundle.open(signed.path, key=keys[1]).manifest.files == updated.manifest.files


WRONG_SIGNATURES = {
    "empty": b"",
    "no JSON": b"\xff\xfe",
    "a list": b"[]",
    "no signature": b'{"algorithm": "ed25519", "key": "00"}',
    "not base64": b'{"algorithm": "ed25519", "key": "00", "signature": "!"}',
    "a number": b'{"algorithm": "ed25519", "key": "00", "signature": 5}',
    "unknown algorithm": b'{"algorithm": "none", "key": "00", "signature": ""}',
    "deep": b"[" * 4000,
    "huge": b" " * (MAX_SIGNATURE + 1),
}


@pytest.mark.parametrize("content", WRONG_SIGNATURES.values(), ids=WRONG_SIGNATURES)
def test_a_signature_file_that_cannot_be_read(
    signed: Bundle, keys: tuple[Path, Path], content: bytes
) -> None:
    (signed.path / SIGNATURE).write_bytes(content)
    with pytest.raises(BundleError, match=r"signature\.json"):
        Bundle.open(signed.path, key=keys[1])


@pytest.mark.parametrize("length", [0, 1, 63, 65])
def test_a_signature_of_wrong_length(signed: Bundle, keys: tuple[Path, Path], length: int) -> None:
    content = json.loads((signed.path / SIGNATURE).read_bytes())
    content["signature"] = base64.b64encode(bytes(length)).decode()
    (signed.path / SIGNATURE).write_text(json.dumps(content))
    with pytest.raises(SignatureError):
        Bundle.open(signed.path, key=keys[1])


def test_files_that_are_no_key(tmp_path: Path, signed: Bundle, keys: tuple[Path, Path]) -> None:
    curve = ec.generate_private_key(ec.SECP256R1())
    (tmp_path / "ec.pub").write_bytes(
        curve.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    )
    (tmp_path / "text").write_text("not a key")
    for path in (tmp_path / "ec.pub", tmp_path / "text", keys[0], tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="no public Ed25519 key") as caught:
            Bundle.open(signed.path, key=path)
        assert caught.value.exit_code == 2
        assert "openssl" in str(caught.value)


def test_a_locked_key(tmp_path: Path) -> None:
    private = ed25519.Ed25519PrivateKey.generate()
    locked = tmp_path / "locked.key"
    locked.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )
    with pytest.raises(InputError, match="passphrase"):
        read_private_key(locked)


def test_a_missing_package_is_named(
    signed: Bundle, keys: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    with pytest.raises(RuntimeMissingError, match="cryptography") as caught:
        Bundle.open(signed.path, key=keys[1])
    assert caught.value.exit_code == 3
    Bundle.open(signed.path)  # without a key nothing is missing


def test_openssl_makes_keys_that_fit(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    secret = tmp_path / "sign.key"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", secret], check=True)
    subprocess.run(["openssl", "pkey", "-in", secret, "-pubout", "-out", tmp_path / "sign.pub"], check=True)
    with BundleWriter(tmp_path / "b") as writer:
        made = writer.commit(replace(tiny_manifest(), files={}), secret)
    assert Bundle.open(made.path, key=tmp_path / "sign.pub").signed_by == made.signed_by


def test_commands_check_the_key(onnx_bundle: Bundle, tmp_path: Path, capsys, keys: tuple[Path, Path]) -> None:
    for command in (verify, predict, bench):
        images = ["x.jpg"] if command is predict else []
        assert command.main([str(onnx_bundle.path), *images, "--key", str(keys[1])]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert "is not signed" in err


def test_verify_says_whether_a_signature_was_checked(signed: Bundle, keys: tuple[Path, Path], capsys) -> None:
    assert verify.main([str(signed.path)]) == 0
    assert "not checked" in capsys.readouterr().err
    assert verify.main([str(signed.path), "--key", str(keys[1])]) == 0
    assert "signature checked" in capsys.readouterr().err


def test_the_predictor_checks_the_key(onnx_bundle: Bundle, keys: tuple[Path, Path]) -> None:
    with pytest.raises(SignatureError):
        Predictor.load(onnx_bundle.path, key=keys[1])


def test_a_key_counts_for_the_reference_too(
    signed: Bundle, keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = make_bundle(tmp_path / "other")
    arguments = [str(signed.path), "--key", str(keys[1]), "--reference"]
    assert verify.main([*arguments, str(signed.path)]) == 0
    assert verify.main([*arguments, str(plain.path)]) == 1
    assert f"{plain.path}: is not signed" in capsys.readouterr().err


def test_an_entry_of_the_signature_that_stands_twice(tmp_path: Path, keys: tuple[Path, Path]) -> None:
    secret, public = keys
    with BundleWriter(tmp_path / "b") as writer:
        (writer.folder / "golden.npz").write_bytes(b"x")
        bundle = writer.commit(tiny_manifest(), secret)
    path = bundle.path / SIGNATURE
    path.write_text(path.read_text().replace('"key":', '"key": "0",\n  "key":', 1))
    with pytest.raises(BundleError, match="stands in it twice"):
        Bundle.open(bundle.path, key=public)
