"""Power beside a measurement: :class:`PowerMonitor` samples it in the background.

What cannot be read becomes a note, never an exception: a latency without its power figure is still a latency.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError, RuntimeMissingError
from ..measure.device import Power, PowerReport
from . import dgpu, jetson
from .state import check
from .tegrastats import TegrastatsPower
from .tools import find_tool

JOIN_TIMEOUT_S = 5.0
"""Seconds that a sensor has to answer before it is left behind."""
PHASES = ("before", "during", "after")
"""Of a measurement, in order: idle, at work, idle."""
MS_PER_S = 1e3
"""Milliseconds in a second."""
NO_RAILS = "power rails: no power monitor can be read in sysfs"
"""The note where a Jetson's tree holds no labelled channel."""


@dataclass(frozen=True)
class PowerSensor:
    """One reading of the total power: ``watts`` raises where it fails, ``close`` is called once at the
    end."""

    source: str
    watts: Callable[[], float]
    close: Callable[[], object] = lambda: None


def find_power_sensor(
    root: Path = Path("/"),
    gpu_index: int = 0,
) -> tuple[PowerSensor | None, list[str]]:
    """What measures the total power here, tried once, or ``None`` and the reason.

    On a Jetson the input rail of sysfs, or the sum of the rails where it has none
    (:func:`cmt_edge.deploy.telemetry.jetson.total_rails`), or the same from ``tegrastats`` where sysfs cannot
    be read; else the GPU's board power by NVML, without CPU and memory of the machine.
    """
    if not jetson.is_jetson(root):
        return _find_gpu_sensor(gpu_index)
    sensor, notes = _find_rail_sensor(root)
    return (sensor, notes) if sensor else _find_tegrastats_sensor(notes)


def _find_tegrastats_sensor(
    notes: list[str],
) -> tuple[PowerSensor | None, list[str]]:
    """The tool, or ``notes`` of why sysfs could not be read and what the tool lacks."""
    program = find_tool("tegrastats")
    if program is None:
        return None, [*notes, "power: tegrastats was not found either"]
    try:
        running = TegrastatsPower([program])
    except OSError as exc:
        return None, [*notes, f"power: {exc}"]
    return PowerSensor(running.source, running.watts, running.close), []


def _find_rail_sensor(root: Path) -> tuple[PowerSensor | None, list[str]]:
    sensors = {s.name: s for s in jetson.find_rails(root)}
    names = jetson.total_rails(sensors)
    if not names:
        return None, [NO_RAILS]
    readable = jetson.read_rails(root)
    missing = [name for name in names if name not in readable]
    if missing:  # a sum without them would be called the total
        return None, [f"power: {', '.join(missing)} cannot be read"]
    source = names[0] if len(names) == 1 else f"sum of {', '.join(names)}"
    return PowerSensor(source, lambda: sum(sensors[n].watts() for n in names)), []


def _find_gpu_sensor(index: int) -> tuple[PowerSensor | None, list[str]]:
    stack = ExitStack()
    try:
        nvml, handle = stack.enter_context(dgpu.opened(index))
    except RuntimeMissingError as exc:
        return None, [f"power: {exc.what}"]
    try:
        dgpu.read_power_w(nvml, handle)
    except nvml.NVMLError as exc:
        stack.close()
        return None, [f"power: GPU {index} does not tell it: {exc}"]
    source = f"NVML, board power of GPU {index}"
    return PowerSensor(source, lambda: dgpu.read_power_w(nvml, handle), stack.close), []


class PowerMonitor:
    """Samples the total power in a background thread while the body of a ``with`` runs, and before and after
    it.

    >>> with PowerMonitor() as power:
    ...     latency_ms = measure()
    >>> power.during.watts, power.energy_per_inference(latency_ms)

    The GPU's figure is itself an average over a second, and an INA3221 is read over I2C: let the body run for
    some seconds.

    Args:
        root, gpu_index: as :func:`cmt_edge.deploy.telemetry.state.read_state`.
        interval_s: between two samples; each sample takes a few milliseconds of one core.
        idle_s: how long to sample before and after the body, which waits; 0 leaves at most one sample.
        sensor: instead of what :func:`find_power_sensor` finds.

    Raises :class:`InputError` for an interval that is not positive or a negative idle time.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        interval_s: float = 0.1,
        idle_s: float = 1.0,
        gpu_index: int = 0,
        sensor: PowerSensor | None = None,
    ) -> None:
        are_finite = math.isfinite(interval_s) and math.isfinite(idle_s)
        if not (are_finite and interval_s > 0 and idle_s >= 0):
            raise InputError(f"cannot sample every {interval_s} s with {idle_s} s of idle time")
        check(Path(root), gpu_index)
        self._root, self._gpu_index, self._given = (
            Path(root),
            gpu_index,
            sensor,
        )
        self._interval_s, self._idle_s = interval_s, idle_s
        self._reset()

    def _reset(self) -> None:
        self.notes: list[str] = []
        self._sensor: PowerSensor | None = None
        self._samples: dict[str, list[float]] = {phase: [] for phase in PHASES}
        self._failures = 0
        self._phase = PHASES[0]
        self._stop, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PowerMonitor:
        self._reset()
        self._sensor, self.notes = (
            (self._given, []) if self._given else find_power_sensor(self._root, self._gpu_index)
        )
        if self._sensor is None:
            return self
        self._thread = threading.Thread(
            target=self._take_samples,
            args=(self._sensor,),
            name="power",
            daemon=True,
        )
        self._thread.start()
        try:
            time.sleep(self._idle_s)
        except BaseException:  # interrupted here, __exit__ would not be called
            self._end()
            raise
        self._enter_phase("during")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._enter_phase("after")
            if kind is None and self._thread is not None:
                time.sleep(self._idle_s)
        finally:
            self._end()

    def _enter_phase(self, phase: str) -> None:
        self._phase = phase
        self._wake.set()

    def _take_samples(self, sensor: PowerSensor) -> None:
        """The thread: one reading in each interval, and one as soon as a phase begins."""
        while not self._stop.is_set():
            phase = self._phase
            try:
                watts = sensor.watts()
                if not math.isfinite(watts):
                    raise ValueError(f"reads {watts}")
            except Exception as exc:
                self._failures += 1
                if self._failures == 1:
                    self.notes.append(
                        f"power: {sensor.source} failed in the phase {phase!r}: {exc or type(exc).__name__}"
                    )
            else:
                if phase == self._phase:  # a reading across two phases belongs to neither
                    self._samples[phase].append(watts)
            self._wake.wait(self._interval_s)
            self._wake.clear()

    def _end(self) -> None:
        if self._thread is None or self._sensor is None:
            return
        self._stop.set()
        self._wake.set()
        self._thread.join(JOIN_TIMEOUT_S)
        if self._thread.is_alive():
            # closing under a call that hangs could crash; the thread ends with the call, or with the process
            self.notes.append(f"power: {self._sensor.source} did not answer for {JOIN_TIMEOUT_S:.0f} s")
        else:
            self._sensor.close()
        if self._failures > 1:
            self.notes.append(f"power: {self._failures} readings failed in all")
        self._thread = None

    @property
    def source(self) -> str | None:
        """What is measured, ``None`` without a sensor."""
        return self._sensor.source if self._sensor else None

    @property
    def before(self) -> Power:
        """While idle, before the body."""
        return self._compute_mean("before")

    @property
    def during(self) -> Power:
        """While the body ran."""
        return self._compute_mean("during")

    @property
    def after(self) -> Power:
        """While idle, after the body."""
        return self._compute_mean("after")

    def _compute_mean(self, phase: str) -> Power:
        samples = list(self._samples[phase])
        return Power(
            math.fsum(samples) / len(samples) if samples else None,
            len(samples),
        )

    def report(self) -> PowerReport:
        """All figures, for a file."""
        return PowerReport(
            self.source,
            self._interval_s,
            self.before,
            self.during,
            self.after,
            list(self.notes),
        )

    def energy_per_inference(self, latency_ms: float, images: int = 1) -> float | None:
        """Joules for one image by the power during the body, see :func:`compute_joules_per_image`; ``None``
        where that is unknown."""
        return compute_joules_per_image(self.during.watts, latency_ms, images)


def compute_joules_per_image(
    watts: float | None,
    latency_ms: float,
    images: int = 1,
) -> float | None:
    """Mean watts times the seconds of one call, over the images of one call.

    It is the energy of the whole device, idle power included; ``None`` where the power is unknown. Raises
    :class:`InputError` for a latency that is not positive, and for less than one image.
    """
    if not (math.isfinite(latency_ms) and latency_ms > 0) or images < 1:
        raise InputError(f"the energy of {images} images in {latency_ms} ms cannot be computed")
    return None if watts is None else watts * latency_ms / MS_PER_S / images
