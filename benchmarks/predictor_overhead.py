"""What ``Predictor`` costs beside the runtime's own inference, and what ``Predictor.stream`` reaches from
encoded files.

    python benchmarks/predictor_overhead.py [BUNDLE ...] [--threads 2] [--seconds 10] [--backend onnxruntime]

Without bundles: cmt_nano and cmt_xs (random weights) in fp32 for OpenVINO, exported to a temporary folder.
Every row of a table is measured in turn with the others, in random order, in one process. The overhead of a
row is its median minus that of ``bare`` (the runtime's API on an input bound in advance) or, where images are
given, of the same steps by hand: decoding with resizing, normalising into the bound input, inference. Budget:
under 3 % of ``bare``. The sum of the steps' own medians is printed too; it is below what the steps take one
after the other, because the runtime's threads fall asleep while an image is decoded.

The last table is the Predictor's own time in Python, in microseconds an image, with a session that answers at
once: what is left of the overhead where no runtime disturbs the clock.
"""

from __future__ import annotations

import argparse
import io
import random
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from common import say
from PIL import Image

from cmt_edge.calib.generated import generate
from cmt_edge.deploy import Bundle, Predictor, Preprocess
from cmt_edge.deploy.backends import Binding, ExecutedPrecision, Session
from cmt_edge.deploy.backends.base import read_batch_limit
from cmt_edge.deploy.measure.benchmark import bind_inference, measure_throughput
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.preprocessing import decode_pixels, normalise
from cmt_edge.deploy.report import format_table

DEFAULT = ("cmt_nano", "cmt_xs")
PHOTO = (500, 375)
"""Width and height of the JPEG files, as ImageNet's are on average."""
PHOTOS = 16
"""JPEG files that the streams repeat."""
BASE = {
    "bare, array given each time": "bare",
    "session.bind(shape).run()": "bare",
    "session.run(batch)": "bare",
    "logits(batch)": "bare",
    "predictor(array of the right size)": "array of the right size, by hand",
    "predictor(JPEG)": "JPEG, by hand",
}
"""What a row's overhead is counted from."""
WARMUP_S = 2.0
"""Seconds at the start of a table that are not counted."""
ROUND_S = 1.0
"""Seconds that one turn of a stream lasts, about."""
REPEATS = 15
"""Number of repeats of which the median of the Predictor's own time is taken."""


def make_photos() -> list[bytes]:
    """Generated pictures as JPEG files of :data:`PHOTO`."""
    files = []
    for blob in generate(PHOTOS, PHOTO[0], seed=5):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(blob)).convert("RGB").resize(PHOTO).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def list_bare_calls(predictor: Predictor, batch: np.ndarray) -> dict[str, Callable[[], object]]:
    """The runtime's own API on a ready contiguous batch; the first entry is what percentages refer to."""
    session: Any = predictor.session
    if session.runtime.startswith("openvino"):
        import openvino as ov

        bound, given = (session.compiled.create_infer_request() for _ in range(2))
        bound.set_input_tensor(ov.Tensor(batch, shared_memory=True))
        return {
            "bare": lambda: bound.infer(share_outputs=True),
            "bare, array given each time": lambda: given.infer(
                [batch], share_inputs=True, share_outputs=True
            ),
        }
    if session.runtime.startswith("onnxruntime"):
        return {"bare": lambda: session.inference.run(None, {session.input_name: batch})}
    raise SystemExit(f"nothing is known about the bare API of {session.runtime}")


def time_in_turn(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, called in turn in random order for ``seconds`` each, about."""
    shuffle = random.Random(0)
    names = list(calls)
    samples: dict[str, list[int]] = {name: [] for name in names}
    begin = time.perf_counter()
    while (passed := time.perf_counter() - begin) < WARMUP_S + seconds * len(names):
        shuffle.shuffle(names)
        for name in names:
            start = time.perf_counter_ns()
            calls[name]()
            if passed > WARMUP_S:
                samples[name].append(time.perf_counter_ns() - start)
    return {name: float(np.median(values)) / 1e6 for name, values in samples.items()}


def measure_overhead(predictor: Predictor, files: list[bytes], seconds: float) -> str:
    """The table of one request at a time."""
    spec = predictor.spec
    array = decode_pixels(files[0], spec)
    side = spec.short_side or spec.size
    ready = np.asarray(Image.fromarray(array).resize((side, side)))  # needs no resizing
    batch = normalise(array, spec)[None]
    row, cut = np.empty_like(batch[0]), decode_pixels(ready, spec)
    bare = list_bare_calls(predictor, batch)

    def answer_by_hand(image: Any) -> object:
        normalise(decode_pixels(image, spec), spec, batch[0])
        return bare["bare"]()

    calls = {
        **bare,
        "session.bind(shape).run()": bind_inference(predictor.session, batch),
        "session.run(batch)": lambda: predictor.session.run(batch),
        "logits(batch)": lambda: predictor.logits(batch),
        "decode and resize": lambda: decode_pixels(files[0], spec),
        "normalise": lambda: normalise(cut, spec, row),
        "array of the right size, by hand": lambda: answer_by_hand(ready),
        "predictor(array of the right size)": lambda: predictor(ready),
        "JPEG, by hand": lambda: answer_by_hand(files[0]),
        "predictor(JPEG)": lambda: predictor(files[0]),
    }
    ms = time_in_turn(calls, seconds)
    rows = []
    for name, median in ms.items():
        base = ms[BASE[name]] if name in BASE else None
        beyond = (
            ["-", "-"]
            if base is None
            else [f"{median - base:+.3f}", f"{100 * (median - base) / ms['bare']:+.1f}"]
        )
        rows.append([name, f"{median:.3f}", *beyond])
    summed = ms["bare"] + ms["decode and resize"] + ms["normalise"]
    rows.append(["JPEG, sum of the steps", f"{summed:.3f}", "-", "-"])
    return format_table(["call", "median ms", "overhead ms", "% of bare"], rows, markdown=True)


def run_loop_before(predictor: Predictor, images: Iterable[Any], workers: int) -> Iterator[np.ndarray]:
    """The loop that :meth:`cmt_edge.deploy.Predictor.stream` was before: arrays made anew, one inference at a
    time in the caller's thread."""
    spec = predictor.spec

    def decode(image: Any) -> np.ndarray:
        scale = (1 / (255 * np.asarray(spec.std))).astype(np.float32).reshape(3, 1, 1)
        shift = (-np.asarray(spec.mean) / np.asarray(spec.std)).astype(np.float32).reshape(3, 1, 1)
        result = np.multiply(np.moveaxis(decode_pixels(image, spec), -1, -3), scale, dtype=np.float32)
        result += shift
        return np.ascontiguousarray(result)

    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Any] = deque()
        for image in images:
            pending.append(pool.submit(decode, image))
            if len(pending) >= 2 * workers:
                yield predictor.session.run(pending.popleft().result()[None])[0][0]
        while pending:
            yield predictor.session.run(pending.popleft().result()[None])[0][0]


def measure_streams(one: Predictor, many: Predictor, files: list[bytes], rounds: int) -> str:
    """The table of many images: ``one`` loaded for latency, ``many`` for throughput."""
    calls: dict[str, Callable[[Iterable[bytes]], Iterable[object]]] = {}
    for workers in (1, 2):
        calls[f"before, {workers} decoding"] = lambda images, w=workers: run_loop_before(one, images, w)
        calls[f"stream, {workers} decoding"] = lambda images, w=workers: one.stream(images, workers=w)
        calls[f"stream, {workers} decoding, throughput=True"] = lambda images, w=workers: many.stream(
            images, workers=w
        )
    for flight in (1, 2, 3, 4):
        calls[f"stream, 2 decoding, throughput=True, in_flight={flight}"] = lambda images, f=flight: (
            many.stream(images, workers=2, in_flight=f)
        )
    rates: dict[str, list[float]] = {name: [] for name in calls}
    count = max(32, int(ROUND_S * _measure_rate(calls["stream, 2 decoding"], files, 32)))
    bound: list[float] = []
    batch = one.prepare(files[:1])
    for _ in range(rounds):
        for name, call in calls.items():
            rates[name].append(_measure_rate(call, files, count))
        bound.append(measure_throughput(many, batch, ROUND_S))
    before = np.median(rates["before, 2 decoding"])
    rows = [[name, f"{np.median(r):.0f}", f"{np.median(r) / before:.2f}"] for name, r in rates.items()]
    rows.append(
        [
            "cmt-bench's images/s: inference alone",
            f"{np.median(bound):.0f}",
            f"{np.median(bound) / before:.2f}",
        ]
    )
    return format_table(["from encoded files", "images/s", "of before"], rows, markdown=True)


class Instant(Session):
    """Answers at once, so that only the Predictor's own time is left."""

    runtime = "instant 1"
    device = "none"
    answer = np.zeros((1, 10), np.float32)

    def run(self, batch: np.ndarray) -> list[np.ndarray]:
        return [self.answer]

    def bind(self, shape: tuple[int, ...]) -> Binding:
        outputs = [self.answer]
        return Binding(np.zeros(shape, np.float32), lambda: outputs)

    def executed(self, batch: np.ndarray, repeats: int = 10) -> ExecutedPrecision:
        return ExecutedPrecision()


def measure_own_time() -> str:
    """The table of the Predictor's own time: microseconds an image, median of :data:`REPEATS`."""
    spec = Preprocess(16, None, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    predictor = Predictor(Instant(), spec, [str(i) for i in range(10)])
    image, batch = np.zeros((16, 16, 3), np.uint8), np.zeros((1, 3, 16, 16), np.float32)
    many = [image] * 50
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "predictor(array of 16 x 16)": (lambda: [predictor(image) for _ in many], len(many)),
        "logits(batch)": (lambda: [predictor.logits(batch) for _ in many], len(many)),
        "predict of 50": (lambda: predictor.predict(many), len(many)),
        "stream of 50, 2 decoding": (lambda: list(predictor.stream(many)), len(many)),
    }
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(REPEATS):
        for name, (call, count) in calls.items():
            start = time.perf_counter()
            call()
            samples[name].append(1e6 * (time.perf_counter() - start) / count)
    rows = [[name, f"{np.median(values):.1f}"] for name, values in samples.items()]
    return format_table(["call", "us an image"], rows, markdown=True)


def _measure_rate(
    call: Callable[[Iterable[bytes]], Iterable[object]], files: list[bytes], count: int
) -> float:
    """Images a second."""
    images = [files[i % len(files)] for i in range(count)]
    start = time.perf_counter()
    for _ in call(images):
        pass
    return count / (time.perf_counter() - start)


def report(path: Path, args: argparse.Namespace) -> None:
    """Print the tables of one bundle."""
    bundle = Bundle.open(path)
    if read_batch_limit(bundle) > 1:
        raise SystemExit(f"{path}: a bundle of batch 1 or of any batch is needed")
    files = make_photos()
    with (
        Predictor.load(bundle, backend=args.backend, threads=args.threads, cache=False) as one,
        Predictor.load(
            bundle, backend=args.backend, threads=args.threads, throughput=True, cache=False
        ) as many,
    ):
        say(f"{path.name}: one at a time ...")
        print(
            f"\n**{path.name}** on {one.info.runtime}, {args.threads}"
            f" threads\n\n{measure_overhead(one, files, args.seconds)}\n"
        )
        if args.rounds:
            say(f"{path.name}: streams ...")
            print(measure_streams(one, many, files, args.rounds), flush=True)


def main() -> None:
    """Measure what the command line names."""
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("bundles", type=Path, nargs="*", metavar="BUNDLE")
    p.add_argument("--backend", help="runtime to use (default: the one of the bundle's format)")
    p.add_argument("--threads", type=int, default=2, help="CPU threads of one inference (default 2)")
    p.add_argument("--seconds", type=float, default=10.0, help="about so long for each row (default 10)")
    p.add_argument(
        "--rounds",
        type=int,
        default=7,
        help="turns of each stream of about a second; 0: no streams (default 7)",
    )
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for path in args.bundles or _export(Path(folder)):
            report(path, args)
    print(f"\n{measure_own_time()}")
    host = describe_host()
    print(f"\n{host.cpu}, {host.cores} cores; {', '.join(f'{k} {v}' for k, v in read_versions().items())}")


def _export(folder: Path) -> Iterator[Path]:
    from cmt_edge.export import ExportConfig, run

    for name in DEFAULT:
        say(f"exporting {name} ...")
        yield run(ExportConfig(name, weights="random", format="openvino", output=str(folder))).path


if __name__ == "__main__":
    main()
