"""What an export produced, as text, and what to do next."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence

from cmt_edge.startup import name_program

from ..bundle import LOGITS, REPORT_PAGE, Bundle, Manifest
from ..bundle.sections import (
    TYPED_FORMATS,
    DecodingEntry,
    ObservedEntry,
    SlimEntry,
    SynthesisEntry,
    TypingEntry,
    VerificationEntry,
    WeightsEntry,
)
from .compiled import describe_compiled
from .tables import format_differences
from .verdict import describe_verdict
from .verification import describe_unit


def describe_bundle(bundle: Bundle, verify_flags: Sequence[str] = (), width: int | None = None) -> str:
    """What an export produced and what to do next.

    Args:
        bundle: of the export.
        verify_flags: what ``cmt-verify`` needs besides the bundle to compare it with the reference again.
        width: as :func:`.tables.format_table`.
    """
    manifest, path = bundle.manifest, bundle.path
    calibration = manifest.calibration
    lines = [describe_verdict(manifest.verdict, width=width), ""] if manifest.verdict else []
    if manifest.verification:
        kinds = {output.name: output.kind for output in manifest.outputs}
        lines += _describe_verified(manifest.verification, kinds.get(manifest.verification.golden.output))
    lines += [describe_decoding(manifest.decoding)] if manifest.decoding else []
    lines += _describe_typed(manifest.typing)
    lines += [describe_compiled(manifest.compiled)] if manifest.compiled else []
    notes = manifest.verification.notes if manifest.verification else ()
    lines += [f"warning: {note}" for note in notes]
    lines += _describe_latency(manifest, told=notes)
    lines.append(describe_weights(manifest.model.weights))
    if manifest.labels_source == "numbered":
        lines.append("note: the classes have no names; give them with --labels FILE")
    if calibration and calibration.cached:
        lines.append("note: calibration was taken from the cache (same graph, images and recipe)")
    lines += _describe_synthesis(calibration.synthesis if calibration else None)
    lines += [describe_slim(manifest.slim)] if manifest.slim else []
    lines += [
        f"bundle: {path} ({manifest.size_bytes / 1e6:.1f} MB)",
        *([f"report: {path / REPORT_PAGE} (open it in a browser)"] if REPORT_PAGE in manifest.files else []),
        "",
    ]
    return "\n".join([*lines, *_list_next_commands(bundle, verify_flags)])


def _describe_verified(verification: VerificationEntry, kind: str | None) -> list[str]:
    """The manifest's verification entry: steps, golden images, top-1; its notes stand elsewhere.

    ``kind`` is that of the output that differed most.
    """
    golden, data = verification.golden, verification.data
    found, allowed = format_differences(golden.diff, golden.atol)
    differences = verification.steps or {}
    steps = ", ".join(f"{name} {largest:.1e}" for name, largest in differences.items())
    lines = [
        f"steps, largest difference: {steps}",
        f"golden images: {golden.output} differ by {found} (allowed {allowed}{describe_unit(kind)})",
    ]
    if data is None:
        return [
            *lines,
            *(["top-1: not measured (no --eval-data)"] if golden.output == LOGITS else []),
        ]
    low, high = data.drop_ci
    return [
        *lines,
        f"top-1 on {data.images} images: reference {data.reference_top1:.2f} %, bundle"
        f" {data.top1:.2f} %, drop {data.drop:+.2f} points (95 % CI {low:+.2f} to {high:+.2f}),"
        f" agreement {data.agreement:.2f} %",
    ]


def describe_decoding(decoding: DecodingEntry) -> str:
    """What decoding JPEG images at a part of their size changes."""
    only_golden = decoding.reduced == 1 < decoding.images
    alone = " (only the golden photograph is large enough)" if only_golden else ""
    text = (
        f"decoded at a part of their size: {decoding.reduced} of {decoding.images} images{alone}; pixels"
        " differ by"
        f" {decoding.pixel_mean:.2f} grey levels on average (at most {decoding.pixel_max:.0f}), outputs by"
        f" {decoding.output_mean:.4f} standard deviations"
    )
    if decoding.agreement is not None:
        text += f", agreement {decoding.agreement:.2f} %"
    if decoding.drop is None or decoding.drop_ci is None:
        return text
    low, high = decoding.drop_ci
    return f"{text}, drop {decoding.drop:+.2f} points (95 % CI {low:+.2f} to {high:+.2f})"


def describe_slim(slim: SlimEntry) -> str:
    """What a slim bundle lacks."""
    missing = [f"{name} ({entry.size / 1e3:.1f} kB)" for name, entry in slim.files.items()]
    missing += [f"{slim.golden_images} golden images"] if slim.golden_images else []
    return f"left out of this slim bundle: {', '.join(missing) or 'nothing'}"


def _describe_typed(typing: TypingEntry | None) -> list[str]:
    """What a typed graph computes in, and why some of it stays float32."""
    if typing is None:
        return []
    most_first = sorted(typing.operations.items(), key=lambda item: -item[1])
    lines = [f"typed: {', '.join(f'{count} in {kind}' for kind, count in most_first)} (operations)"]
    kinds = Counter((island.op, island.reason) for island in typing.islands)
    lines += [f"float32: {count} {op}: {reason}" for (op, reason), count in kinds.items()]
    return lines + (_describe_observed(typing.observed) if typing.observed else [])


def _describe_observed(seen: ObservedEntry) -> list[str]:
    return [
        f"observed on {seen.images} images ({seen.source}): largest value {seen.largest:.4g},"
        " float16 holds 65504"
    ]


def describe_weights(weights: WeightsEntry) -> str:
    """Where the weights came from, and of a checkpoint which of its entries was taken."""
    text = f"weights: {weights.source}"
    if weights.entry:
        text += f", from {weights.entry}"
    return text + (" (averaged over training)" if weights.ema else "")


def _describe_latency(manifest: Manifest, told: Sequence[str]) -> list[str]:
    """The quick measurement; its warnings repeat those of the verification, which are ``told`` already."""
    latency = manifest.latency
    if latency is None and manifest.format not in TYPED_FORMATS:
        return ["latency: not measured, the bundle is for a GPU or an NPU"]
    if latency is None:
        return ["latency: not measured, the bundle has no engine of its device yet"]
    return [
        f"latency: median {latency.p50_ms:.2f} ms a batch of {latency.batch} "
        f"(a quick look; {name_program('bench')} measures properly)",
        f"ran as: {latency.executed.summary()}",
        *(f"warning: {warning}" for warning in latency.warnings if warning not in told),
    ]


def _describe_synthesis(made: SynthesisEntry | None) -> list[str]:
    """What making synthetic calibration images came to."""
    if made is None:
        return []
    lines = [
        f"synthetic images: distance of the batch norms' statistics {made.loss_before:.3f} ->"
        f" {made.loss_after:.3f} in {made.steps} steps"
    ]
    if made.stopped_early:
        lines.append(
            f"note: the time was up after {made.steps} of {made.steps_asked} steps; fewer images"
            " (--calib-size) get more of them, and --no-cache makes them anew"
        )
    return lines


def _list_next_commands(bundle: Bundle, verify_flags: Sequence[str]) -> list[str]:
    """What to do with a new bundle: commands that can be pasted as they stand, then those that need images of
    the user's own."""
    path = shlex.quote(str(bundle.path))
    if bundle.manifest.format in TYPED_FORMATS and not bundle.manifest.engine:
        name = shlex.quote(bundle.path.name)
        return [
            "next:",
            f"  {name_program('build')} {name}",
            f"(on the device, once {path} is copied to it)",
        ]
    if bundle.manifest.format == "openvino" and bundle.manifest.precision == "fp16":
        return [
            "next, where there is a GPU (or NPU):",
            f"  {name_program('verify')} {path} --device GPU",
            f"  {name_program('bench')} {path} --device GPU",
        ]
    flags = "".join(f" {shlex.quote(flag)}" for flag in verify_flags)
    lines = ["next:", f"  {name_program('bench')} {path}"]
    if bundle.head != LOGITS:
        return [*lines, f"  {name_program('verify')} {path}", describe_features_call(bundle)]
    if "--data" in verify_flags:
        return [
            *lines,
            f"  {name_program('verify')} {path}{flags}",
            "with your own images:",
            f"  {name_program('predict')} {path} IMAGE",
        ]
    return [
        *lines,
        f"  {name_program('verify')} {path}",
        "with your own images:",
        f"  {name_program('predict')} {path} IMAGE",
        f"  {name_program('verify')} {path} --data LABELLED_IMAGES{flags}",
    ]


def describe_features_call(bundle: Bundle) -> str:
    """How a program gets the feature maps, which no command prints."""
    return f"in Python: Predictor.load({str(bundle.path)!r}).features(batch)"
