"""The page of one bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...bundle import LOGITS, REPORT_PAGE
from .accuracy import write_accuracy
from .conclusion import conclude
from .elements import UNKNOWN, Markup, keep_units, make, make_facts, make_list, make_name
from .frame import assemble, make_conclusion_json, write_verdict
from .layers import write_layers
from .origin import (
    write_commands,
    write_environment,
    write_files,
    write_images,
    write_model,
    write_preprocessing,
    write_steps,
)
from .speed import write_candidates, write_device, write_latency, write_precision
from .subject import Subject

MOST_TRIES = 5
"""So often at most a page is written that tells its own size, until it has that size; three do, because only
the digits of the size change it."""


def make_bundle_page(subject: Subject) -> str:
    """The page of one bundle."""
    manifest, found = subject.manifest, conclude(subject)
    verdict = write_candidates(manifest.verdict) if manifest.verdict else Markup()
    sections = [
        ("Accuracy", write_accuracy(subject)),
        ("Error by block", write_layers(subject.layers, subject.layer_runs)),
        ("Latency", write_latency(subject)),
        ("Precision", write_precision(subject)),
        (f"Why {manifest.precision}", verdict),
        ("Device", write_device(subject)),
        ("Size", write_files(subject)),
        ("Steps", write_steps(manifest)),
        ("Model", write_model(manifest)),
        ("Preprocessing", write_preprocessing(manifest)),
        ("Calibration images", write_images(manifest)),
        ("Environment", write_environment(subject)),
        ("How to reproduce it", write_commands(subject)),
    ]
    top = [
        make("h1", make_name(subject.name)),
        write_verdict(found),
        _write_tiles(subject),
        make_list([text for text in subject.list_warnings() if text != found.why], "warnings"),
    ]
    return assemble(subject.name, top, sections, make_bundle_figures(subject))


def make_own_page(subject: Subject, reports: Mapping[str, int]) -> str:
    """The page of a bundle that will hold it: the sizes on it count the page itself.

    Args:
        subject: the bundle without its reports.
        reports: bytes of the other reports that it will hold, by name.
    """
    page, size = "", 1
    for _ in range(MOST_TRIES):
        page = make_bundle_page(replace(subject, unlisted={**reports, REPORT_PAGE: size}))
        if size == len(page.encode()):
            break
        size = len(page.encode())
    return page


def make_bundle_figures(subject: Subject) -> dict[str, Any]:
    """What the page of one bundle shows, for a program."""
    return subject.to_json() | {"conclusion": make_conclusion_json(conclude(subject))}


def _write_tiles(subject: Subject) -> Markup:
    median = subject.p50_ms
    tiles = [
        _describe_accuracy(subject),
        ("median latency", UNKNOWN if median is None else f"{median:.2f} ms"),
        ("size", f"{subject.size_bytes / 1e6:.1f} MB"),
        ("really ran", subject.executed),
    ]
    return make_facts([(name, keep_units(value)) for name, value in tiles], "tiles")


def _describe_accuracy(subject: Subject) -> tuple[str, str]:
    """Name and value of what tells most about the accuracy."""
    if subject.data:
        return "drop of top-1", f"{subject.data.drop:+.2f} points"
    if subject.manifest.model.head == LOGITS or subject.verification is None:
        return "drop of top-1", "not measured"
    golden = subject.verification.golden
    return "largest difference", f"{golden.diff:.2g} in {golden.output}"
