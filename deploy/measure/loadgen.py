"""MLPerf LoadGen's figures beside ours: the same session, asked by LoadGen between two runs of our own.

=============  ==========================================  ================================================
Scenario       LoadGen's figure                            ours
=============  ==========================================  ================================================
SingleStream   median latency, one query after the other   median latency of the model alone
Offline        images a second, all asked for at once      images a second, as many requests as recommended
Server         latency under requests at random times      none: see :data:`NOT_COMPARABLE`
=============  ==========================================  ================================================

Our figure is measured before and after LoadGen's. How far the two lie apart is the noise of the machine; the
figures agree where LoadGen's differs from the mean of ours by no more than that, or than :data:`AGREEMENT`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle import Bundle
from ..decoding import NamedBytes
from ..errors import InputError
from ..predictor import Predictor
from ..preprocessing import normalise
from .benchmark import bind_inference, measure_throughput
from .loadgen_driver import OneAtATime, Pool, Query, read_version, run_test
from .loadgen_result import OFFLINE, SERVER, SINGLE, LoadGenResult
from .statistics import NS_PER_MS
from .timing import Protocol, time_interleaved

AGREEMENT = 0.05
"""The share by which two figures of the same may always differ."""
LEAST_SECONDS = 0.5
"""The shortest time in seconds that a test lasts."""
SURPLUS = 1.2
"""How many times as fast as our figure LoadGen expects a bundle to be: it prepares queries for that."""
SERVER_SHARE = 0.5
"""The share of the throughput that is asked for in ``Server`` unless told otherwise."""
LIMIT_MS = 15.0
"""Milliseconds that 99 of 100 answers must keep in ``Server`` unless told otherwise: MLPerf's limit for its
image classifier, ResNet-50 (``mlperf.conf``)."""
NOT_COMPARABLE = (
    "Server asks at random times whether or not an answer is ready, so its latency holds the waiting for"
    " requests that came before; our latency is of one request after the other and holds none"
)
"""Why there is no figure of ours beside that of ``Server``."""


@dataclass(frozen=True)
class LoadGenOptions:
    """What LoadGen asks.

    Attributes:
        scenarios: some of :data:`~.loadgen_result.SCENARIOS`.
        folder: where its logs are kept: ``BUNDLE/SCENARIO/mlperf_log_*``.
        rate: images a second that ``Server`` asks for; ``None`` is :data:`SERVER_SHARE` of the throughput.
        limit_ms: milliseconds that 99 of 100 answers must keep in ``Server``.
    """

    scenarios: tuple[str, ...]
    folder: Path
    rate: float | None = None
    limit_ms: float = LIMIT_MS


def run_loadgen(
    bundle: Bundle,
    name: str,
    opened: Callable[..., AbstractContextManager[Predictor]],
    options: LoadGenOptions,
    protocol: Protocol,
    images: Sequence[bytes] = (),
    progress: Callable[[str, float], None] | None = None,
) -> tuple[LoadGenResult, ...]:
    """Let LoadGen ask a bundle in each scenario.

    Args:
        bundle: what answers.
        name: of the folder of its logs.
        opened: opens ``bundle``, as :meth:`cmt_edge.deploy.Predictor.load` does.
        options: what is asked.
        protocol: how long: LoadGen asks for at least as many queries and seconds, and our figures before
            and after share the same.
        images: encoded images that are asked for; default: the golden ones.
        progress: called with the name of the phase and its share done.

    Raises:
        RuntimeMissingError: LoadGen is not installed.
        InputError: a scenario asks for single images, and the graph answers several at a time.
        OutputError: LoadGen's logs cannot be written.
    """
    results = []
    for scenario in options.scenarios:
        if progress:
            progress(f"MLPerf LoadGen, {scenario}, of {name}", 0.0)
        with opened(bundle, throughput=scenario != SINGLE) as predictor:
            require_single_images(bundle, predictor, scenario)
            test = _Test(
                predictor,
                _prepare(bundle, predictor, images),
                options.folder / name / scenario,
                options,
                protocol,
            )
            results.append(_RUNNERS[scenario](test))
    return tuple(results)


def require_single_images(bundle: Bundle, predictor: Predictor, scenario: str) -> None:
    """Raise :class:`InputError` where a query holds one image and an inference takes several."""
    if scenario != OFFLINE and (predictor.batch or 1) > 1:
        raise InputError(
            f"answers {predictor.batch} images at a time, and a query of {scenario} is one image",
            where=bundle.path,
            remedy=f"use --loadgen {OFFLINE}, or export the bundle with --batch 1 or --batch 0",
        )


def _prepare(bundle: Bundle, predictor: Predictor, images: Sequence[bytes]) -> np.ndarray:
    """What LoadGen chooses from: each image as the graph takes it, float32 ``(N, 1, 3, H, W)``."""
    if images:
        batch = predictor.prepare([NamedBytes(image, "image") for image in images])
    else:
        batch = normalise(bundle.golden().pixels, bundle.preprocess)
    return np.ascontiguousarray(batch[:, None])


@dataclass(frozen=True)
class _Test:
    """One scenario of one bundle.

    Attributes:
        predictor: the opened bundle.
        images: what LoadGen chooses from, float32 ``(N, 1, 3, H, W)``.
        folder: of LoadGen's logs.
        options: what is asked.
        protocol: for how long.
    """

    predictor: Predictor
    images: np.ndarray
    folder: Path
    options: LoadGenOptions
    protocol: Protocol

    @property
    def seconds(self) -> float:
        """How long LoadGen asks at least."""
        return max(LEAST_SECONDS, self.protocol.seconds)

    def measure_rate(self, size: int) -> float:
        """Our images a second, as ``bench`` measures it, in batches of ``size``."""
        batch = np.resize(self.images[:, 0], (size, *self.images.shape[2:]))
        return measure_throughput(self.predictor, batch, max(LEAST_SECONDS, self.protocol.seconds / 2))

    def measure_latency(self) -> float:
        """Our median latency of one image, in milliseconds."""
        half = replace(self.protocol, iters=-(-self.protocol.iters // 2), seconds=self.protocol.seconds / 2)
        call = bind_inference(self.predictor.session, self.images[0])
        return float(np.median(time_interleaved({"ours": call}, half)["ours"])) / NS_PER_MS

    def run(self, asked: Query, answerer: OneAtATime | Pool) -> LoadGenResult:
        """What LoadGen finds, without figures of ours."""
        return _read(asked, run_test(asked, answerer, self.folder), self.folder)


def _run_single(test: _Test) -> LoadGenResult:
    before = test.measure_latency()
    asked = Query(SINGLE, test.seconds, test.protocol.iters, expected_ms=before / SURPLUS)
    found = test.run(asked, OneAtATime(test.predictor.session, test.images))
    return _compare(found, "p50", (before, test.measure_latency()))


def _run_offline(test: _Test) -> LoadGenResult:
    size = test.predictor.batch or 1
    before = test.measure_rate(size)
    asked = Query(OFFLINE, test.seconds, size, rate=SURPLUS * before)
    found = test.run(asked, Pool(test.predictor.session, test.images, size))
    return _compare(found, "rate", (before, test.measure_rate(size)))


def _run_server(test: _Test) -> LoadGenResult:
    rate = test.options.rate or SERVER_SHARE * test.measure_rate(1)
    asked = Query(SERVER, test.seconds, test.protocol.iters, rate=rate, limit_ms=test.options.limit_ms)
    return test.run(asked, Pool(test.predictor.session, test.images, 1))


_RUNNERS = {SINGLE: _run_single, OFFLINE: _run_offline, SERVER: _run_server}
"""Scenario -> what measures it."""


def _read(asked: Query, found: Mapping[str, Any], folder: Path) -> LoadGenResult:
    """What LoadGen's log says of a test, without figures of ours."""
    is_valid = found["result_validity"] == "VALID"
    is_queued, is_served = asked.scenario == OFFLINE, asked.scenario == SERVER

    def read_ms(name: str) -> float | None:
        return None if is_queued else float(found[f"result_{name}_latency_ns"]) / NS_PER_MS

    return LoadGenResult(
        scenario=asked.scenario,
        version=read_version(),
        valid=is_valid,
        reason="" if is_valid else _read_reason(found),
        images=int(found["effective_samples_per_query"]) * int(found["result_query_count"]),
        p50=read_ms("50.00_percentile"),
        p90=read_ms("90.00_percentile"),
        p99=read_ms("99.00_percentile"),
        mean=read_ms("mean"),
        rate=float(found[_RATES[asked.scenario]]),
        asked_rate=asked.rate if is_served else None,
        limit_ms=asked.limit_ms if is_served else None,
        ours=None,
        ratio=None,
        noise=None,
        agrees=None,
        note=NOT_COMPARABLE if is_served else "",
        logs=str(folder),
    )


_RATES = {
    SINGLE: "result_qps_with_loadgen_overhead",
    OFFLINE: "result_samples_per_second",
    SERVER: "result_completed_samples_per_sec",
}
"""Scenario -> name of its images a second in LoadGen's log."""


def _read_reason(found: Mapping[str, Any]) -> str:
    """Why LoadGen does not take a test for valid, in its own words."""
    told = [str(found.get("result_invalid_reason", ""))]
    if not found.get("early_stopping_met", True):
        told.append(str(found.get("early_stopping_result", "")))
    return " ".join(" ".join(told).replace("*", " ").split())


def _compare(result: LoadGenResult, name: str, ours: tuple[float, float]) -> LoadGenResult:
    """``result`` with our figures beside that of LoadGen that is called ``name``."""
    before, after = ours
    ratio = getattr(result, name) / ((before + after) / 2)
    noise = max(AGREEMENT, abs(after / before - 1))
    return replace(result, ours=ours, ratio=ratio, noise=noise, agrees=abs(ratio - 1) <= noise)
