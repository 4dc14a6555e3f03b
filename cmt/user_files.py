"""Python files of users as modules, under names that neither hide another module nor get lost.

``cmt.py`` of a user must not stand for another ``cmt``, so a file becomes a module below this one. Its name
holds the path of the file: pickle records only the name of a class and of its module, and a process that
:func:`torch.load` or ``torch.multiprocessing`` gives such a name to imports the file from there.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

from cmt_edge.deploy.errors import InputError

__path__: list[str] = []
"""Lets Python look for modules below this one; :class:`Finder` finds them."""


def import_file(path: Path) -> ModuleType:
    """The module in a file; it is imported once.

    Raises:
        InputError: there is no such file, or its code raises an exception.
    """
    if not path.is_file():
        raise InputError(
            "there is no such file",
            where=path,
            remedy="give PATH/FILE.py:FACTORY",
        )
    path = path.resolve()
    name = make_name(path)
    if name in sys.modules:
        return sys.modules[name]
    _make_neighbours_importable(path)
    try:
        return importlib.import_module(name)
    except Exception as exc:  # the user's code: anything may happen
        raise InputError(
            "the file cannot be imported",
            where=path,
            why=f"{type(exc).__name__}: {exc}",
            remedy="correct it, then try again",
        ) from exc


def make_name(path: Path) -> str:
    """The name of the module in a file, which :func:`find_path` reads."""
    encoded = base64.b32encode(str(path).encode())
    code = encoded.decode().rstrip("=").lower()
    return f"{__name__}.{path.stem.replace('.', '_')}_{code}"


def find_path(name: str) -> Path | None:
    """The file whose module has this name, or ``None`` where the name is none of :func:`make_name`."""
    code = name.rpartition("_")[2].upper()
    try:
        padding = "=" * (-len(code) % 8)
        path = Path(base64.b32decode(code + padding).decode())
    except (binascii.Error, UnicodeDecodeError):
        return None
    return path if path.is_absolute() else None


class Finder(MetaPathFinder):
    """Finds the modules of :func:`make_name` for Python's ``import``, and so for pickle."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """The file of a module below this one.

        Raises:
            ModuleNotFoundError: the file is not on this machine.
        """
        if not fullname.startswith(f"{__name__}."):
            return None
        file = find_path(fullname)
        if file is None:
            return None
        if not file.is_file():
            raise ModuleNotFoundError(
                f"the pickled model has classes of the file {file}, which does not exist here; copy the file"
                " to that path, or save model.state_dict() instead of the model and build the model here",
                name=fullname,
            )
        _make_neighbours_importable(file)
        return importlib.util.spec_from_file_location(fullname, file)


def _make_neighbours_importable(file: Path) -> None:
    """Let a file import what lies beside it."""
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))


sys.meta_path.append(Finder())
