"""Serves a bundle over HTTP.

python examples/service/service.py BUNDLE [--port 8080] [--workers 2] [--queue 16]

POST /predict with an encoded image as the body gives its classes as JSON; GET /health and GET /metrics are
for what watches the service.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
import uvicorn
from fastapi import FastAPI, Request, Response
from starlette.requests import ClientDisconnect

from cmt_edge import __version__
from cmt_edge.deploy import Prediction, Predictor
from cmt_edge.deploy.cli.console import (
    add_key_flag,
    add_runtime_flags,
    make_parser,
    read_runtime_flags,
    run_command,
)
from cmt_edge.deploy.cli.output import tell
from cmt_edge.deploy.cli.ranges import CLASS_COUNTS, THREADS, Range
from cmt_edge.deploy.errors import CmtEdgeError, ImageError

MAX_BODY = 16 << 20
"""The largest body of a request, in bytes."""

BODY_S = 10.0
"""Seconds in which a body must have arrived."""

CONNECTIONS = 64
"""Connections beyond those whose images wait or are computed; more get 503 from the server itself. They bound
the memory for bodies: each may hold one."""

STOP_S = 30.0
"""Seconds that the service waits for its last answers when it is asked to stop."""

PORTS = Range(0, 65535)
"""Ports of TCP; 0 lets the system choose one."""

WAITING = Range(0, 4096)
"""How many images may wait."""


LOG = logging.getLogger("uvicorn.error")
"""The server's log, which goes to standard error."""


class Refusal(Exception):
    """A request that gets no prediction."""

    def __init__(self, status: int, why: str) -> None:
        self.status, self.why = status, why
        super().__init__(why)


class Metrics:
    """What ``/metrics`` shows, in Prometheus' text format."""

    def __init__(self, predictor: Predictor) -> None:
        self.registry = registry = prometheus.CollectorRegistry()
        self.requests = prometheus.Counter(
            "cmt_edge_requests", "Requests for a prediction, by status.", ["status"], registry=registry
        )
        self.held = prometheus.Gauge(
            "cmt_edge_images_held", "Images that wait or are computed.", registry=registry
        )
        self.seconds = prometheus.Histogram(
            "cmt_edge_answer_seconds",
            "Seconds from the arrival of an image to its prediction.",
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=registry,
        )
        served = {"version": __version__, "runtime": predictor.info.runtime, "device": predictor.info.device}
        prometheus.Info("cmt_edge", "What serves the bundle.", registry=registry).info(served)

    def write(self) -> bytes:
        """The page."""
        return prometheus.generate_latest(self.registry)


class Service:
    """A Predictor behind a bounded queue.

    Attributes:
        predictor: answers; it is thread-safe, so the threads share it.
        is_stopping: whether no more images are taken.
    """

    def __init__(self, predictor: Predictor, workers: int = 2, queue: int = 16, topk: int = 5) -> None:
        """``workers`` images are computed at once, and ``queue`` more may wait."""
        self.predictor, self.topk = predictor, topk
        self.metrics = Metrics(predictor)
        self.is_stopping = False
        self._pool = ThreadPoolExecutor(workers, "predict")
        self._room = threading.BoundedSemaphore(workers + queue)

    async def answer(self, image: bytes) -> Prediction:
        """The prediction for an encoded image.

        Raises:
            Refusal: the queue is full, or the service is stopping.
            CmtEdgeError: as :meth:`Predictor.__call__`.
        """
        if self.is_stopping:
            raise Refusal(503, "the service is stopping")
        if not self._room.acquire(blocking=False):
            raise Refusal(503, "the queue is full")
        self.metrics.held.inc()
        start = time.perf_counter()
        try:
            future = self._pool.submit(self.predictor, image)
        except RuntimeError:  # the pool has just been shut down
            self._leave()
            raise Refusal(503, "the service is stopping") from None
        future.add_done_callback(self._leave)
        prediction = await asyncio.wrap_future(future)
        self.metrics.seconds.observe(time.perf_counter() - start)
        return prediction

    def _leave(self, future: Future[Prediction] | None = None) -> None:
        """Make room for the next image."""
        self.metrics.held.dec()
        self._room.release()

    def stop(self) -> None:
        """Take no more images, and wait for the answers to those that were taken."""
        self.is_stopping = True
        self._pool.shutdown(wait=True)


async def read_body(request: Request) -> bytes:
    """The body of a request; raises :class:`Refusal` where it is too large or comes too slowly."""

    async def read() -> bytes:
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                raise Refusal(413, f"an image may have {MAX_BODY} bytes")
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_S)
    except ClientDisconnect:
        raise Refusal(400, "the client has gone") from None
    except asyncio.TimeoutError:
        raise Refusal(408, f"the image did not arrive within {BODY_S:g} seconds") from None


def describe(prediction: Prediction, topk: int, wants_logits: bool) -> dict[str, Any]:
    """What a client gets. JSON keeps every bit of a float32 number."""
    top = [{"label": label, "probability": p} for label, p in prediction.top(topk)]
    found: dict[str, Any] = {"label": prediction.label, "top": top}
    return found | {"logits": prediction.logits.tolist()} if wants_logits else found


def make_response(status: int, content: dict[str, Any]) -> Response:
    """A response in JSON; clients of a busy service are told when to come again."""
    headers = {"Retry-After": "1"} if status == 503 else {}
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return Response(text, status, headers, media_type="application/json")


def make_app(service: Service) -> FastAPI:
    """The web application; it stops the service when the server ends."""

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.stop)

    # FastAPI would send traces to wherever variables of the environment say
    app = FastAPI(title="cmt-edge", version=__version__, lifespan=live, telemetry={"auto_configure": False})

    @app.post("/predict")
    async def predict(request: Request, logits: bool = False) -> Response:
        try:
            prediction = await service.answer(await read_body(request))
            status, content = 200, describe(prediction, service.topk, logits)
        except Refusal as refusal:
            status, content = refusal.status, {"error": refusal.why}
        except CmtEdgeError as error:
            status = 400 if isinstance(error, ImageError) else 500
            content = {"error": error.what, "why": error.why, "remedy": error.remedy}
        except Exception:
            LOG.exception("a request failed")
            status, content = 500, {"error": "internal failure; the service's log has its trace"}
        service.metrics.requests.labels(str(status)).inc()
        return make_response(status, content)

    @app.get("/health")
    async def health() -> Response:
        if service.is_stopping:
            return make_response(503, {"status": "stopping"})
        info = service.predictor.info
        served = {"runtime": info.runtime, "device": info.device, "classes": len(service.predictor.labels)}
        return make_response(200, {"status": "ok", "version": __version__, **served})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.write(), media_type=prometheus.CONTENT_TYPE_LATEST)

    return app


def make_server(service: Service, connections: int) -> uvicorn.Server:
    """An HTTP server that ends cleanly: it finishes what it has begun."""
    config = uvicorn.Config(
        make_app(service),
        log_level="warning",
        access_log=False,
        limit_concurrency=connections,
        timeout_graceful_shutdown=int(STOP_S),
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket whose connections send every part of an answer at once (``TCP_NODELAY``, which they
    inherit). The event loop sets that only on sockets that it makes itself; without it the body of an answer
    waits 40 ms for the client's word that its head has arrived."""
    listening = socket.create_server((host, port))
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(args: argparse.Namespace) -> int:
    """Load the bundle and serve it until SIGTERM or Ctrl-C; returns the exit code."""
    with Predictor.load(
        args.bundle,
        **read_runtime_flags(args),
        key=args.key,
        throughput=args.workers > 1,
    ) as predictor:
        service = Service(predictor, args.workers, args.queue, args.topk)
        server = make_server(service, args.workers + args.queue + CONNECTIONS)
        with listen(args.host, args.port) as listening:
            host, port = listening.getsockname()[:2]
            tell(f"listening on http://{host}:{port}")
            try:
                server.run([listening])
            except KeyboardInterrupt:  # the server passes the signal on once its last answer is sent
                tell("stopped; every image that was taken has been answered")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The flags."""
    p = make_parser("service.py", "Serve a bundle over HTTP: POST an encoded image to /predict.")
    p.add_argument("bundle", type=Path)
    p.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    p.add_argument(
        "--port", type=PORTS.parse_whole, default=8080, help="0 lets the system choose (default 8080)"
    )
    p.add_argument(
        "--workers",
        type=THREADS.parse_whole,
        default=2,
        help="images that are computed at once (default 2)",
    )
    p.add_argument("--queue", type=WAITING.parse_whole, default=16, help="images that may wait (default 16)")
    p.add_argument(
        "--topk", type=CLASS_COUNTS.parse_whole, default=5, help="classes of an answer (default 5)"
    )
    add_runtime_flags(p)
    add_key_flag(p)
    return p


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    return run_command(serve, build_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
