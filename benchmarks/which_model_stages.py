"""The stages of :mod:`which_model` that need the models: exporting, measuring, and NVIDIA's compiler.

Each writes what it found beside the bundles, a file a model or a slice, and leaves out what is already there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from common import deviation, say, step
from which_model_points import PRECISIONS
from which_model_report import REFERENCE
from which_model_subjects import Subject

from cmt_edge import Bundle, ExportConfig, Predictor
from cmt_edge.calib import CalibrationSet, Recipe, lint
from cmt_edge.calib.quantize import place_pairs
from cmt_edge.calib.statistics import Batches, LocalStatistics
from cmt_edge.deploy import Preprocess
from cmt_edge.deploy.bundle import ONNX, BundleWriter, Golden, Manifest, make_plain
from cmt_edge.deploy.errors import CmtEdgeError, GateError
from cmt_edge.deploy.measure.benchmark import bind_inference, make_golden_batch
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.measure.parity import verify
from cmt_edge.deploy.measure.statistics import compare_medians, summarise
from cmt_edge.deploy.measure.timing import Protocol, time_interleaved
from cmt_edge.deploy.progress import Progress

THREADS = 2
"""CPU threads of one inference."""
CALIBRATED_ON = 2
"""Images; enough for latencies, which do not depend on ranges."""
PROTOCOL = Protocol(iters=40, seconds=0.8, warmup_iters=5, warmup_seconds=0.3, settle_seconds=0.02)
"""How long the models of a slice are measured in turns."""


def write_json(path: Path, content: Any) -> None:
    """Write what a stage found, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


def describe_error(exc: BaseException) -> str:
    """The first line of an error."""
    return (str(exc).splitlines() or [type(exc).__name__])[0]


# --- export ---------------------------------------------------------------------------------------


def export_all(subjects: Sequence[Subject], folder: Path) -> None:
    """Export every model that has not been."""
    for subject in subjects:
        place = folder / "export" / f"{subject.key}.json"
        if place.exists():
            continue
        with step(f"export {subject.name}"):
            write_json(place, export_model(subject, folder))


def export_model(subject: Subject, folder: Path) -> dict[str, Any]:
    """The bundles of one model in fp32 and int8, and what was found about each precision.

    Latency needs less than an export does: only the traced graph and the bundles are compared with PyTorch,
    not every step between them, and int8 is calibrated by :func:`_quantize`.
    """
    errors: dict[str, str] = {}
    try:
        _write_bundles(subject, folder, errors)
    except CmtEdgeError as exc:
        errors["fp32"] = describe_error(exc)
        say(f"  {subject.name}: {exc}")
    checks = _check_all(subject, folder, errors)
    entry = open_bundle(folder, subject, "fp32").manifest.model if "fp32" in checks else None
    return {
        "params": entry and entry.params,
        "macs": entry and entry.macs,
        "calibrated_on": CALIBRATED_ON,
        "refined": False,
        "errors": errors,
        "checks": checks,
    }


def _write_bundles(subject: Subject, folder: Path, errors: dict[str, str]) -> None:
    """The bundle in fp32, and the one in int8 unless calibration fails; then ``errors`` says why."""
    from cmt_edge.cmt import fuse
    from cmt_edge.export import steps
    from cmt_edge.export.config import OPSET
    from cmt_edge.export.description import describe_export
    from cmt_edge.export.to_onnx import export_onnx, simplify

    config = ExportConfig(
        subject.name,
        "openvino",
        "fp32",
        weights="random",
        imgsz=subject.imgsz,
        threads=THREADS,
        cache=False,
    )
    reference = steps.make_reference(config)
    manifest, golden = describe_export(config, reference), reference.golden
    fused = fuse(reference.classifier)
    graph = simplify(export_onnx(fused, config.img_size, OPSET, config.outputs))
    del reference, fused
    _write_bundle(graph, golden, manifest, locate(folder, subject, "fp32"))
    try:
        quantized = _quantize(graph, config.preprocess)
    except CmtEdgeError as exc:
        errors["int8"] = describe_error(exc)
        say(f"  {subject.name} int8: {exc}")
        return
    _write_bundle(quantized, golden, replace(manifest, precision="int8"), locate(folder, subject, "int8"))


def _quantize(graph: onnx.ModelProto, spec: Preprocess) -> onnx.ModelProto:
    """``graph`` in int8 with the pairs that an export places.

    The second part of an export's calibration, :mod:`cmt_edge.calib.refine`, is left out: it changes only
    the values of constants.
    """
    data = CalibrationSet.choose("generated", CALIBRATED_ON, spec, 0)
    quantized = place_pairs(graph, LocalStatistics(Batches(data, spec, None)), Recipe()).model
    findings = lint(quantized)
    if findings:
        raise GateError(
            f"the quantized graph breaks a rule for int8: {findings[0]}", remedy="report the model"
        )
    return quantized


def locate(folder: Path, subject: Subject, precision: str) -> Path:
    """Where the bundle lies; bf16 is a demand on the files of fp32."""
    return folder / "bundles" / f"{subject.key}_{'int8' if precision == 'int8' else 'fp32'}"


def _write_bundle(graph: onnx.ModelProto, golden: Golden, manifest: Manifest, place: Path) -> None:
    """A bundle that :func:`_check_all` has yet to compare with PyTorch; nothing else is measured now."""
    from cmt_edge.export.steps import write_files

    with BundleWriter(place) as writer:
        runtime = write_files(writer.folder, graph, 1, golden, "openvino")
        writer.commit(replace(manifest, runtime=runtime))


def open_bundle(folder: Path, subject: Subject, precision: str) -> Bundle:
    """The bundle of one precision."""
    bundle = Bundle.open(locate(folder, subject, precision))
    return Bundle(bundle.path, replace(bundle.manifest, precision=precision))


def _check_all(subject: Subject, folder: Path, errors: dict[str, str]) -> dict[str, Any]:
    """Whether each precision gives PyTorch's answers to the golden images; what fails goes to ``errors``."""
    found: dict[str, Any] = {}
    for precision in list_precisions_here():
        if not locate(folder, subject, precision).exists():
            continue
        try:
            bundle = open_bundle(folder, subject, precision)
            found[precision] = make_plain(verify(bundle, threads=THREADS).golden)
        except CmtEdgeError as exc:
            errors[precision] = describe_error(exc)
            say(f"  {subject.name} {precision}: {exc}")
    return found


# --- measure --------------------------------------------------------------------------------------


def measure_slice(subjects: Sequence[Subject], folder: Path, calls: int | None = None) -> dict[str, Any]:
    """All precisions of some models and the reference, each measured in turn and at least ``calls`` times."""
    protocol = replace(PROTOCOL, iters=calls or PROTOCOL.iters)
    with contextlib.ExitStack() as stack:
        with step(f"open {', '.join(subject.name for subject in subjects)}"):
            opened = {
                f"{subject.name} {precision}": stack.enter_context(_opened(folder, subject, precision))
                for subject, precision in _list_variants(subjects, folder)
            }
        variants = {name: call for name, (call, _) in opened.items()}
        with step(f"measure {len(variants)}"):
            samples = time_interleaved(variants, protocol)
        base = samples[" ".join(REFERENCE)]
        return {
            "measured": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
            "machine": make_plain(describe_host()),
            "versions": read_versions(),
            "threads": THREADS,
            "protocol": make_plain(protocol),
            "rows": {
                name: {
                    "latency": make_plain(summarise(times)),
                    "best_ms": float(times.min()) / 1e6,
                    "ratio": list(compare_medians(base, times)),
                    "best_ratio": float(base.min() / times.min()),
                    "deviation": opened[name][1],
                }
                for name, times in samples.items()
            },
        }


def find_unmeasured(subjects: Sequence[Subject], folder: Path) -> list[Subject]:
    """The models that have a bundle and no figures yet, small ones first: those of a slice are about equally
    fast."""
    measured = [json.loads(path.read_text())["rows"] for path in sorted((folder / "measure").glob("*.json"))]
    known = {name for rows in measured for name in rows}
    waiting = [
        subject
        for subject in subjects
        if any(
            f"{variant.name} {precision}" not in known
            for variant, precision in _list_variants_of(subject, folder)
        )
    ]
    return sorted(waiting, key=lambda subject: open_bundle(folder, subject, "fp32").manifest.model.macs or 0)


def _list_variants(subjects: Sequence[Subject], folder: Path) -> Iterator[tuple[Subject, str]]:
    """The reference, then every precision of every model that has a bundle."""
    reference = Subject(REFERENCE[0], "", "", 0, None, "")
    yield reference, REFERENCE[1]
    for subject in subjects:
        yield from _list_variants_of(subject, folder)


def _list_variants_of(subject: Subject, folder: Path) -> Iterator[tuple[Subject, str]]:
    """Every precision of a model that has a bundle, without the reference."""
    for precision in list_precisions_here():
        if (subject.name, precision) != REFERENCE and locate(folder, subject, precision).exists():
            yield subject, precision


def list_precisions_here() -> list[str]:
    """Those of :data:`PRECISIONS` that OpenVINO computes in on this processor."""
    from cmt_edge.deploy.backends.openvino import has_bf16

    return [precision for precision in PRECISIONS if precision != "bf16" or has_bf16()]


@contextlib.contextmanager
def _opened(folder: Path, subject: Subject, precision: str) -> Iterator[tuple[Any, float]]:
    """The inference of a bundle, and how far its logits are from PyTorch's, in standard deviations."""
    bundle = open_bundle(folder, subject, precision)
    with Predictor.load(bundle, threads=THREADS, cache=False) as predictor:
        batch = make_golden_batch(bundle, predictor)
        off = deviation(predictor.outputs(batch)[0], bundle.golden().logits[: len(batch)])
        yield bind_inference(predictor.session, batch), off


# --- NVIDIA's compiler ----------------------------------------------------------------------------


def estimate_all(subjects: Sequence[Subject], folder: Path) -> None:
    """Let NVIDIA's compiler build every model in fp16 that it has not built, and whose graph is at hand."""
    for subject in subjects:
        place = folder / "estimate" / f"{subject.key}.json"
        lacks_graph = _has_graph_in_bundle(subject) and not locate(folder, subject, "fp32").exists()
        if place.exists() or lacks_graph:
            continue
        with step(f"compile {subject.name}"):
            write_json(place, estimate_model(subject, folder))


def estimate_model(subject: Subject, folder: Path) -> Mapping[str, Any]:
    """What the compiler says of a model in fp16: kernels, bytes, and the roofline's estimate."""
    from cmt_edge.export.rtx import compile_graph
    from cmt_edge.export.typed import observe, type_graph

    try:
        graph, images = _make_graph(subject, folder)
        typed = type_graph(graph, "fp16", observe(graph, images)).model
        compiled = compile_graph(typed, 1, Progress(quiet=True))
    except CmtEdgeError as exc:
        say(f"  {subject.name}: {exc}")
        return {"error": describe_error(exc)}
    entry = make_plain(compiled)
    kept = ("product", "version", "kernels", "activation_bytes", "weight_bytes", "attention", "attentions")
    return {key: entry[key] for key in (*kept, "estimates")}


def _make_graph(subject: Subject, folder: Path) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """The float32 graph with the rewrites for TensorRT for RTX, and the golden images."""
    from cmt_edge.cmt import fuse
    from cmt_edge.cmt.spec import RTX
    from cmt_edge.deploy.preprocessing import normalise
    from cmt_edge.export import steps
    from cmt_edge.export.config import OPSET
    from cmt_edge.export.to_onnx import export_onnx, simplify

    if _has_graph_in_bundle(subject):
        bundle = open_bundle(folder, subject, "fp32")
        batch = normalise(bundle.golden().pixels, bundle.preprocess)
        return onnx.load(bundle.file(ONNX)), np.split(batch, len(batch))
    config = ExportConfig(subject.name, weights="random", format="rtx", precision="fp16", imgsz=subject.imgsz)
    reference = steps.make_reference(config)
    graph = simplify(export_onnx(fuse(reference.classifier, target=RTX), config.img_size, OPSET))
    return graph, np.split(reference.batch, len(reference.batch))


def _has_graph_in_bundle(subject: Subject) -> bool:
    """Whether the rewrites for TensorRT for RTX are those for a CPU, so that the bundle has the graph."""
    from cmt_edge.cmt import find_model
    from cmt_edge.cmt.spec import CPU, RTX

    if not subject.is_ours:
        return True
    spec = find_model(subject.name)
    return bool(spec.choose_rewrites(CPU) == spec.choose_rewrites(RTX))
