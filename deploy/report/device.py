"""The device report of ``cmt-build`` as text, and what to do next."""

from __future__ import annotations

import shlex

from cmt_edge.startup import name_program

from ..bundle import LOGITS, Bundle
from ..measure.benchmark import Measured
from ..measure.device import DeviceState, DGpu
from ..measure.device_report import DeviceReport, DeviceStates, SustainedPower
from .bundle import describe_features_call
from .compiled import TITLES, describe_compiled
from .tables import LATENCY_COLUMNS, format_latency_cells, format_table


def describe_device_report(report: DeviceReport, markdown: bool = False) -> str:
    """The device report that ``cmt-build`` writes: engine, golden check, latency by both clocks, state of the
    device, power."""
    measured = report.benchmark.results[0]
    title = [f"# {report.bundle} on {report.key.gpu}", ""] if markdown else []
    lines = [
        *title,
        *_describe_engine(report),
        _describe_golden(report),
        *([describe_compiled(report.compiled)] if report.compiled else []),
        _describe_precision(report, measured),
        "",
        _format_latency_table(measured, markdown),
        *_compare_estimate(report, measured),
        "",
        *describe_power(report.power),
        *describe_state(report.state),
        *(f"warning: {warning}" for warning in (*measured.warnings, *report.warnings)),
    ]
    return "\n".join([*lines, ""] if markdown else lines)


def describe_build(bundle: Bundle, report: DeviceReport) -> str:
    """What ``cmt-build`` did and what to do next."""
    entry, size = bundle.manifest.engine, bundle.manifest.size_bytes
    place = bundle.path / entry.text if entry else "none"
    path = shlex.quote(str(bundle.path))
    predict = f"with your own images:\n  {name_program('predict')} {path} IMAGE"
    others = (
        f"build the other precisions too and compare them: {name_program('bench')} {path} OTHER_BUNDLE;"
        " int8 is not always faster than fp16 on a GPU"
    )
    lines = [
        describe_device_report(report),
        f"bundle: {bundle.path} ({size / 1e6:.1f} MB), report: {place}",
        "",
        "next:",
        f"  {name_program('bench')} {path}",
        predict if bundle.head == LOGITS else describe_features_call(bundle),
        f"({others})",
    ]
    return "\n".join(lines)


def _describe_engine(report: DeviceReport) -> list[str]:
    """The engine, what it was built with, and why an older one was not used."""
    key = report.key
    product = report.compiled.product if report.compiled else "tensorrt"
    compiler = f"{TITLES.get(product, product)} {key.tensorrt}"
    how = "reused" if report.reused else f"built in {report.built_s:.0f} s"
    return [
        f"engine: {how}, {report.engine_bytes / 1e6:.1f} MB; {compiler}, CUDA {key.cuda},"
        f" driver {key.driver}, {key.gpu} (sm {key.sm})",
        *(f"replaced: {reason}" for reason in report.replaces),
    ]


def _describe_golden(report: DeviceReport) -> str:
    golden = report.golden
    return (
        f"golden images: {golden.images}; {golden.output} differ by {golden.diff:.2g} (allowed"
        f" {golden.atol:.2g}): ok"
    )


def _describe_precision(report: DeviceReport, measured: Measured) -> str:
    executed = measured.executed
    return (
        f"layers at the asked precision or below: {100 * report.low_precision_share:.0f} %; ran as:"
        f" {executed.summary()}, {100 * executed.conversion_share:.0f} % of the time on conversions"
    )


def _compare_estimate(report: DeviceReport, measured: Measured) -> list[str]:
    """How far the estimate for this GPU is from what was measured, where there are both."""
    gpu = f" {report.key.gpu.partition(',')[0]}"
    estimates = report.compiled.estimates if report.compiled else ()
    found = [estimate for estimate in estimates if gpu.endswith(f" {estimate.gpu}")]
    if not found or measured.on_device is None:
        return []
    spent = measured.on_device.compute.p50
    return [
        "",
        f"the estimate from the data sheet was {found[0].total_ms:.2f} ms; measured were {spent:.2f} ms"
        f" (GPU, inference alone, p50), which is {spent / found[0].total_ms:.2f} times as much",
    ]


def _format_latency_table(measured: Measured, markdown: bool) -> str:
    """The numbers that are easily confused, side by side."""
    named = {
        "host, one call": measured.model,
        "host, image file to answer": measured.end_to_end,
    }
    if clock := measured.on_device:
        by_device = {
            "GPU, inference alone": clock.compute,
            "GPU, with copies": clock.with_copies,
            "host, starting it": clock.enqueue,
        }
        named = by_device | named
    rows = [[name, *format_latency_cells(latency)] for name, latency in named.items()]
    text = format_table(["milliseconds", *LATENCY_COLUMNS], rows, markdown)
    rate = measured.throughput
    return text + (f"\n\nthroughput: {rate:.0f} images/s; batch {measured.batch}" if rate else "")


def describe_power(power: SustainedPower) -> list[str]:
    """Power before, during and after some seconds of load, and notes."""
    notes = [f"note: {note}" for note in power.notes]
    if power.source is None:
        return ["power: not known here", *notes]
    named = {"before": power.before, "during": power.during, "after": power.after}
    phases = ", ".join(
        f"{phase} {mean.watts:.2f} W" for phase, mean in named.items() if mean.watts is not None
    )
    joules = power.joules_per_image
    energy = f"; {1e3 * joules:.2f} mJ an image, idle power included" if joules else ""
    return [f"power ({power.source}): {phases}{energy}", *notes]


def describe_state(state: DeviceStates) -> list[str]:
    """Module, clocks and temperatures before and after."""
    before, after = state.before, state.after
    known = _list_known_parts(before)
    return [
        *([f"device: {', '.join(known)}"] if known else []),
        *_describe_temperatures(before, after),
        *([_describe_gpu(after.dgpu)] if after.dgpu else []),
        *(f"note: {note}" for note in before.notes),
    ]


def _list_known_parts(state: DeviceState) -> list[str]:
    """What a Jetson tells of itself."""
    parts = [state.module] if state.module else []
    parts += [f"L4T {state.l4t}"] if state.l4t else []
    parts += [f"JetPack {state.jetpack}"] if state.jetpack else []
    parts += [f"power mode {state.power_mode.name}"] if state.power_mode else []
    locked = state.clocks.locked if state.clocks else None
    if locked is not None:
        parts.append("clocks locked" if locked else "clocks NOT locked (sudo jetson_clocks locks them)")
    return parts


def _describe_temperatures(before: DeviceState, after: DeviceState) -> list[str]:
    if not before.temperatures_c or not after.temperatures_c:
        return []
    first = max(before.temperatures_c.values())
    last = max(after.temperatures_c.values())
    return [f"hottest sensor: {first:.0f} °C before, {last:.0f} °C after"]


def _describe_gpu(gpu: DGpu) -> str:
    reasons = ", ".join(gpu.clock_reasons or ()) or "nothing"
    return f"GPU: {gpu.temperature_c} °C, {gpu.sm_mhz} of {gpu.sm_max_mhz} MHz, held back by {reasons}"
