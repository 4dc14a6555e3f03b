"""Latency of the example service at several numbers of clients.

usage: python benchmarks/service_load.py BUNDLE IMAGE... [--clients 1 2 4 8] [--rounds 5] [--requests 400]

Starts ``examples/service/service.py`` with its own defaults, and asks it by ``examples/service/load.py``. The
numbers of clients take turns, so that a busy machine disturbs all alike; the table is of the requests of all
rounds together. Service and clients share the cores of this machine.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "service"
"""The service and what asks it."""
sys.path.insert(0, str(EXAMPLE))

from load import Reply, ask, summarise  # noqa: E402, because it lies beside the service

from cmt_edge.deploy.report import format_table  # noqa: E402, with the imports of the project

CLIENTS = (1, 2, 4, 8)
"""Numbers of clients."""
ROUNDS = 5
"""Turns of each number of clients that count."""
REQUESTS = 400
"""Requests of a turn."""
WARM_UP = 100
"""Requests before the first turn."""
Taken = tuple[list[Reply], float]
"""Replies, and the seconds that all turns took."""
ANNOUNCED = "listening on "
"""What the service prints before its address."""


@contextmanager
def serve(bundle: Path, threads: int | None) -> Iterator[str]:
    """A running service; its address."""
    command = [sys.executable, str(EXAMPLE / "service.py"), str(bundle), "--port", "0"]
    command += ["--threads", str(threads)] if threads else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None, "it was asked for"
        try:
            line = next((line for line in process.stderr if line.startswith(ANNOUNCED)), "")
            if not line:
                raise SystemExit("error: the service did not start")
            yield line.removeprefix(ANNOUNCED).strip()
        finally:
            process.send_signal(signal.SIGTERM)


def measure(
    url: str, images: list[bytes], options: argparse.Namespace
) -> dict[int, tuple[list[Reply], float]]:
    """Replies of all turns and the seconds they took, by the number of clients."""
    ask(url, images, WARM_UP, 2)
    found: dict[int, Taken] = {clients: ([], 0.0) for clients in options.clients}
    for _ in range(options.rounds):
        for clients, (replies, seconds) in found.items():
            begun = time.perf_counter()
            new = ask(url, images, options.requests, clients)
            found[clients] = ([*replies, *new], seconds + time.perf_counter() - begun)
    return found


def list_cells(clients: int, replies: list[Reply], seconds: float) -> list[str]:
    """A row of the table."""
    found = summarise(replies, seconds)
    refused = len(replies) - sum(reply.status == 200 for reply in replies)
    names = ("p50_ms", "p95_ms", "p99_ms", "max_ms", "answers_per_s")
    return [str(clients), str(len(replies)), str(refused), *(str(found.get(name, "-")) for name in names)]


def main(argv: list[str] | None = None) -> int:
    """Measure and print; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--threads", type=int, help="CPU threads of one inference")
    options = parser.parse_args(argv)
    images = [path.read_bytes() for path in options.images]
    with serve(options.bundle, options.threads) as url:
        found = measure(url, images, options)
    header = ["clients", "requests", "refused", "p50 ms", "p95 ms", "p99 ms", "max ms", "answers/s"]
    rows = [list_cells(clients, *taken) for clients, taken in found.items()]
    print(format_table(header, rows, markdown=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
