"""What torch.onnx refuses in a user's model, said with the operator and the line of the user's code."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from cmt_edge.deploy.errors import InputError

UNKNOWN_OPERATOR = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.]+)'")
"""How torch.onnx says that ONNX lacks an operator."""

DATA_DEPENDENT = re.compile(r"data-dependent", re.IGNORECASE)
"""How torch.export says that the values of an image decide what the code does next."""

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(\S.*)')
"""One line of a stack trace."""

TORCH = str(Path(torch.__file__).parent)
"""The folder of torch, whose own code is not the user's."""

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


@contextlib.contextmanager
def explaining(model: nn.Module, example: Tensor) -> Iterator[None]:
    """Turn a refusal of torch.onnx that is the model's doing into an error that names the user's code.

    Raises:
        InputError: the model uses an operator that ONNX lacks, or branches on values of the image.
    """
    try:
        yield
    except Exception as exc:
        if error := _explain(_texts(exc), model, example):
            raise error from exc
        raise


def _texts(exc: BaseException | None) -> str:
    """The messages of an exception and of its causes."""
    parts = []
    while exc is not None:
        parts.append(str(exc))
        exc = exc.__cause__
    return "\n".join(parts)


def _explain(text: str, model: nn.Module, example: Tensor) -> InputError | None:
    if found := UNKNOWN_OPERATOR.search(text):
        operator = found[1]
        return InputError(
            f"ONNX has no operator for {operator}",
            where=_line_of(operator, model, example),
            remedy=OPERATOR_REMEDY,
        )
    if DATA_DEPENDENT.search(text):
        _, _, call = text.partition("The following call raised this error:")
        return InputError(
            "the model decides by the values of the image what it does, which a graph cannot",
            where=_users_line(call),
            remedy=BRANCH_REMEDY,
        )
    return None


def _line_of(operator: str, model: nn.Module, example: Tensor) -> str | None:
    """The line that calls ``operator``, which torch.onnx does not tell but torch.export does."""
    try:
        graph = torch.export.export(model, (example,), strict=True).graph  # strict: with the innermost line
    except Exception:  # the line is an addition to a message; its absence is no error of its own
        return None
    for node in graph.nodes:
        if operator.replace("::", ".") in str(node.target):
            return _users_line(node.meta.get("stack_trace") or "")
    return None


def _users_line(trace: str) -> str | None:
    """``file:line, in function: code`` of the last line in ``trace`` that is not torch's."""
    frames = [frame for frame in FRAME.findall(trace) if not frame[0].startswith(TORCH)]
    if not frames:
        return None
    file, line, function, code = frames[-1]
    return f"{file}:{line}, in {function}: {code.strip()}"
