"""Verification: a faithful bundle passes, a tampered one fails, and the figures are those of a hand
calculation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor, report
from cmt_edge.deploy.backends.fake import FakeSession
from cmt_edge.deploy.bundle import GOLDEN, Golden
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.parity import MAX_DROP, verify
from helpers.bundles import SPEC, blank_head, copy_bundle, make_bundle, tiny_golden


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


@pytest.mark.parametrize("which", ["fp32_bundle", "onnx_bundle", "int8_bundle"])
def test_real_bundles_pass_their_golden_check(request, which):
    bundle = request.getfixturevalue(which)
    result = verify(Bundle.open(bundle.path))
    assert result.passed
    assert result.golden.images == 5
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


def test_json_says_whether_it_passed(tmp_path):
    bad = with_golden(tmp_path / "b", outputs=[tiny_golden().logits + 1])
    assert json.loads(report.to_json(verify(bad)))["passed"] is False
    assert json.loads(report.to_json(verify(bad)))["golden"]["passed"] is False


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
