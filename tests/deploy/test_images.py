"""Collections of images: folders and archives of equal content are equal collections; what is wrong is
said."""

from __future__ import annotations

import gzip
import os
import tarfile
import threading
from pathlib import Path

import pytest

from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet, hash_image
from helpers.collections import CLASSES, FLAT, SPLIT, archive, contents, fill, good_archive


def test_class_folders(place):
    images = ImageSet(place(CLASSES))
    assert contents(images) == {
        "cat/10.JPG": ("cat", b"ten"),
        "cat/2.jpg": ("cat", b"two"),
        "dog/a.webp": ("dog", b"ay"),
        "dog/b.png": ("dog", b"bee"),
    }
    assert [item.name for item in images] == sorted(contents(images))
    assert images.classes == ["cat", "dog"]
    assert len(images) == 4
    assert images[0].name == "cat/10.JPG"


def test_flat_folder(place):
    images = ImageSet(place(FLAT))
    assert contents(images) == {"a.jpg": (None, b"ay"), "b.png": (None, b"bee")}
    assert images.classes == []


def test_part_of_a_collection(place):
    root = place(SPLIT)
    parts = [ImageSet(root / part) for part in ("train", "test")]
    assert contents(parts[0]) == contents(parts[1])
    assert parts[0].classes == ["cat", "dog"]
    assert contents(ImageSet(root / "train" / "dog")) == {"a.webp": (None, b"ay"), "b.png": (None, b"bee")}


def test_part_names_are_whole_folders(place):
    with pytest.raises(DataError):
        ImageSet(place(SPLIT) / "tra")


def test_hidden_folders_are_ignored(place):
    """Notebooks and file managers leave copies of images in folders that begin with a dot."""
    images = ImageSet(
        place({"cat/1.jpg": b"1", "cat/.ipynb_checkpoints/1-checkpoint.jpg": b"2", ".trash/cat/3.jpg": b"3"})
    )
    assert contents(images) == {"cat/1.jpg": ("cat", b"1")}


def test_the_same_class_in_two_splits_names_a_way_out(place):
    root = place(SPLIT)
    with pytest.raises(DataError, match="same class") as caught:
        ImageSet(root)
    assert "train/cat" in str(caught.value)
    assert str(root / "test") in caught.value.remedy or str(root / "train") in caught.value.remedy
    remedy = next(Path(word) for word in caught.value.remedy.split() if str(root) in word)
    assert len(ImageSet(remedy)) == 4


def test_loose_images_beside_class_folders(place):
    with pytest.raises(DataError, match="mixes") as caught:
        ImageSet(place({**CLASSES, "loose.png": b"?"}))
    assert "loose.png" in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("files", [{}, {"a.txt": b"x"}, {".a.png": b"x"}], ids=["nothing", "text", "hidden"])
def test_no_images(place, tmp_path, files):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match="no images") as caught:
        ImageSet(place(files))
    assert ".png" in caught.value.remedy


def test_missing_folder_and_plain_file(tmp_path):
    (tmp_path / "file.txt").write_text("x")
    for name, text in (
        ("absent", "no such folder"),
        ("absent.tar", "no such folder"),
        ("file.txt", "neither"),
    ):
        with pytest.raises(DataError, match=text) as caught:
            ImageSet(tmp_path / name)
        assert caught.value.where == str(tmp_path / name)


def test_missing_part_of_an_archive(tmp_path):
    path = archive(tmp_path / "x.tar", CLASSES)
    with pytest.raises(DataError, match="no images"):
        ImageSet(path / "absent")


def test_name_longer_than_the_system_allows():
    with pytest.raises(DataError):
        ImageSet("x" * 5000)


def test_unreadable_folder(tmp_path, monkeypatch):
    fill(tmp_path, CLASSES)
    scan = os.scandir

    def refuse(path):
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="cannot be read") as caught:
        ImageSet(tmp_path)
    assert caught.value.where == str(tmp_path / "dog")


def test_image_that_vanished(tmp_path):
    images = ImageSet(fill(tmp_path, CLASSES))
    (tmp_path / "cat" / "2.jpg").unlink()
    with pytest.raises(DataError, match=r"2\.jpg"):
        contents(images)


def at(data: bytes, member: int) -> int:
    """Where the header of a member starts."""
    return data.index(b"c/%d.png" % member)


DAMAGE = {
    "empty file": lambda tar: b"",
    "text": lambda tar: b"no archive at all\n" * 100,
    "compressed": gzip.compress,
    "cut inside an image": lambda tar: tar[: at(tar, 4) + 512 + 1000],
    "cut inside a header": lambda tar: tar[: at(tar, 4) + 100],
    "cut between two images": lambda tar: tar[: at(tar, 4)],
    "damaged first header": lambda tar: b"\xff" * 512 + tar[512:],
    "damaged later header": lambda tar: tar[: at(tar, 4)] + b"\xff" * 512 + tar[at(tar, 5) - 3072 :],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_archive(tmp_path, damage):
    path = tmp_path / "bad.tar"
    path.write_bytes(damage(good_archive(tmp_path)))
    with pytest.raises(DataError) as caught:
        ImageSet(path)
    assert caught.value.where == str(path)
    assert caught.value.remedy


def test_only_regular_members_count(tmp_path):
    path = archive(tmp_path / "x.tar", {"a.png": b"ay"})
    with tarfile.open(path, "a") as tar:
        for name, kind in (
            ("link.png", tarfile.SYMTYPE),
            ("folder.png", tarfile.DIRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert contents(ImageSet(path)) == {"a.png": (None, b"ay")}


def test_selection_reads_the_same_bytes(place):
    images = ImageSet(place(CLASSES))
    chosen = images.select([images[3], images[0]])
    assert [chosen.read(item) for item in chosen] == [b"bee", b"ten"]


def test_reading_from_many_threads(tmp_path):
    files = {f"c{i % 3}/{i}.png": os.urandom(5000 + i) for i in range(40)}
    images = ImageSet(archive(tmp_path / "x.tar", files))
    wrong = []

    def work():
        for item in images:
            if images.read(item) != files[item.name]:
                wrong.append(item.name)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_digest_names_content():
    assert hash_image(b"a") == hash_image(b"a") != hash_image(b"b")
    assert len(hash_image(b"")) == 32


def test_shared_archive_has_its_classes(cifar):
    images = ImageSet(cifar / "test")
    assert len(images) == 5000
    assert images.classes == [
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    ]
    assert images.read(images[0])[:2] == b"\xff\xd8"
