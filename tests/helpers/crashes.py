"""Every system call of a real command fails in turn, and what that leaves behind is looked at."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import BundleWriter
from cmt_edge.deploy.bundle.packed import locate_packed, pack
from cmt_edge.deploy.errors import CmtEdgeError, StepError

from .bundles import snapshot
from .faults import ERRORS, Fault, Faults
from .forks import ForkServer
from .paths import FAKES, ROOT
from .trt import trt_bundle

CLEANING = ("open", "remove")
"""Kinds of calls that cleaning up needs itself: where one fails, the next run cleans up."""
TYPED = {0, 1, 2, 3}
"""Exit codes of a command that has understood what happened to it."""
TYPED_KILLED = TYPED | {-signal.SIGKILL, StepError.exit_code}
"""The same where the command was killed, or its child: that is a failed step, and not a bad input."""


@dataclass(frozen=True)
class Scenario:
    """A command, and what it works on.

    Attributes:
        name: for reports.
        command: its words; ``{work}`` stands for the folder that is watched.
        kinds: the calls that fail.
        plant: makes what must lie there before.
        bundles: folders and packed files, relative to the watched one, that hold a whole bundle before and
            afterwards.
    """

    name: str
    command: tuple[str, ...]
    kinds: tuple[str, ...]
    plant: Callable[[Path], None]
    bundles: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What a fault led to; ``complaint`` is empty where everything is as promised."""

    scenario: str
    fault: Fault | None
    code: int
    call: str
    complaint: str


class Attack:
    """Runs scenarios with faults, in a folder of its own; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self._faults = Faults(folder, self.work)
        self._logs = [folder / name for name in ("stdout", "stderr")]
        self._kept = folder / "traced"
        self._kept.mkdir()

    def __enter__(self) -> Attack:
        places = [ROOT / "src", FAKES]
        self.work.mkdir()
        self._server = ForkServer(
            "helpers.command_server",
            str(self._kept),
            environment=os.environ
            | self._faults.environment
            | {
                "PYTHONPATH": os.pathsep.join(map(str, places)),
                "CMT_EDGE_CACHE": str(self.work / "cache"),
                "CMT_EDGE_STATE": str(self.work / "state"),
                "TMPDIR": str(self.work / "temporary"),
                "OMP_NUM_THREADS": "1",
            },
        )
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.__exit__(*exc)

    def count(self, scenario: Scenario, kind: str) -> int:
        """Calls of one kind in a run without a fault."""
        self._plant(scenario)
        self._faults.arm(None, (kind,))
        code = self._run(scenario)
        assert code == 0, self._logs[1].read_text()
        return self._faults.count

    def attempt(self, scenario: Scenario, fault: Fault) -> Outcome:
        """One run with a fault, and the look at what it left."""
        self._plant(scenario)
        before = self._contents(scenario)
        self._faults.arm(fault)
        code = self._run(scenario)
        call = (self._faults.lines or [""])[-1] if not fault.lasting else ""
        fired = self._faults.fired
        self._faults.arm(None, ())
        complaints = [*self._code_complaints(fault, code), *self._bundle_complaints(scenario, before)]
        if fault.error == "SIGKILL" or fault.kind in CLEANING:
            complaints += self._next_run(scenario)
        complaints += self._leftovers()
        complaint = "; ".join(complaints) if fired else ""
        return Outcome(scenario.name, fault, code, call, complaint)

    def _plant(self, scenario: Scenario) -> None:
        self._faults.arm(None, ())
        shutil.rmtree(self.work)
        (self.work / "temporary").mkdir(parents=True)
        scenario.plant(self.work)

    def _run(self, scenario: Scenario) -> int:
        stdout, stderr = map(str, self._logs)
        argv = [word.replace("{work}", str(self.work)) for word in scenario.command]
        return self._server({"argv": argv, "stdout": stdout, "stderr": stderr})

    def _contents(self, scenario: Scenario) -> list[dict[str, bytes]]:
        return [read_bundle(self.work / name) for name in scenario.bundles]

    def _code_complaints(self, fault: Fault, code: int) -> Iterator[str]:
        text = self._logs[1].read_text(errors="replace")
        if "Traceback" in text:
            yield f"a trace: {text.strip().splitlines()[-1]}"
        if code not in (TYPED_KILLED if fault.error == "SIGKILL" else TYPED):
            yield f"exit code {code}: {text.strip()[-200:]}"
        if code == 0 and fault.error != "SIGKILL" and "Error" in text:
            yield f"an error that the exit code hides: {text.strip()[-200:]}"

    def _bundle_complaints(self, scenario: Scenario, before: list[dict[str, bytes]]) -> Iterator[str]:
        for name, content in zip(scenario.bundles, before, strict=True):
            if read_bundle(self.work / name) == content:
                continue
            try:
                Bundle.open(self.work / name)
            except CmtEdgeError as exc:
                yield f"{name} is neither old nor new: {exc}"

    def _next_run(self, scenario: Scenario) -> Iterator[str]:
        """Run the command again where something was left, on files that are not new any more."""
        if not list(self._leftovers()):
            return
        for path in self._list_leftovers():
            status = path.stat()
            os.utime(path, (status.st_atime - 60, status.st_mtime - 60))
        code = self._run(scenario)
        if code != 0:
            yield f"the next run ends with {code}: {self._logs[1].read_text()[-200:]}"

    def _leftovers(self) -> Iterator[str]:
        found = [str(path.relative_to(self.work)) for path in self._list_leftovers()]
        if found:
            yield f"left: {', '.join(found)}"

    def _list_leftovers(self) -> list[Path]:
        """Hidden files, locks and files that are not complete."""
        return [
            path
            for path in self.work.rglob("*")
            if path.name.startswith(".") or path.suffix in (".lock", ".tmp")
        ]


def read_bundle(path: Path) -> dict[str, bytes]:
    """The content of a folder or of a packed file."""
    return {"": path.read_bytes()} if path.is_file() else snapshot(path)


def faults_of(counts: dict[str, int], errors: Iterable[str] = ERRORS) -> Iterator[Fault]:
    """Every fault of every call."""
    for kind, count in counts.items():
        for number in range(1, count + 1):
            for error in errors:
                yield Fault(kind, number, error)
                if error == "ENOSPC" and kind not in (
                    "open",
                    "read",
                    "remove",
                ):  # a full disk lets these pass
                    yield Fault(kind, number, error, lasting=True)


def exports(bundle: Bundle, image: bytes) -> dict[str, Scenario]:
    """The scenarios, by name.

    Args:
        bundle: of cmt_nano, ONNX, fp32, by its default name.
        image: an encoded image.
    """
    written = ("write", "fsync", "rename", "mkdir", "open", "remove")

    def older(work: Path) -> None:
        """A bundle that the export will replace; its labels differ."""
        for name in ("cmt_nano_fp32_onnx", "cmt_nano_int8_onnx"):
            with BundleWriter(work / "out" / name) as writer:
                shutil.copytree(
                    bundle.path,
                    writer.folder,
                    dirs_exist_ok=True,
                    ignore=shutil.ignore_patterns("manifest.json"),
                )
                writer.commit(replace(bundle.manifest, labels_source="published"))

    def older_packed(work: Path) -> None:
        """The same, with its packed form."""
        older(work)
        folder = work / "out" / "cmt_nano_fp32_onnx"
        pack(folder, Bundle.open(folder).manifest.files, locate_packed(folder))

    def given_packed(work: Path) -> None:
        given(work)
        pack(work / "bundle", bundle.manifest.files, locate_packed(work / "bundle"))

    def unbuilt(work: Path) -> None:
        trt_bundle(work / "tiny_fp16_trt")

    def given(work: Path) -> None:
        shutil.copytree(bundle.path, work / "bundle")
        (work / "image.png").write_bytes(image)

    export = ("export", "--model", "cmt_nano", "--format", "onnx", "-o", "{work}/out", "--threads", "1", "-q")
    brief = ("--iters", "2", "--seconds", "0", "--warmup", "1", "--no-throughput", "--threads", "1", "-q")
    found = [
        Scenario("export fp32", export, written, older, ("out/cmt_nano_fp32_onnx",)),
        Scenario(
            "export int8",
            (*export, "--precision", "int8", "--data", "generated", "--calib-size", "4"),
            written,
            older,
            ("out/cmt_nano_int8_onnx",),
        ),
        Scenario("verify", ("verify", "{work}/bundle"), ("open", "read"), given, ("bundle",)),
        Scenario(
            "predict", ("predict", "{work}/bundle", "{work}/image.png"), ("open", "read"), given, ("bundle",)
        ),
        Scenario(
            "bench",
            ("bench", "{work}/bundle", *brief, "--markdown", "{work}/report.md"),
            (*written, "read"),
            given,
            ("bundle",),
        ),
        Scenario(
            "pack",
            (*export, "--pack"),
            written,
            older_packed,
            ("out/cmt_nano_fp32_onnx", "out/cmt_nano_fp32_onnx.cmt.zip"),
        ),
        Scenario(
            "open packed",
            ("predict", "{work}/bundle.cmt.zip", "{work}/image.png"),
            (*written, "read"),
            given_packed,
            ("bundle.cmt.zip",),
        ),
        Scenario(
            "build",
            ("build", "{work}/tiny_fp16_trt", "--iters", "2", "--seconds", "0", "-q"),
            written,
            unbuilt,
            ("tiny_fp16_trt",),
        ),
    ]
    return {scenario.name: scenario for scenario in found}
