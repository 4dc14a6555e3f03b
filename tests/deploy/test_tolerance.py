"""How far an output may be from the golden one."""

from __future__ import annotations

import numpy as np
import pytest

from cmt_edge.deploy import report
from cmt_edge.deploy.measure.tolerance import MAX_PROBABILITY_DIFFERENCE, find_tolerance


def test_the_tolerance_of_probabilities_is_capped():
    sure = np.eye(4, dtype=np.float32) + np.float32(1e-7)
    assert find_tolerance(sure, "int8") > 0.6
    assert find_tolerance(sure, "int8", kind="probabilities") == pytest.approx(MAX_PROBABILITY_DIFFERENCE)
    assert find_tolerance(sure, "int8", kind="scores") == pytest.approx(MAX_PROBABILITY_DIFFERENCE)
    assert find_tolerance(sure, "fp32", kind="scores") == find_tolerance(sure, "fp32")
    assert find_tolerance(sure, "int8", 0.5, kind="scores") == 0.5
    assert find_tolerance(100 * sure, "int8") > 60


UNSURE = np.array([[0, z] for z in (0.05, -0.1, 0.2, 0.1)], np.float32)
"""One logit of four images, as two labels, of a classifier that is not sure of any."""


def test_an_unsure_classifier_of_one_logit_has_a_tolerance():
    """Its logits are all near 0 and have no spread, though 0.37 of a logit are 9 percentage points."""
    assert find_tolerance(UNSURE, "int8") == pytest.approx(0.375)
    assert find_tolerance(UNSURE, "bf16") == pytest.approx(0.0625)
    assert find_tolerance(UNSURE, "fp16") == pytest.approx(0.025)
    assert find_tolerance(0 * UNSURE, "int8") == pytest.approx(0.375)


def test_float32_needs_no_floor():
    assert find_tolerance(UNSURE, "fp32") < 2e-4


def test_one_logit_is_measured_on_its_own_scale():
    """It stands beside a 0: the difference of the two is its own, and not half of it each."""
    sure = np.array([[0, z] for z in (-6, 6, -6, 6)], np.float32)
    assert find_tolerance(sure, "int8") == pytest.approx(9)
    two = np.stack([-sure[:, 1] / 2, sure[:, 1] / 2], 1)
    assert find_tolerance(two, "int8") == pytest.approx(4.5)


def test_two_unsure_probabilities_have_a_tolerance():
    unsure = np.full((4, 2), 0.5, np.float32)
    assert find_tolerance(unsure, "int8", kind="probabilities") == pytest.approx(0.09375)


def test_more_than_two_classes_have_no_floor():
    assert find_tolerance(np.zeros((4, 3), np.float32), "int8") == 0
    assert find_tolerance(np.zeros((4, 1, 2, 2), np.float32), "int8") == 0


@pytest.mark.parametrize(
    ("found", "allowed", "shown"),
    [
        (0.1804, 0.1796, ("0.1804", "0.1796")),
        (0.18, 0.25, ("0.18", "0.25")),
        (0.5, 0.5, ("0.5", "0.5")),
        (1.0000001, 1.0, ("1.0000001", "1")),
        (float("inf"), 0.1, ("inf", "0.1")),
        (1 + 1e-15, 1.0, ("1.000000000000001", "1.0")),
    ],
)
def test_a_difference_and_the_allowed_one_never_look_equal(found, allowed, shown):
    assert report.format_differences(found, allowed) == shown
