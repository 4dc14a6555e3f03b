"""What a bundle says of an export: the sections of its manifest and its report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cmt_edge.calib import CalibrationSet
from cmt_edge.calib.integer_layers import PLACEMENT
from cmt_edge.cmt import (
    compute_weights_fingerprint,
    count_params,
    find_published_labels,
    try_macs,
)
from cmt_edge.cmt.reference import PROVIDER
from cmt_edge.cmt.weights import AS_BUILT, LoadedWeights
from cmt_edge.deploy import report
from cmt_edge.deploy.bundle import LOGITS, REPORT_JSON, REPORT_PAGE, REPORT_TEXT, Manifest
from cmt_edge.deploy.bundle.sections import (
    CalibrationEntry,
    ModelEntry,
    ObservedEntry,
    TensorEntry,
    TypingEntry,
    WeightsEntry,
)
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.measure.benchmark import Benchmark
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.measure.parity import Verification

from .blocks import list_by_block
from .config import OPSET, ExportConfig
from .settings import NAMED_WEIGHTS
from .steps import GOLDEN_IMAGES, OBSERVED_IMAGES, Reference
from .to_onnx import INPUT
from .typed import Typed

IMAGENET_CLASSES = 1000
"""Number of classes of ImageNet-1k."""

Labels = tuple[tuple[str, str], ...]
"""``((id, name), ...)`` in the order of the logits."""


def choose_labels(config: ExportConfig, loaded: LoadedWeights) -> tuple[Labels, str]:
    """The labels, and where they come from; a model of one logit has two.

    Raises:
        InputError: the labels of the file or of the checkpoint are not one a class, or those of the
            checkpoint have no certain order.
    """
    if config.head != LOGITS:
        return (), "none"
    if (names := config.read_labels()) is not None:
        return _make_labels(config, names, config.read_label_ids()), "file"
    if loaded.classes is not None:
        config.require_labels(loaded.classes, loaded.source)
        return _make_labels(config, loaded.classes), "checkpoint"
    if loaded.classes_fault is not None:
        raise InputError(
            "the names of the classes in the checkpoint cannot be used",
            where=loaded.source,
            why=loaded.classes_fault,
            remedy="--labels FILE with one class name a line, in the order of the logits",
        )
    known = find_published_labels(config.spec, config.classes)
    if known is not None and _may_be_published(config):
        return tuple(known), "published"
    numbered = [f"class_{i}" for i in range(config.label_count)]
    return _make_labels(config, numbered), "numbered"


def _may_be_published(config: ExportConfig) -> bool:
    """Whether the published classes may be those of the weights.

    A checkpoint file that names no classes may be a published one where they are the 1000 of ImageNet, which
    are hardly ever others. Other published weights come with this package, so that a file holds somebody's
    own.
    """
    return config.weights in NAMED_WEIGHTS or config.classes == IMAGENET_CLASSES


def _make_labels(
    config: ExportConfig,
    names: Sequence[str],
    ids: Sequence[str] | None = None,
) -> Labels:
    """``names`` as labels, with ``ids`` or themselves as IDs; of one logit, a single name is that of the
    positive class."""
    if len(names) < config.label_count:
        names, ids = [f"not {names[0]}", names[0]], None
    return tuple(zip(ids or names, names, strict=True))


def describe_export(config: ExportConfig, reference: Reference) -> Manifest:
    """The manifest as far as it is known once the reference is loaded."""
    labels, source = choose_labels(config, reference.loaded)
    batch: int | str = config.batch or "batch"
    return Manifest(
        model=_describe_model(config, reference),
        input=TensorEntry(
            name=INPUT,
            shape=(batch, 3, config.img_size, config.img_size),
            dtype="float32",
        ),
        outputs=tuple(
            TensorEntry(
                name=name,
                shape=(batch, *output.shape[1:]),
                dtype="float32",
                kind=None if reference.kind == LOGITS else reference.kind,
            )
            for name, output in zip(config.outputs, reference.outputs, strict=True)
        ),
        preprocess=config.preprocess,
        labels=labels,
        labels_source=source,
        precision=config.precision,
        format=config.format,
        versions=read_versions(),
        host=describe_host(),
    )


def _describe_model(config: ExportConfig, reference: Reference) -> ModelEntry:
    loaded, classifier = reference.loaded, reference.classifier
    weights = WeightsEntry(
        source=_describe_source(config, loaded),
        sha256=compute_weights_fingerprint(classifier),
        seed=config.seed,
        ema=loaded.ema,
        fresh=tuple(loaded.fresh),
        resized=tuple(loaded.resized),
        entry=None if config.weights in NAMED_WEIGHTS else loaded.entry,
    )
    return ModelEntry(
        provider=PROVIDER,
        name=config.model_name,
        family=config.spec.family,
        img_size=config.img_size,
        num_classes=config.classes,
        head=config.head,
        params=count_params(classifier),
        macs=try_macs(reference.model),
        opset=OPSET,
        weights=weights,
    )


def _describe_source(config: ExportConfig, loaded: LoadedWeights) -> str:
    """``"pretrained"``, ``"random"``, what a factory's own weights are called, or a file's name."""
    if config.weights in NAMED_WEIGHTS and loaded.source != AS_BUILT:
        return config.weights
    return loaded.source


def describe_calibration(
    config: ExportConfig,
    data: CalibrationSet,
    cached: bool,
) -> CalibrationEntry:
    """What an int8 graph was calibrated on; ``cached`` if it was calibrated by an earlier run."""
    return CalibrationEntry(
        **vars(data.describe()),
        recipe=_name_recipe(config),
        cached=cached,
        keep_float=config.kept_float,
        fits_16_bits=config.fits_16_bits or None,
    )


def _name_recipe(config: ExportConfig) -> str:
    """The hash of all choices: of the recipe, and of further pairs where the format has them."""
    key = config.recipe.key()
    if not config.computes_by_pairs:
        return key
    return hashlib.sha256(f"{key} {PLACEMENT}".encode()).hexdigest()


def describe_typing(result: Typed, data: CalibrationSet | None) -> TypingEntry:
    """The precision that was written into a graph; ``data`` is what its ranges were observed on, besides the
    golden images."""
    observed = None
    if data is not None:
        observed = ObservedEntry(
            source=data.source,
            images=min(len(data), OBSERVED_IMAGES) + GOLDEN_IMAGES,
            largest=result.largest,
            synthesis=data.synthesis,
        )
    return TypingEntry(
        operations=result.operations,
        islands=result.islands,
        observed=observed,
    )


def write_report(
    folder: Path,
    manifest: Manifest,
    name: str,
    result: Verification,
    speed: Benchmark | None,
    blocks: dict[str, str],
) -> None:
    """Write ``report.md``, ``report.json`` and ``report.html``: verification, what a compiler made of the
    graph, latency where it was measured, and the verdict of ``auto``."""
    parts = [
        f"# {name}",
        report.describe_weights(manifest.model.weights),
        "## Verification",
        report.describe_verification(result, markdown=True),
    ]
    if manifest.decoding:
        parts += ["## Decoding", report.describe_decoding(manifest.decoding)]
    content: dict[str, Any] = {"verification": result}
    if result.flipped:
        content["flipped"] = result.flipped
    if blocks:
        content["blocks"] = list_by_block(blocks)
    if manifest.decoding:
        content["decoding"] = manifest.decoding
    if manifest.compiled:
        parts += [
            "## What the compiler made of it",
            report.describe_compiled(manifest.compiled, markdown=True),
        ]
        content["compiled"] = manifest.compiled
    if speed:
        parts += [
            "## Latency",
            report.describe_benchmark(speed, markdown=True),
        ]
        content["benchmark"] = speed
    if manifest.verdict:
        parts += [
            f"## Why {manifest.precision}",
            report.describe_verdict(manifest.verdict, markdown=True),
        ]
        content["verdict"] = manifest.verdict
    (folder / REPORT_TEXT).write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    (folder / REPORT_JSON).write_text(report.to_json(content) + "\n", encoding="utf-8")
    subject = report.make_subject(name, name, manifest, speed, flipped=result.flipped)
    others = {file: (folder / file).stat().st_size for file in (REPORT_TEXT, REPORT_JSON)}
    page = report.make_own_page(subject, others)
    (folder / REPORT_PAGE).write_text(page, encoding="utf-8")
