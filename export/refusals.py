"""What torch.onnx refuses in a user's model, said with the operator and the line of the user's code."""

from __future__ import annotations

import contextlib
import itertools
import re
import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cmt_edge.deploy.errors import InputError, StepError

UNKNOWN_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
"""How torch.onnx says that ONNX lacks an operator."""

DATA_DEPENDENT = re.compile(r"data-dependent", re.IGNORECASE)
"""How torch.export says that the values of an image decide what the code does next."""

TO_NUMPY = re.compile(r"\.numpy\(\) is not supported")
"""How torch.export says that the code leaves PyTorch for NumPy."""

GENERATOR = re.compile(r"for argument 'generator' but instead found")
"""How torch.onnx says that the code draws numbers from a generator of its own."""

BFLOAT16 = re.compile(r"bfloat16")
"""How ONNX names a type that most of its operators do not take."""

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(\S.*)')
"""One line of a stack trace."""

TORCH = str(Path(torch.__file__).parent)
"""The folder of torch, whose own code is not the user's."""

STANDARD_LIBRARY = sysconfig.get_path("stdlib")
"""The folder of Python's own code; that of packages may lie in it."""

PACKAGES = sysconfig.get_path("purelib")
"""The folder of installed packages."""

OWN = Path(__file__).parent.parent
"""The folder of this package, whose code calls the user's."""

EXPORTERS = ("onnxscript", "onnx_ir")
"""Packages of the exporter, whose code is not the user's either."""

GENERATOR_REMEDY = (
    "draw the numbers once in __init__ and keep them in a buffer: register_buffer('noise', torch.randn(...))"
)
"""The remedy for numbers that are drawn in forward."""

BFLOAT16_REMEDY = (
    "remove torch.autocast and .bfloat16() from forward, and ask for the type with --precision bf16 instead"
)
"""The remedy for a model that computes in bfloat16 by itself."""

OPERATOR_REMEDY = (
    "use operations that ONNX has; for an adaptive pool: an output size that divides the size of the map, or"
    " a pool with a fixed kernel"
)
"""The remedy for an operator that ONNX lacks."""

BRANCH_REMEDY = (
    "compute both cases and choose with torch.where; a number that is no result of the image may be a Python"
    " number made in __init__"
)
"""The remedy for code that asks for values of an image."""


TAKING = (
    "__bool__",
    "__float__",
    "__index__",
    "__int__",
    "item",
    "numpy",
    "tolist",
)
"""Methods of a tensor that give Python its values."""

COUNTING = ("__len__", "unbind")
"""Methods of a tensor that give Python its length, or each of its rows, as a loop does."""

SAME_SHARE = 1e-3
"""Difference of answers to an image alone and in a batch, as a share of the largest output, that the kernels
of libraries explain."""


@contextlib.contextmanager
def explaining(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Turn a refusal of torch.onnx that is the model's doing into an error that names the user's code.

    Raises:
        InputError: the model uses an operator that ONNX lacks, or branches on values of the image.
    """
    try:
        yield
    except Exception as exc:
        if error := _explain(exc, model, example):
            raise error from exc
        raise


@contextlib.contextmanager
def explaining_types(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Turn a graph that ONNX refuses for its bfloat16 into an error that names the user's code.

    Raises:
        InputError: the model computes in bfloat16 by itself.
    """
    try:
        yield
    except StepError as exc:
        if not BFLOAT16.search(_join_messages(exc)):
            raise
        raise InputError(
            "the model computes in bfloat16 in its forward, which ONNX's operators do not take",
            where=_find_bfloat16_line(model, example),
            why=exc.why,
            remedy=BFLOAT16_REMEDY,
        ) from exc


def _join_messages(exc: BaseException | None) -> str:
    """The messages of an exception and of its causes."""
    parts = []
    while exc is not None:
        parts.append(str(exc))
        exc = exc.__cause__
    return "\n".join(parts)


def _explain(
    exc: BaseException,
    model: nn.Module,
    example: Tensor,
) -> InputError | None:
    text = _join_messages(exc)
    if found := UNKNOWN_OPERATOR.search(text):
        operator = found[1]
        return InputError(
            f"ONNX has no operator for {operator}",
            where=_find_line_of(operator, model, example),
            remedy=OPERATOR_REMEDY,
        )
    if DATA_DEPENDENT.search(text):
        _, _, call = text.partition("The following call raised this error:")
        return InputError(
            "the model decides by the values of the image what it does, which a graph cannot",
            where=_find_users_line(call) or _find_raising_line(exc),
            remedy=BRANCH_REMEDY,
        )
    if TO_NUMPY.search(text):
        return InputError(
            "the model computes with NumPy on values of the image, which a graph cannot hold",
            where=_find_raising_line(exc),
            remedy="use PyTorch's operations; choose between two cases with torch.where",
        )
    if GENERATOR.search(text):
        _, _, call = text.partition("Original traceback:")
        return InputError(
            "the model draws numbers from a torch.Generator in its forward, which a graph cannot hold",
            where=_find_users_line(call),
            remedy=GENERATOR_REMEDY,
        )
    return None


def _find_raising_line(exc: BaseException | None) -> str | None:
    """``file:line, in function: code`` of the user's innermost line that was running when torch raised
    ``exc`` or one of its causes."""
    found = None
    while exc is not None:
        inside = False
        for frame in traceback.extract_tb(exc.__traceback__):
            inside = inside or frame.filename.startswith(TORCH)
            if inside and _is_users(frame.filename):
                found = _format_frame(frame)
        exc = exc.__cause__
    return found


def _is_users(file: str) -> bool:
    """Whether this is no file of torch, of the exporter or of Python itself."""
    path = Path(file)
    if not path.is_absolute() or file.startswith(TORCH):
        return False
    if file.startswith(PACKAGES):
        return path.relative_to(PACKAGES).parts[0] not in EXPORTERS
    return not file.startswith(STANDARD_LIBRARY)


def _find_line_of(operator: str, model: nn.Module, example: Tensor) -> str | None:
    """The line that calls ``operator``, which torch.onnx does not tell but torch.export does."""
    try:
        graph = torch.export.export(model, (example,), strict=True).graph  # strict: with the innermost line
    except Exception:  # the line is an addition to a message; its absence is no error of its own
        return None
    for node in graph.nodes:
        if operator.replace("::", ".") in str(node.target):
            return _find_users_line(node.meta.get("stack_trace") or "")
    return None


def _find_bfloat16_line(model: nn.Module, example: Tensor) -> str | None:
    """The user's innermost line that is the first to make a bfloat16 tensor."""
    finder = _Bfloat16Line()
    with contextlib.suppress(Exception), torch.inference_mode(), finder:
        model(example)
    return finder.line


class _Bfloat16Line(TorchFunctionMode):
    """Keeps the user's line that is running when a bfloat16 tensor is made for the first time."""

    line: str | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.line is None and isinstance(output, Tensor) and output.dtype == torch.bfloat16:
            inside = _list_users_frames()
            if inside:
                self.line = _format_frame(inside[-1])
        return output


def find_counting_line(model: nn.Module, example: Tensor) -> str | None:
    """The user's first line that takes the number of images from a tensor of them: ``len(x)``, or a loop over
    ``x``; ``None`` where none does.

    Args:
        model: in eval mode.
        example: images, float32 ``(N, 3, S, S)``.
    """
    finder = _CountingLine(len(example))
    with contextlib.suppress(Exception), torch.inference_mode(), finder:
        model(example)
    return finder.line


class _CountingLine(TorchFunctionMode):
    """Keeps the user's line that is the first to count the rows of a tensor of ``count`` rows."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count
        self.line: str | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        called = getattr(func, "__name__", "")
        counts = called in COUNTING and args[1:] in ((), (0,))
        read = args[0] if args and isinstance(args[0], Tensor) else None
        of_batch = read is not None and read.shape[:1] == (self._count,)
        if self.line is None and counts and of_batch:
            inside = _list_users_frames()
            if inside:
                self.line = _format_frame(inside[-1])
        return func(*args, **(kwargs or {}))


def require_single_answers(
    model: nn.Module,
    batch: np.ndarray,
    outputs: Sequence[np.ndarray],
) -> None:
    """Refuse a model that takes Python numbers from its values and answers an image otherwise in a batch.

    A graph of one image takes these numbers from another image than the model did in the batch.

    Args:
        model: in eval mode.
        batch: images, float32 ``(K, 3, S, S)``.
        outputs: what ``model`` makes of ``batch``, ``(K, ...)`` each.

    Raises:
        InputError: with the user's line that takes the numbers.
    """
    images = torch.from_numpy(batch)
    line = _find_deciding_line(model, images)
    if line is None:
        return
    for index in range(len(batch)):
        with torch.inference_mode():
            found = model(images[index : index + 1])
        alone = found if isinstance(found, (list, tuple)) else [found]
        for mine, theirs in zip(alone, outputs, strict=True):
            if not _are_alike(mine.float().numpy(), theirs[index : index + 1]):
                raise InputError(
                    "the model takes a Python number from the values of one image and answers other images of"
                    " the batch with it",
                    where=line,
                    why="an image has another answer alone than in a batch",
                    remedy=BRANCH_REMEDY,
                )


def _are_alike(mine: np.ndarray, theirs: np.ndarray) -> bool:
    """Whether two outputs differ by no more than what kernels for other batch sizes do."""
    if mine.shape != theirs.shape:
        return False
    difference = np.abs(mine - theirs).max()
    scale = max(float(np.abs(theirs).max()), 1e-12)
    return bool(difference <= SAME_SHARE * scale)


def _find_deciding_line(model: nn.Module, images: Tensor) -> str | None:
    """The user's first line that takes other Python numbers from one image than from another."""
    first = _list_taken_values(model, images[:1])
    if not first:
        return None
    for index in range(1, len(images)):
        other = _list_taken_values(model, images[index : index + 1])
        for mine, theirs in itertools.zip_longest(first, other):
            if mine != theirs:
                return (mine or theirs)[0]
    return None


def _list_taken_values(
    model: nn.Module,
    image: Tensor,
) -> list[tuple[str, str]]:
    """Every user's line that takes a Python value from a tensor, with the value."""
    watch = _TakenValues()
    with contextlib.suppress(Exception), torch.inference_mode(), watch:
        model(image)
    return watch.found


class _TakenValues(TorchFunctionMode):
    """Keeps the user's lines that turn tensors into Python values, and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Any = (),
        kwargs: Any = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in TAKING:
            inside = _list_users_frames()
            if inside:
                self.found.append((_format_frame(inside[-1]), repr(output)))
        return output


def _list_users_frames() -> list[traceback.FrameSummary]:
    """The user's lines that are running, the innermost one last."""
    frames = [frame for frame in traceback.extract_stack() if _is_users(frame.filename)]
    return [frame for frame in frames if not Path(frame.filename).is_relative_to(OWN)]


def _format_frame(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}, in {frame.name}: {(frame.line or '').strip()}"


def _find_users_line(trace: str) -> str | None:
    """``file:line, in function: code`` of the last line in ``trace`` that is not torch's."""
    found = FRAME.findall(trace)
    frames = [frame for frame in found if not frame[0].startswith(TORCH)]
    if not frames:
        return None
    file, line, function, code = frames[-1]
    return f"{file}:{line}, in {function}: {code.strip()}"
