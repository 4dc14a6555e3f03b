"""Folders of images as people have them: links, parts, other names, masks and junk."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet
from helpers.collections import contents, fill


def test_links_to_class_folders_are_followed(tmp_path):
    """The usual way to make a subset."""
    root = fill(tmp_path / "all", {"cat/1.jpg": b"c1", "cat/2.jpg": b"c2", "dog/1.jpg": b"d1"})
    subset = fill(tmp_path / "subset", {"bird/1.jpg": b"b1"})
    for name in ("cat", "dog"):
        (subset / name).symlink_to(root / name, target_is_directory=True)
    images = ImageSet(subset)
    assert images.classes == ["bird", "cat", "dog"]
    assert contents(images)["cat/2.jpg"] == ("cat", b"c2")
    assert (len(images), images.note) == (4, "")
    (tmp_path / "whole").symlink_to(subset, target_is_directory=True)
    assert contents(ImageSet(tmp_path / "whole")) == contents(images)


def test_two_links_to_one_folder_are_two_folders(tmp_path):
    root = fill(tmp_path / "x", {"real/1.jpg": b"1"})
    (root / "a").symlink_to(root / "real", target_is_directory=True)
    assert ImageSet(root).classes == ["a", "real"]


def test_links_in_a_circle_end(tmp_path):
    root = fill(tmp_path / "x", {"cat/1.jpg": b"1", "dog/2.jpg": b"2"})
    (root / "cat" / "up").symlink_to(root, target_is_directory=True)
    (root / "dog" / "self").symlink_to(root / "dog", target_is_directory=True)
    (root / "cat" / "side").symlink_to(root / "dog", target_is_directory=True)
    images = ImageSet(root, labelled=False)
    assert [item.name for item in images] == ["cat/1.jpg", "cat/side/2.jpg", "dog/2.jpg"]
    assert "links to a folder above them" in images.note


@pytest.mark.parametrize("outside", [0, 1])
def test_a_link_to_the_folder_above_the_root_does_not_lead_into_it_again(tmp_path, outside):
    root = fill(tmp_path / "x", {"cat/1.jpg": b"1", "dog/2.jpg": b"2"})
    fill(tmp_path, {f"y/{i}.jpg": b"3" for i in range(outside)})
    (root / "cat" / "back").symlink_to(tmp_path, target_is_directory=True)
    images = ImageSet(root, labelled=False)
    beyond = ["cat/back/y/0.jpg"] * outside
    assert [item.name for item in images] == ["cat/1.jpg", *beyond, "dog/2.jpg"]
    assert "links to a folder above them" in images.note


def test_a_link_into_the_root_from_beside_it_does_not_double_the_images(tmp_path):
    """``x/side`` leads to a folder whose link leads into a class folder on the way to it."""
    root = fill(tmp_path / "x", {"cat/1.jpg": b"1"})
    other = fill(tmp_path / "other", {"2.jpg": b"2"})
    (root / "cat" / "side").symlink_to(other, target_is_directory=True)
    (other / "home").symlink_to(tmp_path / "x", target_is_directory=True)
    images = ImageSet(root, labelled=False)
    assert [item.name for item in images] == ["cat/1.jpg", "cat/side/2.jpg"]


def test_links_to_files_are_followed_and_those_that_lead_nowhere_named(tmp_path):
    """As the caches of DVC and git-annex leave them; what was not fetched leads nowhere."""
    fill(tmp_path, {"store/1": b"one"})
    (tmp_path / "x" / "cat").mkdir(parents=True)
    (tmp_path / "x" / "cat" / "1.jpg").symlink_to(tmp_path / "store" / "1")
    (tmp_path / "x" / "cat" / "2.jpg").symlink_to(tmp_path / "store" / "2")
    images = ImageSet(tmp_path / "x")
    assert contents(images) == {"cat/1.jpg": ("cat", b"one")}
    assert "1 links that lead nowhere" in images.note
    (tmp_path / "x" / "cat" / "1.jpg").unlink()
    with pytest.raises(DataError, match="lead nowhere"):
        ImageSet(tmp_path / "x")


def test_what_is_skipped_is_counted_by_kind(place):
    files = {"cat/1.jpg": b"1", "cat/2.heic": b"2", "cat/3.HEIC": b"3", "cat/4": b"4", "cat/5.jp2": b"5"}
    images = ImageSet(place({**files, "cat/.hidden": b"", "__MACOSX/cat/._1.jpg": b"", "Thumbs.db": b""}))
    assert dict(images.skipped) == {".heic": 2, ".jp2": 1, "without an ending": 1}
    assert "4 files were skipped: 2 .heic" in images.note
    assert ImageSet(images.path / "cat").note.count(".heic") == 1


def test_only_unsupported_images_are_named_in_the_error(place):
    with pytest.raises(DataError, match=r"2 \.heic"):
        ImageSet(place({"cat/1.heic": b"1", "cat/2.heic": b"2"}))


ENDINGS = [".jfif", ".jpe", ".JPG", ".pgm", ".pnm", ".pbm", ".dib", ".apng", ".avif", ".Jpeg", ".mpo"]


@pytest.mark.parametrize("ending", ENDINGS)
def test_endings_of_formats_that_are_decoded(place, ending):
    assert len(ImageSet(place({f"cat/1{ending}": b"1"}))) == 1


@pytest.mark.parametrize("junk", ["__MACOSX", ".ipynb_checkpoints", "@eaDir", ".git", "$RECYCLE.BIN"])
def test_what_systems_leave_in_folders_is_ignored(place, junk):
    images = ImageSet(place({"cat/1.jpg": b"1", f"{junk}/cat/1.jpg": b"x", f"cat/{junk}/1.jpg": b"y"}))
    assert contents(images) == {"cat/1.jpg": ("cat", b"1")}
    assert images.note == ""


NESTED = {"2023/01/a.jpg": b"1", "2023/02/a.jpg": b"2", "2024/01/a.jpg": b"3", "b.jpg": b"4"}


def test_any_nesting_without_labels(place):
    root = place(NESTED)
    assert len(ImageSet(root, labelled=False)) == 4
    with pytest.raises(DataError):
        ImageSet(root)


PARTS = [
    (("train", "test"), "train"),
    (("Training", "Testing"), "Training"),
    (("train2017", "val2017"), "train2017"),
    (("img_train", "img_test", "img_val"), "img_train"),
    (("test", "val"), "val"),
    (("test", "other"), "other"),
    (("images/test", "images/train"), "images/train"),
]


@pytest.mark.parametrize(("parts", "proposed"), PARTS)
def test_the_part_to_test_on_is_proposed_last(place, parts, proposed):
    root = place({f"{part}/{name}/1.jpg": b"x" for part in parts for name in ("cat", "dog")})
    with pytest.raises(DataError, match="same class") as caught:
        ImageSet(root)
    remedy = next(Path(word.rstrip(",")) for word in caught.value.remedy.split() if str(root) in word)
    assert remedy == root / proposed
    assert len(ImageSet(remedy)) == 2


def test_a_zip_without_an_ending_gets_the_command_that_unpacks_it(tmp_path):
    path = tmp_path / "my photos"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("cat/1.jpg", b"1")
    with pytest.raises(DataError, match="is compressed") as caught:
        ImageSet(path)
    remedy = caught.value.remedy
    assert f"unzip -q '{path}' -d '{path}_unpacked'   then give {path}_unpacked" in remedy


def test_a_class_called_train_in_two_parts(place):
    root = place({f"{part}/train/1.jpg": b"x" for part in ("train", "test")})
    with pytest.raises(DataError, match="same class") as caught:
        ImageSet(root)
    assert f"{root / 'train'} to train or calibrate" in caught.value.remedy


def test_images_below_their_class(place):
    """Tiny ImageNet."""
    images = ImageSet(place({"n01/images/0.JPEG": b"0", "n02/images/0.JPEG": b"1", "n02/n02_boxes.txt": b""}))
    assert {item.name: item.label for item in images} == {
        "n01/images/0.JPEG": "n01",
        "n02/images/0.JPEG": "n02",
    }
    assert ImageSet(images.path / "n01").classes == ["images"]


@pytest.mark.parametrize("pictures", ["imgs", "img", "Images"])
def test_other_names_of_the_folder_with_the_images_of_a_class(place, pictures):
    images = ImageSet(place({f"cat/{pictures}/0.png": b"0", f"dog/{pictures}/0.png": b"1"}))
    assert [item.label for item in images] == ["cat", "dog"]


def test_a_folder_of_another_name_inside_each_class_gets_a_remedy_that_helps(place):
    root = place({"cat/photos/0.png": b"0", "dog/photos/1.png": b"1"})
    with pytest.raises(DataError, match="same class") as caught:
        ImageSet(root)
    assert "if cat, dog and so on are the classes, move their images out of photos/" in caught.value.remedy


def test_masks_inside_a_class_are_no_class(place):
    files = {"cat/images/0.png": b"0", "cat/masks/0.png": b"m", "dog/images/0.png": b"1"}
    images = ImageSet(place(files))
    assert images.classes == ["cat", "dog"]
    assert len(images) == 2
    assert "1 in masks/ beside the pictures" in images.note
    assert len(ImageSet(images.path, labelled=False)) == 3


def test_classes_called_images_and_masks(place):
    assert ImageSet(place({"images/0.png": b"0", "masks/0.png": b"1"})).classes == ["images", "masks"]


def test_a_class_may_be_called_train(place):
    root = place({"train/1.jpg": b"1", "bus/1.jpg": b"2", "testbench/1.jpg": b"3"})
    images = ImageSet(root)
    assert images.classes == ["bus", "testbench", "train"]
    assert images.parts == {}
