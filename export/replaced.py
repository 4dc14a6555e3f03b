"""The bundle whose place an export takes: what is said of it, so that none is lost without a word."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import MANIFEST, Manifest
from cmt_edge.deploy.bundle.manifest import MAX_MANIFEST
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.files import read_regular

KEEP_BOTH = "--name NAME keeps both"
"""How to keep a bundle that another one would replace."""


@dataclass(frozen=True)
class Replaced:
    """A bundle that another one replaces.

    Attributes:
        model: name of the model; ``None`` where its manifest could not be read.
        weights: ``"pretrained"``, ``"random"``, or the file name of its checkpoint; ``None`` where its
            manifest could not be read.
        sha256: over its weights.
    """

    model: str | None
    weights: str | None
    sha256: str | None


def read_replaced(target: Path) -> Replaced | None:
    """What stands at ``target`` before an export; ``None`` where nothing does."""
    path = target / MANIFEST
    if not path.exists():
        return None
    try:
        model = Manifest.from_bytes(read_regular(path, MAX_MANIFEST), path).model
    except (BundleError, OSError):
        return Replaced(None, None, None)
    return Replaced(model.name, model.weights.source, model.weights.sha256)


def describe_replaced(replaced: Replaced, bundle: Bundle) -> str:
    """One line on the bundle that ``bundle`` has replaced, and on what differs."""
    if replaced.model is None:
        return "replaced: a bundle that could not be read"
    model = bundle.manifest.model
    if _locate_model(replaced.model) != _locate_model(model.name):
        return f"replaced: the bundle of another model, {replaced.model} ({KEEP_BOTH})"
    if replaced.sha256 != model.weights.sha256:
        return f"replaced: a bundle of the same model with other weights, {replaced.weights} ({KEEP_BOTH})"
    return "replaced: a bundle of the same model with the same weights"


def _locate_model(name: str) -> str:
    """The name of a model, with the whole path of the file where it is in one: ``./net.py:build`` and
    ``net.py:build`` are the same model."""
    file, _, factory = name.rpartition(":")
    return f"{Path(file).expanduser().resolve()}:{factory}" if file.endswith(".py") else name
