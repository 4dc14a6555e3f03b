"""Latency, throughput, size, memory and export time beside what others offer for the same model, in one
interleaved run a model.

    python benchmarks/peers.py --models cmt_ti cmt_xs cmt_s --threads 2 --json peers.json \
        --markdown peers.md --plot peers.png

The same random weights and calibration images in every row. Ratios refer to OpenVINO in float32 on a plain
export. Each artefact is made in a process of its own, from the PyTorch model on, which gives export time and
memory; another process loads it and runs 20 inferences, which gives the memory of running. A row that cannot
be made or run here says why; the others go on. ``--only`` measures some rows (and the base), ``--optional``
also those whose tools get environments of their own, which are made under ``--environments`` and deleted
without that flag.

Models or rows measured in several runs go into one document with ``--again xs.json s.json --markdown peers.md
--plot peers.png``; ``--json`` keeps these runs in one file, and ``--page PAGE --part NAME`` puts their tables
between two comments of a page.

A quick look: ``--models cmt_nano --only ort_fp32 ours_int8 --iters 20 --seconds 0.2 --warmup 0.1 --calib-size
16``.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    check_images,
    deviation,
    logits,
    make_progress,
    ratio,
    read_protocol,
    say,
    shorten_error,
    step,
)
from peers_arguments import parse_arguments
from peers_environments import HERE, Environments, MissingEnvironment, make_variables
from peers_isa import LIMITED_ROWS, describe_unlimited, find_beyond, set_limit
from peers_optional import OPTIONAL
from peers_remote import RemoteSession, serve
from peers_report import (
    BASE,
    IMAGES,
    INFERENCES,
    RUNS,
    Result,
    format_markdown,
    name_batch,
    name_limit,
    plot,
    read_again,
    read_runs,
    write_part,
)
from peers_rows import (
    CALIBRATION_FILE,
    IMAGES_FILE,
    PLAIN_ROWS,
    WEIGHTS,
    Job,
    Row,
    collect_calibration,
    make_reference,
)

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends import Session
from cmt_edge.deploy.bundle import make_plain
from cmt_edge.deploy.errors import CmtEdgeError
from cmt_edge.deploy.files import write_atomic
from cmt_edge.deploy.measure.benchmark import DRIFT_WARNING, bind_inference, measure_throughput
from cmt_edge.deploy.measure.host import describe_host, read_versions
from cmt_edge.deploy.measure.statistics import NS_PER_MS, summarise
from cmt_edge.deploy.measure.timing import Protocol, time_interleaved

ROWS = PLAIN_ROWS | OPTIONAL
"""Every row by its key, in the order of the table."""

# --- children -------------------------------------------------------------------------------------


def run_row(job: Job, row: Row, action: str) -> None:
    """Build or run one row in this process; the outcome and the peak memory go into a file."""
    outcome: dict[str, Any] = {}
    start = time.perf_counter()
    try:
        if action == "build":
            shutil.rmtree(row.folder(job), ignore_errors=True)  # of a build that failed
            row.folder(job).mkdir()
            row.make(job, row.folder(job))
        else:
            session, images = row.load(job, row.folder(job), False), job.images()
            for _ in range(INFERENCES):
                session.run(images[: job.size])
    except Exception as exc:
        traceback.print_exc()
        outcome["error"] = shorten_error(exc)
    outcome |= {"peak": read_peak_bytes(), "seconds": time.perf_counter() - start}
    _locate_outcome(job, row, action).write_text(json.dumps(outcome))


def read_peak_bytes() -> int:
    """The largest resident memory of this process so far.

    From ``/proc``: Linux counts the memory of the process that started this one into ``ru_maxrss``.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def serve_row(job: Job, row: Row) -> None:
    """Open a row in this process and answer the measuring one."""
    serve(
        lambda: row.load(job, row.folder(job), False),
        job.folder / f"{row.key}.shared",
        (job.size, *job.images().shape[1:]),
    )


def open_session(job: Job, row: Row, environments: Environments) -> Session:
    """The row's session in a process of its own.

    Every row has one, so that the system schedules all of them alike.
    """
    return RemoteSession(
        [environments.find(row.home), __file__, "--serve", row.key, *job.arguments()],
        make_variables(),
        job.folder / f"{row.key}.shared",
        (job.size, *job.images().shape[1:]),
        job.folder / f"{row.key}.serve.log",
    )


def _locate_outcome(job: Job, row: Row, action: str) -> Path:
    return job.folder / f"{row.key}.{action}.json"


def run_in_child(job: Job, row: Row, action: str, environments: Environments) -> tuple[float, int, str]:
    """Wall seconds of the whole process, its peak memory, and why it failed if it did; its output goes into a
    log."""
    try:
        interpreter = environments.find(row.home)
    except MissingEnvironment as exc:
        return 0.0, 0, f"no environment: {exc}"
    command = [interpreter, __file__, f"--{action}", row.key, *job.arguments()]
    start = time.perf_counter()
    with open(job.folder / f"{row.key}.{action}.log", "wb") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False, env=make_variables()
        ).returncode
    seconds, path = time.perf_counter() - start, _locate_outcome(job, row, action)
    if not path.exists():
        return seconds, 0, f"the process ended with status {status}"
    outcome = json.loads(path.read_text())
    return seconds, outcome["peak"], outcome.get("error", "")


# --- measuring ------------------------------------------------------------------------------------


def find_earlier(job: Job, row: Row, action: str) -> tuple[None, int, str] | None:
    """The peak memory, as of :func:`run_in_child`, when an earlier run did the same in the same ``--folder``;
    no time, as nobody knows what else the machine did then."""
    path = _locate_outcome(job, row, action)
    outcome = json.loads(path.read_text()) if path.exists() else {"error": "not made"}
    return None if "error" in outcome else (None, outcome["peak"], "")


def save_images(job: Job, rows: Sequence[Row]) -> None:
    """Write the images that the children read."""
    np.save(job.folder / IMAGES_FILE, check_images(job.preprocess, max(IMAGES, job.size)))
    if any(row.home != HERE for row in rows):
        np.save(job.folder / CALIBRATION_FILE, np.concatenate(list(collect_calibration(job))))


def prepare(job: Job, rows: Sequence[Row], environments: Environments) -> list[Result]:
    """Build every artefact once and run every row once, each in a child."""
    save_images(job, rows)
    results: list[Result] = []
    built: dict[str, tuple[float | None, int, str]] = {}
    for row in rows:
        result = Result(row.key, row.label, row.ours)
        results.append(result)
        maker = ROWS[row.artefact or row.key]
        if maker.key not in built and (found := find_earlier(job, maker, "build")):
            built[maker.key] = found
        if maker.key not in built:
            with step(f"{job.model}: build {maker.key}"):
                built[maker.key] = run_in_child(job, maker, "build", environments)
        result.export_s, result.export_peak, result.note = built[maker.key]
        if not result.note and (found := find_earlier(job, row, "run")):
            result.running_peak = found[1]
        elif not result.note:
            with step(f"{job.model}: run {row.key}"):
                _, result.running_peak, result.note = run_in_child(job, row, "run", environments)
        if result.note:
            say(f"{job.model}: {row.key} left out: {result.note}")
            continue
        files = [p for p in row.folder(job).rglob("*") if p.is_file()]
        result.bytes_on_disk = sum(p.stat().st_size for p in files)
        result.bytes_read = sum(p.stat().st_size for p in files if p.name in row.files)
    return results


def build(job: Job, rows: Sequence[Row], environments: Environments) -> bool:
    """Make what a later run measures, and print a line a row; whether a row failed."""
    results = prepare(job, rows, environments)
    for result in results:
        print(f"{job.model} {result.key}: {result.note or 'built'}")
    return any(result.note for result in results)


def measure(
    job: Job,
    rows: Sequence[Row],
    protocol: Protocol,
    environments: Environments,
    seconds: float,
    isa: str | None = None,
) -> list[Result]:
    """Everything about one model, its throughput over ``seconds`` if there are any; raises ``SystemExit``
    where the base cannot run, or a row does not keep to ``isa``."""
    results = {r.key: r for r in prepare(job, rows, environments)}
    images = job.images()
    with contextlib.ExitStack() as stack:
        sessions: dict[str, Session] = {}
        for row in rows:
            if not results[row.key].note:
                say(f"{job.model}: open {row.key}")
                sessions[row.key] = open_session(job, row, environments)
                stack.callback(sessions[row.key].close)
        if BASE not in sessions:
            raise SystemExit(f"the base of all ratios cannot run: {results[BASE].note}")
        check(job, sessions, results, images)
        batch = images[: job.size]
        if isa:
            check_limit(sessions, results, batch, isa)
        calls = {key: bind_inference(session, batch) for key, session in sessions.items()}
        samples = time_interleaved(calls, protocol, make_progress(f"{job.model}: latency"))
        for key, session in sessions.items():
            fill(results[key], samples[BASE], samples[key])
            results[key].executed = session.executed(batch).summary()
        for key, session in sessions.items() if seconds else ():
            say(f"{job.model}: throughput of {key}")
            rate(job, ROWS[key], session, results[key], batch, seconds)
    return list(results.values())


def check_limit(
    sessions: dict[str, Session], results: dict[str, Result], batch: np.ndarray, isa: str
) -> None:
    """Raise ``SystemExit`` if kernels beyond ``isa`` ran; remark on those that cannot be limited."""
    for key, session in sessions.items():
        kernels = session.kernels(batch)
        if beyond := find_beyond(kernels, isa):
            raise SystemExit(f"{key} does not keep to {isa}: it ran {', '.join(beyond)}")
        if remark := describe_unlimited(kernels):
            results[key].warnings.append(remark)


def fill(result: Result, base: np.ndarray, samples: np.ndarray) -> None:
    """Enter what the nanoseconds of a row's calls say, beside those of the base."""
    result.latency, result.ratio = summarise(samples), ratio(base, samples)
    result.best = float(samples.min()) / NS_PER_MS
    result.best_ratio = float(base.min() / samples.min())
    if abs(drift := result.latency.drift) > DRIFT_WARNING:
        result.warnings.append(
            f"latency drifted by {100 * drift:+.0f} % from the first to the last 100 calls"
        )


def check(job: Job, sessions: dict[str, Session], results: dict[str, Result], images: np.ndarray) -> None:
    """Compare each row's logits with eager PyTorch's."""
    from cmt_edge.deploy.backends.torch import TorchSession

    truth = logits(TorchSession(make_reference(job.model), job.threads), images)
    for key, session in sessions.items():
        results[key].deviation = deviation(logits(session, images, job.size), truth)


def rate(job: Job, row: Row, session: Session, result: Result, batch: np.ndarray, seconds: float) -> None:
    """Images a second: as many requests at once as the runtime recommends, one for PyTorch."""
    own = WEIGHTS in row.files or row.home != HERE
    fast = session if own else row.load(job, row.folder(job), True)
    predictor = Predictor(fast, job.preprocess, [])
    result.images_per_second, result.requests = (
        measure_throughput(predictor, batch, seconds),
        fast.parallelism,
    )
    if not own:
        fast.close()


# --- the command ----------------------------------------------------------------------------------


def main() -> None:
    args = parse_arguments((__doc__ or "").splitlines()[0], list(ROWS))
    if args.serve:
        serve_row(
            Job(args.model, args.folder, args.threads, args.data, args.calib_size, args.batch),
            ROWS[args.serve],
        )
        return
    if args.build or args.run:
        action = "build" if args.build else "run"
        run_row(
            Job(args.model, args.folder, args.threads, args.data, args.calib_size, args.batch),
            ROWS[args.build or args.run],
            action,
        )
        return
    if args.again:
        again(args)
        return
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = args.environments or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            compare(args, folder.resolve(), Environments(kept.resolve()))
        except CmtEdgeError as exc:
            say(f"error: {exc}")
            raise SystemExit(exc.exit_code) from exc


def choose_rows(only: Sequence[str] | None, optional: bool, isa: str | None = None) -> list[Row]:
    """The rows of ``only`` and the base; without it all that need no environment, or really all; with ``isa``
    those that keep to it.

    Raises:
        SystemExit: a row of ``only`` does not keep to ``isa``.
    """
    offered = ROWS if optional or only else PLAIN_ROWS
    chosen = [row for row in offered.values() if not only or row.key in (*only, BASE)]
    if not isa:
        return chosen
    if beyond := [key for key in only or () if key not in LIMITED_ROWS]:
        raise SystemExit(f"--isa: these rows cannot be limited, or need bfloat16: {', '.join(beyond)}")
    return [row for row in chosen if row.key in LIMITED_ROWS]


def compare(args: argparse.Namespace, folder: Path, environments: Environments) -> None:
    """All models, one after the other; the files are written again after each."""
    protocol = read_protocol(args)
    rows = choose_rows(args.only, args.optional, args.isa)
    if args.batch != 1 and (fixed := [row.key for row in rows if row.key in OPTIONAL]):
        raise SystemExit(f"--batch: these rows are made for one image: {', '.join(fixed)}")
    if args.isa:
        set_limit(args.isa)
    seconds = 0.0 if args.latency_only else max(0.5, protocol.seconds / 2)
    content: dict[str, Any] = {
        "machine": make_plain(describe_host()),
        "versions": read_versions(),
        "threads": args.threads,
        "batch": args.batch,
        "isa": args.isa,
        "protocol": asdict(protocol),
        "base": BASE,
        "calibration": {
            "source": Path(args.data).name,
            "images": args.calib_size or "300, or all where there are fewer",
        },
        "models": {},
    }
    results: dict[str, list[Result]] = {}
    failed = False
    for name in args.models:
        job = Job(name, folder / name.replace("/", "_"), args.threads, args.data, args.calib_size, args.batch)
        if job.folder.exists() and not args.reuse:
            raise SystemExit(f"{job.folder} exists; give an empty --folder, or --reuse")
        job.folder.mkdir(parents=True, exist_ok=True)
        if args.build_only:
            failed |= build(job, rows, environments)
            continue
        results[name] = measure(job, rows, protocol, environments, seconds, args.isa)
        content["models"][name] = [asdict(r) for r in results[name]]
        if args.json:
            write_atomic(args.json, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        text = write_text(args, content, results, protocol)
        forget()
    if args.build_only:
        raise SystemExit(int(failed))
    print(text)


def again(args: argparse.Namespace) -> None:
    """Write what earlier runs found: the document, all runs in one JSON file, and a part of a page."""
    runs = read_runs(args.again)
    text = write_text(args, *read_again(runs))
    if args.json:
        write_atomic(args.json, (json.dumps({RUNS: runs}, indent=1, ensure_ascii=False) + "\n").encode())
    if args.page:
        write_part(args.page, args.part, runs)
    print(text)


def write_text(
    args: argparse.Namespace, content: dict[str, Any], results: dict[str, list[Result]], protocol: Protocol
) -> str:
    """The Markdown text, which is also written where it was asked for, as is the plot."""
    text = format_markdown(
        content, results, protocol, [(row.key, row.label, row.about) for row in ROWS.values()]
    )
    if args.markdown:
        write_atomic(args.markdown, text.encode())
    if args.plot:
        plot(
            results,
            args.plot,
            f"{content['machine']['cpu']}{name_limit(content)}, {content['threads']} threads,"
            f" {name_batch(content)}",
        )
    return text


def forget() -> None:
    """Free one model's compiled code before the next model."""
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
    gc.collect()


if __name__ == "__main__":
    main()
