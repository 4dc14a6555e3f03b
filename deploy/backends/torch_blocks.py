"""The blocks of a PyTorch model, by the names of its modules, and what each of them returns for an image."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

ROWS = (nn.ModuleList, nn.Sequential)
"""What holds the blocks of a model as its numbered children."""


def list_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks of ``model``, in the order in which they are defined.

    A model is taken apart down to the innermost modules that hold no row of numbered modules, each of which
    consists of others again: ``stages.1.blocks.0`` and the ``embed`` and ``norm`` beside that row. What the
    module around a row returns comes after the row. Modules without parameters are left out.
    """
    children = ((name, child) for name, child in model.named_children() if _has_parameters(child))
    return [path for name, child in children for path in _take_apart(child, name)]


def _take_apart(module: nn.Module, path: str) -> Iterator[str]:
    if not any(map(_is_row, module.modules())):
        yield path
        return
    for name, child in module.named_children():
        if _has_parameters(child):
            yield from _take_apart(child, f"{path}.{name}")
    if type(module) not in ROWS:
        yield path


def _is_row(module: nn.Module) -> bool:
    """Whether it holds numbered modules that consist of others."""
    if not isinstance(module, ROWS):
        return False
    return any(name.isdigit() and _is_composite(child) for name, child in module.named_children())


def _is_composite(module: nn.Module) -> bool:
    return any(map(_has_parameters, module.children()))


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def find_last_leaf(block: nn.Module) -> str | None:
    """Path inside ``block`` of the last module that has parameters and no children; ``None`` where the block
    has no modules of its own."""
    leaves = [
        name
        for name, module in block.named_modules()
        if name and not _is_composite(module) and _has_parameters(module)
    ]
    return leaves[-1] if leaves else None


@dataclass(frozen=True)
class Seen:
    """What went into and out of modules during one call of a model.

    Attributes:
        outputs: path of a module -> what it returned at each of its calls; in the order in which the modules
            were done.
        inputs: path of a module -> what it read at each of its calls.
    """

    outputs: dict[str, list[Any]]
    inputs: dict[str, list[Any]]

    def find_output(self, path: str) -> np.ndarray | str:
        """What a module returned, or why that is not one tensor."""
        return _take_tensor(self.outputs.get(path, []))

    def find_input(self, path: str) -> np.ndarray | str:
        """What a module read, or why that is not one tensor."""
        return _take_tensor(self.inputs.get(path, []))


def _take_tensor(calls: Sequence[Any]) -> np.ndarray | str:
    if len(calls) != 1:
        return "the model does not call it" if not calls else f"the model calls it {len(calls)} times"
    given = calls[0]
    if isinstance(given, Tensor):
        given = (given,)
    tensors = [part for part in given if isinstance(part, Tensor)] if isinstance(given, (tuple, list)) else []
    if len(tensors) != 1:
        return "it does not return one tensor"
    if not tensors[0].is_floating_point():
        return "it does not return floating-point numbers"
    return tensors[0].numpy()


def watch(
    model: nn.Module,
    batch: np.ndarray,
    outputs: Collection[str],
    inputs: Collection[str] = (),
    root: nn.Module | None = None,
) -> tuple[list[np.ndarray], Seen]:
    """Call ``model`` and watch modules.

    Args:
        model: in eval mode.
        batch: ``(N, 3, S, S)``, of the type that the model computes in.
        outputs: paths of modules of which the results are kept.
        inputs: paths of modules of which the first argument is kept.
        root: the module in which the paths begin; ``model`` itself by default.

    Returns:
        The model's outputs, and what was seen.
    """
    modules = dict((root or model).named_modules(remove_duplicate=False))
    returned: defaultdict[str, list[Any]] = defaultdict(list)
    read: defaultdict[str, list[Any]] = defaultdict(list)
    hooks = [modules[path].register_forward_hook(partial(_keep_output, returned, path)) for path in outputs]
    hooks += [modules[path].register_forward_pre_hook(partial(_keep_input, read, path)) for path in inputs]
    try:
        with torch.inference_mode():
            given = model(torch.from_numpy(batch))
    finally:
        for hook in hooks:
            hook.remove()
    answers = (given,) if isinstance(given, Tensor) else given
    return [answer.numpy() for answer in answers], Seen(dict(returned), dict(read))


def _keep_output(kept: dict[str, list[Any]], path: str, _module: nn.Module, _args: Any, result: Any) -> None:
    kept[path].append(_copy(result))


def _keep_input(kept: dict[str, list[Any]], path: str, _module: nn.Module, args: Any) -> None:
    kept[path].append(_copy(args[0]) if args else None)


def _copy(value: Any) -> Any:
    """``value`` as it is now: a later operation may change a tensor in place."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, (tuple, list)):
        return tuple(map(_copy, value))
    return value
