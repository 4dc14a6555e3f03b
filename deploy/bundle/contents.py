"""Is the content of a bundle's graphs what their names say, and no more than a graph may ask for?

The answer depends on the bytes alone. So a finding of this machine may be kept under the files' hashes,
sealed (:mod:`cmt_edge.deploy.sealing`), because looking takes longer than hashing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from cmt_edge.version import __version__

from ..cache import compute_digest
from ..errors import BundleError
from ..files import find_cache_folder
from ..sealing import SealedCache
from .external_data import MalformedOnnx, has_external_data
from .manifest import make_bundle_error
from .onnx_caps import ExcessiveGraph, require_modest_onnx
from .sections import FileEntry

FOLDER = "checked"
"""Name of the folder of the findings in the cache."""
KEEP = 256
"""The number of findings that stay, those that were used last."""
GRAPHS = ".onnx"
"""Suffix, in lower case, of the members that are graphs."""
RULES = 2
"""What the checks demand. Raised when they demand more, so that no older finding counts."""


def check_contents(path: Path, files: Mapping[str, FileEntry], cache: bool) -> None:
    """Check that each graph is what its name says: runtimes choose a reader by the content of a file.

    It refers to no other file, and asks for no more than a graph may.

    Args:
        path: folder of the bundle.
        files: its members, whose hashes were compared just now.
        cache: a finding of an earlier process may be used, and this one may be kept.

    Raises:
        BundleError: a graph is not what its name says, or cannot be read.
    """
    graphs = {name: entry.sha256 for name, entry in files.items() if name.lower().endswith(GRAPHS)}

    def check() -> bool:
        for name in graphs:
            _check_graph(name, path)
        return True

    if not (cache and graphs):
        check()
        return
    findings = SealedCache(find_cache_folder() / FOLDER, "finding about a bundle's graphs", ".txt", KEEP)
    key = compute_digest({"graphs": graphs, "rules": [__version__, RULES]})
    findings.get(key, decode=lambda _: True, make=check, encode=lambda _: b"nothing is wrong")


def _check_graph(name: str, path: Path) -> None:
    try:
        require_modest_onnx(path / name)
        _require_self_contained(name, path)
    except MalformedOnnx as exc:
        raise make_bundle_error(f"{name} is no ONNX file", path, exc) from exc
    except ExcessiveGraph as exc:
        raise make_bundle_error(f"{name} asks for more than a graph may", path, exc) from exc
    except OSError as exc:
        raise make_unreadable_error(path / name, exc) from exc


def make_unreadable_error(member: Path, exc: OSError) -> BundleError:
    """The error for a file of a bundle that cannot be read."""
    return BundleError(
        "a file of the bundle cannot be read",
        where=member,
        why=exc.strerror or exc,
        remedy="check the disk and the file's permissions, or copy the whole bundle again",
    )


def _require_self_contained(name: str, path: Path) -> None:
    """Raise :class:`BundleError` for an ONNX file that refers to another file."""
    if has_external_data(path / name):
        raise make_bundle_error(
            f"{name} stores weights outside the file, which bundles may not",
            path,
        )
