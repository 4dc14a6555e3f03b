"""What the tools of a Jetson print, as recorded on devices from TX1 to Thor, and the trees of its kernel."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.telemetry.jetson import (
    JETPACK,
    Core,
    Engine,
    Memory,
    Module,
    PowerMode,
    find_rails,
    is_jetson,
    memory,
    parse_jetson_clocks,
    parse_nvpmodel,
    parse_tegrastats,
    read_module,
    read_rails,
    read_temperatures,
    total_rails,
)
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
        ("tx2", PowerMode("MAXP_CORE_ARM", 3)),
        ("nano-warning", PowerMode("MAXN", 0)),
        ("nano-user", PowerMode("5W", 1)),
        ("xavier-fan", PowerMode("MODE_30W_4CORE", 5, "cool")),
        ("xavier-no-id", PowerMode("MAXN", None, "quiet")),
        ("agx-xavier-user", PowerMode("MODE_15W_DESKTOP", 7, "quiet")),
        ("agx-orin", PowerMode("MODE_30W", 2)),
        ("orin-nano-verbose", PowerMode("25W", 1)),
        ("orin-nx-super", PowerMode("MAXN_SUPER", 2)),
        ("thor", PowerMode("120W", 1)),
    ],
)
def test_power_mode(name, mode):
    assert parse_nvpmodel(NVPMODEL[name]) == mode


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
    ("name", "soc", "online", "cores", "mode", "locked"),
    [
        ("tx1-l4t28", "tegra210", 4, 4, None, True),
        ("tx2", "tegra186", 4, 6, "MAXP_CORE_ARM", False),
        ("nano", "tegra210", 4, 4, "MAXN", False),
        ("nano-locked", "tegra210", 4, 4, "MAXN", True),
        ("agx-xavier-composed", "tegra194", 4, 8, "MODE_15W", False),
        ("agx-orin-l4t36", "tegra234", 8, 12, "MODE_30W", False),
        ("agx-orin-l4t36-locked", "tegra234", 8, 12, "MODE_30W", True),
        ("agx-orin-l4t39-locked", "tegra234", 12, 12, "MAXN", True),
        ("orin-nx-l4t36", "tegra234", 6, 6, "MAXN_SUPER", False),
        ("orin-nano-l4t39", "tegra234", 6, 6, "25W", False),
        ("thor-locked", "tegra264", 14, 14, "MAXN", True),
    ],
)
def test_clocks(name, soc, online, cores, mode, locked):
    clocks = parse_jetson_clocks(CLOCKS[name])
    assert (clocks.soc, clocks.power_mode, clocks.locked) == (soc, mode, locked)
    assert list(clocks.cpus) == [f"cpu{i}" for i in range(cores)]
    assert sum(c.online for c in clocks.cpus.values()) == online
    assert clocks.gpus
    assert clocks.emc.max_mhz >= clocks.emc.current_mhz > 0
    assert json.loads(json.dumps(asdict(clocks))) == asdict(clocks)


def test_frequencies_are_megahertz():
    clocks = parse_jetson_clocks(CLOCKS["agx-orin-l4t36"])
    assert clocks.machine == "NVIDIA Jetson AGX Orin Developer Kit"
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

# name: RAM used and total, largest block and count, swap, cores on and all, EMC, GPU, one sensor, rails
LINES = {
    "tx1-l4t28": ((3607, 3983), (4, 47), (873, 8192), (4, 4), (1, [1600]), (39, [76]), None, {}),
    "tx2": (
        (2344, 7852),
        (4, 1154),
        (0, 3926),
        (4, 6),
        (4, [1600]),
        (0, [624]),
        ("GPU", 35.0),
        {"VDD_IN": 3056, "VDD_SYS_DDR": 883},
    ),
    "nano": (
        (534, 3964),
        (4, 98),
        (5, 1982),
        (4, 4),
        (0, [204]),
        (0, [76]),
        ("CPU", 36.5),
        {"POM_5V_IN": 1022, "POM_5V_CPU": 204},
    ),
    "nano-user": (
        (2015, 3964),
        (4, 98),
        (29, 1982),
        (4, 4),
        (0, []),
        (0, []),
        ("thermal", 31.25),
        {"POM_5V_IN": 1388},
    ),
    "xavier-nx": (
        (4412, 7772),
        (4, 237),
        (139, 3886),
        (6, 6),
        (10, [1600]),
        (62, [306]),
        ("AO", 41.5),
        {"VDD_IN": 4067},
    ),
    "agx-xavier": (
        (721, 31927),
        (4, 7291),
        (0, 15963),
        (4, 8),
        (0, [665]),
        (0, [318]),
        ("Tdiode", 40.0),
        {"GPU": 0, "SYS5V": 1482},
    ),
    "agx-xavier-l4t32-user": (
        (3149, 31920),
        (4, 5889),
        (0, 15960),
        (4, 8),
        (0, []),
        (39, []),
        ("AUX", 34.5),
        {},
    ),
    "agx-xavier-milliwatts": (
        (721, 31927),
        (4, 7291),
        None,
        (8, 8),
        (0, [1331]),
        (0, [114]),
        ("GPU", 35.0),
        {"GPU": 467, "CV": 0},
    ),
    "agx-orin-l4t35": (
        (1205, 30623),
        (4, 6429),
        (0, 15311),
        (12, 12),
        (0, [204]),
        (0, [114, 114]),
        ("GPU", 38.156),
        {"VIN_SYS_5V0": 3842},
    ),
    "agx-orin-l4t36": (
        (18202, 62841),
        (4, 466),
        (86, 31420),
        (12, 12),
        (3, [2133]),
        (0, [0, 0]),
        ("tj", 52.343),
        {"VIN_SYS_5V0": 4607},
    ),
    "agx-orin-spaces": (
        (29114, 30697),
        (4, 3),
        (4915, 15348),
        (12, 12),
        (1, [2133]),
        (0, [305, 305]),
        ("soc1", 48.968),
        {"VDD_CPU_CV": 4405},
    ),
    "orin-nx-l4t36": (
        (6982, 7620),
        (1, 5),
        (2640, 16384),
        (6, 6),
        (18, [3199]),
        (84, [713]),
        ("cv2", 60.875),
        {"VDD_IN": 17946},
    ),
    "orin-nano-l4t36": (
        (6185, 7620),
        (2, 8),
        (851, 3810),
        (6, 6),
        (43, [2133]),
        (63, [621]),
        ("gpu", 53.343),
        {"VDD_IN": 12479},
    ),
    "orin-nano-l4t39": (
        (2845, 7486),
        (4, 33),
        None,
        (6, 6),
        (3, [665]),
        (0, [305]),
        ("cpu", 45.375),
        {"VDD_IN": 3462, "VDD_SOC": 1127},
    ),
    "thor-l4t38": (
        (105265, 125772),
        (4, 34),
        None,
        (14, 14),
        (0, [2750]),
        (None, [314] * 3),
        ("soc012", 37.468),
        {"VIN": 19780},
    ),
    "thor-l4t39-user": (
        (36529, 125749),
        (4, 12),
        (11, 4096),
        (14, 14),
        None,
        None,
        ("gpu", 62.906),
        {"VDD_GPU": 37528, "VIN": 87426},
    ),
}


@pytest.mark.parametrize("name", TEGRASTATS)
def test_recorded_line(name):
    ram, block, swap, cores, emc, gpu, sensor, rails = LINES[name]
    got = parse_tegrastats(TEGRASTATS[name])
    assert (got.ram_used_mb, got.ram_total_mb) == ram
    assert (got.largest_free_block_mb, got.free_blocks) == block
    assert (got.swap_used_mb, got.swap_total_mb) == (swap or (None, None))
    assert (sum(c.online for c in got.cpus), len(got.cpus)) == cores
    assert got.emc == (Engine(*emc) if emc else None)
    assert got.gpu == (Engine(*gpu) if gpu else None)
    assert got.temperatures_c.get(sensor[0]) == sensor[1] if sensor else got.temperatures_c == {}
    assert {k: got.rails_mw.get(k) for k in rails} == rails
    assert all(-50 < t < 130 for t in got.temperatures_c.values())
    assert json.loads(json.dumps(asdict(got))) == asdict(got)


def test_all_of_one_line():
    got = parse_tegrastats(TEGRASTATS["agx-orin-l4t35"])
    assert got.time == "10-16-2023 10:59:22"
    assert got.cpus[5] == Core(True, 0, 730)
    assert list(got.temperatures_c) == [
        "CPU",
        "Tdiode",
        "SOC2",
        "SOC0",
        "GPU",
        "SOC1",
    ]  # CV0, CV1 and CV2 are off
    assert got.rails_mw == {
        "VDD_GPU_SOC": 4788,
        "VDD_CPU_CV": 798,
        "VIN_SYS_5V0": 3842,
        "VDDQ_VDD2_1V8AO": 707,
    }
    assert parse_tegrastats(TEGRASTATS["tx2"]).cpus[:2] == [Core(True, 1, 345), Core(False)]
    assert parse_tegrastats(TEGRASTATS["tx1-l4t28"]).cpus[1] == Core(True, 11, 1734)
    assert parse_tegrastats(TEGRASTATS["nano"]).time is None


def test_rail_is_now_and_average():
    """JetPack 7 adds the maximum, which is neither."""
    got = parse_tegrastats(TEGRASTATS["thor-l4t39-user"])
    assert (got.rails_mw["VIN"], got.average_rails_mw["VIN"]) == (87426, 43713)
    assert parse_tegrastats(TEGRASTATS["xavier-nx"]).average_rails_mw["VDD_SOC"] == 1353
    lone = parse_tegrastats("RAM 1/2MB (lfb 3x512kB) CPU [off] VDD_IN 3583mW APE 150")
    assert (lone.rails_mw, lone.average_rails_mw, lone.largest_free_block_mb) == ({"VDD_IN": 3583}, {}, 0.5)


@pytest.mark.parametrize(
    ("token", "engine"),
    [
        ("GR3D_FREQ 99%@1377", Engine(99, [1377])),
        ("GR3D_FREQ 0%@[305]", Engine(0, [305])),
        ("GR3D_FREQ 12%@[305,612]", Engine(12, [305, 612])),
        ("GR3D_FREQ 76%", Engine(76, [])),
        ("GR3D_FREQ @[0,0,0]", Engine(None, [0, 0, 0])),
        ("GR3D_FREQ off", Engine(None, [])),
        ("GR3D_FREQ 7%@x", None),
        ("", None),
    ],
)
def test_gpu(token, engine):
    assert parse_tegrastats(f"RAM 1/2MB (lfb 1x4MB) CPU [1%@100] {token} APE 25").gpu == engine


@pytest.mark.parametrize(
    "line",
    [
        *NOISE,
        "RAM 1/2MB (lfb 1x4MB)",
        "CPU [1%@100]",
        "RAM 1/2MB CPU [1%@1]" + " x" * 4000,
        CLOCKS["nano"],
        "RAM " + "9" * 5000,
    ],
)
def test_not_tegrastats(line):
    assert parse_tegrastats(line) is None


numbers = st.integers(0, 10**6)
names = st.from_regex(r"[A-Za-z][A-Za-z0-9_]{1,9}", fullmatch=True)
TAKEN = ("RAM", "SWAP", "CPU", "cpu", "EMC", "GR3D", "NC", "GR3D2")


@given(
    ram=st.tuples(numbers, numbers, numbers, numbers),
    swap=st.none() | st.tuples(numbers, numbers),
    cores=st.lists(st.none() | st.tuples(st.integers(0, 100), numbers), min_size=1, max_size=16),
    gpu=st.tuples(st.none() | st.integers(0, 100), st.lists(numbers, max_size=3)),
    zones=st.dictionaries(names, st.integers(-255999, 130999)),
    rails=st.dictionaries(
        names.filter(lambda n: n.removesuffix("_FREQ") not in TAKEN), st.tuples(numbers, numbers, numbers)
    ),
    unit=st.sampled_from(["", "mW"]),
    time=st.booleans(),
)
def test_a_line_of_any_values_parses_back(ram, swap, cores, gpu, zones, rails, unit, time):
    load, mhz = gpu
    tokens = ["10-16-2023 10:59:22"] if time else []
    tokens += ["RAM {}/{}MB (lfb {}x{}MB)".format(*ram)]
    tokens += ["SWAP {}/{}MB (cached 0MB)".format(*swap)] if swap else []
    tokens += ["CPU [" + ",".join("off" if c is None else f"{c[0]}%@{c[1]}" for c in cores) + "]"]
    clock = f"@[{','.join(map(str, mhz))}]" if mhz else ""
    tokens += (
        ["GR3D_FREQ " + ("" if load is None else f"{load}%") + clock] if clock or load is not None else []
    )
    tokens += ["VIC off", "APE 174", "MTS fg 0% bg 0%"]
    tokens += [f"{name}@{value / 1000:g}C" for name, value in zones.items()]
    tokens += [
        f"{name} {a}{unit}/{b}{unit}" + (f"/{c}{unit}" if unit else "") for name, (a, b, c) in rails.items()
    ]
    got = parse_tegrastats(" ".join(tokens) + "\n")
    assert (got.ram_used_mb, got.ram_total_mb, got.free_blocks, got.largest_free_block_mb) == ram
    assert (got.swap_used_mb, got.swap_total_mb) == (swap or (None, None))
    assert got.cpus == [Core(False) if c is None else Core(True, *c) for c in cores]
    assert got.gpu == (Engine(load, mhz) if clock or load is not None else None)
    assert got.temperatures_c == {
        k: float(f"{v / 1000:g}") for k, v in zones.items() if f"{v / 1000:g}" != "-256"
    }
    assert got.rails_mw == {k: v[0] for k, v in rails.items()}
    assert got.average_rails_mw == {k: v[1] for k, v in rails.items()}
    assert (got.time is not None) == time


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda b: b.decode("latin-1")))
def test_nothing_raises(text):
    parse_nvpmodel(text)
    parse_jetson_clocks(text)
    parse_tegrastats(text)
    parse_tegrastats(f"RAM 1/2MB CPU [{text}] {text}")


# --- trees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("nano", Module("NVIDIA Jetson Nano Developer Kit", "32.6.1", "4.6")),
        ("agx-xavier", Module("Jetson-AGX", "32.6.1", "4.6")),
        ("agx-orin", Module("NVIDIA Jetson AGX Orin Developer Kit", "36.4.4", "6.2.1")),
        (
            "orin-nano",
            Module("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", "36.4.3", "6.2"),
        ),
        ("thor", Module("NVIDIA Jetson AGX Thor Developer Kit", "38.2.2", "7.x")),
    ],
)
def test_module(name, module, tmp_path):
    assert read_module(plant(name, tmp_path)) == module
    assert is_jetson(tmp_path)


@pytest.mark.parametrize(
    ("line", "l4t", "jetpack"),
    [
        ("# R28 (release), REVISION: 2.1, GCID: 11272647, BOARD: t210ref", "28.2.1", None),
        ("# R32 (release), REVISION: 5.1, GCID: 26202423, BOARD: t186ref", "32.5.1", "4.5.1"),
        ("# R35 (release), REVISION: 4.1, GCID: 33958178, BOARD: t186ref", "35.4.1", "5.1.2"),
        ("# R35 (release), REVISION: 6.4, GCID: 0, BOARD: generic", "35.6.4", "5.x"),
        ("# R36 (release), REVISION: 3.0, GCID: 36923193, BOARD: generic", "36.3.0", "6.0"),
        ("# R38 (release), REVISION: 4.0, GCID: 43443517, BOARD: generic", "38.4.0", "7.1"),
        ("# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic", "39.2.1", "7.2.1"),
        ("not a release", None, None),
    ],
)
def test_release(line, l4t, jetpack, tmp_path):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/nv_tegra_release").write_text(line + "\n# KERNEL_VARIANT: oot\n")
    assert read_module(tmp_path) == Module(None, l4t, jetpack)
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
        ("nano", {"POM_5V_IN": 2.875, "POM_5V_GPU": 0.122, "POM_5V_CPU": 0.163}, ["POM_5V_IN"]),
        (
            "agx-xavier",
            {"GPU": 0.463, "CPU": 0.618, "SOC": 2.936, "CV": 0, "VDDRQ": 0.309, "SYS5V": 3.306},
            ["GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V"],
        ),
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
    assert memory(plant("orin-nano", tmp_path)) == Memory(7620, 1536, 3810, 1352)


@pytest.mark.parametrize("text", ["", "MemTotal: lots", "MemTotal:  100 kB\n", "\0\0"])
def test_no_memory(text, tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(text)
    assert memory(tmp_path) is None


def test_an_empty_tree_tells_nothing(tmp_path):
    assert read_module(tmp_path) == Module(None, None, None)
    assert (read_rails(tmp_path), read_temperatures(tmp_path), memory(tmp_path)) == ({}, {}, None)
