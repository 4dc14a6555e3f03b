"""The page of a fleet: the same model on several devices, a row a device."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cmt_edge.startup import name_program

from ...bundle.sections import Host
from ...errors import InputError
from .charts import draw_bar
from .comparison import (
    LATENCY_HEADER,
    draw_distributions,
    format_memory,
    list_measured_cells,
    write_accuracies,
    write_warnings,
)
from .conclusion import Conclusion, State, conclude
from .elements import UNKNOWN, Markup, Table, join, make, make_code, make_facts, make_hash, make_list
from .figures import Reported
from .frame import assemble, make_conclusion_json, write_verdict, write_word
from .origin import make_export_command
from .subject import Subject

SHOWN_DIGITS = 12
"""Number of digits of a hash that a message quotes."""
MOST_NAMES = 5
"""The largest number of devices that the conclusion names."""
GRAVITY = (State.SHIP, State.CHECK, State.STOP)
"""What a conclusion may be, the gravest last."""


def require_one_model(members: Sequence[Reported]) -> None:
    """Raise :class:`InputError` where the reports are not all of the same weights."""
    known: dict[str, str] = {}
    for member in members:
        model = member.subject.manifest.model
        known.setdefault(
            model.weights.sha256,
            f"{member.device} has {model.name} with weights {model.weights.sha256[:SHOWN_DIGITS]}",
        )
    if len(known) > 1:
        raise InputError(
            "these reports are of different weights, so their rows would not compare",
            why="; ".join(known.values()),
            remedy="merge reports of one checkpoint;"
            f" {name_program('report')} BUNDLE BUNDLE compares different models",
        )


def require_distinct(members: Sequence[Reported]) -> None:
    """Raise :class:`InputError` where a report was given twice, under whatever name: it would count as two
    devices. Two measurements of one device are not the same report."""
    known: dict[str, str] = {}
    for member in members:
        content = json.dumps(member.subject.to_json(), sort_keys=True)
        if content in known:
            raise InputError(
                f"{known[content]} and {member.device} are the same report, which would count as two devices",
                remedy="give each report once; a merged report holds those that it was made from",
            )
        known[content] = member.device


def name_members(members: Sequence[Reported]) -> list[Reported]:
    """The same with a name of its own for each row: numbered where a device or a bundle repeats."""
    several = {
        member.device
        for member in members
        if len({one.subject.name for one in members if one.device == member.device}) > 1
    }
    names: list[str] = []
    for member in members:
        name = member.device
        if name in several and member.subject.name != name:
            name = f"{name} / {member.subject.name}"
        same = sum(one == name or one.startswith(f"{name} #") for one in names)
        names.append(f"{name} #{same + 1}" if same else name)
    return [Reported(name, member.subject) for name, member in zip(names, members, strict=True)]


def conclude_fleet(members: Sequence[Reported]) -> Conclusion:
    """May it be shipped to all of them? The gravest conclusion counts."""
    found = [conclude(member.subject) for member in members]
    worst = max(found, key=lambda one: GRAVITY.index(one.state))
    affected = [m.device for m, one in zip(members, found, strict=True) if one.state is worst.state]
    count = len(members)
    if worst.state is not State.SHIP:
        return Conclusion(
            worst.state,
            f"{_list_names(affected)} ({len(affected)} of {count}); of {affected[0]}: {worst.why}",
        )
    timed = sorted((m.subject.p50_ms, m.device) for m in members if m.subject.p50_ms is not None)
    spread = ""
    if timed and len({member.subject.batch for member in members}) == 1:
        (low, first), (high, last) = timed[0], timed[-1]
        spread = f"; the median latency is {low:.2f} ms ({first}) to {high:.2f} ms ({last})"
    return Conclusion(State.SHIP, f"all {count} reports are verified within the allowed drop{spread}")


def _list_names(names: Sequence[str]) -> str:
    """The first names, and how many others there are."""
    left = len(names) - MOST_NAMES
    return ", ".join(names[:MOST_NAMES]) + (f" and {left} more" if left > 0 else "")


def make_fleet_page(members: Sequence[Reported]) -> str:
    """The page of the same model on several devices.

    Raises:
        InputError: the reports are of different weights.
    """
    require_one_model(members)
    named = name_members(members)
    subjects = [replace(member.subject, name=member.device) for member in named]
    sections = [
        ("Devices", _write_devices(named)),
        ("Accuracy", write_accuracies(subjects, "device")),
        ("Latency", _write_latencies(named)),
        ("Weights", _write_model(named)),
        ("Warnings", write_warnings(subjects)),
        ("Environment", _write_environments(named)),
        ("How to reproduce it", _write_commands(named)),
    ]
    title = f"{named[0].subject.manifest.model.name} in {len(named)} reports of devices"
    top = [make("h1", title), write_verdict(conclude_fleet(named))]
    return assemble(title, top, sections, make_fleet_figures(named))


def make_fleet_figures(members: Sequence[Reported]) -> dict[str, Any]:
    """What the page shows, for a program."""
    return {
        "conclusion": make_conclusion_json(conclude_fleet(members)),
        "fleet": [
            {
                "device": member.device,
                "report": member.subject.to_json()
                | {"conclusion": make_conclusion_json(conclude(member.subject))},
            }
            for member in members
        ],
    }


def describe_machine(subject: Subject) -> str:
    """The processor that ran the bundle, by the best that is known."""
    if subject.device:
        return subject.device.key.gpu
    host = _find_host(subject)
    return UNKNOWN if host is None else host.cpu


def _find_host(subject: Subject) -> Host | None:
    """The machine of the measurement, or else of the export."""
    return subject.speed.host if subject.speed else subject.manifest.host


def _write_devices(members: Sequence[Reported]) -> Markup:
    rows = [
        [
            member.device,
            write_word(conclude(member.subject).state),
            describe_machine(member.subject),
            _describe_runtime(member.subject),
            member.subject.manifest.precision,
            member.subject.executed,
            f"{member.subject.size_bytes / 1e6:.1f}",
            format_memory(member.subject),
        ]
        for member in members
    ]
    header = ["device", "verdict", "machine", "runtime", "asked for", "really ran", "MB", "memory, MB"]
    reasons = [f"{member.device}: {conclude(member.subject).sentence}" for member in members]
    return join([Table("A row a device", header, rows, is_numeric=False).write(), make_list(reasons)])


def _describe_runtime(subject: Subject) -> str:
    """Where the bundle ran, by its measurement or its verification."""
    ran = subject.measured or subject.verification
    return UNKNOWN if ran is None else ran.runtime.summary()


def _write_latencies(members: Sequence[Reported]) -> Markup:
    slowest = max((member.subject.p50_ms or 0 for member in members), default=0) or 1.0
    rows = [_list_latency_cells(member, slowest) for member in members]
    header = ["device", *LATENCY_HEADER, "drift", "joules an image"]
    how = make("p", "Each device was measured by itself, with its own runtime and threads.")
    table = Table("Milliseconds of one batch", header, rows).write()
    subjects = [replace(member.subject, name=member.device) for member in members]
    return join([how, table, draw_distributions(subjects)])


def _list_latency_cells(member: Reported, slowest: float) -> list[str]:
    subject = member.subject
    median, measured = subject.p50_ms, subject.measured
    if median is None or subject.batch is None:
        return [member.device, "not measured", UNKNOWN, "", *[UNKNOWN] * 6]
    cells = [member.device, str(subject.batch), f"{median:.2f}", draw_bar(median / slowest)]
    if measured is None:
        return [*cells, *[UNKNOWN] * 6]
    energy = subject.device.power.joules_per_image if subject.device else None
    return [
        *cells,
        *list_measured_cells(measured),
        f"{100 * measured.model.drift:+.1f} %",
        UNKNOWN if energy is None else f"{energy:.3g}",
    ]


def _write_model(members: Sequence[Reported]) -> Markup:
    """The one model of all of them, and what each bundle was made of it."""
    model = members[0].subject.manifest.model
    facts = [
        ("model", f"{model.name} ({model.family})"),
        ("weights", model.weights.source),
        ("hash of the weights", make_hash(model.weights.sha256)),
    ]
    rows = [
        [member.device, member.subject.name, manifest.format, " x ".join(map(str, manifest.input.shape))]
        for member in members
        for manifest in [member.subject.manifest]
    ]
    header = ["device", "bundle", "format", "input"]
    return join([make_facts(facts), Table("Bundles", header, rows, is_numeric=False).write()])


def _write_environments(members: Sequence[Reported]) -> Markup:
    """The machine and the versions of each measurement."""
    return make_facts((member.device, _describe_environment(member.subject)) for member in members)


def _describe_environment(subject: Subject) -> str:
    host = _find_host(subject)
    versions = subject.speed.versions if subject.speed else subject.manifest.versions
    parts = [f"{host.cpu}, {host.cores or 'unknown'} cores, {host.system}"] if host else []
    if subject.device:
        key = subject.device.key
        parts.append(f"{key.gpu}, TensorRT {key.tensorrt}, CUDA {key.cuda}, driver {key.driver}")
    return "; ".join([*parts, ", ".join(f"{name} {version}" for name, version in versions.items())])


def _write_commands(members: Sequence[Reported]) -> Markup:
    exports = dict.fromkeys(make_export_command(member.subject.manifest) for member in members)
    again = [
        f"{name_program('bench')} BUNDLE --figures DEVICE.json      # on each device",
        f"{name_program('report')} --merge DEVICE.json ... -o fleet.html",
    ]
    return make_code([*exports, *again])
