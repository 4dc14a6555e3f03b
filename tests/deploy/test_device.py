"""The device's state: on trees recorded from Jetsons, on a made-up NVML, and where nothing answers."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.device import DGpu
from cmt_edge.deploy.telemetry import dgpu, tools
from cmt_edge.deploy.telemetry.dgpu import list_clock_reasons, read_dgpu
from cmt_edge.deploy.telemetry.power import (
    PowerMonitor,
)
from cmt_edge.deploy.telemetry.state import read_state
from cmt_edge.deploy.telemetry.tools import run_tool
from helpers.jetson import CLOCKS, NVPMODEL, plant
from helpers.nvml import FakeNvml

ROOT_ONLY = "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n"


def answers(nvpmodel=None, jetson_clocks=None):
    """A ``run`` that answers with these texts and keeps what it was asked."""

    def run(command):
        run.asked.append(list(command))
        return {"nvpmodel": nvpmodel, "jetson_clocks": jetson_clocks}[command[0]]

    run.asked = []
    return run


# --- NVML -----------------------------------------------------------------------------------------


EXPECTED = DGpu(
    index=0,
    name="NVIDIA GeForce RTX 4060",
    power_limit_w=115.0,
    sm_mhz=1830,
    sm_max_mhz=3105,
    memory_mhz=8501,
    memory_max_mhz=8501,
    temperature_c=51,
    performance_state="P2",
    clock_reasons=["software power cap", "software thermal slowdown"],
)


def test_gpu(nvml):
    nvml()
    assert read_dgpu() == (EXPECTED, [])


def test_old_packages_answer_in_bytes_and_lack_functions(nvml):
    nvml(
        nvmlDeviceGetName=lambda h: b"Tesla T4",
        nvmlDeviceGetTemperatureV=None,
        nvmlDeviceGetCurrentClocksEventReasons=None,
        nvmlDeviceGetPerformanceState=lambda h: 32,
    )
    gpu, notes = read_dgpu()
    assert (gpu.name, gpu.temperature_c, gpu.clock_reasons, gpu.performance_state) == (
        "Tesla T4",
        50,
        ["idle"],
        None,
    )
    assert notes == []


@pytest.mark.parametrize(
    ("function", "empty", "what"),
    [
        ("nvmlDeviceGetEnforcedPowerLimit", ["power_limit_w"], "power limit"),
        ("nvmlDeviceGetPerformanceState", ["performance_state"], "performance state"),
        ("nvmlDeviceGetName", ["name"], "name"),
    ],
)
def test_what_a_gpu_does_not_tell_is_noted(function, empty, what, nvml):
    nvml(broken=[function])
    gpu, notes = read_dgpu()
    assert asdict(gpu) == asdict(EXPECTED) | dict.fromkeys(empty)
    assert notes == [f"dGPU 0, {what}: Not Supported"]


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        (["nvmlInit"], "dGPU: no NVIDIA driver; NVML Shared Library Not Found"),
        (["nvmlDeviceGetHandleByIndex"], "dGPU: no NVIDIA GPU 3; Not Supported"),
    ],
)
def test_no_gpu(broken, note, nvml):
    nvml(broken=broken)
    assert read_dgpu(3) == (None, [note])


def test_no_package(no_nvml):
    assert read_dgpu() == (None, ["dGPU: pynvml is not installed; pip install nvidia-ml-py"])


def test_the_real_package_has_what_the_fake_has():
    """Without a driver it must end in a note, with one in a GPU."""
    pytest.importorskip("pynvml")
    import pynvml

    used = {name for name in vars(FakeNvml()) if name.startswith("nvml")} | {"nvmlInit", "nvmlShutdown"}
    constants = {name for name in dir(FakeNvml) if name.startswith("NVML_")}
    assert {name for name in used | constants if not hasattr(pynvml, name)} <= {"nvmlDeviceGetTemperatureV"}
    assert {getattr(pynvml, n) == getattr(FakeNvml, n) for n in constants} == {True}
    gpu, notes = read_dgpu()
    assert gpu or notes


@given(st.integers(0, 2**40))
def test_every_reason_is_named_or_numbered(bits):
    names = list_clock_reasons(bits)
    assert len(names) == bin(bits).count("1")
    back = {name: bit for bit, name in dgpu.CLOCK_REASONS.items()}
    assert sum(back[n] if n in back else int(n, 16) for n in names) == bits


# --- snapshot -------------------------------------------------------------------------------------


def test_jetson(tmp_path):
    run = answers(NVPMODEL["agx-orin"], CLOCKS["agx-orin-l4t36-locked"])
    state = read_state(plant("agx-orin", tmp_path), run)
    assert run.asked == [["nvpmodel", "-q"], ["jetson_clocks", "--show"]]
    assert (state.kind, state.module, state.l4t) == (
        "jetson",
        "NVIDIA Jetson AGX Orin Developer Kit",
        "36.4.4",
    )
    assert (state.jetpack, state.power_mode.name, state.clocks.locked) == ("6.2.1", "MODE_30W", True)
    assert state.temperatures_c == {"cpu-thermal": 52.343, "tj-thermal": 52.343}
    assert (state.dgpu, state.notes) == (None, [])


@pytest.mark.parametrize("name", ["agx-orin", "orin-nano", "thor"])
def test_state_is_json(name, tmp_path):
    state = asdict(read_state(plant(name, tmp_path), answers(NVPMODEL["thor"], CLOCKS["thor-locked"])))
    assert json.loads(json.dumps(state, allow_nan=False)) == state


@pytest.mark.parametrize("answer", [ROOT_ONLY, ""])
def test_clocks_need_root(answer, tmp_path):
    state = read_state(plant("orin-nano", tmp_path), answers(NVPMODEL["orin-nano-verbose"], answer))
    assert state.clocks is None
    assert state.notes == ["jetson_clocks --show needs root: run it with sudo"]


def test_silent_tools_and_a_bare_tree_are_notes(tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 9.9, GCID: 1\n")
    state = read_state(tmp_path, answers(None, "garbage\nmore"))
    assert (state.kind, state.jetpack, state.power_mode) == ("jetson", "6.x", None)
    starts = [
        "JetPack:",
        "nvpmodel -q: not found",
        "jetson_clocks --show: garbage",
        "temperatures:",
    ]
    assert [n[: len(s)] for n, s in zip(state.notes, starts, strict=True)] == starts


def test_a_missing_release_is_a_note(tmp_path):
    plant("orin-nano", tmp_path)
    (tmp_path / "etc/nv_tegra_release").unlink()
    state = read_state(tmp_path, answers(NVPMODEL["orin-nano-verbose"], CLOCKS["orin-nano-l4t39"]))
    assert (state.kind, state.l4t, state.jetpack) == ("jetson", None, None)
    assert state.notes == [
        "L4T release: /etc/nv_tegra_release is missing, as in most containers",
    ]


def test_machine_with_a_gpu(tmp_path, nvml):
    nvml()
    run = answers()
    state = read_state(tmp_path, run)
    assert (state.kind, state.dgpu, run.asked) == ("dgpu", EXPECTED, [])
    assert json.loads(json.dumps(asdict(state))) == asdict(state)


def test_a_jetson_is_not_asked_through_nvml(tmp_path, nvml):
    fake = nvml(broken=["nvmlInit"])
    read_state(plant("thor", tmp_path), answers(NVPMODEL["thor"], CLOCKS["thor-locked"]))
    assert fake.opened == 0


def test_machine_without_a_gpu(tmp_path, no_nvml):
    state = read_state(tmp_path)
    assert (state.kind, state.module, state.clocks, state.dgpu) == (
        "cpu",
        None,
        None,
        None,
    )
    assert "pynvml" in state.notes[0]


def test_this_machine_has_a_state():
    state = read_state()
    assert state.kind in ("jetson", "dgpu", "cpu")
    assert json.dumps(asdict(state))


@pytest.mark.parametrize("settings", [{"root": "/no/such/folder"}, {"gpu_index": -1}])
def test_unusable_input(settings, tmp_path):
    with pytest.raises(InputError):
        read_state(**({"root": tmp_path} | settings))
    with pytest.raises(InputError):
        PowerMonitor(**({"root": tmp_path} | settings))


# --- tools ----------------------------------------------------------------------------------------


def program(path, text):
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)


def test_tool_answers_whatever_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    program(tmp_path / "tool", 'echo "$1 $LC_ALL"; echo no >&2; exit 3\n')
    assert run_tool(["tool", "$(id); -q"]) == "$(id); -q C\n"


def test_tool_outside_of_the_users_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(tools, "FOLDERS", (str(tmp_path),))
    program(tmp_path / "nvpmodel", "echo 'NV Power Mode: MAXN'; echo 0\n")
    assert run_tool(["nvpmodel", "-q"]) == "NV Power Mode: MAXN\n0\n"


def test_absent_slow_and_broken_tools_have_no_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(tools, "TIMEOUT_S", 0.2)
    program(tmp_path / "slow", "exec /bin/sleep 30\n")
    (tmp_path / "broken").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "broken").chmod(0o755)
    begin = time.monotonic()
    assert [run_tool([name]) for name in ("absent-tool", "slow", "broken")] == [None, None, None]
    assert time.monotonic() - begin < 10
