"""Weights in: strict and safe loading, published downloads, a content fingerprint.

Files are read by ``safetensors`` or by ``torch.load(weights_only=True)`` with one extra class allowed, the
``argparse.Namespace`` that published training checkpoints carry. Nothing of a checkpoint is executed.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import WeightsError

from .registry import ModelSpec

MAX_LISTED = 6
"""So many keys of each kind are named in an error."""


@dataclass(frozen=True)
class LoadedWeights:
    """What :func:`load_weights` did.

    Attributes:
        source: file or registry entry.
        ema: whether the averaged weights of the checkpoint were taken.
        fresh: keys left at their initial values (a fresh head asked for).
        resized: keys interpolated to the model's resolution.
        classes: class names the checkpoint carries under ``classes``, or ``None``.
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
        path: ``.safetensors``; or a PyTorch file holding a bare state dict or a dict with ``model`` and
            optionally ``model_ema``, or with ``model_state``. Keys may be the published ones or ours.
        ema: ``True`` takes ``model_ema``, ``False`` takes ``model``; ``None`` takes ``model_ema`` where the
            checkpoint has one, as the official evaluation does.
        fresh_head: leave the classifier as initialised when its shape differs (another class count).
        resize: interpolate position biases when the checkpoint was trained at another resolution.

    Raises:
        WeightsError: unreadable, unsafe, or not fitting; names every missing, unexpected, mis-shaped and
            non-finite key.
    """
    path = Path(path)
    state, used_ema, classes = _read(path, ema)
    return _assign(model, state, path.name, used_ema, classes, fresh_head=fresh_head, resize=resize)


def load_pretrained(
    model: nn.Module, *, ema: bool | None = None, fresh_head: bool = False, resize: bool = False
) -> LoadedWeights:
    """Load the published weights of ``model``: from the package, the user's cache, or by download.

    Raises:
        DownloadError: no network, or the file fails its check.
        WeightsError: as :func:`load_weights`, or nothing is published for this model.
    """
    spec: ModelSpec = model.spec  # type: ignore[assignment]
    published = spec.pretrained
    if spec.built_with_weights:
        return LoadedWeights("pretrained")
    if spec.published_state is not None:
        return _assign(
            model, spec.published_state(), spec.name, False, None, fresh_head=fresh_head, resize=resize
        )
    if published is None:
        raise WeightsError(
            f"no weights are published for {spec.name}", remedy="give --weights PATH or --weights random"
        )
    options: dict[str, Any] = {"ema": ema, "fresh_head": fresh_head, "resize": resize}
    if published.resource:
        with resources.as_file(resources.files("cmt_edge.cmt").joinpath("data", published.resource)) as path:
            return load_weights(model, path, **options)
    from .download import fetch

    return load_weights(model, fetch(published), **options)


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Fill ``model`` with random weights *and statistics*, for latency measurements without a checkpoint.

    A freshly initialised model has zero biases and identity norms, which a simplifier removes: it would be
    measured faster than any trained one. Matrices are normal with variance 1 / fan-in, norms near 1, all else
    near 0.
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
    """SHA-256 over all parameters and buffers by name, dtype, shape and value; independent of file and
    container."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, ema: bool | None) -> tuple[dict[str, Tensor], bool, tuple[str, ...] | None]:
    """State dict of the file, whether it is the averaged one, and the class names it carries."""
    if not path.is_file():
        raise WeightsError("no such checkpoint file", where=path, remedy="check the path given to --weights")
    if path.suffix == ".safetensors":
        if ema:
            raise _no_average(path)
        return _tensors(_read_safetensors(path), path), False, None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch raises many types for damaged files; all mean the same to the user
        raise _unreadable(path, exc) from exc
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"holds a {type(content).__name__}, not a state dict", where=path, remedy=_SAVE_HINT
        )
    classes = content.get("classes")
    names = tuple(map(str, classes)) if isinstance(classes, (list, tuple)) else None
    if isinstance(content.get("model_state"), Mapping):  # SlowFast and MViT
        content = content["model_state"]
    if "model" not in content and "model_ema" not in content:
        if ema:
            raise _no_average(path)
        return _tensors(content, path), False, names
    averaged = content.get("model_ema")
    if ema and averaged is None:
        raise _no_average(path)
    use_ema = averaged is not None if ema is None else ema
    return _tensors(averaged if use_ema else content.get("model"), path), use_ema, names


def _no_average(path: Path) -> WeightsError:
    return WeightsError("has no averaged weights (model_ema)", where=path, remedy="load it without --ema")


_SAVE_HINT = "save model.state_dict() with torch.save or safetensors"


def _unreadable(path: Path, exc: Exception) -> WeightsError:
    """Tell a file that wants to run code from one that is damaged or something else."""
    text = (
        str(exc).rpartition("WeightsUnpickler error:")[2].strip()
    )  # before it torch advises to switch the check off
    lines = text.splitlines() or [type(exc).__name__]
    forbidden = next((line for line in lines if any(word in line for word in _CODE)), None)
    if forbidden:
        why = forbidden.strip()[:300]
        return WeightsError(
            "refused: the file asks to run code while it is read", where=path, why=why, remedy=_SAVE_HINT
        )
    remedy = "is it complete, and saved by torch.save? copy it again"
    return WeightsError(
        "cannot be read as a PyTorch checkpoint", where=path, why=lines[0][:300], remedy=remedy
    )


_CODE = ("Unsupported global", "GLOBAL", "Unsupported class", "unrecognized function")
"""How torch's restricted unpickler names what it refuses to call."""


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as exc:
        raise WeightsError(
            "cannot be read as safetensors", where=path, why=exc, remedy="is it complete? copy it again"
        ) from exc


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """``state`` if it is a flat mapping of tensors; the ``module.`` prefix of distributed training is
    dropped."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError("holds no state dict of tensors", where=path, remedy=_SAVE_HINT)
    prefix = "module." if all(str(k).startswith("module.") for k in state) else ""
    return {str(k)[len(prefix) :]: v for k, v in state.items()}


def _assign(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str,
    used_ema: bool,
    classes: tuple[str, ...] | None,
    *,
    fresh_head: bool,
    resize: bool,
) -> LoadedWeights:
    spec: ModelSpec = model.spec  # type: ignore[assignment]
    target = model.state_dict()
    ours = {spec.rename(key): value for key, value in state.items()}
    ours = spec.adapt(ours) if spec.adapt else ours
    resized: list[str] = []
    if resize and spec.resize is not None:
        ours, resized = spec.resize(model, ours)
    fresh = [k for k in spec.head_keys if fresh_head and k in ours and ours[k].shape != target[k].shape]
    for key in fresh:
        ours[key] = target[key]
    _check(spec, target, ours, source)
    model.load_state_dict(ours)
    return LoadedWeights(source, used_ema, tuple(fresh), tuple(resized), None if fresh else classes)


def _check(spec: ModelSpec, target: dict[str, Tensor], ours: dict[str, Tensor], source: str) -> None:
    """Raise one error that names everything that does not fit."""
    shared = [k for k in target if k in ours]
    shapes = [k for k in shared if ours[k].shape != target[k].shape]
    problems = {
        "missing": [k for k in target if k not in ours],
        "unexpected": [k for k in ours if k not in target],
        "wrong shape": [
            f"{k} {tuple(ours[k].shape)}, the model has {tuple(target[k].shape)}" for k in shapes
        ],
        "wrong type": [k for k in shared if ours[k].is_floating_point() != target[k].is_floating_point()],
        "not finite": [
            k for k in shared if ours[k].is_floating_point() and not bool(ours[k].isfinite().all())
        ],
    }
    if not any(problems.values()):
        return
    lines = []
    for kind, keys in problems.items():
        if keys:
            rest = f" and {len(keys) - MAX_LISTED} more" if len(keys) > MAX_LISTED else ""
            lines.append(f"{len(keys)} {kind}: " + "; ".join(keys[:MAX_LISTED]) + rest)
    raise WeightsError(
        f"does not fit {spec.name}",
        where=source,
        why="\n       ".join(lines),
        remedy=_remedy(spec, problems, shapes, ours),
    )


_SIZED = ("position_bias", "position_embedding", ".relative.")
"""Parts of the names of weights that belong to a resolution."""


def _remedy(
    spec: ModelSpec, problems: dict[str, list[str]], shapes: list[str], ours: dict[str, Tensor]
) -> str:
    if problems["not finite"]:
        return "the training diverged or the file is damaged: use an earlier checkpoint"
    head = [k for k in shapes if k in spec.head_keys]
    if shapes and not problems["missing"] and not problems["unexpected"]:
        if len(head) == len(shapes):
            count = ours[head[0]].shape[0]
            return (
                f"the checkpoint has {count} classes: --num-classes {count}, or --fresh-head to start a new"
                " classifier"
            )
        if all(any(word in k for word in _SIZED) or k in head for k in shapes):
            return (
                "it was trained at another resolution: give its --imgsz, or --resize-position-bias to"
                " interpolate"
            )
    return "is it a checkpoint of another variant? choose the matching --model"
