"""Rules of CONTRIBUTING.md that no linter knows: constants say what they are, and texts use common words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cmt_edge.__main__ import COMMANDS
from helpers.paths import ROOT

ROOMS = ("cmt", "export", "calib", "deploy")
FOLDERS = (*ROOMS, "src/cmt_edge", "tests", "scripts", "benchmarks", "examples", "docs")
MODULES = [path for folder in ROOMS for path in sorted((ROOT / folder).rglob("*.py"))]
MODULES += sorted((ROOT / "src" / "cmt_edge").glob("*.py"))

RARE = re.compile(
    r"\b(to be had|(has|have) not got|got it itself|mend(s|ed|ing)?|one road|(is|are) there already"
    r"|provabl[ey]|and its kin|lest|thereof|whence|hitherto|wherein|whilst|hereby|albeit)\b",
    re.IGNORECASE,
)
"""Words that a reader whose first language is not English looks up."""


TYPED = re.compile(rf"cmt-(edge +)?({'|'.join(COMMANDS)})\b")
"""A command as one of the users types it; others type it in another way, see ``startup.name_program``."""
UNTYPED = {
    "src/cmt_edge/startup.py",  # it makes the names
    "src/cmt_edge/__main__.py",  # its examples say how the user has begun
    "export/config_file.py",  # tables of a settings file
}
"""Modules that may hold such a name."""


def names_of(statement: ast.stmt) -> list[str]:
    """The names that an assignment gives to something."""
    if isinstance(statement, ast.Assign):
        targets = [part for target in statement.targets for part in getattr(target, "elts", [target])]
    elif isinstance(statement, ast.AnnAssign):
        targets = [statement.target]
    else:
        return []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def is_text(statement: ast.stmt | None) -> bool:
    """Whether a statement is a docstring."""
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def bare_constants(text: str) -> Iterator[str]:
    """Constants of a module that no docstring follows."""
    body = ast.parse(text).body
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if not is_text(following):
            yield from (name for name in names_of(statement) if name != "__all__")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_constant_says_what_it_is(path):
    assert list(bare_constants(path.read_text(encoding="utf-8"))) == []


def test_a_bare_constant_is_found():
    text = "A = 1\n'''It is one.'''\nB, C = 2, 3\nB.b[C] = 1\nD: int = 4\n"
    text += "\ndef f():\n    E = 5\n\n__all__ = ['A']\n"
    assert list(bare_constants(text)) == ["B", "C", "D"]


def texts() -> list[Path]:
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    found = [*found, *ROOT.glob("*"), *(ROOT / ".github").rglob("*")]
    kinds = {".py", ".md", ".sh", ".yml", ".toml"}
    return sorted(path for path in set(found) if path.suffix in kinds and path != Path(__file__).resolve())


def test_texts_use_common_words():
    rare = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in texts()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if RARE.search(line)
    ]
    assert rare == []


def test_a_rare_word_is_found():
    assert RARE.search("no reference is to be had")
    assert RARE.search("Mend it")
    assert not RARE.search("this is what we recommend; a kind answer")
    assert len(texts()) > 200


def quoted_commands(text: str) -> Iterator[str]:
    """Texts of a module, but for its docstrings, that name a command as only some of the users type it."""
    tree = ast.parse(text)
    described = {id(node.value) for node in ast.walk(tree) if is_text(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in described:
            yield from (found[0] for found in TYPED.finditer(node.value))


def test_messages_name_a_command_as_the_user_types_it():
    found = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in MODULES}
    told = {name: text for name, text in found.items() if TYPED.search(text) and name not in UNTYPED}
    quoted = {name: [*quoted_commands(text)] for name, text in told.items()}
    assert {name: commands for name, commands in quoted.items() if commands} == {}


def test_a_quoted_command_is_found():
    text = "def f():\n    '''Of ``cmt-export``.'''\n    return f'cmt-bench {x}; cmt-edge doctor; cmt-edge'"
    assert list(quoted_commands(text)) == ["cmt-bench", "cmt-edge doctor"]
