"""The bundle: its files, its comparison with the reference, and a short measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import onnx

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends import RUNTIME_OF_FORMAT, get_runtime
from cmt_edge.deploy.backends.torch import TorchSession
from cmt_edge.deploy.bundle import GOLDEN, ONNX, Golden
from cmt_edge.deploy.bundle.sections import TYPED_FORMATS, RuntimeEntry
from cmt_edge.deploy.measure.benchmark import Benchmark, benchmark
from cmt_edge.deploy.measure.flipped import MOST_SHOWN
from cmt_edge.deploy.measure.labels import LabelledImages
from cmt_edge.deploy.measure.parity import Verification, verify
from cmt_edge.deploy.measure.timing import Protocol

from ..config import ExportConfig
from ..to_onnx import set_batch
from .images import ProgressCallback
from .notes import write_note_on_overlap, write_notes_on_checkpoint
from .reference import Reference

EXPORT_PROTOCOL = Protocol(iters=25, seconds=0.5, warmup_seconds=0.25)
"""How long a finished bundle is measured; ``cmt-bench`` measures longer."""


def write_files(
    folder: Path,
    graph: onnx.ModelProto,
    batch: int,
    golden: Golden,
    format: str,
) -> RuntimeEntry:
    """Write ``model.onnx`` with its batch size, and the golden vectors.

    Returns:
        The runtime of the format; without a version for those of NVIDIA, whose engines come later.
    """
    (folder / ONNX).write_bytes(set_batch(graph, batch).SerializeToString(deterministic=True))
    golden.save(folder / GOLDEN)
    name = RUNTIME_OF_FORMAT[format]
    if format in TYPED_FORMATS:
        return RuntimeEntry(backend=name, version=None)
    return RuntimeEntry(backend=name, version=get_runtime(name).check())


def verify_bundle(
    config: ExportConfig,
    bundle: Bundle,
    reference: Reference,
    labelled: LabelledImages | None,
    candidate: Predictor,
    progress: ProgressCallback,
    calibrated: Sequence[str] = (),
) -> Verification:
    """Compare a staged bundle with the reference.

    Args:
        config: says how and how closely.
        bundle: staged.
        reference: the PyTorch side.
        labelled: images in class folders, if there are some.
        candidate: the bundle as its runtime opens it, or what is checked instead.
        progress: called with images done and total.
        calibrated: digests of the images that the graph was calibrated on.

    Raises:
        DataError: an image cannot be used.
    """
    with _open_reference(config, bundle, reference) as torch_side:
        result = verify(
            bundle,
            data=labelled,
            by_order=config.by_order,
            reference=torch_side,
            max_drop=config.allowed_drop,
            atol=config.atol,
            limit=config.eval_limit,
            progress=progress,
            candidate=candidate,
            flipped_images=MOST_SHOWN if config.thumbnails else 0,
        )
    more = write_notes_on_checkpoint(config, bundle.manifest, reference.loaded)
    more += write_note_on_overlap(calibrated, result.reference_answers)
    return replace(result, notes=(*result.notes, *more))


def _open_reference(
    config: ExportConfig,
    bundle: Bundle,
    reference: Reference,
) -> Predictor:
    """A predictor of the PyTorch side, with the bundle's labels."""
    return Predictor(
        TorchSession(reference.model),
        config.preprocess,
        bundle.labels,
        batch=0,
        head=config.head,
    )


def measure_bundle(
    bundle: Bundle,
    predictor: Predictor,
    threads: int | None,
    blocks: Mapping[str, str],
    progress: Callable[[str, float], None],
) -> Benchmark:
    """A short measurement of a staged bundle.

    Args:
        bundle: staged.
        predictor: what its runtime has compiled of it on ``threads`` threads; it is closed then.
        threads: for the record.
        blocks: name of an operation -> its block of the model.
        progress: called with the name of the phase and its share done.
    """
    return benchmark(
        [bundle],
        threads=threads,
        protocol=EXPORT_PROTOCOL,
        with_throughput=False,
        progress=progress,
        load=lambda *_, **__: predictor,
        blocks=blocks,
    )
