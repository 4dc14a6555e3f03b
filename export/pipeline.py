"""The recipe: reference model -> fuse -> ONNX -> simplify -> [quantize] -> bundle -> verify -> measure.

Every step proves itself against the PyTorch reference before the next one starts; a failed gate leaves
nothing behind.
"""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from torch import nn

from cmt_edge.calib import CalibrationSet, quantize
from cmt_edge.calib.data import SYNTHETIC
from cmt_edge.calib.generated import generate
from cmt_edge.calib.synthetic import default_count, synthetic_set
from cmt_edge.cmt import count_params, fuse, labels_of, macs, weights_fingerprint, with_head
from cmt_edge.cmt.reference import PROVIDER, load_reference
from cmt_edge.cmt.weights import LoadedWeights
from cmt_edge.deploy import Bundle, Predictor, report
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, LoadOptions, get_runtime
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.bundle import (
    GOLDEN,
    LOGITS,
    ONNX,
    REFERENCE,
    BundleWriter,
    Golden,
    Manifest,
    save_reference,
)
from cmt_edge.deploy.errors import GateError, ParityError, RuntimeMissingError
from cmt_edge.deploy.files import cache_folder, writing
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.benchmark import Benchmark, Protocol, benchmark, summary
from cmt_edge.deploy.measure.host import describe, versions
from cmt_edge.deploy.measure.parity import Verification, distance, match_labels, tolerance, verify
from cmt_edge.deploy.preprocessing import normalise, pixels
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.tensorrt.build import finish, require_tensorrt
from cmt_edge.deploy.tensorrt.engine import EngineOptions
from cmt_edge.deploy.tensorrt.parser_rules import parser_findings

from .config import OPSET, ExportConfig
from .to_onnx import FUSE_ATOL, export_onnx, outputs_of, require_parity, simplify, with_batch
from .typed import observe, rounded, typed

GOLDEN_IMAGES = 4
GOLDEN_SEED = 7
OBSERVED_IMAGES = 32
"""Activations are observed on so many images; the ranges hardly grow with more, and
:data:`~cmt_edge.export.typed.SAFETY` covers the rest."""
DYNAMIC_SIZES = (1, 3, 8)
QUICK = Protocol(iters=25, seconds=0.5, warmup_seconds=0.25)


@dataclass(frozen=True)
class _Reference:
    """The untouched PyTorch side of every comparison; ``model`` is ``classifier`` with the head that was
    asked for."""

    classifier: nn.Module
    model: nn.Module
    loaded: LoadedWeights
    golden: Golden
    batch: np.ndarray

    @property
    def outputs(self) -> list[np.ndarray]:
        return self.golden.outputs


@dataclass(frozen=True)
class Prepared:
    """What several exports of one model share: made once by ``precision="auto"`` and handed to the export of
    its winner."""

    reference: _Reference
    graph: onnx.ModelProto
    steps: dict[str, float]
    data: CalibrationSet | None
    calibrated: Path
    verdict: dict[str, Any] | None


def run(
    config: ExportConfig, progress: Progress | None = None, *, prepared: Prepared | None = None
) -> Bundle:
    """Export, verify and measure; returns the finished bundle. Callers leave ``prepared`` out.

    Raises:
        InputError and its kin: something asked for or given cannot be used (exit code 2).
        RuntimeMissingError: a runtime or instruction set is missing here (3).
        GateError: a step or the result differs from the reference by more than allowed (1); nothing is
            written.
    """
    if config.precision == "auto":
        from .auto.choose import run_auto

        return run_auto(config, progress)
    preflight(config)
    progress = progress or Progress(quiet=True)
    labelled = ImageSet(config.eval_data) if config.eval_data else None
    with BundleWriter(config.target) as writer:
        with progress.step("load the reference model"):
            reference = prepared.reference if prepared else _reference(config)
            labels, labels_source = (
                _labels(config, reference.loaded) if config.head == LOGITS else ([], "none")
            )
        manifest = _manifest(config, reference, labels, labels_source)
        manifest = replace(manifest, verdict=prepared.verdict if prepared else None)
        if labelled:  # before the long work: a mismatch is the user's to mend
            match_labels(Bundle(config.target, manifest), labelled, config.by_order)
        data = prepared.data if prepared else _images(config, reference.classifier, progress)
        graph, steps = (prepared.graph, prepared.steps) if prepared else _graph(config, reference, progress)
        if data and config.precision == "int8":
            with progress.step(f"calibrate on {len(data)} images"):
                cache = (
                    prepared.calibrated
                    if prepared
                    else cache_folder() / "calibrated"
                    if config.cache
                    else None
                )
                quantized = quantize(
                    graph, data, config.preprocess, config.recipe, cache=cache, progress=progress.count
                )
            graph = quantized.model
            manifest = replace(
                manifest,
                calibration=data.describe()
                | {
                    "recipe": quantized.recipe,
                    "cached": quantized.cached,
                    "keep_float": list(config.recipe.keep_float),
                },
            )
        if config.format == "trt":
            with progress.step("write the precision into the graph"):
                graph, manifest = _typed(config, graph, data, reference, manifest, steps)
        with progress.step(f"compile for {config.format}"), writing(config.target):
            manifest = _write(config, writer, with_batch(graph, config.batch), reference, manifest)
        if config.format == "trt" and config.build:
            manifest = _build_engine(config, writer, manifest, progress)
        with progress.step("verify"):
            result = _verify(config, writer.staged(manifest), reference, labelled, progress)
            if result.data:
                with writing(config.target):
                    save_reference(writer.folder / REFERENCE, result.data.reference_answers)
        speed = None
        if config.format != "trt":  # an engine has been measured where it was built
            with progress.step("measure"):
                speed = benchmark(
                    [writer.staged(manifest)],
                    threads=config.threads,
                    protocol=QUICK,
                    with_throughput=False,
                    progress=progress.share,
                )
            manifest = replace(manifest, latency=summary(speed))
        manifest = replace(
            manifest, verification=report.plain(result) | {"steps": steps, "bundle": config.name}
        )
        with progress.step("write the bundle"), writing(config.target):
            _write_reports(writer.folder, config, result, speed, manifest.verdict)
            return writer.commit(manifest)


def preflight(config: ExportConfig) -> None:
    """Fail before the long work where something is missing, or where the result could not be verified or
    written here.

    Raises as :func:`run`.
    """
    config.check()
    for target in config.targets:
        BundleWriter(target).check()
    if config.format == "trt":
        if config.build:
            _require_tensorrt(config)
        return
    runtime = get_runtime(RUNTIME_OF_FORMAT[config.format])
    runtime.check()
    if config.precision != "auto":
        runtime.float_precision(config.precision)


def _reference(config: ExportConfig) -> _Reference:
    model, loaded = load_reference(
        config.model,
        config.weights,
        img_size=config.img_size,
        num_classes=config.classes,
        seed=config.seed,
        ema=config.ema,
        fresh_head=config.fresh_head,
        resize=config.resize_position_bias,
    )
    spec = config.preprocess
    sources = generate(GOLDEN_IMAGES, round(1.3 * config.img_size), seed=GOLDEN_SEED)
    values = np.stack([pixels(source, spec) for source in sources])
    batch = normalise(values, spec)
    headed = with_head(model, config.head)
    return _Reference(model, headed, loaded, Golden(sources, values, TorchSession(headed).run(batch)), batch)


def _images(config: ExportConfig, model: nn.Module, progress: Progress) -> CalibrationSet | None:
    """The calibration images that were asked for."""
    if config.data is None:
        return None
    if config.data != SYNTHETIC:
        return CalibrationSet.choose(config.data, config.calib_size, config.preprocess, config.seed)
    count = synthetic_count(config)
    with progress.step(f"make {count} synthetic images"):
        return synthetic_set(
            model,
            count,
            config.preprocess,
            config.seed,
            weights=f"{config.model} {weights_fingerprint(model)}",
            cache=cache_folder() / "synthetic" if config.cache else None,
            progress=progress.count,
        )


def synthetic_count(config: ExportConfig) -> int:
    """How many synthetic images an export makes: those asked for, for fp16 never more than are observed."""
    count = default_count(config.preprocess) if config.calib_size is None else config.calib_size
    return count if config.precision in ("int8", "auto") else min(count, OBSERVED_IMAGES)


def _graph(
    config: ExportConfig, reference: _Reference, progress: Progress
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The simplified float32 graph with a dynamic batch, and each step's largest difference."""
    steps = {}
    with progress.step("fuse"):
        fused = with_head(fuse(reference.classifier), config.head)
        steps["fuse"] = require_parity(
            "fuse", TorchSession(fused).run(reference.batch), reference.outputs, FUSE_ATOL
        )

    def compare(graph: onnx.ModelProto) -> None:
        steps["onnx"] = require_parity(
            "export to ONNX", outputs_of(graph, reference.batch, "export to ONNX"), reference.outputs
        )

    with progress.step("export to ONNX"):
        graph = export_onnx(fused, config.img_size, OPSET, config.outputs, compare)
    with progress.step("simplify"):
        graph = simplify(graph)
        steps["simplify"] = require_parity(
            "simplify", outputs_of(graph, reference.batch, "simplify"), reference.outputs
        )
        if config.batch == 0:
            for count in DYNAMIC_SIZES:
                index = np.arange(count) % len(reference.batch)
                step = f"dynamic batch of {count}"
                expected = [output[index] for output in reference.outputs]
                steps[step] = require_parity(step, outputs_of(graph, reference.batch[index], step), expected)
    return graph, steps


def _require_tensorrt(config: ExportConfig) -> None:
    try:
        require_tensorrt(config.device)
    except RuntimeMissingError as exc:
        raise RuntimeMissingError(
            exc.what,
            why=exc.why,
            remedy=(
                "--no-build writes a complete bundle without the engine; cmt-build finishes it on the device"
            ),
        ) from exc


def _typed(
    config: ExportConfig,
    graph: onnx.ModelProto,
    data: CalibrationSet | None,
    reference: _Reference,
    manifest: Manifest,
    steps: dict[str, float],
) -> tuple[onnx.ModelProto, Manifest]:
    """The graph with its precision written into it; what stayed float32 goes into the manifest."""
    observed: dict[str, float] = {}
    images = data or CalibrationSet.choose("generated", OBSERVED_IMAGES, config.preprocess, config.seed)
    if config.precision != "fp32":
        batches = itertools.islice(images.batches(config.preprocess), OBSERVED_IMAGES)
        observed = observe(graph, itertools.chain(np.split(reference.batch, len(reference.batch)), batches))
    result = typed(graph, config.precision, observed)
    if findings := parser_findings(result.model):
        raise GateError(
            "TensorRT's parser would refuse the graph",
            why="; ".join(findings[:5]),
            remedy="nothing was written; report the model, or export --format onnx or openvino",
        )
    steps[f"typed {config.precision}"] = _require_typed(config, graph, result.model, reference)
    ranges = (
        {
            "source": images.describe()["source"],
            "images": min(len(images), OBSERVED_IMAGES) + len(reference.batch),
            "largest": result.largest,
        }
        | ({"synthesis": images.synthesis} if images.synthesis else {})
        if observed
        else None
    )
    typing = {
        "operations": result.operations,
        "islands": [asdict(i) for i in result.islands],
        "observed": ranges,
    }
    return result.model, replace(manifest, typing=typing)


def _require_typed(
    config: ExportConfig, before: onnx.ModelProto, after: onnx.ModelProto, reference: _Reference
) -> float:
    """The largest difference that writing the precision made, with every float16 tensor rounded."""
    step = "write the precision into the graph"
    ours, expected = (
        outputs_of(rounded(after), reference.batch, step),
        outputs_of(before, reference.batch, step),
    )
    differences = [distance(a, b) for a, b in zip(ours, expected, strict=True)]
    for name, found, output in zip(config.outputs, differences, reference.outputs, strict=True):
        allowed = tolerance(output, config.precision, config.atol)
        if not found <= allowed:
            raise ParityError(
                f"{config.precision} changes the {name} by {found:.3g}, allowed are {allowed:.3g}",
                remedy=(
                    "nothing was written; give typical images with --data, allow more with --atol, or use"
                    " --precision fp32"
                ),
            )
    return max(differences)


def _build_engine(
    config: ExportConfig, writer: BundleWriter, manifest: Manifest, progress: Progress
) -> Manifest:
    """What ``cmt-build`` does, on the bundle that is being written."""
    options = EngineOptions(config.workspace)
    finished = finish(
        writer.staged(manifest),
        options,
        device=config.device,
        atol=config.atol,
        progress=progress,
        name=config.name,
    )
    for name, content in finished.files.items():
        with writing(config.target):
            (writer.folder / name).parent.mkdir(exist_ok=True)
            (writer.folder / name).write_bytes(content)
    return finished.manifest


def _write(
    config: ExportConfig,
    writer: BundleWriter,
    graph: onnx.ModelProto,
    reference: _Reference,
    manifest: Manifest,
) -> Manifest:
    """``model.onnx``, the compiled artefact and the golden vectors; the manifest knows the runtime's
    options."""
    path = writer.folder / ONNX
    path.write_bytes(graph.SerializeToString(deterministic=True))
    reference.golden.save(writer.folder / GOLDEN)
    name = RUNTIME_OF_FORMAT[config.format]
    if config.format == "trt":  # its artefact is the engine, see _build_engine
        return replace(manifest, runtime={"backend": name, "version": None})
    runtime = get_runtime(name)
    runtime.compile(path, writer.folder)
    return replace(manifest, runtime={"backend": name, "version": runtime.check()})


def _verify(
    config: ExportConfig, bundle: Bundle, reference: _Reference, labelled: ImageSet | None, progress: Progress
) -> Verification:
    with Predictor(
        TorchSession(reference.model), config.preprocess, bundle.labels, batch=0, head=config.head
    ) as torch_side:
        result = verify(
            bundle,
            data=labelled,
            by_order=config.by_order,
            threads=config.threads,
            device=config.device,
            reference=torch_side,
            max_drop=config.allowed_drop,
            atol=config.atol,
            limit=config.eval_limit,
            progress=progress.count,
            candidate=_emulated(config, bundle) if config.format == "trt" and not config.build else None,
        )
    if not result.passed:
        text = report.verification_text(replace(result, bundle=config.name))
        raise GateError(
            "the exported model differs from the reference by more than allowed",
            why="\n       ".join(text.splitlines()),
            remedy=(
                "nothing was written; calibrate on more and more typical images, use bf16 or fp32, or allow"
                " more with --max-drop or --atol"
            ),
        )
    return replace(result, bundle=config.name)


def _emulated(config: ExportConfig, bundle: Bundle) -> Predictor:
    """A typed graph on the CPU with every float16 tensor rounded, for where the engine cannot be built."""
    from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession

    graph = rounded(onnx.load(bundle.file(ONNX)))
    session = OnnxRuntimeSession(graph.SerializeToString(), LoadOptions(threads=config.threads))
    session.runtime += ", float16 emulated" if config.precision != "fp32" else ""
    return Predictor(session, config.preprocess, bundle.labels, batch=config.batch, head=config.head)


def _labels(config: ExportConfig, loaded: LoadedWeights) -> tuple[list[list[str]], str]:
    """``[[id, name], ...]`` in logit order and where they come from."""
    if (names := config.read_labels()) is not None:
        return [[n, n] for n in names], "file"
    if loaded.classes is not None:
        config.require_labels(loaded.classes, loaded.source)
        return [[n, n] for n in loaded.classes], "checkpoint"
    if (known := labels_of(config.spec, config.classes)) is not None:
        return [list(pair) for pair in known], "published"
    return [[f"class_{i}", f"class_{i}"] for i in range(config.classes)], "numbered"


def _manifest(
    config: ExportConfig, reference: _Reference, labels: list[list[str]], labels_source: str
) -> Manifest:
    loaded, model = reference.loaded, reference.classifier
    source = config.weights if config.weights in ("pretrained", "random") else loaded.source
    weights: dict[str, Any] = {
        "source": source,
        "sha256": weights_fingerprint(model),
        "seed": config.seed,
        "ema": loaded.ema,
        "fresh": list(loaded.fresh),
        "resized": list(loaded.resized),
    }
    size = config.img_size
    batch: int | str = config.batch or "batch"
    return Manifest(
        model={
            "provider": PROVIDER,
            "name": config.model,
            "family": config.spec.family,
            "img_size": size,
            "num_classes": config.classes,
            "head": config.head,
            "params": count_params(model),
            "macs": macs(reference.model),
            "opset": OPSET,
            "weights": weights,
        },
        input={"name": "input", "shape": [batch, 3, size, size], "dtype": "float32"},
        outputs=[
            {"name": name, "shape": [batch, *output.shape[1:]], "dtype": "float32"}
            for name, output in zip(config.outputs, reference.outputs, strict=True)
        ],
        preprocess=config.preprocess.to_json(),
        labels=labels,
        labels_source=labels_source,
        precision=config.precision,
        format=config.format,
        versions=versions(),
        host=describe(),
    )


def _write_reports(
    folder: Path,
    config: ExportConfig,
    result: Verification,
    speed: Benchmark | None,
    verdict: dict[str, Any] | None,
) -> None:
    text = f"# {config.name}\n\n## Verification\n\n{report.verification_text(result, markdown=True)}\n"
    content = {"verification": report.plain(result)}
    if speed:
        speed = replace(speed, results=[replace(speed.results[0], name=config.name)])
        text += f"\n## Latency\n\n{report.benchmark_text(speed, markdown=True)}\n"
        content["benchmark"] = report.plain(speed)
    if verdict:
        text += f"\n## Why {config.precision}\n\n{report.verdict_text(verdict, markdown=True)}\n"
        content["verdict"] = verdict
    (folder / "report.md").write_text(text, encoding="utf-8")
    (folder / "report.json").write_text(report.to_json(content) + "\n", encoding="utf-8")
