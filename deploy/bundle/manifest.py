"""What a bundle says of itself: ``manifest.json``, its names, and the caps on what it may declare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ..errors import BundleError

SCHEMA = 2
MANIFEST = "manifest.json"
ONNX = "model.onnx"
GOLDEN = "golden.npz"
REFERENCE = "reference.npz"
ENGINES = "engines"
LOGITS = "logits"
"""Name of a classifier's output; feature maps are called ``stage1`` and so on."""
MAX_MANIFEST = 16 << 20
MAX_FILES = 256
MAX_TOTAL = 8 << 30


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and how it was made; see ``docs/bundle.md`` for every field."""

    model: dict[str, Any]
    input: dict[str, Any]
    outputs: list[dict[str, Any]]
    preprocess: dict[str, Any]
    labels: list[list[str]]
    labels_source: str
    precision: str
    format: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    typing: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    host: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    checksum: str = ""
    """SHA-256 of all other entries, set when the manifest is written: an edited label or mean does not go
    unnoticed."""

    def to_bytes(self) -> bytes:
        content = asdict(self)
        content["checksum"] = content_hash(content)
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Manifest:
        """Parse and check the types of the top level; raises :class:`BundleError`."""
        try:
            content = json.loads(data)
            schema = content["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise broken("the manifest cannot be read", where, exc) from exc
        if schema != SCHEMA:
            raise broken(f"manifest schema {schema} is not supported, this version reads {SCHEMA}", where)
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise broken(f"unknown manifest entries: {', '.join(sorted(unknown))}", where)
        try:
            manifest = cls(**content)
        except TypeError as exc:
            raise broken("the manifest lacks entries", where, exc) from exc
        for name, kind in (
            ("model", dict),
            ("input", dict),
            ("outputs", list),
            ("files", dict),
            ("runtime", dict),
            ("labels", list),
            ("precision", str),
            ("format", str),
        ):
            if not isinstance(getattr(manifest, name), kind):
                raise broken(f"manifest entry {name!r} is not a {kind.__name__}", where)
        _check_shapes(manifest, where)
        _check_engine(manifest.engine, where)
        if manifest.checksum != content_hash(content):
            raise broken("the manifest was changed after the export: its checksum differs", where)
        return manifest


def _check_engine(entry: Any, where: object) -> None:
    if entry is None:
        return
    texts = ("file", "seal", "report", "text")
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("key"), dict)
        or not all(isinstance(entry.get(t), str) for t in texts)
    ):
        raise broken("the manifest's engine entry lacks its file, key or seal", where)


def content_hash(content: Mapping[str, Any]) -> str:
    """Over what the file says, not what this version knows, so that bundles of other versions stay
    readable."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_shapes(manifest: Manifest, where: object) -> None:
    ends = [manifest.input, *manifest.outputs]
    if len(ends) < 2 or not all(isinstance(end, dict) and isinstance(end.get("name"), str) for end in ends):
        raise broken("the manifest's input or an output has no name", where)
    if not all(isinstance(end.get("shape"), list) and end["shape"] for end in ends):
        raise broken("the manifest's input or an output has no shape", where)
    pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in manifest.labels)
    logits = [output["shape"][-1] for output in manifest.outputs if output["name"] == LOGITS]
    if not pairs or [len(manifest.labels)] != (logits or [0]):
        raise broken("the manifest's labels are not one [id, name] pair a logit", where)


def broken(what: str, where: object, why: object = None) -> BundleError:
    return BundleError(what, where=where, why=why, remedy="copy the whole bundle again, or export it again")
