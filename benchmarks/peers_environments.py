"""The environments of optional peers: each tool with its own packages, made when it is asked for.

The configured index serves them. PyTorch is the version of ``constraints.txt``; an environment that would
bring CUDA is refused before anything is downloaded. No tool may install packages or call home: see
:data:`QUIET`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The repository."""

COMMON = ("numpy", "pillow", "platformdirs", "safetensors", "tqdm")
"""What the code of this repository needs beside PyTorch in every environment."""

PACKAGES = {
    "executorch": ("executorch==1.5.1", "torchao==0.18.0"),
    "litert": ("litert-torch==0.10.0", "torchao==0.18.0"),
    "ncnn": ("ncnn==1.0.20261020", "pnnx==20261020"),
    "pt2e": ("torchao==0.18.0",),
}
"""Name of an environment -> the packages that its tool needs."""

CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")
"""How the names of packages begin that bring gigabytes of CUDA."""

QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "NNCF_CI": "1",
    "PIP_NO_INDEX": "1",
    "HTTP_PROXY": "http://127.0.0.1:9",
    "HTTPS_PROXY": "http://127.0.0.1:9",
    "ALL_PROXY": "http://127.0.0.1:9",
}
"""Settings under which tools run: no telemetry, no index for pip, and a proxy at which nobody listens."""

INSTALL_LIMIT_S = 2700
"""Seconds after which an installation is given up."""

SHOWN_CHARACTERS = 240
"""Of pip's last error line, how many a row shows."""

CHILD, HERE = "child", ""
"""What a row may name instead of an environment: a process of this interpreter, and this process."""


class MissingEnvironment(RuntimeError):
    """The packages of an environment cannot be installed here."""


@dataclass
class Environments:
    """Finds the interpreter of each environment, and makes the environment the first time."""

    folder: Path

    def __post_init__(self) -> None:
        self._known: dict[str, str | MissingEnvironment] = {}

    def find(self, name: str) -> str:
        """The interpreter of an environment.

        Raises:
            MissingEnvironment: its packages cannot be installed, or they would bring CUDA.
        """
        if name in (HERE, CHILD):
            return sys.executable
        if name not in self._known:
            try:
                self._known[name] = self._make(name)
            except MissingEnvironment as exc:
                self._known[name] = exc
        known = self._known[name]
        if isinstance(known, MissingEnvironment):
            raise known
        return known

    def _make(self, name: str) -> str:
        place = self.folder / name
        python, complete = place / "bin" / "python", place / "complete"
        if complete.exists():
            return str(python)
        venv.create(place, with_pip=True, clear=True)
        wanted = [read_torch_pin(), *COMMON, *PACKAGES[name]]
        refuse_cuda(str(python), wanted)
        install(str(python), wanted)
        complete.touch()
        return str(python)


def read_torch_pin() -> str:
    """The requirement of PyTorch in ``constraints.txt``, such as ``torch==2.13.0``."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def refuse_cuda(python: str, wanted: list[str]) -> None:
    """Raise :class:`MissingEnvironment` if pip would install packages of CUDA beside ``wanted``."""
    report = json.loads(install(python, wanted, "--dry-run", "--report", "-") or "{}")
    names = [item["metadata"]["name"] for item in report.get("install", ())]
    found = find_cuda(names)
    if found:
        raise MissingEnvironment(f"the environment would bring CUDA: {', '.join(found)}")


def find_cuda(names: list[str]) -> list[str]:
    """The packages among ``names`` that bring CUDA."""
    return sorted(name for name in names if name.lower().startswith(CUDA_PREFIXES))


def install(python: str, wanted: list[str], *options: str) -> str:
    """What pip prints while it installs; raises :class:`MissingEnvironment` with its last error."""
    command = [python, "-m", "pip", "install", "--quiet", *options, *wanted]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=INSTALL_LIMIT_S)
    except subprocess.TimeoutExpired as exc:
        raise MissingEnvironment(f"pip did not finish within {INSTALL_LIMIT_S} s") from exc
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        said = errors[-1] if errors else f"pip ended with status {done.returncode}"
        raise MissingEnvironment(said[:SHOWN_CHARACTERS])
    return done.stdout


def make_variables() -> dict[str, str]:
    """The variables of a child: ours, the quiet ones, and where this repository's package lies."""
    return os.environ | QUIET | {"PYTHONPATH": str(ROOT / "src")}
