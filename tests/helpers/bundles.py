"""Small bundles whose graph computes what the fake runtime does, and predictors over the fake itself."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Bundle, Predictor, Preprocess
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle import (
    GOLDEN,
    MANIFEST,
    ONNX,
    REFERENCE,
    BundleWriter,
    Golden,
    Manifest,
    save_reference,
)
from cmt_edge.deploy.bundle.sections import CalibrationEntry, ModelEntry, TensorEntry, WeightsEntry
from cmt_edge.deploy.images import hash_image
from cmt_edge.deploy.preprocessing import decode_pixels, normalise

from .images import coloured

SIZE = 16
LABELS = ("red", "green", "blue")
SPEC = Preprocess(SIZE, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def tiny_model(classes: int) -> ModelEntry:
    """The entry of a model that nothing can rebuild."""
    return ModelEntry(
        provider="none",
        name="tiny",
        family="none",
        img_size=SIZE,
        num_classes=classes,
        head="logits",
        params=0,
        macs=0,
        opset=20,
        weights=WeightsEntry(source="random", sha256="0" * 64, seed=0, ema=False, fresh=(), resized=()),
    )


def tiny_manifest(labels=LABELS, **changes) -> Manifest:
    """Of a model whose graph :func:`tiny_graph` gives."""
    count = len(labels)
    made = Manifest(
        model=tiny_model(count),
        input=TensorEntry(name="input", shape=(1, 3, SIZE, SIZE), dtype="float32"),
        outputs=(TensorEntry(name="logits", shape=(1, count), dtype="float32"),),
        preprocess=SPEC,
        labels=tuple(label if isinstance(label, tuple) else (label, label) for label in labels),
        labels_source="numbered",
        precision="fp32",
        format="onnx",
    )
    return replace(made, **changes)


def make_calibration(fits_16_bits: bool | None) -> CalibrationEntry:
    """Of an int8 graph that nothing was calibrated for."""
    return CalibrationEntry(
        source="generated",
        images=1,
        fingerprint="0" * 64,
        recipe="0" * 64,
        cached=False,
        keep_float=(),
        fits_16_bits=fits_16_bits,
    )


def tiny_graph(classes: int = len(LABELS), batch: int | str = 1) -> bytes:
    """A model file: means of the colour channels times the fake runtime's matrix."""
    matrix = numpy_helper.from_array(FakeSession(classes).matrix, "matrix")
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    nodes = [
        onnx.helper.make_node("ReduceMean", ["input", "axes"], ["mean"], "mean", keepdims=0),
        onnx.helper.make_node("MatMul", ["mean", "matrix"], ["logits"], "head"),
    ]
    kind = onnx.TensorProto.FLOAT
    source = onnx.helper.make_tensor_value_info("input", kind, [batch, 3, SIZE, SIZE])
    target = onnx.helper.make_tensor_value_info("logits", kind, [batch, classes])
    graph = onnx.helper.make_graph(nodes, "tiny", [source], [target], [matrix, axes])
    opsets = [onnx.helper.make_opsetid("", 20)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()


def tiny_golden(classes: int = len(LABELS)) -> Golden:
    sources = generate(2, SIZE + 4, seed=1)
    values = np.stack([decode_pixels(source, SPEC) for source in sources])
    return Golden(sources, values, FakeSession(classes).run(normalise(values, SPEC)))


def make_bundle(
    target: Path, *, golden: Golden | None = None, members=None, reference=None, **changes
) -> Bundle:
    """A finished bundle; ``members`` are further files, ``reference`` recorded answers."""
    manifest = tiny_manifest(**changes)
    with BundleWriter(Path(target)) as writer:
        (golden or tiny_golden(len(manifest.labels))).save(writer.folder / GOLDEN)
        graph = tiny_graph(len(manifest.labels), manifest.input.shape[0])
        for name, data in {ONNX: graph, "model.bin": b"weights", **(members or {})}.items():
            path = writer.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if reference is not None:
            save_reference(writer.folder / REFERENCE, reference)
        return writer.commit(manifest)


def recorded_bundle(target: Path) -> Bundle:
    """A bundle that knows the reference's answers to the images of ``coloured``."""
    recorded = {hash_image(coloured(name, shade)): i for i, name in enumerate(LABELS) for shade in range(5)}
    return make_bundle(target, reference=recorded)


def copy_bundle(bundle: Bundle, target: Path, edit=lambda folder: None, **changes) -> Bundle:
    """Another valid bundle with edited members and manifest entries."""
    with BundleWriter(Path(target)) as writer:
        shutil.copytree(
            bundle.path, writer.folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST)
        )
        edit(writer.folder)
        return writer.commit(replace(bundle.manifest, **changes))


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def edit_manifest(bundle: Bundle, change, seal: bool = True) -> None:
    """Rewrite ``manifest.json`` after ``change(content)``, leaving the other files; ``seal`` makes its
    checksum right."""
    path = bundle.path / MANIFEST
    content = json.loads(path.read_text())
    change(content)
    if seal:
        body = {k: v for k, v in content.items() if k != "checksum"}
        content["checksum"] = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content))


def blank_head(folder) -> None:
    """Zero the classifier's weights: every image gets the same answer."""
    model = onnx.load(folder / ONNX)
    for tensor in model.graph.initializer:
        if list(tensor.dims)[-1:] == [10] or list(tensor.dims)[:1] == [10]:
            tensor.CopyFrom(
                numpy_helper.from_array(np.zeros_like(numpy_helper.to_array(tensor)), tensor.name)
            )
    onnx.save(model, folder / ONNX)


def tiny(batch: int = 1, labels=LABELS, session=None) -> Predictor:
    return Predictor(session or FakeSession(len(labels)), SPEC, labels, batch=batch)


def levels(predictions) -> list[float]:
    """What tells the answers to images of :func:`helpers.images.grey` apart."""
    return [float(p.logits[0]) for p in predictions]
