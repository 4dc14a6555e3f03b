"""``cmt-edge doctor``: a broken runtime is a line, a missing one has its remedy."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from cmt_edge.deploy import report
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT
from cmt_edge.deploy.children import ChildCrashed, ChildTimedOut
from cmt_edge.deploy.cli import doctor as command
from cmt_edge.deploy.doctor import checkup
from cmt_edge.deploy.doctor.limits import is_on_battery, read_limits, read_profile
from cmt_edge.deploy.doctor.probe import probe
from cmt_edge.deploy.errors import RuntimeMissingError
from cmt_edge.deploy.measure.checkup import Checkup, Fault, FoundDevice, RuntimeState
from helpers.paths import ROOT

CPU = FoundDevice("CPU", "this processor", ("fp32", "int8"))
WORKING = RuntimeState("openvino", "openvino 2026.4.1", (CPU,), None)


def answer(name: str) -> RuntimeState:
    """A machine where every runtime works."""
    return replace(WORKING, name=name, version=f"{name} 1.0")


def check_up(monkeypatch, ask=answer, formats=tuple(RUNTIME_OF_FORMAT)) -> Checkup:
    monkeypatch.setattr(checkup, "find_spec", lambda name: object())
    return checkup.check_up(formats, lambda name: nullcontext(), ask)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


# --- limits ---------------------------------------------------------------------------------------


def test_the_tightest_control_group_counts(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/box\n",
            "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/pod/box/memory.max": "max\n",
            "sys/fs/cgroup/pod/memory.max": "1073741824\n",
            "sys/fs/cgroup/memory.max": "2147483648\n",
            "proc/meminfo": "MemTotal:  4096 kB\nMemAvailable:  1024 kB\n",
        },
    )
    limits = read_limits(root)
    assert (limits.cpu_quota, limits.memory_limit) == (1.5, 2**30)
    assert (limits.memory, limits.memory_available) == (4096 * 1024, 1024 * 1024)
    assert set(limits.affinity) == set(os.sched_getaffinity(0))


def test_control_groups_of_version_1(tmp_path):
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n",
            "sys/fs/cgroup/cpu,cpuacct/unused": "",
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/memory/box/memory.limit_in_bytes": "1048576\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    limits = read_limits(root)
    assert (limits.cpu_quota, limits.memory_limit) == (0.5, 2**20)


def test_a_machine_that_tells_nothing(tmp_path):
    limits = read_limits(tmp_path)
    assert (limits.cpu_quota, limits.memory, limits.memory_limit) == (None, None, None)
    assert (read_profile(tmp_path), is_on_battery(tmp_path)) == (None, None)


def test_the_power_of_a_laptop(tmp_path):
    supply = "sys/class/power_supply"
    files = {f"{supply}/AC/type": "Mains\n", f"{supply}/AC/online": "0\n", f"{supply}/BAT0/type": "Battery\n"}
    root = write(tmp_path, {"sys/firmware/acpi/platform_profile": "low-power\n"} | files)
    assert (read_profile(root), is_on_battery(root)) == ("low-power", True)
    write(root, {f"{supply}/AC/online": "1\n"})
    assert is_on_battery(root) is False


# --- runtimes and formats -------------------------------------------------------------------------


def test_where_all_works_nothing_is_missing(monkeypatch):
    found = check_up(monkeypatch)
    assert not found.list_unserved()
    assert all(state.can_export and not state.faults for state in found.formats)
    assert "missing:" not in report.describe_checkup(found)


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (ChildCrashed(-11, ["something of the driver"]), "SIGSEGV: something of the driver"),
        (ChildTimedOut(), "no answer within 120 s"),
        (RuntimeMissingError("the driver is too old", remedy="update it"), "the driver is too old"),
    ],
)
def test_a_runtime_that_fails_is_a_line(monkeypatch, failure, words):
    def ask(name):
        if name == "openvino":
            raise failure
        return answer(name)

    found = check_up(monkeypatch, ask)
    assert found.list_unserved() == ["openvino"]
    text = report.describe_checkup(found)
    assert words in text
    assert text.count("missing: ") == 1
    assert "remedy: " in text


def test_a_runtime_that_is_absent_has_its_remedy(monkeypatch):
    monkeypatch.setattr(checkup, "find_spec", lambda name: None if name == "tensorrt_rtx" else object())
    found = checkup.check_up(["rtx"], lambda name: nullcontext(), answer)
    assert [state.name for state in found.runtimes] == ["tensorrt_rtx"], "only what the format needs is asked"
    (state,) = found.formats
    assert (state.is_served, state.can_export) == (False, False)
    assert state.faults == (
        Fault("tensorrt_rtx is not installed", None, checkup.RUNTIMES["tensorrt_rtx"].remedy),
    )


def test_a_compiler_without_its_gpu_exports_and_does_not_run(monkeypatch):
    """TensorRT for RTX builds engines on a machine that has no GPU."""
    fault = Fault("no device", None, "install the driver")
    without = RuntimeState("tensorrt_rtx", "tensorrt_rtx 1.4", (FoundDevice("0", "GPU", (), fault),), fault)
    found = check_up(monkeypatch, lambda name: without if name == "tensorrt_rtx" else answer(name))
    (state,) = [state for state in found.formats if state.format == "rtx"]
    assert (state.is_served, state.can_export) == (False, True)


def test_the_packages_of_an_export_are_those_of_the_extra(monkeypatch):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extra = text.split("\nexport = [")[1].split("\n]")[0]
    named = [line.strip().strip('",').split(">=")[0] for line in extra.strip().splitlines()]
    assert tuple(name for name in named if name != "tomli") == checkup.EXPORT_PACKAGES
    monkeypatch.setattr(checkup, "read_packages", lambda: {"torch": "2", "onnxruntime-gpu": "1"})
    found = check_up(monkeypatch)
    (fault,) = found.formats[0].faults
    assert (
        fault.what == "an export needs onnx, onnx-ir, onnxscript, onnxsim, nncf, safetensors, threadpoolctl"
    )


def test_a_process_that_dies_is_no_end_of_the_doctor(monkeypatch, tmp_path):
    """A real child, with a ``tensorrt`` whose import ends the process."""
    (tmp_path / "tensorrt.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    state = checkup.examine("tensorrt", checkup.ask_child)
    assert state.fault is not None
    assert state.fault.why == "SIGKILL"


def test_onnxruntime_tells_what_it_has():
    state = probe("onnxruntime")
    assert state.version.startswith("onnxruntime ")
    assert state.devices[0].name == "CPU"
    assert state.fault is None


@pytest.mark.parametrize(
    ("capability", "is_served"),
    [
        ("7.0", False),
        ("7.5", True),
        ("8.7", True),
        ("8.9", True),
        ("9.0", False),
        ("10.0", False),
        ("12.1", True),
        ("13.0", True),
    ],
)
def test_a_gpu_that_the_rtx_compiler_does_not_serve(gpu_machine, monkeypatch, capability, is_served):
    monkeypatch.setenv("FAKE_SM", capability)
    state = probe("tensorrt_rtx")
    assert (state.fault is None) == is_served
    assert is_served or capability in state.fault.what
    assert probe("tensorrt").fault is None


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch):
    """A machine on which TensorRT is missing."""
    absent = RuntimeState("tensorrt", None, (), Fault("tensorrt is not installed", None, "JetPack brings it"))
    monkeypatch.setattr(checkup, "find_spec", lambda name: object())
    monkeypatch.setattr(checkup, "ask_child", lambda name: absent if name == "tensorrt" else answer(name))


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ([], 0),
        (["--format", "OpenVINO,onnx"], 0),
        (["--format", "engine"], 3),
        (["--format", "onnx", "--format", "TRT"], 3),
    ],
)
def test_the_exit_code_is_that_of_the_named_formats(call, machine, argv, code):
    got, out, err = call(command.main, *argv)
    assert got == code
    assert ("--format trt do not run here" in err) == (code == 3)
    assert ("missing: tensorrt is not installed (--format trt)" in out) == (
        argv != ["--format", "OpenVINO,onnx"]
    )


def test_a_format_that_does_not_exist(fails):
    assert "did you mean openvino or engine?" in fails(2, command.main, "--format", "OpenVin")


def test_the_object_is_the_whole_result(call, machine):
    code, out, _ = call(command.main, "--format", "trt", "--json")
    found = json.loads(out)
    assert code == 3
    assert found["formats"][0]["is_served"] is False
    assert {"host", "limits", "state", "profile", "on_battery"} == set(found["machine"])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_text_fits_the_terminal(call, machine, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = call(command.main)
    assert max(map(len, out.splitlines())) <= width


@pytest.mark.parametrize(("flags", "says"), [((), True), (("avx2", "avx_vnni"), False)])
def test_a_processor_without_vnni_is_told_what_int8_is_there(monkeypatch, flags, says):
    found = check_up(monkeypatch)
    host = replace(found.machine.host, flags=list(flags), machine="x86_64")
    text = report.describe_checkup(replace(found, machine=replace(found.machine, host=host)), width=500)
    assert ("int8 gains less speed" in text) is says
