"""Asks a running service a fixed number of times, from several clients at once, and says how it answered.

python examples/service/load.py http://127.0.0.1:8080 ship.png --requests 200 --clients 4
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from cmt_edge.deploy.cli.console import make_parser, run_command
from cmt_edge.deploy.cli.output import say
from cmt_edge.deploy.cli.ranges import Range
from cmt_edge.deploy.errors import GateError, InputError
from cmt_edge.deploy.report import to_json

TIME_LIMIT_S = 30.0
"""Seconds after which a request has failed."""

LEAST_FOR_P99 = 1000
"""Answers from which on the 99th percentile is told; of fewer it would be the chance of a few."""

EXPECTED = (200, 503)
"""Statuses of a service that works: an answer, or a full queue."""

COUNTS = Range(1, 1_000_000)
"""Numbers of requests and of clients."""


@dataclass(frozen=True)
class Reply:
    """What a request got: its place in the order of all requests, status, content and duration in seconds."""

    number: int
    status: int
    content: dict[str, Any]
    seconds: float


def ask(url: str, images: Sequence[bytes], requests: int, clients: int) -> list[Reply]:
    """Send exactly ``requests`` requests from ``clients`` threads, the images by turns.

    Each thread has one connection. The replies come in the order of the requests. Raises ``OSError`` where
    the service does not answer.
    """
    address = urlsplit(url).netloc
    numbers = itertools.count()

    def work(_: int) -> list[Reply]:
        connection = http.client.HTTPConnection(address, timeout=TIME_LIMIT_S)
        replies = []
        try:
            while (number := next(numbers)) < requests:
                start = time.perf_counter()
                connection.request("POST", "/predict?logits=true", images[number % len(images)])
                response = connection.getresponse()
                content = json.loads(response.read())
                replies.append(Reply(number, response.status, content, time.perf_counter() - start))
        finally:
            connection.close()
        return replies

    with ThreadPoolExecutor(clients) as pool:
        replies = itertools.chain.from_iterable(pool.map(work, range(clients)))
        return sorted(replies, key=lambda reply: reply.number)


def summarise(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """Figures of a load test that took ``seconds``; times in milliseconds."""
    answered = sorted(1000 * reply.seconds for reply in replies if reply.status == 200)
    found: dict[str, Any] = {
        "requests": len(replies),
        "statuses": dict(sorted(Counter(str(reply.status) for reply in replies).items())),
        "answers_per_s": round(len(answered) / seconds, 1),
    }
    if len(answered) > 1:
        cuts = statistics.quantiles(answered, n=100, method="inclusive")
        found |= {
            "p50_ms": round(cuts[49], 2),
            "p95_ms": round(cuts[94], 2),
            **({"p99_ms": round(cuts[98], 2)} if len(answered) >= LEAST_FOR_P99 else {}),
            "max_ms": round(answered[-1], 2),
        }
    return found


def run(args: argparse.Namespace) -> int:
    """Load the service and print the figures; returns the exit code."""
    images = [path.read_bytes() for path in args.images]
    start = time.perf_counter()
    try:
        replies = ask(args.url, images, args.requests, args.clients)
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise InputError("the service does not answer", where=args.url, why=exc, remedy="start it") from exc
    found = summarise(replies, time.perf_counter() - start)
    say(to_json(found) if args.json else "\n".join(f"{name:<14} {value}" for name, value in found.items()))
    if wrong := [reply for reply in replies if reply.status not in EXPECTED]:
        what = f"{len(wrong)} of {len(replies)} requests failed"
        raise GateError(what, why=f"{wrong[0].status}: {wrong[0].content}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    p = make_parser("load.py", "Ask a running service a fixed number of times, and print how it answered.")
    p.add_argument("url", help="the service, http://HOST:PORT")
    p.add_argument("images", type=Path, nargs="+", help="encoded images, sent by turns")
    p.add_argument("--requests", type=COUNTS.parse_whole, default=200, help="how many in all (default 200)")
    p.add_argument("--clients", type=COUNTS.parse_whole, default=4, help="how many at once (default 4)")
    return run_command(run, p.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
