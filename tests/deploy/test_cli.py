"""Command lines: results on standard output, one message with a remedy on standard error, exit codes 0 to
4."""

from __future__ import annotations

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import Golden
from cmt_edge.deploy.cli import bench as cmt_bench
from cmt_edge.deploy.cli import measuring
from cmt_edge.deploy.cli import predict as cmt_predict
from cmt_edge.deploy.cli import verify as cmt_verify
from cmt_edge.deploy.cli.console import INTERNAL
from cmt_edge.deploy.images import ImageSet, hash_image
from cmt_edge.deploy.measure.benchmark import Protocol
from cmt_edge.deploy.measure.parity import verify
from helpers.bundles import LABELS, blank_head, copy_bundle, make_bundle, snapshot, tiny_golden
from helpers.cli import strict
from helpers.images import coloured, folder_of

FAST = ["--iters", "3", "--seconds", "0.01", "--warmup", "2"]


@dataclass(frozen=True)
class Brief(Protocol):
    """The protocol without its second of warm-up, which no flag sets."""

    warmup_seconds: float = 0.01


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(measuring, "Protocol", Brief)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    recorded = {
        hash_image(coloured(name, shade)): i
        for i, name in enumerate(("red", "green", "blue"))
        for shade in range(5)
    }
    return make_bundle(tmp_path / "tiny", reference=recorded)


@pytest.fixture
def images(tmp_path) -> Path:
    folder_of(
        tmp_path / "images",
        {name: [coloured(name, s) for s in range(3)] for name in ("red", "green", "blue")},
    )
    return tmp_path / "images"


@pytest.fixture
def call(capsys):
    """Runs a command; its exit code, standard output and standard error."""

    def run(command, *argv):
        try:
            code = command([str(a) for a in argv])
        except SystemExit as exc:
            code = exc.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def fails(call):
    """Runs a command that must fail with ``code`` and returns its one message."""

    def run(code, command, *argv):
        got, out, err = call(command, *argv)
        assert (got, out) == (code, ""), err
        assert err.startswith("error: ")
        assert err.count("error:") == 1
        assert "Traceback" not in err
        assert "remedy: " in err
        return err

    return run


# --- cmt-predict ----------------------------------------------------------------------------------


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
    from cmt_edge.deploy.images import ImageSet

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


@pytest.mark.parametrize("form", [[], ["--json"], ["--csv"]])
def test_predict_goes_on_past_bad_files(call, bundle, images, form):
    (images / "green" / "001.png").write_bytes(b"no image")
    (images / "red" / "000.png").write_bytes(b"")
    absent = images / "absent.png"
    code, out, err = call(cmt_predict.main, bundle.path, absent, images, *form)
    assert code == 2
    good = sorted(p for p in images.rglob("*.png") if p.stat().st_size > 10)
    lines = out.splitlines()[1:] if form == ["--csv"] else out.splitlines()
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


def test_predict_says_what_json_is(call):
    _, out, _ = call(cmt_predict.main, "--help")
    assert "print every answer as one machine-readable object on a line of its own" in " ".join(out.split())
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


def test_verify_of_a_checkpoint_that_does_not_exist(fails, bundle, tmp_path):
    for argv in ([], ["--json"]):
        err = fails(2, cmt_verify.main, bundle.path, "--weights", tmp_path / "no.pth", *argv)
        assert "no such checkpoint file" in err


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


# --- cmt-verify -----------------------------------------------------------------------------------


def test_verify_text_and_json(call, bundle):
    code, out, err = call(cmt_verify.main, bundle.path)
    assert (code, err) == (0, "")
    assert "verified" in out
    assert "NOT" not in out
    code, out, _ = call(cmt_verify.main, bundle.path, "--json")
    assert code == 0
    content = strict(out.splitlines()[-1])
    assert content["passed"] is True
    assert content["bundle"] == str(bundle.path)


def test_verify_with_images(call, bundle, images):
    code, out, _ = call(cmt_verify.main, bundle.path, "--data", images, "--json")
    assert code == 0
    data = strict(out.splitlines()[-1])["data"]
    assert (data["images"], data["top1"], data["drop"]) == (9, 100.0, 0.0)
    code, out, _ = call(cmt_verify.main, bundle.path, "--data", images, "--limit", 3)
    assert code == 0
    assert out.splitlines()[3].split()[0] == "3"


def test_verify_by_order(call, tmp_path, fails):
    """Folders 1, 2, 3 stand for red, green, blue in this order only if it is asked for."""
    recorded = {hash_image(coloured(name)): i for i, name in enumerate(("red", "green", "blue"))}
    bundle = make_bundle(tmp_path / "b", reference=recorded)
    folder_of(tmp_path / "d", {"1": [coloured("red")], "2": [coloured("green")], "3": [coloured("blue")]})
    assert "--by-order" in fails(2, cmt_verify.main, bundle.path, "--data", tmp_path / "d")
    code, out, _ = call(cmt_verify.main, bundle.path, "--data", tmp_path / "d", "--by-order", "--json")
    assert code == 0
    assert json.loads(out)["data"]["top1"] == 100


def test_verify_failure_is_exit_code_one(call, bundle, images, tmp_path):
    golden = tiny_golden()
    bad = make_bundle(tmp_path / "bad", golden=Golden(golden.sources, golden.pixels, [golden.logits + 1]))
    code, out, err = call(cmt_verify.main, bad.path)
    assert code == 1
    assert "NOT verified" in out
    assert "--atol" in err
    code, out, err = call(cmt_verify.main, bad.path, "--json")
    assert code == 1
    assert strict(out.splitlines()[-1])["passed"] is False
    assert call(cmt_verify.main, bad.path, "--atol", 1.5)[0] == 0
    wrong = {
        hash_image(coloured(name, s)): i for i, name in enumerate(("red", "green", "blue")) for s in range(3)
    }
    dark = folder_of(
        tmp_path / "dark",
        {"red": [coloured("red")], "green": [coloured("red", 9)], "blue": [coloured("blue")]},
    )
    wrong[hash_image(coloured("red", 9))] = 1
    strictly = make_bundle(tmp_path / "c", reference=wrong)
    code, out, _ = call(cmt_verify.main, strictly.path, "--data", dark.path)
    assert code == 1
    assert "+33.33" in out
    assert call(cmt_verify.main, strictly.path, "--data", dark.path, "--max-drop", 34)[0] == 0


def test_verify_tampered_real_bundle(call, onnx_bundle, tmp_path):
    bad = copy_bundle(onnx_bundle, tmp_path / "bad", blank_head)
    code, out, _ = call(cmt_verify.main, bad.path, "--json")
    assert code == 1
    assert json.loads(out)["golden"]["passed"] is False
    assert call(cmt_verify.main, onnx_bundle.path)[0] == 0


def test_verify_against_another_bundle(call, fails, int8_bundle, fp32_bundle, bundle, cifar, images):
    code, out, err = call(
        cmt_verify.main,
        int8_bundle.path,
        "--data",
        cifar / "test",
        "--limit",
        50,
        "--reference",
        fp32_bundle.path,
        "--max-drop",
        10,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["data"]["reference_source"].startswith("openvino")
    assert "other weights" in fails(
        2, cmt_verify.main, bundle.path, "--data", images, "--reference", fp32_bundle.path
    )


def test_verify_failures(fails, bundle, images, tmp_path):
    flat = images / "red"
    assert "class folders" in fails(2, cmt_verify.main, bundle.path, "--data", flat)
    assert "absent" in fails(2, cmt_verify.main, bundle.path, "--data", tmp_path / "absent")
    (images / "dog").mkdir()
    (images / "dog" / "x.png").write_bytes(coloured("red"))
    message = fails(2, cmt_verify.main, bundle.path, "--data", images)
    assert "dog" in message
    assert "blue" in message


def test_verify_without_a_reference_ends_with_three(fails, tmp_path, images, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    assert "no reference" in fails(3, cmt_verify.main, make_bundle(tmp_path / "b").path, "--data", images)


# --- cmt-bench ------------------------------------------------------------------------------------


def test_bench_text_and_json(call, bundle):
    code, out, err = call(cmt_bench.main, bundle.path, *FAST)
    assert (code, err) == (0, "")
    assert "tiny" in out
    assert "p50" in out
    code, out, _ = call(cmt_bench.main, bundle.path, "--json", *FAST)
    assert code == 0
    assert strict(out.splitlines()[-1])["results"][0]["name"] == "tiny"


def test_bench_two_real_bundles_with_table_and_plot(call, fp32_bundle, onnx_bundle, tmp_path):
    table, plot = tmp_path / "table.md", tmp_path / "plot.png"
    code, out, err = call(
        cmt_bench.main, fp32_bundle.path, onnx_bundle.path, *FAST, "--markdown", table, "--plot", plot
    )
    assert code == 0, err
    for name in (fp32_bundle.path.name, onnx_bundle.path.name):
        assert name in out
        assert f"| {name}" in table.read_text()
    with Image.open(plot) as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(1 << 20)) > 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plot.png", "table.md"]


def test_bench_plot_as_svg(call, bundle, tmp_path):
    assert (
        call(cmt_bench.main, bundle.path, *FAST, "--no-throughput", "--plot", tmp_path / "plot.svg")[0] == 0
    )
    assert "<svg" in (tmp_path / "plot.svg").read_text()


def test_bench_with_images(call, bundle, images, fails, tmp_path):
    code, out, _ = call(cmt_bench.main, bundle.path, "--data", images, "--no-throughput", "--json", *FAST)
    assert code == 0
    assert json.loads(out)["results"][0]["throughput"] is None
    assert "absent" in fails(2, cmt_bench.main, bundle.path, "--data", tmp_path / "absent", *FAST)


def test_bench_repeats_that_images_were_too_few(call, tmp_path, images):
    """What an export could not show about the accuracy is said beside the latencies, too."""
    (images / "red" / "000.png").write_bytes(coloured("green", 7))
    recorded = {
        hash_image(p.read_bytes()): i for i, n in enumerate(LABELS) for p in (images / n).glob("*.png")
    }
    bundle = make_bundle(tmp_path / "few", reference=recorded)
    result = verify(bundle, data=ImageSet(images), max_drop=20.0)
    assert result.data.doubt
    doubted = copy_bundle(bundle, tmp_path / "doubted", verification=result.entry())
    code, out, err = call(cmt_bench.main, doubted.path, *FAST)
    assert (code, err) == (0, "")
    assert "warning: doubted: 9 images cannot show that the drop is at most 20 points" in out


def test_bench_names_what_it_skips_and_takes_any_folder(call, bundle, images):
    (images / "notes.txt").write_text("no image")
    (images / "loose.png").write_bytes(coloured("red"))
    code, _, err = call(cmt_bench.main, bundle.path, "--data", images, *FAST)
    assert (code, err) == (0, f"note: {images}: 1 file was skipped: 1 .txt\n")
    code, _, err = call(cmt_bench.main, bundle.path, "--data", images, *FAST, "--quiet")
    assert (code, err) == (0, "")


def test_verify_names_what_it_skips(call, bundle, images):
    (images / "red" / "notes.txt").write_text("no image")
    code, _, err = call(cmt_verify.main, bundle.path, "--data", images)
    assert code == 0
    assert f"note: {images}: 1 file was skipped: 1 .txt\n" in err


def test_bench_output_that_cannot_be_written(fails, bundle, tmp_path):
    (tmp_path / "file").write_text("x")
    before = snapshot(tmp_path)
    for flag, name in (("--markdown", "t.md"), ("--plot", "p.png")):
        for place in (tmp_path / "absent", tmp_path / "file"):
            assert name in fails(2, cmt_bench.main, bundle.path, *FAST, flag, place / name)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("flag", ["--markdown", "--plot"])
@pytest.mark.parametrize(
    "place", ["{bundle}/t.png", "{bundle}/new/t.png", "{bundle}/manifest.json.png", "link/t.png"]
)
def test_bench_refuses_to_write_into_a_bundle(fails, bundle, tmp_path, monkeypatch, flag, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(bundle.path)
    before = snapshot(bundle.path)
    target = place.format(bundle=bundle.path)
    assert "inside the bundle" in fails(2, cmt_bench.main, bundle.path, *FAST, flag, target)
    monkeypatch.chdir(bundle.path)
    assert "inside the bundle" in fails(2, cmt_bench.main, bundle.path, *FAST, flag, "t.png")
    assert snapshot(bundle.path) == before


@pytest.mark.parametrize("flag", ["--markdown", "--plot"])
def test_bench_refuses_a_missing_folder_and_a_folder_before_it_measures(
    fails, bundle, tmp_path, monkeypatch, flag
):
    monkeypatch.setattr(cmt_bench, "run_benchmark", lambda *_, **__: pytest.fail("it measured"))
    (tmp_path / "x.svg").mkdir()
    assert "does not exist" in fails(2, cmt_bench.main, bundle.path, *FAST, flag, tmp_path / "gone" / "t.svg")
    assert "it is a folder" in fails(2, cmt_bench.main, bundle.path, *FAST, flag, tmp_path / "x.svg")


def test_bench_writes_below_a_manifest_of_another_program(call, bundle, tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    target = tmp_path / "T.SVG"
    assert call(cmt_bench.main, bundle.path, *FAST, "--no-throughput", "--plot", target)[0] == 0
    assert "<svg" in target.read_text()


def test_bench_plot_of_an_unknown_kind(fails, bundle, tmp_path):
    fails(2, cmt_bench.main, bundle.path, *FAST, "--plot", tmp_path / "plot.xyz")


def test_bench_plot_without_matplotlib(fails, bundle, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "report" in fails(3, cmt_bench.main, bundle.path, *FAST, "--plot", tmp_path / "plot.png")


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [cmt_predict.main, cmt_verify.main, cmt_bench.main])
def test_bad_usage_is_exit_code_two(call, command):
    for argv in ([], ["--nonsense"], ["b", "i", "--threads", "many"]):
        code, out, err = call(command, *argv)
        assert code == 2
        assert out == ""
        assert "usage: cmt-" in err


@pytest.mark.parametrize("command", [cmt_predict.main, cmt_verify.main, cmt_bench.main])
def test_help_and_version(call, command):
    code, out, _ = call(command, "--help")
    assert code == 0
    for flag in ("--json", "--backend", "--device", "--threads", "--quiet", "--verbose"):
        assert flag in out
    code, out, _ = call(command, "--version")
    assert code == 0
    assert out.startswith("cmt-edge ")


def test_abbreviated_flags_are_not_guessed(call, bundle):
    assert call(cmt_bench.main, bundle.path, "--iter", "3")[0] == 2


def test_verbose_shows_the_trace(call, tmp_path):
    code, _, err = call(cmt_verify.main, tmp_path / "absent", "-v")
    assert code == 2
    assert "Traceback" in err
    assert err.rstrip().splitlines()[-1].startswith("  remedy: ")


def test_interruption_and_internal_failure(call, bundle, images, monkeypatch):
    def raiser(error):
        def load(*args, **kwargs):
            raise error

        return load

    monkeypatch.setattr(cmt_predict.Predictor, "load", raiser(KeyboardInterrupt()))
    code, _, err = call(cmt_predict.main, bundle.path, images)
    assert code == 130
    assert "Traceback" not in err
    monkeypatch.setattr(cmt_predict.Predictor, "load", raiser(ZeroDivisionError("odd")))
    code, _, err = call(cmt_predict.main, bundle.path, images)
    assert code == INTERNAL
    assert "ZeroDivisionError: odd" in err
    assert "report it" in err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "flags", "silent"), [(Terminal, [], False), (Terminal, ["-q"], True), (io.StringIO, [], True)]
)
def test_progress_only_on_a_terminal(bundle, images, monkeypatch, capsys, stream, flags, silent):
    commands = {
        cmt_verify.main: ["--data", str(images)],
        cmt_bench.main: ["--iters", "40", "--seconds", "0", "--warmup", "1", "--no-throughput"],
    }
    for command, argv in commands.items():
        screen = stream()
        monkeypatch.setattr(sys, "stderr", screen)
        assert command([str(bundle.path), *argv, *flags, "--json"]) == 0
        assert (screen.getvalue() == "") == silent, command
        assert len(capsys.readouterr().out.splitlines()) == 1


def test_installed_commands(bundle, images):
    """Through the entry points of the distribution, as a user runs them."""
    folder = Path(sys.executable).parent
    done = subprocess.run(
        [folder / "cmt-predict", bundle.path, images, "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 9
    done = subprocess.run([folder / "cmt-verify", images], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")


def test_closed_pipe_is_no_error(bundle, images):
    """As in ``cmt-predict ... | head -0``."""
    read, write = os.pipe()
    os.close(read)
    command = [
        sys.executable,
        "-c",
        "import sys; from cmt_edge.deploy.cli.predict import main; sys.exit(main())",
        str(bundle.path),
        str(images),
    ]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == 0
