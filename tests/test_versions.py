"""The version comes from Git's tags, and everything that tells it says the same."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

import cmt_edge
from helpers.paths import ROOT

pytestmark = [
    pytest.mark.skipif(
        find_spec("setuptools_scm") is None, reason="needs setuptools-scm, which makes the version"
    ),
    pytest.mark.skipif(find_spec("tomllib") is None, reason="needs Python 3.11, which reads TOML"),
]

AUTHOR = {
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def git(folder: Path, *words: str) -> str:
    command = ["git", "-c", "init.defaultBranch=main", *words]
    return subprocess.check_output(command, cwd=folder, env={**os.environ, **AUTHOR}, text=True).strip()


def read_version(folder: Path) -> str:
    """The version that a build of ``folder`` gets."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SETUPTOOLS_SCM")}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-m", "setuptools_scm"],
        cwd=folder,
        env={**kept, "GIT_CEILING_DIRECTORIES": str(folder.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small repository with the project's settings and two commits."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    git(folder, "init", "--quiet")
    for message in ("first", "second"):
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "--allow-empty", "-m", message)
    return folder


def test_a_tag_is_the_version_and_later_commits_are_told_apart(checkout):
    git(checkout, "tag", "-a", "v1.2.0", "-m", "1.2.0")
    assert read_version(checkout) == "1.2.0"
    git(checkout, "commit", "--quiet", "--allow-empty", "-m", "third")
    version = read_version(checkout)
    public, _, node = version.partition("+g")
    assert public == "1.2.1.dev1"
    assert git(checkout, "rev-parse", "HEAD").startswith(node)
    (checkout / "pyproject.toml").write_text(
        (checkout / "pyproject.toml").read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8"
    )
    assert read_version(checkout).startswith(f"{version}.d20")


def test_a_checkout_without_tags_has_no_released_version(checkout):
    public, _, node = read_version(checkout).partition("+g")
    assert public == "0.0.1.dev2"
    assert git(checkout, "rev-parse", "HEAD").startswith(node)


def test_files_without_git_have_no_version(checkout):
    (checkout / ".git").rename(checkout.parent / "elsewhere")
    assert read_version(checkout) == "0.0.0"


def test_package_command_and_installation_say_the_same(capsys):
    from cmt_edge.__main__ import main

    version = metadata.version("cmt-edge")
    assert cmt_edge.__version__ == version
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cmt-edge {version}\n"


def test_a_bundle_records_the_version(fp32_bundle):
    assert fp32_bundle.manifest.versions["cmt-edge"] == cmt_edge.__version__
