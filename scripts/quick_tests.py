"""Prints the test modules that ``make quick`` runs: what covers the change at hand, within a time budget.

    python scripts/quick_tests.py [BASE] [--budget SECONDS]
    python scripts/quick_tests.py --record [TEST_MODULE ...]

The change is what differs from ``BASE`` (default: where this branch left ``main``), committed or not. A test
module is related to the change if it changed, or if it reaches a changed file through imports: through
modules of the package, helpers of the tests, and a ``conftest.py`` whose fixtures it uses. The fewer imports
lie between, the closer it is. The changed test modules come first, then those of ``ALWAYS``, then the others
from near to far, those with fewer seconds first, until the budget is spent. Standard error says what is left
out: ``make test`` runs it. ``quick_deadline.py`` keeps the time where the seconds are wrong or unknown.

Seconds come from ``scripts/quick_tests.json``. ``--record`` runs the fast tests, of all modules or of those
that are named, and writes them there.

An import inside a function counts, and so does a string that names a module (``"cmt_edge.cmt.registry"``, or
``".openvino"`` in a table). What a test reaches only through a command line in a child process is not seen.
Without git, only the modules of ``ALWAYS`` remain.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

ROOMS = ("cmt", "export", "calib", "deploy")
"""The folders that make up the package."""

FRONT = "src/cmt_edge"
"""The folder of the package's own modules, beside the links to the rooms."""

RECORD = Path(__file__).with_suffix(".json")
"""Seconds of processor time that the fast tests of each module take, recorded on one machine with one
process. The first module that asks for a fixture of the session pays for it."""

FAST = "not slow and not giant"
"""Marks of the tests that ``make quick`` runs."""

BUDGET_S = 80.0
"""Seconds of tests that are chosen, summed over the modules; two workers share them."""

UNKNOWN_S = 5.0
"""Seconds that a test module takes for which none are recorded."""

ALWAYS = (
    "tests/test_code_style.py",
    "tests/test_docs.py",
    "tests/test_public_api.py",
    "tests/export/test_cli_reference.py",
    "tests/deploy/test_bundle.py",
    "tests/deploy/test_image_archives.py",
    "tests/deploy/test_image_folders.py",
    "tests/deploy/test_image_files.py",
    "tests/deploy/test_images.py",
    "tests/deploy/test_imports.py",
    "tests/deploy/test_matching_labels.py",
    "tests/deploy/test_parity.py",
    "tests/deploy/test_parity_figures.py",
    "tests/deploy/test_preprocess.py",
    "tests/deploy/test_tolerance.py",
)
"""Test modules of a few seconds each: those that cover what everything else builds on, and those
that read files of the checkout, pages and code, which no import shows."""

USERS_OF_FAKES = ("gpu_machine", "FAKES")
"""Names by which a test module reaches ``tests/fakes``."""

COMMON_FOLDERS = {"tests", "src", *ROOMS}
"""Names of folders that say nothing about which test reads a file in them."""


@dataclass
class Source:
    """One Python file, and what it refers to.

    Attributes:
        path: its path in the repository.
        name: its dotted name, e.g. ``cmt_edge.cmt.layers``, ``helpers.images`` or ``tests.cmt.test_cvt``.
        nodes: the nodes of its syntax tree.
        imported: names of the modules that it imports.
        runs_first: names of modules that Python or pytest runs before it, and that matter only if they change
            themselves: the packages of ``imported``, and each ``conftest.py`` above a test module.
    """

    path: Path
    name: str
    nodes: list[ast.AST]
    imported: set[str] = field(default_factory=set)
    runs_first: set[str] = field(default_factory=set)

    @property
    def is_test(self) -> bool:
        return self.path.name.startswith("test_") and self.path.parts[0] == "tests"

    @property
    def package(self) -> str:
        """The dotted name of the package that relative imports start from."""
        return self.name if self.path.name == "__init__.py" else self.name.rpartition(".")[0]

    @cached_property
    def strings(self) -> set[str]:
        """The strings in its code."""
        found = (node.value for node in self.nodes if isinstance(node, ast.Constant))
        return {value for value in found if isinstance(value, str)}

    @cached_property
    def words(self) -> set[str]:
        """Its strings and the names of its functions' arguments: by these a test asks for a fixture."""
        return self.strings | {node.arg for node in self.nodes if isinstance(node, ast.arg)}


# --- the change -----------------------------------------------------------------------------------


def changed_files(base: str | None) -> list[Path]:
    """Files that differ from ``base``, and files that git does not know yet; empty where git cannot tell."""
    try:
        start = base or find_branch_point()
        names = git("diff", "--name-only", start) + git("ls-files", "--others", "--exclude-standard")
    except (OSError, subprocess.CalledProcessError):
        return []
    return [Path(name) for name in names if (ROOT / name).exists()]


def find_branch_point() -> str:
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


# --- who imports what -----------------------------------------------------------------------------


def name_module(path: Path) -> str | None:
    """The dotted name of a file of the package or of the tests; None for other files."""
    if path.suffix != ".py":
        return None
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__":
        parts = parts[:-1]
    if path.is_relative_to(FRONT):
        return ".".join(parts[1:])
    if parts[0] in ROOMS:
        return ".".join(("cmt_edge", *parts))
    if parts[:2] == ("tests", "helpers"):
        return ".".join(parts[1:])
    return ".".join(parts) if parts[0] == "tests" else None


def read_sources(root: Path) -> dict[str, Source]:
    """Every Python file of the package and of the tests, by dotted name, with its imports."""
    sources = {}
    for folder in (FRONT, *ROOMS, "tests"):
        for path in sorted((root / folder).rglob("*.py")):
            relative = path.relative_to(root)
            name = name_module(relative)
            if name is None or (folder == FRONT and relative.parent != Path(FRONT)):  # a file behind a link
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            sources[name] = Source(relative, name, list(ast.walk(tree)))
    for source in sources.values():
        link(source, sources)
    return sources


def link(source: Source, sources: dict[str, Source]) -> None:
    """Find what ``source`` imports; a test module also imports a ``conftest.py`` whose fixtures it uses."""
    named = {found for name in iterate_references(source, sources) if (found := find_nearest(name, sources))}
    conftests = [sources[name] for name in list_conftests(source) if name in sources]
    named |= {conftest.name for conftest in conftests if list_fixtures(conftest) & source.words}
    packages = {package for name in named for package in list_packages(name) if package in sources}
    source.imported = named - {source.name}
    source.runs_first = packages | {conftest.name for conftest in conftests}


def list_conftests(source: Source) -> list[str]:
    """The names that the ``conftest.py`` files above a test module may have."""
    if not source.is_test:
        return []
    return [f"{package}.conftest" for package in list_packages(source.name)]


def list_fixtures(conftest: Source) -> set[str]:
    """The names of the fixtures that a ``conftest.py`` defines."""
    functions = [node for node in conftest.nodes if isinstance(node, ast.FunctionDef)]
    return {f.name for f in functions if any("fixture" in ast.unparse(d) for d in f.decorator_list)}


def iterate_references(source: Source, sources: dict[str, Source]) -> Iterator[str]:
    """Dotted names that a file imports, or that stand in it as a string."""
    for node in source.nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = make_absolute(source.package, node.level, node.module or "")
            for alias in node.names:
                yield from find_homes(origin, alias.name, sources)
    for text in source.strings:
        level = len(text) - len(text.lstrip("."))
        name = make_absolute(source.package, level, text[level:])
        yield from (n for n in (name, f"{source.package}.{name}") if "." in text and n in sources)


def make_absolute(package: str, level: int, name: str) -> str:
    """The absolute form of a relative import."""
    if not level:
        return name
    parts = package.split(".")
    return ".".join((*parts[: len(parts) - level + 1], *filter(None, [name])))


def find_homes(package: str, name: str, sources: dict[str, Source]) -> Iterator[str]:
    """Where ``from package import name`` finds the name: a module, or where the package imports it from.

    A package may have both: ``cmt_edge.export`` is a module and, called, a function of another one.
    """
    if package not in sources or f"{package}.{name}" in sources:
        yield f"{package}.{name}"
    if package not in sources:
        return
    source = sources[package]
    imports = [node for node in source.nodes if isinstance(node, ast.ImportFrom)]
    found = [(i, alias) for i in imports for alias in i.names if (alias.asname or alias.name) == name]
    for statement, alias in found:
        origin = make_absolute(source.package, statement.level, statement.module or "")
        if origin != package:
            yield from find_homes(origin, alias.name, sources)
    if not found:
        yield package


def find_nearest(name: str, sources: dict[str, Source]) -> str | None:
    """The module that a dotted name lies in; None if it is none of ours."""
    while name and name not in sources:
        name = name.rpartition(".")[0]
    return name or None


def list_packages(name: str) -> list[str]:
    """The packages above a dotted name."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(1, len(parts) + 1)]


# --- the choice -----------------------------------------------------------------------------------


def measure_distances(changed: Iterable[Path], sources: dict[str, Source]) -> dict[str, int]:
    """Path of each related test module -> the number of imports between it and the change."""
    changed = list(changed)
    known = {name for path in changed if (name := name_module(path)) in sources}
    others = [path for path in changed if name_module(path) not in sources]
    reached = dict.fromkeys(sorted(known), 0)
    for name, source in sources.items():
        if source.runs_first & known or any(reads(source, path) for path in others):
            reached.setdefault(name, 1)
    waiting = deque(reached)
    while waiting:
        name = waiting.popleft()
        for reader in sources.values():
            if name in reader.imported and reader.name not in reached:
                reached[reader.name] = reached[name] + 1
                waiting.append(reader.name)
    return {sources[name].path.as_posix(): steps for name, steps in reached.items() if sources[name].is_test}


def reads(source: Source, path: Path) -> bool:
    """Whether a test module or a helper names a file that is no module, or a folder that the file lies in."""
    if source.name.startswith("cmt_edge"):
        return False
    if path.is_relative_to("tests/fakes"):
        return source.is_test and uses_fakes(source)
    names = {path.name, path.stem, *(set(path.parts[:-1]) - COMMON_FOLDERS)}
    return any(text in names or text.endswith(f"/{path.name}") for text in source.strings)


def uses_fakes(source: Source) -> bool:
    """Whether a test module names the fakes or the fixture that installs them."""
    names = {node.id for node in source.nodes if isinstance(node, ast.Name)}
    return bool((names | source.words) & set(USERS_OF_FAKES))


def choose(
    changed: Iterable[Path],
    sources: dict[str, Source],
    seconds: dict[str, float],
    budget: float = BUDGET_S,
) -> tuple[list[str], list[str]]:
    """Paths of the test modules that run, the changed and nearest first, and of those for which no time is
    left."""
    steps = measure_distances(changed, sources)
    changed_tests = sorted(name for name, distance in steps.items() if distance == 0)
    always = [name for name in ALWAYS if (ROOT / name).exists()]
    chosen = list(dict.fromkeys([*changed_tests, *always]))
    spent = sum(seconds.get(name, UNKNOWN_S) for name in chosen)
    left_out = []
    for name in sorted(steps, key=lambda name: (steps[name], seconds.get(name, UNKNOWN_S), name)):
        if name in chosen:
            continue
        cost = seconds.get(name, UNKNOWN_S)
        if spent + cost <= budget:
            chosen.append(name)
            spent += cost
        else:
            left_out.append(name)
    return chosen, left_out


# --- the record -----------------------------------------------------------------------------------


def read_record() -> dict[str, float]:
    """Path of a test module -> seconds of its fast tests; empty without a record."""
    if not RECORD.exists():
        return {}
    content: dict[str, float] = json.loads(RECORD.read_text(encoding="utf-8"))
    return content


def read_processor_time() -> float:
    """Seconds that this process and its finished children have computed; other work does not count."""
    return sum(os.times()[:4])


@dataclass
class Clock:
    """A plugin of pytest that adds up the seconds of each test module, fixtures included."""

    seconds: dict[str, float] = field(default_factory=dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        start = read_processor_time()
        result = yield
        path = item.path.relative_to(ROOT).as_posix()
        self.seconds[path] = self.seconds.get(path, 0.0) + read_processor_time() - start
        return result


def record(modules: list[str]) -> int:
    """Run the fast tests of ``modules``, or all, and write their seconds; returns pytest's exit code."""
    clock = Clock()
    code = pytest.main(["-p", "no:cacheprovider", "-m", FAST, *modules], plugins=[clock])
    measured = {path: round(seconds, 1) for path, seconds in clock.seconds.items()}
    seconds = dict(sorted((read_record() | measured).items()))
    RECORD.write_text(json.dumps(seconds, indent=1) + "\n", encoding="utf-8")
    return int(code)


# --- the command ----------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Print the choice, or write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", nargs="?", metavar="BASE", help="the commit that the change is seen from")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="seconds of tests")
    parser.add_argument("--record", nargs="*", metavar="TEST_MODULE", help="measure these modules, or all")
    options = parser.parse_args(arguments)
    if options.record is not None:
        return record(options.record)
    changed = changed_files(options.base)
    chosen, left_out = choose(changed, read_sources(ROOT), read_record(), options.budget)
    if left_out:
        print(f"no time for {len(left_out)} related test modules (make test runs them):", file=sys.stderr)
        print(*(f"  {name}" for name in left_out), sep="\n", file=sys.stderr)
    print(*chosen, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
