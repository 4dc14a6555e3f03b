"""What a bundle says of itself: ``manifest.json``, its names, and the caps on what it may declare."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..errors import BundleError
from ..escaping import SHOWN_CHARACTERS
from ..preprocessing import Preprocess
from .record import EMPTIED, OMITTED, REMEDY, make_plain, parse_json, read_record
from .sections import (
    BATCH,
    FORMATS,
    LOGITS,
    MAX_ELEMENTS,
    BlockPlace,
    CalibrationEntry,
    CompiledEntry,
    DecodingEntry,
    EngineEntry,
    FileEntry,
    Format,
    Host,
    LabelsSource,
    LatencyEntry,
    ModelEntry,
    Precision,
    RuntimeEntry,
    SlimEntry,
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
REPORT_TEXT, REPORT_JSON, REPORT_PAGE = "report.md", "report.json", "report.html"
"""Names of the export's report in the bundle: as text, for programs, and for a browser."""
ENGINES = "engines"
"""Name of the folder of TensorRT engines and their reports in the bundle."""
PORTABLE_ENGINE = "model.rtx"
"""Name of the engine in the bundle that TensorRT for RTX built where the bundle was exported. It lies outside
:data:`ENGINES`, so that a signature covers it."""
COMPILED = "compile.json"
"""Name of the list of the engine's kernels in the bundle."""
MAX_MANIFEST = 16 << 20
"""A larger manifest, in bytes, is not read."""
MAX_FILES = 256
"""The largest number of files in a bundle."""
SHOWN_NAMES = 5
"""The largest number of outputs that a message names."""
BINARY = 2
"""Number of labels of a model with a single logit."""
MAX_PATH = 1000
"""The largest number of characters of a file's path in the bundle."""


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
    labels_source: LabelsSource
    precision: Precision
    format: Format
    files: dict[str, FileEntry] = field(default_factory=dict)
    runtime: RuntimeEntry | None = field(default=None, metadata=EMPTIED)
    versions: dict[str, str] = field(default_factory=dict)
    typing: TypingEntry | None = None
    calibration: CalibrationEntry | None = None
    decoding: DecodingEntry | None = field(default=None, metadata=OMITTED)
    verification: VerificationEntry | None = None
    verdict: VerdictEntry | None = None
    latency: LatencyEntry | None = None
    engine: EngineEntry | None = None
    compiled: CompiledEntry | None = field(default=None, metadata=OMITTED)
    blocks: tuple[BlockPlace, ...] | None = field(default=None, metadata=OMITTED)
    slim: SlimEntry | None = field(default=None, metadata=OMITTED)
    host: Host | None = field(default=None, metadata=EMPTIED)
    schema: int = SCHEMA
    checksum: str = ""
    """SHA-256 of all other entries, set when the manifest is written: an edited label or mean does not go
    unnoticed."""

    def to_bytes(self) -> bytes:
        """The content of ``manifest.json``, with its checksum."""
        content = make_plain(self)
        content["checksum"] = hash_content(content)
        text = json.dumps(content, indent=2, ensure_ascii=False)
        return f"{text}\n".encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Manifest:
        """Parse and check every entry; raises :class:`BundleError` that names the first wrong one."""
        content = parse_json(data, where)
        manifest = cls.from_content(content, where)
        if manifest.checksum != hash_content(content):
            raise make_bundle_error(
                "the manifest was changed after the export: its checksum differs",
                where,
            )
        return manifest

    @classmethod
    def from_content(cls, content: Any, where: object) -> Manifest:
        """Check every entry of parsed JSON but the checksum, which a manifest has only in its file; errors as
        :meth:`from_bytes`."""
        _require_schema(content, where)
        manifest = read_record(cls, content, where)
        if fault := _find_first_fault(manifest):
            raise make_bundle_error(fault, where)
        return manifest

    @property
    def size_bytes(self) -> int:
        """Size of all files together, without the manifest."""
        return sum(entry.size for entry in self.files.values())

    @property
    def fits_16_bits(self) -> bool:
        """Whether int8 weights were made so that no sum of two products saturates on x86 without VNNI."""
        return self.calibration is not None and bool(self.calibration.fits_16_bits)


def hash_content(content: Mapping[str, Any]) -> str:
    """SHA-256 of all entries but the checksum.

    It covers what the file says, not what this version knows, so that bundles of other versions stay
    readable.
    """
    rest = {k: v for k, v in content.items() if k != "checksum"}
    text = json.dumps(rest, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def make_bundle_error(what: str, where: object, why: object = None) -> BundleError:
    """The error for a bundle that cannot be used as it is."""
    return BundleError(what, where=where, why=why, remedy=REMEDY)


def _require_schema(content: Any, where: object) -> None:
    """Raise :class:`BundleError` for a manifest whose schema this version does not read."""
    try:
        schema = content["schema"]
    except (KeyError, TypeError) as exc:
        raise make_bundle_error("the manifest cannot be read", where, exc) from exc
    if schema != SCHEMA:
        raise make_bundle_error(
            f"manifest schema {_shorten(schema)} is not supported, this version reads {SCHEMA}",
            where,
        )


def _shorten(value: object) -> str:
    """A wrong value as a message quotes it."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."


def _find_first_fault(manifest: Manifest) -> str | None:
    """What is wrong where each entry is possible and two of them contradict each other; ``None`` if nothing
    is."""
    faults = (find(manifest) for find in CHECKS)
    return next((fault for fault in faults if fault), None)


def _find_fault_of_names(manifest: Manifest) -> str | None:
    """A name that leads out of the bundle, or that some system could not hold."""
    for name in manifest.files:
        if len(name) > MAX_PATH or not is_plain(name):
            return (
                f"files names a file outside the bundle, or one that cannot be: {name[:SHOWN_CHARACTERS]!r}"
            )
    return None


def _find_fault_of_precision(manifest: Manifest) -> str | None:
    """A precision that no bundle of the format has."""
    known = FORMATS[manifest.format]
    if manifest.precision in known:
        return None
    return (
        f"precision is {manifest.precision!r}, expected {' or '.join(map(repr, known))} in a bundle of"
        f" format {manifest.format!r}"
    )


def _find_fault_of_preprocessing(manifest: Manifest) -> str | None:
    """A value that cannot be applied, or a size that is not the model's."""
    spec, size = manifest.preprocess, manifest.model.img_size
    if fault := spec.fault():
        return f"preprocess.{fault}"
    if spec.size != size:
        return f"preprocess.size is {spec.size}, but model.img_size is {size}"
    return None


def _find_fault_of_tensors(manifest: Manifest) -> str | None:
    """Shapes that do not belong together: every tensor begins with the same batch size."""
    size = manifest.model.img_size
    if not manifest.outputs:
        return "the manifest names no output"
    if not all(tensor.shape for tensor in (manifest.input, *manifest.outputs)):
        return "the manifest's input or an output has no shape"
    if manifest.input.shape[1:] != (3, size, size):
        return f"the manifest's input is not one of images of {size} pixels"
    batch = manifest.input.shape[0]
    for output in manifest.outputs:
        if output.shape[0] != batch:
            return f"output {output.name!r} has a batch of {output.shape[0]}, but the input one of {batch}"
        if BATCH in output.shape[1:]:
            return f"output {output.name!r} has two dynamic dimensions"
    names = [output.name for output in manifest.outputs]
    return None if len(set(names)) == len(names) else "two outputs have the same name"


def _find_fault_of_sizes(manifest: Manifest) -> str | None:
    """A tensor that no machine of today should allocate."""
    for tensor in (manifest.input, *manifest.outputs):
        elements = math.prod(size for size in tensor.shape if isinstance(size, int))
        if elements > MAX_ELEMENTS:
            return f"{tensor.name[:SHOWN_CHARACTERS]!r} has {elements} elements, the cap is {MAX_ELEMENTS}"
    return None


def _find_fault_of_head(manifest: Manifest) -> str | None:
    """Outputs that a model with this head does not have."""
    names, head = [output.name for output in manifest.outputs], manifest.model.head
    classifies = head == LOGITS
    if classifies != (LOGITS in names) or (classifies and len(names) > 1):
        return f"model.head is {head!r}, but the outputs are {', '.join(map(repr, names[:SHOWN_NAMES]))}"
    if head == LOGITS and len(manifest.outputs[0].shape) != 2:
        return "the logits are not one row an image"
    if head != LOGITS and any(output.kind for output in manifest.outputs):
        return "a feature map has a kind, which only the outputs of a classifier have"
    return None


def _find_fault_of_labels(manifest: Manifest) -> str | None:
    """Labels that are not one pair a logit, or another number of classes."""
    logits = [output.shape[-1] for output in manifest.outputs if output.name == LOGITS]
    if [len(manifest.labels)] != (logits or [0]):
        return "the manifest's labels are not one [id, name] pair a logit"
    classes = manifest.model.num_classes
    if logits and len(manifest.labels) != (BINARY if classes == 1 else classes):
        return f"model.num_classes is {classes}, but there are {len(manifest.labels)} labels"
    return None


def _find_fault_of_engine(manifest: Manifest) -> str | None:
    """An engine whose files the bundle lacks."""
    entry = manifest.engine
    names = (entry.file, entry.report, entry.text) if entry else ()
    missing = [name for name in names if name not in manifest.files]
    return f"engine names a file that files lacks: {missing[0][:SHOWN_CHARACTERS]!r}" if missing else None


def _find_fault_of_slimness(manifest: Manifest) -> str | None:
    """A file that is left out and there nevertheless."""
    left_out = manifest.slim.files if manifest.slim else {}
    both = [name for name in left_out if name in manifest.files]
    return f"slim and files both name {both[0][:SHOWN_CHARACTERS]!r}" if both else None


CHECKS: tuple[Callable[[Manifest], str | None], ...] = (
    _find_fault_of_names,
    _find_fault_of_precision,
    _find_fault_of_preprocessing,
    _find_fault_of_tensors,
    _find_fault_of_sizes,
    _find_fault_of_head,
    _find_fault_of_labels,
    _find_fault_of_engine,
    _find_fault_of_slimness,
)
"""What is checked once every entry is possible by itself; each relies on those before it."""
