"""One model over all images: tasks for workers, answers in a folder, another round for what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..children import read_error
from ..errors import ClusterError, CmtEdgeError, DataError, ImageError
from .answers import AnswersFolder, Part
from .cluster import AGAIN, Cluster, ignoring_known_warnings
from .records import Record, Task, divide
from .waiting import Waiting, await_cores, list_cores
from .worker import Answered, Answerer, Subject, iterate_answered, make_task_table

TASK_IMAGES = 128
"""Images of a task, about: many enough that Ray's work for a task does not count."""

FRUITLESS = 2
"""Rounds in a row without any answer after which the next one is the last."""

SHOWN_IMAGES = 3
"""The largest number of unreadable images that an error names."""


@dataclass(frozen=True)
class Answers:
    """What a model gave for all images, in their order.

    Attributes:
        digests: of the images' contents.
        logits: float32 ``(N, classes)``.
        workers: where they were computed; each is JSON of :func:`.worker.describe_worker`.
        computed: number of images that were not there before.
    """

    digests: list[str]
    logits: np.ndarray
    workers: list[str]
    computed: int


@dataclass(frozen=True)
class Plan:
    """How images are answered.

    Attributes:
        records: the images.
        chunk: number of images that go through the model at once.
        workers: number of workers; ``None``: as many as the cluster has cores for.
        labels: of the model's classes, for the table.
        progress: called with images done and total.
        answerer: the class that answers a task on a worker.
        waiting: how long a cluster without free cores is waited for.
    """

    records: Sequence[Record]
    chunk: int
    workers: int | None
    labels: Sequence[str]
    progress: Callable[[int, int], None] | None = None
    answerer: type[Answerer] = Answerer
    waiting: Waiting = field(default_factory=Waiting)

    def count(self, ray: Any, subject: Subject) -> int:
        """The number of workers in the cluster as it is now; each has its threads' cores on one node."""
        possible = max(1, sum(cores // (subject.threads or 1) for cores in list_cores(ray)))
        return min(possible, self.workers or possible)


def answer_all(cluster: Cluster, subject: Subject, plan: Plan, folder: AnswersFolder) -> Answers:
    """Answer every image that ``folder`` has no answer to.

    Args:
        cluster: is connected to only if an answer is missing.
        subject: the model, with its bundle as bytes.
        plan: how the images are answered.
        folder: the answers that there are.

    Raises:
        ImageError, DataError: images cannot be read; all others are answered.
        ray.exceptions.RayError: the cluster cannot go on; what was answered stays in ``folder``.
        CmtEdgeError: what a worker raised, or there are no free cores.
    """
    tasks = list(divide(plan.records, plan.chunk, TASK_IMAGES))
    parts = {task.number: part for task in tasks if (part := folder.read(task)) is not None}
    kept = sum(len(tasks[number].records) for number in parts)
    failures: dict[int, list[str | None]] = {}
    _report(plan, kept)
    rounds = _Rounds(cluster, subject, plan)
    while missing := [task for task in tasks if task.number not in parts and task.number not in failures]:
        for answered in rounds.run(missing):
            _take(answered, tasks, parts, failures, folder, plan)
    _raise_failures(tasks, failures)
    ordered = [parts[task.number] for task in tasks]
    return Answers(
        [digest for part in ordered for digest in part.digests],
        np.concatenate([part.logits for part in ordered]),
        sorted({part.worker for part in ordered}),
        len(plan.records) - kept,
    )


class _Rounds:
    """Rounds of workers, until every task has its answers.

    A worker that ends is not started again, because its node may be gone: the tasks that it had are left to
    the next round, which has as many workers as the cluster then has cores for.
    """

    def __init__(self, cluster: Cluster, subject: Subject, plan: Plan) -> None:
        self._cluster, self._subject, self._plan = cluster, subject, plan
        self._is_shipped = False
        self._fruitless = 0

    def run(self, tasks: Sequence[Task]) -> Iterator[Answered]:
        """One round: the answers to tasks, in any order. After :data:`FRUITLESS` rounds in a row without any,
        what ends the workers is raised as Ray's error."""
        ray = self._cluster.connect()
        if not self._is_shipped:
            self._subject = replace(self._subject, bundle=ray.put(self._subject.bundle))
            self._is_shipped = True
        is_last = self._fruitless >= FRUITLESS
        self._fruitless += 1
        try:
            await_cores(ray, self._subject.threads or 1, self._plan.waiting)
            for answered in self._run(ray, tasks, is_last):
                self._fruitless = 0
                yield answered
        except ray.exceptions.RayError:
            if self._fruitless > FRUITLESS:
                raise
        if self._fruitless > FRUITLESS:
            raise ClusterError("the workers of the cluster gave no answers", remedy=AGAIN)

    def _run(self, ray: Any, tasks: Sequence[Task], is_last: bool) -> Iterator[Answered]:
        subject, plan = self._subject, self._plan
        workers = min(plan.count(ray, subject), len(tasks))
        context = ray.data.DataContext.get_current()
        context.max_errored_blocks = 0 if is_last else -1
        data = ray.data.from_arrow([make_task_table(task) for task in tasks])
        with ignoring_known_warnings():
            answers = data.map_batches(
                plan.answerer,
                fn_constructor_args=(subject,),
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=workers),
                num_cpus=subject.threads or 1,
                ray_remote_args_fn=_forbid_restarts,
            )
        for block in answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from iterate_answered(block)


def _forbid_restarts() -> dict[str, Any]:
    """What Ray is told of each worker."""
    return {"max_restarts": 0, "max_task_retries": 0}


def _take(
    answered: Answered,
    tasks: Sequence[Task],
    parts: dict[int, Part],
    failures: dict[int, list[str | None]],
    folder: AnswersFolder,
    plan: Plan,
) -> None:
    """Keep the answers to one task."""
    if answered.fatal is not None:
        raise read_error(json.loads(answered.fatal))
    task = tasks[answered.task]
    if any(answered.errors):
        failures[task.number] = answered.errors
    else:
        part = Part(answered.digests, answered.logits, answered.worker)
        if len(part.logits) != len(task.records):
            raise CmtEdgeError(f"a worker gave {len(part.logits)} answers to {len(task.records)} images")
        folder.write(task, part, plan.labels)
        parts[task.number] = part
    done = sum(len(tasks[number].records) for number in (*parts, *failures))
    _report(plan, done)


def _report(plan: Plan, done: int) -> None:
    if plan.progress:
        plan.progress(done, len(plan.records))


def _raise_failures(tasks: Sequence[Task], failures: dict[int, list[str | None]]) -> None:
    """Raise the error of the first image that cannot be read, with the names of more."""
    found = [
        (tasks[number].records[place].name, error)
        for number in sorted(failures)
        for place, error in enumerate(failures[number])
        if error is not None
    ]
    if not found:
        return
    first = read_error(json.loads(found[0][1]))
    if len(found) > 1:
        kind = ImageError if isinstance(first, ImageError) else DataError
        names = ", ".join(name for name, _ in found[1 : 1 + SHOWN_IMAGES])
        rest = len(found) - 1 - SHOWN_IMAGES
        more = f" and {rest} more" if rest > 0 else ""
        why = f"{first.why}; " if first.why else ""
        raise kind(first.what, where=first.where, why=f"{why}so are {names}{more}", remedy=first.remedy)
    raise first
