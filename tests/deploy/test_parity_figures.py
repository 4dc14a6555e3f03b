"""The figures of a verification are those of a hand calculation, and what they cannot show is said."""

from __future__ import annotations

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, report
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.errors import ImageError
from cmt_edge.deploy.images import hash_image
from cmt_edge.deploy.measure.parity import MAX_DROP, verify
from helpers.bundles import make_bundle
from helpers.cli import strict
from helpers.images import COLOURS, coloured, folder_of
from helpers.verification import Differing, reference


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


def test_figures_of_a_hand_calculation(bundle, tmp_path):
    """Ten images: 4 right in both, 3 lost, 1 gained, 2 wrong in both in different ways."""
    data = folder_of(
        tmp_path / "data",
        {
            "red": [coloured("red", s) for s in (0, 1)],  # both right
            "green": [
                coloured("green", 0),
                coloured("green", 2),
                coloured("red", 100),
                coloured("red", 110),
                coloured("red", 120),
            ],
            "blue": [coloured("red", 101), coloured("red", 102), coloured("green", 101)],
        },
    )  # green: 2 right in both, 3 only in the reference; blue: 2 wrong in both, 1 only in the reference
    result = verify(bundle, data=data, reference=reference(Differing(3)), max_drop=39.9)
    d = result.data
    assert d.images == 10
    assert d.top1 == pytest.approx(40)
    assert d.reference_top1 == pytest.approx(80)
    assert d.drop == pytest.approx(40)
    assert d.agreement == pytest.approx(40)
    # Wilson: 80 % of 10 is 49.02 to 94.33, 40 % is 16.82 to 68.73; correlation (4 * 2 - 5) / 384 ** 0.5
    assert d.drop_ci == pytest.approx((1.10, 65.32), abs=0.01)
    assert not result.passed
    assert verify(bundle, data=data, reference=reference(Differing(3)), max_drop=40).passed
    expected = {
        hash_image(coloured("red", 100)): 1,
        hash_image(coloured("red")): 0,
        hash_image(coloured("green", 101)): 2,
    }
    assert expected.items() <= result.reference_answers.items()
    text = report.describe_verification(result)
    assert "+40.00" in text
    assert "FAILED" in text


def test_gains_outweigh_losses(bundle, tmp_path):
    data = folder_of(
        tmp_path / "data",
        {"red": [coloured("red", 100), coloured("red", 101)], "green": [coloured("red", 102)]},
    )
    d = verify(bundle, data=data, reference=reference(Differing(3))).data
    assert d.drop == pytest.approx(100 * (1 - 2) / 3)
    assert d.passed
    assert d.agreement == 0


def test_logit_differences(bundle, tmp_path):
    class Shifted(FakeSession):
        def run(self, batch):
            return [super().run(batch)[0] + np.float32([0.5, 0, 0])]

    d = verify(
        bundle, data=folder_of(tmp_path / "d", {"red": [coloured("red")]}), reference=reference(Shifted(3))
    ).data
    assert d.logit_max_diff == pytest.approx(0.5, abs=1e-6)
    assert d.logit_mean_diff == pytest.approx(0.5 / 3, abs=1e-6)


def test_more_images_than_one_chunk(bundle, tmp_path):
    shades = range(45)
    data = folder_of(tmp_path / "d", {name: [coloured(name, s) for s in shades] for name in COLOURS})
    result = verify(bundle, data=data, reference=reference())
    d = result.data
    assert (d.images, d.top1, d.agreement) == (135, 100.0, 100.0)
    assert len(result.reference_answers) == 135


@pytest.mark.parametrize("limit", [1, 7, 10, 19, 20, 50])
def test_limit_is_kept_and_spread(bundle, tmp_path, limit):
    data = folder_of(
        tmp_path / "d", {name: [coloured(name, s) for s in range(10)] for name in ("green", "red")}
    )
    result = verify(bundle, data=data, reference=reference(), limit=limit)
    assert result.data.images == min(limit, 20)
    if limit > 1:
        assert set(result.reference_answers.values()) == {0, 1}


def test_report_of_a_single_image_is_strict_json(bundle, tmp_path):
    result = verify(bundle, data=folder_of(tmp_path / "d", {"red": [coloured("red")]}), reference=reference())
    content = strict(report.to_json(result))
    assert content["passed"] is True
    assert content["data"]["images"] == 1
    assert "reference_answers" not in content


@pytest.mark.parametrize("markdown", [False, True])
def test_text_names_both_sides(bundle, tmp_path, markdown):
    result = verify(bundle, data=folder_of(tmp_path / "d", {"red": [coloured("red")]}), reference=reference())
    text = report.describe_verification(result, markdown)
    for part in (
        "golden images: 2",
        "reference top-1",
        "100.00",
        "fake 1",
        "verified",
        f"allowed drop {MAX_DROP:g}",
    ):
        assert part in text


def test_damaged_image_is_named(bundle, tmp_path):
    data = folder_of(tmp_path / "d", {"red": [coloured("red"), b"junk"]})
    with pytest.raises(ImageError, match=r"red/001\.png"):
        verify(bundle, data=data, reference=reference())


def test_two_equal_images_do_not_verify_the_accuracy(bundle, tmp_path):
    data = folder_of(tmp_path / "d", {"red": [coloured("red")], "green": [coloured("green")]})
    result = verify(bundle, data=data, reference=reference())
    assert result.passed
    assert result.data.drop_ci == pytest.approx((-65.76, 65.76), abs=0.01)
    assert result.notes == (result.data.doubt,)
    text = report.describe_verification(result)
    assert "warning: 2 images cannot show that the drop is at most 1 points" in text
    assert text.splitlines()[-1].endswith(
        "golden images verified; 2 images are too few to judge the accuracy"
    )
    assert strict(report.to_json(result))["notes"] == [result.data.doubt]


def test_many_equal_images_verify_the_accuracy(bundle, tmp_path):
    shades = range(140)
    data = folder_of(tmp_path / "d", {name: [coloured(name, s) for s in shades] for name in COLOURS})
    result = verify(bundle, data=data, reference=reference())
    assert result.notes == ()
    assert result.data.doubt == ""
    assert report.describe_verification(result).endswith(": verified")


def test_a_drop_that_fails_is_not_doubted_as_well(bundle, tmp_path):
    data = folder_of(tmp_path / "d", {"green": [coloured("red", 100), coloured("red", 101)]})
    result = verify(bundle, data=data, reference=reference(Differing(3)))
    assert not result.passed
    assert result.data.doubt == ""
    assert "NOT verified" in report.describe_verification(result)


def test_a_reference_at_chance_level_is_a_warning(bundle, tmp_path):
    """Folders whose names are permuted: every answer is wrong on both sides, so that nothing drops."""
    names = dict(zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True))
    data = folder_of(tmp_path / "d", {names[c]: [coloured(c, s) for s in range(20)] for c in COLOURS})
    result = verify(bundle, data=data, reference=reference())
    assert result.passed
    assert any("REFERENCE itself is right on only 0.00 %" in note for note in result.notes)
    assert "warning: the REFERENCE" in report.describe_verification(result)


# right answers of the reference, images of each class, number of labels -> is it at chance level?
CHANCE = [
    (90, (50, 50), 2, False),
    (50, (50, 50), 2, True),
    (94, (95, 5), 2, True),
    (97, (95, 5), 2, False),
    (12, (10,) * 10, 10, True),
    (60, (10,) * 10, 10, False),
    (1, (1, 1, 1), 3, True),
    (2, (1, 1, 1), 3, False),
    (20, (20,), 3, False),
    (6, (20,), 3, True),
    (0, (1,), 3, True),
    (1, (1,), 3, False),
]


@pytest.mark.parametrize(("right", "counts", "classes", "warned"), CHANCE)
def test_what_chance_level_is(bundle, tmp_path, right, counts, classes, warned):
    labels = [f"class_{i}" for i in range(classes)]
    truth = np.repeat(np.arange(len(counts)), counts)
    answers = np.where(np.arange(len(truth)) < right, truth, (truth + 1) % classes)
    images = [coloured("red", shade) for shade in range(len(truth))]
    recorded = {hash_image(image): int(answer) for image, answer in zip(images, answers, strict=True)}
    made = make_bundle(tmp_path / "b", labels=labels, reference=recorded)
    parts = {labels[c]: [i for i, t in zip(images, truth, strict=True) if t == c] for c in range(len(counts))}
    result = verify(made, data=folder_of(tmp_path / "d", parts), max_drop=100)
    assert result.data.reference_top1 == pytest.approx(100 * right / len(truth))
    assert any("REFERENCE" in note for note in result.notes) == warned
