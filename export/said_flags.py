"""Flags that contradict each other: ``--half --int8``, ``--ema --no-ema``.

argparse takes the last one silently. Here options that several flags set are refused where two of these flags
mean different things, as a settings file is that says such a thing. A flag of its own that is repeated, such
as ``--batch 2 --batch 4``, overrides itself as everywhere: scripts add it behind their defaults.
"""

from __future__ import annotations

import argparse
from typing import Any


class SayOnce(argparse.Action):
    """Sets an option that several flags set; see :func:`_note`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if self.nargs == 0:
            _note(namespace, self.dest, f"{option_string}", self.const)
        else:
            _note(namespace, self.dest, f"{option_string} {values}", values)


class SayOnOrOff(argparse.BooleanOptionalAction):
    """``--NAME`` and ``--no-NAME``; see :func:`_note`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        _note(namespace, self.dest, f"{option_string}", not f"{option_string}".startswith("--no-"))


def _note(namespace: argparse.Namespace, name: str, said: str, meant: Any) -> None:
    """Set the option ``name`` to what a flag means.

    Raises ``argparse.ArgumentError`` if an earlier flag meant something else: which one was wanted is not
    known.
    """
    place = f"said_of_{name}"
    first = getattr(namespace, place, said)
    if fold_case(getattr(namespace, name, meant)) != fold_case(meant):
        raise argparse.ArgumentError(None, f"{first} and {said} contradict each other; keep one of them")
    setattr(namespace, place, said)
    setattr(namespace, name, meant)


def fold_case(value: Any) -> Any:
    """A value as it is compared with another one: choices may be written in any case."""
    return value.lower() if isinstance(value, str) else value
