"""Rounds of workers on a cluster, until every task has its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import ClusterError
from .cluster import Cluster, ignoring_known_warnings
from .waiting import Waiting, await_cores, list_cores

FRUITLESS = 2
"""Rounds in a row without any result after which the next one is the last."""


@dataclass(frozen=True)
class Job:
    """What workers do.

    Attributes:
        worker: a class; Ray makes one object of it on each worker, with ``argument``, and calls it with the
            table of a task. It gives a table with one row or more, and raises nothing that can be told.
        argument: what a worker is made with.
        ship: gives ``argument`` with its large parts in Ray's store, so that they travel once.
        threads: cores of a worker.
        workers: the largest number of workers; ``None``: as many as the cluster has cores for.
        waiting: how long a cluster without free cores is waited for.
    """

    worker: type
    argument: Any
    ship: Callable[[Any, Any], Any]
    threads: int = 1
    workers: int | None = None
    waiting: Waiting = field(default_factory=Waiting)

    def count(self, ray: Any) -> int:
        """The number of workers in the cluster as it is now; each has its threads' cores on one node."""
        possible = max(1, sum(cores // self.threads for cores in list_cores(ray)))
        return min(possible, self.workers or possible)


class Rounds:
    """Rounds of workers, until every task has its result.

    A worker that ends is not started again, because its node may be gone: the tasks that it had are left to
    the next round, which has as many workers as the cluster then has cores for.
    """

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self._cluster, self._job = cluster, job
        self._shipped: Any = None
        self._fruitless = 0

    def run(self, tables: Sequence[Any]) -> Iterator[Any]:
        """One round: Arrow tables with the results of tasks, in any order; a table may hold those of several.

        Raises:
            ClusterError: the third round in a row gives nothing, or there are no free cores.
            ray.exceptions.RayError: what ended the workers of such a round.
        """
        ray = self._cluster.connect()
        if self._shipped is None:
            self._shipped = self._job.ship(ray, self._job.argument)
        is_last = self._fruitless >= FRUITLESS
        self._fruitless += 1
        try:
            await_cores(ray, self._job.threads, self._job.waiting)
            for block in self._run(ray, tables, is_last):
                if block.num_rows:
                    self._fruitless = 0
                    yield block
        except ray.exceptions.RayError:
            if self._fruitless > FRUITLESS:
                raise
        if self._fruitless > FRUITLESS:
            raise ClusterError("the workers of the cluster gave no answers", remedy=self._cluster.again)

    def _run(self, ray: Any, tables: Sequence[Any], is_last: bool) -> Iterator[Any]:
        job = self._job
        context = ray.data.DataContext.get_current()
        context.max_errored_blocks = 0 if is_last else -1
        data = ray.data.from_arrow(list(tables))
        with ignoring_known_warnings():
            results = data.map_batches(
                job.worker,
                fn_constructor_args=(self._shipped,),
                batch_size=None,
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=min(job.count(ray), len(tables))),
                num_cpus=job.threads,
                ray_remote_args_fn=_forbid_restarts,
            )
        yield from results.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def _forbid_restarts() -> dict[str, Any]:
    """What Ray is told of each worker."""
    return {"max_restarts": 0, "max_task_retries": 0}
