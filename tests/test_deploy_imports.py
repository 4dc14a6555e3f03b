"""What may import what: the device side stays light, and dependencies between the packages point one way."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

OURS = ("cmt", "deploy", "calib", "export")
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "cuda", "pynvml", "nncf", "matplotlib")
BUDGET_S = 0.3
RUNTIMES = (
    "deploy.backends.openvino", "deploy.backends.openvino_graph", "deploy.backends.onnxruntime", "deploy.backends.torch",
    "deploy.backends.tensorrt", "deploy.engine_builder",
)  # fmt: skip
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"hidden: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}
DEPLOY = [name for name in FILES if name.split(".")[0] == "deploy" and name not in RUNTIMES]


def python(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import time, sys, json
start = time.process_time()
import deploy
spent = time.process_time() - start
print(json.dumps([spent, sorted({m.split(".")[0] for m in sys.modules})]))
"""


def test_deploy_imports_fast_and_light():
    runs = [json.loads(python(IMPORT)) for _ in range(3)]
    assert min(seconds for seconds, _ in runs) < BUDGET_S
    for _, modules in runs:
        assert not {*HEAVY, "cmt", "calib", "export"} & set(modules)
        assert {"deploy", "numpy", "PIL"} <= set(modules)


@pytest.mark.parametrize("name", ["deploy.cli", "deploy.report", "deploy.parity", "deploy.benchmark", "deploy.build"])
def test_tools_stay_light(name):
    loaded = json.loads(python(f"import sys, json, {name}; print(json.dumps(sorted(sys.modules)))"))
    assert name in loaded
    assert not set(HEAVY) & set(loaded)


def test_every_module_imports_without_the_optional_packages():
    python(BLOCKER + "import importlib\nfor name in sys.argv[1:]: importlib.import_module(name)", *DEPLOY)


@pytest.mark.parametrize("name", RUNTIMES)
def test_the_blocker_hides_the_runtimes(name):
    """What the test above leaves out really needs its runtime, so the test above proves something."""
    with pytest.raises(AssertionError, match="hidden"):
        python(BLOCKER + f"import {name}")


USE = """
import sys
from deploy import Bundle, Predictor
from deploy.cli import verify
from deploy.errors import RuntimeMissingError
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in sys.argv[2].split() else find(name, *a)
assert Predictor.load(sys.argv[1])(Bundle.open(sys.argv[1]).golden().sources[0]).label
assert verify([sys.argv[1]]) == 0
for name in ("openvino", "onnxruntime", "torch"):
    try:
        Predictor.load(sys.argv[1], backend=name)
    except RuntimeMissingError as exc:
        assert "pip install" in exc.remedy
    else:
        raise SystemExit(f"{name} was found")
"""


def test_a_device_without_any_heavy_package(tmp_path):
    from test_deploy_bundle import make_bundle

    python(BLOCKER + USE, str(make_bundle(tmp_path / "b").path), " ".join(HEAVY))


def imports(name: str) -> list[tuple[str, int]]:
    """Absolute names of everything a module imports, also inside functions, with line numbers."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{source}.{alias.name}"
                found.append((full if full in FILES else source, node.lineno))
    return found


def allowed(importer: str, imported: str) -> bool:
    ours, theirs = importer.split(".", maxsplit=1)[0], imported.split(".", maxsplit=1)[0]
    if theirs not in OURS or theirs == ours:
        return True
    return {
        "deploy": False,
        "cmt": imported in ("deploy.errors", "deploy.files"),
        "calib": theirs == "deploy",
        "export": True,
    }[ours]


@pytest.mark.parametrize("name", FILES)
def test_direction_of_imports(name):
    wrong = [f"{FILES[name]}:{line} imports {imported}" for imported, line in imports(name) if not allowed(name, imported)]
    assert not wrong


def test_imports_are_found():
    """The reader of imports sees relative, absolute and late ones."""
    assert "deploy.backends.base" in dict(imports("deploy.backends.openvino"))
    assert "deploy.errors" in dict(imports("deploy"))
    assert "calib.generated" in dict(imports("export.pipeline"))
    assert "deploy.predictor" in dict(imports("deploy.benchmark"))
    assert not allowed("deploy.cli", "cmt")
    assert not allowed("cmt.cmt", "deploy.bundle")
    assert not allowed("calib", "export.config")


def test_errors_and_files_need_next_to_nothing():
    for name in ("deploy.errors", "deploy.files"):
        for imported, _ in imports(name):
            assert (
                imported in ("deploy.errors", "__future__", "platformdirs") or imported.split(".")[0] in sys.stdlib_module_names
            )
