"""One model over all images: tasks for workers, answers in a folder, another round for what is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..children import read_error
from ..errors import CmtEdgeError
from .answers import AnswersFolder, Part
from .cluster import Cluster
from .failures import raise_failures
from .records import Record, Task, divide
from .rounds import Job, Rounds
from .waiting import Waiting
from .worker import Answered, Answerer, Subject, iterate_answered, make_task_table

TASK_IMAGES = 128
"""Images of a task, about: many enough that Ray's work for a task does not count."""


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
    job = Job(plan.answerer, subject, _ship, subject.threads or 1, plan.workers, plan.waiting)
    rounds = Rounds(cluster, job)
    while missing := [task for task in tasks if task.number not in parts and task.number not in failures]:
        for block in rounds.run([make_task_table(task) for task in missing]):
            for answered in iterate_answered(block):
                _take(answered, tasks, parts, failures, folder, plan)
    raise_failures(_list_failures(tasks, failures))
    ordered = [parts[task.number] for task in tasks]
    return Answers(
        [digest for part in ordered for digest in part.digests],
        np.concatenate([part.logits for part in ordered]),
        sorted({part.worker for part in ordered}),
        len(plan.records) - kept,
    )


def _ship(ray: Any, subject: Subject) -> Subject:
    """The subject with its bundle in Ray's store."""
    return replace(subject, bundle=ray.put(subject.bundle))


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


def _list_failures(
    tasks: Sequence[Task],
    failures: dict[int, list[str | None]],
) -> list[tuple[str, str]]:
    """The images that cannot be read, each with its error, in order."""
    return [
        (tasks[number].records[place].name, error)
        for number in sorted(failures)
        for place, error in enumerate(failures[number])
        if error is not None
    ]
