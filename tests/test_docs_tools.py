"""The scripts behind the pages, and the commands and the Python that the pages show."""

from __future__ import annotations

import ast
import re
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest

from cmt_edge.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCES = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def read_fences(*languages: str) -> list[tuple[str, str]]:
    """(page, text) of every block in one of the languages."""
    found = []
    for page in PAGES:
        blocks = FENCES.findall(page.read_text(encoding="utf-8"))
        found += [(page.relative_to(ROOT).as_posix(), text) for kind, text in blocks if kind in languages]
    return found


def read_commands() -> list[tuple[str, str]]:
    """(page, words) of every command of ours that a page tells its reader to run."""
    found = []
    for page, text in read_fences("sh", "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            first = words[0] if words else ""
            if first == "cmt-edge" and len(words) > 1:
                found.append((page, words[1:]))
            elif first.startswith("cmt-") and first.removeprefix("cmt-") in COMMANDS:
                found.append((page, [first.removeprefix("cmt-"), *words[1:]]))
    return found


# The packages of the site


def list_imports(path: Path) -> set[str]:
    """The packages that a module imports when it is imported itself."""
    found = set()
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Import):
            found |= {name.name for name in statement.names}
        elif isinstance(statement, ast.ImportFrom) and not statement.level:
            found.add(statement.module or "")
    return {name.split(".")[0] for name in found}


def test_the_site_has_or_replaces_every_package_that_an_export_imports():
    """The API page imports these modules in an environment without PyTorch."""
    (mocked,) = re.findall(
        r"^autodoc_mock_imports = (\[.*?\])", (ROOT / "docs/conf.py").read_text(encoding="utf-8"), re.M | re.S
    )
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements/docs.txt").read_text(encoding="utf-8"), re.M)
    known = {*ast.literal_eval(mocked), *pinned, "PIL", "cmt_edge"} | sys.stdlib_module_names
    modules = [path for room in ("cmt", "calib", "export") for path in (ROOT / room).rglob("*.py")]
    assert len(modules) > 60
    missing = {str(path): lacking for path in modules if (lacking := list_imports(path) - known)}
    assert missing == {}


# The commands and the Python that pages show


def test_every_command_of_a_page_is_understood(capsys):
    commands = read_commands()
    assert len(commands) > 60
    parsers = {
        name: import_module(f"cmt_edge.{known.module}").build_parser() for name, known in COMMANDS.items()
    }
    faults = []
    for page, (name, *words) in commands:
        if name.startswith("--"):  # of cmt-edge itself
            continue
        try:
            parsers[name].parse_args(words)
        except SystemExit as ended:
            if ended.code:
                faults.append(f"{page}: cmt-edge {name} {shlex.join(words)}: {capsys.readouterr().err}")
    assert not faults


def test_python_of_pages_is_python():
    blocks = read_fences("python")
    assert len(blocks) > 10
    for page, text in blocks:
        try:
            ast.parse(text)
        except SyntaxError as exc:
            pytest.fail(f"{page}: {exc}")


# Outputs


def test_figures_of_a_machine_are_no_drift(script):
    outputs = script("docs_outputs")
    one = (
        "median 0.93 ms a batch\nran as: int8 61 % + bf16 37 % + fp32 2 %\n(2.1 MB)\nx  1.00 (0.99-1.01)\n"
        "y  2 %  0.54  z\nby 1.2e-05 (allowed)\nint8   int8 68 % + bf16 30 % +   2 %  on\n          fp32 2 %"
    )
    two = (
        "median 12.1 ms a batch\nran as: fp32 100 %\n(2.0 MB)\nwarning: drift\n  on\nx   1.02 (0.90-1.10)\n"
        "y 19 %   -  z\nby 2e-06 (allowed)\nint8   int8 67 % + fp32 33 %   2 %  on"
    )
    assert outputs.simplify(one) == outputs.simplify(two)


@pytest.mark.parametrize(
    "changed",
    ["verified", "golden images: 5; pixels agree", "ship 91.7 %, cat 1.1 %", "next:\n  cmt-edge bench"],
)
def test_other_words_are_drift(script, changed):
    outputs = script("docs_outputs")
    block = outputs.Block("page.md", f"$ cmt-edge verify x\n{changed}\n", False)
    same = f"$ cmt-edge verify x\n{changed.replace('91.7', '88.2')}\n"
    assert outputs.find_drift(block, same) == ""
    assert "page.md" in outputs.find_drift(block, "$ cmt-edge verify x\nsomething else\n")


def test_a_failing_command_of_a_page_is_named(script, tmp_path):
    outputs = script("docs_outputs")
    with pytest.raises(SystemExit, match="only cmt-edge, python can be run"):
        outputs.run_command("rm -r x", tmp_path, {})


def test_a_command_of_two_pages_is_run_once_and_one_shows_a_part(script, tmp_path, monkeypatch):
    outputs = script("docs_outputs")
    pages = {
        "a.md": "<!-- scripts/docs_outputs.py -->\n```console\n$ python x\n```\n",
        "b.md": "<!-- scripts/docs_outputs.py: slow, only top -->\n```console\n$ python x\nold\n```\n",
        "c.md": "<!-- scripts/docs_outputs.py: data -->\n```console\n$ python y\nold\n```\n",
    }
    for name, text in pages.items():
        (tmp_path / name).write_text(text)
    ran = []

    def run(line, folder, environment):
        ran.append(line)
        return f"first {len(ran)}\ntop {len(ran)}\n  folded\nlast"

    monkeypatch.setattr(outputs, "ROOT", tmp_path)
    monkeypatch.setattr(outputs, "PAGES", tuple(pages))
    monkeypatch.setattr(outputs, "run_command", run)
    (tmp_path / "examples").mkdir()
    assert outputs.main(["--folder", str(tmp_path / "work")]) == 0
    assert ran == ["python x"]
    assert "$ python x\nfirst 1\ntop 1\n  folded\nlast\n```" in (tmp_path / "a.md").read_text()
    assert "$ python x\ntop 1\n  folded\n```" in (tmp_path / "b.md").read_text()
    assert "old" in (tmp_path / "c.md").read_text()  # without data it is left alone


def test_the_readme_has_the_accuracy_of_the_guide(script):
    outputs = script("docs_outputs")
    shown, whole = (
        [block for block in outputs.read_blocks(page, (ROOT / page).read_text()) if block.needs_data]
        for page in ("README.md", "docs/guides/my-checkpoint.md")
    )
    assert len(shown) == len(whole) == 1
    assert shown[0].text == "\n".join(
        [f"$ {whole[0].commands[0]}", outputs.choose_lines(whole[0].text, shown[0].only), ""]
    )


@pytest.mark.slow
def test_the_pages_show_what_the_commands_print(script, int8_bundle, tmp_path, capsys):
    outputs = script("docs_outputs")
    blocks = [
        block for page in outputs.PAGES for block in outputs.read_blocks(page, (ROOT / page).read_text())
    ]
    assert sum(not block.is_slow for block in blocks) >= 4
    arguments = ["--check", "--quick", "--folder", str(tmp_path / "work"), "--bundle", str(int8_bundle.path)]
    assert outputs.main(arguments) == 0, capsys.readouterr().err


# The settings


def test_the_settings_page_is_current(script, capsys):
    assert script("settings_reference").main(["--check"]) == 0, capsys.readouterr().err


def test_another_settings_page_is_noticed(script, capsys, tmp_path, monkeypatch):
    settings = script("settings_reference")
    monkeypatch.setattr(settings, "PAGE", tmp_path / "settings.md")
    assert settings.main(["--check"]) == 1
    assert "scripts/settings_reference.py" in capsys.readouterr().err
    assert settings.main([]) == settings.main(["--check"]) == 0


# The site


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="b.html#x">b</a>', ""),
        ('<a href="https://example.org/">out</a>', ""),
        ('<a href="gone.html">gone</a>', "leads to no file"),
        ('<a href="b.html#y">b</a>', "leads to no heading"),
        ('<script src="https://cdn.example.org/a.js"></script>', "loads https"),
        ('<img src="//cdn.example.org/a.png">', "loads //cdn"),
        ('<link rel="stylesheet" href="https://fonts.example.org/a.css">', "loads https"),
    ],
)
def test_a_site_is_checked(script, tmp_path, body, fault):
    site = script("check_site")
    (tmp_path / "a.html").write_text(f"<html><body>{body}</body></html>")
    (tmp_path / "b.html").write_text('<html><body><h1 id="x">b</h1></body></html>')
    faults = site.find_faults(tmp_path)
    assert (fault in faults[0]) if fault else not faults
    assert site.main([str(tmp_path)]) == bool(fault)


def test_style_sheets_that_load_fonts_are_found(script, tmp_path):
    (tmp_path / "a.html").write_text("<html></html>")
    (tmp_path / "a.css").write_text("@import 'https://fonts.example.org/x.css'; b { color: red }")
    assert script("check_site").find_faults(tmp_path) == ["a.css loads https://fonts.example.org/x.css"]


def test_a_folder_without_pages_is_no_site(script, tmp_path):
    assert script("check_site").find_faults(tmp_path)
