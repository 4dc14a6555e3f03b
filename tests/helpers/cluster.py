"""A real Ray cluster of two nodes on this machine, and workers that are slow or end themselves."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cmt_edge.deploy.scale.worker import Answerer

STORE_BYTES = 80 << 20
"""Ray's store for objects, bytes a node; it takes no less than 75 MiB."""

DEADLY = "deadly"
"""What the name of an image holds that ends the worker."""


class Slow(Answerer):
    """Takes a while for each task."""

    def __call__(self, table: Any) -> Any:
        time.sleep(0.3)
        return super().__call__(table)


class Deadly(Answerer):
    """Is killed by some images, as by a runtime that crashes."""

    def __call__(self, table: Any) -> Any:
        if any(DEADLY.encode() in name for name in table["name"].to_pylist()):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(table)


@contextmanager
def two_nodes() -> Iterator[Any]:
    """The cluster; one core a node. Workers import the helpers too."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
    before = dict(os.environ)
    tests = str(Path(__file__).parents[1])
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [before.get("PYTHONPATH")])]),
    }
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    cluster = Cluster()
    try:
        cluster.add_node(**node, temp_dir=folder)
        cluster.add_node(**node)
        yield cluster
    finally:
        with contextlib.suppress(Exception):
            cluster.shutdown()
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def one_node(cores: int) -> Iterator[Any]:
    """Ray on one node with so many cores, real or not. Workers import the helpers too."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)  # Ray takes it for itself, and keeps it
    before = dict(os.environ)
    tests = str(Path(__file__).parents[1])
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [before.get("PYTHONPATH")])]),
    }
    try:
        ray.init(
            address="local",  # whatever else runs on this machine
            num_cpus=cores,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="CRITICAL",
        )
        yield ray
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, handler)
        os.environ.clear()
        os.environ |= before
