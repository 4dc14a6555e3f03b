"""What is built and installed is one package, ``cmt_edge``, whatever else lies in a user's folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("cmt", "export", "calib", "deploy")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "src", "tests", *ROOMS)
SKIPPED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", ".*")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("setuptools") is None, reason="needs setuptools, which builds the wheel"),
]


def copy_sources(target: Path) -> Path:
    """The files that a build reads, with the links as links."""
    target.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=SKIPPED)
        else:
            shutil.copy2(ROOT / name, target / name)
    return target


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def build(kind: str, sources: Path, target: Path) -> Path:
    """A wheel or a source distribution, made by the build backend itself: no index is asked."""
    target.mkdir()
    code = f"import setuptools.build_meta as backend; backend.build_{kind}({str(target)!r})"
    log = run(sys.executable, "-W", "error::UserWarning", "-c", code, cwd=sources)
    assert "deprecated" not in log.lower(), log[-3000:]
    (made,) = target.iterdir()
    return made


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    return copy_sources(tmp_path_factory.mktemp("build") / "sources")


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    return build("wheel", sources, tmp_path_factory.mktemp("wheel") / "made")


def test_the_wheel_installs_one_name(wheel):
    names = contents(wheel)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cmt_edge"}
    (record,) = (text for name, text in names.items() if name.endswith("/top_level.txt"))
    assert record.decode().split() == ["cmt_edge"]


def test_the_wheel_holds_every_module_and_no_test(wheel):
    names = set(contents(wheel))
    modules = {
        f"cmt_edge/{path.relative_to(ROOT).as_posix()}"
        for room in ROOMS
        for path in (ROOT / room).rglob("*.py")
    }
    front = {f"cmt_edge/{path.name}" for path in (ROOT / "src" / "cmt_edge").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == modules | front
    data = {f"cmt_edge/cmt/data/{path.name}" for path in (ROOT / "cmt" / "data").iterdir()}
    assert len(data) > 2
    assert data | {"cmt_edge/py.typed"} <= names
    assert not [name for name in names if "test" in name]


def test_the_source_distribution_gives_the_same_wheel(sources, wheel, tmp_path):
    archive = build("sdist", sources, tmp_path / "sdist")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
        assert not [name for name in names if "/tests" in name]
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert contents(build("wheel", unpacked, tmp_path / "wheel")) == contents(wheel)


@pytest.mark.skipif(find_spec("pip") is None, reason="needs pip, which installs the package")
def test_an_editable_install_sees_new_files(tmp_path):
    sources = copy_sources(tmp_path / "sources")
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = str(tmp_path / "venv" / "bin" / "python")
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    )
    dependencies = Path(find_spec("numpy").origin).parents[1]
    (site / "dependencies.pth").write_text(f"{dependencies}\n", encoding="utf-8")
    install = ("install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, *install, "-e", str(sources), cwd=tmp_path)
    (sources / "deploy" / "added_later.py").write_text("ANSWER = 42\n", encoding="utf-8")
    look = "from cmt_edge.deploy import added_later, predictor; print(added_later.ANSWER, predictor.__file__)"
    answer, place = run(python, "-I", "-c", look, cwd=tmp_path).split()
    assert answer == "42"
    assert Path(place).is_relative_to(sources)


def test_files_of_the_user_hide_nothing():
    script = ROOT / "scripts" / "try_name_clashes.py"
    assert "every name was found" in run(sys.executable, str(script), cwd=ROOT)


def test_a_hidden_package_is_noticed(tmp_path):
    """The script above can fail: a file named like the package itself hides it."""
    script = ROOT / "scripts" / "try_name_clashes.py"
    spoiled = script.read_text(encoding="utf-8").replace('ROOMS = ("cmt"', 'ROOMS = ("cmt_edge", "cmt"')
    spoiled = spoiled.replace('for name in ("export", "cmt"):', 'for name in ("export", "cmt_edge"):')
    (tmp_path / "spoiled.py").write_text(spoiled, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "spoiled.py"), "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "cmt_edge of the current folder was imported" in done.stdout
