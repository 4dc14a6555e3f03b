"""Results as text: terminal tables and Markdown."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..bundle import LOGITS, Bundle
from ..bundle.sections import (
    Accuracy,
    Candidate,
    ExecutedPrecision,
    LatencyEntry,
    ObservedEntry,
    Speed,
    SynthesisEntry,
    TypingEntry,
    VerdictEntry,
    VerificationEntry,
    WeightsEntry,
)
from ..measure.benchmark import Benchmark, Protocol
from ..measure.parity import Verification
from ..measure.statistics import Latency
from ..predictor import Prediction


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    markdown: bool = False,
) -> str:
    """Aligned columns; the first is left-aligned, the others right-aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    dashes = line(rule) if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(header), dashes, *map(line, rows)])


def _ms(latency: Latency) -> list[str]:
    p99 = "-" if latency.p99 is None else f"{latency.p99:.2f}"
    return [
        f"{latency.p50:.2f}",
        f"{latency.p90:.2f}",
        f"{latency.p95:.2f}",
        p99,
        f"{latency.max:.2f}",
    ]


def how_measured(protocol: Protocol) -> str:
    """What the line under a table of latencies says of the order and number of calls."""
    return (
        f"interleaved, at least {protocol.iters} iterations and {protocol.seconds:g} s each after warm-up,"
        f" turns after {1e3 * protocol.settle_seconds:g} ms uncounted"
    )


def benchmark_text(result: Benchmark, markdown: bool = False) -> str:
    """Latency table, what really ran, the machine, and warnings."""
    rows = []
    for r in result.results:
        interval = f"{r.ratio_ci[0]:.2f}-{r.ratio_ci[1]:.2f}"
        rate = "-" if r.throughput is None else f"{r.throughput:.0f}"
        rows.append(
            [
                r.name,
                f"{r.size_bytes / 1e6:.1f}",
                *_ms(r.model),
                f"{r.end_to_end.p50:.2f}",
                rate,
                f"{r.ratio:.2f} ({interval})",
            ]
        )
    header = [
        "bundle",
        "MB",
        "p50 ms",
        "p90",
        "p95",
        "p99",
        "max",
        "end-to-end p50",
        "images/s",
        "speed-up (95 % CI)",
    ]
    executed = [
        [
            r.name,
            r.precision,
            r.executed.summary(),
            f"{100 * r.executed.conversion_share:.0f} %",
            r.runtime.runtime,
        ]
        for r in result.results
    ]
    host = result.host
    flags = ", ".join(host.flags) or "none of note"
    protocol = result.protocol
    parts = [
        table(header, rows, markdown),
        table(
            [
                "bundle",
                "asked",
                "what really ran (share of time)",
                "conversions",
                "runtime",
            ],
            executed,
            markdown,
        ),
        (
            f"{host.cpu}, {host.cores} cores ({flags}); threads: {result.threads or 'all'}; batch"
            f" {result.results[0].batch}; {how_measured(protocol)}."
        ),
        *_fastest(result),
        *(f"warning: {r.name}: {w}" for r in result.results for w in r.warnings),
    ]
    return "\n\n".join(parts)


def _fastest(result: Benchmark) -> list[str]:
    """Which of several to take, if the others' intervals leave no doubt."""
    if len(result.results) < 2:
        return []
    if len({r.batch for r in result.results}) > 1:
        return []  # ratios are of calls
    best, second = sorted(result.results, key=lambda r: -r.ratio)[:2]
    close = second.ratio_ci[1] >= best.ratio_ci[0]
    return [f"fastest: {best.name}" + (f" (no clear difference from {second.name})" if close else "")]


def verification_text(v: Verification, markdown: bool = False) -> str:
    """Golden check, top-1 table and verdict."""
    g = v.golden
    lines = [
        f"golden images: {g.images}; pixels differ by at most {g.pixel_diff} grey levels; {g.output} by"
        f" {g.diff:.2g} (allowed {g.atol:.2g}): {'ok' if g.passed else 'FAILED'}"
    ]
    if v.data:
        d = v.data
        header = [
            "images",
            "reference top-1 %",
            "bundle top-1 %",
            "drop (95 % CI)",
            "agreement %",
            "max logit diff",
            "mean",
        ]
        values = [
            f"{d.reference_top1:.2f}",
            f"{d.top1:.2f}",
            f"{d.drop:+.2f} ({d.drop_ci[0]:+.2f} to {d.drop_ci[1]:+.2f})",
            f"{d.agreement:.2f}",
        ]
        diffs = ["-" if x is None else f"{x:.3g}" for x in (d.logit_max_diff, d.logit_mean_diff)]
        lines.append(table(header, [[str(d.images), *values, *diffs]], markdown))
        lines.append(
            f"reference: {d.reference_source}; allowed drop {d.max_drop:g} points:"
            f" {'ok' if d.passed else 'FAILED'}"
        )
    lines += [f"warning: {note}" for note in v.notes]
    lines.append(f"{v.bundle} on {v.runtime.runtime}: {_conclusion(v)}")
    return "\n".join(lines)


def _conclusion(v: Verification) -> str:
    """What was verified: accuracy is only where the images can show it."""
    if not v.passed:
        return "NOT verified"
    if v.data is None or not v.data.doubt:
        return "verified"
    return f"golden images verified; {v.data.images} images are too few to judge the accuracy"


def verdict_text(verdict: VerdictEntry, markdown: bool = False) -> str:
    """What ``--precision auto`` measured and recommends: candidates, sensitivity of the groups, notes, the
    winner."""
    parts = [_candidate_table(verdict, markdown)]
    if verdict.sensitivity:
        parts += _sensitivity_table(verdict, markdown)
    if verdict.float_already:
        parts.append(f"float in every int8 candidate (depthwise): {', '.join(verdict.float_already)}")
    parts.append(_conditions(verdict))
    parts += [f"note: {c.variant.name}: {c.why_not}" for c in verdict.candidates if ":" in c.why_not]
    parts += [f"note: {note}" for note in verdict.notes]
    parts += [
        f"warning: {c.variant.name}: {warning}"
        for c in verdict.candidates
        if c.accuracy and c.speed
        for warning in c.speed.warnings
    ]
    return "\n\n".join([*parts, _recommendation(verdict)])


def _candidate_table(verdict: VerdictEntry, markdown: bool) -> str:
    labelled = verdict.labelled
    rows = [_candidate_row(c, labelled, c.variant == verdict.winner) for c in verdict.candidates]
    header = [
        "candidate",
        *(["top-1 %"] if labelled else []),
        "drop (95 % CI)" if labelled else "disagreement (95 % CI)",
        "agreement %",
        "p50 ms",
        "speed-up (95 % CI)",
        "MB",
        "verdict",
    ]
    return table(header, rows, markdown)


def _candidate_row(candidate: Candidate, labelled: bool, best: bool) -> list[str]:
    accuracy, speed = candidate.accuracy, candidate.speed
    top1 = f"{accuracy.top1:.2f}" if accuracy and accuracy.top1 is not None else "-"
    return [
        candidate.variant.name,
        *([top1] if labelled else []),
        *(_drop(accuracy) if accuracy else ["-", "-"]),
        *(_speed(speed) if speed else ["-", "-", "-"]),
        "best" if best else candidate.why_not.partition(":")[0] or "passes",
    ]


def _drop(accuracy: Accuracy) -> list[str]:
    low, high = accuracy.drop_ci
    return [
        f"{accuracy.drop:+.2f} ({low:+.2f} to {high:+.2f})",
        f"{accuracy.agreement:.2f}",
    ]


def _speed(speed: Speed) -> list[str]:
    low, high = speed.ratio_ci
    return [
        f"{speed.p50:.2f}",
        f"{speed.ratio:.2f} ({low:.2f}-{high:.2f})",
        f"{speed.size_bytes / 1e6:.1f}",
    ]


def _sensitivity_table(verdict: VerdictEntry, markdown: bool) -> list[str]:
    """The groups of operations and what the table means."""
    rows = [
        [
            s.group,
            str(s.nodes),
            f"{s.accuracy.deviation:.4f}",
            *_drop(s.accuracy),
        ]
        for s in verdict.sensitivity
    ]
    header = [
        "group",
        "operations",
        "logit deviation",
        "drop (95 % CI)",
        "agreement %",
    ]
    meaning = (
        "sensitivity: each group alone in int8, the worst first; logits in standard deviations of fp32's"
    )
    return [meaning, table(header, rows, markdown)]


def _conditions(verdict: VerdictEntry) -> str:
    """On what, where and within which limits the candidates were measured."""
    images = next((c.accuracy.images for c in verdict.candidates if c.accuracy), 0)
    what = "labelled images" if verdict.labelled else "calibration images"
    budget = f", {verdict.latency_budget:g} ms" if verdict.latency_budget else ""
    limit = f", limited to {verdict.isa}" if verdict.isa else ""
    return (
        f"{images} {what}; allowed: drop {verdict.max_drop:g} points{budget};"
        f" {verdict.runtime}, {verdict.host.cpu}{limit}; threads: {verdict.threads or 'all'};"
        " latencies interleaved"
    )


def _recommendation(verdict: VerdictEntry) -> str:
    best = next(
        (c for c in verdict.candidates if c.variant == verdict.winner),
        None,
    )
    if best is None or best.accuracy is None or best.speed is None:
        return "recommended: none of these passes"
    base, (low, high) = (
        verdict.candidates[0].variant.name,
        best.accuracy.drop_ci,
    )
    lines = [
        f"recommended: {best.variant.name}{_compared(best, best.speed, base)},"
        f" drop {best.accuracy.drop:+.2f} points (95 % CI {low:+.2f} to {high:+.2f})"
    ]
    if best.variant.keep_float:
        groups = ",".join(best.variant.keep_float)
        lines.append(f"the same by name: --precision int8 --keep-float {groups}")
    if high > verdict.max_drop:
        lines.append(
            f"the drop's interval reaches beyond the allowed {verdict.max_drop:g} points: more images"
            " would tell"
        )
    if verdict.tied:
        lines.append(
            f"no clear difference in speed: {'; '.join(verdict.tied)}; of these the one closest to {base}"
            " was taken"
        )
    return "\n".join(lines)


def _compared(best: Candidate, speed: Speed, base: str) -> str:
    """How fast the recommended candidate is, unless it is the reference itself."""
    if best.variant.name == base:
        return ""
    low, high = speed.ratio_ci
    return f", {speed.ratio:.2f} times as fast as {base} (95 % CI {low:.2f} to {high:.2f})"


def _synthesis_lines(made: SynthesisEntry | None) -> list[str]:
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


def bundle_text(bundle: Bundle, verify_flags: Sequence[str] = ()) -> str:
    """What an export produced and what to do next.

    Args:
        bundle: of the export.
        verify_flags: what ``cmt-verify`` needs besides the bundle to compare it with the reference again.
    """
    manifest, path = bundle.manifest, bundle.path
    calibration = manifest.calibration
    lines = [verdict_text(manifest.verdict), ""] if manifest.verdict else []
    lines += _verified_lines(manifest.verification) if manifest.verification else []
    lines += _typed_lines(manifest.typing)
    lines += _latency_lines(manifest.latency)
    lines.append(weights_text(manifest.model.weights))
    if manifest.labels_source == "numbered":
        lines.append("note: the classes have no names; give them with --labels FILE")
    if calibration and calibration.cached:
        lines.append("note: calibration was taken from the cache (same graph, images and recipe)")
    lines += _synthesis_lines(calibration.synthesis if calibration else None)
    lines += [
        f"bundle: {path} ({manifest.size_bytes / 1e6:.1f} MB)",
        "",
    ]
    return "\n".join([*lines, *_next_commands(bundle, verify_flags)])


def weights_text(weights: WeightsEntry) -> str:
    """Where the weights came from, and of a checkpoint which of its entries was taken."""
    text = f"weights: {weights.source}"
    if weights.entry:
        text += f", from {weights.entry}"
    return text + (" (averaged over training)" if weights.ema else "")


def _latency_lines(latency: LatencyEntry | None) -> list[str]:
    if latency is None:
        return ["latency: not measured, the bundle has no engine yet"]
    return [
        f"latency: median {latency.p50_ms:.2f} ms a batch of {latency.batch} "
        "(a quick look; cmt-bench measures properly)",
        f"ran as: {latency.executed.summary()}",
        *(f"warning: {warning}" for warning in latency.warnings),
    ]


def _next_commands(bundle: Bundle, verify_flags: Sequence[str]) -> list[str]:
    """What to do with a new bundle: commands that can be pasted as they stand, then those that need images of
    the user's own."""
    path = shlex.quote(str(bundle.path))
    if bundle.manifest.format == "trt" and not bundle.manifest.engine:
        name = shlex.quote(bundle.path.name)
        return [
            "next:",
            f"  cmt-build {name}",
            f"(on the device, once {path} is copied to it)",
        ]
    flags = "".join(f" {shlex.quote(flag)}" for flag in verify_flags)
    lines = ["next:", f"  cmt-bench {path}"]
    if bundle.head != LOGITS:
        use = f"Predictor.load({str(bundle.path)!r}).features(batch)"
        return [*lines, f"  cmt-verify {path}", f"in Python: {use}"]
    if "--data" in verify_flags:
        return [
            *lines,
            f"  cmt-verify {path}{flags}",
            "with your own images:",
            f"  cmt-predict {path} IMAGE",
        ]
    return [
        *lines,
        f"  cmt-verify {path}",
        "with your own images:",
        f"  cmt-predict {path} IMAGE",
        f"  cmt-verify {path} --data LABELLED_IMAGES{flags}",
    ]


def _typed_lines(typing: TypingEntry | None) -> list[str]:
    """What a typed graph computes in, and why some of it stays float32."""
    if typing is None:
        return []
    most_first = sorted(typing.operations.items(), key=lambda item: -item[1])
    lines = [f"typed: {', '.join(f'{count} in {kind}' for kind, count in most_first)} (operations)"]
    kinds = Counter((island.op, island.reason) for island in typing.islands)
    lines += [f"float32: {count} {op}: {reason}" for (op, reason), count in kinds.items()]
    return lines + (_observed_lines(typing.observed) if typing.observed else [])


def _observed_lines(seen: ObservedEntry) -> list[str]:
    return [
        f"observed on {seen.images} images ({seen.source}): largest value {seen.largest:.4g},"
        " float16 holds 65504"
    ]


def device_text(content: dict[str, Any], markdown: bool = False) -> str:
    """The device report that ``cmt-build`` writes: engine, golden check, latency by both clocks, state of the
    device, power."""
    key, golden = content["key"], content["golden"]
    measured = content["benchmark"]["results"][0]
    how = "reused" if content["reused"] else f"built in {content['built_s']:.0f} s"
    lines = [f"# {content['bundle']} on {key['gpu']}", ""] if markdown else []
    lines += [
        f"engine: {how}, {content['engine_bytes'] / 1e6:.1f} MB; TensorRT {key['tensorrt']}, CUDA"
        f" {key['cuda']}, driver {key['driver']}, {key['gpu']} (sm {key['sm']})"
    ]
    lines += [f"replaced: {reason}" for reason in content["replaces"]]
    lines += [
        (
            f"golden images: {golden['images']}; {golden['output']} differ by {golden['diff']:.2g} (allowed"
            f" {golden['atol']:.2g}): ok"
        ),
        (
            f"layers at the asked precision or below: {100 * content['low_precision_share']:.0f} %; "
            f"ran as: {ExecutedPrecision(**measured['executed']).summary()}, "
            f"{100 * measured['executed']['conversion_share']:.0f} % of the time on conversions"
        ),
        "",
    ]
    lines += [_device_latency(measured, markdown), ""]
    lines += _power_lines(content["power"])
    lines += _state_lines(content["state"])
    lines += [f"warning: {w}" for w in [*measured["warnings"], *content["warnings"]]]
    return "\n".join([*lines, ""] if markdown else lines)


def built_text(bundle: Bundle, content: dict[str, Any]) -> str:
    """What ``cmt-build`` did and what to do next."""
    entry, size = (
        bundle.manifest.engine,
        bundle.manifest.size_bytes / 1e6,
    )
    report = bundle.path / entry.text if entry else "none"
    lines = [
        device_text(content),
        f"bundle: {bundle.path} ({size:.1f} MB), report: {report}",
    ]
    path = shlex.quote(str(bundle.path))
    others = (
        f"build the other precisions too and compare them: cmt-bench {path} OTHER_BUNDLE; int8 is not always"
        " faster than fp16 on a GPU"
    )
    use = (
        f"with your own images:\n  cmt-predict {path} IMAGE"
        if bundle.head == LOGITS
        else f"in Python: Predictor.load({str(bundle.path)!r}).features(batch)"
    )
    return "\n".join([*lines, "", "next:", f"  cmt-bench {path}", use, f"({others})"])


def _device_latency(measured: dict[str, Any], markdown: bool) -> str:
    """The numbers that are easily confused, side by side."""
    clock = measured["on_device"]
    named = {
        "GPU, inference alone": clock and clock["compute"],
        "GPU, with copies": clock and clock["with_copies"],
        "host, starting it": clock and clock["enqueue"],
        "host, one call": measured["model"],
        "host, image file to answer": measured["end_to_end"],
    }
    rows = [[name, *_ms(Latency(**latency))] for name, latency in named.items() if latency]
    text = table(
        ["milliseconds", "p50", "p90", "p95", "p99", "max"],
        rows,
        markdown,
    )
    rate = measured["throughput"]
    return text + (f"\n\nthroughput: {rate:.0f} images/s; batch {measured['batch']}" if rate else "")


def _power_lines(power: dict[str, Any]) -> list[str]:
    if power["source"] is None:
        return [
            "power: not known here",
            *(f"note: {n}" for n in power["notes"]),
        ]
    phases = ", ".join(
        f"{phase} {power[phase]['watts']:.2f} W"
        for phase in ("before", "during", "after")
        if power[phase]["watts"] is not None
    )
    joules = power["joules_per_image"]
    energy = f"; {1e3 * joules:.2f} mJ an image, idle power included" if joules else ""
    return [
        f"power ({power['source']}): {phases}{energy}",
        *(f"note: {n}" for n in power["notes"]),
    ]


def _state_lines(state: dict[str, Any]) -> list[str]:
    """Module, clocks and temperatures before and after."""
    before, after = state["before"], state["after"]
    known = [before[k] for k in ("module",) if before[k]]
    known += [f"L4T {before['l4t']}"] if before["l4t"] else []
    known += [f"JetPack {before['jetpack']}"] if before["jetpack"] else []
    known += [f"power mode {before['power_mode']['name']}"] if before["power_mode"] else []
    if before["clocks"] and before["clocks"]["locked"] is not None:
        known.append(
            "clocks locked"
            if before["clocks"]["locked"]
            else "clocks NOT locked (sudo jetson_clocks locks them)"
        )
    lines = [f"device: {', '.join(known)}"] if known else []
    hottest = [max(s["temperatures_c"].values(), default=None) for s in (before, after)]
    lines += (
        [f"hottest sensor: {hottest[0]:.0f} °C before, {hottest[1]:.0f} °C after"]
        if None not in hottest
        else []
    )
    gpu = after["dgpu"]
    if gpu:
        reasons = ", ".join(gpu["clock_reasons"] or []) or "nothing"
        lines.append(
            f"GPU: {gpu['temperature_c']} °C, {gpu['sm_mhz']} of {gpu['sm_max_mhz']} MHz, held back by"
            f" {reasons}"
        )
    return lines + [f"note: {n}" for n in before["notes"]]


def _verified_lines(verification: VerificationEntry) -> list[str]:
    """The manifest's verification entry: steps, golden images, top-1."""
    golden, data = verification.golden, verification.data
    steps = ", ".join(f"{name} {largest:.1e}" for name, largest in (verification.steps or {}).items())
    lines = [
        f"steps, largest difference: {steps}",
        f"golden images: {golden.output} differ by {golden.diff:.2g} (allowed {golden.atol:.2g})",
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
        *(f"warning: {note}" for note in verification.notes),
    ]


def prediction_text(prediction: Prediction, topk: int, width: int = 0) -> str:
    """One line: the image's name, padded to ``width``, then the most probable classes."""
    best = (f"{label} {100 * probability:.1f} %" for label, probability in prediction.top(topk))
    return f"{(prediction.source or '').ljust(width)}  {', '.join(best)}"
