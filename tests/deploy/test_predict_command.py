"""cmt-predict: answers on standard output, one message with a remedy on standard error, exit codes."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.cli import bench as cmt_bench
from cmt_edge.deploy.cli import predict as cmt_predict
from cmt_edge.deploy.cli import verify as cmt_verify
from cmt_edge.deploy.images import ImageSet
from helpers.bundles import make_bundle, recorded_bundle
from helpers.cli import strict
from helpers.images import coloured, coloured_folder, folder_of


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return recorded_bundle(tmp_path / "tiny")


@pytest.fixture
def images(tmp_path) -> Path:
    return coloured_folder(tmp_path / "images")


def test_predict_text(call, bundle, images):
    code, out, err = call(
        cmt_predict.main, bundle.path, images / "red/000.png", images / "blue/001.png", "--topk", 2
    )
    assert code == 0
    assert err == ""
    first, second = out.splitlines()
    assert first.startswith(str(images / "red/000.png"))
    assert " red " in first
    assert first.count("%") == 2
    assert " blue " in second
    assert second.index("blue 5") == first.index("red 5")


def test_predict_json(call, bundle, images):
    code, out, _ = call(
        cmt_predict.main, bundle.path, images / "green/000.png", images / "red/000.png", "--json"
    )
    assert code == 0
    predictions = [strict(line) for line in out.splitlines()]
    assert [p["source"] for p in predictions] == [
        str(images / "green/000.png"),
        str(images / "red/000.png"),
    ]
    top = predictions[0]["top"]
    assert top[0]["label"] == "green"
    assert len(top) == 3
    assert sum(t["probability"] for t in top) == pytest.approx(1, abs=1e-5)


def test_predict_folder(call, bundle, images):
    (images / "notes.txt").write_text("no image")
    code, out, err = call(cmt_predict.main, bundle.path, images, "--json")
    assert code == 0
    assert err == f"note: {images}: 1 file was skipped: 1 .txt\n"
    predictions = [json.loads(line) for line in out.splitlines()]
    assert [p["source"] for p in predictions] == sorted(str(p) for p in images.rglob("*.png"))
    assert all(p["top"][0]["label"] == Path(p["source"]).parent.name for p in predictions)


def test_predict_folder_ignores_hidden_files(call, bundle, images):
    """File managers leave companions such as ``._000.png`` that are no images."""
    (images / "red" / "._000.png").write_bytes(b"\0\5\x16\7 resource fork")
    code, out, err = call(cmt_predict.main, bundle.path, images, "--json")
    assert code == 0, err
    assert len(out.splitlines()) == 9


def test_predict_with_real_bundles(call, fp32_bundle, int8_bundle, cifar, tmp_path):

    data = ImageSet(cifar / "test")
    for i, item in enumerate(data.items[::700]):
        (tmp_path / f"{i}_{item.label}.jpg").write_bytes(data.read(item))
    answers = []
    for path, backend in (
        (fp32_bundle.path, "openvino"),
        (fp32_bundle.path, "onnxruntime"),
        (int8_bundle.path, "openvino"),
    ):
        code, out, _ = call(
            cmt_predict.main, path, tmp_path, "--backend", backend, "--threads", 1, "--json", "--topk", 1
        )
        assert code == 0
        answers.append([json.loads(line)["top"][0]["label"] for line in out.splitlines()])
    truth = [p.stem.split("_")[1] for p in sorted(tmp_path.glob("*.jpg"))]
    assert answers[0] == answers[1]
    for labels in answers:
        assert sum(a == t for a, t in zip(labels, truth, strict=True)) >= len(truth) - 2


def test_predict_failures(fails, bundle, images, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    picture = images / "red/000.png"
    assert "absent.png" in fails(2, cmt_predict.main, bundle.path, tmp_path / "absent.png")
    assert "bad.jpg" in fails(2, cmt_predict.main, bundle.path, tmp_path / "bad.jpg")
    assert "both" in fails(2, cmt_predict.main, bundle.path, picture, "--json", "--csv")
    assert "no images" in fails(2, cmt_predict.main, bundle.path, tmp_path / "empty")
    assert "absent" in fails(2, cmt_predict.main, tmp_path / "absent", picture)
    assert "openvino" in fails(2, cmt_predict.main, bundle.path, picture, "--backend", "openvin")
    assert "x" * 20 in fails(2, cmt_predict.main, bundle.path, "x" * 5000)
    assert "x" * 20 in fails(2, cmt_predict.main, "x" * 5000, picture)


def test_predict_of_a_bundle_in_place_of_images(fails, bundle, images):
    err = fails(2, cmt_predict.main, images / "red/000.png", bundle.path)
    assert "is a bundle, and stands where images belong" in err
    (images / "manifest.json").write_text('{"a file of": "another program"}')
    assert cmt_predict.main([str(bundle.path), str(images)]) == 0


def test_predict_of_an_address(fails, bundle):
    assert "nothing is downloaded" in fails(2, cmt_predict.main, bundle.path, "https://example.org/ship.jpg")


def test_a_manifest_in_place_of_its_folder(fails, bundle):
    assert f"lies in, {bundle.path}" in fails(2, cmt_verify.main, bundle.path / "manifest.json")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a folder that is in use")
@pytest.mark.parametrize(
    "argv", [("report", "{bundle}"), ("export", "--model", "cmt_nano", "--dry-run")], ids=lambda v: v[0]
)
def test_a_command_in_a_folder_that_was_deleted(bundle, tmp_path, argv):
    (tmp_path / "gone").mkdir()
    words = [word.format(bundle=bundle.path) for word in argv]
    script = 'cd "$1" && rmdir "$1" && shift && exec "$@"'
    command = ["sh", "-c", script, "sh", tmp_path / "gone", sys.executable, "-m", "cmt_edge", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "does not exist any more" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_predict_goes_on_past_bad_files(call, bundle, images, form):
    (images / "green" / "001.png").write_bytes(b"no image")
    (images / "red" / "000.png").write_bytes(b"")
    absent = images / "absent.png"
    code, out, err = call(cmt_predict.main, bundle.path, absent, images, *form)
    assert code == 2
    good = sorted(p for p in images.rglob("*.png") if p.stat().st_size > 10)
    lines = out.splitlines()[1:] if form == ["--csv"] else out.splitlines()
    if form == ["--json"]:
        told = [json.loads(line)["error"]["where"] for line in lines if '"error"' in line]
        assert sorted(told) == sorted(map(str, (absent, images / "green/001.png", images / "red/000.png")))
        lines = [line for line in lines if '"error"' not in line]
    assert len(lines) == len(good) == 7
    assert all(str(path) in line for path, line in zip(good, lines, strict=True))
    assert all(
        path.parent.name in line.replace(str(path), "") for path, line in zip(good, lines, strict=True)
    )
    assert err.count("error: ") == 3
    for bad in (absent, images / "green/001.png", images / "red/000.png"):
        assert str(bad) in err
    assert err.endswith("3 of 10 images could not be read\n")


def test_predict_prints_answers_as_they_come(bundle, images, monkeypatch, capsys):
    """What was printed before an interruption stays printed."""
    told: list[str] = []

    def interrupted(self, sources, **_):
        for answer in self.predict(list(sources)[:4]):
            told.append(capsys.readouterr().out)
            yield answer
        raise KeyboardInterrupt

    monkeypatch.setattr(cmt_predict.Predictor, "attempt", interrupted)
    assert cmt_predict.main([str(bundle.path), str(images)]) == 130
    assert [text.count("%") for text in told] == [0, 3, 3, 3]
    assert capsys.readouterr().out.count("%") == 3


PIPED = """
import sys
from cmt_edge.deploy.cli.predict import main
sys.exit(main(sys.argv[1:]))
"""


def piped(bundle, *argv, **streams) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PIPED, str(bundle.path), *map(str, argv)], **streams)


@pytest.fixture
def many(tmp_path) -> Path:
    return folder_of(tmp_path / "many", {"red": [coloured("red", s % 200) for s in range(3000)]}).path


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_predict_stops_for_a_reader_that_has_seen_enough(bundle, many, form):
    """``cmt-predict BUNDLE FOLDER | head -1`` does not go on for an hour."""
    (many / "red" / "000.png").write_bytes(b"no image")
    process = piped(bundle, many, *form, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first = process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) == 2, "a bad image came before"
    assert first
    assert "BrokenPipe" not in errors
    assert errors.count("error: ") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_predict_into_a_full_output_gives_all_answers_on_standard_error(bundle, images, form):
    with open("/dev/full", "w") as full:
        process = piped(bundle, images, *form, stdout=full, stderr=subprocess.PIPE)
        errors = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 2
    assert sum(str(path) in errors for path in images.rglob("*.png")) == 9
    assert errors.count("error: standard output cannot be written to") == 1
    assert "Traceback" not in errors


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux's /dev/full")
@pytest.mark.parametrize("is_bad", [False, True])
def test_predict_with_a_full_standard_error_answers_all_the_same(bundle, images, is_bad):
    if is_bad:
        (images / "red" / "000.png").write_bytes(b"no image")
    with open("/dev/full", "w") as full:
        process = piped(bundle, images, stdout=subprocess.PIPE, stderr=full)
        answers = process.communicate(timeout=60)[0].decode()
    assert process.returncode == (2 if is_bad else 0)
    assert len(answers.splitlines()) == (8 if is_bad else 9)


def test_predict_in_ascii(tmp_path, images):
    bundle = make_bundle(tmp_path / "b", labels=("rød 猫", "green", "blue"))
    done = piped(
        bundle, images, "--json", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    answers = [json.loads(line) for line in done.communicate(timeout=60)[0].decode("ascii").splitlines()]
    assert done.returncode == 0
    assert {answer["top"][0]["label"] for answer in answers} == {"rød 猫", "green", "blue"}


def test_predict_says_what_json_is(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = call(cmt_predict.main, "--help")
    assert (
        "print every answer, and every error, as one machine-readable object on a line of its own"
        in " ".join(out.split())
    )
    _, out, _ = call(cmt_verify.main, "--help")
    assert "print one machine-readable object last" in " ".join(out.split())


def test_predict_csv(call, bundle, images):
    (images / "red" / 'a, "b".png').write_bytes(coloured("red"))
    code, out, err = call(cmt_predict.main, bundle.path, images, "--csv", "--topk", 2)
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert list(rows[0]) == ["source", "label_1", "probability_1", "label_2", "probability_2"]
    assert [row["source"] for row in rows] == sorted(str(p) for p in images.rglob("*.png"))
    assert all(row["label_1"] == Path(row["source"]).parent.name for row in rows)
    assert all(0.3 < float(row["probability_1"]) <= 1 for row in rows)


AWKWARD_NAMES = ["a\nb", "a\rb", "a\r\nb", 'a "b", c', "=1+1", "\x1b[2J", "\u2028", "\t"]


@pytest.mark.parametrize("name", AWKWARD_NAMES)
def test_predict_csv_gives_one_row_with_the_name_as_it_is(call, bundle, tmp_path, name):
    picture = tmp_path / f"{name}.png"
    picture.write_bytes(coloured("red"))
    code, out, _ = call(cmt_predict.main, bundle.path, picture, "--csv", "--topk", 1)
    header, row = list(csv.reader(io.StringIO(out, newline="")))
    assert (code, header[0], row[:2]) == (0, "source", [str(picture), "red"])


def test_predict_csv_of_a_name_that_is_no_text(bundle, tmp_path):
    picture = tmp_path / os.fsdecode(b"\xff.png")
    try:
        picture.write_bytes(coloured("red"))
    except OSError:
        pytest.skip("the file system insists on UTF-8")
    process = piped(bundle, os.fsencode(picture).decode("utf-8", "surrogateescape"), "--csv", stdout=-1)
    out = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 0
    assert "\\udcff.png" in out


def test_predict_csv_has_as_many_columns_as_classes(call, bundle, images):
    _, out, _ = call(cmt_predict.main, bundle.path, images / "red/000.png", "--csv", "--topk", 9)
    header, row = list(csv.reader(io.StringIO(out)))
    assert len(header) == len(row) == 7


def test_predict_an_archive(call, bundle, images, tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(images, "pictures")
    want = call(cmt_predict.main, bundle.path, images / "red")[1].replace(str(images), "")
    got = call(cmt_predict.main, bundle.path, tmp_path / "x.tar" / "pictures" / "red")[1]
    assert got.replace(str(tmp_path / "x.tar" / "pictures"), "") == want != ""
    with tarfile.open(tmp_path / "x.tgz", "w:gz") as tar:
        tar.add(images, "pictures")
    code, _, err = call(cmt_predict.main, bundle.path, tmp_path / "x.tgz")
    assert (code, "gunzip -k" in err) == (2, True)


def test_predict_follows_links(call, bundle, images, tmp_path):
    (tmp_path / "subset").mkdir()
    (tmp_path / "subset" / "red").symlink_to(images / "red", target_is_directory=True)
    code, out, _ = call(cmt_predict.main, bundle.path, tmp_path / "subset")
    assert (code, out.count("red/00")) == (0, 3)


def test_damaged_bundle(fails, bundle, images):
    (bundle.path / "model.bin").write_bytes(b"WEIGHTS")
    for command in (cmt_verify.main, cmt_bench.main):
        assert "model.bin" in fails(2, command, bundle.path)
    assert "model.bin" in fails(2, cmt_predict.main, bundle.path, images)


def test_missing_runtime_and_device_end_with_three(fails, fp32_bundle, images, monkeypatch):
    assert "NPU" in fails(3, cmt_predict.main, fp32_bundle.path, images, "--device", "NPU")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else find(name, *a)
    )
    for command, argv in ((cmt_predict.main, [images]), (cmt_verify.main, []), (cmt_bench.main, [])):
        assert "pip install" in fails(3, command, fp32_bundle.path, *argv)
