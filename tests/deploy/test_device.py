"""The device's state and its power: on trees recorded from Jetsons, on a made-up NVML, and where nothing
answers."""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import asdict
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.device import DGpu, Power
from cmt_edge.deploy.telemetry import dgpu, tools
from cmt_edge.deploy.telemetry import power as power_module
from cmt_edge.deploy.telemetry.dgpu import list_clock_reasons, read_dgpu
from cmt_edge.deploy.telemetry.power import (
    PowerMonitor,
    PowerSensor,
    compute_joules_per_image,
    find_power_sensor,
)
from cmt_edge.deploy.telemetry.state import read_state
from cmt_edge.deploy.telemetry.tools import run_tool
from helpers.jetson import CLOCKS, NVPMODEL, TEGRASTATS, plant

ROOT_ONLY = "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n"


def answers(nvpmodel=None, jetson_clocks=None):
    """A ``run`` that answers with these texts and keeps what it was asked."""

    def run(command):
        run.asked.append(list(command))
        return {"nvpmodel": nvpmodel, "jetson_clocks": jetson_clocks}[command[0]]

    run.asked = []
    return run


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.002)


# --- NVML -----------------------------------------------------------------------------------------


class NVMLError(Exception):
    """As of ``pynvml``: the message of a code."""


class FakeNvml(ModuleType):
    """The part of ``pynvml`` that is used, with the figures of one RTX card; ``broken`` names what raises."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, broken=(), power_mw=71_250, **replaced):
        super().__init__("pynvml")
        self.broken, self.opened, self.power_mw = set(broken), 0, power_mw
        answers = {
            "nvmlDeviceGetHandleByIndex": lambda index: f"gpu{index}",
            "nvmlDeviceGetName": lambda h: "NVIDIA GeForce RTX 4060",
            "nvmlDeviceGetPowerUsage": lambda h: self.power_mw,
            "nvmlDeviceGetEnforcedPowerLimit": lambda h: 115_000,
            "nvmlDeviceGetClockInfo": lambda h, kind: {1: 1830, 2: 8501}[kind],
            "nvmlDeviceGetMaxClockInfo": lambda h, kind: {1: 3105, 2: 8501}[kind],
            "nvmlDeviceGetTemperatureV": lambda h, sensor: 51,
            "nvmlDeviceGetTemperature": lambda h, sensor: 50,
            "nvmlDeviceGetPerformanceState": lambda h: 2,
            "nvmlDeviceGetCurrentClocksEventReasons": lambda h: 0x24,
            "nvmlDeviceGetCurrentClocksThrottleReasons": lambda h: 0x1,
        }
        for name, answer in {**answers, **replaced}.items():
            if answer is not None:
                setattr(self, name, self._guarded(name, answer))

    def _guarded(self, name, answer):
        def call(*args):
            if name in self.broken or not self.opened:
                raise NVMLError("Not Supported" if self.opened else "Uninitialized")
            return answer(*args)

        return call

    def nvmlInit(self):
        if "nvmlInit" in self.broken:
            raise NVMLError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1


@pytest.fixture
def nvml(monkeypatch):
    """Puts a fake in the place of ``pynvml``; at the end, everything opened is closed."""
    made = []

    def install(**settings):
        made.append(FakeNvml(**settings))
        monkeypatch.setitem(sys.modules, "pynvml", made[-1])
        return made[-1]

    yield install
    assert all(m.opened == 0 for m in made)


@pytest.fixture
def no_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)


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


# --- power ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "watts"),
    [
        ("agx-orin", "sum of VDD_GPU_SOC, VDD_CPU_CV, VIN_SYS_5V0", 8.7112),
        ("orin-nano", "VDD_IN", 5.2116),
        ("thor", "VIN", 20.986),
    ],
)
def test_power_of_a_jetson(name, source, watts, tmp_path):
    with PowerMonitor(plant(name, tmp_path), interval_s=0.005, idle_s=0.1) as power:
        wait_for(lambda: power.during.samples >= 3)
    for phase in (power.before, power.during, power.after):
        assert phase.samples >= 1
        assert phase.watts == pytest.approx(watts)
    assert (power.source, power.notes) == (source, [])
    assert power.energy_per_inference(8.0, 4) == pytest.approx(watts * 0.002)


def test_power_of_a_gpu(tmp_path, nvml):
    fake = nvml(power_mw=20_000)
    with PowerMonitor(tmp_path, interval_s=0.005, idle_s=0.1) as power:
        fake.power_mw = 80_000
        wait_for(lambda: power.during.samples >= 20)
        fake.power_mw = 20_000
    assert power.source == "NVML, board power of GPU 0"
    assert power.before.watts == 20
    assert power.during.watts > 70
    assert power.after.watts == 20


@pytest.mark.parametrize(
    ("broken", "note"),
    [
        (["nvmlInit"], "power: no NVIDIA driver"),
        (["nvmlDeviceGetPowerUsage"], "power: GPU 0 does not tell it: Not Supported"),
    ],
)
def test_gpu_without_power(broken, note, tmp_path, nvml):
    nvml(broken=broken)
    assert find_power_sensor(tmp_path) == (None, [note])


def test_no_sensor_costs_nothing(tmp_path, no_nvml):
    begin, threads = time.monotonic(), threading.active_count()
    with PowerMonitor(tmp_path, idle_s=30) as power:
        assert threading.active_count() == threads
    assert time.monotonic() - begin < 5
    assert power.during == Power(None, 0)
    assert power.energy_per_inference(5.0) is None
    assert (power.source, power.notes) == (None, ["power: pynvml is not installed"])


def test_a_jetson_without_labelled_rails(tmp_path):
    plant("orin-nano", tmp_path)
    for file in tmp_path.rglob("in?_label"):
        file.unlink()
    with PowerMonitor(tmp_path) as power:
        pass
    assert power.source is None
    assert power.notes[0] == "power rails: no power monitor can be read in sysfs"


@pytest.mark.parametrize(
    ("name", "file", "note"),
    [
        ("orin-nano", "ina3221/1-0040/hwmon/hwmon1/in1_input", "power: VDD_IN cannot be read"),
        ("agx-orin", "ina3221/1-0040/hwmon/hwmon3/curr2_input", "power: VDD_CPU_CV cannot be read"),
    ],
)
def test_inner_rails_do_not_stand_in_for_the_total(name, file, note, tmp_path):
    (plant(name, tmp_path) / "sys/bus/i2c/drivers" / file).unlink()
    assert find_power_sensor(tmp_path) == (None, [note, "power: tegrastats was not found either"])


def tegrastats(folder, body, monkeypatch):
    """A ``tegrastats`` on the ``PATH`` that runs ``body``, and a Jetson whose sysfs tells no rails."""
    (folder / "bin").mkdir()
    (folder / "bin" / "tegrastats").write_text(f"#!/bin/sh\n{body}\n")
    (folder / "bin" / "tegrastats").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
    for file in plant("orin-nano", folder / "root").rglob("in?_label"):
        file.unlink()
    return folder / "root"


@pytest.mark.parametrize(("name", "watts", "source"), [("orin-nx-l4t36", 17.946, "tegrastats, VDD_IN")])
def test_tegrastats_where_sysfs_tells_nothing(name, watts, source, tmp_path, monkeypatch):
    root = tegrastats(
        tmp_path, f"while :; do echo '{TEGRASTATS[name].strip()}'; sleep 0.05; done", monkeypatch
    )
    threads = threading.active_count()
    with PowerMonitor(root, idle_s=0.1, interval_s=0.02) as power:
        time.sleep(0.1)
    assert power.source == source
    assert power.during.watts == pytest.approx(watts)
    assert threading.active_count() == threads


@pytest.mark.parametrize("body", ["exit 1", "echo nonsense", "echo 'RAM 1/2MB (lfb 1x4MB) CPU [1%@345]'"])
def test_a_tegrastats_without_rails(body, tmp_path, monkeypatch):
    sensor, notes = find_power_sensor(tegrastats(tmp_path, body, monkeypatch))
    assert sensor is None
    assert notes[-1] == "power: tegrastats names no power rail"


def test_a_tegrastats_that_ends_midway_makes_a_note(tmp_path, monkeypatch):
    root = tegrastats(tmp_path, f"echo '{TEGRASTATS['orin-nx-l4t36'].strip()}'; sleep 0.1", monkeypatch)
    with PowerMonitor(root, idle_s=0.02, interval_s=0.02) as power:
        time.sleep(0.4)
    assert any("tegrastats has ended" in note for note in power.notes)


def test_report_is_json(tmp_path):
    sensor = PowerSensor("rail", lambda: 4.0)
    with PowerMonitor(tmp_path, interval_s=0.004, idle_s=0.02, sensor=sensor) as power:
        wait_for(lambda: power.during.samples > 1)
    report = asdict(power.report())
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["source"] == "rail"
    assert report["interval_s"] == 0.004
    assert report["during"] == {"watts": 4.0, "samples": power.during.samples}


def test_a_rail_that_disappears_is_a_note_and_the_samples_stay(tmp_path):
    plant("orin-nano", tmp_path)
    with PowerMonitor(tmp_path, interval_s=0.002, idle_s=0.01) as power:
        wait_for(lambda: power.during.samples >= 2)
        (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input").unlink()
        wait_for(lambda: power.notes)
    assert power.during.watts == pytest.approx(5.2116)
    assert power.after == Power(None, 0)
    assert power.notes[0].startswith("power: VDD_IN failed in the phase 'during': ")
    assert "readings failed" in power.notes[-1]
    assert len(power.notes) == 2


def test_a_sum_without_one_of_its_rails_is_no_sample(tmp_path):
    plant("agx-orin", tmp_path)
    monitor = PowerMonitor(tmp_path, interval_s=0.002, idle_s=0)
    with monitor as power:
        wait_for(lambda: power.during.samples >= 1)
        (tmp_path / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/in3_input").write_text("")
        wait_for(lambda: power.notes)
    assert power.during.watts == pytest.approx(8.7112)


@pytest.mark.parametrize(
    "failure", [OSError("gone"), ValueError(), RuntimeError("driver lost"), float("nan"), float("inf")]
)
def test_a_sensor_that_only_fails(failure, tmp_path):
    closed = []

    def watts():
        if isinstance(failure, Exception):
            raise failure
        return failure

    sensor = PowerSensor("broken", watts, lambda: closed.append(1))
    with PowerMonitor(tmp_path, interval_s=0.002, idle_s=0.01, sensor=sensor) as power:
        pass
    assert power.during.watts is None
    assert power.energy_per_inference(1.0) is None
    assert "broken failed" in power.notes[0]
    assert closed == [1]


def power_threads():
    return [t for t in threading.enumerate() if t.name == "power"]


def test_the_thread_ends_with_a_body_that_fails(tmp_path):
    alive = []

    def body():
        with PowerMonitor(tmp_path, interval_s=60, idle_s=0.05, sensor=PowerSensor("rail", lambda: 1.0)):
            alive.extend(power_threads())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        body()
    assert len(alive) == 1
    assert power_threads() == []


def test_the_thread_ends_where_the_wait_before_is_interrupted(tmp_path, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(power_module.time, "sleep", interrupted)
    monitor = PowerMonitor(tmp_path, interval_s=0.01, sensor=PowerSensor("rail", lambda: 1.0))
    with pytest.raises(KeyboardInterrupt), monitor:
        pytest.fail("the body must not run")
    assert power_threads() == []


def test_a_sensor_that_hangs_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(power_module, "JOIN_TIMEOUT_S", 0.05)
    released, closed = threading.Event(), []
    sensor = PowerSensor("stuck", lambda: float(released.wait(10)), lambda: closed.append(1))
    with PowerMonitor(tmp_path, interval_s=0.01, idle_s=0, sensor=sensor) as power:
        pass
    assert "stuck did not answer" in power.notes[-1]
    assert closed == []
    assert all(t.daemon for t in power_threads())
    released.set()
    wait_for(lambda: not power_threads())


def test_a_monitor_starts_afresh(tmp_path):
    level = [1.0]
    monitor = PowerMonitor(
        tmp_path, interval_s=0.002, idle_s=0.01, sensor=PowerSensor("rail", lambda: level[0])
    )
    for level[0] in (1.0, 3.0):
        with monitor as power:
            wait_for(lambda: power.during.samples >= 2)
        assert power.during.watts == level[0]


@pytest.mark.parametrize(
    "settings", [{"interval_s": 0}, {"interval_s": float("nan")}, {"idle_s": -1}, {"idle_s": float("inf")}]
)
def test_unusable_times(settings):
    with pytest.raises(InputError):
        PowerMonitor(**settings)


@pytest.mark.parametrize(
    ("latency", "images"), [(0, 1), (-1, 1), (float("nan"), 1), (float("inf"), 1), (1.0, 0)]
)
def test_energy_of_nothing(latency, images):
    with pytest.raises(InputError):
        PowerMonitor().energy_per_inference(latency, images)


@given(latency=st.floats(1e-3, 1e5), images=st.integers(1, 4096), watts=st.floats(0, 1000))
def test_energy_is_power_times_time_for_each_image(latency, images, watts):
    assert compute_joules_per_image(None, latency, images) is None
    assert compute_joules_per_image(watts, latency, images) * images == pytest.approx(watts * latency / 1000)
