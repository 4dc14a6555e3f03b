"""MLPerf LoadGen as it is driven: what it asks, who answers, and what it writes into its log.

LoadGen issues queries, takes the times by its own clock, and writes its own logs. Only one test can run in a
process at a time. Sources: mlcommons/inference, ``loadgen/README.md``, ``loadgen/test_settings.h`` and
``loadgen/results.cc`` (version 6.0.17).
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np

from ..backends.base import Session
from ..errors import OutputError, RuntimeMissingError
from ..files import writing
from .benchmark import bind_inference
from .statistics import NS_PER_MS

PACKAGE = "mlcommons-loadgen"
"""What LoadGen is called in the package index; the module is ``mlperf_loadgen``."""
PREFIX = "mlperf_log_"
"""What the names of LoadGen's own logs begin with."""
DETAIL = f"{PREFIX}detail.txt"
"""The log that holds LoadGen's figures, one JSON object a line behind :data:`MARK`."""
FLAG = "--loadgen-logs FOLDER"
"""What names another folder for the logs."""
MARK = ":::MLLOG "
"""What a line of that log begins with."""
POLL_S = 0.2
"""Seconds between two looks for an interrupt: a system may tell another thread of it, which wakes nobody."""
NO_AUDIT = ""
"""The file of an audit's settings. LoadGen would otherwise take ``audit.config`` in the current folder."""

Issue = Callable[[Sequence[int], Sequence[int]], None]
"""Takes the numbers by which answers name LoadGen's samples, and those of the images that they ask for."""


@dataclass(frozen=True)
class Query:
    """What LoadGen asks; only what the scenario uses counts.

    Attributes:
        scenario: ``SingleStream``, ``Offline`` or ``Server``.
        seconds: how long at least.
        count: number of queries at least.
        expected_ms: latency that is expected of one query, for ``SingleStream``: LoadGen prepares queries
            for it.
        rate: images a second that are expected in ``Offline``, and asked for in ``Server``.
        limit_ms: the latency that 99 of 100 queries must keep in ``Server``.
    """

    scenario: str
    seconds: float
    count: int
    expected_ms: float = 1.0
    rate: float = 1.0
    limit_ms: float = 0.0


@dataclass
class Failure:
    """The first exception that answering raised. LoadGen waits for every answer, so all are given
    nevertheless: after a failure, or once ``raised`` is set from outside, without an inference."""

    raised: BaseException | None = None

    def keep(self, exc: BaseException) -> None:
        self.raised = self.raised or exc


def require_loadgen() -> Any:
    """The module of LoadGen.

    Raises:
        RuntimeMissingError: it is not installed.
    """
    try:
        return import_module("mlperf_loadgen")
    except ImportError as exc:
        raise RuntimeMissingError(
            "MLPerf LoadGen is not installed, or cannot be loaded",
            why=exc,
            remedy='pip install "cmt-edge[loadgen]"',
        ) from exc


def read_version() -> str:
    """The version of LoadGen."""
    return metadata.version(PACKAGE)


@dataclass
class OneAtATime:
    """Answers each query at once, in the thread that asks. Every image lies where the runtime reads it, as in
    what ``bench`` measures of the model alone: LoadGen has images loaded before it takes times.

    Attributes:
        session: what answers.
        images: the batches of one image, float32 ``(N, 1, 3, H, W)``.
    """

    session: Session
    images: np.ndarray
    failure: Failure = field(default_factory=Failure)

    @contextmanager
    def answering(self, lg: Any) -> Iterator[Issue]:
        calls = [bind_inference(self.session, image) for image in self.images]

        def issue(samples: Sequence[int], images: Sequence[int]) -> None:
            for sample, image in zip(samples, images, strict=True):
                _attempt(calls[image], self.failure)
                _complete(lg, [sample])

        yield issue


@dataclass
class Pool:
    """Answers with as many threads as the runtime recommends, each with an input of its own, as ``bench``
    measures the throughput. The images of a query are answered in batches of the graph's size; the last one
    is filled up.

    Attributes:
        session: what answers.
        images: float32 ``(N, 1, 3, H, W)``.
        batch: images of one inference.
    """

    session: Session
    images: np.ndarray
    batch: int
    failure: Failure = field(default_factory=Failure)

    @contextmanager
    def answering(self, lg: Any) -> Iterator[Issue]:
        waiting: queue.SimpleQueue[tuple[Sequence[int], Sequence[int]] | None] = queue.SimpleQueue()

        def issue(samples: Sequence[int], images: Sequence[int]) -> None:
            for start in range(0, len(samples), self.batch):
                chosen = slice(start, start + self.batch)
                waiting.put((samples[chosen], images[chosen]))

        def work(answer: Callable[[Sequence[int]], object]) -> None:
            while (task := waiting.get()) is not None:
                samples, images = task
                _attempt(partial(answer, images), self.failure)
                _complete(lg, samples)

        answers = [self._make_answer() for _ in range(max(1, self.session.parallelism))]
        threads = [threading.Thread(target=work, args=(answer,)) for answer in answers]
        for thread in threads:
            thread.start()
        try:
            yield issue
        finally:
            for _ in threads:
                waiting.put(None)
            for thread in threads:
                thread.join()

    def _make_answer(self) -> Callable[[Sequence[int]], object]:
        """The inference of images by their numbers, at most a batch."""
        binding = self.session.bind((self.batch, *self.images.shape[2:]))
        binding.batch[:] = self.images[0]

        def answer(images: Sequence[int]) -> object:
            for place, image in enumerate(images):
                binding.batch[place] = self.images[image][0]
            return binding.run()

        return answer


def _attempt(call: Callable[[], object], failure: Failure) -> None:
    """Call, unless answering has failed already; an exception must not reach LoadGen, which cannot go on."""
    if failure.raised is not None:
        return
    try:
        call()
    except BaseException as exc:
        failure.keep(exc)


def _complete(lg: Any, samples: Sequence[int]) -> None:
    """Tell LoadGen that samples are answered; no answer's content is logged."""
    lg.QuerySamplesComplete([lg.QuerySampleResponse(sample, 0, 0) for sample in samples])


def run_test(asked: Query, answerer: OneAtATime | Pool, folder: Path) -> dict[str, Any]:
    """Let LoadGen run one test; its figures by their names in its log, which is kept in ``folder``.

    Raises:
        OutputError: the logs cannot be written.
        Exception: whatever answering raised.
    """
    lg = require_loadgen()
    with writing(folder, FLAG):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DETAIL).unlink(missing_ok=True)
    with answerer.answering(lg) as issue:
        _run_in_thread(lg, asked, issue, len(answerer.images), folder, answerer.failure)
    if answerer.failure.raised is not None:
        raise answerer.failure.raised
    return read_figures(folder / DETAIL)


def _run_in_thread(
    lg: Any,
    asked: Query,
    issue: Issue,
    images: int,
    folder: Path,
    failure: Failure,
) -> None:
    """Run a test in a thread, so that this one can be interrupted. An interrupt is a failure: everything that
    LoadGen asks must have an answer before it can be left."""
    system = lg.ConstructFastSUT(issue, _do_nothing)
    library = lg.ConstructQSL(images, images, _do_nothing, _do_nothing)
    settings, logs = _make_settings(lg, asked), _make_log_settings(lg, folder)
    ended = threading.Event()

    def work() -> None:
        try:
            lg.StartTestWithLogSettings(system, library, settings, logs, NO_AUDIT)
        finally:
            ended.set()

    try:
        threading.Thread(target=work).start()
    except RuntimeError as exc:  # the system starts no more threads
        failure.keep(exc)
        ended.set()
    except BaseException as exc:  # an interrupt, with the thread running
        failure.keep(exc)
    _wait(ended, failure)
    lg.DestroyFastSUT(system)
    lg.DestroyQSL(library)


def _wait(ended: threading.Event, failure: Failure) -> None:
    """Wait for the end of a test, whatever is raised here. ``Thread.join`` is no help: once interrupted, it
    takes a running thread for one that has ended."""
    while not ended.is_set():
        try:
            ended.wait(POLL_S)
        except BaseException as exc:
            failure.keep(exc)


def _do_nothing(*_: object) -> None:
    """What LoadGen calls to load and unload images, which are in memory, and at the end of the queries."""


def _make_settings(lg: Any, asked: Query) -> Any:
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, asked.scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = round(1e3 * asked.seconds)
    settings.min_query_count = asked.count
    settings.single_stream_expected_latency_ns = NS_PER_MS * asked.expected_ms
    settings.offline_expected_qps = asked.rate
    settings.server_target_qps = asked.rate
    settings.server_target_latency_ns = round(NS_PER_MS * asked.limit_ms)
    return settings


def _make_log_settings(lg: Any, folder: Path) -> Any:
    output = lg.LogOutputSettings()
    output.outdir = str(folder)
    output.prefix = PREFIX
    settings = lg.LogSettings()
    settings.log_output = output
    settings.enable_trace = False
    return settings


def read_figures(path: Path) -> dict[str, Any]:
    """The entries of LoadGen's detailed log by name; of a name that repeats, the last.

    Raises:
        OutputError: there is no such log, or it has no result: LoadGen could not write it.
    """
    found: dict[str, Any] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(MARK):
                entry = json.loads(line.removeprefix(MARK))
                found[entry["key"]] = entry["value"]
    except (OSError, ValueError, KeyError) as exc:
        raise _make_log_error(path, exc) from exc
    if "result_validity" not in found:
        raise _make_log_error(path, "it has no result")
    return found


def _make_log_error(path: Path, why: object) -> OutputError:
    return OutputError(
        "is no complete log of MLPerf LoadGen",
        where=path,
        why=why,
        remedy=f"name a writable folder with enough space: {FLAG}",
    )
