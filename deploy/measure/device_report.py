"""The device report: what ``cmt-build`` found of an engine, and in which state the device was.

It lies in the bundle as JSON, in the order of the fields; :mod:`cmt_edge.deploy.report` shows it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from ..bundle import make_plain, parse_json, read_record
from ..bundle.record import OMITTED
from ..bundle.sections import CompiledEntry, Count, EngineKey, GoldenCheck, Share
from .benchmark import Benchmark
from .device import DeviceState, PowerReport

WHOLE = "the device report"
"""What errors call the file."""


@dataclass(frozen=True, kw_only=True)
class SustainedPower(PowerReport):
    """Power before, during and after some seconds of uninterrupted inference of ``images`` images;
    ``joules_per_image`` is ``None`` where the power is not known."""

    images: Count
    joules_per_image: float | None


@dataclass(frozen=True)
class DeviceStates:
    """The state of the device before the build, and after the measurement."""

    before: DeviceState
    after: DeviceState


@dataclass(frozen=True, kw_only=True)
class DeviceReport:
    """What one run of ``cmt-build`` did and found.

    Attributes:
        bundle: name of the bundle.
        key: what the engine depends on.
        built_s: seconds that the build took; 0 for an engine that was used again.
        reused: whether the bundle's own engine was still right.
        replaces: why that one was not used; empty where there was none.
        engine_bytes: size of the engine.
        low_precision_share: share of the layers that compute in the asked precision or below.
        golden: the check of the golden images.
        benchmark: the latencies; it has one result.
        power: of the device, under load.
        state: of the device.
        warnings: of the session and of TensorRT.
        compiled: what the compiler made of the graph; ``None`` where that is not known.
    """

    bundle: str
    key: EngineKey
    built_s: float
    reused: bool
    replaces: tuple[str, ...]
    engine_bytes: Count
    low_precision_share: Share
    golden: GoldenCheck
    benchmark: Benchmark
    power: SustainedPower
    state: DeviceStates
    warnings: tuple[str, ...]
    compiled: CompiledEntry | None = field(default=None, metadata=OMITTED)

    def to_bytes(self) -> bytes:
        """The content of the report's JSON file: one line."""
        return (json.dumps(make_plain(self), ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> DeviceReport:
        """Read the JSON file again.

        Args:
            data: its content.
            where: its path, which errors name.

        Raises:
            BundleError: it is no JSON, or an entry is missing, unknown, of another type or out of range.
        """
        content = parse_json(data, where, WHOLE)
        return read_record(cls, content, where, WHOLE)
