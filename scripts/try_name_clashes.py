"""Runs cmt-edge in folders whose own files have the names of its rooms, and reports what was hidden.

A user's folder may hold ``export.py``, ``deploy/``, ``cmt.py`` and ``calib/``. Python puts the current
folder first on the import path for ``python -m`` and ``python -c``, so a package of these names would be
hidden by them. Each file raises when it is imported. A second folder holds empty folders of the same names,
as ``-o export`` makes them: Python imports such a folder as a namespace package.

    python scripts/try_name_clashes.py [--quick]

The interpreter that runs the script must have cmt-edge installed (or ``PYTHONPATH`` must lead to it).
``--quick`` leaves the exports out, and takes seconds instead of a minute. The exit code is 0 if every trial
worked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOMS = ("cmt", "export", "calib", "deploy")
"""Names that a user's own files may have; the folders at the top of the repository have them too."""

COMMANDS = ("export", "predict", "verify", "bench", "build", "report")
"""The commands, without ``cmt-``."""

TRAP = 'raise ImportError(f"{__name__} of the current folder was imported")\n'
"""What each file of the user's folder does when it is imported."""

FRONT_DOOR = """
from cmt_edge import Bundle, ExportConfig, Predictor, __version__, benchmark, create_model, export, verify
from cmt_edge.export import run
import cmt_edge.calib, cmt_edge.cmt, cmt_edge.deploy
assert create_model("cmt_nano").num_classes == 10 and callable(export)
"""
"""Imports every room through the public names."""

EXPORT = ("--name", "net", "--precision", "int8", "--data", "generated", "--calib-size", "8", "-o", "export")
"""An int8 export in seconds, into a folder with the name of a room, without its model."""

OWN_MODEL = """
from torch import nn
def small():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    net.img_size = 64
    return net
"""
"""A module of the user's own with a model that is exported faster than any of the registry."""

DRAW = """
from PIL import Image
Image.radial_gradient("L").convert("RGB").save("picture.png")
"""
"""Makes the picture that is classified."""

MEASURE = """
import sys
from pathlib import Path
import numpy as np
from cmt_edge import Bundle
from cmt_edge.deploy.measure.child import MeasuringProcess
np.save("pixels.npy", np.zeros((1, 64, 64, 3), np.uint8))
with MeasuringProcess() as child:
    (logits,) = child.logits(Path(sys.argv[1]), [Path("pixels.npy")], 1)
assert logits.shape == (1, 10)
"""
"""Computes logits in a child process, which is started in the user's folder."""

TIME_LIMIT_S = 300
"""The time that one trial may take, in seconds."""


@dataclass(frozen=True)
class Trial:
    """One command line, and where it runs."""

    name: str
    command: tuple[str, ...]
    folder: Path

    def run(self) -> str:
        """Run the command; returns an empty text, or what went wrong."""
        search = [str(self.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        done = subprocess.run(
            self.command,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT_S,
            check=False,
        )
        if done.returncode == 0:
            return ""
        return f"exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}"


def write_user_files(folder: Path) -> None:
    """Two modules and two packages that must never be imported."""
    for name in ("export", "cmt"):
        (folder / f"{name}.py").write_text(TRAP, encoding="utf-8")
    for name in ("deploy", "calib"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(TRAP, encoding="utf-8")


def make_empty_folders(folder: Path) -> None:
    """Folders without files, which Python would import as namespace packages, beside the user's model."""
    for name in ROOMS:
        (folder / name).mkdir()
    (folder / "net.py").write_text(OWN_MODEL, encoding="utf-8")


FOLDERS = (
    ("own_files", write_user_files, "cmt_nano"),
    ("empty_folders", make_empty_folders, "net.py:small"),
)
"""Each user's folder: its name, what fills it, and the model that is exported in it."""


def find_entry_point(command: str) -> tuple[str, ...]:
    """The installed script of a command; empty if it is not beside the interpreter."""
    script = Path(sys.executable).parent / f"cmt-{command}"
    return (str(script),) if script.exists() else ()


def make_light_trials(folder: Path) -> Iterator[Trial]:
    """The front door and the help texts."""
    yield Trial("front door", (sys.executable, "-c", FRONT_DOOR), folder)
    module = (sys.executable, "-m", "cmt_edge")
    yield Trial("python -m cmt_edge --help", (*module, "--help"), folder)
    for command in COMMANDS:
        yield Trial(f"python -m cmt_edge {command} --help", (*module, command, "--help"), folder)
        if script := find_entry_point(command):
            yield Trial(f"cmt-{command} --help", (*script, "--help"), folder)


def make_heavy_trials(folder: Path, model: str) -> Iterator[Trial]:
    """An export of ``model``, and what uses the bundle."""
    python, module = (sys.executable,), (sys.executable, "-m", "cmt_edge")
    yield Trial("draw a picture", (*python, "-c", DRAW), folder)
    export = (*module, "export", "--model", model, *EXPORT)
    yield Trial(f"export {model} to int8 with -o export", export, folder)
    bundle = "export/net_int8_openvino"
    yield Trial("predict", (*module, "predict", bundle, "picture.png"), folder)
    yield Trial("verify", (*module, "verify", bundle), folder)
    yield Trial("measure in a child process", (*python, "-c", MEASURE, bundle), folder)


def report(trials: Iterator[Trial]) -> int:
    """Run the trials, print a line for each; returns how many failed."""
    failed = 0
    for trial in trials:
        problem = trial.run()
        failed += bool(problem)
        print(f"{'FAILED' if problem else 'ok':<7}{trial.folder.name}: {trial.name}", flush=True)
        if problem:
            print(problem, flush=True)
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Try both folders; returns 0 if nothing was hidden."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="leave out the exports")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as top:
        for name, fill, model in FOLDERS:
            folder = Path(top) / name
            folder.mkdir()
            fill(folder)
            failed += report(make_light_trials(folder))
            if not options.quick:
                failed += report(make_heavy_trials(folder, model))
    print("every name was found" if not failed else f"{failed} trials failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
