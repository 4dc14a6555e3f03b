"""``cmt-edge --completion SHELL``: what a shell needs to complete commands, flags and values.

The package ``shtab`` writes it from the parsers, once: the TAB key then starts no Python.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import RuntimeMissingError, UnknownNameError
from .console import list_values
from .output import say

SHELLS = ("bash", "zsh", "tcsh")
"""Shells that ``shtab`` writes for."""

WHERE = """\
# bash: cmt-edge --completion bash > ~/.local/share/bash-completion/completions/cmt-edge
# zsh:  cmt-edge --completion zsh > a file _cmt-edge in a folder of $fpath
# Write it again after an upgrade."""
"""What stands above the script."""


def show_completion(shell: str, modules: Mapping[str, str], models: Sequence[str]) -> int:
    """Print the script for ``shell``; returns the exit code.

    Args:
        shell: one of :data:`SHELLS`.
        modules: name of a command -> the module with its ``build_parser``.
        models: what ``--model`` takes.

    Raises:
        UnknownNameError: there is no such shell.
        RuntimeMissingError: ``shtab`` is not installed.
    """
    if shell not in SHELLS:
        raise UnknownNameError("shell", shell, difflib.get_close_matches(shell, SHELLS, n=1), SHELLS)
    try:
        shtab = import_module("shtab")
    except ImportError as exc:
        raise RuntimeMissingError(
            "shtab is not installed", remedy='pip install "cmt-edge[completion]"'
        ) from exc
    tree = build_tree(modules, models, shtab.FILE)
    say(f"{WHERE}\n{shtab.complete(tree, shell=shell)}")
    return 0


def build_tree(
    modules: Mapping[str, str],
    models: Sequence[str],
    file: object,
) -> argparse.ArgumentParser:
    """One parser with every command below it. Its arguments know their values wherever these can be listed;
    ``file`` is what ``shtab`` reads at those that are paths."""
    top = argparse.ArgumentParser("cmt-edge", allow_abbrev=False)
    commands = top.add_subparsers()
    for name, module in modules.items():
        parser = import_module(module).build_parser()
        for action in parser.list_actions():
            _describe_values(action, models, file)
        commands.add_parser(name, parents=[parser], add_help=False, help=parser.description)
    return top


def _describe_values(action: Any, models: Sequence[str], file: object) -> None:
    """Say what an ``argparse.Action`` takes. Text that cannot be listed is a path nearly always."""
    if values := list_values(action):
        action.choices = values
    elif action.dest == "model":
        action.choices = list(models)
    elif action.nargs != 0 and action.type in {None, Path}:
        action.complete = file  # an attribute of shtab's
