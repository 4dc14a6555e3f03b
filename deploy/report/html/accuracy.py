"""The section about accuracy: golden images, labelled images, classes, changed answers, decoding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ...bundle import LOGITS, Manifest
from ...bundle.sections import ClassCheck, DataCheck, GoldenCheck
from ..bundle import describe_decoding
from ..tables import format_differences
from ..verification import describe_unit
from .charts import draw_bar, draw_interval, make_key
from .elements import UNKNOWN, Markup, Table, join, make, make_facts
from .flips import name_class, write_changes
from .subject import Subject

SCALE_MARGIN = 1.25
"""A drop's scale ends beyond the farther of its interval and its limit by this factor."""


def write_accuracy(subject: Subject) -> Markup:
    """What the verification found."""
    return join(_list_parts(subject))


def _list_parts(subject: Subject) -> Iterator[Markup]:
    verification, manifest = subject.verification, subject.manifest
    where = (
        f"Verified on {verification.runtime.summary()}." if verification else "The export verified nothing."
    )
    yield make("p", where)
    named = {"verification": verification, "engine, on its device": manifest.engine}
    yield _write_golden({name: entry.golden for name, entry in named.items() if entry}, manifest)
    if data := subject.data:
        yield _write_top1(data)
        yield _write_classes(data.classes or (), manifest)
        yield write_changes(data, subject.flipped, manifest)
    elif manifest.model.head == LOGITS:
        yield make("p", _describe_missing(subject))
    if manifest.decoding:
        yield make("p", _make_sentence(describe_decoding(manifest.decoding)))


def _describe_missing(subject: Subject) -> str:
    """That top-1 was not measured; and where it was, if the export measured it elsewhere."""
    advice = "Give labelled images: --eval-data to the export, or --data to the verification."
    recorded = subject.manifest.verification
    if recorded is None or recorded.data is None:
        return f"Top-1 was not measured. {advice}"
    return (
        f"Top-1 was not measured here. The export measured {recorded.data.top1:.2f} % on"
        f" {recorded.runtime.summary()}; the reference has {recorded.data.reference_top1:.2f} %. {advice}"
    )


def _write_golden(checks: Mapping[str, GoldenCheck], manifest: Manifest) -> Markup:
    """A row a check, by what was checked."""
    rows = [_list_golden_cells(name, golden, manifest) for name, golden in checks.items()]
    header = ["golden images", "images", "pixels differ by", "output", "differs by", "allowed", "passed"]
    return Table("The same images through the bundle and the reference model", header, rows).write()


def _list_golden_cells(name: str, golden: GoldenCheck, manifest: Manifest) -> list[str]:
    found, allowed = format_differences(golden.diff, golden.atol)
    kinds = {output.name: output.kind for output in manifest.outputs}
    return [
        name,
        str(golden.images),
        f"{golden.pixel_diff} grey levels",
        golden.output,
        found,
        f"{allowed}{describe_unit(kinds.get(golden.output))}",
        "yes" if golden.passed else "NO",
    ]


def _write_top1(data: DataCheck) -> Markup:
    low, high = data.drop_ci
    logits = (data.logit_max_diff, data.logit_mean_diff)
    largest, mean = (UNKNOWN if value is None else f"{value:.3g}" for value in logits)
    rows = [
        ["reference top-1", f"{data.reference_top1:.2f} %", draw_bar(data.reference_top1 / 100)],
        ["bundle top-1", f"{data.top1:.2f} %", draw_bar(data.top1 / 100)],
        ["same answer as the reference", f"{data.agreement:.2f} %", draw_bar(data.agreement / 100)],
        [
            "drop, 95 % interval",
            f"{data.drop:+.2f} ({low:+.2f} to {high:+.2f}) points",
            draw_drop(data, find_reach([data])),
        ],
    ]
    facts = [
        ("allowed drop", _describe_limit(data)),
        ("logits differ by", f"at most {largest}, on average {mean}"),
        ("reference", data.reference_source),
    ]
    table = Table(f"Top-1 on {data.images} labelled images", ["figure", "value", ""], rows)
    return join([make("h3", "Labelled images"), table.write(), make_facts(facts)])


def _describe_limit(data: DataCheck) -> Markup:
    """What is allowed, in the colour of its line in the plot, and whether it holds."""
    unit = "point" if data.max_drop == 1 else "points"
    return join([make_key("limit"), f"{data.max_drop:g} {unit}: {'passed' if data.passed else 'FAILED'}"])


def find_reach(checks: Sequence[DataCheck]) -> float:
    """How many points the scale of these drops reaches to either side of zero."""
    ends = [abs(end) for data in checks for end in (*data.drop_ci, data.max_drop)]
    return SCALE_MARGIN * max(ends, default=1.0)


def draw_drop(data: DataCheck, reach: float) -> Markup:
    """The interval of the drop with a line at what is allowed; zero lies in the middle."""
    return draw_interval(data.drop, data.drop_ci, (-reach, reach), data.max_drop)


def _write_classes(classes: tuple[ClassCheck, ...], manifest: Manifest) -> Markup:
    rows = [
        [
            name_class(manifest, check.label),
            str(check.images),
            f"{100 * check.reference_right / check.images:.1f}",
            f"{100 * check.right / check.images:.1f}",
            f"{check.right - check.reference_right:+d}",
        ]
        for check in classes
    ]
    header = ["class", "images", "reference top-1 %", "bundle top-1 %", "right answers gained"]
    caption = f"The {len(classes)} classes whose top-1 fell most, the worst first"
    return join([make("h3", "By class"), Table(caption, header, rows).write()]) if rows else Markup()


def _make_sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
