"""The product: a folder that any runtime can finish, serve, check and measure.

``manifest.json`` names every other file with its size and SHA-256; it is written last, so a folder with a
manifest is complete. Hashes protect against accidents; they do not prove where a bundle comes from.
"""

from .bundle import Bundle
from .golden import Golden, save_reference
from .manifest import (
    COMPILED,
    ENGINES,
    GOLDEN,
    MANIFEST,
    MAX_MANIFEST,
    ONNX,
    PORTABLE_ENGINE,
    REFERENCE,
    REPORT_JSON,
    REPORT_PAGE,
    REPORT_TEXT,
    Manifest,
)
from .record import make_plain, parse_json, read_record
from .sections import LOGITS, PROBABILITIES, SCORES
from .writer import BundleWriter, require_outside_bundles

__all__ = [
    "COMPILED",
    "ENGINES",
    "GOLDEN",
    "LOGITS",
    "MANIFEST",
    "MAX_MANIFEST",
    "ONNX",
    "PORTABLE_ENGINE",
    "PROBABILITIES",
    "REFERENCE",
    "REPORT_JSON",
    "REPORT_PAGE",
    "REPORT_TEXT",
    "SCORES",
    "Bundle",
    "BundleWriter",
    "Golden",
    "Manifest",
    "make_plain",
    "parse_json",
    "read_record",
    "require_outside_bundles",
    "save_reference",
]
