"""Signatures of bundles: Ed25519 over what a manifest says, with a key that the user names.

The hashes of a manifest show that files are whole. They do not show who made them: whoever changes a file can
change its hash too. A signature shows that the holder of a private key made the bundle. It covers every entry
of the manifest, and through the hashes every file, but for what ``cmt-build`` adds on a device: the engine,
its measured latency and the files below ``engines/``. Those are sealed by the machine that built them.

Keys are PEM files as ``openssl genpkey -algorithm ed25519`` writes them. The package ``cryptography`` is
imported only where a key is used (extra ``sign``).

Source: RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmt_edge.startup import name_program

from ..errors import BundleError, InputError, RuntimeMissingError, SignatureError
from ..files import read_regular
from .record import make_object

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

SIGNATURE = "signature.json"
"""Name of the file in a bundle. The manifest does not name it: it is made after the manifest."""
MAX_SIGNATURE = 4096
"""A larger signature file, in bytes, is not read."""
MAX_KEY = 64 << 10
"""A larger key file, in bytes, is not read."""
CONTEXT = b"cmt-edge bundle, signature 1\n"
"""First bytes of what is signed, so that a signature of something else never fits."""
UNSIGNED = ("checksum", "engine", "latency")
"""Entries of a manifest that a signature does not cover: ``cmt-build`` changes them on the device."""
ALGORITHM = "ed25519"
"""The one algorithm of signature files."""
MAKE_KEYS = (
    "make a pair of keys: openssl genpkey -algorithm ed25519 -out sign.key, then"
    " openssl pkey -in sign.key -pubout -out sign.pub"
)
"""What to do about a file that holds no key."""


@dataclass(frozen=True)
class Signature:
    """What ``signature.json`` says.

    Attributes:
        key: hex SHA-256 of the 32 bytes of the public key.
        value: the signature, 64 bytes.
    """

    key: str
    value: bytes

    def to_bytes(self) -> bytes:
        """The content of the file."""
        content = {
            "algorithm": ALGORITHM,
            "key": self.key,
            "signature": base64.b64encode(self.value).decode(),
        }
        return (json.dumps(content, indent=2) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Signature:
        """Parse the file; raises :class:`BundleError`."""
        try:
            content = json.loads(data, object_pairs_hook=make_object)
            made = cls(
                str(content["key"]),
                base64.b64decode(content["signature"], validate=True),
            )
            algorithm = content["algorithm"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise _make_unreadable_error(where, exc) from exc
        if algorithm != ALGORITHM:
            raise _make_unreadable_error(where, f"algorithm {str(algorithm)[:40]!r}, known is {ALGORITHM!r}")
        return made


def make_statement(content: Mapping[str, Any], engines: str) -> bytes:
    """The bytes that are signed: the entries of a manifest in one canonical form.

    Args:
        content: the JSON object of the manifest.
        engines: name of the folder whose files are not covered.
    """
    signed = {name: value for name, value in content.items() if name not in UNSIGNED}
    signed["files"] = {
        name: entry for name, entry in content["files"].items() if not name.startswith(engines + "/")
    }
    text = json.dumps(
        signed,
        sort_keys=True,
        separators=(",", ":"),
        ensure_ascii=True,
    )
    return CONTEXT + text.encode()


def sign(signed: bytes, key: Ed25519PrivateKey) -> Signature:
    """The signature of a :func:`make_statement`."""
    return Signature(make_fingerprint(key.public_key()), key.sign(signed))


def require_signed(signed: bytes, data: bytes | None, key: Path, where: object) -> None:
    """Check that the holder of a key made a bundle.

    Args:
        signed: the :func:`make_statement` of the bundle's manifest.
        data: content of its ``signature.json``; ``None`` if it has none.
        key: file of the public key.
        where: the bundle, for messages.

    Raises:
        SignatureError: there is no signature, it is of another key, or it is wrong.
        BundleError: ``signature.json`` cannot be read.
        InputError: ``key`` is no public key.
        RuntimeMissingError: ``cryptography`` is not installed.
    """
    public = read_public_key(key)
    if data is None:
        raise SignatureError(
            "is not signed",
            where=where,
            why=f"it has no {SIGNATURE}",
            remedy=f"ask its maker for a signed bundle: {name_program('export')} --sign KEY",
        )
    signature = Signature.from_bytes(data, where)
    if signature.key != make_fingerprint(public):
        raise SignatureError(
            f"is signed with another key than {key}",
            where=where,
            why=f"key {signature.key[:16]}, expected {make_fingerprint(public)[:16]}",
            remedy="do not use it, unless you know and trust the other key: --key",
        )
    if not _fits(signature, signed, public):
        raise SignatureError(
            "was changed after it was signed: the signature is wrong",
            where=where,
            remedy="do not use it; copy the whole bundle again from its maker",
        )


def make_fingerprint(key: Ed25519PublicKey) -> str:
    """Hex SHA-256 of a public key."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()


def read_private_key(path: Path) -> Ed25519PrivateKey:
    """The key that signs.

    Raises:
        InputError: the file holds no private Ed25519 key, or is locked by a passphrase.
        RuntimeMissingError: ``cryptography`` is not installed.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = _read_key(path, "private")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as exc:
        raise InputError(
            "the private key is locked by a passphrase",
            where=path,
            remedy="unlock a copy of it: openssl pkey -in KEY -out UNLOCKED",
        ) from exc
    except Exception as exc:
        raise _make_key_error("private", path, exc) from exc
    if not isinstance(key, Ed25519PrivateKey):
        raise _make_key_error("private", path, f"it is a {type(key).__name__}")
    return key


def read_public_key(path: Path) -> Ed25519PublicKey:
    """The key that a bundle is checked with.

    Raises:
        InputError: the file holds no public Ed25519 key.
        RuntimeMissingError: ``cryptography`` is not installed.
    """
    _require_cryptography()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    data = _read_key(path, "public")
    try:
        key = load_pem_public_key(data)
    except Exception as exc:
        raise _make_key_error("public", path, exc) from exc
    if not isinstance(key, Ed25519PublicKey):
        raise _make_key_error("public", path, f"it is a {type(key).__name__}")
    return key


def _fits(signature: Signature, signed: bytes, key: Ed25519PublicKey) -> bool:
    from cryptography.exceptions import InvalidSignature

    try:
        key.verify(signature.value, signed)
    except InvalidSignature:
        return False
    return True


def _require_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as exc:
        raise RuntimeMissingError(
            "signatures need the package cryptography",
            why=exc,
            remedy="pip install 'cmt-edge[sign]'",
        ) from exc


def _read_key(path: Path, kind: str) -> bytes:
    """The content of a key file, at most :data:`MAX_KEY` bytes."""
    try:
        return read_regular(path, MAX_KEY)
    except OSError as exc:
        raise _make_key_error(kind, path, exc.strerror) from exc


def _make_key_error(kind: str, path: Path, why: object) -> InputError:
    return InputError(
        f"is no {kind} Ed25519 key in a PEM file",
        where=path,
        why=why,
        remedy=MAKE_KEYS,
    )


def _make_unreadable_error(where: object, why: object) -> BundleError:
    return BundleError(
        f"{SIGNATURE} cannot be read",
        where=where,
        why=why,
        remedy="copy the whole bundle again",
    )
