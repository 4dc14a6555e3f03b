"""Weights of a model: strict loading of checkpoints, published weights, random weights, and a fingerprint."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from cmt_edge.deploy.errors import WeightsError

from .checkpoint import Checkpoint, read_checkpoint
from .spec import Classifier, ModelSpec, StateDict

MAX_LISTED = 6
"""Number of keys of each kind that an error names."""

SIZED = ("position_bias", "position_embedding", ".relative.")
"""Parts of the names of weights that belong to a resolution."""


@dataclass(frozen=True)
class LoadedWeights:
    """What :func:`load_weights` did.

    Attributes:
        source: file or registry entry.
        ema: whether the averaged weights of the checkpoint were taken.
        fresh: keys left at their initial values (a fresh head asked for).
        resized: keys interpolated to the model's resolution.
        classes: class names in the checkpoint's entry ``classes``, or ``None``.
    """

    source: str
    ema: bool = False
    fresh: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    ema: bool | None = None,
    fresh_head: bool = False,
    resize: bool = False,
) -> LoadedWeights:
    """Load a checkpoint into ``model``, completely or not at all.

    Args:
        model: built by :func:`cmt_edge.cmt.create_model`.
        path: a ``.safetensors`` file, or a PyTorch file with a bare state dict, with ``model`` and optionally
            ``model_ema``, or with ``model_state``. Keys may be the published ones or ours.
        ema: ``True`` takes ``model_ema``, ``False`` takes ``model``; ``None`` takes ``model_ema`` where the
            checkpoint has one, as the official evaluation does.
        fresh_head: leave the classifier as initialised when its shape differs (another class count).
        resize: interpolate positions when the checkpoint was trained at another resolution.

    Raises:
        WeightsError: the file is unreadable or unsafe, or it does not fit; the error names missing,
            unexpected, mis-shaped and non-finite keys.
    """
    path = Path(path)
    checkpoint = read_checkpoint(path, ema)
    return _assign(model, checkpoint, path.name, fresh_head=fresh_head, resize=resize)


def load_pretrained(
    model: nn.Module, *, ema: bool | None = None, fresh_head: bool = False, resize: bool = False
) -> LoadedWeights:
    """Load the published weights of ``model``: from the package, the user's cache, or by download.

    The arguments are those of :func:`load_weights`.

    Raises:
        DownloadError: there is no network, or the file fails its check.
        WeightsError: as :func:`load_weights`, or nothing is published for this model.
    """
    spec = cast(Classifier, model).spec
    options: dict[str, Any] = {"fresh_head": fresh_head, "resize": resize}
    if spec.built_with_weights:
        return LoadedWeights("pretrained")
    if spec.published_state is not None:
        return _assign(model, Checkpoint(spec.published_state()), spec.name, **options)
    if spec.pretrained is None:
        raise WeightsError(
            f"no weights are published for {spec.name}", remedy="give --weights PATH or --weights random"
        )
    if spec.pretrained.resource:
        shipped = resources.files("cmt_edge.cmt") / "data" / spec.pretrained.resource
        with resources.as_file(shipped) as path:
            return load_weights(model, path, ema=ema, **options)
    from .download import fetch

    return load_weights(model, fetch(spec.pretrained), ema=ema, **options)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Fill ``model`` with random weights *and statistics*, for latency measurements without a checkpoint.

    A freshly initialised model has zero biases and identity norms, which a simplifier removes, so that it
    would be faster than any trained one. Matrices are normal with variance 1 / fan-in, norms are near 1, all
    else is near 0.
    """
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if key.endswith("running_var"):
            noise = 1 + 0.1 * noise.abs()
        elif key.endswith("weight") and tensor.ndim > 1:
            noise /= tensor[0].numel() ** 0.5
        else:
            noise = (1.0 if key.endswith("weight") else 0.0) + 0.02 * noise
        tensor.copy_(noise)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over name, dtype, shape and value of all parameters and buffers.

    It does not depend on the file or container that the weights came from.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _assign(
    model: nn.Module, checkpoint: Checkpoint, source: str, *, fresh_head: bool, resize: bool
) -> LoadedWeights:
    """Copy the checkpoint's values into ``model`` after every check has passed."""
    spec = cast(Classifier, model).spec
    target = model.state_dict()
    ours = {spec.rename(key): value for key, value in checkpoint.state.items()}
    if spec.adapt is not None:
        ours = spec.adapt(ours)
    resized: list[str] = []
    if resize and spec.resize is not None:
        ours, resized = spec.resize(model, ours)
    fresh = []
    if fresh_head:
        fresh = [key for key in spec.head_keys if key in ours and ours[key].shape != target[key].shape]
        ours.update({key: target[key] for key in fresh})
    if mismatch := _compare(target, ours):
        raise WeightsError(
            f"does not fit {spec.name}",
            where=source,
            why=mismatch.describe(target, ours),
            remedy=_remedy(spec, mismatch, ours),
        )
    model.load_state_dict(ours)
    classes = None if fresh else checkpoint.classes
    return LoadedWeights(source, checkpoint.ema, tuple(fresh), tuple(resized), classes)


@dataclass(frozen=True)
class _Mismatch:
    """Keys of a checkpoint that do not fit a model, by kind."""

    missing: list[str]
    unexpected: list[str]
    wrong_shape: list[str]
    wrong_type: list[str]
    not_finite: list[str]

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def describe(self, target: StateDict, ours: StateDict) -> str:
        """One line for each kind, with its first keys."""
        lines = []
        for kind, keys in vars(self).items():
            if not keys:
                continue
            shown = keys[:MAX_LISTED]
            if kind == "wrong_shape":
                shown = [_describe_shapes(key, ours, target) for key in shown]
            rest = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
            lines.append(f"{len(keys)} {kind.replace('_', ' ')}: {'; '.join(shown)}{rest}")
        return "\n       ".join(lines)


def _describe_shapes(key: str, ours: StateDict, target: StateDict) -> str:
    return f"{key} {tuple(ours[key].shape)}, the model has {tuple(target[key].shape)}"


def _compare(target: StateDict, ours: StateDict) -> _Mismatch:
    shared = [key for key in target if key in ours]
    floating = [key for key in shared if ours[key].is_floating_point()]
    return _Mismatch(
        missing=[key for key in target if key not in ours],
        unexpected=[key for key in ours if key not in target],
        wrong_shape=[key for key in shared if ours[key].shape != target[key].shape],
        wrong_type=[
            key for key in shared if ours[key].is_floating_point() != target[key].is_floating_point()
        ],
        not_finite=[key for key in floating if not bool(ours[key].isfinite().all())],
    )


def _remedy(spec: ModelSpec, mismatch: _Mismatch, ours: StateDict) -> str:
    if mismatch.not_finite:
        return "the training diverged or the file is damaged: use an earlier checkpoint"
    shapes = mismatch.wrong_shape
    head = [key for key in shapes if key in spec.head_keys]
    if shapes and not mismatch.missing and not mismatch.unexpected:
        if len(head) == len(shapes):
            count = ours[head[0]].shape[0]
            return (
                f"the checkpoint has {count} classes: --num-classes {count}, or --fresh-head to start a new"
                " classifier"
            )
        if all(key in head or any(part in key for part in SIZED) for key in shapes):
            return (
                "it was trained at another resolution: give its --imgsz, or --resize-position-bias to"
                " interpolate"
            )
    return "if it is a checkpoint of another variant, choose the matching --model"
