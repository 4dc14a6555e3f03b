"""Write the sets of pinned packages with the hashes of their files.

usage: python scripts/lock.py [--check]

``requirements/locked.txt`` holds every pin of ``constraints.txt`` but torch's, whose index each user chooses.
``requirements/supply.txt`` holds the tools of ``requirements/supply.in`` and what they need,
``requirements/docs.txt`` those of ``requirements/docs.in``, and ``requirements/rtx.txt`` the compiler of
``requirements/rtx.in``. A pin has the hashes of all its files in the
package index, for every platform. ``uv`` asks the index; ``make lock`` runs this script where ``uv`` is
installed. ``--check`` asks no index and writes nothing; the exit code is 1 if the first file does not fit the
pins.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

from resolved import ROOT, normalize

CONSTRAINTS = ROOT / "constraints.txt"
"""The pins, which people and Dependabot edit."""

LOCKED = ROOT / "requirements" / "locked.txt"
"""The pins with hashes, without torch."""

TOOLS = ROOT / "requirements" / "supply.in"
"""The names of the tools for the supply chain."""

LOCKED_TOOLS = ROOT / "requirements" / "supply.txt"
"""The tools and what they need, with hashes."""

PAGES = ROOT / "requirements" / "docs.in"
"""The names of the tools that build the pages."""

LOCKED_PAGES = ROOT / "requirements" / "docs.txt"
"""Those tools and what they need, with hashes."""

COMPILER = ROOT / "requirements" / "rtx.in"
"""The package of TensorRT for RTX, with its version."""

LOCKED_COMPILER = ROOT / "requirements" / "rtx.txt"
"""TensorRT for RTX with hashes."""

PYTHON = "3.11"
"""The version of Python that the pins are for."""

UNLOCKED = "torch"
"""The package whose index, and so whose file, each user chooses."""

TIME_LIMIT_S = 600
"""The time that uv may take for one file, in seconds."""

HEAD = "# This file is made by `make lock`. Edit {source} instead.\n"
"""The first line of a file that this script writes."""

PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", re.MULTILINE)
"""A package and its version at the start of a line."""


def read_pins(text: str) -> dict[str, str]:
    """Name -> version of a file of constraints or requirements."""
    return {normalize(name): version for name, version in PIN.findall(text)}


def read_hashes(text: str) -> dict[str, set[str]]:
    """Name -> the SHA-256 of every file that may be installed, in hexadecimal."""
    found: dict[str, set[str]] = {}
    starts = list(PIN.finditer(text))
    for start, following in zip(starts, [*starts[1:], None], strict=False):
        block = text[start.end() : following.start() if following else None]
        found[normalize(start[1])] = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", block))
    return found


def find_faults(constraints: str, locked: str) -> list[str]:
    """What differs between the pins and the file with hashes, one sentence each."""
    wanted, present = read_pins(constraints), read_pins(locked)
    wanted.pop(UNLOCKED, None)
    faults = [f"{name} is locked, but it is not pinned." for name in sorted(present.keys() - wanted)]
    faults += [f"{name} is pinned, but it is not locked." for name in sorted(wanted.keys() - present)]
    for name in sorted(wanted.keys() & present.keys()):
        if wanted[name] != present[name]:
            faults.append(f"{name} is pinned at {wanted[name]}, but locked at {present[name]}.")
    faults += [f"{name} has no hash." for name, hashes in sorted(read_hashes(locked).items()) if not hashes]
    return faults


def compile_hashes(source: Path, target: Path, *options: str) -> None:
    """Let uv write ``target``: every package of ``source`` with the hashes of its files."""
    uv = Path(sysconfig.get_path("scripts")) / "uv"
    if not uv.is_file():
        raise SystemExit("error: uv is not installed in this environment; run: make lock")
    command = [
        str(uv),
        "pip",
        "compile",
        "--quiet",
        "--upgrade",
        "--generate-hashes",
        "--python-version",
        PYTHON,
    ]
    command += ["--no-header", "--no-annotate", *options, str(source)]
    environment = dict(os.environ)
    if certificates := environment.get("PIP_CERT"):
        environment.setdefault("SSL_CERT_FILE", certificates)
    done = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"error: uv failed with exit code {done.returncode}; its message is above")
    head = HEAD.format(source=source.relative_to(ROOT).as_posix())
    target.write_text(head + done.stdout, encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Write all files, or check the first; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and compare with the pins")
    options = parser.parse_args(arguments)
    if not options.check:
        compile_hashes(CONSTRAINTS, LOCKED, "--no-deps", "--no-emit-package", UNLOCKED)
        compile_hashes(TOOLS, LOCKED_TOOLS)
        compile_hashes(PAGES, LOCKED_PAGES, "--constraint", str(CONSTRAINTS))
        compile_hashes(COMPILER, LOCKED_COMPILER)
    locked = LOCKED.read_text(encoding="utf-8")
    faults = find_faults(CONSTRAINTS.read_text(encoding="utf-8"), locked)
    if faults:
        print(*faults, "Run: make lock", sep="\n", file=sys.stderr)
        return 1
    hashes = read_hashes(locked)
    print(f"{len(hashes)} packages, {sum(map(len, hashes.values()))} hashes; not locked: {UNLOCKED}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
