"""What a checkpoint's pickle may name besides tensors, and what stands for it.

``torch.load(weights_only=True)`` builds only what it is told to. Training programs put NumPy values, paths
and settings beside the weights. Each of them is replaced by a function or a class of this module, which keeps
plain values and checks them; NumPy's own constructors are never called, because they trust their input.
No function here imports, opens or calls anything that a file names.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np

PLAIN_KINDS = "biufcSU"
"""Kinds of NumPy values that hold no Python objects: truth values, numbers and text."""

SKIPPED_KINDS = "mMV"
"""Kinds of NumPy values that nobody reads: durations, times and records. They are replaced by ``None``."""

OBJECTS = "O"
"""Kind of an array of Python objects, which is kept as a list."""

NUMPY_MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
"""Modules of NumPy's constructors, before and since NumPy 2."""

MAX_CODE = 64
"""Length, in characters, of the name of a NumPy type, at most."""

PATHS = (
    "Path",
    "PosixPath",
    "WindowsPath",
    "PurePath",
    "PurePosixPath",
    "PureWindowsPath",
)
"""Classes of ``pathlib``."""

FACTORIES = (
    "list",
    "dict",
    "set",
    "tuple",
    "int",
    "float",
    "str",
    "bool",
)
"""What a ``defaultdict`` makes for a key that it lacks."""

VALUES = (
    "builtins.frozenset",
    "builtins.range",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "datetime.timezone",
    "decimal.Decimal",
    "uuid.UUID",
)
"""Classes of values that say when and how a checkpoint was made, and that nobody reads."""


class PlainType:
    """Stands for ``numpy.dtype``."""

    def __init__(
        self,
        code: str,
        align: bool = False,
        copy: bool = False,
    ) -> None:
        if not isinstance(code, str) or len(code) > MAX_CODE:
            raise ValueError("the type of an array has no name of a few letters")
        made = np.dtype(code)
        if made.kind not in PLAIN_KINDS + SKIPPED_KINDS + OBJECTS:
            raise ValueError(f"arrays of the type {code!r} are not read")
        self.made = made

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order in ("<", ">"):
            self.made = self.made.newbyteorder(order)


class PlainArray:
    """Stands for ``numpy.ndarray``; :attr:`value` is the array, a list of Python objects, or ``None`` for
    a kind that nobody reads."""

    value: np.ndarray | list[Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, data = state
        if isinstance(data, list):
            self.value = data
            return
        if _is_skipped(kind):
            return
        flat = np.frombuffer(_convert_to_bytes(data), _find_type(kind))
        self.value = flat.reshape(shape, order="F" if fortran else "C")


class Inert:
    """Stands for an object of a class whose content nobody reads."""

    def __init__(self, *values: Any) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def make_array(*_: object) -> PlainArray:
    """Stands for ``numpy.core.multiarray._reconstruct``; the array's content follows."""
    return PlainArray()


def make_scalar(kind: PlainType, data: object = b"") -> Any:
    """Stands for ``numpy.core.multiarray.scalar``: a Python number or text, or ``None`` for a kind that
    nobody reads."""
    if _is_skipped(kind):
        return None
    return np.frombuffer(_convert_to_bytes(data), _find_type(kind))[0].item()


def make_path(*parts: object) -> str:
    """Stands for the classes of ``pathlib``: the path as text."""
    if not all(isinstance(part, str) for part in parts):  # a list may stand for millions of words
        raise TypeError("a part of a path is no text")
    return "/".join(map(str, parts))


def make_dict(*_: object) -> dict[Any, Any]:
    """Stands for ``collections.defaultdict``; its entries follow."""
    return {}


def make_list(*_: object) -> list[Any]:
    """Stands for ``collections.deque``; its items follow."""
    return []


def make_namespace(*_: object, **__: object) -> argparse.Namespace:
    """Stands for ``types.SimpleNamespace``; its entries follow."""
    return argparse.Namespace()


def _is_skipped(kind: object) -> bool:
    return isinstance(kind, PlainType) and kind.made.kind in SKIPPED_KINDS


def _convert_to_bytes(data: object) -> bytes:
    if isinstance(data, str):  # bytes in a pickle of Python 2
        return data.encode("latin-1")
    if not isinstance(data, bytes):
        raise TypeError("the content of an array is not bytes")
    return data


def _find_type(kind: object) -> np.dtype[Any]:
    if not isinstance(kind, PlainType):
        raise TypeError("an array has no type")
    if kind.made.kind == OBJECTS:
        raise TypeError("an array of objects is not a list")
    return kind.made


def _list_allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    pairs: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (argparse.Namespace, "argparse.Namespace"),
        (make_namespace, "types.SimpleNamespace"),
        (make_dict, "collections.defaultdict"),
        (make_list, "collections.deque"),
        (PlainArray, "numpy.ndarray"),
        (PlainType, "numpy.dtype"),
        (Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    ]
    for module in NUMPY_MODULES:
        pairs += [
            (make_array, f"{module}._reconstruct"),
            (make_scalar, f"{module}.scalar"),
        ]
    for module in ("pathlib", "pathlib._local"):
        pairs += [(make_path, f"{module}.{name}") for name in PATHS]
    pairs += [(Inert, f"builtins.{name}") for name in FACTORIES]
    pairs += [(Inert, name) for name in VALUES]
    return pairs


ALLOWED = _list_allowed()
"""``(stand-in, name in the file)``, for ``torch.serialization.safe_globals``."""
