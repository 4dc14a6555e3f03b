"""Workers of a calibration that end themselves, or round differently than others."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from cmt_edge.calib.shard_worker import Assignment, ShardWorker

DEADLY_SHARD = 1
"""The number of the shard that ends workers."""


class DeadlyOnce(ShardWorker):
    """Is killed by a shard, unless another worker was killed before: a file says so."""

    def __call__(self, table: Any) -> Any:
        mark = Path(os.environ["CMT_EDGE_TEST_MARK"])
        if table["shard"][0].as_py() == DEADLY_SHARD and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)


class Slow(ShardWorker):
    """Takes a while for each shard."""

    def __call__(self, table: Any) -> Any:
        time.sleep(0.5)
        return super().__call__(table)


class OtherRounding(ShardWorker):
    """Computes something else in the last bit, as another processor may."""

    def __init__(self, assignment: Assignment) -> None:
        first, *rest = assignment.probe.batches
        changed = (first * (1 + 2.0**-23), *rest)
        super().__init__(replace(assignment, probe=replace(assignment.probe, batches=changed)))
