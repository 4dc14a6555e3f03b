"""An export from a checkpoint to a bundle: prepare, choose, finish.

Every step compares its result with the PyTorch reference before the next one starts; where one fails, nothing
is left behind. The steps themselves are in :mod:`cmt_edge.export.steps`, their order in
:mod:`cmt_edge.export.plan`."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from cmt_edge.calib import CalibrationSet
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, get_runtime
from cmt_edge.deploy.bundle import (
    REFERENCE,
    BundleWriter,
    Manifest,
    save_reference,
)
from cmt_edge.deploy.bundle.packed import locate_packed, require_replaceable
from cmt_edge.deploy.bundle.sections import TypingEntry, VerdictEntry
from cmt_edge.deploy.cache import can_keep
from cmt_edge.deploy.files import find_cache_folder, writing
from cmt_edge.deploy.measure.benchmark import summarise_latency
from cmt_edge.deploy.measure.isa import require_isa
from cmt_edge.deploy.measure.parity import Verification
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.signals import unwound_by_signals

from . import steps
from .auto.choose import choose
from .config import ExportConfig
from .description import (
    describe_calibration,
    describe_typing,
    write_report,
)
from .plan import Journal, Step, describe_plan, list_steps_to_finish
from .preparation import Prepared, prepare
from .steps import OBSERVED_IMAGES, Differences
from .to_onnx import without_compiler_folder


def run(config: ExportConfig, progress: Progress | None = None) -> Bundle:
    """Export, verify and measure; returns the finished bundle.

    Raises:
        InputError: something that was asked for or given cannot be used (exit code 2); also an error that is
            derived from it.
        RuntimeMissingError: a runtime or an instruction set is missing here (3).
        GateError: a step or the result differs from the reference by more than allowed, or no precision
            passes (1); nothing is written.
    """
    check_preconditions(config)
    if config.keeps_results:
        can_keep(find_cache_folder())  # says so before the long work
    progress = progress or Progress(quiet=True)
    with _claimed(Path(config.output)), without_compiler_folder():
        prepared = prepare(config, progress)
        decision = choose(config, prepared, progress)
        return finish(decision.config, prepared, decision.verdict, progress, decision.notes)


def make_plan(config: ExportConfig) -> dict[str, Any]:
    """What :func:`run` would do, once everything that can be checked has been; writes nothing.

    Raises as :func:`run`.
    """
    check_preconditions(config)
    _require_writable(Path(config.output))
    return describe_plan(config)


def _require_writable(output: Path) -> None:
    """Raise :class:`OutputError` where the folder could not be made or written to; makes nothing."""
    with writing(output):
        place = output.absolute()
        while not os.path.lexists(place):
            place = place.parent
        tempfile.TemporaryFile(dir=place).close()


def check_preconditions(config: ExportConfig) -> None:
    """Fail before the long work where something is missing, or where the result could not be verified or
    written here.

    Raises as :func:`run`.
    """
    config.check()
    steps.require_unit_scale(config.preprocess)
    for target in config.targets:
        BundleWriter(target).check()
        if config.pack:
            require_replaceable(locate_packed(target))
    if config.has_engine:
        from . import trt

        trt.check_builder(config)
        return
    runtime = get_runtime(RUNTIME_OF_FORMAT[config.format])
    runtime.check()
    if config.isa is not None:
        require_isa(config.isa)
    if config.precision != "auto" and not config.is_for_other_device:
        runtime.float_precision(config.precision)


@contextmanager
def _claimed(output: Path) -> Iterator[None]:
    """A folder that exists and can be written to; where the export fails, a new and empty one goes again.
    Meanwhile a request to end the process unwinds like Ctrl-C."""
    made = [folder for folder in (output, *output.parents) if not folder.exists()]
    with unwound_by_signals():
        try:
            with writing(output):
                output.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=output).close()
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # something is in it
                for folder in made:
                    folder.rmdir()
            raise


def finish(
    config: ExportConfig,
    prepared: Prepared,
    verdict: VerdictEntry | None,
    progress: Progress,
    notes: tuple[str, ...] = (),
) -> Bundle:
    """The bundle of one precision, verified and measured.

    Args:
        config: names the precision.
        prepared: of the same model.
        verdict: why ``auto`` chose the precision, where it did.
        progress: draws the steps.
        notes: of the choice, which a compiler's summary takes up.
    """
    with (
        Journal(list_steps_to_finish(config), progress) as journal,
        BundleWriter(config.target) as writer,
    ):
        graph, manifest = _make_chosen_graph(config, prepared, verdict)
        differences = prepared.differences
        if Step.TYPE in journal:
            graph, typing, found = _type_graph(config, graph, prepared, journal)
            manifest, differences = (
                replace(manifest, typing=typing),
                differences | found,
            )
        with journal.step(Step.FILES, format=config.format):
            manifest = _add_files(config, writer, manifest, graph, prepared)
        if Step.BUILD in journal:
            journal.take(Step.BUILD)
            manifest = _add_engine(config, writer, manifest, graph, prepared, notes, progress)
        with journal.step(Step.VERIFY):
            result = _verify(config, writer, manifest, prepared, progress)
            manifest = replace(manifest, verification=result.entry(differences))
        speed = None
        if Step.MEASURE in journal:
            with journal.step(Step.MEASURE):
                speed = steps.measure_bundle(writer.staged(manifest), config.threads, progress.share)
                manifest = replace(manifest, latency=summarise_latency(speed))
        with journal.step(Step.WRITE), writing(config.target):
            write_report(writer.folder, manifest, config.folder, result, speed)
            return _commit(config, writer, manifest)


def _add_files(
    config: ExportConfig,
    writer: BundleWriter,
    manifest: Manifest,
    graph: onnx.ModelProto,
    prepared: Prepared,
) -> Manifest:
    """The manifest with the runtime that reads the graph, which now lies in the bundle's folder."""
    with writing(config.target):
        runtime = steps.write_files(
            writer.folder,
            graph,
            config.batch,
            prepared.reference.golden,
            config.format,
        )
    return replace(manifest, runtime=runtime)


def _commit(config: ExportConfig, writer: BundleWriter, manifest: Manifest) -> Bundle:
    """The finished bundle at its place, and as one file beside it where that was asked for."""
    bundle = writer.commit(manifest, config.signing_key)
    if config.pack:
        bundle.pack(locate_packed(config.target))
    return bundle


def _make_chosen_graph(
    config: ExportConfig,
    prepared: Prepared,
    verdict: VerdictEntry | None,
) -> tuple[onnx.ModelProto, Manifest]:
    """The graph of the precision, and the manifest as far as it is known."""
    graph = prepared.graph_of(config.precision, config.kept_float)
    calibration = None
    if config.precision == "int8" and prepared.data is not None and prepared.quantized is not None:
        calibration = describe_calibration(config, prepared.data, prepared.quantized.cached)
    manifest = replace(
        prepared.manifest,
        precision=config.precision,
        calibration=calibration,
        verdict=verdict,
    )
    return graph, manifest


def _type_graph(
    config: ExportConfig,
    graph: onnx.ModelProto,
    prepared: Prepared,
    journal: Journal,
) -> tuple[onnx.ModelProto, TypingEntry, Differences]:
    """The graph with its precision written into it, and what is told of that."""
    from . import trt

    spec, images = config.preprocess, None
    observed: dict[str, float] = {}
    if Step.OBSERVE in journal:
        images = prepared.data or CalibrationSet.choose("generated", OBSERVED_IMAGES, spec, config.seed)
        with journal.step(Step.OBSERVE, images=min(len(images), OBSERVED_IMAGES)):
            observed = steps.observe_ranges(graph, images, prepared.reference, spec)
    with journal.step(Step.TYPE):
        result, differences = trt.write_precision(config, graph, observed, prepared.reference)
    return result.model, describe_typing(result, images), differences


def _add_engine(
    config: ExportConfig,
    writer: BundleWriter,
    manifest: Manifest,
    graph: onnx.ModelProto,
    prepared: Prepared,
    notes: tuple[str, ...],
    progress: Progress,
) -> Manifest:
    """The manifest with an engine in it, which lies beside the graph."""
    if config.format == "rtx":
        from . import rtx

        staged = writer.staged(manifest)
        manifest, files = rtx.add_portable_engine(config, staged, graph, progress, notes)
        if config.precision == "int8" and not notes:
            manifest = rtx.note_slower_int8(
                config, manifest, prepared.graph, prepared.reference.batch, progress
            )
    else:
        from . import trt

        manifest, files = trt.add_engine(config, writer.staged(manifest), progress)
    with writing(config.target):
        for name, content in files.items():
            path = writer.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    return manifest


def _verify(
    config: ExportConfig,
    writer: BundleWriter,
    manifest: Manifest,
    prepared: Prepared,
    progress: Progress,
) -> Verification:
    """The staged bundle compared with the reference, whose answers are kept in it."""
    bundle = writer.staged(manifest)
    candidate = None
    if config.format == "rtx" or (config.format == "trt" and not config.build):
        from . import trt

        candidate = trt.emulate(config, bundle)
    elif config.is_for_other_device:
        from . import other_device

        candidate = other_device.open_here(config, bundle)
    labelled = prepared.evaluation.images if prepared.evaluation else None
    result = steps.verify_bundle(
        config,
        bundle,
        prepared.reference,
        labelled,
        candidate,
        progress.count,
    )
    opinion = None
    if not result.golden.passed and config.format in steps.SERVED_HERE:
        opinion = steps.ask_other_runtime(bundle, config.atol)
    steps.require_passed(result, opinion)
    if result.data:
        with writing(config.target):
            save_reference(writer.folder / REFERENCE, result.reference_answers)
    return result
