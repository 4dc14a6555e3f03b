"""A whole model repository: which runtime serves each bundle, and the folder, written whole or not at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..backends import RUNTIME_OF_FORMAT
from ..backends.overflow import multiplies_matrices_slowly, saturates_in_openvino
from ..bundle import Bundle
from ..errors import InputError, OutputError
from ..files import OUTPUT_FLAG, put_folder, sync_tree, writing
from ..locks import scratch_folder
from . import ovms, triton
from .served import Options, Served, choose_max_batch, name_model

SERVERS = ("triton", "ovms")
"""Servers that a repository can be made for: Triton, and OpenVINO Model Server."""

TAKEN: dict[str, dict[str, tuple[str, ...]]] = {
    "triton": {
        "onnx": ("onnxruntime", "openvino"),
        "openvino": ("openvino", "onnxruntime"),
        "trt": ("tensorrt",),
    },
    "ovms": {"onnx": ("openvino",), "openvino": ("openvino",)},
}
"""Server -> format of a bundle -> the runtimes in the server that take its graph, the default first."""


@dataclass(frozen=True)
class Repository:
    """A folder that was written.

    Attributes:
        path: of the folder.
        server: for which it is.
        models: in the order of the bundles.
    """

    path: Path
    server: str
    models: tuple[Served, ...]


def make_repository(bundles: Sequence[Bundle], server: str, target: Path, options: Options) -> Repository:
    """Write a model repository.

    Args:
        bundles: whose models it offers.
        server: one of :data:`SERVERS`.
        target: the folder, which must not exist, or be empty.
        options: how the models are served.

    Raises:
        InputError: a server does not take a bundle, or would compute something else than it says.
        OutputError: ``target`` is occupied or cannot be written.
        RuntimeMissingError: what writes a graph's form is not installed.
    """
    models = _choose_models(bundles, server, options)
    _require_free(target)
    parent = target.absolute().parent
    with writing(parent, OUTPUT_FLAG):
        parent.mkdir(parents=True, exist_ok=True)
    with writing(target, OUTPUT_FLAG), scratch_folder(parent, f".{target.name}.") as scratch:
        root = scratch / target.name
        root.mkdir()
        for model in models:
            (triton if server == "triton" else ovms).write_model(model, options, root)
        if server == "ovms":
            ovms.write_config(models, options, root)
        for model in models:
            model.bundle.require_unchanged()
        sync_tree(root)
        _require_free(target)
        put_folder(root, target.absolute())
    return Repository(target, server, tuple(models))


def _choose_models(bundles: Sequence[Bundle], server: str, options: Options) -> list[Served]:
    """The models of a repository, each checked."""
    models = [_choose_model(bundle, server, options) for bundle in bundles]
    names = Counter(model.name.lower() for model in models)  # some file systems know no upper case
    for model in models:
        if names[model.name.lower()] > 1:
            raise InputError(
                f"two bundles are called {model.name}, and a server needs a name for each model",
                where=model.bundle.path,
                remedy="rename one of the folders",
            )
    return models


def _choose_model(bundle: Bundle, server: str, options: Options) -> Served:
    manifest = bundle.manifest
    taken = TAKEN[server].get(manifest.format, ())
    runtime = options.runtime or (taken[0] if taken else RUNTIME_OF_FORMAT[manifest.format])
    if runtime not in taken:
        raise _make_refusal(bundle, server, runtime, taken)
    if manifest.precision == "fp16" and runtime != "tensorrt":
        raise InputError(
            "is an fp16 bundle, which no processor serves",
            where=bundle.path,
            remedy="export an fp32, bf16 or int8 bundle; or --format trt, and build it where Triton runs",
        )
    max_batch = choose_max_batch(bundle, options.max_batch) if server == "triton" else 0
    model = Served(name_model(bundle), bundle, runtime, max_batch)
    notes = (triton if server == "triton" else ovms).check(model, options)
    return replace(model, notes=(*notes, *_write_saturation_note(model), *_write_linears_note(model)))


def _write_saturation_note(model: Served) -> tuple[str, ...]:
    """What becomes of int8 on an x86 server without VNNI, where our Predictor sees to it by itself."""
    manifest = model.bundle.manifest
    if manifest.precision != "int8" or model.runtime == "tensorrt" or manifest.fits_16_bits:
        return ()
    if model.runtime == "openvino" and saturates_in_openvino():
        return ("its int8 weights are rounded for processors without VNNI, such as this one",)
    writing_there = ": write the repository on such a server" if model.runtime == "openvino" else ""
    return (f"sums of int8 products can saturate on an x86 server without VNNI{writing_there}",)


def _write_linears_note(model: Served) -> tuple[str, ...]:
    """What becomes of int8 linears on a server like this machine; our Predictor runs them otherwise."""
    if model.bundle.manifest.precision != "int8" or model.runtime != "openvino":
        return ()
    if not multiplies_matrices_slowly():
        return ()
    return (
        "int8 linears, if it has any, are slower than float32 on a server with neither VNNI nor AVX-512, such"
        " as this machine: export it with --keep-float @linears for such a server",
    )


def _make_refusal(bundle: Bundle, server: str, runtime: str, taken: Sequence[str]) -> InputError:
    """The error for a bundle whose graph the server does not run that way."""
    kind = bundle.manifest.format
    if not taken:
        formats = " or ".join(f"--format {name}" for name in TAKEN[server])
        remedy = f"export it with {formats}"
    else:
        remedy = f"use --runtime {' or '.join(taken)}"
    return InputError(
        f"is a bundle for {kind}, which {server} does not run with {runtime}",
        where=bundle.path,
        remedy=remedy,
    )


def _require_free(target: Path) -> None:
    """Raise :class:`OutputError` unless nothing, or an empty folder, is there."""
    try:
        is_free = not target.is_symlink() and (not target.exists() or not any(target.iterdir()))
    except OSError:  # a file, for instance
        is_free = False
    if not is_free:
        raise OutputError(
            "already exists, and a model repository is not written over anything",
            where=target,
            remedy="name a new folder, or delete that one first",
        )
