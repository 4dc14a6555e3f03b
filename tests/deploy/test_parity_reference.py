"""Where the reference's answers come from: a Predictor, the bundle's record, or PyTorch."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest

from cmt_edge.deploy import Bundle, report
from cmt_edge.deploy.bundle import REFERENCE, save_reference
from cmt_edge.deploy.errors import RuntimeMissingError
from cmt_edge.deploy.images import ImageSet, hash_image
from cmt_edge.deploy.measure.parity import verify
from helpers.bundles import copy_bundle, make_bundle
from helpers.images import coloured, folder_of
from helpers.verification import reference


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


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
