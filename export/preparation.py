"""The first phase of an export: everything that does not depend on the precision that is chosen."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import onnx

from cmt_edge.calib import CalibrationSet, Quantized
from cmt_edge.calib.integer_layers import Ranges
from cmt_edge.calib.statistics import Statistics
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import Manifest
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.scale.cluster import Cluster

from . import steps
from .config import ExportConfig
from .description import describe_export
from .plan import Journal, Step, list_steps_to_prepare
from .steps import Differences, Evaluation, Reference


@dataclass(frozen=True)
class Prepared:
    """What the exports of one model share, whatever their precision.

    Attributes:
        started: when the work began, monotonic seconds.
        reference: the PyTorch side.
        manifest: as far as it is known.
        evaluation: labelled images, where some were given.
        data: images for calibration and for ranges, where some were given.
        graph: simplified float32 graph with a dynamic batch.
        differences: of the steps so far.
        quantized: the graph in int8 as a whole, where int8 may be chosen.
        ranges: of the results of its convs, where ONNX Runtime is to read it.
    """

    started: float
    reference: Reference
    manifest: Manifest
    evaluation: Evaluation | None
    data: CalibrationSet | None
    graph: onnx.ModelProto
    differences: Differences
    quantized: Quantized | None
    ranges: Ranges | None = None

    def graph_of(
        self,
        precision: str,
        kept_float: tuple[str, ...] = (),
    ) -> onnx.ModelProto:
        """The graph of one precision, see :func:`cmt_edge.export.steps.choose_graph`."""
        return steps.choose_graph(
            self.graph,
            self.quantized,
            precision,
            kept_float,
            self.ranges,
        )

    def source_of(self, precision: str) -> onnx.ModelProto:
        """The float32 graph that the graph of one precision was made from."""
        if precision == "int8" and self.quantized is not None:
            return self.quantized.source
        return self.graph


def prepare(config: ExportConfig, progress: Progress, cluster: Cluster | None = None) -> Prepared:
    """Load the reference, choose the images, make the graph, and calibrate it where int8 may be chosen, on
    ``cluster`` if there is one.

    Raises:
        InputError: weights, labels or images cannot be used.
        StepError: a step failed in a library.
        ParityError: a step changed the outputs by more than allowed.
    """
    started = time.monotonic()
    with Journal(list_steps_to_prepare(config), progress) as journal:
        with journal.step(Step.LOAD):
            reference = steps.make_reference(config)
            manifest = describe_export(config, reference)
        progress.tell(config.labels_note)
        evaluation = _match_evaluation(config, manifest, progress)
        data = _make_images(config, reference, journal, progress)
        if Step.DECODE in journal:
            with journal.step(Step.DECODE):
                found = steps.compare_decoding(config, reference, evaluation, data, progress.count)
                manifest = replace(manifest, decoding=found)
        graph, differences = _make_graph(config, reference, journal)
        quantized, ranges = None, None
        if data is not None and Step.CALIBRATE in journal:
            with journal.step(Step.CALIBRATE, images=len(data)):
                statistics = steps.make_statistics(cluster, config, data, progress)
                quantized = _calibrate_graph(config, graph, data, progress, statistics)
                if config.computes_by_pairs:
                    ranges = steps.measure_ranges(quantized, data, config.preprocess, statistics)
        return Prepared(
            started,
            reference,
            manifest,
            evaluation,
            data,
            graph,
            differences,
            quantized,
            ranges,
        )


def _match_evaluation(
    config: ExportConfig,
    manifest: Manifest,
    progress: Progress,
) -> Evaluation | None:
    """The labelled images that were given; before the long work, as only the user can correct a mismatch."""
    if not config.eval_data:
        return None
    bundle = Bundle(config.target, manifest)
    evaluation = steps.match_evaluation(config, bundle)
    progress.tell(evaluation.images.note)
    return evaluation


def _calibrate_graph(
    config: ExportConfig,
    graph: onnx.ModelProto,
    data: CalibrationSet,
    progress: Progress,
    statistics: Statistics | None,
) -> Quantized:
    """``graph`` in int8 as a whole."""
    return steps.calibrate_graph(
        graph,
        data,
        config.preprocess,
        config.recipe,
        config.uses_cache,
        progress.count,
        statistics,
    )


def _make_images(
    config: ExportConfig,
    reference: Reference,
    journal: Journal,
    progress: Progress,
) -> CalibrationSet | None:
    """The images that were asked for, made from the model where they are synthetic."""
    if Step.SYNTHESISE not in journal:
        data = steps.choose_images(config)
        progress.tell("" if data is None else data.note)
        return data
    count = steps.count_synthetic(config)
    with journal.step(Step.SYNTHESISE, images=count):
        return steps.make_images(
            config,
            reference.classifier,
            count,
            progress.count,
        )


def _make_graph(
    config: ExportConfig,
    reference: Reference,
    journal: Journal,
) -> tuple[onnx.ModelProto, Differences]:
    """The simplified float32 graph with a dynamic batch, and the differences of its steps."""
    with journal.step(Step.FUSE):
        fused, differences = steps.fuse_model(reference, config.head, config.rewriting_target)
    with journal.step(Step.TRACE):
        traced, found = steps.trace_model(fused, reference, config)
        differences |= found
    del fused  # each of these holds all weights
    with journal.step(Step.SIMPLIFY):
        graph = steps.simplify_graph(traced)
        del traced
        differences |= steps.compare_simplified(graph, reference)
        if config.batch == 0:
            differences |= steps.compare_batch_sizes(graph, reference)
    return graph, differences
