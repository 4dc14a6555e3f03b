"""Rebuilds the PyTorch reference of a bundle.

``deploy`` finds this module through the entry point ``cmt_edge.reference``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import nn

from cmt_edge.deploy.errors import InputError, WeightsError

from .features import choose_head
from .outside import is_outside
from .registry import create_model, list_models
from .spec import Classifier
from .weights import (
    AS_BUILT,
    LoadedWeights,
    compute_weights_fingerprint,
    load_pretrained,
    load_weights,
    randomize,
)

PROVIDER = "cmt"
"""Name of the entry point, recorded in every manifest."""


class WeightsEntry(Protocol):
    """What is read of a manifest's entry on the weights; see :class:`LoadedWeights`."""

    @property
    def source(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def ema(self) -> bool: ...
    @property
    def fresh(self) -> tuple[str, ...]: ...
    @property
    def resized(self) -> tuple[str, ...]: ...


class ModelEntry(Protocol):
    """What is read of a manifest's entry on the model."""

    @property
    def name(self) -> str: ...
    @property
    def img_size(self) -> int: ...
    @property
    def num_classes(self) -> int: ...
    @property
    def head(self) -> str: ...
    @property
    def weights(self) -> WeightsEntry: ...


def load_reference(
    name: str | nn.Module,
    weights: str | Path,
    *,
    img_size: int | None = None,
    num_classes: int | None = None,
    seed: int = 0,
    ema: bool | None = None,
    fresh_head: bool = False,
    resize: bool = False,
    download: bool = True,
) -> tuple[Classifier, LoadedWeights]:
    """A reference model in eval mode with its weights.

    Args:
        name, img_size, num_classes: as for :func:`cmt_edge.cmt.create_model`.
        weights: ``"pretrained"``, ``"random"``, or the path of a checkpoint.
        seed: of the initial weights, and of random ones.
        ema, fresh_head, resize: as for :func:`cmt_edge.cmt.load_weights`.
        download: as for :func:`cmt_edge.cmt.load_pretrained`.
    """
    model = create_model(
        name,
        img_size=img_size,
        num_classes=num_classes,
        seed=seed,
    )
    if str(weights) == "random":
        randomize(model, seed)
        return model, LoadedWeights("random")
    options: dict[str, Any] = {
        "ema": ema,
        "fresh_head": fresh_head,
        "resize": resize,
    }
    if str(weights) == "pretrained":
        return model, load_pretrained(model, download=download, **options)
    return model, load_weights(model, weights, **options)


def rebuild(
    entry: ModelEntry,
    weights: str | Path | None,
    trusted_model: str | nn.Module | None = None,
) -> tuple[nn.Module, str]:
    """The model of a manifest's ``model`` entry, and the fingerprint of its weights.

    Nothing is downloaded because the entry says so: published weights must be in the package or in the
    user's cache already. The file that it names is opened only if it lies in the current folder, as a
    checkpoint of a stranger is.

    Args:
        entry: of the manifest, which a stranger may have written.
        weights: the checkpoint, where the weights came from a file.
        trusted_model: the model to build instead of the one that the entry names: a name or the module object
            itself. A name from outside the registry (``module:factory``, ``timm:NAME``) makes Python import
            code, so it must come from the user and never from a manifest.

    Raises:
        InputError: the entry names a model from outside the registry, and ``trusted_model`` is missing.
        WeightsError: the weights came from a file, and ``weights`` does not name it; or they were published,
            and this machine does not have them.
    """
    name = entry.name if trusted_model is None else trusted_model
    if trusted_model is None:
        _require_known(entry, weights)
    made = entry.weights
    model, _ = load_reference(
        name,
        _find_weights(made.source) if weights is None else weights,
        img_size=entry.img_size,
        num_classes=entry.num_classes,
        seed=made.seed,
        ema=made.ema,
        fresh_head=bool(made.fresh),
        resize=bool(made.resized),
        download=weights is not None,
    )
    return choose_head(model, entry.head), compute_weights_fingerprint(model)


def _find_weights(source: str) -> str:
    """What gives the weights that a manifest names.

    Raises:
        WeightsError: they came from a file that is not here.
    """
    if source == AS_BUILT:
        return "pretrained"
    if source not in ("pretrained", "random") and not _is_here(source):
        raise WeightsError(
            f"the bundle was made from the checkpoint {source!r}, which it does not contain",
            remedy="name that file: --weights PATH",
        )
    return source


def _require_known(entry: ModelEntry, weights: str | Path | None) -> None:
    """Raise :class:`InputError` unless the registry has the model of a manifest and its weights are known."""
    if is_outside(entry.name):
        raise InputError(
            f"the bundle says that its PyTorch model is {entry.name!r}, which is not built without your word",
            why="that name makes Python import a module, and anybody may have written the bundle",
            remedy=f"if you trust that code: --reference-model {entry.name}",
        )
    if entry.weights.source == AS_BUILT and (weights is None or entry.name not in list_models()):
        raise InputError(
            f"the bundle was made from a module object in Python ({entry.name}), which it does not contain",
            remedy="give the module object as trusted_model, or name a factory that builds it:"
            " --reference-model FILE.py:FACTORY",
        )


def _is_here(source: str) -> bool:
    """Whether the checkpoint that a manifest records lies in the current folder; a path is not followed,
    because a stranger may have written it. Whether it is the right file, its fingerprint proves."""
    return Path(source).name == source and Path(source).is_file()
