"""What the tools of a Jetson print, as recorded on devices from Orin to Thor, and the trees of its kernel."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.measure.device import PowerMode
from cmt_edge.deploy.telemetry.jetson import (
    JETPACK,
    JetsonModule,
    find_rails,
    is_jetson,
    parse_jetson_clocks,
    parse_nvpmodel,
    read_available_memory,
    read_module,
    read_rails,
    read_temperatures,
    total_rails,
)
from cmt_edge.deploy.telemetry.tegrastats import parse_rails
from helpers.jetson import CLOCKS, NVPMODEL, TEGRASTATS, plant

NOISE = [
    "",
    "\n",
    "\0\xff\x80",
    "command not found",
    "RAM CPU [",
    "NV Power Mode:",
    "GPU MinFreq= MaxFreq=",
    "9" * 6000,
]


# --- nvpmodel -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("agx-orin", PowerMode("MODE_30W", 2)),
        ("orin-nano-verbose", PowerMode("25W", 1)),
        ("orin-nx-super", PowerMode("MAXN_SUPER", 2)),
        ("thor", PowerMode("120W", 1)),
    ],
)
def test_power_mode(name, mode):
    assert parse_nvpmodel(NVPMODEL[name]) == mode


def test_a_power_mode_among_warnings_and_errors():
    before, after = "NVPM WARN: fan mode is not set!\n", "NVPM ERROR: Error opening /sys/kernel/x: 13\n"
    text = before + NVPMODEL["agx-orin"].rstrip() + "\n" + after
    assert parse_nvpmodel(text) == PowerMode("MODE_30W", 2)
    assert parse_nvpmodel("NV Power Mode: MAXN\n") == PowerMode("MAXN", None)


def test_power_modes_with_either_line_end():
    for text in NVPMODEL.values():
        assert parse_nvpmodel(text.replace("\n", "\r\n")) == parse_nvpmodel(text)


@pytest.mark.parametrize(
    "text", [*NOISE, "NVPM WARN: power mode is not set!\n", "NV Fan Mode:quiet\n", "3\n"]
)
def test_no_power_mode(text):
    assert parse_nvpmodel(text) is None


# --- jetson_clocks --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "online", "cores", "locked"),
    [
        ("agx-orin-l4t36", 8, 12, False),
        ("agx-orin-l4t36-locked", 8, 12, True),
        ("agx-orin-l4t39-locked", 12, 12, True),
        ("orin-nx-l4t36", 6, 6, False),
        ("orin-nano-l4t39", 6, 6, False),
        ("thor-locked", 14, 14, True),
    ],
)
def test_clocks(name, online, cores, locked):
    clocks = parse_jetson_clocks(CLOCKS[name])
    assert clocks.locked is locked
    assert list(clocks.cpus) == [f"cpu{i}" for i in range(cores)]
    assert sum(c.online for c in clocks.cpus.values()) == online
    assert clocks.gpus
    assert clocks.emc.max_mhz >= clocks.emc.current_mhz > 0
    assert json.loads(json.dumps(asdict(clocks))) == asdict(clocks)


def test_frequencies_are_megahertz():
    clocks = parse_jetson_clocks(CLOCKS["agx-orin-l4t36"])
    cpu = clocks.cpus["cpu4"]
    assert (cpu.min_mhz, cpu.max_mhz, cpu.current_mhz, cpu.online, cpu.governor) == (
        729.6,
        1728.0,
        1497.6,
        True,
        "schedutil",
    )
    assert asdict(clocks.gpus["GPU"]) == {"min_mhz": 306.0, "max_mhz": 612.0, "current_mhz": 306.0}
    assert asdict(clocks.emc) == {
        "min_mhz": 204.0,
        "max_mhz": 3199.0,
        "current_mhz": 3199.0,
        "override": False,
    }


def test_thor_names_its_gpu_clocks_and_jetpack_7_prints_no_override():
    assert {k: v.max_mhz for k, v in parse_jetson_clocks(CLOCKS["thor-locked"]).gpus.items()} == {
        "gpu-gpc-0": 1575.0,
        "gpu-nvd-0": 1692.0,
    }
    assert parse_jetson_clocks(CLOCKS["orin-nano-l4t39"]).emc.override is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "cpu3:  Online=1 Governor=schedutil MinFreq=1728000",
            "cpu3:  Online=1 Governor=schedutil MinFreq=729600",
        ),
        ("GPU MinFreq=612000000", "GPU MinFreq=306000000"),
        ("FreqOverride=1", "FreqOverride=0"),
        ("CurrentFreq=3199000000", "CurrentFreq=2133000000"),
    ],
)
def test_one_free_clock_is_enough_to_unlock(old, new):
    text = CLOCKS["agx-orin-l4t36-locked"]
    assert old in text
    assert parse_jetson_clocks(text.replace(old, new)).locked is False


def test_no_clock_no_lock():
    head = "SOC family:tegra264  Machine:NVIDIA Jetson AGX Thor Developer Kit\nOnline CPUs: 0-13\n"
    assert parse_jetson_clocks(head).locked is None


@pytest.mark.parametrize("text", [*NOISE, "Error: Run this script(/usr/bin/jetson_clocks) as a root user\n"])
def test_no_clocks(text):
    assert parse_jetson_clocks(text) is None


# --- tegrastats -----------------------------------------------------------------------------------

RAILS = {
    "agx-orin-l4t36": {"VDD_GPU_SOC": 2412, "VDD_CPU_CV": 1607, "VIN_SYS_5V0": 4607},
    "agx-orin-spaces": {"VDD_GPU_SOC": 3205, "VDD_CPU_CV": 4405, "VIN_SYS_5V0": 4767},
    "orin-nx-l4t36": {"VDD_IN": 17946, "VDD_CPU_GPU_CV": 8896, "VDD_SOC": 3923},
    "orin-nano-l4t36": {"VDD_IN": 12479, "VDD_CPU_GPU_CV": 4667, "VDD_SOC": 2817},
    "orin-nano-l4t39": {"VDD_IN": 3462, "VDD_CPU_GPU_CV": 442, "VDD_SOC": 1127},
    "thor-l4t38": {"VDD_GPU": 1962, "VDD_CPU_SOC_MSS": 5887, "VIN_SYS_5V0": 5635, "VIN": 19780},
    "thor-l4t39-user": {"VDD_GPU": 37528, "VDD_CPU_SOC_MSS": 18961, "VIN_SYS_5V0": 18331, "VIN": 87426},
}


@pytest.mark.parametrize("name", TEGRASTATS)
def test_rails_of_a_recorded_line(name):
    """Of the figures of a rail (now, average, and in JetPack 7 the maximum), the first is the present one."""
    assert parse_rails(TEGRASTATS[name]) == RAILS[name]


@pytest.mark.parametrize(
    ("text", "rails"),
    [
        ("APE 150 VDD_IN 3583mW", {"VDD_IN": 3583}),
        ("VDD_IN 1mW/2mW/3mW NC 0mW/0mW VIN 4mW/5mW", {"VDD_IN": 1, "VIN": 4}),
        ("VIC 32%@115 cpu@52.343C APE 174 NVENC 78%@166", {}),
        ("VDD_IN mW VIN x5mW SOC 5mWh", {}),
        *((noise, {}) for noise in NOISE),
        ("x" * 4000 + " VDD_IN 1mW/1mW " + "x" * 100, {}),
        (CLOCKS["thor-locked"], {}),
    ],
)
def test_rails_among_other_words(text, rails):
    assert parse_rails(text) == rails


numbers = st.integers(0, 10**6)
names = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{1,9}", fullmatch=True).filter(lambda name: name != "NC")


@given(st.dictionaries(names, st.lists(numbers, min_size=1, max_size=3)))
def test_rails_of_any_values_parse_back(rails):
    tokens = ["10-16-2023 10:59:22 RAM 1205/30623MB (lfb 6429x4MB) CPU [0%@729,off] APE 174 cv0@-256C"]
    for name, figures in rails.items():
        tokens.append(f"{name} " + "/".join(f"{figure}mW" for figure in figures))
    assert parse_rails(" ".join(tokens) + "\n") == {name: figures[0] for name, figures in rails.items()}


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda b: b.decode("latin-1")))
def test_nothing_raises(text):
    parse_nvpmodel(text)
    parse_jetson_clocks(text)
    parse_rails(text)


# --- trees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("agx-orin", JetsonModule("NVIDIA Jetson AGX Orin Developer Kit", "36.4.4", "6.2.1")),
        (
            "orin-nano",
            JetsonModule(
                "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "36.4.3", "6.2"
            ),
        ),
        ("thor", JetsonModule("NVIDIA Jetson AGX Thor Developer Kit", "38.2.2", "7.x")),
    ],
)
def test_module(name, module, tmp_path):
    assert read_module(plant(name, tmp_path)) == module
    assert is_jetson(tmp_path)


@pytest.mark.parametrize(
    ("line", "l4t", "jetpack"),
    [
        ("# R28 (release), REVISION: 2.1, GCID: 11272647, BOARD: t210ref", "28.2.1", None),
        ("# R36 (release), REVISION: 9.4, GCID: 0, BOARD: generic", "36.9.4", "6.x"),
        ("# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic", "36.3.0", "6.0"),
        ("# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic", "38.4.0", "7.1"),
        ("# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic", "39.2.1", "7.2.1"),
        ("not a release", None, None),
    ],
)
def test_release(line, l4t, jetpack, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(line + "\n# KERNEL_VARIANT: oot\n")
    assert read_module(tmp_path) == JetsonModule(None, l4t, jetpack)
    assert is_jetson(tmp_path) == (l4t is not None)


def test_table_of_releases_grows_with_jetpack():
    versions = [
        ([int(n) for n in l4t.split(".")], [int(n) for n in jp.split()[0].split(".")])
        for l4t, jp in JETPACK.items()
    ]
    assert [v[0] for v in sorted(versions)] == [v[0] for v in versions]
    assert all(a <= b for (_, a), (_, b) in pairwise(versions))


def test_other_boards_are_no_jetson(tmp_path):
    assert not is_jetson(tmp_path)
    (tmp_path / "proc/device-tree").mkdir(parents=True)
    (tmp_path / "proc/device-tree/compatible").write_bytes(b"raspberrypi,4-model-b\0brcm,bcm2711\0")
    assert not is_jetson(tmp_path)


@pytest.mark.parametrize(
    ("name", "rails", "total"),
    [
        (
            "agx-orin",
            {
                "VDD_GPU_SOC": 3.36224,
                "VDD_CPU_CV": 0.48032,
                "VIN_SYS_5V0": 4.86864,
                "VDDQ_VDD2_1V8AO": 0.39744,
            },
            ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"],
        ),
        ("orin-nano", {"VDD_IN": 5.2116, "VDD_CPU_GPU_CV": 0.516, "VDD_SOC": 1.1352}, ["VDD_IN"]),
        ("thor", {"VDD_GPU": 0.39728, "VDD_CPU_SOC_MSS": 5.9568, "VIN": 20.986}, ["VIN"]),
    ],
)
def test_rails(name, rails, total, tmp_path):
    assert read_rails(plant(name, tmp_path)) == pytest.approx(rails)
    assert total_rails(rails) == total


@pytest.mark.parametrize("content", ["", "n/a", "\0\xff", None])
def test_a_rail_that_cannot_be_read_is_left_out(content, tmp_path):
    file = plant("orin-nano", tmp_path) / "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/curr1_input"
    file.unlink() if content is None else file.write_text(content)
    assert list(read_rails(tmp_path)) == ["VDD_CPU_GPU_CV", "VDD_SOC"]
    assert [s.name for s in find_rails(tmp_path)] == ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"]


def test_temperatures(tmp_path):
    plant("agx-orin", tmp_path)
    assert read_temperatures(tmp_path) == {
        "cpu-thermal": 52.343,
        "tj-thermal": 52.343,
    }  # cv0 is off, zone 10 is last
    zone = tmp_path / "sys/class/thermal/thermal_zone11"
    zone.mkdir()
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text("-1500\n")
    assert read_temperatures(tmp_path)["cpu-thermal thermal_zone11"] == -1.5


def test_a_sensor_that_says_try_again_is_left_out(tmp_path, monkeypatch):
    """As recorded on Orin Nano, where the zones of absent engines answer EAGAIN."""
    plant("orin-nano", tmp_path)
    (tmp_path / "sys/class/thermal/thermal_zone2/temp").write_text("busy")
    read = os.read

    def busy(handle, size):
        content = read(handle, size)
        if content == b"busy":
            raise BlockingIOError(11, "Resource temporarily unavailable")
        return content

    monkeypatch.setattr(os, "read", busy)
    zones = {"cpu-thermal": 49.468, "gpu-thermal": 50.125, "soc0-thermal": 50.031, "tj-thermal": 50.531}
    assert read_temperatures(tmp_path) == zones


def test_memory(tmp_path):
    assert read_available_memory(plant("orin-nano", tmp_path)) == 1536 << 20


@pytest.mark.parametrize("text", ["", "MemAvailable: lots", "MemTotal:  100 kB\n", "\0\0"])
def test_no_memory(text, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(text)
    assert read_available_memory(tmp_path) is None


def test_an_empty_tree_tells_nothing(tmp_path):
    assert read_module(tmp_path) == JetsonModule(None, None, None)
    assert (read_rails(tmp_path), read_temperatures(tmp_path)) == ({}, {})
    assert read_available_memory(tmp_path) is None
