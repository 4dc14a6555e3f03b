"""The answer: its best classes, its probabilities, and what its values mean."""

from __future__ import annotations

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Prediction, Predictor
from cmt_edge.deploy.bundle.sections import TensorEntry
from helpers.bundles import make_bundle
from helpers.images import BLUE, GREEN, RED

# --- the answer -----------------------------------------------------------------------------------


@pytest.fixture
def answer() -> Prediction:
    return Prediction(np.array([1.0, 3.0, 2.0, 3.0], np.float32), ["a", "b", "c", "d"])


def test_top_is_ordered_best_first_ties_by_index(answer):
    assert [label for label, _ in answer.top(4)] == ["b", "d", "c", "a"]
    chances = [p for _, p in answer.top(4)]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) == pytest.approx(1)
    assert answer.label == "b"


@pytest.mark.parametrize(("k", "count"), [(1, 1), (2, 2), (4, 4), (5, 4), (1000, 4), (0, 0), (-1, 0)])
def test_top_of_any_size(answer, k, count):
    assert answer.top(k) == answer.top(4)[:count]
    assert all(type(p) is float for _, p in answer.top(k))


def test_probabilities_of_large_logits_stay_finite():
    p = Prediction(np.array([1e4, -1e4, 1e4], np.float32), "abc").probabilities
    np.testing.assert_allclose(p, [0.5, 0, 0.5])


@pytest.mark.parametrize(("blob", "label"), [(RED, "red"), (GREEN, "green"), (BLUE, "blue")])
def test_known_colours_get_known_classes(tmp_path, blob, label):
    with Predictor.load(make_bundle(tmp_path / "b")) as p:
        assert p(blob).label == label


# --- what the values mean -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["probabilities", "scores"])
def test_probabilities_are_not_put_through_a_softmax_again(kind):
    values = np.array([0.1, 0.9999997, 0.3], np.float32)
    answer = Prediction(values, ["a", "b", "c"], kind=kind)
    np.testing.assert_array_equal(answer.probabilities, values)
    assert answer.label == "b"
    assert answer.top(2) == [("b", pytest.approx(0.9999997)), ("c", pytest.approx(0.3))]


@pytest.mark.parametrize("kind", [None, "probabilities", "scores"])
def test_a_bundle_says_what_its_values_are(tmp_path, kind):
    shape = (1, 3)
    output = TensorEntry(name="logits", shape=shape, dtype="float32", kind=kind)
    bundle = make_bundle(tmp_path / "b", outputs=(output,))
    assert bundle.kind == (kind or "logits")
    with Predictor.load(Bundle.open(bundle.path)) as predictor:
        (called, *rest) = [predictor(RED), *predictor.predict([RED] * 2), *predictor.attempt([RED])]
    assert {p.kind for p in (called, *rest)} == {bundle.kind}
    assert (called.probabilities.sum() == pytest.approx(1)) == (kind is None)
