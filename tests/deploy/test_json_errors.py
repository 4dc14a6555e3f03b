"""With ``--json`` every command ends with an object, whatever went wrong."""

from __future__ import annotations

import json
from importlib import import_module

import pytest

from cmt_edge.__main__ import COMMANDS
from helpers.bundles import make_bundle

NEEDS_TORCH = {"export", "models"}
"""Commands of the exporting machine, which devices lack."""
MORE = {"predict": ["x.jpg"], "serve-repo": ["-o", "models", "--for", "triton"]}
"""What a command needs beside a bundle."""


def answer(capsys: pytest.CaptureFixture[str], name: str, *words: object) -> tuple[int, dict]:
    """The exit code of a command with ``--json``, and the error that it prints last on standard output."""
    main = import_module(f"cmt_edge.{COMMANDS[name].module}").main
    try:
        code = main([*map(str, words), "--json", "-q"])
    except SystemExit as ended:
        code = ended.code
    printed = capsys.readouterr().out
    return code, json.loads(printed.splitlines()[-1])["error"]


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag(capsys, name):
    if name in NEEDS_TORCH:
        pytest.importorskip("torch")
    code, error = answer(capsys, name, "--no-such-flag")
    assert (code, error["exit_code"], error["kind"]) == (2, 2, "UsageError")
    assert "--no-such-flag" in error["what"]


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in {*NEEDS_TORCH, "doctor"}])
def test_a_bundle_that_does_not_exist(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    code, error = answer(capsys, name, "nope", *MORE.get(name, []))
    assert (code, error["kind"], error["where"]) == (2, "BundleError", "nope")
    assert error["remedy"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("report", ["-o", "none/x.html"]),
        ("report", ["--figures", "none/x.json"]),
        ("bench", ["--markdown", "none/x.md"]),
        ("verify", ["--html", "none/x.html"]),
    ],
)
def test_a_file_that_cannot_be_written(capsys, tmp_path, monkeypatch, name, flags):
    """Once standard error alone said it: only what standard output itself does not take belongs there."""
    monkeypatch.chdir(tmp_path)
    code, error = answer(capsys, name, make_bundle(tmp_path / "tiny").path, *flags)
    assert (code, error["kind"], error["where"]) == (2, "OutputError", flags[1])
