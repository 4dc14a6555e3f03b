"""Figures of pages, read again: from a page, from its JSON file, or from a bundle."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ...bundle import Bundle, Manifest, parse_json, read_record
from ...bundle.sections import LayerError, LayerRun, Size, VerificationEntry
from ...errors import BundleError, InputError
from ...escaping import escape_surrogates
from ...files import read_regular
from ...measure.benchmark import Benchmark
from ...measure.device_report import DeviceReport
from ...measure.flipped import FlippedImage
from ...measure.statistics import Latency
from .frame import PREFIX
from .subject import Subject, make_subject, read_subject

SUFFIXES = (".json", ".html", ".htm")
"""How a file of figures, or a page that holds some, is called; anything else is a bundle."""
MAX_FILE = 64 << 20
"""A larger file, in bytes, is not read."""
ROUNDING = 1e-6
"""Share by which a figure may differ from another for being rounded."""
WHOLE = "the report"
"""What errors call the file."""
REMEDY = (
    "give a page of this version (report.html), the JSON file that it lets you download, what --figures"
    " wrote, or a bundle"
)
"""The remedy for a file that holds no figures."""


@dataclass(frozen=True)
class Reported:
    """A bundle on a device: what calls the device, and what was found there."""

    device: str
    subject: Subject


def read_reported(path: Path, key: Path | None = None) -> list[Reported]:
    """What a report tells, or a bundle; several of them where it is a comparison or the report of a fleet.

    Args:
        path: a page, a JSON file of figures, a bundle's folder, or a packed bundle.
        key: public key, with which a bundle must be signed; files of figures bear no signature.

    Raises:
        InputError: the file cannot be read, or holds no figures.
    """
    if path.suffix.lower() not in SUFFIXES:
        subject = read_subject(Bundle.open(path, key=key), with_images=False)
        return [Reported(subject.name, subject)]
    content = _read_content(path)
    try:
        return list(_list_reported(content, path))
    except BundleError as exc:
        raise _make_error(path, exc.what) from exc


def _read_content(file: Path) -> dict[str, Any]:
    """The figures in a JSON file or in a page."""
    try:
        data = read_regular(file, MAX_FILE)
    except OSError as exc:
        raise _make_error(file, exc.strerror or exc) from exc
    try:
        content = parse_json(data if file.suffix.lower() == ".json" else _extract(data), file, WHOLE)
    except (BundleError, binascii.Error) as exc:
        raise _make_error(file, exc.why if isinstance(exc, BundleError) else exc) from exc
    if not isinstance(content, dict):
        raise _make_error(file, "it is no object of JSON")
    return content


def _extract(page: bytes) -> bytes:
    """The figures that a page lets a reader download; empty where it has none."""
    found = re.search(rb'href="' + re.escape(PREFIX.encode()) + rb'([A-Za-z0-9+/=]*)"', page)
    return base64.b64decode(found[1], validate=True) if found else b""


def _list_reported(content: dict[str, Any], file: Path) -> Iterator[Reported]:
    """The members of a fleet, the bundles of a comparison, or the one bundle of a report."""
    if "fleet" in content:
        for entry in _require_list(content["fleet"], file):
            member = read_record(_Member, {"device": entry.get("device")}, file, WHOLE)
            (report,) = _require_list([entry.get("report")], file)
            yield Reported(member.device, _read_subject(report, file, 0))
        return
    if "bundles" in content:
        shared = content.get("benchmark")
        for place, entry in enumerate(_require_list(content["bundles"], file)):
            with_speed = entry if shared is None else entry | {"benchmark": shared}
            yield Reported(
                _name_device(file), _read_subject(with_speed, file, 0 if shared is None else place)
            )
        return
    yield Reported(_name_device(file), _read_subject(content, file, 0))


def _name_device(file: Path) -> str:
    """What calls the device: the name of its file, which may hold bytes that are no text."""
    return escape_surrogates(file.stem)


def _require_list(found: object, file: Path) -> list[dict[str, Any]]:
    """A list of objects that is not empty."""
    if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
        raise BundleError("it lists no bundles", where=file)
    return found


@dataclass(frozen=True)
class _Member:
    """What a fleet's entry has beside the report itself."""

    device: str


@dataclass(frozen=True)
class _Figures:
    """The entries of :meth:`Subject.to_json` but the manifest."""

    name: str
    verification: VerificationEntry | None
    benchmark: Benchmark | None
    device: DeviceReport | None
    flipped: tuple[FlippedImage, ...] = ()
    layers: tuple[LayerError, ...] = ()
    layer_runs: tuple[LayerRun, ...] = ()
    unlisted: dict[str, Size] = field(default_factory=dict)


def _read_subject(content: dict[str, Any], file: Path, place: int) -> Subject:
    """A bundle as a page showed it. What the page concluded is not read: it follows from the rest."""
    if "manifest" not in content:
        raise BundleError("it has no manifest, so nobody knows which weights it is about", where=file)
    names = {member.name for member in fields(_Figures)}
    entries = {name: value for name, value in content.items() if name in names}
    found = read_record(_Figures, entries, file, WHOLE)
    manifest = Manifest.from_content(content["manifest"], file)
    made = make_subject(found.name, found.name, manifest, None, found.device, found.flipped, found.layers)
    made = replace(made, layer_runs=found.layer_runs, unlisted=found.unlisted)
    speed = found.benchmark
    if speed is not None and not 0 <= place < len(speed.results):
        raise BundleError("it has fewer measurements than bundles", where=file)
    for measured in speed.results if speed else []:
        _require_possible(measured.model, file)
        _require_possible(measured.end_to_end, file)
    return made.with_findings(found.verification, speed, place)


def _require_possible(latency: Latency, file: Path) -> None:
    """Raise :class:`BundleError` for figures that no measurement gives: of several units, for instance."""
    rising = [0.0, latency.p50, latency.p90, latency.p95, latency.max]
    if rising != sorted(rising):
        raise BundleError(f"its percentiles of a latency do not rise: {rising[1:]} ms", where=file)
    drawn = latency.histogram
    if drawn and not drawn.low * (1 - ROUNDING) <= latency.p50 <= drawn.high * (1 + ROUNDING):
        raise BundleError(
            f"its median of {latency.p50:g} ms lies outside its own histogram, {drawn.low:g} to"
            f" {drawn.high:g} ms",
            where=file,
        )


def _make_error(file: Path, why: object) -> InputError:
    return InputError("is no report", where=file, why=why, remedy=REMEDY)
