"""Verification: a faithful bundle passes, a tampered one fails, and the figures are those of a hand
calculation."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor, report
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle import GOLDEN, REFERENCE, Golden, save_reference
from cmt_edge.deploy.errors import BundleError, DataError, ImageError, RuntimeMissingError
from cmt_edge.deploy.images import ImageSet, hash_image
from cmt_edge.deploy.measure.labels import match_labels
from cmt_edge.deploy.measure.parity import MAX_DROP, MAX_PROBABILITY_DIFFERENCE, find_tolerance, verify
from helpers.bundles import SPEC, blank_head, copy_bundle, make_bundle, tiny_golden
from helpers.cli import strict
from helpers.images import COLOURS, coloured, folder_of


class Differing(FakeSession):
    """A reference that sees the next class in images whose shade is 100 or more."""

    def run(self, batch):
        (logits,) = super().run(batch)
        dark = batch.max((1, 2, 3)) < 0.7
        logits[dark] = np.roll(logits[dark], 1, axis=1)
        return [logits]


def reference(session=None) -> Predictor:
    return Predictor(session or FakeSession(3), SPEC, list(COLOURS), batch=0)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


@pytest.fixture
def no_torch(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )


# --- real bundles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["fp32_bundle", "onnx_bundle", "int8_bundle"])
def test_real_bundles_pass_their_golden_check(request, which):
    bundle = request.getfixturevalue(which)
    result = verify(Bundle.open(bundle.path))
    assert result.passed
    assert result.golden.images == 4
    assert result.golden.pixel_diff == 0
    assert 0 <= result.golden.diff <= result.golden.atol
    assert result.data is None
    assert result.precision == bundle.manifest.precision
    assert result.bundle == str(bundle.path)


@pytest.mark.parametrize("name", ["openvino", "onnxruntime", "torch"])
def test_every_runtime_passes(fp32_bundle, name):
    result = verify(fp32_bundle, backend=name, threads=1)
    assert result.passed
    assert result.runtime.runtime.startswith(name)
    assert result.golden.diff < 1e-4


def test_fake_runtime_is_no_substitute(fp32_bundle):
    assert not verify(fp32_bundle, backend="fake").passed


def test_top1_on_images_against_pytorch(fp32_bundle, cifar):
    seen = []
    data = ImageSet(cifar / "test")
    result = verify(
        fp32_bundle, data=data, limit=50, threads=1, progress=lambda done, total: seen.append((done, total))
    )
    d = result.data
    assert result.passed
    assert (d.images, d.agreement, d.drop) == (50, 100.0, 0.0)
    assert -10 < d.drop_ci[0] < -MAX_DROP < MAX_DROP < d.drop_ci[1] < 10
    assert any("50 images cannot show" in note for note in result.notes)
    assert d.top1 == d.reference_top1 >= 80
    assert d.logit_max_diff < 1e-3
    assert d.logit_mean_diff <= d.logit_max_diff
    assert d.reference_source.startswith("torch ")
    assert len(result.reference_answers) == 50
    assert seen[-1] == (50, 50)
    assert seen == sorted(seen)


def test_int8_against_an_fp32_bundle_needs_no_torch(int8_bundle, fp32_bundle, cifar, no_torch):
    data = ImageSet(cifar / "test")
    with Predictor.load(fp32_bundle, threads=1) as other:
        result = verify(int8_bundle, data=data, limit=100, reference=other, max_drop=5)
        assert result.passed
        assert result.data.agreement >= 90
        assert result.data.reference_source.startswith("openvino")
        assert other.predict([]) == []


@pytest.fixture(scope="module")
def tampered(onnx_bundle, tmp_path_factory):
    """Other weights under valid hashes."""
    return copy_bundle(onnx_bundle, tmp_path_factory.mktemp("tampered") / "b", blank_head)


def test_tampered_model_fails_its_golden_check(tampered, onnx_bundle):
    result = verify(Bundle.open(tampered.path))
    assert not result.passed
    assert not result.golden.passed
    assert result.golden.diff > 100 * result.golden.atol
    assert result.golden.pixel_diff == 0
    assert "NOT verified" in report.describe_verification(result)
    assert verify(onnx_bundle).passed


def test_tampered_model_fails_on_images(tampered, cifar):
    data = ImageSet(cifar / "test")
    result = verify(tampered, data=data, limit=50, atol=1e9, threads=1)
    assert result.golden.passed
    assert not result.data.passed
    assert not result.passed
    assert result.data.drop > 50
    assert result.data.drop_ci[0] < result.data.drop < result.data.drop_ci[1]
    assert result.data.top1 <= 20


def test_large_max_drop_lets_it_pass(tampered, cifar):
    data = ImageSet(cifar / "test")
    assert verify(tampered, data=data, limit=10, atol=1e9, max_drop=100, threads=1).passed


# --- golden ---------------------------------------------------------------------------------------


def with_golden(path, **changes) -> Bundle:
    return make_bundle(path, golden=replace(tiny_golden(), **changes))


def test_golden_logits_of_another_model(tmp_path):
    golden = tiny_golden()
    bad = with_golden(tmp_path / "b", outputs=[golden.logits[:, ::-1].copy()])
    result = verify(bad)
    assert not result.passed
    assert result.golden.diff == pytest.approx(
        float(np.abs(golden.logits - golden.logits[:, ::-1]).max()), rel=1e-5
    )


@pytest.mark.parametrize(("levels", "passed"), [(0, True), (2, True), (3, False), (40, False)])
def test_golden_pixels(tmp_path, levels, passed):
    golden = tiny_golden()
    values = golden.pixels.copy()
    y, x, c = np.argwhere(values[1] < 200)[0]
    values[1, y, x, c] += levels
    result = verify(with_golden(tmp_path / "b", pixels=values), atol=1.0)
    assert result.golden.pixel_diff == levels
    assert result.golden.passed == result.passed == passed


def test_other_preprocessing_is_noticed(tmp_path):
    made = make_bundle(tmp_path / "b")
    turned = copy_bundle(made, tmp_path / "c", preprocess=replace(SPEC, short_side=20))
    assert verify(turned).golden.pixel_diff > 2
    assert not verify(turned).passed
    shifted = copy_bundle(made, tmp_path / "d", preprocess=replace(SPEC, mean=(0.1, 0, 0)))
    assert verify(shifted).golden.pixel_diff == 0
    assert not verify(shifted).passed


@pytest.mark.parametrize(("atol", "passed"), [(0.2, True), (0.09, False)])
def test_atol_overrides_the_default(tmp_path, atol, passed):
    bundle = with_golden(tmp_path / "b", outputs=[tiny_golden().logits + np.float32(0.1)])
    assert not verify(bundle).passed
    result = verify(bundle, atol=atol)
    assert result.golden.atol == atol
    assert result.golden.diff == pytest.approx(0.1, abs=1e-5)
    assert result.passed == passed


@pytest.mark.usefixtures("served_by_fake")
def test_default_tolerance_grows_from_fp32_to_int8(tmp_path):
    bundles = [make_bundle(tmp_path / p, precision=p, format="openvino") for p in ("fp32", "bf16", "int8")]
    tolerances = [verify(bundle).golden.atol for bundle in bundles]
    assert tolerances == sorted(tolerances)
    assert tolerances[0] < 0.01 * tolerances[2]


@pytest.mark.usefixtures("served_by_fake")
def test_model_that_returns_nan_fails(tmp_path, monkeypatch):
    from cmt_edge.deploy.backends import fake

    class Broken(FakeSession):
        def run(self, batch):
            return [np.full((len(batch), 3), np.nan, np.float32)]

    bundle = make_bundle(tmp_path / "b")
    monkeypatch.setattr(fake.RUNTIME, "load", lambda b, options: Broken(3))
    result = verify(bundle, atol=1e9)
    assert not result.passed


@pytest.mark.parametrize("value", [3e38, 1e10, float("nan"), float("inf"), -float("inf")])
def test_golden_values_that_no_model_gives_are_refused(tmp_path, value):
    outputs = tiny_golden().logits.copy()
    outputs[0, 1] = value
    with pytest.raises(BundleError, match="no answer of a model"):
        verify(with_golden(tmp_path / "b", outputs=[outputs]))


@pytest.mark.usefixtures("served_by_fake")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("size", [1e2, 1e5, 1e9])
def test_golden_values_that_spread_far_allow_no_more(tmp_path, precision, size):
    far = np.resize(np.array([size, -size], np.float32), tiny_golden().logits.shape)
    made = with_golden(tmp_path / "a", outputs=[far])
    bundle = copy_bundle(made, tmp_path / "b", precision=precision, format="openvino")
    golden = verify(bundle).golden
    assert not golden.passed
    assert np.isfinite([golden.diff, golden.atol]).all()


def test_golden_images_that_are_none_name_the_bundle(tmp_path):
    golden = replace(tiny_golden(), sources=[b"abc", b""])
    with pytest.raises(BundleError, match="cannot be decoded") as found:
        verify(make_bundle(tmp_path / "b", golden=golden))
    assert str(tmp_path / "b" / "golden.npz") in str(found.value)


@pytest.mark.usefixtures("served_by_fake")
def test_a_difference_that_is_not_finite_is_still_json(tmp_path, monkeypatch):
    bundle = make_bundle(tmp_path / "b")
    monkeypatch.setattr(
        FakeSession, "run", lambda self, batch: [np.full((len(batch), 3), np.inf, np.float32)]
    )
    text = report.to_json(verify(bundle))
    assert json.loads(text, parse_constant=pytest.fail)["golden"]["passed"] is False


# --- figures --------------------------------------------------------------------------------------


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


def test_json_says_whether_it_passed(tmp_path):
    bad = with_golden(tmp_path / "b", outputs=[tiny_golden().logits + 1])
    assert json.loads(report.to_json(verify(bad)))["passed"] is False
    assert json.loads(report.to_json(verify(bad)))["golden"]["passed"] is False


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


# --- reference ------------------------------------------------------------------------------------


def test_recorded_reference_is_used_where_it_knows_the_images(tmp_path, no_torch):
    blobs = [coloured("red", s) for s in range(20)]
    recorded = {hash_image(b): 0 for b in blobs} | {hash_image(blobs[3]): 2}
    bundle = make_bundle(tmp_path / "b", reference=recorded)
    d = verify(bundle, data=folder_of(tmp_path / "d", {"red": blobs})).data
    assert d.reference_source == "the bundle's record"
    assert d.reference_top1 == pytest.approx(95)
    assert d.top1 == 100
    assert d.drop == pytest.approx(-5)
    assert d.logit_max_diff is d.logit_mean_diff is None
    row = report.describe_verification(replace(verify(bundle), data=d), markdown=True).splitlines()[3]
    assert [cell.strip() for cell in row.strip("|").split("|")][-2:] == ["-", "-"]


def test_real_bundle_verifies_without_pytorch_after_recording(fp32_bundle, tmp_path, cifar, monkeypatch):
    data = ImageSet(cifar / "test")
    first = verify(fp32_bundle, data=data, limit=20, threads=1)
    recorded = copy_bundle(
        fp32_bundle, tmp_path / "b", lambda f: save_reference(f / REFERENCE, first.reference_answers)
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find(name, *a)
    )
    again = verify(Bundle.open(recorded.path), data=data, limit=20).data
    assert again.reference_source == "the bundle's record"
    assert (again.top1, again.reference_top1, again.agreement) == (
        first.data.top1,
        first.data.reference_top1,
        100,
    )
    with pytest.raises(RuntimeMissingError):
        verify(recorded, data=data, limit=30)


def test_no_reference_at_all(bundle, tmp_path, no_torch):
    data = folder_of(tmp_path / "d", {"red": [coloured("red")]})
    with pytest.raises(RuntimeMissingError, match="no reference") as caught:
        verify(bundle, data=data)
    assert caught.value.exit_code == 3
    assert "--reference" in caught.value.remedy
    assert verify(bundle).passed


def test_record_of_other_images_is_no_reference(tmp_path, no_torch):
    bundle = make_bundle(tmp_path / "b", reference={hash_image(coloured("red")): 0})
    data = folder_of(tmp_path / "d", {"red": [coloured("red"), coloured("red", 1)]})
    with pytest.raises(RuntimeMissingError):
        verify(bundle, data=data)


def test_given_reference_wins_over_the_record(tmp_path):
    bundle = make_bundle(tmp_path / "b", reference={hash_image(coloured("red")): 2})
    d = verify(bundle, data=folder_of(tmp_path / "d", {"red": [coloured("red")]}), reference=reference()).data
    assert (d.reference_top1, d.reference_source) == (100, "fake 1")


# --- labels ---------------------------------------------------------------------------------------

PAIRS = (("n02", "tench"), ("n01", "great white shark"), ("n03", "hen"))


def classes(path, names) -> ImageSet:
    return folder_of(path, {name: [coloured("red")] for name in names})


def test_labels_match_by_id_or_by_name(tmp_path):
    bundle = make_bundle(tmp_path / "b", labels=PAIRS)
    by_id = classes(tmp_path / "id", ["n01", "n02", "n03"])
    by_name = classes(tmp_path / "name", ["hen", "tench", "great white shark"])
    part = classes(tmp_path / "part", ["hen"])
    assert match_labels(bundle, by_id, False) == {"n01": 1, "n02": 0, "n03": 2}
    assert match_labels(bundle, by_name, False) == {"hen": 2, "tench": 0, "great white shark": 1}
    assert match_labels(bundle, part, False) == {"hen": 2}


def test_labels_match_by_order(tmp_path):
    bundle = make_bundle(tmp_path / "b", labels=PAIRS)
    assert match_labels(bundle, classes(tmp_path / "d", ["b", "c", "a"]), True) == {"a": 0, "b": 1, "c": 2}
    with pytest.raises(DataError, match="2 class folders for 3 labels") as caught:
        match_labels(bundle, classes(tmp_path / "two", ["a", "b"]), True)
    assert caught.value.remedy


def test_labels_that_do_not_match_show_both_sides(tmp_path):
    bundle = make_bundle(tmp_path / "b", labels=PAIRS)
    with pytest.raises(DataError, match="do not match") as caught:
        match_labels(bundle, classes(tmp_path / "d", ["hen", "tensh", "wolf"]), False)
    text = str(caught.value)
    for name in ("tensh", "wolf", "tench", "n02", "great white shark"):
        assert name in text
    assert "--by-order" in caught.value.remedy


def test_long_mismatch_stays_readable(tmp_path):
    bundle = make_bundle(tmp_path / "b", labels=tuple(f"label{i}" for i in range(200)))
    with pytest.raises(DataError, match="more") as caught:
        match_labels(bundle, classes(tmp_path / "d", [f"folder{i:03}" for i in range(40)]), False)
    assert len(str(caught.value)) < 1000


def test_name_that_two_classes_share_is_refused(tmp_path):
    """ImageNet has two classes "crane" (the bird, the machine) and two "maillot"."""
    bundle = make_bundle(tmp_path / "b", labels=(("n1", "crane"), ("n2", "crane"), ("n3", "hen")))
    assert match_labels(bundle, classes(tmp_path / "ids", ["n1", "n2"]), False) == {"n1": 0, "n2": 1}
    with pytest.raises(DataError, match="crane"):
        match_labels(bundle, classes(tmp_path / "names", ["crane", "hen"]), False)


def test_a_folder_of_a_double_label_is_refused_not_guessed(tmp_path):
    """Labels of a file are their own ids: which crane a folder "crane" holds, nobody knows."""
    bundle = make_bundle(tmp_path / "b", labels=("crane", "crane", "hen"))
    assert match_labels(bundle, classes(tmp_path / "hen", ["hen"]), False) == {"hen": 2}
    with pytest.raises(DataError, match="several classes are called crane") as caught:
        match_labels(bundle, classes(tmp_path / "both", ["crane", "hen"]), False)
    assert "labels that differ" in caught.value.remedy
    in_order = classes(tmp_path / "order", ["0", "1", "2"])
    assert match_labels(bundle, in_order, True) == {"0": 0, "1": 1, "2": 2}


def test_flat_folder_has_no_classes(bundle, tmp_path):
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "a.png").write_bytes(coloured("red"))
    with pytest.raises(DataError, match="not in class folders") as caught:
        verify(bundle, data=ImageSet(tmp_path / "flat"), reference=reference())
    assert caught.value.remedy


def test_golden_of_another_shape_is_not_accepted(tmp_path):
    """Fewer logits than the model has, as after a change of the head: a verdict or a typed error, no
    crash."""
    from cmt_edge.deploy.errors import CmtEdgeError

    golden = tiny_golden()
    bad = make_bundle(tmp_path / "b", golden=Golden(golden.sources, golden.pixels, [golden.logits[:, :2]]))
    assert GOLDEN in bad.manifest.files
    try:
        passed = verify(bad).passed
    except CmtEdgeError:
        passed = False
    assert not passed


# --- what few images cannot show, and a reference at chance level ----------------------------------


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


# --- the tolerance of probabilities ---------------------------------------------------------------


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
