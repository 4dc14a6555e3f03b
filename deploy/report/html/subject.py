"""What a page shows of a bundle: its manifest, and the figures that lie in its report."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cmt_edge.startup import name_program

from ...bundle import Bundle, Manifest, make_plain, parse_json, read_record
from ...bundle.contents import make_unreadable_error
from ...bundle.sections import DataCheck, LayerError, LayerRun, RanOn, Size, VerificationEntry
from ...files import read_regular
from ...measure.benchmark import Benchmark, Measured
from ...measure.device_report import DeviceReport
from ...measure.flipped import FlippedImage

REPORT = "report.json"
"""Name of the export's report in the bundle."""
MAX_REPORT = 16 << 20
"""A larger report, in bytes, is not read."""


@dataclass(frozen=True)
class Subject:
    """A bundle as a page shows it.

    Attributes:
        name: of its folder.
        path: what commands on the page call it.
        manifest: what it records.
        verification: what the page shows of its verification: what was just found, or else what it records.
        measured: its full figures, ``None`` where they were not measured or not recorded.
        speed: the run that measured them, with its machine and protocol.
        device: what ``cmt-build`` found on the device, where it was built.
        flipped: images with two answers, made small; none where they are not to be shown.
        layers: how far the blocks are from the reference's, where that was compared.
        layer_runs: what that says of each bundle and runtime; none where only the errors were recorded.
        unlisted: bytes of each member of the bundle that its manifest did not list yet when this was found:
            the reports, in the page that the export writes beside them.
    """

    name: str
    path: str
    manifest: Manifest
    verification: VerificationEntry | None
    measured: Measured | None = None
    speed: Benchmark | None = None
    device: DeviceReport | None = None
    flipped: tuple[FlippedImage, ...] = ()
    layers: tuple[LayerError, ...] = ()
    layer_runs: tuple[LayerRun, ...] = ()
    unlisted: dict[str, Size] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Size of the bundle's files together, without the manifest."""
        return self.manifest.size_bytes + sum(self.unlisted.values())

    @property
    def data(self) -> DataCheck | None:
        """The check of labelled images."""
        return self.verification.data if self.verification else None

    @property
    def p50_ms(self) -> float | None:
        """Median latency of a batch, by the best figures there are."""
        if self.measured:
            return self.measured.model.p50
        return self.manifest.latency.p50_ms if self.manifest.latency else None

    @property
    def batch(self) -> int | None:
        """Images in the batch of :attr:`p50_ms`."""
        if self.measured:
            return self.measured.batch
        return self.manifest.latency.batch if self.manifest.latency else None

    @property
    def executed(self) -> str:
        """The precisions that really ran."""
        if self.measured:
            return self.measured.executed.summary()
        return self.manifest.latency.executed.summary() if self.manifest.latency else "not measured"

    def list_warnings(self) -> list[str]:
        """What a reader must know, each once."""
        notes = self.verification.notes if self.verification else ()
        latency = self.manifest.latency.warnings if self.manifest.latency else ()
        measured = self.measured.warnings if self.measured else latency
        device = self.device.warnings if self.device else ()
        return list(dict.fromkeys([*notes, *measured, *device]))

    def with_findings(
        self,
        verification: VerificationEntry | None,
        speed: Benchmark | None,
        place: int,
    ) -> Subject:
        """The same as another page showed it; there the bundle was number ``place`` of the run ``speed``."""
        measured = speed.results[place] if speed else None
        return replace(self, verification=verification, speed=speed, measured=measured)

    def with_check(self, found: VerificationEntry, flipped: tuple[FlippedImage, ...]) -> Subject:
        """The same with a new check in place of the one that it records. Top-1 stays as it is recorded where
        the new check had no labelled images, and ran in the same runtime on the same device; the errors of
        the blocks stay where the new check did not compare them."""
        checked = replace(
            self,
            verification=found,
            flipped=flipped,
            layers=found.layers or self.layers,
            layer_runs=found.layer_runs or (),
        )
        recorded = self.manifest.verification
        if recorded is None or recorded.data is None or found.data is not None:
            return checked
        if not _ran_alike(found.runtime, recorded.runtime):
            return checked
        notes = dict.fromkeys([*found.notes, *recorded.notes, _note_origin(recorded.runtime)])
        kept = replace(found, data=recorded.data, notes=tuple(notes))
        return replace(checked, verification=kept, flipped=self.flipped)

    def with_speed(self, speed: Benchmark, place: int) -> Subject:
        """The same with the figures of a new run, in which it was number ``place``."""
        return replace(self, measured=speed.results[place], speed=speed, name=speed.results[place].name)

    def to_json(self, with_speed: bool = True) -> dict[str, Any]:
        """Everything that the page shows, without the run that measured it where others share that one."""
        content = {
            "name": self.name,
            "manifest": self.manifest,
            "verification": self.verification,
            **({"benchmark": self.speed} if with_speed else {}),
            "device": self.device,
            **({"flipped": self.flipped} if self.flipped else {}),
            **({"layers": self.layers} if self.layers else {}),
            **({"layer_runs": self.layer_runs} if self.layer_runs else {}),
            **({"unlisted": self.unlisted} if self.unlisted else {}),
        }
        return dict(make_plain(content))


def _ran_alike(one: RanOn, other: RanOn) -> bool:
    """Whether two checks used the same runtime, in whatever version, and the same device."""
    return (one.name, one.device) == (other.name, other.device)


def _note_origin(recorded: RanOn) -> str:
    """Says where top-1 comes from that a new check did not measure."""
    return (
        f"top-1 is what the export measured on {recorded.summary()}; this check had no labelled images, which"
        f" {name_program('verify')} --data gives it"
    )


def read_subject(bundle: Bundle, with_images: bool = True) -> Subject:
    """A finished bundle, with the figures of its device where ``cmt-build`` has been there, and else with
    those of its export. ``with_images``: also with the images whose answer changed.

    Raises:
        BundleError: a report in the bundle cannot be read.
    """
    manifest = bundle.manifest
    with bundle.kept():
        device = _read_device_report(bundle)
        recorded = _read_export(bundle)
    speed = device.benchmark if device else recorded.benchmark
    return make_subject(
        bundle.name,
        str(bundle.packed or bundle.path),
        manifest,
        speed,
        device,
        recorded.flipped if with_images else (),
        recorded.layers,
    )


def make_subject(
    name: str,
    path: str,
    manifest: Manifest,
    speed: Benchmark | None,
    device: DeviceReport | None = None,
    flipped: tuple[FlippedImage, ...] = (),
    layers: tuple[LayerError, ...] = (),
) -> Subject:
    """A bundle whose reports are known already; ``speed`` is a run of it alone."""
    measured = speed.results[0] if speed and speed.results else None
    return Subject(
        name,
        path,
        manifest,
        manifest.verification,
        measured,
        speed,
        device,
        _choose_known(manifest, flipped),
        layers,
    )


def _choose_known(manifest: Manifest, flipped: tuple[FlippedImage, ...]) -> tuple[FlippedImage, ...]:
    """The images whose classes the model has; a report that somebody edited may name others."""
    count = len(manifest.labels)
    return tuple(one for one in flipped if max(one.label, one.reference, one.bundle) < count)


@dataclass(frozen=True)
class _Recorded:
    """What a page takes from the export's report."""

    benchmark: Benchmark | None = None
    flipped: tuple[FlippedImage, ...] = ()
    layers: tuple[LayerError, ...] = ()


def _read_device_report(bundle: Bundle) -> DeviceReport | None:
    entry = bundle.manifest.engine
    if entry is None:
        return None
    file = bundle.file(entry.report)
    return DeviceReport.from_bytes(_read_member(file), file)


def _read_export(bundle: Bundle) -> _Recorded:
    """The export's quick measurement in full, and its images; all empty where the bundle holds none."""
    if REPORT not in bundle.manifest.files:
        return _Recorded()
    file = bundle.file(REPORT)
    content = parse_json(_read_member(file), file, "the report")
    names = {member.name for member in fields(_Recorded)}
    entries = content.items() if isinstance(content, dict) else ()
    return read_record(
        _Recorded, {name: value for name, value in entries if name in names}, file, "the report"
    )


def _read_member(file: Path) -> bytes:
    try:
        return read_regular(file, MAX_REPORT)
    except OSError as exc:
        raise make_unreadable_error(file, exc) from exc
