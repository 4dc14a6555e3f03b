"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("cmt-edge")
except metadata.PackageNotFoundError:
    __version__ = "unknown (not installed)"
