"""The search for a precision, on fakes: what passes, what is refined, ties, budgets, intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.measure.statistics import compute_wilson_interval
from cmt_edge.export.auto.search import (
    Accuracy,
    Answers,
    Candidate,
    Conditions,
    Speed,
    Variant,
    judge,
    pick_winner,
    search,
)

FP32, BF16, INT8 = (Variant(p, p) for p in ("fp32", "bf16", "int8"))
IMAGES = 1000


class Fake:
    """Each group in int8 turns ``damage[group]`` of 1000 answers wrong; a variant takes ``times[name]`` ms
    (default 10)."""

    def __init__(self, damage, times=None, labelled=True, seconds=1.0, spread=0.01):
        self.damage, self.times, self.labelled, self.spread = damage, times or {}, labelled, spread
        self.seconds, self.now = seconds, 0.0
        self.asked: list[tuple[str, bool]] = []

    def clock(self) -> float:
        return self.now

    def answers(self, variant, quick):
        self.asked.append((variant.name, quick))
        self.now += self.seconds
        kept = set(variant.keep_float)
        wrong = sum(d for g, d in self.damage.items() if g not in kept) if variant.precision == "int8" else 0
        top1 = np.zeros(IMAGES, int)
        top1[: min(wrong, IMAGES)] = 1
        return Answers(top1, wrong / IMAGES, np.zeros(IMAGES, int) if self.labelled else None)

    def speeds(self, variants):
        base = self.times.get(variants[0].name, 10.0)
        return {v.name: speed(base / self.times.get(v.name, 10.0), base, self.spread) for v in variants}


def speed(ratio, base=10.0, spread=0.01):
    p50 = base / ratio
    return Speed(p50, (p50 * 0.99, p50 * 1.01), ratio, (ratio * (1 - spread), ratio * (1 + spread)), 1)


def found(fake, *, variants=(FP32, BF16, INT8), missing=None, **settings):
    conditions = Conditions(**{"max_drop": 0.3, "clock": fake.clock, **settings})
    return search(variants, dict.fromkeys(fake.damage, 2), conditions, fake, missing)


def by_name(verdict):
    return {c.variant.name: c for c in verdict.candidates}


# --- accuracy -------------------------------------------------------------------------------------


def test_drop_is_paired_and_signed():
    truth = np.array([0] * 100)
    expected = Answers(np.array([0] * 90 + [1] * 10), 0.0, truth)
    ours = Answers(np.array([0] * 85 + [1] * 5 + [0] * 10), 0.1, truth)  # 5 lost, 10 gained
    result = judge(expected, ours)
    assert (result.top1, result.agreement) == (95.0, 85.0)
    assert result.drop == pytest.approx(-5.0)
    # Wilson: 90 % of 100 is 82.56 to 94.48, 95 % is 88.82 to 97.85; correlation -50 / 427500 ** 0.5
    assert result.drop_ci == pytest.approx((-13.16, 2.90), abs=0.01)


def test_without_labels_a_drop_is_disagreement_with_an_honest_interval():
    answers = Answers(np.zeros(300, int), 0.0)
    same = judge(answers, answers)
    assert (same.top1, same.agreement, same.drop) == (None, 100.0, 0.0)
    assert same.drop_ci[0] == 0
    assert 1.0 < same.drop_ci[1] < 1.5  # not "certainly nothing" after 300 images


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_interval_holds_the_share(trials):
    count, n = trials
    low, high = compute_wilson_interval(count / n, n)
    assert 0 <= low <= count / n <= high <= 1
    assert high > low


# --- what wins ------------------------------------------------------------------------------------


def test_the_fastest_that_passes_wins():
    fake = Fake({"stem": 1, "head": 1}, {"bf16": 8, "int8": 5})
    verdict = found(fake)
    assert verdict.winner == INT8
    assert verdict.tied == ()
    assert all(c.passes for c in verdict.candidates)
    assert verdict.labelled


def test_a_fast_one_that_loses_too_much_does_not_win():
    verdict = found(Fake({"a": 5, "b": 5}, {"bf16": 8, "int8": 5}), max_drop=0.0)
    assert verdict.winner == BF16
    assert by_name(verdict)["int8"].why_not == "drop above 0"


def test_a_tie_goes_to_what_agrees_best_with_the_reference():
    verdict = found(Fake({"a": 1, "b": 1}, {"bf16": 5.0, "int8": 4.99, "fp32": 10}))
    assert verdict.winner == BF16
    assert set(verdict.tied) == {"bf16", "int8"}
    verdict = found(Fake({"a": 0, "b": 0}, {"bf16": 9.99, "int8": 9.98, "fp32": 10}))
    assert verdict.winner == FP32  # the widest type where even the answers are the same
    assert set(verdict.tied) == {"fp32", "bf16", "int8"}


def test_the_latency_budget_excludes():
    fake = Fake({"a": 1, "b": 1}, {"bf16": 8, "int8": 5})
    verdict = found(fake, latency_budget=6.0)
    assert verdict.winner == INT8
    assert by_name(verdict)["bf16"].why_not == "slower than 6 ms"
    verdict = found(fake, latency_budget=1.0)
    assert verdict.winner is None
    assert not any(c.passes for c in verdict.candidates)


def test_both_reasons_are_given():
    verdict = found(Fake({"a": 900}, {"int8": 50}), latency_budget=20.0)
    assert by_name(verdict)["int8"].why_not == "drop above 0.3, slower than 20 ms"


def test_what_has_no_hardware_is_reported_and_never_measured():
    fake = Fake({"a": 1, "b": 1}, {"bf16": 1})
    verdict = found(fake, missing={"bf16": "no hardware: no bfloat16"})
    assert by_name(verdict)["bf16"].why_not == "no hardware: no bfloat16"
    assert by_name(verdict)["bf16"].speed is None
    assert "bf16" not in {name for name, _ in fake.asked}
    assert verdict.winner == FP32


def test_choose_nothing_from_nothing():
    assert pick_winner([]) == (None, ())
    refused = Candidate(INT8, Accuracy(1, 1.0, 1.0, 1.0, (0, 1), 0.0), speed(2.0), "drop above 0.3")
    assert pick_winner([refused]) == (None, ())


# --- sensitivity and refinement -------------------------------------------------------------------


def test_groups_are_ranked_by_what_they_do_alone():
    verdict = found(Fake({"a": 1, "b": 30, "c": 7}))
    assert [s.group for s in verdict.sensitivity] == ["b", "c", "a"]
    assert [s.accuracy.drop for s in verdict.sensitivity] == pytest.approx([3.0, 0.7, 0.1])
    assert all(s.nodes == 2 for s in verdict.sensitivity)


def test_the_worst_groups_go_back_to_float_until_the_drop_holds():
    fake = Fake({"a": 1, "b": 30, "c": 7}, {"int8": 5, "int8, 2 groups float": 6})
    verdict = found(fake)
    assert verdict.winner == Variant("int8, 2 groups float", "int8", ("b", "c"))
    assert [name for name, quick in fake.asked if "float" in name and not quick] == [
        "int8, 1 group float",
        "int8, 2 groups float",
    ]
    assert by_name(verdict)["int8"].why_not == "drop above 0.3"
    assert "int8, 1 group float" not in by_name(verdict)  # only the last step is a candidate


def test_int8_that_passes_is_not_refined():
    fake = Fake({"a": 1, "b": 1})
    found(fake)
    assert [name for name, quick in fake.asked if not quick] == ["fp32", "bf16", "int8"]


def test_all_groups_float_is_never_tried():
    fake = Fake({"a": 50, "b": 50, "c": 50})
    verdict = found(fake)
    assert all(len(c.variant.keep_float) < 3 for c in verdict.candidates)
    assert by_name(verdict)["int8, 2 groups float"].why_not == "drop above 0.3"


def test_a_single_group_cannot_be_refined():
    fake = Fake({"all": 50})
    assert found(fake).sensitivity == ()


damages = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 60), min_size=1)


@given(
    damages,
    st.integers(0, 40),
    st.floats(1, 20),
    st.floats(1, 20),
    st.booleans(),
    st.one_of(st.none(), st.floats(0.5, 25)),
)
def test_the_winner_always_passes_and_nothing_faster_that_passes_is_left(
    damage, drop, bf16, int8, labelled, budget
):
    fake = Fake(damage, {"bf16": bf16, "int8": int8}, labelled)
    verdict = found(fake, max_drop=drop / 10, latency_budget=budget)
    able = [c for c in verdict.candidates if c.passes]
    assert (verdict.winner is None) == (not able)
    for c in able:
        assert c.accuracy.drop <= drop / 10 + 1e-6
        assert budget is None or c.speed.p50 <= budget
    if verdict.winner is None:
        assert budget is not None and budget < 10  # noqa: PT018  # float32 loses nothing, so only its latency can fail
        return
    winner = next(c for c in able if c.variant == verdict.winner)
    for c in able:
        assert c.speed.ratio_ci[0] <= winner.speed.ratio_ci[1] or c.variant.name in verdict.tied
    reachable = sorted(damage.values())[: len(damage) - 1]
    if (
        len(damage) > 1 and min(reachable) <= drop
    ):  # taking the worst back must reach what the best group alone does
        assert any(
            c.variant.precision == "int8" and c.accuracy.drop <= drop / 10 + 1e-6 for c in verdict.candidates
        )


# --- time -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", range(1, 14))
def test_the_time_budget_ends_the_search_with_the_best_so_far(budget):
    fake = Fake({"a": 1, "b": 30, "c": 7}, {"bf16": 8, "int8": 2, "int8, 2 groups float": 4})
    verdict = found(fake, deadline=float(budget), latency_seconds=0.5)
    assert verdict.winner is not None  # float32 at least
    ended = [n for n in verdict.notes if "time budget" in n]
    whole = by_name(verdict).get("int8, 2 groups float")
    assert bool(ended) == (whole is None)
    assert fake.now <= budget + fake.seconds
    for c in verdict.candidates:
        assert c.accuracy is not None or c.why_not == "not measured: no time left"


def test_time_for_the_latencies_is_kept():
    fake = Fake({"a": 1, "b": 1})
    verdict = found(fake, deadline=10.0, latency_seconds=4.0)
    assert by_name(verdict)["bf16"].accuracy is not None  # 1 s gone, 8 s of latencies
    assert by_name(verdict)["int8"].accuracy is None  # 2 s gone, 12 s of latencies
    assert "comparing variants" in verdict.notes[0]
