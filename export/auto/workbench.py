"""What the search measures with: builds candidates as bundles, and asks a measuring process for their answers
and latencies.

int8 is calibrated once; variants with more operations in float are made from that graph
(:mod:`cmt_edge.calib.restore`). Everything that was measured is kept by content, so an interrupted or
repeated run goes on where the last one stopped.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnx

from cmt_edge.calib import Quantized
from cmt_edge.calib.groups import COMMON_GROUPS, group_by_kind, group_nodes
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT
from cmt_edge.deploy.backends.variables import read_variables
from cmt_edge.deploy.bundle import BundleWriter, make_plain, read_record
from cmt_edge.deploy.bundle.sections import (
    AUTO_PRECISIONS,
    Count,
    OutputDifference,
    Share,
    Speed,
    Variant,
)
from cmt_edge.deploy.cache import JsonCache
from cmt_edge.deploy.files import find_cache_folder
from cmt_edge.deploy.measure.benchmark import Measured
from cmt_edge.deploy.measure.child import OWN_CHOICE, MeasuringProcess
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.progress import Progress

from .. import steps
from ..config import ExportConfig
from ..preparation import Prepared
from ..to_onnx import set_batch
from .elsewhere import ClusterAnswers
from .questions import Images, Questions
from .search import Answers

T = TypeVar("T")
"""What is measured: a dataclass."""
SEARCH_PROTOCOL = Protocol(iters=100, seconds=2.0, warmup_seconds=0.5)
"""How long each candidate is measured."""
OWN_CHOICE_WARNING = 0.05
"""Share of the time in kernels that heed no limit, from which on a warning says so."""
GROUP_TITLES: dict[str, str] = dict(
    zip(
        COMMON_GROUPS,
        ("attention products", "depthwise", "linears"),
        strict=True,
    )
)
"""Class of operations -> what a candidate's name calls it."""
KEPT_MEASUREMENTS = 10_000
"""Number of measurements that are kept; a search makes some dozens of a few kilobytes."""
HASH_LENGTH = 16
"""Hexadecimal digits of a graph's hash in the name of a candidate's folder."""


@dataclass(frozen=True)
class MeasuredAnswers:
    """What is kept of a variant's answers: the most probable class of each image, and the mean deviation of
    its logits."""

    top1: tuple[Count, ...]
    deviation: OutputDifference


@dataclass(frozen=True)
class MeasuredSpeeds:
    """What is kept of latencies that were measured in turn; ``kernels`` is the share of each variant's time
    by kernel, empty where no limit was asked for."""

    results: tuple[Measured, ...]
    kernels: tuple[dict[str, Share], ...]


class Workbench:
    """Measures the variants of one export (:class:`cmt_edge.export.auto.search.Measurement`).

    Attributes:
        runtime: name and version of what runs the candidates.
        groups: groups of operations that are int8 -> names of the operations.
    """

    def __init__(
        self,
        config: ExportConfig,
        prepared: Prepared,
        quantized: Quantized,
        questions: Questions,
        process: MeasuringProcess,
        folder: Path,
        progress: Progress,
        elsewhere: ClusterAnswers | None = None,
    ) -> None:
        """``elsewhere``: what answers the labelled images; ``process`` answers the others, and measures."""
        self._elsewhere = elsewhere
        self._config, self._prepared, self._questions = (
            config,
            prepared,
            questions,
        )
        self._process, self._folder, self._progress = (
            process,
            folder,
            progress,
        )
        self._measured = JsonCache(
            find_cache_folder() / "search" if config.uses_cache else None,
            KEPT_MEASUREMENTS,
        )
        self._backend = RUNTIME_OF_FORMAT[config.format]
        self.runtime = process.runtime(self._backend)
        self._int8_nodes = quantized.int8_nodes
        self._source = quantized.source
        self.groups = group_nodes(self._source, self._int8_nodes)
        self._bundles: dict[Variant, Path] = {}
        self._hashes: dict[Variant, str] = {}
        self._made: tuple[Variant, onnx.ModelProto] | None = None
        self._expected: np.ndarray | None = None

    # --- candidates ---

    def variants(self) -> list[Variant]:
        """fp32 first; int8 as a whole, and without the kinds of products that hybrids are sensitive in."""
        floats = [Variant(p, p) for p in AUTO_PRECISIONS[self._config.format] if p != "int8"]
        partly = [
            Variant(f"int8, {GROUP_TITLES[name]} float", "int8", (name,))
            for name, nodes in group_by_kind(self._source, self._int8_nodes).items()
            if nodes and set(nodes) != set(self._int8_nodes)
        ]
        return [*floats, Variant("int8", "int8"), *partly]

    def missing(self) -> dict[str, str]:
        """Names of the variants that this machine has no hardware for, and why."""
        reasons = {
            variant.name: self._process.missing(self._backend, variant.precision)
            for variant in self.variants()
        }
        return {name: f"no hardware: {why}" for name, why in reasons.items() if why}

    def float_already(self) -> tuple[str, ...]:
        """Groups of convs that are float in every int8 candidate."""
        graph = self._prepared.graph
        convs = {node.name for node in graph.graph.node if node.op_type == "Conv"}
        all_groups = set(group_nodes(graph, convs))
        return tuple(sorted(all_groups - set(self.groups)))

    # --- measurements ---

    def answers(self, variant: Variant, quick: bool) -> Answers:
        """What ``variant`` makes of all questions, or of the quick ones."""
        asked = self._questions
        images = asked.quick if quick else asked.judged
        truth = asked.quick_truth if quick else asked.truth

        def measure() -> MeasuredAnswers:
            with self._progress.step(f"answers of {variant.name}"):
                logits, probed = self._compute_logits(variant, images, asked.probes)
                deviation = self._compute_deviation(variant, probed)
            self._forget(variant, quick)
            return MeasuredAnswers(tuple(logits.argmax(1).tolist()), deviation)

        key = [
            "answers" if self._elsewhere is None else "answers of a cluster",
            self._hash_graph(variant),
            variant.precision,
            images.fingerprint,
            asked.probes.fingerprint,
            self._machine,
        ]
        result = self._keep_or_measure(key, MeasuredAnswers, measure)
        return Answers(np.array(result.top1), result.deviation, truth)

    def speeds(self, variants: Sequence[Variant]) -> Mapping[str, Speed]:
        """Latencies by the variant's name, measured interleaved."""
        threads = self._config.threads

        def measure() -> MeasuredSpeeds:
            paths = [self._make_bundle(v) for v in variants]
            with self._progress.step("latencies, interleaved"):
                result = self._process.benchmark(paths, SEARCH_PROTOCOL, threads)
                limited = self._config.isa is not None
                kernels = [self._process.kernels(path, threads) if limited else {} for path in paths]
            return MeasuredSpeeds(tuple(result.results), tuple(kernels))

        graphs = [[self._hash_graph(v), v.precision] for v in variants]
        key = [
            "latency",
            graphs,
            asdict(SEARCH_PROTOCOL),
            self._machine,
        ]
        result = self._keep_or_measure(key, MeasuredSpeeds, measure)
        pairs = zip(result.results, result.kernels, strict=True)
        measured = [self._compute_speed(*pair) for pair in pairs]
        return {variant.name: speed for variant, speed in zip(variants, measured, strict=True)}

    def _keep_or_measure(
        self,
        key: list[Any],
        kind: type[T],
        measure: Callable[[], T],
    ) -> T:
        """What an earlier run measured, or is measured now; ``kind`` is its dataclass."""
        kept: T = self._measured.get(
            key,
            make=measure,
            read=lambda content: read_record(kind, content, find_cache_folder(), "the measurement"),
            plain=make_plain,
        )
        return kept

    def _compute_speed(self, measured: Measured, kernels: dict[str, float]) -> Speed:
        self._process.check_limit(kernels)
        return Speed(
            measured.model.p50,
            measured.model.ci,
            measured.ratio,
            measured.ratio_ci,
            measured.size_bytes,
            measured.executed.summary(),
            (*measured.warnings, *self._write_limit_warnings(kernels)),
        )

    def _write_limit_warnings(self, kernels: dict[str, float]) -> list[str]:
        """A sentence where kernels took much of the time that heed no limit."""
        own = sum(share for name, share in kernels.items() if OWN_CHOICE in name)
        if own <= OWN_CHOICE_WARNING:
            return []
        return [
            f"{100 * own:.0f} % of its time is spent in kernels that choose their instructions themselves"
            f" ({OWN_CHOICE}), which the limit to {self._config.isa} may not reach: on such a CPU it may"
            " be slower than measured here"
        ]

    @cached_property
    def _machine(self) -> dict[str, Any]:
        """Everything besides graph and images that a measurement depends on."""
        host = describe_host()
        return {
            "runtime": self.runtime,
            "isa": self._config.isa,
            "threads": self._config.threads,
            "batch": self._config.batch,
            "preprocess": self._config.preprocess.to_json(),
            "versions": read_versions(),
            "cpu": host.cpu,
            "flags": host.flags,
            "cores": host.cores,
            "machine": host.machine,
            "environment": read_variables(),
        }

    def _compute_logits(self, variant: Variant, *asked: Images) -> list[np.ndarray]:
        """The logits of each of these sets of images; one that is given twice is answered once."""
        bundle = self._make_bundle(variant)
        found: dict[Images, np.ndarray] = {}
        here: list[Images] = []
        for images in dict.fromkeys(asked):
            if self._elsewhere is not None and images.records:
                key = f"{variant.precision}-{self._hash_graph(variant)}"
                found[images] = self._elsewhere.compute_logits(bundle, key, images.records)
            else:
                here.append(images)
        if here:
            paths = [images.path for images in here]
            answers = self._process.logits(bundle, paths, self._config.threads)
            found.update(zip(here, answers, strict=True))
        return [found[images] for images in asked]

    def _compute_deviation(self, variant: Variant, logits: np.ndarray) -> float:
        """Mean absolute difference from the float32 variant's logits on the probes, in their standard
        deviations."""
        if variant.precision == "fp32":
            self._expected = logits
        elif self._expected is None:
            in_fp32 = self.variants()[0]
            (self._expected,) = self._compute_logits(in_fp32, self._questions.probes)
        expected = self._expected
        difference = np.abs(logits - expected).mean()
        return float(difference / expected.std(axis=1).mean())

    # --- bundles ---

    def _make_graph(self, variant: Variant) -> onnx.ModelProto:
        """The graph of a variant; the last one is kept, because it is hashed before it is written."""
        if self._made is None or self._made[0] != variant:
            self._made = variant, self._prepared.graph_of(variant.precision, variant.keep_float)
        return self._made[1]

    def _hash_graph(self, variant: Variant) -> str:
        if variant not in self._hashes:
            graph = set_batch(self._make_graph(variant), self._config.batch)
            content = graph.SerializeToString(deterministic=True)
            self._hashes[variant] = hashlib.sha256(content).hexdigest()
        return self._hashes[variant]

    def _make_bundle(self, variant: Variant) -> Path:
        """A bundle of ``variant`` in the scratch folder, as the export would write it."""
        if variant not in self._bundles:
            self._bundles[variant] = self._write(variant)
            if self._config.isa and len(self._bundles) == 1:  # before the long work
                kernels = self._process.kernels(self._bundles[variant], self._config.threads)
                self._process.check_limit(kernels)
        return self._bundles[variant]

    def _write(self, variant: Variant) -> Path:
        config, prepared = self._config, self._prepared
        name = f"{variant.precision}-{self._hash_graph(variant)[:HASH_LENGTH]}"
        with BundleWriter(self._folder / name) as writer:
            runtime = steps.write_files(
                writer.folder,
                self._make_graph(variant),
                config.batch,
                prepared.reference.golden,
                config.format,
            )
            manifest = replace(
                prepared.manifest,
                precision=variant.precision,
                runtime=runtime,
            )
            return writer.commit(manifest).path

    def _forget(self, variant: Variant, quick: bool) -> None:
        """Free the disk of a variant that only the ranking needs."""
        if quick and variant.precision == "int8":
            shutil.rmtree(self._bundles.pop(variant), ignore_errors=True)
