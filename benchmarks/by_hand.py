"""What somebody writes by hand with OpenVINO, Pillow and NumPy, in place of ``Predictor``.

The comparisons of ``felt.py`` run it beside ours. The model is the bundle's, rewritten and compiled with the
same settings, so that only the loops differ.

    python benchmarks/by_hand.py BUNDLE FOLDER --threads 2

prints file, label and probability of the best five classes for every image of a folder, as ``cmt-predict
--csv`` does.
"""

from __future__ import annotations

import argparse
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from PIL import Image, ImageOps

from cmt_edge.deploy import Bundle, Preprocess
from cmt_edge.deploy.backends.openvino import RUNTIME
from cmt_edge.deploy.backends.openvino_core import open_core
from cmt_edge.deploy.backends.openvino_devices import HINTS
from cmt_edge.deploy.backends.openvino_graph import read
from cmt_edge.deploy.preprocessing import RESAMPLING

DECODERS = 2
"""Threads that decode."""
AHEAD = 8
"""Images that are decoded, or waiting to be, before the oldest is handed to the runtime."""
TOP = 5
"""Classes that are printed of each image."""


def compile_bundle(bundle: Bundle, threads: int, throughput: bool) -> ov.CompiledModel:
    """The bundle's model with OpenVINO's settings that ``Predictor.load`` gives it."""
    settings = {
        "PERFORMANCE_HINT": "THROUGHPUT" if throughput else "LATENCY",
        "INFERENCE_PRECISION_HINT": HINTS[RUNTIME.float_precision(bundle.manifest.precision)],
        "INFERENCE_NUM_THREADS": threads,
    }
    return open_core().compile_model(read(bundle.file("model.onnx")), "CPU", settings)


class Preparation:
    """Image -> model input, as a short program has it: no caps, no checks."""

    def __init__(self, spec: Preprocess) -> None:
        self.spec = spec
        self.scale = np.float32(1 / (255 * np.array(spec.std))).reshape(3, 1, 1)
        self.shift = np.float32(-np.array(spec.mean) / np.array(spec.std)).reshape(3, 1, 1)

    def __call__(self, file: Any, out: np.ndarray | None = None) -> np.ndarray:
        """Float32 ``(1, 3, S, S)``, written into ``out`` if given."""
        spec, size = self.spec, self.spec.size
        with Image.open(file) as opened:
            short = min(opened.size)
            width, height = (int((spec.short_side or short) * side / short) for side in opened.size)
            if spec.decode == "reduced":
                opened.draft("RGB", (int(spec.reducing_gap * width), int(spec.reducing_gap * height)))
            ImageOps.exif_transpose(opened, in_place=True)  # without a copy of what is upright
            image: Image.Image = opened if opened.mode == "RGB" else opened.convert("RGB")
            if spec.short_side is None:
                width = height = size
            image = image.resize((width, height), RESAMPLING[spec.interpolation])
        left, top = round((width - size) / 2), round((height - size) / 2)
        pixels = np.asarray(image.crop((left, top, left + size, top + size)))
        row = np.empty((1, 3, size, size), np.float32) if out is None else out
        np.copyto(row[0], pixels.transpose(2, 0, 1))
        row *= self.scale
        row += self.shift
        return row


def decode_all(prepare: Preparation, files: Iterable[Any], decoders: int = DECODERS) -> Iterator[np.ndarray]:
    """Every image decoded in threads, in order, a few ahead."""
    pending: deque[Future[np.ndarray]] = deque()
    with ThreadPoolExecutor(decoders) as pool:
        for file in files:
            pending.append(pool.submit(prepare, file))
            if len(pending) >= AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def classify_all(
    compiled: ov.CompiledModel, prepare: Preparation, files: Iterable[Any]
) -> Iterator[np.ndarray]:
    """The logits of every image, in order: decoded in threads, inferred through OpenVINO's own queue."""
    queue = ov.AsyncInferQueue(compiled)
    answers: dict[int, np.ndarray] = {}
    known = threading.Condition()

    def keep(request: Any, given: tuple[int, np.ndarray]) -> None:
        number, _ = given
        logits = request.get_output_tensor(0).data[0].copy()
        with known:
            answers[number] = logits
            known.notify()

    def wait_for(number: int) -> np.ndarray:
        with known:
            known.wait_for(lambda: number in answers)
            return answers.pop(number)

    queue.set_callback(keep)
    given = taken = 0
    for row in decode_all(prepare, files):
        # the row goes along, because the tensor does not keep the memory that it shares
        queue.start_async({0: ov.Tensor(row, shared_memory=True)}, (given, row))
        given += 1
        while taken in answers:
            yield answers.pop(taken)
            taken += 1
    while taken < given:
        yield wait_for(taken)
        taken += 1
    queue.wait_all()  # a queue that goes while its last callback runs waits for it for ever


def infer_only(compiled: ov.CompiledModel, row: np.ndarray, count: int) -> None:
    """``count`` inferences of the same input through OpenVINO's own queue."""
    queue = ov.AsyncInferQueue(compiled)
    for _ in range(count):
        queue.start_async({0: ov.Tensor(row, shared_memory=True)})
    queue.wait_all()


def find_best(logits: np.ndarray) -> list[tuple[int, float]]:
    """The best :data:`TOP` classes and their probabilities."""
    chances = np.exp(logits - logits.max())
    chances /= chances.sum()
    return [(int(i), float(chances[i])) for i in np.argsort(-chances)[:TOP]]


def main() -> None:
    """Classify a folder."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("bundle", type=Path)
    p.add_argument("folder", type=Path)
    p.add_argument("--threads", type=int, default=2)
    args = p.parse_args()
    bundle = Bundle.open(args.bundle)
    files = sorted(args.folder.iterdir())
    compiled = compile_bundle(bundle, args.threads, throughput=True)
    answers = classify_all(compiled, Preparation(bundle.preprocess), files)
    for file, logits in zip(files, answers, strict=True):
        best = [cell for i, p in find_best(logits) for cell in (bundle.labels[i], f"{p:.6f}")]
        sys.stdout.write(",".join([str(file), *best]) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
