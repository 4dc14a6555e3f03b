"""The device side stays light: what its modules need, and what a command loads.

The directions between the rooms are contracts of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT

OURS = ("cmt", "deploy", "calib", "export")
HEAVY = ("torch", "onnx", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "pynvml", "nncf")
HEAVY += ("matplotlib", "tritonclient")
MOST_MODULES = 400
RUNTIMES = (
    "cmt_edge.deploy.tensorrt.parser_rules",
    "cmt_edge.deploy.backends.graph_rules",
    "cmt_edge.deploy.backends.openvino",
    "cmt_edge.deploy.backends.openvino_cache",
    "cmt_edge.deploy.backends.openvino_constants",
    "cmt_edge.deploy.backends.openvino_core",
    "cmt_edge.deploy.backends.openvino_devices",
    "cmt_edge.deploy.backends.openvino_graph",
    "cmt_edge.deploy.backends.openvino_layers",
    "cmt_edge.deploy.backends.openvino_linears",
    "cmt_edge.deploy.backends.openvino_pairs",
    "cmt_edge.deploy.backends.openvino_watched",
    "cmt_edge.deploy.backends.kserve",
    "cmt_edge.deploy.backends.onnxruntime",
    "cmt_edge.deploy.backends.onnxruntime_cache",
    "cmt_edge.deploy.backends.provider_sessions",
    "cmt_edge.deploy.backends.torch",
    "cmt_edge.deploy.backends.torch_blocks",
    "cmt_edge.deploy.backends.watched_graph",
    "cmt_edge.deploy.tensorrt.trt",
    "cmt_edge.deploy.tensorrt.rtx",
)
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            raise ModuleNotFoundError(f"hidden: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def module_name(path: Path) -> str:
    parts = ("cmt_edge", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))}
DEPLOY = [name for name in FILES if name.startswith("cmt_edge.deploy") and name not in RUNTIMES]


def python(code: str, *argv: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *argv], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


IMPORT = """
import sys, json
from cmt_edge.deploy import *
print(json.dumps(sorted(sys.modules)))
"""


def test_deploy_imports_little():
    """How long a start takes depends mostly on their number (``benchmarks/command_start.py`` times it)."""
    modules = json.loads(python(IMPORT))
    names = {".".join(m.split(".")[: 2 if m.startswith("cmt_edge.") else 1]) for m in modules}
    assert len(modules) < MOST_MODULES
    assert not {*HEAVY, "cmt_edge.cmt", "cmt_edge.calib", "cmt_edge.export"} & names
    assert {"cmt_edge.deploy", "numpy", "PIL"} <= names


@pytest.mark.parametrize(
    "name",
    [
        "cmt_edge.deploy.cli.predict",
        "cmt_edge.deploy.report",
        "cmt_edge.deploy.measure.parity",
        "cmt_edge.deploy.measure.benchmark",
        "cmt_edge.deploy.tensorrt.build",
    ],
)
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
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT
from cmt_edge.deploy.cli.verify import main as verify
from cmt_edge.deploy.errors import RuntimeMissingError
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name in sys.argv[2].split() else find(name, *a)
RUNTIME_OF_FORMAT["onnx"] = "fake"
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
    from helpers.bundles import make_bundle

    python(BLOCKER + USE, str(make_bundle(tmp_path / "b").path), " ".join(HEAVY))


POSIX = ("fcntl", "grp", "pwd", "resource", "termios")
WITHOUT_POSIX = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*POSIX, "tensorrt", "cuda", "pynvml")!r}:
            raise ModuleNotFoundError(f"hidden: {{name}}", name=name)
sys.meta_path.insert(0, Blocker())
for name in {POSIX!r}:
    sys.modules.pop(name, None)
"""
COMMANDS = """
import contextlib, io
from cmt_edge.deploy.cli import bench, predict, verify
for command in (bench, predict, verify):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        command.main(["--help"])
    assert "usage: cmt-" in out.getvalue()
bundle, image, *backend = sys.argv[1:]
assert predict.main([bundle, image, "--no-cache", *backend]) == 0  # its locks are msvcrt's on Windows
assert verify.main([bundle, *backend]) == 0
brief = ["--iters", "2", "--seconds", "0", "--warmup", "1", "--no-throughput"]
assert bench.main([bundle, *backend, *brief]) == 0
rooms = [name for name in sys.modules if name.startswith("cmt_edge.deploy.") and name.count(".") == 2]
assert not {"cmt_edge.deploy.tensorrt", "cmt_edge.deploy.telemetry"} & set(rooms), rooms
assert "fcntl" not in sys.modules
"""


@pytest.mark.parametrize("backend", [[], ["--backend", "onnxruntime"]], ids=["onnx", "onnxruntime"])
def test_commands_need_neither_posix_nor_tensorrt(tmp_path, backend):
    """They start on Windows; and of the rooms of TensorRT and its telemetry they import nothing."""
    from helpers.bundles import make_bundle
    from helpers.trt import trt_bundle

    target = tmp_path / "b"
    bundle = make_bundle(target) if not backend else trt_bundle(target, half=False)
    image = tmp_path / "image.png"
    image.write_bytes(bundle.golden().sources[0])
    python(WITHOUT_POSIX + COMMANDS, str(bundle.path), str(image), *backend)


START = """
import contextlib, io, sys
from cmt_edge.deploy.cli import predict
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    predict.main(["--help"])
print(*sorted(name for name in sys.modules if name.startswith("cmt_edge.deploy.")))
"""


def test_cmt_predict_starts_without_what_measures():
    rooms = {name.split(".")[2] for name in python(START).split()}
    assert {"predictor", "lanes", "bundle", "backends"} <= rooms
    assert not {"measure", "report", "tensorrt", "telemetry"} & rooms


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


def test_imports_are_found():
    """The reader of imports sees relative, absolute and late ones."""
    assert "cmt_edge.deploy.backends.base" in dict(imports("cmt_edge.deploy.backends.openvino"))
    assert "cmt_edge.deploy.errors" in dict(imports("cmt_edge.deploy"))
    assert "cmt_edge.calib.generated" in dict(imports("cmt_edge.export.steps.reference"))
    assert "cmt_edge.deploy.predictor" in dict(imports("cmt_edge.deploy.measure.benchmark"))


def test_the_leaves_need_next_to_nothing():
    leaves = ("cmt_edge.deploy.errors", "cmt_edge.deploy.files", "cmt_edge.deploy.locks")
    for name in leaves:
        for imported, _ in imports(name):
            assert (
                imported in (*leaves, "__future__", "platformdirs")
                or imported.split(".")[0] in sys.stdlib_module_names
            )
