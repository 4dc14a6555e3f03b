"""The Dockerfile: what it copies, installs and starts exists, and it keeps the rules of small, safe
images."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from cmt_edge.__main__ import COMMANDS
from helpers.paths import ROOT

FILE = ROOT / "examples" / "container" / "Dockerfile"
KNOWN = {
    *("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"),
}
"""Instructions that the checks below understand."""
PROGRAMS = {"ENTRYPOINT", "CMD", "HEALTHCHECK"}
"""Instructions that start a program, in their form without a shell, so that it gets the signals."""


@dataclass(frozen=True)
class Step:
    """An instruction of a Dockerfile, and the stage in which it stands."""

    name: str
    text: str
    stage: str


def parse(text: str) -> list[Step]:
    """The instructions, each on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    steps, stage = [], ""
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.strip().partition(" ")
        if name == "FROM":
            stage = rest.rpartition(" AS ")[2]
        steps.append(Step(name, rest.strip(), stage))
    return steps


def read_extras() -> set[str]:
    """The extras of the project."""
    table = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split("[project.optional-dependencies]")[1]
    return set(re.findall(r"^([\w-]+) = \[", table.split("\n[")[0], re.MULTILINE))


def check_base(step: Step, arguments: dict[str, str]) -> list[str]:
    """Faults of a FROM."""
    image = re.sub(r"\$\{(\w+)\}", lambda found: arguments.get(found[1], ""), step.text.split()[0])
    faults = [] if " AS " in step.text else [f"{image} is no named stage"]
    tag = image.partition(":")[2]
    return faults + ([f"{image} has no fixed version"] if tag in {"", "latest"} else [])


def check_copy(step: Step, stages: set[str], sent: list[str]) -> list[str]:
    """Faults of a COPY: ``sent`` are the paths that Docker gets."""
    words = step.text.split()
    if words[0].startswith("--from="):
        return [] if words[0][7:] in stages else [f"there is no stage {words[0][7:]} yet"]
    missing = [name for name in words[:-1] if not (ROOT / name).exists()]
    unsent = [name for name in words[:-1] if name not in sent]
    return [f"{name} does not exist" for name in missing] + [f"{name} is not sent" for name in unsent]


def check_run(step: Step, extras: set[str]) -> list[str]:
    """Faults of a RUN."""
    faults = [f"extra {name}" for group in re.findall(r"\.whl\)\[([\w,-]+)\]", step.text)
              for name in group.split(",") if name not in extras]  # fmt: skip
    if "pip install" in step.text and "-c /install/constraints.txt" not in step.text:
        faults.append("pip installs other versions than those of constraints.txt")
    if " pip " in f" {step.text}" and "--no-cache-dir" not in step.text:
        faults.append("pip leaves its cache in the image")
    return faults + [f"{word} in RUN" for word in ("sudo", "curl", "apt-get") if word in step.text]


def check_users(steps: list[Step]) -> list[str]:
    """Stages that start a program, but as the system's own user."""
    ends = {step.stage for step in steps if step.name == "ENTRYPOINT"}
    users = {step.stage: step.text for step in steps if step.name == "USER"}
    return [f"{stage} runs as root" for stage in sorted(ends) if users.get(stage, "root") in {"root", "0"}]


def find_faults(text: str, ignored: str) -> list[str]:
    """What is wrong with a Dockerfile and the list of what Docker is sent."""
    sent = [line[1:] for line in ignored.splitlines() if line.startswith("!")]
    faults: list[str] = []
    stages: set[str] = set()
    arguments: dict[str, str] = {}
    steps = parse(text)
    for step in steps:
        if step.name not in KNOWN:
            faults.append(f"unknown instruction {step.name}")
        if step.name == "ARG" and "=" in step.text:
            arguments |= [step.text.split("=", 1)]
        if step.name == "FROM":
            faults += check_base(step, arguments)
        if step.name == "COPY":
            faults += check_copy(step, stages - {step.stage}, sent)
        if step.name == "RUN":
            faults += check_run(step, read_extras())
        if step.name in PROGRAMS and not isinstance(json.loads(step.text.removeprefix("CMD ")), list):
            faults.append(f"{step.name} starts a shell")
        stages.add(step.stage)
    return faults + check_users(steps)


def read_ignored() -> str:
    return FILE.with_name("Dockerfile.dockerignore").read_text(encoding="utf-8")


def test_the_dockerfile_has_no_fault():
    steps = parse(FILE.read_text(encoding="utf-8"))
    assert [step.stage for step in steps if step.name == "FROM"] == ["wheel", "service", "device"]
    assert find_faults(FILE.read_text(encoding="utf-8"), read_ignored()) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("ARG PYTHON=3.11-slim-bookworm", "ARG PYTHON=latest", "python:latest has no fixed version"),
        ("COPY deploy deploy", "COPY deploi deploy", "deploi does not exist"),
        ("COPY deploy deploy", "COPY docs docs", "docs is not sent"),
        ("[openvino]", "[openvion]", "extra openvion"),
        ("--from=wheel", "--from=weel", "there is no stage weel yet"),
        ("-c /install/constraints.txt", "", "pip installs other versions than those of constraints.txt"),
        ("--no-cache-dir", "", "pip leaves its cache in the image"),
        ("USER 10001", "", "device runs as root"),
        ("EXPOSE", "ADD", "unknown instruction ADD"),
    ],
)
def test_faults_of_a_dockerfile_are_found(old, new, fault):
    text = FILE.read_text(encoding="utf-8")
    assert old in text
    assert fault in find_faults(text.replace(old, new), read_ignored())


def test_the_script_without_docker_builds_these_stages(script):
    build = script("build_image")
    steps = parse(FILE.read_text(encoding="utf-8"))
    assert build.read_base() == "docker.io/library/python:3.11-slim-bookworm"
    assert set(build.STAGES) == {step.stage for step in steps if step.name == "ENTRYPOINT"}


def test_a_file_with_two_names_counts_once(script, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(bytes(1000))
    (tmp_path / "again").hardlink_to(tmp_path / "folder" / "file")
    (tmp_path / "other").write_bytes(bytes(10))
    assert script("build_image").measure(tmp_path) == 1010


def test_what_the_images_start_exists(example):
    steps = parse(FILE.read_text(encoding="utf-8"))
    ends = {
        (step.stage, step.name): json.loads(step.text) for step in steps if step.name in {"ENTRYPOINT", "CMD"}
    }
    assert ends["device", "ENTRYPOINT"] == ["cmt-edge"]
    assert ends["device", "CMD"][0] in COMMANDS
    pytest.importorskip("fastapi", reason="needs FastAPI: pip install 'cmt-edge[examples]'")
    python, script, *words = ends["service", "ENTRYPOINT"]
    (copied,) = (step.text.split() for step in steps if step.name == "COPY" and step.text.endswith(script))
    assert (python, copied) == ("python", ["examples/service/service.py", script])
    options = example("service/service.py").build_parser().parse_args(words)
    (port,) = (step.text for step in steps if step.name == "EXPOSE")
    assert (str(options.bundle), options.host, str(options.port)) == ("/bundle", "0.0.0.0", port)
    (health,) = (step.text for step in steps if step.name == "HEALTHCHECK")
    assert f":{port}/health" in health


def copy_files(target: Path) -> None:
    """The files that the stage ``wheel`` copies."""
    for step in parse(FILE.read_text(encoding="utf-8")):
        if step.name == "COPY" and step.stage == "wheel":
            *names, place = step.text.split()
            for name in names:
                to = target / (name if place == "./" else place)
                if (ROOT / name).is_dir():
                    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info")
                    shutil.copytree(ROOT / name, to, symlinks=True, ignore=skipped)
                else:
                    shutil.copy2(ROOT / name, to)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("setuptools_scm") is None, reason="needs setuptools-scm, which builds the wheel"
)
def test_what_is_copied_builds_a_wheel_of_the_version_that_is_told(tmp_path):
    (tmp_path / "sources").mkdir()
    copy_files(tmp_path / "sources")
    (variable,) = set(re.findall(r"(\w+)=\"\$VERSION\"", FILE.read_text(encoding="utf-8")))
    code = f"import setuptools.build_meta as backend; print(backend.build_wheel({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "sources",
        env={**os.environ, variable: "7.8.9"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "cmt_edge-7.8.9-py3-none-any.whl").is_file()
