"""Checkpoint files: what they contain, read without running any of their code.

Files are read by ``safetensors`` or by ``torch.load(weights_only=True)`` with one extra class allowed, the
``argparse.Namespace`` that published training checkpoints contain.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmt_edge.deploy.errors import WeightsError

from .spec import StateDict

MAX_REASON = 300
"""Length, in characters, at which the text of another library's error is cut."""

REFUSALS = ("Unsupported global", "GLOBAL", "Unsupported class", "unrecognized function")
"""Words with which torch's restricted unpickler refuses to call something."""

SAVE_REMEDY = "save model.state_dict() with torch.save or safetensors"
"""The remedy for a file that is not a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint file.

    Attributes:
        state: parameters and buffers, under the names of the file.
        ema: whether ``state`` is the average of the weights over training.
        classes: names of the classes, or ``None`` where the file has none.
    """

    state: StateDict
    ema: bool = False
    classes: tuple[str, ...] | None = None


def read_checkpoint(path: Path, ema: bool | None) -> Checkpoint:
    """Read a ``.safetensors`` or PyTorch file.

    Args:
        path: of the file.
        ema: ``True`` takes the averaged weights, ``False`` the others; ``None`` takes the averaged ones where
            the file has them.

    Raises:
        WeightsError: the file is missing, unreadable, unsafe or without a state dict, or has no averaged
            weights though they are asked for.
    """
    if not path.is_file():
        raise WeightsError("no such checkpoint file", where=path, remedy="check the path given to --weights")
    if path.suffix == ".safetensors":
        if ema:
            raise _no_average(path)
        return Checkpoint(_tensors(_load_safetensors(path), path))
    content = _load_torch(path)
    names = content.get("classes")
    classes = tuple(map(str, names)) if isinstance(names, (list, tuple)) else None
    state, averaged = _choose_state(content, ema, path)
    return Checkpoint(_tensors(state, path), averaged, classes)


def read_content(path: Path) -> Any:
    """Everything in a checkpoint file; of a ``.safetensors`` file its tensors.

    Raises:
        WeightsError: the file is missing, unreadable or unsafe.
    """
    if not path.is_file():
        raise WeightsError("no such checkpoint file", where=path, remedy="check the path given to --weights")
    return _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)


def _choose_state(content: Mapping[str, Any], ema: bool | None, path: Path) -> tuple[Any, bool]:
    """The state dict of a checkpoint, and whether it is the averaged one."""
    if isinstance(content.get("model_state"), Mapping):  # SlowFast and MViT
        state, average = content["model_state"], None
    elif "model" in content or "model_ema" in content:  # CMT, ConViT, and our own training
        state, average = content.get("model"), content.get("model_ema")
    else:  # CvT: a bare state dict
        state, average = content, None
    if ema and average is None:
        raise _no_average(path)
    if ema or (ema is None and average is not None):
        return average, True
    return state, False


def _no_average(path: Path) -> WeightsError:
    return WeightsError("has no averaged weights (model_ema)", where=path, remedy="load it without --ema")


def _load_torch(path: Path) -> Mapping[str, Any]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # torch raises many types for damaged files; all mean the same to the user
        raise _unreadable(path, exc) from exc
    if not isinstance(content, Mapping):
        what = f"holds a {type(content).__name__}, not a state dict"
        raise WeightsError(what, where=path, remedy=SAVE_REMEDY)
    return content


def _unreadable(path: Path, exc: Exception) -> WeightsError:
    """Tell a file that wants to run code from a damaged or foreign one."""
    # Before these words torch advises to switch the check off, which nobody should read here.
    text = str(exc).rpartition("WeightsUnpickler error:")[2].strip()
    lines = text.splitlines() or [type(exc).__name__]
    refusal = next((line for line in lines if any(word in line for word in REFUSALS)), None)
    if refusal:
        return WeightsError(
            "refused: the file asks to run code while it is read",
            where=path,
            why=refusal.strip()[:MAX_REASON],
            remedy=SAVE_REMEDY,
        )
    return WeightsError(
        "cannot be read as a PyTorch checkpoint",
        where=path,
        why=lines[0][:MAX_REASON],
        remedy="check that it is complete and was saved by torch.save, or copy it again",
    )


def _load_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as exc:
        raise WeightsError(
            "cannot be read as safetensors",
            where=path,
            why=exc,
            remedy="check that it is complete, or copy it again",
        ) from exc


def _tensors(state: Any, path: Path) -> StateDict:
    """``state`` if it is a flat mapping of tensors, without the prefix ``module.`` of distributed
    training."""
    if not isinstance(state, Mapping) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise WeightsError("holds no state dict of tensors", where=path, remedy=SAVE_REMEDY)
    prefix = "module." if all(str(key).startswith("module.") for key in state) else ""
    return {str(key)[len(prefix) :]: value for key, value in state.items()}
