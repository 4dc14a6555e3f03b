"""Which precision is exported: the one that was named, or for ``auto`` the fastest that passes on this
machine.

What is measured is :mod:`cmt_edge.export.auto.workbench`, how it is decided
:mod:`cmt_edge.export.auto.search`. Nothing here exports."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from cmt_edge.calib import CalibrationSet
from cmt_edge.deploy import report
from cmt_edge.deploy.bundle.sections import VerdictEntry
from cmt_edge.deploy.errors import GateError
from cmt_edge.deploy.measure.child import MeasuringProcess
from cmt_edge.deploy.measure.host import describe_host
from cmt_edge.deploy.measure.isa import ISAS, has_int8_hardware
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.scale.cluster import Cluster

from ..config import ExportConfig
from ..plan import Journal, Step, list_steps_to_choose
from ..preparation import Prepared
from .elsewhere import ClusterAnswers
from .questions import make_questions
from .search import Conditions, Verdict, search
from .workbench import SEARCH_PROTOCOL, Workbench


@dataclass(frozen=True)
class Decision:
    """What is exported: a config that names its precision, and for ``auto`` why; ``notes`` are readable."""

    config: ExportConfig
    verdict: VerdictEntry | None = None
    notes: tuple[str, ...] = ()


def choose(
    config: ExportConfig,
    prepared: Prepared,
    progress: Progress,
    cluster: Cluster | None = None,
) -> Decision:
    """The precision that was named; for ``auto``, measure the candidates and choose one, or compile them
    where nothing can be measured. Labelled images are answered on ``cluster`` if there is one; latencies are
    those of this machine.

    Raises:
        GateError: no candidate passes; the message holds the table of all.
        RuntimeMissingError: this CPU cannot be limited as it was asked.
    """
    if config.precision != "auto":
        return Decision(config)
    data, quantized = prepared.data, prepared.quantized
    assert data is not None and quantized is not None, "auto needs images"  # noqa: PT018
    if config.format == "rtx":
        return _choose_by_compiler(config, prepared, progress)
    with (
        Journal(list_steps_to_choose(config), progress) as journal,
        tempfile.TemporaryDirectory(prefix="cmt-edge-") as name,
        MeasuringProcess(config.isa, progress.share) as process,
    ):
        folder = Path(name)
        limit, spec = config.eval_limit, config.preprocess
        elsewhere = _open_elsewhere(config, prepared, progress, cluster)
        questions = make_questions(folder, data, prepared.evaluation, limit, spec, elsewhere is not None)
        workbench = Workbench(config, prepared, quantized, questions, process, folder, progress, elsewhere)
        found = search(
            workbench.variants(),
            {group: len(nodes) for group, nodes in workbench.groups.items()},
            _make_conditions(config, prepared.started),
            workbench,
            workbench.missing(),
            lambda phase: journal.take(Step[phase.name]),
        )
        verdict = _describe(found, config, data, workbench)
    if found.winner is None:
        raise _make_gate_error(verdict)
    chosen = config.named(found.winner.precision, found.winner.keep_float)
    return Decision(chosen, verdict)


def _open_elsewhere(
    config: ExportConfig,
    prepared: Prepared,
    progress: Progress,
    cluster: Cluster | None,
) -> ClusterAnswers | None:
    """What answers the labelled images on a cluster, if there are both."""
    if cluster is None or prepared.evaluation is None:
        return None
    return ClusterAnswers(cluster, config, prepared.evaluation.images, progress)


def _choose_by_compiler(
    config: ExportConfig,
    prepared: Prepared,
    progress: Progress,
) -> Decision:
    """fp16 or int8 by what the compiler makes of them: nothing can be measured here."""
    from .. import rtx

    graphs = {precision: prepared.graph_of(precision) for precision in ("fp16", "int8")}
    with (
        Journal(list_steps_to_choose(config), progress) as journal,
        journal.step(Step.COMPILE),
    ):
        precision, note = rtx.choose_by_compiler(
            config,
            graphs,
            prepared.reference.batch,
            progress,
        )
    return Decision(config.named(precision, ()), notes=(note,))


def _make_conditions(config: ExportConfig, started: float) -> Conditions:
    """When a candidate passes, and until when more is measured."""
    protocol = SEARCH_PROTOCOL
    measured_twice = 2 * (2 * protocol.seconds + protocol.warmup_seconds)  # the model alone, and end to end
    return Conditions(
        config.allowed_drop,
        config.latency_budget,
        None if config.time_budget is None else started + config.time_budget,
        latency_seconds=measured_twice + 1,
    )


def _make_gate_error(verdict: VerdictEntry) -> GateError:
    return GateError(
        "no precision passes",
        why="\n       ".join(report.describe_verdict(verdict).splitlines()),
        remedy="nothing was written; allow more with --max-drop or --latency-budget, calibrate on more and"
        " more typical images, or train with quantization in mind",
    )


def _describe(
    found: Verdict,
    config: ExportConfig,
    data: CalibrationSet,
    workbench: Workbench,
) -> VerdictEntry:
    """For the manifest, the report and ``--json``."""
    return VerdictEntry(
        labelled=found.labelled,
        max_drop=found.max_drop,
        latency_budget=found.latency_budget,
        candidates=found.candidates,
        sensitivity=found.sensitivity,
        winner=found.winner,
        tied=found.tied,
        notes=(*found.notes, *_write_notes(found, config.isa)),
        isa=config.isa,
        runtime=workbench.runtime,
        threads=config.threads,
        batch=config.batch,
        host=describe_host(),
        data=data.describe(),
        float_already=workbench.float_already(),
    )


def _write_notes(found: Verdict, isa: str | None) -> list[str]:
    """What a reader of the verdict must know."""
    notes = []
    if isa is not None:
        notes.append(
            f"measured with the runtime limited to {isa} (as {ISAS[isa].like}), on this machine's clock and"
            " memory: trust the order, not the milliseconds; the bundle itself is verified without the limit"
        )
    if not has_int8_hardware(isa):
        notes.append(
            "no instructions for int8 products (VNNI) here: int8 runs in several steps of older ones, or, as"
            " linears without AVX-512, in float32"
        )
    speeds = [candidate.speed for candidate in found.candidates if candidate.speed]
    if any("drifted" in warning for speed in speeds for warning in speed.warnings):
        notes.append(
            "the machine was not at rest while latencies were measured, so their intervals are wide: measure"
            " again with --no-cache"
        )
    if not found.labelled:
        notes.append(
            "without --eval-data a drop is disagreement with fp32 on the calibration images: no accuracy was"
            " measured"
        )
    return notes
