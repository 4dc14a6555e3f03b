"""Pairs of Ed25519 keys. Who imports this needs the extra ``sign``."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)


def write_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Files of a private and its public key."""
    private = ed25519.Ed25519PrivateKey.generate()
    secret, public = folder / f"{name}.key", folder / f"{name}.pub"
    secret.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return secret, public
