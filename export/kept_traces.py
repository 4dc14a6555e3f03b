"""Traced graphs of earlier exports, which the next export of the same model and weights uses again.

Tracing is the longest step of an export without calibration, and its result is the same whatever the
precision and the batch size. A kept graph is used only if this machine sealed it
(:mod:`cmt_edge.deploy.sealing`) under a key of everything that it depends on, and like a new one it is
compared with the PyTorch model before the next step may start.

Nothing is kept of a model with modules that are neither this package's nor PyTorch's own: what their code
depends on cannot be told.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx
import torch
from torch import nn

from cmt_edge import cmt
from cmt_edge.calib import graph as onnx_graph
from cmt_edge.cmt.spec import ModelSpec
from cmt_edge.deploy.cache import compute_digest
from cmt_edge.deploy.errors import OutputError
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.sealing import SealedCache

from . import to_onnx

FOLDER = "traced"
"""Name of the folder in the cache."""
KEEP = 20
"""The number of traced graphs that stay, those that were used last."""
MOST_BYTES = 2 << 30
"""The total size in bytes of the traced graphs that stay."""
LARGEST = 1 << 30
"""A model with more bytes of weights is not kept."""
KNOWN = ("cmt_edge.cmt.", "torch.nn.modules.")
"""Starts of the names of Python modules whose classes and functions are told by their names, because the key
has their version or their source."""
TRACERS = ("torch", "onnx", "onnx-ir", "onnxscript")
"""Packages whose versions a traced graph depends on."""


def trace_once(
    model: nn.Module,
    settings: Sequence[str | int],
    trace: Callable[[], onnx.ModelProto],
    check: Callable[[onnx.ModelProto], object],
) -> onnx.ModelProto:
    """What ``trace`` makes of ``model``, or the graph that it made of an equal one in an earlier export.

    Args:
        model: in eval mode.
        settings: what else the graph depends on.
        trace: makes the graph; what it raises is raised here.
        check: is called with a kept graph, which is made again where it raises.
    """

    def open_kept(content: bytes) -> onnx.ModelProto:
        graph = onnx.load_from_string(content)
        check(graph)
        return graph

    modules = compute_modules_digest(model)
    if modules is None:
        return trace()
    key = {
        "modules": modules,
        "settings": list(settings),
        "packages": [f"{name} {metadata.version(name)}" for name in TRACERS],
        "source": _hash_sources(),
    }
    cache = SealedCache(find_cache_folder() / FOLDER, "traced graph", ".onnx", KEEP, MOST_BYTES)
    found = cache.get(
        compute_digest(key),
        decode=open_kept,
        make=trace,
        encode=_serialise,
        mode=0o600,  # the weights may not be for everybody
    )
    return found.value


def _serialise(graph: onnx.ModelProto) -> bytes:
    """The content of an entry; raises :class:`OutputError` where that is too much for protobuf."""
    try:
        content: bytes = graph.SerializeToString(deterministic=True)
    except ValueError as exc:
        raise OutputError("the traced graph cannot be kept", why=exc) from exc
    return content


def compute_modules_digest(model: nn.Module) -> str | None:
    """SHA-256, in hex, of all that the answers of ``model`` depend on besides the code of its classes: their
    names, the attributes of all modules, and all tensors.

    ``None`` where a part cannot be told, and for more than :data:`LARGEST` bytes of weights.
    """
    if sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())) > LARGEST:
        return None
    modules = [
        (name, type(module), vars(module), [child for child, _ in module.named_children()])
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    try:
        text = json.dumps(modules, default=_describe)
    except (TypeError, ValueError):
        return None
    return hashlib.sha256(text.encode()).hexdigest()


def _describe(value: object) -> Any:
    """What JSON has no form for, in a form that it has; raises ``TypeError`` for what cannot be told."""
    described: Any
    match value:
        case torch.Tensor():
            described = _describe_tensor(value)
        case nn.Module():  # in its parent; its own attributes stand beside its name
            described = _name(type(value))
        case type() | FunctionType():
            described = _name(value)
        case set():
            described = sorted(map(repr, value))
        case ModelSpec():  # no module computes with it; what it has rewritten is told as modules
            described = value.name
        case _ if dataclasses.is_dataclass(value):
            described = [_name(type(value)), vars(value)]
        case _:
            raise TypeError(type(value))
    return described


def _name(value: type | FunctionType) -> str:
    """The full name of a class or function that is defined in :data:`KNOWN`."""
    if not str(value.__module__).startswith(KNOWN) or "<" in value.__qualname__:
        raise TypeError(value)
    return f"{value.__module__}.{value.__qualname__}"


def _describe_tensor(tensor: torch.Tensor) -> list[Any]:
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise TypeError(tensor.layout)
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(values.numpy().data).hexdigest()]


def _hash_sources() -> str:
    """SHA-256 of the code that a graph is made by."""
    digest = hashlib.sha256()
    package = Path(str(cmt.__file__)).parent
    others = [Path(str(module.__file__)) for module in (to_onnx, onnx_graph)]
    for path in (*sorted(package.rglob("*.py")), *others):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
