"""Prints how large the code's files and functions are, and how much stands on a line.

    python scripts/code_figures.py [FOLDER ...]

Without a folder, the package is measured: src/cmt_edge and the four rooms. Counted are lines of code: no
blank lines, no comments, no docstrings (of modules, classes, functions and constants). A *token* is what
Python's ``tokenize`` calls a name, a number, a string or an operator; brackets, commas and colons count, line
ends and indentation do not. An f-string is one token up to Python 3.11 and several from 3.12 on: compare
figures of one version.
"""

from __future__ import annotations

import argparse
import ast
import io
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PACKAGE = ("src/cmt_edge", "cmt", "export", "calib", "deploy")
"""Folders of the package, relative to the repository. Links in them are not followed."""

LAYOUT = {
    tokenize.ENCODING,
    tokenize.NEWLINE,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.COMMENT,
    tokenize.ENDMARKER,
}
"""Kinds of tokens that say nothing."""

SHOWN = 5
"""The number of largest files and functions that are printed."""


@dataclass(frozen=True)
class Figures:
    """One file: its lines in all, its tokens by line of code, and the lines of each function."""

    path: Path
    lines: int
    tokens: dict[int, int]
    functions: dict[str, int]


def find_docstring_lines(tree: ast.AST) -> set[int]:
    """Lines of strings that stand alone: docstrings, also those below a constant."""
    return {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and is_text(node.value)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }


def is_text(node: ast.expr) -> bool:
    """Whether an expression is a plain string."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def tokens_by_line(text: str, skipped: set[int]) -> dict[int, int]:
    """Line of code -> tokens that begin on it. Lines inside a long string have none, and are not counted."""
    counts: dict[int, int] = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        line = token.start[0]
        if token.type not in LAYOUT and line not in skipped:
            counts[line] = counts.get(line, 0) + 1
    return counts


def list_functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and number of lines, docstring included, of every function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{node.name}:{node.lineno}", (node.end_lineno or node.lineno) - node.lineno + 1


def measure(path: Path) -> Figures:
    """Read one file."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tokens = tokens_by_line(text, find_docstring_lines(tree))
    return Figures(path, len(text.splitlines()), tokens, dict(list_functions(tree)))


def list_files_below(folder: Path) -> list[Path]:
    """The folder's Python files; links inside it are not followed."""
    if folder.is_file():
        return [folder]
    found = folder.rglob("*.py")
    return sorted(p for p in found if not any(part.is_symlink() for part in p.parents if part != folder))


def report(all_figures: list[Figures]) -> None:
    """Print the table."""
    tokens = sum(sum(f.tokens.values()) for f in all_figures)
    lines = sum(len(f.tokens) for f in all_figures)
    functions = [(n, f"{f.path}:{name}") for f in all_figures for name, n in f.functions.items()]
    print(f"files              {len(all_figures)}")
    print(f"lines of code      {lines}")
    print(f"tokens a line      {tokens / max(1, lines):.2f} (mean)")
    print(f"functions          {len(functions)}, {sum(n > 40 for n, _ in functions)} of them over 40 lines")
    for title, rows in (
        ("largest files", [(f.lines, str(f.path)) for f in all_figures]),
        ("largest functions", functions),
    ):
        print(f"{title}, lines")
        for count, name in sorted(rows, reverse=True)[:SHOWN]:
            print(f"  {count:>5}  {name}")


def main(arguments: list[str] | None = None) -> int:
    """Measure the folders; returns 2 if there is no Python file in them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER")
    folders = parser.parse_args(arguments).folders or [ROOT / name for name in PACKAGE]
    figures = [measure(path) for folder in folders for path in list_files_below(folder)]
    if not figures:
        print("error: no Python file was found", file=sys.stderr)
        return 2
    report(figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
