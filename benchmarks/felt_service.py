"""Requests of several clients at once: ``felt.py --what service``."""

from __future__ import annotations

import io
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import openvino as ov
from by_hand import Preparation, compile_bundle

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.report import format_table

CLIENTS = (2, 4, 8)
"""Numbers of clients that ask at once."""
LEAST_FOR_P99 = 1000
"""Samples from which on a 99th percentile is shown."""
DRAWS = 500
"""Number of times that the rounds are drawn again for an interval."""
PHOTOS = 16
"""Number of different images that are asked about."""

Answer = Callable[[bytes], str]
"""Encoded image -> label."""
MakeAnswer = Callable[[], Answer]
"""Makes what one client's thread calls."""


@dataclass(frozen=True)
class Turn:
    """Seconds of every request, and of all processors together."""

    seconds: np.ndarray
    processor: float

    @property
    def processor_ms(self) -> float:
        """Milliseconds of all processors for a request."""
        return 1e3 * self.processor / len(self.seconds)


Turns = dict[int, dict[str, list[Turn]]]
"""Number of clients -> way -> its turn in every round."""


def measure_service(path: Path, images: Path, rounds: int, threads: int, seconds: float) -> str:
    """The table of ``--what service``: one Predictor for all threads against OpenVINO by hand."""
    bundle = Bundle.open(path)
    blobs = [file.read_bytes() for file in sorted(images.iterdir())[:PHOTOS]]
    tables = []
    for throughput in (False, True):
        with Predictor.load(bundle, threads=threads, throughput=throughput, cache=False) as predictor:
            ways = {
                "by hand": serve_by_hand(bundle, threads, throughput),
                "Predictor": lambda served=predictor: lambda blob: served(blob).label,
            }
            samples = take_turns(ways, blobs, rounds, seconds)
        tables.append(f"throughput={throughput}\n\n{format_service(samples)}")
    return "\n\n".join(tables)


def serve_by_hand(bundle: Bundle, threads: int, throughput: bool) -> MakeAnswer:
    """One compiled model for all, and an infer request with its input for each thread."""
    compiled = compile_bundle(bundle, threads, throughput)
    prepare, labels = Preparation(bundle.preprocess), bundle.labels

    def make_answer() -> Answer:
        request = compiled.create_infer_request()
        size = bundle.preprocess.size
        batch = np.empty((1, 3, size, size), np.float32)
        request.set_input_tensor(ov.Tensor(batch, shared_memory=True))

        def answer(blob: bytes) -> str:
            prepare(io.BytesIO(blob), batch)
            outputs = request.infer(share_outputs=True)
            return labels[int(outputs[0][0].argmax())]

        return answer

    return make_answer


def take_turns(ways: dict[str, MakeAnswer], blobs: list[bytes], rounds: int, seconds: float) -> Turns:
    """The rounds of every number of clients and every way."""
    samples: Turns = {n: {name: [] for name in ways} for n in CLIENTS}
    for number in range(rounds + 1):
        for clients in CLIENTS:
            for name in list(ways) if number % 2 else list(ways)[::-1]:
                taken = ask(ways[name], blobs, clients, seconds if number else seconds / 4)
                if number:
                    samples[clients][name].append(taken)
    return samples


def ask(make_answer: MakeAnswer, blobs: list[bytes], clients: int, seconds: float) -> Turn:
    """``clients`` threads, each of which asks again as soon as it is answered, for ``seconds``."""
    taken: list[float] = []
    together = threading.Barrier(clients)

    def run(first: int) -> None:
        answer, own = make_answer(), []
        answer(blobs[first % len(blobs)])
        together.wait()
        end = time.perf_counter() + seconds
        number = first
        while (start := time.perf_counter()) < end:
            answer(blobs[number % len(blobs)])
            own.append(time.perf_counter() - start)
            number += 1
        taken.extend(own)

    cpu = time.process_time()
    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Turn(np.array(taken), time.process_time() - cpu)


def format_service(samples: Turns) -> str:
    """Percentiles in ms, the ratios of ours to those by hand, and processor time in ms a request."""
    rows = []
    for clients, ways in samples.items():
        enough = min(sum(len(turn.seconds) for turn in turns) for turns in ways.values()) >= LEAST_FOR_P99
        cells = [str(clients)]
        for percentile in (50, 99):
            shown = percentile != 99 or enough
            cells += describe_percentile(ways, percentile) if shown else ["-"] * 3
        cells += [f"{statistics.median(t.processor_ms for t in turns):.2f}" for turns in ways.values()]
        rows.append(cells)
    header = ["clients"]
    header += [f"{what}{way}" for what in ("p50 ", "p99 ") for way in ("by hand", "Predictor", "ratio")]
    header += ["processor by hand", "processor Predictor"]
    return format_table(header, rows, markdown=True)


def describe_percentile(ways: dict[str, list[Turn]], percentile: float) -> list[str]:
    """A percentile of all requests by hand and of ours, in ms, and their ratio with its 95 % interval, for
    which whole rounds are drawn again."""
    by_hand, ours = ([turn.seconds for turn in turns] for turns in ways.values())
    draw = np.random.default_rng(0)
    ratios = []
    for _ in range(DRAWS):
        rounds = draw.integers(len(ours), size=len(ours))
        ratios.append(find(ours, rounds, percentile) / find(by_hand, rounds, percentile))
    every = np.arange(len(ours))
    other, own = find(by_hand, every, percentile), find(ours, every, percentile)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return [f"{1e3 * other:.1f}", f"{1e3 * own:.1f}", f"{own / other:.2f} ({low:.2f}-{high:.2f})"]


def find(seconds: list[np.ndarray], rounds: np.ndarray, percentile: float) -> float:
    """A percentile of the requests of some rounds."""
    return float(np.percentile(np.concatenate([seconds[i] for i in rounds]), percentile))
