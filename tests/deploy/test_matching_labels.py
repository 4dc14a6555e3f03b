"""Folders of images are matched with the labels of a bundle, or refused."""

from __future__ import annotations

import pytest

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.labels import match_labels
from cmt_edge.deploy.measure.parity import verify
from helpers.bundles import make_bundle
from helpers.images import coloured, folder_of
from helpers.verification import reference


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny")


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
