"""Shows that what a device needs resolves to wheels, with no source builds, on the Pythons of Jetson's two
Ubuntus.

    python scripts/check_aarch64_wheels.py [--json]

Asks the package index that pip is set up with; resolves but installs nothing. TensorRT itself is not
resolved: it comes with JetPack. Exit code 0 if every required extra resolves, 1 if one does not, 2 if
pyproject.toml lacks one, 3 if the index cannot be reached. OpenVINO is shown as information and decides
nothing.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

from cmt_edge.deploy.report import format_table

ROOT = Path(__file__).resolve().parent.parent

REQUIRED = ("onnxruntime", "tensorrt", "tensorrt-cu12")
"""Extras that must resolve on every target."""

INFORMATION = ("openvino",)
"""Extras that are reported only."""

UNREACHABLE = re.compile("connection broken|Could not fetch URL|ConnectionError|ReadTimeout", re.IGNORECASE)
"""What pip says where the index does not answer."""

PIP = """
import json, runpy, sys
from pip._vendor.packaging import markers
environment = {**markers.default_environment(), **json.loads(sys.argv.pop(1))}
markers.default_environment = lambda: dict(environment)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""
"""Runs pip for another machine. pip takes wheel tags from its options, but it evaluates markers for the
Python that runs it, so this tells the markers the target. The report names its environment, which
:func:`resolve` checks."""


class UnreachableError(Exception):
    """The package index does not answer."""


@dataclass(frozen=True)
class Target:
    """A Linux distribution by what decides which wheels it takes."""

    name: str
    python: str
    glibc: int  # the 35 of 2.35

    def platforms(self) -> list[str]:
        """Every tag the distribution accepts: pip derives no older glibc from a newer one."""
        return ["manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in range(17, self.glibc + 1))]

    def markers(self) -> dict[str, str]:
        version = {"python_version": self.python.rpartition(".")[0], "python_full_version": self.python}
        system = {
            "platform_machine": "aarch64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }
        return version | system | {"implementation_name": "cpython", "implementation_version": self.python}


TARGETS = (Target("Ubuntu 22.04, JetPack 6", "3.10.12", 35), Target("Ubuntu 24.04, JetPack 7", "3.12.3", 39))
"""The systems of the devices that are supported."""


@dataclass(frozen=True)
class Wheel:
    package: str
    version: str
    file: str
    bytes: int | None  # None where the index does not tell


@dataclass(frozen=True)
class Resolution:
    target: Target
    extra: str
    required: bool
    wheels: list[Wheel] = field(default_factory=list)
    error: str | None = None


def list_requirements(pyproject: Path) -> dict[str, list[str]]:
    """What each extra needs on a device: the dependencies and its own."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    if missing := [name for name in REQUIRED + INFORMATION if name not in extras]:
        raise ValueError(f"{pyproject} has no extra {', '.join(missing)}")
    return {name: project["dependencies"] + extras[name] for name in REQUIRED + INFORMATION}


def resolve(target: Target, extra: str, wanted: list[str]) -> Resolution:
    """Let pip resolve ``wanted`` for ``target``; raises UnreachableError, and ValueError where pip ignores
    the target."""
    with tempfile.TemporaryDirectory() as folder:
        command = make_pip_command(target, folder, wanted)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    required = extra in REQUIRED
    if done.returncode:
        if UNREACHABLE.search(done.stderr):
            raise UnreachableError
        errors = re.findall(r"^ERROR: (.*)", done.stderr, re.MULTILINE) or done.stderr.split("\n")[-2:]
        return Resolution(target, extra, required, error=errors[-1])
    report = json.loads(done.stdout)
    if not target.markers().items() <= report["environment"].items():
        raise ValueError("this pip evaluates markers for the machine it runs on, not for the target")
    wheels = sorted(map(read_wheel, report["install"]), key=lambda w: w.package.lower())
    return Resolution(target, extra, required, wheels)


def make_pip_command(target: Target, folder: str, wanted: list[str]) -> list[str]:
    """pip, which installs nothing and reports as JSON what it would install into ``folder``."""
    python = [sys.executable, "-c", PIP, json.dumps(target.markers())]
    install = ["install", "--dry-run", "--ignore-installed", "--only-binary=:all:", "--target", folder]
    platforms = [part for tag in target.platforms() for part in ("--platform", tag)]
    machine = ["--implementation", "cp", "--python-version", target.python, *platforms]
    quiet = ["--disable-pip-version-check", "--no-input", "--retries", "1", "--quiet", "--report", "-"]
    return [*python, *install, *machine, *quiet, *wanted]


def read_wheel(item: dict) -> Wheel:
    url = item["download_info"]["url"]
    return Wheel(item["metadata"]["name"], item["metadata"]["version"], url.rpartition("/")[2], size(url))


@lru_cache
def size(url: str) -> int | None:
    """Bytes of a file of the index; None where it does not tell."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=20) as response:
            return int(response.headers["Content-Length"])
    except (OSError, TypeError, ValueError):
        return None


def text(results: list[Resolution]) -> str:
    rows = [
        [
            r.target.python,
            r.extra,
            w.package,
            w.version,
            w.file,
            "?" if w.bytes is None else f"{w.bytes / 1e6:.1f}",
        ]
        for r in results
        for w in r.wheels
    ]
    lines = [format_table(["Python", "extra", "package", "version", "wheel", "MB"], rows), ""]
    for r in results:
        known = [w.bytes for w in r.wheels if w.bytes is not None]
        total = f"{len(r.wheels)} wheels, {sum(known) / 1e6:.1f} MB" + (
            " or more" if len(known) < len(r.wheels) else ""
        )
        note = "" if r.required else " (information only)"
        lines.append(f"Python {r.target.python} ({r.target.name}), {r.extra}{note}: {r.error or total}")
    return "\n".join(lines)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--pyproject", type=Path, default=ROOT / "pyproject.toml", help="read another file's requirements"
    )
    p.add_argument("--json", action="store_true", help="print one JSON object")
    args = p.parse_args()
    try:
        results = [
            resolve(t, extra, wanted)
            for t in TARGETS
            for extra, wanted in list_requirements(args.pyproject).items()
        ]
    except (OSError, ValueError) as exc:
        print(f"error: {exc}", file=sys.stderr)
        return 2
    except UnreachableError:
        print(
            "error: the package index cannot be reached; check the network and pip's settings",
            file=sys.stderr,
        )
        return 3
    failed = [r for r in results if r.error and r.required]
    as_json = {"passed": not failed, "resolutions": [asdict(r) for r in results]}
    print(json.dumps(as_json, indent=1) if args.json else text(results))
    for r in failed:
        print(f"does not resolve on Python {r.target.python}: {r.extra}: {r.error}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
