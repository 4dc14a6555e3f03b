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


def is_worker(pid: int) -> bool:
    """Whether a process holds a model for Ray."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read().startswith((b"ray::MapWorker", b"ray::_MapWorker"))
    except OSError:
        return False


def find_workers() -> list[int]:
    """Processes that hold a model for this test's cluster."""
    return [
        pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if is_worker(pid) and is_ours(pid)
    ]


def is_ours(pid: int) -> bool:
    """Whether a process is a descendant of this one."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            with open(f"/proc/{pid}/stat") as file:
                pid = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return False


@contextmanager
def ray_environment() -> Iterator[None]:
    """The variables of a cluster in tests: it calls nobody, asks for no token, shares no folder with another
    cluster, kills no worker because other programs take memory, and its workers import the helpers too. They
    get as much time as other tests: Ray's own setting (15) leaves them 3 % of a core that others want, too.
    SIGTERM is given back afterwards: Ray takes it when a program starts or joins a cluster."""
    before = dict(os.environ)
    on_sigterm = signal.getsignal(signal.SIGTERM)
    tests = str(Path(__file__).parents[1])
    folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets need a short path
    (folder / "ray").mkdir()  # Ray's own start makes it, and that of a node does not
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_TMPDIR": str(folder),
        "RAY_memory_monitor_refresh_ms": "0",
        "RAY_worker_niceness": "0",
        "PYTHONPATH": os.pathsep.join([tests, *filter(None, [before.get("PYTHONPATH")])]),
    }
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
        os.environ.clear()
        os.environ |= before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def two_nodes() -> Iterator[Any]:
    """The cluster; one core a node."""
    with ray_environment():
        cluster = _start_nodes()
        try:
            yield cluster
        finally:
            with contextlib.suppress(Exception):
                cluster.shutdown()


def _start_nodes() -> Any:
    """Two nodes. Ray gives a node 30 s to start, which a machine that is busy with other tests may not keep:
    a second try has these programs in memory."""
    from ray.cluster_utils import Cluster

    for is_last in (False, True):
        cluster = Cluster()
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES, include_dashboard=False)
            return cluster
        except Exception:
            with contextlib.suppress(Exception):
                cluster.shutdown()
            if is_last:
                raise
    return None
