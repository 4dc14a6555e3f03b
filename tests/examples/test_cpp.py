"""The C++ program is built with the headers of OpenVINO's wheel and gives the Predictor's logits."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from helpers.bundles import make_bundle
from helpers.images import RED
from helpers.paths import ROOT

pytest.importorskip("openvino", reason="needs OpenVINO, whose wheel has the headers")

LIMIT_S = 300
"""Seconds after which a build has failed."""


@pytest.fixture(scope="module")
def module(example):
    return example("cpp/compare.py")


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    """The built program."""
    from openvino.utils import get_cmake_path

    if shutil.which("cmake") is None or not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("needs cmake and a C++ compiler")
    if not (Path(get_cmake_path()) / "OpenVINOConfig.cmake").is_file():
        pytest.skip("needs a wheel of OpenVINO that holds its configuration for CMake")
    folder = tmp_path_factory.mktemp("cpp")
    setup = ["-S", str(ROOT / "examples" / "cpp"), "-B", str(folder), f"-DOpenVINO_DIR={get_cmake_path()}"]
    for command in (setup, ["--build", str(folder)]):
        done = subprocess.run(
            ["cmake", *command], capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "warning:" not in done.stdout + done.stderr
    return folder / "classify"


@pytest.mark.slow
def test_the_program_gives_the_logits_of_the_predictor(module, program, fp32_bundle, capsys):
    assert module.main([str(fp32_bundle.path), str(program)]) == 0
    ours, pytorch = json.loads(capsys.readouterr().out)["compared"]
    assert (ours["beside"], ours["equal_top1"]) == ("Predictor", 5)
    assert ours["largest_difference"] <= 1e-5
    assert pytorch["largest_difference"] <= 1e-4


@pytest.mark.slow
def test_the_program_refuses_what_it_cannot_run(program, fp32_bundle, tmp_path):
    (tmp_path / "input.f32").write_bytes(b"123")

    def run(*words: object) -> tuple[int, str]:
        command = [str(program), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        return done.returncode, done.stderr

    source, target = tmp_path / "input.f32", tmp_path / "logits.f32"
    assert run() == (2, "usage: classify BUNDLE INPUT OUTPUT [f32|bf16]\n")
    code, text = run(fp32_bundle.path, source, target)
    assert (code, "the input has 3 bytes" in text) == (2, True)
    code, text = run(tmp_path, source, target)
    assert (code, text.startswith("error: ")) == (2, True)
    code, text = run(fp32_bundle.path, source, target, "int8")
    assert (code, "unknown precision int8" in text) == (2, True)
    assert not target.exists()


def write_program(path: Path, code: str) -> Path:
    """A program in Python in place of the built one."""
    path.write_text(f"#!{sys.executable}\nimport sys\n{code}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_other_logits_are_a_failure(module, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "red.png").write_bytes(RED)
    zeros = write_program(tmp_path / "zeros", "open(sys.argv[3], 'wb').write(bytes(12))")
    assert module.main([str(bundle.path), str(zeros), str(tmp_path / "red.png")]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["images"] == 1
    assert "the logits differ by" in err


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("sys.exit('error: broken')", "error: broken"),
        ("open(sys.argv[3], 'wb').write(bytes(8))", "logits of shape (1, 2), expected (1, 3)"),
    ],
)
def test_a_program_that_fails_is_named(module, tmp_path, capsys, code, message):
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "red.png").write_bytes(RED)
    program = write_program(tmp_path / "program", code)
    assert module.main([str(bundle.path), str(program), str(tmp_path / "red.png")]) == 2
    assert message in capsys.readouterr().err


def test_a_difference_of_nan_is_a_failure(module, tmp_path, capsys):
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "red.png").write_bytes(RED)
    value = np.full(3, np.nan, np.float32).tobytes()
    program = write_program(tmp_path / "nan", f"open(sys.argv[3], 'wb').write({value!r})")
    assert module.main([str(bundle.path), str(program), str(tmp_path / "red.png")]) == 1
    assert "the logits differ by nan" in capsys.readouterr().err
