"""Reading a settings file: TOML, with the options of an export at the top or in a table of their own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.files import read_text

TABLES = (
    ("export",),
    ("cmt-export",),
    ("tool", "cmt-export"),
    ("tool", "cmt-edge"),
)
"""Tables of a settings file that hold the settings of an export, in files that other tools read too."""


MAX_DOTS = 64
"""The largest number of dots in a name of a settings file; parsing takes quadratic time for them."""

WHOLE = range(-(1 << 63), 1 << 63)
"""The whole numbers of TOML."""


def read_config(path: Path) -> dict[str, Any]:
    """The settings of a TOML file: its keys and those of its table ``[export]``.

    Other tables belong to other tools where there is an ``[export]``, and are refused as unknown settings
    where there is none.

    Raises:
        InputError: the file is missing, cannot be read, or says something twice.
    """
    content = _read_toml(path)
    tables = [(names, _find_table(content, names)) for names in TABLES]
    found = [(names, table) for names, table in tables if table is not None]
    if not found:
        return content
    if len(found) > 1:
        both = " and ".join(f"[{'.'.join(names)}]" for names, _ in found)
        raise InputError(
            f"has the tables {both}",
            where=path,
            remedy="keep one of them",
        )
    ((names, settings),) = found
    outside = {key: value for key, value in content.items() if not isinstance(value, dict)}
    for key in outside.keys() & settings.keys():
        raise InputError(
            f"says {key} both in [{'.'.join(names)}] and outside it",
            where=path,
            remedy="keep one of them",
        )
    return outside | settings


def _find_table(
    content: Mapping[str, Any],
    names: Sequence[str],
) -> dict[str, Any] | None:
    """The table with these names, each inside the one before."""
    table: Any = content
    for name in names:
        table = table.get(name) if isinstance(table, dict) else None
    return table if isinstance(table, dict) else None


def _read_toml(path: Path) -> dict[str, Any]:
    """The content of a TOML file, with or without a byte order mark; raises :class:`InputError`."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    if not path.exists():
        raise InputError(
            "no such settings file",
            where=path,
            remedy="check the path given to --config",
        )
    try:
        text = read_text(path)
        keys = (line.split("=", 1)[0] for line in text.splitlines())
        if any(key.count(".") > MAX_DOTS for key in keys):
            raise ValueError(f"a name has more than {MAX_DOTS} dots")
        content: dict[str, Any] = tomllib.loads(text)
        _require_toml_numbers(content)
        return content
    except (
        OSError,
        ValueError,  # also for text that is no UTF-8 or no TOML
        RecursionError,
    ) as exc:
        raise InputError(
            "the configuration file cannot be read",
            where=path,
            why=exc,
            remedy="it must be TOML in UTF-8",
        ) from exc


def _require_toml_numbers(content: Any) -> None:
    """Raise ``ValueError`` for a whole number that TOML does not have. Python reads one of any size, and
    cannot print one of thousands of digits."""
    if isinstance(content, int) and content not in WHOLE:
        raise ValueError("a whole number does not fit in 64 bits")
    inner: Iterable[Any] = ()
    if isinstance(content, dict):
        inner = content.values()
    elif isinstance(content, list):
        inner = content
    for value in inner:
        _require_toml_numbers(value)
