"""A Ray cluster: one that runs somewhere, or one on this machine for as long as the command runs."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from cmt_edge.startup import name_program

from ..cores import count_cores
from ..errors import ClusterError, CmtEdgeError, RuntimeMissingError
from ..signals import complete

LOCAL = "local"
"""The address that stands for a cluster on this machine, which ends with the command."""

MISSING_REMEDY = 'pip install "cmt-edge[ray]", here and on every node of the cluster'
"""The remedy where Ray is not installed."""

AGAIN = "run the same command again with --answers: what is answered is not computed again"
"""What to do once the cluster can go on."""

ADDRESSES = "give HOST:PORT of a cluster's head, or auto inside it; --ray alone starts one here"
"""The remedy where there is no cluster."""

TOO_LATE = "timed out during startup"
"""What Ray says where it did not start within its 30 seconds, as on a machine that is busy. It is tried once
more: its programs are in memory then."""

BUSY = "run it again once other programs leave a core free: Ray allows 30 seconds for its start; or "
"""What comes first where Ray was to be started on this machine."""

CONNECT_S = 10
"""Seconds in which the head of a cluster must answer."""

SILENT = logging.CRITICAL + 1
"""A level that no message has."""

SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
"""Environment variables of Ray unless the user set them: no usage statistics are sent, and workers see the
GPUs that they saw before, without a warning that this will change."""


KNOWN_WARNINGS = (
    "`use_push_based_shuffle` is deprecated",
    "`use_polars` is deprecated",
    "`use_arrow_tensor_v2` is deprecated",
    "`ray_remote_args_fn` is deprecated",
)
"""How warnings begin that Ray 2.60 gives of itself, and that nobody can heed: it has no other way to forbid
that a worker is started again."""


def import_ray() -> Any:
    """Ray with its part for data; raises :class:`RuntimeMissingError`."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import pyarrow  # noqa: F401
        import ray
        import ray.data  # noqa: F401
    except ImportError as exc:
        raise RuntimeMissingError("Ray is not installed", why=exc, remedy=MISSING_REMEDY) from exc
    return ray


@contextmanager
def ignoring_known_warnings() -> Iterator[None]:
    """In the body, :data:`KNOWN_WARNINGS` are not shown."""
    with warnings.catch_warnings():
        for message in KNOWN_WARNINGS:
            warnings.filterwarnings("ignore", message)
        yield


@contextmanager
def connected(address: str, cores: int = 1) -> Iterator[Any]:
    """Ray, connected to the cluster at ``address``, or to one that is started on this machine for
    :data:`LOCAL`. A connection that already exists is used and stays.

    A cluster on this machine has ``cores`` at least, what one worker asks for: as without a cluster, a model
    may compute with more threads than there are cores.

    Raises:
        RuntimeMissingError: Ray is not installed, or no cluster answers.
    """
    with ignoring_known_warnings(), contextlib.redirect_stdout(sys.stderr):  # Ray tells there what has ended
        ray = import_ray()
        _quieten(ray)
        if ray.is_initialized():
            yield ray
            return
        _require_address(address)
        require_answer(address)
        left = threading.Event()
        try:
            complete(partial(_connect, ray, address, cores), left)
            yield ray
        finally:
            with contextlib.suppress(Exception):
                ray.shutdown()
            left.set()


class Cluster:
    """A cluster that is connected to when it is first needed, and left at the end; a context manager.

    Attributes:
        again: what a user does once the cluster can go on.
    """

    def __init__(self, address: str, cores: int = 1, again: str = AGAIN) -> None:
        self.again = again
        self._address = address
        self._cores = cores
        self._stack = contextlib.ExitStack()
        self._ray: Any = None

    def connect(self) -> Any:
        """Ray; raises as :func:`connected` does."""
        if self._ray is None:
            self._ray = self._stack.enter_context(connected(self._address, self._cores))
        return self._ray

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        ray, self._ray = self._ray, None
        self._stack.close()
        if ray is not None and error is not None and isinstance(error, ray.exceptions.RayError):
            raise make_cluster_error(ray, error, self.again) from error


def _require_address(address: str) -> None:
    """Raise :class:`RuntimeMissingError` for Ray Client: Ray Data does not run through it."""
    if address.startswith("ray://"):
        raise RuntimeMissingError(
            "Ray Data does not run through Ray Client",
            where=address,
            remedy="run the command in the cluster: ray job submit --address http://HEAD:8265 --"
            f' "{name_program("verify")} ... --ray auto"',
        )


def require_answer(address: str) -> None:
    """Raise :class:`RuntimeMissingError` where nothing listens at HOST:PORT: Ray itself tries for a minute,
    and then ends the process."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as exc:
        raise RuntimeMissingError("no Ray cluster answers", where=address, why=exc, remedy=ADDRESSES) from exc


def _connect(ray: Any, address: str, cores: int) -> None:
    options: dict[str, Any] = {}
    if address == LOCAL:
        options = {"num_cpus": max(cores, count_cores()), "include_dashboard": False}
    for is_last in (address != LOCAL, True):
        try:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                configure_logging=True,
                **options,
            )
        except Exception as exc:  # Ray raises exceptions of all kinds, some of them of no kind
            if is_last or TOO_LATE not in str(exc):
                raise _make_start_error(address, exc) from exc
        else:
            return


def _make_start_error(address: str, exc: Exception) -> RuntimeMissingError:
    """The error where Ray could not be started here, or did not answer at ``address``."""
    first = (str(exc).strip() or type(exc).__name__).splitlines()[0]
    if address == LOCAL:
        return RuntimeMissingError("Ray could not be started here", why=first, remedy=f"{BUSY}{ADDRESSES}")
    return RuntimeMissingError("no Ray cluster answers", where=address, why=first, remedy=ADDRESSES)


def _quieten(ray: Any) -> None:
    """Ray Data neither draws its own progress nor prints plans and traces: errors are raised, and files in
    Ray's folder hold the rest."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray", "ray.data"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setLevel(SILENT)


def make_cluster_error(ray: Any, exc: BaseException, again: str = AGAIN) -> CmtEdgeError:
    """An error of Ray as one of ours: a :class:`ClusterError` where workers, nodes or memory failed.

    ``again`` is what a user does then."""
    kinds = ray.exceptions
    causes = list(_iterate_causes(exc))
    full = (kinds.ObjectStoreFullError, kinds.OutOfDiskError, kinds.OutOfMemoryError)
    if any(isinstance(cause, full) for cause in causes):
        return ClusterError(
            "the cluster's memory or disk is full",
            why=_find_first_line(causes[-1]),
            remedy=f"give its nodes more memory, or space where Ray spills objects; then {again}",
        )
    lost = (
        kinds.RayActorError,
        kinds.WorkerCrashedError,
        kinds.NodeDiedError,
        kinds.ObjectLostError,
        kinds.RaySystemError,
        kinds.GetTimeoutError,
    )
    if any(isinstance(cause, lost) for cause in causes):
        return ClusterError(
            "the cluster lost a worker or a node, and could not go on",
            why=_find_first_line(causes[-1]),
            remedy=again,
        )
    last = causes[-1]
    if isinstance(last, ImportError):
        return RuntimeMissingError(
            "cmt-edge is not installed on the workers", why=last, remedy=MISSING_REMEDY
        )
    return CmtEdgeError(
        f"internal failure on a worker: {_find_first_line(last)}",
        remedy=f"please report it, with what {name_program('doctor')} prints on that machine",
    )


def _iterate_causes(exc: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, as far as Ray tells."""
    seen: set[int] = set()
    current: BaseException | None = exc
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        inner = getattr(current, "cause", None) or current.__cause__
        current = inner if isinstance(inner, BaseException) else None


def _find_first_line(exc: BaseException) -> str:
    lines = [line for line in str(exc).strip().splitlines() if line.strip()]
    return f"{type(exc).__name__}: {lines[0] if lines else ''}"
