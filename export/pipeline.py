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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from cmt_edge.calib import CalibrationSet
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, get_runtime
from cmt_edge.deploy.bundle import (
    REFERENCE,
    BundleWriter,
    Golden,
    Manifest,
    require_outside_bundles,
    save_reference,
)
from cmt_edge.deploy.bundle.packed import locate_packed, require_replaceable
from cmt_edge.deploy.bundle.sections import VerdictEntry
from cmt_edge.deploy.bundle.slim import choose_golden, leave_out
from cmt_edge.deploy.cache import can_keep
from cmt_edge.deploy.files import OUTPUT_FLAG, find_cache_folder, writing
from cmt_edge.deploy.measure.benchmark import summarise_latency
from cmt_edge.deploy.measure.isa import require_isa
from cmt_edge.deploy.measure.parity import Verification
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.scale.answers import FLAG
from cmt_edge.deploy.signals import unwound_by_signals

from . import steps
from .auto.choose import choose
from .blocks import name_blocks
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
from .unit_scale import require_unit_scale


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
    with (
        _claimed(Path(config.output)),
        without_compiler_folder(),
        steps.open_cluster(config) as cluster,
    ):
        prepared = prepare(config, progress, cluster)
        decision = choose(config, prepared, progress, cluster)
        return finish(
            decision.config,
            prepared,
            decision.verdict,
            progress,
            decision.notes,
        )


def make_plan(config: ExportConfig) -> dict[str, Any]:
    """What :func:`run` would do, once everything that can be checked has been; writes nothing.

    Raises as :func:`run`.
    """
    check_preconditions(config)
    _require_writable(Path(config.output), OUTPUT_FLAG)
    return describe_plan(config)


def _require_writable(output: Path, flag: str) -> None:
    """Raise :class:`OutputError` where the folder could not be made or written to; makes nothing. ``flag`` is
    what names another one."""
    with writing(output, flag):
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
    steps.check_cluster(config)
    if config.answers is not None:
        require_outside_bundles(Path(config.answers) / "answers")
        _require_writable(Path(config.answers), FLAG)
    require_unit_scale(config.preprocess)
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
            with writing(output, OUTPUT_FLAG):
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
        work = _Work(config, prepared, writer, journal, progress)
        draft = _make_chosen_graph(work, verdict)
        if Step.TYPE in journal:
            draft = _type_graph(work, draft)
        with journal.step(Step.FILES, format=config.format):
            draft = _add_files(work, draft)
        if Step.BUILD in journal:
            journal.take(Step.BUILD)
            draft = _add_engine(work, draft, notes)
        speed = None
        with contextlib.ExitStack() as opened:
            with journal.step(Step.VERIFY):
                predictor = opened.enter_context(_open(config, work.stage(draft)))
                result = _verify(work, draft.manifest, predictor)
                draft = draft.with_entries(verification=result.entry(draft.differences))
            if Step.MEASURE in journal:
                with journal.step(Step.MEASURE):
                    speed = steps.measure_bundle(
                        work.stage(draft), predictor, config.threads, draft.blocks, progress.share
                    )
                    draft = draft.with_entries(latency=summarise_latency(speed))
        with journal.step(Step.WRITE), writing(config.target, OUTPUT_FLAG):
            manifest = work.stage(draft).manifest  # with the hashes of its files
            write_report(writer.folder, manifest, config.folder, result, speed, draft.blocks)
            return _commit(work, draft)


@dataclass(frozen=True)
class _Draft:
    """A bundle as far as it is made: its graph, its manifest, and the differences of the steps so far."""

    graph: onnx.ModelProto
    manifest: Manifest
    differences: Differences

    @property
    def blocks(self) -> dict[str, str]:
        """Name of each operation of the graph -> its block of the model."""
        return name_blocks(self.graph)

    def with_entries(self, **entries: Any) -> _Draft:
        """The draft with other entries in its manifest."""
        return replace(self, manifest=replace(self.manifest, **entries))


@dataclass(frozen=True)
class _Work:
    """What every part of :func:`finish` reads: the same from its beginning to its end."""

    config: ExportConfig
    prepared: Prepared
    writer: BundleWriter
    journal: Journal
    progress: Progress

    @property
    def golden(self) -> Golden:
        """The golden vectors that the bundle holds."""
        golden = self.prepared.reference.golden
        return choose_golden(golden) if self.config.slim else golden

    def stage(self, draft: _Draft) -> Bundle:
        """The bundle as it lies beside its place."""
        return self.writer.staged(draft.manifest)


def _make_chosen_graph(work: _Work, verdict: VerdictEntry | None) -> _Draft:
    """The graph of the precision, and the manifest as far as it is known."""
    config, prepared = work.config, work.prepared
    calibration = None
    if config.precision == "int8" and prepared.data is not None and prepared.quantized is not None:
        calibration = describe_calibration(config, prepared.data, prepared.quantized.cached)
    manifest = replace(
        prepared.manifest,
        precision=config.precision,
        calibration=calibration,
        verdict=verdict,
    )
    graph = prepared.graph_of(config.precision, config.kept_float)
    return _Draft(graph, manifest, prepared.differences)


def _type_graph(work: _Work, draft: _Draft) -> _Draft:
    """The graph with its precision written into it, and what is told of that."""
    from . import trt

    images, observed = None, {}
    if Step.OBSERVE in work.journal:
        images = work.prepared.data or _choose_observed_images(work.config)
        observed = _observe_ranges(work, draft.graph, images)
    with work.journal.step(Step.TYPE):
        result, found = trt.write_precision(
            work.config,
            draft.graph,
            observed,
            work.prepared.reference,
        )
    manifest = replace(draft.manifest, typing=describe_typing(result, images))
    return _Draft(result.model, manifest, draft.differences | found)


def _choose_observed_images(config: ExportConfig) -> CalibrationSet:
    """Generated images for the ranges, where none were given."""
    return CalibrationSet.choose(
        "generated",
        OBSERVED_IMAGES,
        config.preprocess,
        config.seed,
    )


def _observe_ranges(
    work: _Work,
    graph: onnx.ModelProto,
    images: CalibrationSet,
) -> dict[str, float]:
    """Largest absolute value of every tensor."""
    count = min(len(images), OBSERVED_IMAGES)
    with work.journal.step(Step.OBSERVE, images=count):
        return steps.observe_ranges(
            graph,
            images,
            work.prepared.reference,
            work.config.preprocess,
        )


def _add_files(work: _Work, draft: _Draft) -> _Draft:
    """The draft with the runtime that reads the graph, which now lies in the bundle's folder, and with the
    places of the model's blocks in it."""
    config, prepared = work.config, work.prepared
    source = prepared.source_of(config.precision)
    blocks = steps.find_blocks(source, draft.graph, prepared.reference)
    with writing(config.target, OUTPUT_FLAG):
        runtime = steps.write_files(
            work.writer.folder,
            draft.graph,
            config.batch,
            work.golden,
            config.format,
        )
    return draft.with_entries(runtime=runtime, blocks=blocks)


def _add_engine(work: _Work, draft: _Draft, notes: tuple[str, ...]) -> _Draft:
    """The draft with an engine, which lies beside the graph."""
    build = _build_rtx_engine if work.config.format == "rtx" else _build_trt_engine
    manifest, files = build(work, draft, notes)
    with writing(work.config.target, OUTPUT_FLAG):
        for name, content in files.items():
            path = work.writer.folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    return replace(draft, manifest=manifest)


def _build_rtx_engine(
    work: _Work,
    draft: _Draft,
    notes: tuple[str, ...],
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest with a portable engine, and the engine's files by name."""
    from . import rtx

    config, prepared, progress = work.config, work.prepared, work.progress
    manifest, files = rtx.add_portable_engine(
        config,
        work.stage(draft),
        draft.graph,
        progress,
        notes,
    )
    if config.precision == "int8" and not notes:
        batch = prepared.reference.batch
        manifest = rtx.note_slower_int8(
            config,
            manifest,
            prepared.graph,
            batch,
            progress,
        )
    return manifest, files


def _build_trt_engine(
    work: _Work,
    draft: _Draft,
    _notes: tuple[str, ...],
) -> tuple[Manifest, dict[str, bytes]]:
    """The manifest with this machine's engine, and the engine's files by name."""
    from . import trt

    return trt.add_engine(work.config, work.stage(draft), work.progress)


def _commit(work: _Work, draft: _Draft) -> Bundle:
    """The finished bundle at its place, and as one file beside it where that was asked for."""
    config, manifest = work.config, draft.manifest
    if config.slim:
        made = len(work.prepared.reference.golden.sources)
        manifest = leave_out(work.stage(draft), made - len(work.golden.sources))
    bundle = work.writer.commit(manifest, config.signing_key)
    if config.pack:
        bundle.pack(locate_packed(config.target))
    return bundle


def _open(config: ExportConfig, bundle: Bundle) -> Predictor:
    """What is compared with the reference: the staged bundle in its own runtime, or a stand-in where that is
    not here."""
    if config.format == "rtx" or (config.format == "trt" and not config.build):
        from . import trt

        return trt.emulate(config, bundle)
    if config.is_for_other_device:
        from . import other_device

        return other_device.open_here(config, bundle)
    return Predictor.load(bundle, device=config.device, threads=config.threads, cache=False)


def _verify(work: _Work, manifest: Manifest, predictor: Predictor) -> Verification:
    """The staged bundle, opened, compared with the reference, whose answers are kept in it."""
    config, prepared = work.config, work.prepared
    bundle = work.writer.staged(manifest)
    result = steps.verify_bundle(
        config,
        bundle,
        prepared.reference,
        prepared.evaluation.images if prepared.evaluation else None,
        predictor,
        work.progress.count,
        prepared.data.digests if prepared.data and manifest.calibration else (),
    )
    steps.require_passed(result, _ask_other_runtime(config, bundle, result))
    if result.data:
        with writing(config.target, OUTPUT_FLAG):
            save_reference(work.writer.folder / REFERENCE, result.reference_answers)
    return result


def _ask_other_runtime(
    config: ExportConfig,
    bundle: Bundle,
    result: Verification,
) -> steps.SecondOpinion | None:
    """What another runtime makes of a bundle that differs in its own."""
    if result.golden.passed or config.format not in steps.SERVED_HERE:
        return None
    return steps.ask_other_runtime(bundle, config.atol)
