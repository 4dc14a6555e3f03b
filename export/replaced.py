"""The bundle whose place an export takes: what is said of it, so that none is lost without a word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import MANIFEST, Manifest
from cmt_edge.deploy.bundle.manifest import MAX_MANIFEST
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.files import read_regular


@dataclass(frozen=True)
class Replaced:
    """A bundle that another one replaces.

    Attributes:
        weights: ``"pretrained"``, ``"random"``, or the file name of its checkpoint; ``None`` where its
            manifest could not be read.
        sha256: over its weights.
    """

    weights: str | None
    sha256: str | None


def read_replaced(target: Path) -> Replaced | None:
    """What stands at ``target`` before an export; ``None`` where nothing does."""
    path = target / MANIFEST
    if not path.exists():
        return None
    try:
        entry = Manifest.from_bytes(read_regular(path, MAX_MANIFEST), path).model.weights
    except (BundleError, OSError):
        return Replaced(None, None)
    return Replaced(entry.source, entry.sha256)


def describe_replaced(replaced: Replaced, bundle: Bundle) -> str:
    """One line on the bundle that ``bundle`` has replaced."""
    if replaced.weights is None:
        return "replaced: a bundle that could not be read"
    if replaced.sha256 == bundle.manifest.model.weights.sha256:
        return "replaced: the bundle that was here, made from the same weights"
    return (
        f"replaced: the bundle that was here, made from the other weights {replaced.weights}"
        " (--name NAME keeps both)"
    )
