"""What pip would install: the packages of an extra, with their metadata and the hashes of their files.

Used by ``licences.py`` and ``sbom.py``. Nothing is installed. The package index is the one that pip is set up
with.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

PROJECT = "cmt-edge"
"""The name of this project, which every report contains."""

TIME_LIMIT_S = 600
"""The time that pip may take for one extra, in seconds."""


def normalize(name: str) -> str:
    """The name of a package as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


@dataclass(frozen=True)
class Package:
    """A package at one version: its core metadata, and the SHA-256 of the file in hexadecimal, if known."""

    metadata: dict[str, Any]
    sha256: str = ""

    @property
    def name(self) -> str:
        """The name as its authors write it."""
        return str(self.metadata["name"])

    @property
    def key(self) -> str:
        """The name as indexes compare it."""
        return normalize(self.name)

    @property
    def version(self) -> str:
        """The version, with the local part that a build may have (``2.13.0+cpu``)."""
        return str(self.metadata["version"])

    @property
    def public_version(self) -> str:
        """The version without a local part."""
        return self.version.partition("+")[0]

    @property
    def link(self) -> str:
        """The project's page: its home or its sources, otherwise the first link of the metadata."""
        pairs = [entry.partition(",") for entry in self.metadata.get("project_url", [])]
        links = {label.strip().lower(): link.strip() for label, _, link in pairs}
        for label in ("homepage", "home", "repository", "source", "source code"):
            if label in links:
                return links[label]
        return str(self.metadata.get("home_page") or next(iter(links.values()), ""))


def read_report(report: dict[str, Any]) -> list[Package]:
    """The packages of an installation report of pip, sorted by name; raises ``KeyError`` if it is none."""
    packages = []
    for entry in report["install"]:
        hashes = entry["download_info"].get("archive_info", {}).get("hashes", {})
        packages.append(Package(entry["metadata"], hashes.get("sha256", "")))
    return sorted(packages, key=lambda package: package.key)


UNCONSTRAINED = ("kserve",)
"""Extras that need older versions of some packages than ``constraints.txt`` names."""


def resolve(extra: str) -> list[Package]:
    """What ``pip install cmt-edge[EXTRA]`` would install at the pinned versions, an extra of
    :data:`UNCONSTRAINED` at the newest ones; this project is included."""
    wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    if extra not in UNCONSTRAINED:
        command += ["-c", str(ROOT / "constraints.txt")]
    command += ["--report", "-", wanted]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIME_LIMIT_S, check=False)
    if done.returncode:
        raise SystemExit(f"error: pip could not resolve {wanted}; its message is above")
    return read_report(json.loads(done.stdout))


def find_required(package: Package, extras: Iterable[str] = ()) -> set[str]:
    """The names of what a package with some extras requires on this platform. A package that requires
    itself with other extras, as ``all`` does, requires what those require."""
    names: set[str] = set()
    for requirement in map(Requirement, package.metadata.get("requires_dist", [])):
        marker = requirement.marker
        if marker and not any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            continue
        if normalize(requirement.name) == package.key:
            names |= find_required(package, requirement.extras)
        else:
            names.add(normalize(requirement.name))
    return names


def find_unreached(packages: Iterable[Package], extra: str) -> list[str]:
    """The packages that neither the project with its extra nor one of its requirements requires."""
    left = {package.key: package for package in packages}
    project = left.pop(PROJECT)
    waiting = find_required(project, [extra])
    while waiting:
        if package := left.pop(waiting.pop(), None):
            waiting |= find_required(package)
    return sorted(left)
