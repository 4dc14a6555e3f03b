"""The power that a device draws: its sensors, the thread that reads them, and the energy of an inference."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.device import Power
from cmt_edge.deploy.telemetry import power as power_module
from cmt_edge.deploy.telemetry.power import (
    PowerMonitor,
    PowerSensor,
    compute_joules_per_image,
    find_power_sensor,
)
from helpers.jetson import TEGRASTATS, plant
from helpers.running import wait_for


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
