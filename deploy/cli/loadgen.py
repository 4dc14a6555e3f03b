"""The flags of ``cmt-bench`` that let MLPerf LoadGen ask."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import replace
from functools import partial
from pathlib import Path

from ..bundle import Bundle, require_outside_bundles
from ..errors import InputError, UnknownNameError
from ..measure.benchmark import Benchmark
from ..measure.loadgen import LIMIT_MS, SERVER_SHARE, LoadGenOptions, run_loadgen
from ..measure.loadgen_driver import require_loadgen
from ..measure.loadgen_result import SCENARIOS, SERVER
from ..measure.timing import Protocol
from ..predictor import Predictor
from ..progress import Progress
from .console import CLOSE, read_runtime_flags
from .ranges import MILLISECONDS, RATES

LOGS = Path("loadgen_logs")
"""Folder of LoadGen's logs unless told otherwise."""


def add_loadgen_flags(p: argparse.ArgumentParser) -> None:
    """``--loadgen`` and what belongs to it."""
    group = p.add_argument_group("MLPerf LoadGen")
    group.add_argument(
        "--loadgen",
        metavar="SCENARIOS",
        help=f"also let MLPerf LoadGen ask: {', '.join(SCENARIOS)}, with commas between them (needs the extra"
        " 'loadgen')",
    )
    group.add_argument(
        "--loadgen-logs",
        type=Path,
        metavar="FOLDER",
        help=f"where LoadGen's own logs are kept; those of the same bundle and scenario are replaced (default"
        f" {LOGS})",
    )
    group.add_argument(
        "--loadgen-rate",
        type=RATES.parse_number,
        metavar="IMAGES",
        help=f"images a second that {SERVER} asks for (default: {SERVER_SHARE:g} of what the bundle can)",
    )
    group.add_argument(
        "--loadgen-limit",
        type=MILLISECONDS.parse_number,
        metavar="MS",
        help=f"milliseconds that 99 of 100 answers must keep in {SERVER} (default {LIMIT_MS:g})",
    )


def read_loadgen_options(args: argparse.Namespace) -> LoadGenOptions | None:
    """What LoadGen is to ask; ``None`` where it is not wanted.

    Raises:
        UnknownNameError: there is no such scenario.
        InputError: a flag belongs to a scenario that was not asked for.
        RuntimeMissingError: LoadGen is not installed.
        OutputError: the logs would lie inside a bundle.
    """
    if args.loadgen is None:
        _refuse(args, ("loadgen_logs", "loadgen_rate", "loadgen_limit"), "--loadgen")
        return None
    scenarios = tuple(dict.fromkeys(_find_scenario(name) for name in args.loadgen.split(",")))
    if SERVER not in scenarios:
        _refuse(args, ("loadgen_rate", "loadgen_limit"), f"--loadgen {SERVER}")
    require_loadgen()
    folder = args.loadgen_logs or LOGS
    require_outside_bundles(folder / SERVER)
    return LoadGenOptions(scenarios, folder, args.loadgen_rate, args.loadgen_limit or LIMIT_MS)


def _find_scenario(name: str) -> str:
    """The scenario that is meant, whatever the case of its letters."""
    known = {scenario.lower(): scenario for scenario in SCENARIOS}
    asked = name.strip().lower()
    if asked not in known:
        close = [known[one] for one in difflib.get_close_matches(asked, known, n=2, cutoff=CLOSE)]
        raise UnknownNameError("scenario of LoadGen", name, close, SCENARIOS)
    return known[asked]


def _refuse(args: argparse.Namespace, names: tuple[str, ...], needed: str) -> None:
    """Raise :class:`InputError` for a flag that would do nothing."""
    for name in names:
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} says something about a test that was not asked for",
                remedy=f"add {needed}, or leave it out",
            )


def add_loadgen(
    args: argparse.Namespace,
    options: LoadGenOptions,
    bundles: list[Bundle],
    images: list[bytes],
    protocol: Protocol,
    result: Benchmark,
    progress: Progress,
) -> Benchmark:
    """``result`` with LoadGen's figures of each bundle."""
    opened = partial(
        Predictor.load,
        **read_runtime_flags(args),
        cache=False,
    )
    measured = [
        replace(
            found,
            loadgen=run_loadgen(bundle, found.name, opened, options, protocol, images, progress.share),
        )
        for bundle, found in zip(bundles, result.results, strict=True)
    ]
    return replace(result, results=measured)
