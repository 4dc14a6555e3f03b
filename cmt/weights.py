"""Weights of a model: strict loading of checkpoints, published weights, random weights, and a fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import WeightsError
from cmt_edge.startup import name_program

from .checkpoint import SAVE_REMEDY, make_refusal, read_content, read_metadata
from .class_names import ClassNames, find_class_names
from .containers import (
    BATCHES,
    Undecided,
    WeightsCandidate,
    choose_candidate,
    describe_keys,
    describe_nearest_entry,
    find_candidates,
)
from .hidden_layers import find_hidden_layers, find_nameless_average
from .spec import Classifier, ModelSpec, StateDict
from .strangers import find_strangers

MAX_LISTED = 6
"""Number of keys of each kind that an error names."""

AS_BUILT = "as built"
"""Source of the weights of a user's factory: nobody but the factory knows whether they were trained."""

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
        classes: class names in the checkpoint, or ``None``.
        classes_fault: why names of classes that the checkpoint has cannot be used, or ``None``.
        left_out: keys beside the model that are the training program's and were not loaded.
        unread: classes of objects beside the model, which were not read because that would run their code.
        entry: where in the checkpoint the weights were, e.g. ``"state_dict.model"``; empty where they did not
            come from a file.
    """

    source: str
    ema: bool = False
    fresh: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    entry: str = ""
    classes_fault: str | None = None
    left_out: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()


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
        path: a safetensors or PyTorch file in one of the containers that training programs write, see
            :mod:`cmt_edge.cmt.containers`. Keys may be the published ones or ours.
        ema: ``True`` takes averaged weights, ``False`` takes the others; ``None`` takes averaged ones where
            the checkpoint has some, as the official evaluation does.
        fresh_head: leave the classifier as initialised when its shape differs (another class count), or when
            the checkpoint has none.
        resize: interpolate positions when the checkpoint was trained at another resolution.

    Raises:
        WeightsError: the file is unreadable or unsafe, or it does not fit; the error names missing,
            unexpected, mis-shaped and non-finite keys.
    """
    path = Path(path)
    content = read_content(path)
    return _assign(
        model,
        content,
        path,
        said=read_metadata(path),
        ema=ema,
        fresh_head=fresh_head,
        resize=resize,
    )


def load_pretrained(
    model: nn.Module,
    *,
    ema: bool | None = None,
    fresh_head: bool = False,
    resize: bool = False,
    download: bool = True,
) -> LoadedWeights:
    """Load the published weights of ``model``: from the package, the user's cache, or by download.

    Args:
        model, ema, fresh_head, resize: as for :func:`load_weights`.
        download: whether the weights may be downloaded where this machine does not have them.

    Raises:
        DownloadError: there is no network, or the file fails its check.
        WeightsError: as :func:`load_weights`, or nothing is published for this model, or the weights would
            have to be downloaded and may not be.
    """
    spec = cast(Classifier, model).spec
    options: dict[str, Any] = {"fresh_head": fresh_head, "resize": resize}
    if spec.built_with_weights:
        return LoadedWeights(AS_BUILT)
    if spec.published_state is not None:
        return _assign(model, spec.published_state(), Path(spec.name), ema=None, **options)
    if spec.pretrained is None:
        raise WeightsError(
            f"no weights are published for {spec.name}",
            remedy="give --weights PATH or --weights random",
        )
    if spec.pretrained.resource:
        shipped = resources.files("cmt_edge.cmt") / "data" / spec.pretrained.resource
        with resources.as_file(shipped) as path:
            return load_weights(model, path, ema=ema, **options)
    from .download import fetch, is_kept

    if not download and not is_kept(spec.pretrained):
        raise WeightsError(
            f"the published weights of {spec.name} are not in the cache, and nothing is downloaded unasked",
            remedy="name the file: --weights PATH; or download it:"
            f" {name_program('export')} --model {spec.name} --weights pretrained",
        )
    return load_weights(
        model,
        fetch(spec.pretrained),
        ema=ema,
        **options,
    )


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


def compute_weights_fingerprint(model: nn.Module) -> str:
    """SHA-256, in hex, over name, dtype, shape and value of all parameters and buffers.

    It does not depend on the file or container that the weights came from.
    """
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_view_as_bytes(tensor))
    return digest.hexdigest()


def _view_as_bytes(tensor: Tensor) -> bytes:
    """The values of ``tensor`` as they lie in memory, row by row; NumPy lacks some of torch's types."""
    values = tensor.detach().cpu().resolve_conj().resolve_neg()
    plain = values.contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes()


def _assign(
    model: nn.Module,
    content: Any,
    source: Path,
    *,
    said: Mapping[str, Any] | None = None,
    ema: bool | None,
    fresh_head: bool,
    resize: bool,
) -> LoadedWeights:
    """Copy the values of a checkpoint's ``content`` into ``model`` after every check has passed.

    ``said`` is what stands beside the tensors in a file of tensors alone, such as names of classes.
    """
    spec, target = cast(Classifier, model).spec, model.state_dict()
    _require_no_hidden_layers(content, source)
    chosen = _choose_entry(content, source, spec, target, ema)
    ours = _settle(chosen.state, model, target)
    resized: list[str] = []
    if resize and spec.resize is not None:
        ours, resized = spec.resize(model, ours)
    fresh = _find_fresh_keys(spec, target, ours) if fresh_head else []
    ours.update({key: target[key] for key in fresh})
    if mismatch := _compare(model, target, ours, chosen.beside):
        beside = f"the file holds: {describe_keys(content)}; {describe_nearest_entry(chosen)}"
        raise _make_misfit_error(spec, mismatch, target, ours, source, beside)
    model.load_state_dict(ours)
    found = _find_names(said or content, model, fresh)
    return LoadedWeights(
        source.name,
        chosen.averaged,
        tuple(fresh),
        tuple(resized),
        found.names,
        chosen.entry,
        found.fault,
        chosen.left_out,
        _list_unread(content),
    )


def _find_names(content: Any, model: nn.Module, fresh: list[str]) -> ClassNames:
    """The names of the classes; a new head's are not those that the file names."""
    if fresh:
        return ClassNames()
    return find_class_names(content, cast(Classifier, model).num_classes)


def _choose_entry(
    content: Any,
    source: Path,
    spec: ModelSpec,
    target: StateDict,
    ema: bool | None,
) -> WeightsCandidate:
    """The entry of a checkpoint that holds the model.

    Raises:
        WeightsError: there is none, or more than one.
    """
    try:
        return _choose(content, source, spec, target, ema)
    except Undecided as exc:
        raise WeightsError(
            exc.what,
            where=source,
            why=exc.reason,
            remedy=exc.remedy,
        ) from None


def _list_unread(content: Any) -> tuple[str, ...]:
    """The names of the objects whose code was not run."""
    return tuple(sorted({stranger.title for _, stranger in find_strangers(content)}))


def _require_no_hidden_layers(content: Any, source: Path) -> None:
    """Refuse a file with an object of another program's class that holds layers which stand nowhere else in
    it: they may be the weights that the user means, and only the class itself can tell."""
    for way, title in find_hidden_layers(content):
        entry = ".".join(way)
        raise make_refusal(
            source,
            f"{entry} is an object of the class {title} and holds layers, which only its own code can name",
        )


def _make_misfit_error(
    spec: ModelSpec,
    mismatch: _Mismatch,
    target: StateDict,
    ours: StateDict,
    source: Path,
    beside: str,
) -> WeightsError:
    """The error for a checkpoint whose tensors are not the model's; ``beside`` is what its file holds."""
    why = mismatch.describe(target, ours)
    if mismatch.missing or mismatch.unexpected:
        why += f"\n       {beside}"
    return WeightsError(
        f"does not fit {spec.name}",
        where=source.name,
        why=why,
        remedy=_describe_remedy(spec, mismatch, ours),
    )


def _choose(
    content: Any,
    source: Path,
    spec: ModelSpec,
    target: StateDict,
    ema: bool | None,
) -> WeightsCandidate:
    candidates = find_candidates(content, spec, target)
    hidden = next(find_strangers(content), None)
    if hidden and not candidates:
        way, stranger = hidden
        raise make_refusal(
            source,
            f"it holds no state dict, and {'.'.join(way)} is an object of the class {stranger.title}",
        )
    if not candidates:
        raise WeightsError(
            "holds no state dict of tensors",
            where=source,
            why=f"the file holds: {describe_keys(content)}",
            remedy=SAVE_REMEDY,
        )
    chosen = choose_candidate(candidates, ema)
    nameless = find_nameless_average(content)
    if nameless and ema is None and not chosen.averaged:
        raise Undecided(
            f"has averaged weights in a list without names ({'.'.join(nameless)}), which are not read",
            None,
            f"--no-ema takes the others ({chosen.entry}); or save the averaged ones by name, after"
            " ema.copy_to(model.parameters()): torch.save(model.state_dict(), NEW)",
        )
    return chosen


def _settle(state: StateDict, model: nn.Module, target: StateDict) -> StateDict:
    """``state`` without buffers that the model makes itself, and with counters that only training reads."""
    made = dict(model.named_buffers())
    ours = {
        key: value
        for key, value in state.items()
        if key in target or not (key in made and _are_equal(value, made[key]))
    }
    for key in target:
        counts = key.endswith(BATCHES) and key.replace(BATCHES, "running_var") in ours
        if counts and (key not in ours or _is_other_counter(ours[key])):
            ours[key] = target[key]
    return ours


def _is_other_counter(value: Tensor) -> bool:
    """Whether a counter is a real number, or a list of one element."""
    return value.is_floating_point() or tuple(value.shape) == (1,)


def _are_equal(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    return torch.equal(first.to(second.dtype), second.cpu())


def _find_fresh_keys(spec: ModelSpec, target: StateDict, ours: StateDict) -> list[str]:
    """Keys of the classifier that the checkpoint lacks or has in another shape."""
    known = [key for key in spec.head_keys if key in target]
    return [key for key in known if key not in ours or ours[key].shape != target[key].shape]


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


def _compare(
    model: nn.Module,
    target: StateDict,
    ours: StateDict,
    beside: tuple[str, ...],
) -> _Mismatch:
    shared = [key for key in target if key in ours]
    floating = [key for key in shared if ours[key].is_floating_point()]
    fitting = [key for key in floating if ours[key].shape == target[key].shape]
    masks = {key for key, _ in model.named_buffers()}
    return _Mismatch(
        missing=[key for key in target if key not in ours],
        unexpected=[
            *(key for key in ours if key not in target),
            *beside,
        ],
        wrong_shape=[key for key in shared if ours[key].shape != target[key].shape],
        wrong_type=[
            key for key in shared if ours[key].is_floating_point() != target[key].is_floating_point()
        ],
        not_finite=[key for key in fitting if not _is_finite(ours[key], target[key], key in masks)],
    )


def _is_finite(value: Tensor, made: Tensor, is_buffer: bool) -> bool:
    """Whether ``value`` is finite in the model's type, or infinite on purpose.

    A mask of attention is: a buffer that the model itself makes with the same infinities, or one of 0 and
    -inf alone.
    """
    cast_value = value.to(made.dtype).float()
    finite = cast_value.isfinite()
    if bool(finite.all()):
        return True
    if not is_buffer:
        return False
    as_made = finite | (cast_value == made.float().cpu())
    is_mask = (value == 0) | (value == float("-inf"))
    return bool(as_made.all()) or bool(is_mask.all())


def _describe_remedy(spec: ModelSpec, mismatch: _Mismatch, ours: StateDict) -> str:
    if mismatch.not_finite:
        return "the training diverged or the file is damaged: use an earlier checkpoint"
    shapes = mismatch.wrong_shape
    head = [key for key in shapes if key in spec.head_keys]
    if shapes and not mismatch.missing and not mismatch.unexpected:
        if len(head) == len(shapes) and ours[head[0]].ndim:
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
