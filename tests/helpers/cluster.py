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
def ray_environment() -> Iterator[None]:
    """The variables of a cluster in tests: it calls nobody, asks for no token, and its workers import the
    helpers too."""
    before = dict(os.environ)
    tests = str(Path(__file__).parents[1])
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [before.get("PYTHONPATH")])]),
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


@contextmanager
def two_nodes() -> Iterator[Any]:
    """The cluster; one core a node."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets need a short path
    node = {"num_cpus": 1, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    with ray_environment():
        cluster = Cluster()
        try:
            cluster.add_node(**node, temp_dir=folder)
            cluster.add_node(**node)
            yield cluster
        finally:
            with contextlib.suppress(Exception):
                cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
