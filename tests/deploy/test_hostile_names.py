"""Labels, file names and manifest texts that try to steer the terminal, over every command."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import unicodedata
from pathlib import Path

import pytest

from cmt_edge.deploy.bundle import MANIFEST
from cmt_edge.deploy.cli import bench, predict, verify
from cmt_edge.deploy.escaping import UNSAFE
from cmt_edge.export import cli as export
from helpers.bundles import edit_manifest, make_bundle
from helpers.images import coloured

HOSTILE = "\x1b[2J\x1b]0;x\x07\rgood\x9b31m\u202egpj\u2066\x7f\x0b"
"""A file name that clears the screen, sets the title, hides its start and turns round."""
LABELS = (f"red{HOSTILE}\0\nerror: all is lost", f"green{HOSTILE}\t", f"blue{HOSTILE}")
FAST = ["--iters", "2", "--seconds", "0", "--warmup", "1"]


@pytest.fixture
def folder(tmp_path) -> Path:
    made = tmp_path / HOSTILE
    made.mkdir()
    return made


@pytest.fixture
def bundle(folder):
    return make_bundle(folder / f"bundle|<b>\nerror: all is lost\n{HOSTILE}", labels=LABELS)


@pytest.fixture
def images(folder) -> Path:
    """Class folders with a good image, a bad one, and files of other kinds, all with hostile names."""
    place = folder / "images"
    for name in ("red", "green", "blue"):
        (place / f"{name}{HOSTILE}").mkdir(parents=True)
        (place / f"{name}{HOSTILE}" / f"{HOSTILE}.png").write_bytes(coloured(name))
    (place / f"red{HOSTILE}" / f"a\nerror: b{HOSTILE}.png").write_bytes(coloured("red"))
    (place / f"red{HOSTILE}" / f"notes.{HOSTILE}").write_text("no image")
    with contextlib.suppress(OSError):  # a file system may insist on UTF-8
        (place / f"blue{HOSTILE}" / os.fsdecode(b"\xff\xfe.png")).write_bytes(coloured("blue"))
    return place


@pytest.fixture
def printed(capsys):
    """Runs a command; its exit code and all that it printed, which is safe."""

    def run(command, *argv) -> tuple[int, str, str]:
        try:
            code = command([str(a) for a in argv])
        except SystemExit as exc:
            code = exc.code
        out, err = capsys.readouterr()
        unsafe = [c for c in out + err if c not in "\n\t" and unicodedata.category(c) in UNSAFE]
        assert not unsafe, repr(out + err)
        assert not [line for line in (out + err).splitlines() if line == "error: all is lost"]
        assert "Traceback" not in err
        return code, out, err

    return run


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_predict(printed, bundle, images, form, monkeypatch):
    if form == ["--csv"]:  # a program gets names as they are, see test_cli.py
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    count = len(list(images.rglob("*.png")))
    (images / f"red{HOSTILE}" / f"bad{HOSTILE}.png").write_bytes(b"no image")
    code, out, err = printed(predict.main, bundle.path, images, *form)
    assert code == 2
    assert "\\u001b[2J" in out
    assert "\\u001b[2J" in err
    if form == ["--json"]:
        lines = [json.loads(line) for line in out.splitlines()]
        answers = [line for line in lines if "error" not in line]
        assert (len(answers), len(lines)) == (count, count + 1)
        assert {top["label"] for answer in answers for top in answer["top"]} == set(LABELS)
        assert {answer["source"] for answer in answers} < {str(path) for path in images.rglob("*.png")}
    if not form:
        assert len(out.splitlines()) == count, "a name or a label must not begin a line"


def test_predict_of_what_does_not_exist(printed, bundle, folder):
    for argv in (
        (bundle.path, folder / "no"),
        (folder / "no", "a"),
        (bundle.path, "a", "--backend", HOSTILE),
    ):
        code, _, err = printed(predict.main, *argv)
        assert code == 2
        assert "u001b" in err or "x1b" in err


def test_an_argument_that_is_unknown(printed):
    for command in (predict.main, verify.main, bench.main, export.main):
        code, _, err = printed(command, "a", "b", f"--{HOSTILE}")
        assert code == 2
        assert "\\u001b" in err


def test_verify(printed, bundle, images):
    assert printed(verify.main, bundle.path)[0] == 0
    code, _, err = printed(verify.main, bundle.path, "--data", images)
    assert code in (2, 3)
    assert "\\u001b" in err
    assert printed(verify.main, bundle.path, "--json")[0] == 0


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_bench_and_its_markdown(printed, bundle, images, tmp_path, form):
    target = tmp_path / "a.md"
    argv = [bundle.path, "--data", images, "--markdown", target, "--no-throughput", *FAST, *form]
    code, out, err = printed(bench.main, *argv)
    assert code == 0
    assert "\\u001b" in out
    assert "skipped" in err
    text = target.read_text(encoding="utf-8")
    assert not [c for c in text if c != "\n" and unicodedata.category(c) in UNSAFE]
    assert "\n| bundle\\|\\<b\\>\\\\nerror" in text


@pytest.mark.parametrize(
    "entry",
    [
        ("model", "name"),
        ("model", "family"),
        ("model", "provider"),
        ("labels_source",),
        ("format",),
    ],
)
def test_texts_of_a_manifest(printed, bundle, entry):
    def change(content):
        inner = content
        for key in entry[:-1]:
            inner = inner[key]
        inner[entry[-1]] = HOSTILE + "\nerror: all is lost"

    edit_manifest(bundle, change)
    for command, argv in ((predict.main, ["a.png"]), (verify.main, []), (bench.main, FAST)):
        printed(command, bundle.path, *argv)
    (bundle.path / MANIFEST).write_text("{" + HOSTILE)
    assert printed(verify.main, bundle.path)[0] == 2


def test_export(printed, folder, images):
    pytest.importorskip("torch")
    names = folder / f"labels{HOSTILE}.txt"
    names.write_text("\n".join(["a", HOSTILE]), encoding="utf-8")
    settings = folder / f"settings{HOSTILE}.toml"
    settings.write_text(f"{json.dumps('a' + HOSTILE)} = 1")
    checkpoint = folder / f"weights{HOSTILE}.pth"
    checkpoint.write_bytes(b"no checkpoint")
    base = ["--model", "cmt_nano", "--dry-run", "-o", folder / "out"]
    for argv in (
        [*base, "--weights", checkpoint],
        [*base, "--weights", folder / "absent"],
        [*base, "--weights", "random", "--labels", names],
        [*base, "--weights", "random", "--labels", folder / "absent"],
        [*base, "--weights", "random", "--eval-data", images],
        [*base, "--weights", "random", "--int8", "--data", folder / "absent"],
        [*base, "--config", settings],
        [*base, "--name", HOSTILE],
        [*base, "--format", HOSTILE],
        ["--model", HOSTILE, "--dry-run"],
        ["--model", f"{HOSTILE}:build", "--dry-run"],
    ):
        code, out, err = printed(export.main, *argv)
        assert (code, out) == (2, ""), err
    code, out, _ = printed(export.main, *base, "--weights", "random")
    assert code == 0
    assert "\\u001b" in out
