"""May a bundle be shipped? One sentence that says so, and why."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from ...bundle import LOGITS
from ...bundle.sections import TYPED_FORMATS, DataCheck
from ..tables import format_differences
from ..verification import describe_unit
from .subject import Subject

RANDOM = "random"
"""What the manifest calls weights that were never trained."""


class State(Enum):
    """What the conclusion comes to; the value is how its sentence begins."""

    SHIP = "Ship it"
    CHECK = "Check first"
    STOP = "Do not ship it"


@dataclass(frozen=True)
class Conclusion:
    """May it be shipped, and ``why``, which completes the sentence."""

    state: State
    why: str

    @property
    def sentence(self) -> str:
        return f"{self.state.value}: {self.why}."


def conclude(subject: Subject) -> Conclusion:
    """What the recorded checks say; the first objection counts, the gravest come first."""
    for state, find in OBJECTIONS:
        if why := find(subject):
            return Conclusion(state, why)
    return Conclusion(State.SHIP, _praise(subject))


def _find_failed_outputs(subject: Subject) -> str:
    engine, verification = subject.manifest.engine, subject.verification
    checks = [entry.golden for entry in (verification, engine) if entry]
    golden = next((check for check in checks if not check.passed or check.diff > check.atol), None)
    if golden is None:
        return ""
    found, allowed = format_differences(golden.diff, golden.atol)
    return (
        f"on the golden images its {golden.output} differ from the reference's by {found}, where {allowed} is"
        f" allowed, and its pixels by {golden.pixel_diff} grey levels"
    )


def _find_failed_accuracy(subject: Subject) -> str:
    data = subject.data
    if data is None or data.passed:
        return ""
    return f"{_describe_drop(data)}, which is more than the allowed {data.max_drop:g}"


def _find_failed_otherwise(subject: Subject) -> str:
    passed = subject.verification is None or subject.verification.passed
    return "" if passed else "its verification failed"


def _find_random_weights(subject: Subject) -> str:
    is_random = subject.manifest.model.weights.source == RANDOM
    return "its weights are random, so that its answers mean nothing" if is_random else ""


def _find_no_verification(subject: Subject) -> str:
    return "" if subject.verification else "nothing was verified"


def _find_fresh_weights(subject: Subject) -> str:
    fresh = subject.manifest.model.weights.fresh
    if not fresh:
        return ""
    return f"{len(fresh)} of its weights were not in the checkpoint and hold initial values ({fresh[0]}, ...)"


def _find_doubt(subject: Subject) -> str:
    """What the verification itself found to doubt."""
    if subject.data and subject.data.doubt:
        return subject.data.doubt
    notes = subject.verification.notes if subject.verification else ()
    return notes[0] if notes else ""


def _find_no_device(subject: Subject) -> str:
    manifest = subject.manifest
    if manifest.format in TYPED_FORMATS and manifest.engine is None:
        return "its answers were verified, but no GPU has run it yet"
    return (
        "" if subject.p50_ms is not None else "its answers were verified, but its device has not run it yet"
    )


def _find_no_accuracy(subject: Subject) -> str:
    if subject.data is not None or subject.manifest.model.head != LOGITS:
        return ""
    return "the golden images agree with the reference, but top-1 was not measured"


OBJECTIONS: tuple[tuple[State, Callable[[Subject], str]], ...] = (
    (State.STOP, _find_failed_outputs),
    (State.STOP, _find_failed_accuracy),
    (State.STOP, _find_failed_otherwise),
    (State.STOP, _find_random_weights),
    (State.CHECK, _find_no_verification),
    (State.CHECK, _find_fresh_weights),
    (State.CHECK, _find_doubt),
    (State.CHECK, _find_no_device),
    (State.CHECK, _find_no_accuracy),
)
"""What speaks against shipping a bundle, the gravest first; each gives an empty text where it does not."""


def _describe_drop(data: DataCheck) -> str:
    low, high = data.drop_ci
    return (
        f"top-1 is {data.top1:.2f} % where the reference has {data.reference_top1:.2f} % on {data.images}"
        f" images, a drop of {data.drop:+.2f} points (95 % interval {low:+.2f} to {high:+.2f})"
    )


def _praise(subject: Subject) -> str:
    """Why a bundle without an objection may be shipped."""
    if subject.data:
        text = f"{_describe_drop(subject.data)}, within the allowed {subject.data.max_drop:g}"
    else:
        text = _describe_golden(subject)
    time = "" if subject.p50_ms is None else f"; the median latency is {subject.p50_ms:.2f} ms"
    return text + time + (f" a batch of {subject.batch}" if time else "")


def _describe_golden(subject: Subject) -> str:
    if subject.verification is None:
        return "nothing speaks against it"
    golden = subject.verification.golden
    found, allowed = format_differences(golden.diff, golden.atol)
    kinds = {output.name: output.kind for output in subject.manifest.outputs}
    return (
        f"on the golden images its outputs are the reference's: {golden.output}, which differ most, do so by"
        f" {found} (allowed {allowed}{describe_unit(kinds.get(golden.output))})"
    )
