"""Folders that inference servers read, made from bundles: Triton and OpenVINO Model Server."""

from __future__ import annotations

from .repository import SERVERS, Repository, make_repository
from .served import Options, Served

__all__ = ["SERVERS", "Options", "Repository", "Served", "make_repository"]
