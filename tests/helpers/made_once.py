"""What is made once a run of the tests, though several workers ask for it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cmt_edge.deploy.locks import locked


def find_run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share, and no other run."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "made_once"


def make_once(target: Path, make: Callable[[Path], object]) -> Path:
    """The file or folder ``target``; the first who asks makes it, the others wait for it.

    Args:
        target: lies in the folder of :func:`find_run_folder`. Nobody may change it.
        make: writes the content to the path that it is given, whose name is that of ``target``.
    """
    with locked(target):
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                made = Path(folder) / target.name
                make(made)
                made.rename(target)
    return target


def copy_once_made(target: Path, folder: Path, make: Callable[[Path], object]) -> Path:
    """A copy in ``folder`` of the folder that :func:`make_once` gives."""
    made = make_once(target, make)
    return Path(shutil.copytree(made, folder / target.name))
