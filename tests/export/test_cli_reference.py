"""``docs/cli.md`` is what the commands say of themselves."""

from __future__ import annotations

import importlib.util

import pytest

from cmt_edge import startup
from helpers.paths import ROOT


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "scripts" / "cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")  # what scripts share lies beside them
        spec.loader.exec_module(module)
    yield module
    startup.front.clear()


def test_the_page_is_current(script, capsys):
    assert script.main(["--check"]) == 0, capsys.readouterr().err


def test_another_page_is_noticed_and_written_again(script, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "PAGE", tmp_path / "cli.md")
    assert script.main(["--check"]) == 1
    assert "scripts/cli_reference.py" in capsys.readouterr().err
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
    script.PAGE.write_text(script.PAGE.read_text() + "\n")
    assert script.main(["--check"]) == 1


def test_every_flag_is_on_the_page(script):
    page = script.write_reference()
    for flag in (
        "--calib-size",
        "--no-build",
        "--half",
        "--isa",
        "--topk",
        "--time-limit",
        "--plot",
        "--limit",
    ):
        assert f"`{flag}`" in page
    assert page.count("\n## cmt-edge ") == len(script.COMMANDS) == 9
