"""Serves a bundle with Ray Serve: batches, as many replicas as the load needs, and health checks.

python examples/ray_serve.py BUNDLE [--port 8000] [--replicas 1:4] [--address HOST:PORT]

POST /predict with an encoded image as the body gives its classes as JSON; GET /health says whether a replica
answers. ``examples/service/load.py`` asks it, too.

Two deployments: the *front* takes requests, and the *replicas* answer them, each with a loaded model. A
replica may die, with its process or its node: the front gives what it had not answered to another one. To
answer an image twice changes nothing, so no request is lost that the front has taken. What the front does not
take gets 503. A front that dies loses what it has taken: ask again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would send figures of its use to its makers

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from cmt_edge.deploy import Prediction, Predictor
from cmt_edge.deploy.cli.console import add_key_flag, make_parser, run_command
from cmt_edge.deploy.cli.output import tell
from cmt_edge.deploy.cli.ranges import THREADS, Range
from cmt_edge.deploy.errors import ImageError, RuntimeMissingError
from cmt_edge.deploy.scale.cluster import require_answer
from cmt_edge.deploy.signals import complete

MAX_BODY = 16 << 20
"""The largest body of a request, in bytes."""
ANSWER_S = 60.0
"""Seconds after which a request that the front took is given up: it gets 504. Ray took 39 s of them to find
that a replica hung, and to end it."""
PAUSE_S = 0.05
"""Seconds that the front waits before it gives a request to another replica."""
HEALTH_S = 5.0
"""Seconds between two health checks of a replica, and that each may take; Ray replaces one that has failed in
three."""
UPSCALE_S = 5.0
"""Seconds for which the load must ask for more replicas until Ray starts them."""
PER_REPLICA = 2
"""Batches that a replica holds on average before Ray starts another one: one computed, one filling."""

PORTS = Range(0, 65535)
"""Ports of TCP."""
BATCHES = Range(1, 4096)
"""Images of a batch."""
WAITS = Range(0, 10_000)
"""Milliseconds that an image may wait for others."""
QUEUES = Range(1, 1_000_000)
"""Requests that may wait in the front."""
PREFIX = "cmt-edge"
"""Name of the application in Ray Serve."""

Answer = tuple[int, dict[str, Any]]
"""Status of HTTP and content."""


class Replica:
    """A loaded bundle; answers images in batches."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.predictor = Predictor.load(
            settings["bundle"],
            backend=settings["backend"],
            threads=settings["threads"],
            key=settings["key"],
        )
        self.answer.set_max_batch_size(settings["batch"])
        self.answer.set_batch_wait_timeout_s(settings["wait_s"])

    @serve.batch
    async def answer(self, images: list[bytes]) -> list[Answer]:
        """One answer an image, in the same order; in a thread, so that health checks go on meanwhile."""
        return await asyncio.to_thread(self._predict, images)

    def _predict(self, images: Sequence[bytes]) -> list[Answer]:
        """A damaged image spoils its own answer and no other."""
        try:
            return [self._describe(prediction) for prediction in self.predictor.predict(images)]
        except ImageError:
            return [self._predict_one(image) for image in images]

    def _predict_one(self, image: bytes) -> Answer:
        try:
            return self._describe(self.predictor(image))
        except ImageError as error:
            return 400, {"error": error.what, "why": error.why, "remedy": error.remedy}

    @staticmethod
    def _describe(prediction: Prediction) -> Answer:
        top = [{"label": label, "probability": p} for label, p in prediction.top(5)]
        logits = prediction.logits.tolist()
        return 200, {"label": prediction.label, "top": top, "logits": logits, "process": os.getpid()}

    def describe_runtime(self) -> Answer:
        """What ``/health`` shows."""
        info = self.predictor.info
        return 200, {"status": "ok", "runtime": info.runtime, "device": info.device}

    def check_health(self) -> None:
        """Ray calls this and replaces a replica for which it raises: answer an image, whatever it shows."""
        size = self.predictor.spec.size
        self.predictor(np.zeros((size, size, 3), np.uint8))


class Front:
    """Takes requests, and gives each to replicas until one has answered."""

    def __init__(self, replicas: Any) -> None:
        self.replicas = replicas

    async def __call__(self, request: Request) -> Response:
        try:
            status, content = await self._route(request)
        except ClientDisconnect:
            status, content = 400, {"error": "the client has gone"}
        headers = {"Retry-After": "1"} if status == 503 else {}
        return Response(json.dumps(content), status, headers, media_type="application/json")

    async def _route(self, request: Request) -> Answer:
        if request.method == "GET" and request.url.path == "/health":
            return await self._ask("describe_runtime")
        if request.method != "POST" or request.url.path != "/predict":
            return 404, {"error": "POST an encoded image to /predict, or GET /health"}
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return 413, {"error": f"an image may have {MAX_BODY} bytes"}
        return await self._ask("answer", bytes(body))

    async def _ask(self, method: str, *arguments: object) -> Answer:
        """The answer of the first replica that lives to give one; with it, how many were asked."""
        until, asked = time.monotonic() + ANSWER_S, 0
        while (left := until - time.monotonic()) > 0:
            asked += 1
            try:
                call = getattr(self.replicas, method).remote(*arguments)
                status, content = await asyncio.wait_for(_wait(call), left)
                return status, content | {"asked": asked}
            except BackPressureError:
                return 503, {"error": "the queue is full"}
            except (RayActorError, DeploymentUnavailableError):  # its process or its node has gone
                await asyncio.sleep(PAUSE_S)
            except asyncio.TimeoutError:
                break
        return 504, {"error": f"no replica has answered within {ANSWER_S:g} seconds"}


async def _wait(response: Any) -> Answer:
    """The result of a call; Ray's own object is no coroutine."""
    found: Answer = await response
    return found


def make_app(args: argparse.Namespace) -> Any:
    """Both deployments with their settings."""
    least, most = args.replicas
    held = PER_REPLICA * args.batch
    settings = {
        "bundle": str(args.bundle.resolve()),
        "backend": args.backend,
        "threads": args.threads,
        "key": args.key and str(args.key.resolve()),
        "batch": args.batch,
        "wait_s": args.wait_ms / 1000,
    }
    replicas = serve.deployment(
        Replica,
        max_ongoing_requests=2 * held,
        max_queued_requests=args.queue,
        autoscaling_config={
            "min_replicas": least,
            "max_replicas": most,
            "target_ongoing_requests": held,
            "upscale_delay_s": UPSCALE_S,
        },
        ray_actor_options={"num_cpus": args.threads},
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=HEALTH_S,
    )
    room = args.queue + 2 * held * most
    front = serve.deployment(Front, max_ongoing_requests=room, ray_actor_options={"num_cpus": 0})
    return front.bind(replicas.bind(settings))


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    Predictor.load(args.bundle, backend=args.backend, key=args.key).close()  # say here what is wrong with it
    left = threading.Event()
    try:
        complete(partial(_connect, args), left)
        serve.start(http_options={"host": args.host, "port": args.port})
        serve.run(make_app(args), name=PREFIX, route_prefix="/")
        tell(f"listening on http://{args.host}:{args.port}")
        while True:
            time.sleep(1)
    finally:
        if ray.is_initialized():  # Ray Serve would start a cluster to look there
            with suppress(RayError, RayServeException):  # it did not come so far
                serve.delete(PREFIX)  # a cluster of others keeps what else it serves
        ray.shutdown()
        left.set()


def _connect(args: argparse.Namespace) -> None:
    """Connect to the cluster, or start one."""
    here = {} if args.address else {"include_dashboard": False}
    try:
        if args.address:
            require_answer(args.address)  # Ray itself would wait for ever
        ray.init(args.address or "local", log_to_driver=args.verbose, configure_logging=args.verbose, **here)
    except Exception as exc:  # Ray raises exceptions of all kinds
        raise RuntimeMissingError(
            "no Ray cluster answers" if args.address else "Ray could not be started here",
            where=args.address,
            why=exc.why if isinstance(exc, RuntimeMissingError) else exc,
            remedy="start one with: ray start --head; or leave --address out"
            if args.address
            else "run it again once other programs leave a core free: Ray allows 30 seconds for its start",
        ) from exc


def parse_replicas(text: str) -> tuple[int, int]:
    """``MIN:MAX``, or one number for both."""
    try:
        least, most = (int(part) for part in (text if ":" in text else f"{text}:{text}").split(":"))
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no MIN:MAX with 1 <= MIN <= MAX")
    return least, most


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    p = make_parser("ray_serve.py", "Serve a bundle with Ray Serve: POST an encoded image to /predict.")
    p.add_argument("bundle", type=Path, help="a folder that every node of the cluster reaches by this name")
    p.add_argument("--address", help="a Ray cluster, HOST:PORT or auto (default: one of its own, here)")
    p.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    p.add_argument("--port", type=PORTS.parse_whole, default=8000, help="port to listen on (default 8000)")
    p.add_argument(
        "--replicas",
        type=parse_replicas,
        default=(1, 4),
        metavar="MIN:MAX",
        help="how many loaded models; Ray starts and stops them as the load needs (default 1:4)",
    )
    p.add_argument("--threads", type=THREADS.parse_whole, default=1, help="CPUs of a replica (default 1)")
    p.add_argument("--batch", type=BATCHES.parse_whole, default=8, help="largest batch (default 8)")
    p.add_argument(
        "--wait-ms",
        type=WAITS.parse_whole,
        default=5,
        help="milliseconds that an image waits for others to make a batch with (default 5)",
    )
    p.add_argument("--queue", type=QUEUES.parse_whole, default=64, help="requests that may wait (default 64)")
    p.add_argument("--backend", help="runtime to use (default: the one of the bundle's format)")
    add_key_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_command(run, build_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
