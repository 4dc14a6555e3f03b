"""``import cmt_edge``: a pinned list of names that loads nothing heavy, and ``python -m cmt_edge``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types

import pytest

import cmt_edge
from cmt_edge import startup
from cmt_edge.__main__ import COMMANDS
from cmt_edge.deploy.backends import RUNTIMES, list_offered_runtimes
from cmt_edge.deploy.cli import bench, build, doctor, predict, report, serve_repo, verify
from cmt_edge.export import ExportConfig, models, pipeline
from cmt_edge.export import cli as export_cli
from helpers.bundles import make_bundle
from helpers.paths import ROOT

NAMES = [
    "Bundle",
    "ExportConfig",
    "Predictor",
    "__version__",
    "benchmark",
    "create_model",
    "export",
    "verify",
]
"""What a user may import from ``cmt_edge``."""
HEAVY = ("torch", "numpy", "onnx", "openvino", "onnxruntime", "PIL")
"""Packages that ``import cmt_edge`` must not load."""
DEVICE_HEAVY = ("torch", "onnx", "openvino", "onnxruntime", "nncf")
"""Packages that ``Predictor`` must not load: it needs NumPy and Pillow, and its bundle's runtime later."""
MAINS = {
    "export": export_cli.main,
    "predict": predict.main,
    "verify": verify.main,
    "bench": bench.main,
    "build": build.main,
    "models": models.main,
    "doctor": doctor.main,
    "report": report.main,
    "serve-repo": serve_repo.main,
}
"""Command -> the function that its console script calls."""


def python(code: str, *argv: str) -> str:
    """Standard output of ``code`` in a new interpreter, in which it must succeed."""
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_after(statement: str) -> set[str]:
    """Top-level names of the modules that a new interpreter has loaded after ``statement``."""
    modules = json.loads(python(f"import json, sys; {statement}; print(json.dumps([*sys.modules]))"))
    return {name.split(".")[0] for name in modules}


def test_the_public_names_are_these():
    assert sorted(cmt_edge.__all__) == NAMES
    assert dir(cmt_edge) == NAMES


@pytest.mark.parametrize("statement", ["import cmt_edge", "import cmt_edge; dir(cmt_edge)"])
def test_importing_the_package_loads_nothing_heavy(statement):
    loaded = loaded_after(statement)
    assert "cmt_edge" in loaded
    assert not loaded & set(HEAVY)


def test_importing_the_predictor_loads_no_training_package_and_no_runtime():
    loaded = loaded_after("from cmt_edge import Bundle, Predictor, benchmark, verify")
    assert {"numpy", "PIL"} <= loaded
    assert not loaded & set(DEVICE_HEAVY)


def test_every_name_is_found_on_its_first_use():
    names = ", ".join(name for name in NAMES if not name.startswith("__"))
    python(f"from cmt_edge import {names}\nassert all(map(callable, ({names})))")


def test_the_names_are_those_of_the_rooms():
    from cmt_edge.cmt import create_model
    from cmt_edge.deploy import Bundle, Predictor
    from cmt_edge.deploy.measure.benchmark import benchmark
    from cmt_edge.deploy.measure.parity import verify as verify_bundle

    assert cmt_edge.Bundle is Bundle
    assert cmt_edge.ExportConfig is ExportConfig
    assert cmt_edge.Predictor is Predictor
    assert cmt_edge.benchmark is benchmark
    assert cmt_edge.create_model is create_model
    assert cmt_edge.verify is verify_bundle
    assert cmt_edge.__version__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Predictr'"):
        _ = cmt_edge.Predictr


@pytest.mark.parametrize(
    "statement", ["import cmt_edge.export", "from cmt_edge import export", "import cmt_edge; cmt_edge.export"]
)
def test_export_is_a_package_that_can_be_called_however_it_is_imported(statement):
    code = (
        f"{statement}\nimport cmt_edge, types\nexport = cmt_edge.export\n"
        "from cmt_edge.export.config import ExportConfig\n"
        "assert isinstance(export, types.ModuleType) and callable(export), export\n"
        "assert export.ExportConfig is ExportConfig"
    )
    python(code)


def test_calling_export_runs_the_pipeline(monkeypatch):
    assert isinstance(cmt_edge.export, types.ModuleType)
    seen = []
    monkeypatch.setattr(pipeline, "run", lambda *args: seen.append(args) or "bundle")
    config = ExportConfig("cmt_nano")
    assert cmt_edge.export(config, progress=None) == "bundle"
    assert seen == [(config, None)]


# --- python -m cmt_edge ---------------------------------------------------------------------------


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cmt_edge", *argv], capture_output=True, text=True, check=False
    )


def test_there_is_a_command_for_every_console_script():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.split("[project.scripts]")[1].split("\n[")[0]
    scripts = dict(line.split(" = ") for line in section.strip().splitlines())
    named = [name for name, known in COMMANDS.items() if known.has_script]
    expected = {f"cmt-{name}": f'"cmt_edge.startup:{name}"' for name in named}
    assert scripts == {"cmt-edge": '"cmt_edge.startup:edge"'} | expected
    assert {"export", "predict", "verify", "bench", "build", "report"} == set(named)
    assert set(COMMANDS) == set(MAINS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_the_help_of_its_console_script(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(startup, "front", ["python -m cmt_edge"])
    with pytest.raises(SystemExit) as finished:
        MAINS[name](["--help"])
    assert finished.value.code == 0
    done = command(name, "--help")
    assert (done.returncode, done.stdout, done.stderr) == (0, capsys.readouterr().out, "")


def test_the_exit_code_and_the_message_are_those_of_the_command(tmp_path):
    done = command("predict", str(tmp_path / "nothing"), "a.png")
    assert done.returncode == predict.main([str(tmp_path / "nothing"), "a.png"]) == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("argv", "message"), [((), "no command was named"), (("exprt",), "'exprt'")])
def test_without_a_command_the_usage_is_printed(argv, message):
    done = command(*argv)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert "usage: python -m cmt_edge" in done.stderr


def test_help_names_every_command_and_version_the_version():
    assert all(f"\n  {name} " in command("--help").stdout for name in COMMANDS)
    assert command("--version").stdout == f"cmt-edge {cmt_edge.__version__}\n"


@pytest.mark.parametrize("folder", ["deploy/backends", "deploy", "deploy/tensorrt"])
def test_files_of_the_working_directory_stand_for_no_package(tmp_path, folder):
    """``openvino.py`` and ``torch.py`` lie in our own folders, and in those of users."""
    bundle = make_bundle(tmp_path / "b")
    (tmp_path / "a.png").write_bytes(bundle.golden().sources[0])
    for name in ("export", "numpy", "PIL", "dataclasses", "signal"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('it was imported')")
    argv = [sys.executable, "-m", "cmt_edge", "predict", str(bundle.path), str(tmp_path / "a.png")]
    for place in (ROOT / folder, tmp_path):
        done = subprocess.run(argv, capture_output=True, text=True, cwd=place, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count("%") == 3


def test_the_double_of_a_runtime_is_offered_by_no_command():
    assert "fake" in RUNTIMES
    assert "fake" not in list_offered_runtimes()
    for name in ("predict", "verify", "bench"):
        assert "fake" not in command(name, "--help").stdout
    done = command("predict", "b", "a.png", "--backend", "fake")
    assert done.returncode == 2
    assert "unknown runtime 'fake'" in done.stderr
    remedy = done.stderr.split("remedy:")[1]
    assert "fake" not in remedy
    assert set(re.findall(r"\w+", remedy)) & set(list_offered_runtimes())
