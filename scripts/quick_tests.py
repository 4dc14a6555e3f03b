"""Prints the test modules that ``make quick`` runs: what covers the change at hand, and what is always fast.

    python scripts/quick_tests.py [BASE]

The change is what differs from ``BASE`` (default: where this branch left ``main``), committed or not. A test
module is chosen if it changed, or if it imports a module that changed. Without git, or if only pages changed,
the modules of ``ALWAYS`` remain.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

ROOMS = ("cmt", "export", "calib", "deploy")
"""The folders that make up the package."""

ALWAYS = (
    "tests/test_public_api.py",
    "tests/deploy/test_bundle.py",
    "tests/deploy/test_images.py",
    "tests/deploy/test_imports.py",
    "tests/deploy/test_parity.py",
    "tests/deploy/test_preprocess.py",
)
"""Test modules of a few seconds each that cover what everything else builds on."""


def changed_files(base: str | None) -> list[Path]:
    """Files that differ from ``base``, and files that git does not know yet; empty where git cannot tell."""
    try:
        start = base or branch_point()
        names = git("diff", "--name-only", start) + git("ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [Path(name) for name in names if (ROOT / name).exists()]


def branch_point() -> str:
    """The commit where this branch left ``main``; HEAD where no ``main`` is known, local or remote."""
    for main in ("main", "origin/main"):
        try:
            return git("merge-base", "HEAD", main)[0]
        except subprocess.CalledProcessError:
            continue
    return "HEAD"


def git(*arguments: str) -> list[str]:
    """The lines that a git command prints."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def module_name(path: Path) -> str | None:
    """The dotted name of a file of the package; None for other files."""
    if path.suffix != ".py" or path.parts[0] not in ROOMS:
        return None
    parts = path.with_suffix("").parts
    return ".".join(("cmt_edge", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def imported_names(path: Path) -> Iterator[str]:
    """Everything that a test module imports, with the packages that it is in: dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def choose(changed: list[Path]) -> list[str]:
    """Paths of test modules, relative to the repository."""
    sources = {name for name in map(module_name, changed) if name}
    chosen = {name for name in ALWAYS if (ROOT / name).exists()}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        relative = path.relative_to(ROOT)
        if relative in changed or sources & set(imported_names(path)):
            chosen.add(relative.as_posix())
    return sorted(chosen)


if __name__ == "__main__":
    print(*choose(changed_files(sys.argv[1] if len(sys.argv) > 1 else None)), sep="\n")
