"""Command lines: results on standard output, one message with a remedy on standard error, exit codes 0 to
4."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import Golden
from cmt_edge.deploy.cli import bench as cmt_bench
from cmt_edge.deploy.cli import predict as cmt_predict
from cmt_edge.deploy.cli import verify as cmt_verify
from cmt_edge.deploy.cli.console import INTERNAL
from cmt_edge.deploy.images import ImageSet, hash_image
from cmt_edge.deploy.measure.parity import verify
from helpers.bundles import (
    LABELS,
    blank_head,
    copy_bundle,
    make_bundle,
    recorded_bundle,
    snapshot,
    tiny_golden,
)
from helpers.cli import strict
from helpers.images import coloured, coloured_folder, folder_of

FAST = ["--iters", "3", "--seconds", "0.01", "--warmup", "2"]


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return recorded_bundle(tmp_path / "tiny")


@pytest.fixture
def images(tmp_path) -> Path:
    return coloured_folder(tmp_path / "images")


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


def test_verify_with_images(call, bundle, images, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table is folded
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


def test_verify_of_a_checkpoint_that_does_not_exist(fails, bundle, tmp_path):
    for argv in ([], ["--json"]):
        err = fails(2, cmt_verify.main, bundle.path, "--weights", tmp_path / "no.pth", *argv)
        assert "no such checkpoint file" in err


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
