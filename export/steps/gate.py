"""The gate: a bundle that differs from the reference by more than allowed is refused, with its cause."""

from __future__ import annotations

from dataclasses import dataclass

from cmt_edge.deploy import Bundle, Predictor, report
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, get_runtime
from cmt_edge.deploy.bundle.sections import FORMATS, GoldenCheck
from cmt_edge.deploy.errors import CmtEdgeError, GateError
from cmt_edge.deploy.measure.parity import Verification, check_golden

SERVED_HERE = frozenset({"onnx", "openvino"})
"""Formats whose bundles a CPU serves without anything built for it."""

PRECISION_REMEDIES = {
    "fp32": "the graph computes something else than the model: look for what forward does with values of an"
    " image or of the batch in Python, or allow more with --atol",
    "fp16": "use --precision fp32, or allow more with --max-drop or --atol",
    "bf16": "use --precision fp32, or allow more with --max-drop or --atol",
    "int8": "calibrate on more and more typical images, use bf16 or fp32, or allow more with --max-drop or"
    " --atol",
}
"""Precision of a bundle that differs from the reference by more than allowed -> what to do."""


@dataclass(frozen=True)
class SecondOpinion:
    """What another runtime makes of a bundle's graph: its format, its name and version, and its check."""

    format: str
    runtime: str
    golden: GoldenCheck


def ask_other_runtime(bundle: Bundle, atol: float | None) -> SecondOpinion | None:
    """The runtime that is within the allowed difference where the bundle's own is not.

    Args:
        bundle: staged; its own runtime differs from the reference.
        atol: allowed difference of the golden logits, ``None`` for that of the precision.

    Returns:
        ``None`` where no other runtime is installed, computes in the precision and agrees.
    """
    for form in SERVED_HERE - {bundle.manifest.format}:
        if bundle.manifest.precision not in FORMATS[form]:
            continue
        runtime = get_runtime(RUNTIME_OF_FORMAT[form])
        try:
            name = runtime.check()
            with Predictor.load(bundle, backend=RUNTIME_OF_FORMAT[form], cache=False) as other:
                golden = check_golden(bundle, other, atol)
        except CmtEdgeError:  # it is not installed, or cannot run the graph
            continue
        if golden.passed:
            return SecondOpinion(form, name, golden)
    return None


def require_passed(result: Verification, opinion: SecondOpinion | None = None) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.GateError` if a bundle differs by more than allowed.

    Where another runtime agrees with the reference (``opinion``), neither the graph nor calibration is at
    fault, and the remedy is another format.
    """
    if result.passed:
        return
    figures = "\n       ".join(report.describe_verification(result).splitlines())
    if opinion is None:
        raise GateError(
            "the exported model differs from the reference by more than allowed",
            why=figures,
            remedy=f"nothing was written; {PRECISION_REMEDIES[result.precision]}",
        )
    ours, other = result.golden, opinion.golden
    found, allowed = report.format_differences(ours.diff, other.atol)
    raise GateError(
        f"{result.runtime.runtime} alone differs from the reference by more than allowed",
        why=f"{figures}\n       the same graph on the golden images: {result.runtime.runtime} differs by"
        f" {found}, {opinion.runtime} by {other.diff:.3g} (allowed {allowed})",
        remedy=f"nothing was written; use --format {opinion.format}, or replace the operation that"
        f" {result.runtime.runtime} computes otherwise",
    )
