"""The cluster on which an export calibrates, and on which candidates answer labelled images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cmt_edge.calib import CalibrationSet
from cmt_edge.calib.shards import ClusterStatistics
from cmt_edge.calib.statistics import Statistics
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.scale.cluster import AGAIN, Cluster, import_ray, require_answer
from cmt_edge.deploy.scale.waiting import LIMIT_S, Waiting

from ..config import ExportConfig


def check_cluster(config: ExportConfig) -> None:
    """Raise :class:`~cmt_edge.deploy.errors.RuntimeMissingError` where a cluster was asked for, and Ray is
    not installed or nothing answers at the address."""
    if config.ray is not None:
        import_ray()
        require_answer(config.ray)


@contextmanager
def open_cluster(config: ExportConfig) -> Iterator[Cluster | None]:
    """The cluster that was asked for, which is connected to when it is first needed; ``None`` without
    one."""
    if config.ray is None:
        yield None
        return
    again = AGAIN if config.answers_elsewhere else "run the same command again"
    with Cluster(config.ray, config.threads or 1, again) as cluster:
        yield cluster


def make_statistics(
    cluster: Cluster | None,
    config: ExportConfig,
    data: CalibrationSet,
    progress: Progress,
) -> Statistics | None:
    """What measures on the calibration images; ``None`` for this process."""
    if cluster is None:
        return None
    return ClusterStatistics(
        cluster,
        data,
        config.preprocess,
        workers=config.workers,
        progress=progress.count,
        waiting=make_waiting(config, progress),
    )


def make_waiting(config: ExportConfig, progress: Progress) -> Waiting:
    """How long a cluster without free cores is waited for."""
    return Waiting(LIMIT_S if config.ray_wait is None else config.ray_wait, progress.tell)
