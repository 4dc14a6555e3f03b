"""What models return, brought into one form: a float32 tensor ``(N, classes)``.

A user's model may return a dictionary, a tuple, halves, or maps of one pixel. :func:`settle_output` finds the
logits in that, where they are unmistakable, and gives the model a hook that returns them alone. It also gives
a model that changes its input in place a copy of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, MutableMapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from cmt_edge.deploy.errors import InputError

PROBED = 2
"""Number of images that a model is asked about."""
LOGITS_KEY = "logits"
"""Name of an entry that is taken whatever else there is."""
TELLING_WORDS = (
    "class",
    "cls",
    "logit",
    "out",
    "pred",
    "prob",
    "score",
)
"""Beside whole numbers, such as their argmax, logits have a name that contains one of these words."""
OTHER_WORDS = (
    "attention",
    "attn",
    "aux",
    "embed",
    "feat",
    "hidden",
    "index",
    "label",
    "loss",
    "mask",
    "pool",
    "token",
)
"""An entry beside others whose name contains one of these words is not logits."""
LOGIT_WORD = "logit"
"""An entry whose name contains this word may be logits, whatever else its name says of them."""
SIDE_WORDS = ("aux", "index", "loss", "mask")
"""Logits whose name contains one of these words are not those of the image's class."""
PASSING = (
    "__getitem__",
    "bfloat16",
    "clone",
    "contiguous",
    "detach",
    "double",
    "flatten",
    "float",
    "half",
    "reshape",
    "squeeze",
    "to",
    "type",
    "unsqueeze",
    "view",
)
"""Operations that change neither values nor their meaning, by PyTorch's names."""
SIGMOIDS = ("hardsigmoid", "sigmoid", "special_expit")
"""Operations that give each class a probability of its own, by PyTorch's names."""
LINEAR = (
    "__matmul__",
    "addmm",
    "baddbmm",
    "bmm",
    "conv2d",
    "einsum",
    "linear",
    "matmul",
)
"""Operations whose results have no bounds, by PyTorch's names."""
INDICES = ("argmax", "argmin", "argsort")
"""Operations that name classes and do not score them, by PyTorch's names."""
SORTS = ("sort", "topk", "msort")
"""Operations that lose which value belongs to which class, by PyTorch's names."""
EXTREMES = (
    "amax",
    "amin",
    "kthvalue",
    "logsumexp",
    "max",
    "median",
    "min",
    "mode",
)
"""Operations that make one value of many, by PyTorch's names."""
RETURN_TYPES = "torch.return_types"
"""The module of the named tuples that ``topk``, ``max`` and ``sort`` return."""
MAX_CALLS = 8
"""Number of linear operations, from the last one back, of which one is looked for that decides the output."""
HUGE = (-1e5, -1e3, 1e3, 1e5)
"""Factors at which logits are far from 0, and probabilities are still between 0 and 1."""
IN_UNIT = 1 + 5e-3
"""The largest value that counts as a probability; halves round a sum."""
SOFTMAXES = ("softmax",)
"""Operations that give the classes probabilities that sum to 1, by PyTorch's names."""
OUTPUT_REMEDY = "wrap the model so that it returns its logits alone, float32 (N, classes)"
"""What to do about an output that cannot be used."""

Key = str | int | None
"""Where the logits are in what a model returns: a name, a position, or ``None`` for all of it."""


def settle_output(model: nn.Module, example: Tensor, name: str) -> int:
    """Make ``model`` return float32 logits ``(N, classes)``, if it does not yet, and count the classes.

    Args:
        model: in eval mode; it gets a forward hook where its output has another form, and one that copies its
            input where it changes it in place.
        example: float32 ``(2, 3, S, S)``.
        name: of the model, for messages.

    Raises:
        InputError: the output is no logits, or it is not clear which part of it is. Whatever ``model`` raises
            comes out as it is.
    """
    seen = example.clone()
    given = _ask(model, seen)
    if not torch.equal(seen, example):
        model.register_forward_pre_hook(_copy_images)
        given = _ask(model, example)
    key = _find_logits(given, len(example), name)
    logits = _name_entries(given)[key] if key is not None else given
    if not logits.is_floating_point():
        raise InputError(
            f"{name} returns {_describe(logits)}, which are no logits",
            why="whole numbers are class indices or a mask, and a score of each class is needed",
            remedy=OUTPUT_REMEDY,
        )
    classes = _count(logits, len(example))
    if classes is None:
        raise InputError(
            f"{name} returns {_describe(logits)} for {len(example)} images, not logits"
            f" ({len(example)}, classes)",
            remedy=OUTPUT_REMEDY,
        )
    plain = key is None and logits.dtype == torch.float32 and logits.ndim == 2
    if not plain:
        model.register_forward_hook(partial(_take, key, classes))
    return classes


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation of a model."""

    name: str = ""
    """PyTorch's name, for example ``"sigmoid"``; empty where it is not known."""

    input_shape: tuple[int, ...] = ()
    """Shape of the first tensor that it reads; empty where it reads none."""


def find_last_operation(model: nn.Module, example: Tensor) -> Operation:
    """The operation that gives the output its values."""
    trail = _Trail()
    with torch.inference_mode(), trail:
        output = model(example)
    return trail.find_maker(output)


class Probe:
    """Answers of ``model`` whose last linear operation gives a multiple of its result.

    Logits grow with it without bounds. What comes out of a sigmoid or softmax stays within its bounds, also
    where the values that the model gives by itself happen to lie within the same bounds.

    Args:
        model: in eval mode; it stays as it is.
        images: float32 ``(K, 3, S, S)``.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self._model = model
        self._images = images
        self._chosen: int | None = None
        self._calls = 0

    def answers(self, *factors: float) -> Tensor:
        """The finite answers, float32 ``(<= K * len(factors), classes)``."""
        if self._chosen is None:
            self._chosen = self._find_call()
        rows = torch.cat([self._scale(self._chosen, factor) for factor in factors])
        return rows[rows.isfinite().all(1)]

    def _find_call(self) -> int:
        """The last linear operation that changes the output, counted from 1; 0 where none does."""
        plain = self._scale(0, 1)
        last = self._calls
        for chosen in range(last, max(last - MAX_CALLS, 0), -1):
            scaled = (self._scale(chosen, factor) for factor in HUGE[1:3])
            if any(not torch.equal(plain, other) for other in scaled):
                return chosen
        return 0

    def _scale(self, chosen: int, factor: float) -> Tensor:
        """Without a linear operation, the images are scaled instead."""
        images = self._images if chosen else self._images * factor
        mode = _Scaling(chosen, factor)
        with torch.inference_mode(), mode:
            output: Tensor = self._model(images)
        self._calls = mode.calls
        return output.reshape(len(images), -1).float()


def is_one_probability(model: nn.Module, example: Tensor) -> bool:
    """Whether the single output of ``model`` is a probability and no logit: a sigmoid in any words.

    Args:
        model: in eval mode.
        example: float32 ``(K, 3, S, S)``.
    """
    operation = find_last_operation(model, example).name
    if operation in SIGMOIDS or operation in LINEAR:
        return operation in SIGMOIDS
    with torch.inference_mode():
        plain: Tensor = model(example)
    if not _is_in_unit_range(plain):
        return False
    answers = Probe(model, example).answers(*HUGE)
    return len(answers) > 0 and _is_in_unit_range(answers)


def _is_in_unit_range(values: Tensor) -> bool:
    return bool((values >= 0).all() and (values <= IN_UNIT).all())


class TwoLabels(nn.Module):
    """A binary classifier of one output as one of two classes.

    A logit ``z`` becomes the logits ``(0, z)``: their softmax is ``(1 - sigmoid(z), sigmoid(z))``. An output
    ``p`` that is a sigmoid already becomes the probabilities ``(1 - p, p)``. So ``(N, 1)`` becomes
    ``(N, 2)``, and the second class is the positive one.
    """

    def __init__(self, model: nn.Module, probability: bool) -> None:
        super().__init__()
        self.model = model
        self.probability = probability
        self.img_size = getattr(model, "img_size", None)

    def forward(self, x: Tensor) -> Tensor:
        positive = self.model(x)
        negative = 1 - positive if self.probability else 0 * positive
        return torch.cat([negative, positive], 1)


def _ask(model: nn.Module, example: Tensor) -> Any:
    """What ``model`` returns. A model of halves or doubles that refuses float32 images becomes a float32 one,
    whose weights have the same values."""
    try:
        with torch.inference_mode():
            return model(example)
    except Exception:
        kinds = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if not kinds - {torch.float32}:
            raise
    model.float()
    with torch.inference_mode():
        return model(example)


def _name_entries(given: Any) -> dict[str | int, Any]:
    """The parts of what a model returned, by name where they have names; empty if there are none."""
    if isinstance(given, Mapping):
        return {str(key): value for key, value in given.items()}
    if hasattr(given, "_fields"):
        return dict(zip(given._fields, given, strict=True))
    if isinstance(given, (tuple, list)):
        return dict(enumerate(given))
    if dataclasses.is_dataclass(given):
        return {field.name: getattr(given, field.name) for field in dataclasses.fields(given)}
    return {}


def _find_logits(given: Any, count: int, name: str) -> Key:
    """Where the logits are; raises :class:`InputError` where that is not clear."""
    if isinstance(given, Tensor):
        return None
    entries = _name_entries(given)
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if LOGITS_KEY in tensors:
        return LOGITS_KEY
    _require_no_ranking(given, tensors, count, name)
    alone = len(entries) == 1
    able = [key for key, value in tensors.items() if _may_be_logits(key, value, count, alone)]
    if len(able) == 1 and _is_unmistakable(able[0], tensors):
        return able[0]
    shown = ", ".join(f"{key}: {_describe(value)}" for key, value in entries.items())
    raise InputError(
        f"{name} returns a {type(given).__name__}, and it is not clear which part of it is the logits",
        why=f"its parts are {shown}" if shown else None,
        remedy=f"{OUTPUT_REMEDY}; of several parts, the one named 'logits' is taken",
    )


def _require_no_ranking(
    given: Any,
    tensors: Mapping[str | int, Tensor],
    count: int,
    name: str,
) -> None:
    """Raise :class:`InputError` for values with their indices, as ``topk``, ``max`` and ``sort`` return
    them."""
    what = ""
    if type(given).__module__ == RETURN_TYPES:
        what = f"the values and indices of torch.{type(given).__name__}"
    scored = {_count(value, count) for value in tensors.values() if value.is_floating_point()}
    numbered = {_count(value, count) for value in tensors.values() if _is_whole(value)}
    if not what and (scored & numbered) - {None}:
        shown = ", ".join(f"{key}: {_describe(value)}" for key, value in tensors.items())
        what = f"values and indices of one shape ({shown}), as topk, max and sort do"
    if what:
        raise InputError(
            f"{name} returns {what}, which are no logits",
            why="the best values alone do not say which class each of them belongs to",
            remedy=OUTPUT_REMEDY,
        )


def _is_whole(value: Tensor) -> bool:
    """Whether these are whole numbers, such as class indices; a mask is none."""
    is_inexact = value.is_floating_point() or value.is_complex()
    return not is_inexact and value.dtype != torch.bool


def _is_unmistakable(key: str | int, tensors: Mapping[str | int, Tensor]) -> bool:
    """Whether the only part that can be logits is taken for them.

    Beside whole numbers its name has to say so. In a tuple, which has no names, the numbers have to be its
    argmax.
    """
    numbers = [value for value in tensors.values() if _is_whole(value)]
    if not numbers:
        return True
    if isinstance(key, int):
        best = tensors[key].flatten(1).argmax(1)
        return all(torch.equal(value.reshape(-1).long(), best) for value in numbers)
    return any(word in key.lower() for word in TELLING_WORDS)


def _may_be_logits(
    key: str | int,
    value: Tensor,
    count: int,
    alone: bool,
) -> bool:
    """Whether one part of an output, ``alone`` or among others, is taken for the logits."""
    if not value.is_floating_point() or _count(value, count) is None:
        return False
    return alone or not _is_named_otherwise(str(key).lower())


def _is_named_otherwise(key: str) -> bool:
    """Whether the name of an entry says that it is something else than logits."""
    words = SIDE_WORDS if LOGIT_WORD in key else OTHER_WORDS
    return any(word in key for word in words)


def _count(logits: Tensor, count: int) -> int | None:
    """Number of classes of ``count`` images: ``(N, C)``, ``(N, C, 1, 1)``, or ``(N,)`` of one logit; ``None``
    for other shapes."""
    shape = tuple(logits.shape)
    if shape[:1] != (count,):
        return None
    if len(shape) == 1:
        return 1
    is_flat = all(size == 1 for size in shape[2:])
    return shape[1] if shape[1] > 0 and is_flat else None


def _describe(value: Any) -> str:
    """Type and shape of a part of an output."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def _copy_images(
    _module: nn.Module,
    arguments: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The forward pre-hook of :func:`settle_output`."""
    return tuple(value.clone() if isinstance(value, Tensor) else value for value in arguments)


def _take(
    key: Key,
    classes: int,
    _module: nn.Module,
    _arguments: object,
    output: Any,
) -> Tensor:
    """The forward hook of :func:`settle_output`."""
    logits: Tensor = output if key is None else _name_entries(output)[key]
    return logits.reshape(-1, classes).float()


class _Trail(TorchFunctionMode):
    """Remembers which operation gave each tensor its values."""

    def __init__(self) -> None:
        super().__init__()
        # Weak, because the activations of a large model would take gigabytes.
        self._made: MutableMapping[Tensor, Operation] = WeakTensorKeyDictionary()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        called = getattr(func, "__name__", "")
        read = args[0] if args and isinstance(args[0], Tensor) else None
        shape = () if read is None else tuple(read.shape)
        made = Operation(called.removesuffix("_"), shape)
        if isinstance(output, Tensor):
            if called in PASSING and read is not None:
                made = self.find_maker(read)
            self._made[output] = made
        elif isinstance(output, tuple):  # values and indices
            for part in output:
                if isinstance(part, Tensor):
                    self._made[part] = made
        return output

    def find_maker(self, output: object) -> Operation:
        """The operation that made a tensor."""
        return self._made.get(output, Operation()) if isinstance(output, Tensor) else Operation()


class _Scaling(TorchFunctionMode):
    """Multiplies the result of one linear operation, the ``chosen`` one counted from 1."""

    def __init__(self, chosen: int, factor: float) -> None:
        super().__init__()
        self._chosen = chosen
        self._factor = factor
        self.calls = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") not in LINEAR or not isinstance(output, Tensor):
            return output
        self.calls += 1
        return output * self._factor if self.calls == self._chosen else output
