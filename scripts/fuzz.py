"""Fuzzes what reads files of strangers: bundles, arrays, images, archives, settings, labels and checkpoints.

    python -m venv fuzz && fuzz/bin/pip install -r requirements/fuzz.txt && fuzz/bin/pip install -e ".[all]"
    fuzz/bin/python scripts/fuzz.py [--target NAME ...] [--seconds S] [--plain] [--folder DIR] [--json]

Only errors of cmt-edge may come out; anything else, and more than ten seconds of CPU for one input, is a
finding, whose input is kept. With atheris, inputs are chosen by the coverage of cmt-edge's code. Without it,
or with ``--plain``, seeds are mutated blindly, and the same ``--seed`` tries the same inputs. The seeds are
made by the script itself. Each target runs in a process of its own, with a limit on its memory. The exit code
is 0 if nothing was found.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEMORY_GIB = 12
"""GiB of address space that a target may take; PyTorch alone reserves some."""
PATIENCE_S = 120
"""Seconds that a target may take longer than it was given, for imports and the last input."""
COVERED = re.compile(r"cov: (\d+) ft: (\d+)")
"""What libFuzzer prints of the parts of the code that were reached."""
FIGURES = "CMT_EDGE_FUZZ_FIGURES"
"""The variable that tells it where its figures go; beside them is its folder."""
KEEP_EVERY = 500
"""Inputs after which the figures are written, in case the process ends."""
CHILD = "CMT_EDGE_FUZZ_CHILD"
"""The variable that tells a process which target it runs."""
NOTHING: dict[str, Any] = {"executions": 0, "refused": 0, "findings": {}}
"""The figures of a target that did not even begin."""


def main() -> int:
    """Run the targets one after another; returns the exit code."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--target", action="append", help="only these (default: all)")
    p.add_argument("--seconds", type=float, default=60, help="time of each target (default %(default)s)")
    p.add_argument("--plain", action="store_true", help="mutate blindly, also where atheris is installed")
    p.add_argument("--seed", type=int, default=17, help="of the mutations (default %(default)s)")
    p.add_argument("--folder", type=Path, default=ROOT / "out" / "fuzz", help="where findings are kept")
    p.add_argument("--json", action="store_true", help="print one JSON object a target")
    args = p.parse_args()
    args.plain = args.plain or importlib.util.find_spec("atheris") is None
    if CHILD in os.environ:
        run_target(os.environ[CHILD], args)
        return 0
    args.folder.mkdir(parents=True, exist_ok=True)
    broken = 0
    for name in args.target or list_names(args):
        figures = start_target(name, args)
        broken += len(figures["findings"])
        print(json.dumps(figures) if args.json else format_figures(figures), flush=True)
    return 1 if broken else 0


def list_names(args: argparse.Namespace) -> list[str]:
    """Names of the targets that this environment can run."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.fuzzing import list_targets

    with tempfile.TemporaryDirectory() as folder:
        targets = list_targets(Path(folder))
    return [
        name for name, target in targets.items() if not target.needs or importlib.util.find_spec(target.needs)
    ]


def start_target(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a target in a process of its own; its figures."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log, figures = Path(folder) / "log", Path(folder) / "figures.json"
        environment = os.environ | {CHILD: name, "OMP_NUM_THREADS": "1", FIGURES: str(figures)}
        with open(log, "wb") as output, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                [sys.executable, *sys.argv],
                env=environment,
                stdout=output,
                stderr=output,
                timeout=args.seconds + PATIENCE_S,
                check=False,
            )
        text = log.read_text(errors="replace")
        found = json.loads(figures.read_text()) if figures.exists() else NOTHING
    return {
        "target": name,
        "by": "mutations" if args.plain else "atheris",
        **found,
        "coverage": max((int(covered) for covered, _ in COVERED.findall(text)), default=None),
        "findings": found["findings"] | find_end(text, found),
        "seconds": round(time.monotonic() - start),
    }


def find_end(text: str, found: dict[str, Any]) -> dict[str, str]:
    """What ended a process that did not come to its end: a crash, a limit, a failed import."""
    return {} if found.get("finished") else {"ended": text[-2000:]}


def run_target(name: str, args: argparse.Namespace) -> None:
    """In the process of a target: fuzz it, and write its figures."""
    sys.path.insert(0, str(ROOT / "tests"))
    folder = Path(os.environ[FIGURES]).parent
    if args.plain:
        from helpers.fuzzing import fuzz, limit_memory, list_targets

        target = list_targets(folder)[name]
        limit_memory(MEMORY_GIB)
        keep(fuzz(target, args.seconds, args.seed), args.folder, name, True)
        return
    import atheris

    with atheris.instrument_imports(include=["cmt_edge"]):
        from helpers.fuzzing import Findings, limit_memory, list_targets
    target = list_targets(folder)[name]
    for data in target.seeds:  # what is imported late is imported now, and instrumented
        with atheris.instrument_imports(include=["cmt_edge"]):
            Findings().attempt(target, data)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds):
        (corpus / str(number)).write_bytes(data)
    limit_memory(MEMORY_GIB)
    findings = Findings()
    end = time.monotonic() + args.seconds

    def attempt(data: bytes) -> None:
        findings.attempt(target, data)
        if time.monotonic() > end:
            keep(findings, args.folder, name, True)
            os._exit(0)
        if findings.executions % KEEP_EVERY == 0:
            keep(findings, args.folder, name, False)

    options = [
        f"-max_len={1 << 16}",
        f"-seed={args.seed}",
        "-rss_limit_mb=0",
        "-timeout=60",
        "-print_funcs=0",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], attempt)
    atheris.Fuzz()


def keep(findings: Any, folder: Path, name: str, finished: bool) -> None:
    """Write the figures, and the input of each finding."""
    told = {}
    for place, (data, text) in findings.found.items():
        file = folder / f"{name.replace(' ', '-')}-{hashlib.sha256(data).hexdigest()[:12]}"
        file.write_bytes(data)
        told[place] = f"{file}: {text[-1000:]}"
    figures = {
        "executions": findings.executions,
        "refused": findings.refused,
        "findings": told,
        "finished": finished,
    }
    Path(os.environ[FIGURES]).write_text(json.dumps(figures))


def format_figures(figures: dict[str, Any]) -> str:
    """One line for a target, and its findings."""
    covered = f", {figures['coverage']} places reached" if figures["coverage"] else ""
    head = (
        f"{figures['target']} by {figures['by']}: {figures['executions']} inputs,"
        f" {figures['refused']} refused{covered}, {len(figures['findings'])} findings, {figures['seconds']} s"
    )
    return "\n".join([head, *(f"  {place}\n    {text}" for place, text in figures["findings"].items())])


if __name__ == "__main__":
    sys.exit(main())
