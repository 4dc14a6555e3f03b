"""What a bundle says of itself: ``manifest.json``, its names, and the caps on what it may declare."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..errors import BundleError
from ..preprocessing import Preprocess
from .record import EMPTIED, REMEDY, plain, read_record
from .sections import (
    LOGITS,
    CalibrationEntry,
    EngineEntry,
    FileEntry,
    Host,
    LatencyEntry,
    ModelEntry,
    RuntimeEntry,
    TensorEntry,
    TypingEntry,
    VerdictEntry,
    VerificationEntry,
)

MAX_NAME = 255
"""The largest length in bytes of a file's name that every system takes."""
SCHEMA = 2
"""Version of the manifest's structure; a bundle of another one is refused."""
MANIFEST = "manifest.json"
"""Name of the file in the bundle."""
ONNX = "model.onnx"
"""Name of the portable graph in the bundle."""
GOLDEN = "golden.npz"
"""Name of the golden vectors in the bundle."""
REFERENCE = "reference.npz"
"""Name of the reference's answers in the bundle."""
ENGINES = "engines"
"""Name of the folder of TensorRT engines and their reports in the bundle."""
MAX_MANIFEST = 16 << 20
"""A larger manifest, in bytes, is not read."""
MAX_FILES = 256
"""The largest number of files in a bundle."""


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and how it was made; see ``docs/bundle.md`` for every field.

    ``labels`` are pairs of class id and readable name, in logit order.
    """

    model: ModelEntry
    input: TensorEntry
    outputs: tuple[TensorEntry, ...]
    preprocess: Preprocess
    labels: tuple[tuple[str, str], ...]
    labels_source: str
    precision: str
    format: str
    files: dict[str, FileEntry] = field(default_factory=dict)
    runtime: RuntimeEntry | None = field(default=None, metadata=EMPTIED)
    versions: dict[str, str] = field(default_factory=dict)
    typing: TypingEntry | None = None
    calibration: CalibrationEntry | None = None
    verification: VerificationEntry | None = None
    verdict: VerdictEntry | None = None
    latency: LatencyEntry | None = None
    engine: EngineEntry | None = None
    host: Host | None = field(default=None, metadata=EMPTIED)
    schema: int = SCHEMA
    checksum: str = ""
    """SHA-256 of all other entries, set when the manifest is written: an edited label or mean does not go
    unnoticed."""

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``, with its checksum."""
        content = plain(self)
        content["checksum"] = content_hash(content)
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Manifest:
        """Parse and check every entry; raises :class:`BundleError` that names the first wrong one."""
        content = _parsed(data, where)
        manifest = read_record(cls, content, where)
        Preprocess.from_json(content["preprocess"])
        _check_outputs(manifest, where)
        if manifest.checksum != content_hash(content):
            raise broken(
                "the manifest was changed after the export: its checksum differs",
                where,
            )
        return manifest

    @property
    def size_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(entry.size for entry in self.files.values())


def content_hash(content: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the checksum.

    It covers what the file says, not what this version knows, so that bundles of other versions stay
    readable.
    """
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_plain(name: str) -> bool:
    """Whether a name is a relative path below the bundle, written in one way on every system."""
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and name.isprintable()
        and all(len(part.encode()) <= MAX_NAME for part in parts)
        and name == PurePosixPath(name).as_posix()
        and ".." not in parts
        and parts[0] != "/"
        and not any(letter in "\\:" for letter in name)
    )


def broken(what: str, where: object, why: object = None) -> BundleError:
    """The error for a bundle that cannot be used as it is."""
    return BundleError(what, where=where, why=why, remedy=REMEDY)


def _parsed(data: bytes, where: object) -> dict[str, Any]:
    """The JSON object of a manifest whose schema this version reads."""
    try:
        content: dict[str, Any] = json.loads(data)
        schema = content["schema"]
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        raise broken("the manifest cannot be read", where, exc) from exc
    if schema != SCHEMA:
        raise broken(
            f"manifest schema {schema!r} is not supported, this version reads {SCHEMA}",
            where,
        )
    return content


def _check_outputs(manifest: Manifest, where: object) -> None:
    """Every tensor has a shape, and there is one label a logit."""
    if not manifest.outputs:
        raise broken("the manifest names no output", where)
    size = manifest.model.img_size
    if manifest.input.shape[1:] != (3, size, size):
        raise broken(
            f"the manifest's input is not one of images of {size} pixels",
            where,
        )
    if not all(tensor.shape for tensor in (manifest.input, *manifest.outputs)):
        raise broken("the manifest's input or an output has no shape", where)
    logits = [output.shape[-1] for output in manifest.outputs if output.name == LOGITS]
    if [len(manifest.labels)] != (logits or [0]):
        raise broken(
            "the manifest's labels are not one [id, name] pair a logit",
            where,
        )
