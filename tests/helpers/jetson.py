"""Outputs and files that were recorded from Jetsons."""

from __future__ import annotations

from pathlib import Path

from helpers.paths import ROOT

DATA = ROOT / "tests" / "data" / "jetson"


def recorded(name: str) -> dict[str, str]:
    """The outputs of one file: name -> text."""
    parts = ("\n" + (DATA / name).read_text(encoding="utf-8")).split("\n# ")[1:]
    return {head: body for head, _, body in (p.partition("\n") for p in parts)}


TEGRASTATS, NVPMODEL, CLOCKS, TREES = (
    recorded(f"{name}.txt") for name in ("tegrastats", "nvpmodel", "jetson_clocks", "trees")
)


def plant(name: str, root: Path) -> Path:
    """The recorded tree as files below ``root``."""
    for line in TREES[name].strip("\n").split("\n"):
        path, _, content = line.partition("\t")
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        content = content.replace("\\n", "\n").replace("\\0", "\0")
        (root / path).write_text(content if content.endswith("\0") else content + "\n", encoding="utf-8")
    return root
