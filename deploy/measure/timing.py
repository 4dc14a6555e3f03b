"""How long and in which order calls are timed. Prints nothing.

Protocol: warm up until at least 10 iterations and 1 s have passed and the rolling median is stable within
2 %; then at least ``iters`` iterations and ``seconds`` for each variant, A B A B. No outlier is removed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

WARMUP_LIMIT_S = 15.0
"""Seconds after which a warm-up ends, stable or not."""
WARMUP_WINDOW = 10
"""Number of calls whose median is compared with that of as many before them."""
STABLE = 0.02
"""Two such medians that differ by less than this share are stable."""
CLOCK_FLOOR_S = 1e-4
"""Shorter calls count as this many seconds when deciding how often a variant runs in a round: their ratio is
noise."""
PROGRESS_ROUNDS = 20
"""Number of rounds after which progress is reported."""


@dataclass(frozen=True)
class Protocol:
    """How long to measure; the defaults are for figures that are published.

    Where several variants take turns, each turn begins with calls of ``settle_seconds`` that are not counted,
    and as many that are counted follow.
    """

    iters: int = 200
    seconds: float = 10.0
    warmup_iters: int = 10
    warmup_seconds: float = 1.0
    settle_seconds: float = 0.05


PUBLISHED = Protocol()
"""How long is measured unless a caller says otherwise."""


def time_interleaved(
    variants: Mapping[str, Callable[[], object]],
    protocol: Protocol,
    progress: Callable[[float], None] | None = None,
) -> dict[str, np.ndarray]:
    """Time the callables in turn, A B A B; nanoseconds of each call, in order, after a warm-up of each.

    Where there are several, each turn begins with calls that are not counted: they bring the variant's own
    weights back into the caches, as in a process that serves one model, and let clocks follow its
    instructions and the threads of other runtimes, which spin for milliseconds after their call, come to
    rest. On a Xeon with AMX a model's calls became faster until the sixth after another model's.
    """
    turns = _prepare_turns(variants, protocol)
    several = len(turns) > 1
    samples: dict[str, list[int]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0)
    need = protocol.seconds * 1e9
    rounds = 0
    while (count := _count_least(samples)) < protocol.iters or min(spent.values()) < need:
        for turn in turns:
            if several:
                _settle(turn.call, protocol.settle_seconds)
            times = _time(turn.call, turn.repeats)
            samples[turn.name] += times
            spent[turn.name] += sum(times)
        rounds += 1
        if progress and rounds % PROGRESS_ROUNDS == 0:
            time_share = min(spent.values()) / need if need else 1.0
            progress(min(count / max(1, protocol.iters), time_share, 1.0))
    if progress:
        progress(1.0)
    return {name: np.array(values) for name, values in samples.items()}


@dataclass(frozen=True)
class _Turn:
    """A variant, and how many calls of it are counted in one round."""

    name: str
    call: Callable[[], object]
    repeats: int


def _count_least(samples: Mapping[str, list[int]]) -> int:
    """The number of samples of the variant that has the fewest."""
    return min(map(len, samples.values()))


def _prepare_turns(variants: Mapping[str, Callable[[], object]], protocol: Protocol) -> list[_Turn]:
    """Warm every variant up, and give much faster ones several calls a round: otherwise the slow ones would
    run for minutes until the fast ones have their seconds."""
    typical = {name: _warm_up(call, protocol) for name, call in variants.items()}
    slowest = max(typical.values())
    several = len(variants) > 1
    turns = []
    for name, call in variants.items():
        for_balance = int(slowest / typical[name] / 2)
        after_settling = int(protocol.settle_seconds / typical[name]) if several else 0
        turns.append(_Turn(name, call, max(for_balance, after_settling, 1)))
    return turns


def _time(call: Callable[[], object], repeats: int) -> list[int]:
    """Nanoseconds of each of ``repeats`` calls."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        call()
        times.append(time.perf_counter_ns() - start)
    return times


def _settle(call: Callable[[], object], seconds: float) -> None:
    """Call at least once, and until ``seconds`` have passed."""
    begin = time.perf_counter()
    call()
    while time.perf_counter() - begin < seconds:
        call()


def _warm_up(call: Callable[[], object], protocol: Protocol) -> float:
    """Call until iterations and time have passed and the latency is stable.

    Returns the median of the last calls in seconds.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while True:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        passed = time.perf_counter() - begin
        enough = len(times) >= max(1, protocol.warmup_iters) and passed >= protocol.warmup_seconds
        if (enough and _is_stable(times)) or passed >= max(WARMUP_LIMIT_S, protocol.warmup_seconds):
            return max(CLOCK_FLOOR_S, float(np.median(times[-WARMUP_WINDOW:])))


def _is_stable(times: Sequence[float]) -> bool:
    """Whether the medians of the last two windows agree; also where there are not yet two windows."""
    if len(times) < 2 * WARMUP_WINDOW:
        return True
    last = np.median(times[-WARMUP_WINDOW:])
    before = np.median(times[-2 * WARMUP_WINDOW : -WARMUP_WINDOW])
    return bool(abs(last / before - 1) < STABLE)
