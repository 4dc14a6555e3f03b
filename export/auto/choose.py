"""``precision="auto"``: build the candidates, measure accuracy and latency on this machine, export the
winner.

The search itself is :mod:`cmt_edge.export.auto.search`; here is what it measures with. int8 is calibrated
once; variants with more operations in float are made from that graph (:mod:`cmt_edge.calib.restore`).
Everything measured is kept by content (:class:`Cache`), so an interrupted or repeated run goes on where the
last one stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from cmt_edge.calib import quantize
from cmt_edge.calib.groups import CLASSES, classes_of, groups_of
from cmt_edge.calib.quantize import keep_float
from cmt_edge.calib.restore import int8_nodes
from cmt_edge.deploy import Bundle, report
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT
from cmt_edge.deploy.bundle import BundleWriter
from cmt_edge.deploy.bundle.sections import ExecutedPrecision, Speed, Variant, VerdictEntry
from cmt_edge.deploy.errors import GateError
from cmt_edge.deploy.files import cache_folder, write_atomic, writing
from cmt_edge.deploy.images import ImageSet, digest
from cmt_edge.deploy.measure.benchmark import Protocol
from cmt_edge.deploy.measure.child import OWN_CHOICE, MeasuringProcess
from cmt_edge.deploy.measure.host import describe, versions
from cmt_edge.deploy.measure.isa import ISAS, int8_hardware
from cmt_edge.deploy.measure.parity import match_labels
from cmt_edge.deploy.preprocessing import NamedBytes, pixels
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.signals import terminate_as_interrupt

from .. import pipeline
from ..config import FORMATS, ExportConfig
from ..to_onnx import with_batch
from .search import Answers, Settings, Verdict, search

PROTOCOL = Protocol(iters=100, seconds=2.0, warmup_seconds=0.5)
QUICK_IMAGES = 1000
"""The ranking of groups uses at most so many labelled images."""
PROBES = 64
"""Logit deviations are means over so many calibration images where labelled ones give the top-1."""
OWN_CHOICE_WARNING = 0.05
NAMES = dict(zip(CLASSES, ("attention products", "depthwise", "linears"), strict=True))


class Cache:
    """Measurements as JSON files, one a key; an unreadable or missing one is measured again. Without a folder
    they last as long as this."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self._known = folder, dict[str, dict[str, Any]]()

    def get(self, key: Sequence[Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What was measured under ``key`` (anything that JSON holds), or is measured now."""
        name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        if name not in self._known:
            self._known[name] = (
                measure() if self.folder is None else self._kept(self.folder / f"{name}.json", measure)
            )
        return self._known[name]

    def _kept(self, path: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        with contextlib.suppress(OSError, ValueError):
            return json.loads(path.read_text(encoding="utf-8"))
        result = measure()
        with writing(path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(result).encode())
        return result


class Images:
    """Images as an array in a file, made when it is first asked for."""

    def __init__(
        self, path: Path, fingerprint: str, arrays: Callable[[], Iterator[np.ndarray]], count: int
    ) -> None:
        self.fingerprint, self.count, self._path, self._arrays = fingerprint, count, path, arrays

    @property
    def path(self) -> Path:
        if not self._path.exists():
            target = None
            partial = self._path.with_suffix(".part")
            for i, array in enumerate(self._arrays()):
                if target is None:
                    target = np.lib.format.open_memmap(partial, "w+", array.dtype, (self.count, *array.shape))
                target[i] = array
            del target
            partial.rename(self._path)
        return self._path


def run_auto(config: ExportConfig, progress: Progress | None = None) -> Bundle:
    """Measure the candidates, choose, and export the winner; its manifest holds the verdict.

    Raises:
        GateError: nothing passes; the message holds the table, nothing is written.
        Other errors as :func:`cmt_edge.export.pipeline.run`.
    """
    start = time.monotonic()
    pipeline.preflight(config)
    progress = progress or Progress(quiet=True)
    with _scratch() as folder:
        work = _Work(config, folder, progress)
        with MeasuringProcess(config.isa, progress.share) as process:
            workbench = _Workbench(work, process)
            found = search(
                workbench.variants(),
                {g: len(n) for g, n in work.groups.items()},
                _settings(config, start),
                workbench,
                workbench.missing(),
            )
        verdict = workbench.describe(found)
        if found.winner is None:
            text = "\n       ".join(report.verdict_text(verdict).splitlines())
            raise GateError(
                "no precision passes",
                why=text,
                remedy=(
                    "nothing was written; allow more with --max-drop or --latency-budget, "
                    "calibrate on more and more typical images, or train with quantization in mind"
                ),
            )
        prepared = pipeline.Prepared(
            work.reference, work.graph, work.steps, work.data, work.calibrated, verdict
        )
        return pipeline.run(_config_of(config, found.winner), progress, prepared=prepared)


@contextmanager
def _scratch() -> Iterator[Path]:
    """A temporary folder that is also removed when the process is told to end."""
    previous = terminate_as_interrupt()
    try:
        with tempfile.TemporaryDirectory(prefix="cmt-edge-") as folder:
            yield Path(folder)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _settings(config: ExportConfig, start: float) -> Settings:
    deadline = None if config.time_budget is None else start + config.time_budget
    each = (
        2 * (2 * PROTOCOL.seconds + PROTOCOL.warmup_seconds) + 1
    )  # counted and uncounted calls; model only, then end to end
    return Settings(config.allowed_drop, config.latency_budget, deadline, each)


def _config_of(config: ExportConfig, variant: Variant) -> ExportConfig:
    """The export of one variant by name."""
    int8 = variant.precision == "int8"
    return replace(
        config,
        precision=variant.precision,
        keep_float=",".join(variant.keep_float) or None,
        max_drop=config.allowed_drop,
        data=config.data if int8 else None,
        calib_size=config.calib_size if int8 else None,
        latency_budget=None,
        time_budget=None,
        isa=None,
    )


class _Work:
    """What all candidates share: reference, float graph, calibrated graph, images."""

    def __init__(self, config: ExportConfig, folder: Path, progress: Progress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        spec = config.preprocess
        with progress.step("load the reference model"):
            self.reference = pipeline._reference(config)
            labels = pipeline._labels(config, self.reference.loaded)
        self.manifest = pipeline._manifest(config, self.reference, *labels)
        self.labelled = ImageSet(config.eval_data) if config.eval_data else None
        if self.labelled:
            self.targets = match_labels(Bundle(config.target, self.manifest), self.labelled, config.by_order)
        data = pipeline._images(config, self.reference.classifier, progress)
        assert data is not None  # config.check() asked for images
        self.data = data
        self.graph, self.steps = pipeline._graph(config, self.reference, progress)
        self.calibrated = cache_folder() / "calibrated" if config.cache else folder / "calibrated"
        with progress.step(f"calibrate on {len(self.data)} images"):
            self.int8 = quantize(self.graph, self.data, spec, cache=self.calibrated, progress=progress.count)
        candidates = int8_nodes(self.int8.model)
        self.groups, self.classes = (f(self.int8.source, candidates) for f in (groups_of, classes_of))
        self.all_int8 = set(candidates)
        self._read_images()

    def _read_images(self) -> None:
        """``probes``: calibration images; ``judged`` and ``quick``: those whose top-1 counts; ``truth``:
        their labels."""
        spec, data, labelled = self.config.preprocess, self.data, self.labelled
        batches = lambda: (batch[0] for batch in data.batches(spec))  # noqa: E731
        calibration = Images(self.folder / "calibration.npy", data.fingerprint, batches, len(data))
        self.truth = self.quick_truth = None
        if labelled is None:
            self.probes = self.judged = self.quick = calibration
            return
        few = min(PROBES, len(data))
        name = f"{data.fingerprint} {few}"
        self.probes = Images(self.folder / "probes.npy", name, lambda: itertools.islice(batches(), few), few)
        items = _spread(labelled.items, self.config.eval_limit)
        self.judged = self._labelled_images(labelled, items, "judged")
        self.quick = self._labelled_images(labelled, _spread(items, QUICK_IMAGES), "quick")
        self.truth, self.quick_truth = (
            np.array([self.targets[item.label] for item in chosen])
            for chosen in (items, _spread(items, QUICK_IMAGES))
        )

    def _labelled_images(self, labelled: ImageSet, items: list[Any], name: str) -> Images:
        spec = self.config.preprocess
        content = hashlib.sha256(
            "".join(f"{digest(labelled.read(i))} {i.label}\n" for i in items).encode()
        ).hexdigest()
        decoded = lambda: (pixels(NamedBytes(labelled.read(i), i.name), spec) for i in items)  # noqa: E731
        return Images(self.folder / f"{name}.npy", content, decoded, len(items))

    def graph_of(self, variant: Variant) -> onnx.ModelProto:
        graph = self.graph
        if variant.precision == "int8":
            graph = keep_float(self.int8, variant.keep_float) if variant.keep_float else self.int8.model
        return with_batch(graph, self.config.batch)


class _Workbench:
    """Measures variants of one export (:class:`cmt_edge.export.auto.search.Measurement`)."""

    def __init__(self, work: _Work, process: MeasuringProcess) -> None:
        self.work, self.config, self.process = work, work.config, process
        self.cache = Cache(cache_folder() / "search" if work.config.cache else None)
        self.backend = RUNTIME_OF_FORMAT[work.config.format]
        self.runtime = process.runtime(self.backend)
        host = describe()
        self.machine = {
            "runtime": self.runtime,
            "isa": self.config.isa,
            "threads": self.config.threads,
            "batch": self.config.batch,
            "preprocess": self.config.preprocess.to_json(),
            "versions": versions(),
            **{k: getattr(host, k) for k in ("cpu", "flags", "cores", "machine")},
        }
        self.bundles: dict[Variant, Path] = {}
        self.hashes: dict[Variant, str] = {}
        self.expected: np.ndarray | None = None

    def variants(self) -> list[Variant]:
        """fp32 first; int8 as a whole, and without the kinds of products that hybrids are sensitive in."""
        floats = [Variant(p, p) for p in FORMATS[self.config.format] if p != "int8"]
        classes = {name: set(nodes) for name, nodes in self.work.classes.items() if nodes}
        partly = [
            Variant(f"int8, {NAMES[name]} float", "int8", (name,))
            for name, nodes in classes.items()
            if nodes != self.work.all_int8
        ]
        return [*floats, Variant("int8", "int8"), *partly]

    def missing(self) -> dict[str, str]:
        """Names of the variants that this machine has no hardware for, and why."""
        reasons = {v.name: self.process.missing(self.backend, v.precision) for v in self.variants()}
        return {name: f"no hardware: {why}" for name, why in reasons.items() if why}

    def answers(self, variant: Variant, quick: bool) -> Answers:
        work = self.work
        images, truth = (work.quick, work.quick_truth) if quick else (work.judged, work.truth)

        def measure() -> dict[str, Any]:
            with work.progress.step(f"answers of {variant.name}"):
                logits = self._logits(variant, images)
                deviation = self._deviation(
                    variant, logits if images is work.probes else self._logits(variant, work.probes)
                )
            self._forget(variant, quick)
            return {"top1": logits.argmax(1).tolist(), "deviation": deviation}

        key = [
            "answers",
            self._hash(variant),
            variant.precision,
            images.fingerprint,
            work.probes.fingerprint,
            self.machine,
        ]
        result = self.cache.get(key, measure)
        return Answers(np.array(result["top1"]), result["deviation"], truth)

    def speeds(self, variants: Sequence[Variant]) -> Mapping[str, Speed]:
        def measure() -> dict[str, Any]:
            paths = [self._bundle(v) for v in variants]
            with self.work.progress.step("latencies, interleaved"):
                result = self.process.benchmark(paths, PROTOCOL, self.config.threads)
                kernels = [
                    self.process.kernels(path, self.config.threads) if self.config.isa else {}
                    for path in paths
                ]
            return {"results": result["results"], "kernels": kernels}

        key = ["latency", [[self._hash(v), v.precision] for v in variants], asdict(PROTOCOL), self.machine]
        result = self.cache.get(key, measure)
        return {
            v.name: self._speed(*pair)
            for v, pair in zip(variants, zip(result["results"], result["kernels"], strict=True), strict=True)
        }

    def _speed(self, entry: dict[str, Any], kernels: dict[str, float]) -> Speed:
        self.process.check_limit(kernels)
        own = sum(share for name, share in kernels.items() if OWN_CHOICE in name)
        warnings = list(entry["warnings"])
        if own > OWN_CHOICE_WARNING:
            warnings.append(
                f"{100 * own:.0f} % of its time is spent in kernels that choose their instructions themselves"
                f" ({OWN_CHOICE}), which the limit to {self.config.isa} may not reach: on such a CPU it may"
                " be slower than measured here"
            )
        low, high = entry["model"]["ci"]
        return Speed(
            entry["model"]["p50"],
            (low, high),
            entry["ratio"],
            tuple(entry["ratio_ci"]),
            entry["size_bytes"],
            ExecutedPrecision(**entry["executed"]).summary(),
            tuple(warnings),
        )

    def describe(self, verdict: Verdict) -> VerdictEntry:
        """For the manifest, the report and ``--json``."""
        work, notes = self.work, list(verdict.notes)
        if self.config.isa:
            notes.append(
                f"measured with the runtime limited to {self.config.isa} (as {ISAS[self.config.isa].like}),"
                " on this machine's clock and memory: trust the order, not the milliseconds; the bundle"
                " itself is verified without the limit"
            )
        if not int8_hardware(self.config.isa):
            notes.append(
                "no instructions for int8 products (VNNI) here: int8 runs in several steps of older ones"
            )
        if any("drifted" in warning for c in verdict.candidates if c.speed for warning in c.speed.warnings):
            notes.append(
                "the machine was not at rest while latencies were measured, so their intervals are wide:"
                " measure again with --no-cache"
            )
        if not verdict.labelled:
            notes.append(
                "without --eval-data a drop is disagreement with fp32 on the calibration images: no accuracy"
                " was measured"
            )
        float_already = sorted(
            set(groups_of(work.graph, {n.name for n in work.graph.graph.node if n.op_type == "Conv"}))
            - set(work.groups)
        )
        return VerdictEntry(
            **{**vars(verdict), "notes": tuple(notes)},
            isa=self.config.isa,
            runtime=self.runtime,
            threads=self.config.threads,
            batch=self.config.batch,
            host=describe(),
            data=work.data.describe(),
            float_already=tuple(float_already),
        )

    def _logits(self, variant: Variant, images: Images) -> np.ndarray:
        return self.process.logits(self._bundle(variant), images.path, self.config.threads)

    def _deviation(self, variant: Variant, logits: np.ndarray) -> float:
        """Mean absolute difference from the float32 variant's logits on the probes, in their standard
        deviations."""
        if variant.precision == "fp32":
            self.expected = logits
        elif self.expected is None:
            self.expected = self._logits(self.variants()[0], self.work.probes)
        assert self.expected is not None
        return float(np.abs(logits - self.expected).mean() / self.expected.std(axis=1).mean())

    def _hash(self, variant: Variant) -> str:
        if variant not in self.hashes:
            content = self.work.graph_of(variant).SerializeToString(deterministic=True)
            self.hashes[variant] = hashlib.sha256(content).hexdigest()
        return self.hashes[variant]

    def _bundle(self, variant: Variant) -> Path:
        """A bundle of ``variant`` in the scratch folder, as the export would write it."""
        if variant not in self.bundles:
            config, work = _config_of(self.config, variant), self.work
            with BundleWriter(work.folder / f"{variant.precision}-{self._hash(variant)[:16]}") as writer:
                manifest = replace(work.manifest, precision=variant.precision)
                manifest = pipeline._write(config, writer, work.graph_of(variant), work.reference, manifest)
                self.bundles[variant] = writer.commit(manifest).path
            if self.config.isa and len(self.bundles) == 1:  # before the long work
                self.process.check_limit(self.process.kernels(self.bundles[variant], self.config.threads))
        return self.bundles[variant]

    def _forget(self, variant: Variant, quick: bool) -> None:
        """Free the disk of a variant that only the ranking needs."""
        if quick and variant.precision == "int8":
            shutil.rmtree(self.bundles.pop(variant), ignore_errors=True)


def _spread(items: list[Any], limit: int | None) -> list[Any]:
    """All of ``items``, or ``limit`` evenly spaced ones."""
    return (
        items
        if limit is None or limit >= len(items)
        else [items[i * len(items) // limit] for i in range(limit)]
    )
