"""Traced graphs of earlier exports, which the next export of the same model and weights uses again.

Tracing is the longest step of an export without calibration, and its result is the same whatever the
precision and the batch size. A kept graph is used only if this machine sealed it
(:mod:`cmt_edge.deploy.sealing`) under a key of everything that it depends on, and like a new one it is
compared with the PyTorch model before the next step may start.

Only models of the registry are kept: their answers depend on their names, sizes and weights, and on code
whose hash is in the key. What the code of other models depends on cannot be told.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import onnx
import onnx_ir
import torch
from torch import nn
from torch.nn.modules import module as torch_module

from cmt_edge import calib, cmt
from cmt_edge.cmt.spec import LOADED
from cmt_edge.deploy.cache import compute_digest
from cmt_edge.deploy.errors import OutputError
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.sealing import SealedCache

FOLDER = "traced"
"""Name of the folder in the cache."""
KEEP = 20
"""The number of traced graphs that stay, those that were used last."""
MOST_BYTES = 2 << 30
"""The total size in bytes of the traced graphs that stay."""
LARGEST = 1 << 30
"""A model with more bytes of weights is not kept."""
SOURCES = tuple(
    Path(str(room)).resolve() for room in (cmt.__path__[0], calib.__path__[0], Path(__file__).parent)
)
"""Folders of the code that a graph is made by."""
SHOWN = ("typing", "typing_extensions", "warnings", "_py_warnings")
"""Modules of which PyTorch shows functions as its own, or whose decorators it uses, in some version of
Python."""
KNOWN = (
    *SOURCES,
    Path(str(torch.__file__)).resolve().parent,
    *(Path(str(spec.origin)).resolve() for spec in map(find_spec, SHOWN) if spec),
)
"""Folders and files that our functions and those of PyTorch come from."""
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
"""Attributes of a module that hold code of others; PyTorch's own module has the same for all modules."""
VERSIONS = (torch.__version__, onnx.__version__, onnx_ir.__version__)
"""Versions of packages that a traced graph depends on; that of onnxscript, which is slow to import, is read
otherwise."""


def trace_once(
    model: nn.Module,
    settings: Sequence[str | int],
    trace: Callable[[], onnx.ModelProto],
    check: Callable[[onnx.ModelProto], object],
) -> onnx.ModelProto:
    """What ``trace`` makes of ``model``, or the graph that it made of an equal one in an earlier export.

    Args:
        model: a model of the registry with its rewrites, in eval mode.
        settings: which one it is, and all else that the graph depends on.
        trace: makes the graph; what it raises is raised here.
        check: is called with a kept graph, which is made again where it raises.
    """

    def open_kept(content: bytes) -> onnx.ModelProto:
        graph = onnx.load_from_string(content)
        check(graph)
        return graph

    key = make_key(model, settings)
    if key is None:
        return trace()
    entries = SealedCache(find_cache_folder() / FOLDER, "traced graph", ".onnx", KEEP, MOST_BYTES)
    found = entries.get(
        key,
        decode=open_kept,
        make=trace,
        encode=_serialise,
        mode=0o600,  # the weights may not be for everybody
        waits=False,
    )
    return found.value


def _serialise(graph: onnx.ModelProto) -> bytes:
    """The content of an entry; raises :class:`OutputError` where that is too much for protobuf or memory."""
    try:
        content: bytes = graph.SerializeToString(deterministic=True)
    except Exception as exc:
        raise OutputError("the traced graph cannot be kept", why=exc) from exc
    return content


def make_key(model: nn.Module, settings: Sequence[str | int]) -> str | None:
    """Name of the entry: the digest of everything that the graph of a model depends on.

    ``None`` where that cannot be told, because code of others takes part or our own has changed on disk, and
    for more than :data:`LARGEST` bytes of weights.
    """
    try:
        if _is_changed(model) or sum(map(_count_bytes, _list_tensors(model).values())) > LARGEST:
            return None
        return compute_digest(
            {
                "settings": list(settings),
                "modules": repr(model),
                "tensors": {name: _describe(tensor) for name, tensor in _list_tensors(model).items()},
                "packages": [*map(str, VERSIONS), metadata.version("onnxscript")],
                "source": _hash_sources(),
            }
        )
    except Exception:  # whatever is strange about a model, it is traced
        return None


def _list_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, also those that a state dict leaves out."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _count_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _describe(tensor: torch.Tensor) -> list[str]:
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return [str(tensor.dtype), str(tensor.shape), hashlib.sha256(values.numpy().data).hexdigest()]


def _is_changed(model: nn.Module) -> bool:
    """Whether something of a model, or of PyTorch, is not the code that its packages came with: hooks,
    replaced functions, modules from elsewhere."""
    if any(vars(torch_module)[f"_global{hooks}"] for hooks in HOOKS):
        return True
    modules = list(model.modules())
    if any("forward" in vars(module) or any(vars(module)[hooks] for hooks in HOOKS) for module in modules):
        return True
    owners = {
        torch,
        torch.Tensor,
        nn.functional,
        *(base for module in modules for base in type(module).__mro__),
    }
    return not all(_is_known(function.__code__.co_filename) for function in _list_functions(owners))


def _list_functions(owners: set[object]) -> Iterator[FunctionType]:
    """The Python functions of modules and classes."""
    for owner in owners:
        yield from (value for value in vars(owner).values() if isinstance(value, FunctionType))


@cache
def _is_known(file: str) -> bool:
    """Whether the code of a file is this package's or PyTorch's."""
    place = Path(file).resolve()
    return any(place.is_relative_to(folder) for folder in KNOWN)


def _hash_sources() -> str:
    """SHA-256 of the code that a graph is made by; raises ``OSError`` where a file cannot be read, or is
    younger than the program."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted(folder.rglob("*.py")):
            if path.stat().st_mtime > LOADED:
                raise OSError(f"{path} was changed")
            digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
