"""Builds the wheel, installs it with each extra in an empty environment, and does a real job there.

    python scripts/try_wheel.py [EXTRA ...] [--keep FOLDER]

Without arguments every extra for users is tried, and the wheel without an extra. Versions
are those of ``constraints.txt``, so the interpreter should be the one that the file was made for. The package
index is the one that pip is set up with. ``export`` and ``all`` install PyTorch, which takes minutes. The
interpreter that runs the script must have cmt-edge with ``export`` installed: it makes the bundle that the
device's commands serve. The exit code is 0 if every job ended as expected, and 1 otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from dataclasses import dataclass, field
from pathlib import Path

from cmt_edge.deploy.report import format_table

ROOT = Path(__file__).resolve().parent.parent
"""The checkout."""

TIME_LIMIT_S = 1200
"""The time that one command may take, in seconds."""

BUNDLE, PICTURES, PICTURE = "bundle", "pictures", "pictures/picture.ppm"
"""Names of the bundle, of a folder of pictures and of the picture in the folder in which the commands run."""

SCORES, SERVICE = ROOT / "examples/batch/score_folder.py", ROOT / "examples/service/service.py"
"""Programs that need the extra ``examples``."""


PRETEND = "SETUPTOOLS_SCM_PRETEND_VERSION_FOR_CMT_EDGE"
"""The variable that tells a build outside Git which version it is."""

MISSING = 3
"""The exit code of a command that lacks a runtime."""

DATA = ("--model", "cmt_nano", "--data", "generated", "--calib-size", "8")
"""The model and the calibration of an export in seconds."""


@dataclass(frozen=True)
class Job:
    """A command of the environment, the exit code that is right, and a text that it must print."""

    command: tuple[str, ...]
    code: int = 0
    text: str = ""


PREDICT = ("cmt-predict", BUNDLE, PICTURE)
"""Classifies the picture with the runtime of the bundle's format, ONNX Runtime."""

START = (
    Job(("python", "-c", "import cmt_edge; print(cmt_edge.__version__)")),
    Job(("cmt-edge", "--help"), text="doctor"),
    Job(("cmt-predict", "--help"), text="--topk"),
    Job(("cmt-export", "--help"), text="--precision"),
)
"""What every environment must do."""

BINDINGS = Job(("python", "-c", "import cuda.bindings.runtime, pynvml"))
"""The packages that the extras of TensorRT install; TensorRT itself comes with the device."""

COMPILER = Job(("python", "-c", "import tensorrt_rtx as t; assert t.Builder(t.Logger())"))
"""The compiler of TensorRT for RTX, which starts without a GPU."""

FAKE = f"""
from cmt_edge import Predictor
with Predictor.load({BUNDLE!r}, backend="fake") as predictor:
    print("class", predictor({PICTURE!r}).label)
"""
"""Predicts with the runtime of tests, which needs no package and which no command offers."""

SIGN = """
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cmt_edge.deploy.bundle.signature import sign
assert len(sign(b"a bundle", Ed25519PrivateKey.generate()).value) == 64
"""
"""Signs with a new key."""

RECORDED = """
import json, pathlib, cmt_edge
(path,) = pathlib.Path("out").glob("*/manifest.json")
assert json.loads(path.read_text())["versions"]["cmt-edge"] == cmt_edge.__version__
print("the manifest names the version")
"""
"""Compares the version that an exported bundle records with that of the package."""

RAY = """
from cmt_edge.deploy.scale.cluster import LOCAL, connected
with connected(LOCAL) as ray:
    print("workers may use", ray.cluster_resources()["CPU"], "cores")
"""
"""Starts a cluster on this machine and ends it."""

JOBS = {
    "": (
        Job(("python", "-c", FAKE), text="class"),
        Job(PREDICT, MISSING, 'pip install "cmt-edge[onnxruntime]"'),
        Job(("cmt-edge", "doctor"), text='pip install "cmt-edge[export]"'),
        Job(("cmt-edge", "doctor", "--format", "openvino"), MISSING, "openvino is not installed"),
    ),
    "openvino": (
        Job((*PREDICT, "--backend", "openvino"), text="%"),
        Job(("cmt-verify", BUNDLE, "--backend", "openvino")),
        Job(("cmt-edge", "doctor", "--format", "openvino"), text="fp32"),
    ),
    "onnxruntime": (
        Job(PREDICT, text="%"),
        Job(("cmt-verify", BUNDLE)),
        Job(("cmt-report", BUNDLE)),
    ),
    "tensorrt": (BINDINGS, Job((*PREDICT, "--backend", "tensorrt"), MISSING, "tensorrt is not installed")),
    "tensorrt-cu12": (
        BINDINGS,
        Job((*PREDICT, "--backend", "tensorrt"), MISSING, "tensorrt is not installed"),
    ),
    "rtx,export": (
        BINDINGS,
        COMPILER,
        Job(("cmt-export", *DATA, "--format", "rtx", "--precision", "int8", "-o", "out"), text="compiled by"),
    ),
    "rtx-cu13": (BINDINGS, COMPILER),
    "completion": (Job(("cmt-edge", "--completion", "bash"), text="cmt-edge"),),
    "sign": (Job(("python", "-c", SIGN)),),
    "examples,onnxruntime": (
        Job(("python", str(SCORES), BUNDLE, PICTURES, "-o", "scores.parquet"), text='"unreadable": 0'),
        Job(("python", str(SERVICE), "no_bundle"), 2, "no_bundle"),
    ),
    "kserve": (
        Job((*PREDICT, "--backend", "kserve"), 2, "HOST:PORT/MODEL"),
        Job(
            (*PREDICT, "--backend", "kserve", "--device", "127.0.0.1:9/m"),
            MISSING,
            "no inference server answers",
        ),
    ),
    "ray": (Job(("python", "-c", RAY), text="workers may use"),),
    "loadgen,onnxruntime": (
        Job(("cmt-bench", BUNDLE, "--seconds", "0.2", "--loadgen", "SingleStream"), text="SingleStream"),
    ),
    "report,onnxruntime": (Job(("cmt-bench", BUNDLE, "--seconds", "0.2", "--plot", "latency.svg")),),
    "export": (
        Job(("cmt-export", *DATA, "--format", "onnx", "--precision", "int8", "-o", "out")),
        Job(("python", "-c", RECORDED), text="the manifest names the version"),
    ),
    "all": (Job(("cmt-export", *DATA, "--format", "openvino", "--precision", "int8", "-o", "out")),),
}
"""Extras -> what is done in an environment that has the wheel with them."""


UNCONSTRAINED = ("kserve",)
"""Extras that need an older protobuf than ``constraints.txt`` names."""


@dataclass
class Trial:
    """An environment with some extras, and what went wrong in it."""

    extras: str
    seconds: float = 0.0
    packages: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def row(self) -> tuple[str, str, str, str]:
        """Its line of the table."""
        name = self.extras or "(none)"
        return name, str(self.packages), f"{self.seconds:.0f}", "FAILED" if self.problems else "ok"


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command without the variables that would lead Python to the checkout, and with ``variables``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return subprocess.run(
        command,
        cwd=cwd,
        env=environment | {"CMT_EDGE_CACHE": str(cwd / "cache")} | variables,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        check=False,
    )


def require(done: subprocess.CompletedProcess[str]) -> None:
    """Stop the script if a preparation failed."""
    if done.returncode:
        raise SystemExit(f"error: {done.args} failed\n{done.stdout[-1000:]}{done.stderr[-3000:]}")


def build_wheel(folder: Path) -> Path:
    """A wheel of the files that git knows, as they are now; the checkout stays clean."""
    scm = run(sys.executable, "-m", "setuptools_scm", cwd=ROOT)
    require(scm)
    version = scm.stdout.strip()
    listed = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for name in filter(lambda name: os.path.lexists(ROOT / name), listed):
        (folder / "sources" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "sources" / name, follow_symlinks=False)
    pip = (sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder / "wheel"))
    require(run(*pip, str(folder / "sources"), cwd=folder, **{PRETEND: version}))
    (wheel,) = (folder / "wheel").iterdir()
    return wheel


def prepare(folder: Path) -> None:
    """Make the bundle, by the interpreter that runs this script, and a picture."""
    export = ("--model", "cmt_nano", "--weights", "random", "--format", "onnx", "--precision", "fp32")
    command = (sys.executable, "-m", "cmt_edge", "export", *export, "-o", str(folder / "made"))
    require(subprocess.run(command, capture_output=True, text=True, check=False))
    (made,) = (folder / "made").iterdir()
    made.rename(folder / BUNDLE)
    (folder / PICTURES).mkdir()
    (folder / PICTURE).write_bytes(b"P6 64 64 255\n" + bytes(range(192)) * 64)


def try_extras(extras: str, wheel: Path, folder: Path) -> Trial:
    """Install the wheel with ``extras`` and do its jobs."""
    trial = Trial(extras)
    place = folder / f"env-{extras.replace(',', '-') or 'none'}"
    start = time.monotonic()
    venv.create(place, with_pip=True)
    wanted = f"{wheel}[{extras}]" if extras else str(wheel)
    pip = (str(place / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
    limits = () if extras in UNCONSTRAINED else ("-c", str(ROOT / "constraints.txt"))
    done = run(*pip, "install", "--quiet", *limits, wanted, cwd=folder)
    trial.seconds = time.monotonic() - start
    if done.returncode:
        trial.problems.append(done.stderr[-3000:])
        return trial
    trial.packages = len(run(*pip, "list", "--format", "freeze", cwd=folder).stdout.splitlines())
    for job in (*START, *tell_version(wheel), *JOBS[extras]):
        if problem := try_job(job, place, folder):
            trial.problems.append(problem)
    return trial


def tell_version(wheel: Path) -> tuple[Job, Job]:
    """What every environment must say of the wheel's version, which stands in its name."""
    version = wheel.name.split("-")[1]
    asked = "from importlib.metadata import version; print(version('cmt-edge'))"
    return Job(("cmt-edge", "--version"), text=f"cmt-edge {version}\n"), Job(
        ("python", "-c", asked), text=f"{version}\n"
    )


def try_job(job: Job, place: Path, folder: Path) -> str:
    """Run one command of an environment; returns an empty text, or what went wrong."""
    program, *arguments = job.command
    done = run(str(place / "bin" / program), *arguments, cwd=folder)
    printed = done.stdout + done.stderr
    if done.returncode == job.code and job.text in printed:
        return ""
    wanted = f"exit code {job.code}" + (f" and {job.text!r}" if job.text else "")
    return f"{' '.join(job.command)}: exit code {done.returncode}, wanted {wanted}\n{printed[-3000:]}"


def main(arguments: list[str] | None = None) -> int:
    """Try the extras one after the other, and print the table; returns 1 if a job failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ", ".join(filter(None, JOBS))
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help=f"extras to try (default: all): {known}")
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep the environments in this new folder"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.extras if name not in JOBS]
    if unknown:
        parser.error(f"there is no job for the extras {', '.join(unknown)}; known are: {known}")
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=options.keep is None)
        wheel = build_wheel(folder)
        prepare(folder)
        trials = []
        for extras in options.extras or JOBS:
            trials.append(try_extras(extras, wheel, folder))
            print(*trials[-1].row, *trials[-1].problems, sep="  ", file=sys.stderr, flush=True)
    print(format_table(("extras", "packages", "install s", "jobs"), [trial.row for trial in trials]))
    return int(any(trial.problems for trial in trials))


if __name__ == "__main__":
    sys.exit(main())
