"""Write ``docs/settings.md``: every setting of an export, from the fields of ``Settings``.

usage: python scripts/settings_reference.py [--check]

``--check`` writes nothing; the exit code is 1 if the page is not what the fields say.
"""

from __future__ import annotations

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from made_page import write_or_check

from cmt_edge.export.options import get_option, make_flag
from cmt_edge.export.settings import GROUPS, Settings

PAGE = Path(__file__).resolve().parent.parent / "docs" / "settings.md"
"""The reference."""
TYPES = {
    "bool": "true or false",
    "bool | None": "true or false",
    "float": "number",
    "float | None": "number",
    "int": "whole number",
    "int | None": "whole number",
    "str": "text",
    "str | None": "text",
    "str | TorchModule": "text; in Python also a module",
    "str | Sequence[float] | None": "three numbers",
    "str | Sequence[str] | None": "text; in Python also a list of names",
}
"""Annotation of a field -> what a user writes."""
HEAD = """\
# Settings

This page is made by `python scripts/settings_reference.py` from the code.

Every setting of an export exists three times under one name: as a flag of `cmt-edge export`, as a key of a
settings file, and as a field of `ExportConfig`. A settings file is TOML:

```toml
model = "cmt_xs"
weights = "cmt_xs.pth"
precision = "int8"
data = "photos/train"
eval-data = "photos/test"
max-drop = 0.5
```

```sh
cmt-edge export --config export.toml
cmt-edge export --config export.toml --precision fp32     # a flag wins over the file
```

```python
from cmt_edge import ExportConfig, export

export(ExportConfig("cmt_xs", weights="cmt_xs.pth", precision="int8", data="photos/train"))
```

Keys may have hyphens or underscores, and stand at the top of the file or in a table `[export]` (or
`[tool.cmt-edge]` of a `pyproject.toml`). An unknown key is refused with the names that are close to it. The
[command line](cli.md) has the flags of the other commands, too.
"""
"""What stands above the first table."""
VARIABLES = {
    "CMT_EDGE_CACHE": "folder of what can be made again: compiled models, optimised graphs, calibrations,"
    " unpacked bundles, timings of TensorRT",
    "CMT_EDGE_STATE": "folder of the secret that seals what only this machine may have written",
    "CMT_EDGE_NO_CACHE": "`1`: nothing is read from the cache, written to it or sealed",
    "NO_COLOR": "no colours, on terminals too",
    "COLUMNS": "the width to which tables fold",
}
"""Environment variable -> what it does."""


def describe_default(described: Field[Any]) -> str:
    """The default as a settings file writes it; empty where the help says it."""
    value = described.default
    if value is MISSING or value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def describe_values(described: Field[Any]) -> str:
    """What may be written."""
    known = get_option(described)
    if known.choices:
        return ", ".join(f"`{choice}`" for choice in known.choices)
    return TYPES[str(described.type)] + (f", {known.range}" if known.range else "")


def write_row(described: Field[Any]) -> str:
    """One setting."""
    help_text = get_option(described).help.replace("|", "\\|").replace("%%", "%")
    key = described.name.replace("_", "-")
    flag = make_flag(described)
    if flag == f"--no-{key}":
        help_text = f"`false`: {help_text} (`{flag}`)"
    shown = f"`{key}`"
    return f"| {shown} | {describe_values(described)} | {describe_default(described)} | {help_text} |"


def write_reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for group, title in GROUPS.items():
        rows = [write_row(known) for known in fields(Settings) if get_option(known).group == group]
        head = [f"## {title[:1].upper()}{title[1:]}", "", "| key | value | default | meaning |"]
        parts.append("\n".join([*head, "| :--- | :--- | :--- | :--- |", *rows, ""]))
    rows = [f"| `{name}` | {meaning} |" for name, meaning in VARIABLES.items()]
    head = ["## Environment variables", "", "| variable | what it does |", "| :--- | :--- |"]
    parts.append("\n".join([*head, *rows, "", "A `~` at the beginning of a folder is your home.", ""]))
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    """Write the page, or check it; returns the exit code."""
    return write_or_check(PAGE, write_reference(), argv, "scripts/settings_reference.py")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
