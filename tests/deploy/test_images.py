"""Collections of images: folders and archives of equal content are equal collections; what is wrong is
said."""

from __future__ import annotations

import gzip
import io
import os
import shlex
import shutil
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet, hash_image

CLASSES = {
    "dog/b.png": b"bee",
    "cat/2.jpg": b"two",
    "cat/10.JPG": b"ten",
    "dog/a.webp": b"ay",
    "cat/notes.txt": b"no image",
    "cat/.hidden.jpg": b"hidden",
    "dog/._b.png": b"left by macOS",
    ".DS_Store": b"junk",
}
FLAT = {"b.png": b"bee", "a.jpg": b"ay", "readme.md": b"no", ".c.png": b"hidden"}
SPLIT = {
    f"{part}/{name}": data for part in ("train", "test") for name, data in CLASSES.items() if "/" in name
}


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def archive(path: Path, files: dict[str, bytes], prefix: str = "", mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture(params=["folder", "tar", "tar with ./"])
def place(request, tmp_path):
    """Builds a collection of ``files`` in each of its forms."""

    def build(files: dict[str, bytes]) -> Path:
        if request.param == "folder":
            return fill(tmp_path / "images", files)
        return archive(tmp_path / "images.tar", files, "./" if "./" in request.param else "")

    return build


def contents(images: ImageSet) -> dict[str, tuple[str | None, bytes]]:
    return {item.name: (item.label, images.read(item)) for item in images}


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


def good_archive(folder: Path) -> bytes:
    return archive(folder / "good.tar", {f"c/{i}.png": bytes([i]) * 3000 for i in range(8)}).read_bytes()


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


# --- folders as people have them ------------------------------------------------------------------


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


# --- archives as people have them -----------------------------------------------------------------


def linked_archive(path: Path, links: dict[str, tuple[bytes, str]]) -> Path:
    archive(path, {"all/cat/1.png": b"one", "all/cat/2.png": b"two", "all/dog/1.png": b"dog"})
    with tarfile.open(path, "a") as tar:
        for name, (kind, target) in links.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    return path


def test_links_inside_an_archive_are_followed(tmp_path):
    links = {
        "some/cat/1.png": (tarfile.LNKTYPE, "all/cat/1.png"),
        "some/cat/3.png": (tarfile.SYMTYPE, "../../all/cat/2.png"),
        "some/dog": (tarfile.SYMTYPE, "../all/dog"),
        "some/owl": (tarfile.SYMTYPE, "dog"),
        "some/out.png": (tarfile.SYMTYPE, "/etc/passwd"),
        "some/up.png": (tarfile.SYMTYPE, "../../../etc/passwd"),
        "some/circle.png": (tarfile.SYMTYPE, "circle.png"),
    }
    images = ImageSet(linked_archive(tmp_path / "x.tar", links) / "some")
    assert contents(images) == {
        "cat/1.png": ("cat", b"one"),
        "cat/3.png": ("cat", b"two"),
        "dog/1.png": ("dog", b"dog"),
        "owl/1.png": ("owl", b"dog"),
    }
    assert "2 links that lead out of the archive, 1 links that lead in a circle" in images.note
    assert "1 image counts more than once" in images.note  # dog/1.png, as owl/1.png


LINKED = {
    "to its own class": {"a/x": "../a"},
    "to the root": {"b/up": ".."},
    "at the root": {"up": "."},
    "from class to class": {"a/side": "../b", "b/side": "../a"},
    "over a folder with a link": {"a/x": "../b", "b/y": "../c"},
    "over a name with a link in it": {"a/x": "../b/y/3.png", "b/y": "../c"},
    "a link to a link": {"a/x": "../b/y", "b/y": "z", "b/z": "../c"},
    "in a circle": {"a/x": "y", "a/y": "x"},
}


@pytest.mark.parametrize("links", LINKED.values(), ids=LINKED)
def test_links_lead_in_archives_where_they_lead_in_folders(tmp_path, links):
    root = fill(tmp_path / "x", {"a/1.png": b"1", "b/2.png": b"2", "c/3.png": b"3"})
    for name, target in links.items():
        (root / name).symlink_to(target)
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(root, ".")
    for inner in ("", "a", "b"):
        folder = ImageSet(root / inner, labelled=False)
        packed = ImageSet(tmp_path / "x.tar" / inner, labelled=False)
        assert contents(packed) == contents(folder)
        assert packed.repeated == folder.repeated
        assert (
            packed.skipped["links to a folder above them"] == folder.skipped["links to a folder above them"]
        )


def test_a_link_in_an_archive_to_its_own_folder_is_cut_and_noted(tmp_path):
    path = linked_archive(tmp_path / "x.tar", {"all/cat/x": (tarfile.SYMTYPE, "../cat")})
    images = ImageSet(path)
    assert (len(images), images.classes) == (3, ["cat", "dog"])
    assert "1 links to a folder above them" in images.note


REPEATED = {
    "a link beside the class": ({"cat/1.png": b"1"}, {"kitty": "cat"}, 1),
    "a folder of links": ({"real/cat/1.png": b"1", "real/dog/1.png": b"2"}, {"sub": "real"}, 2),
    "three names of one": ({"cat/1.png": b"1"}, {"kitty": "cat", "cat/2.png": "1.png"}, 1),
    "one name of each": ({".store/1.png": b"1", ".store/2.png": b"2"}, {"cat": ".store"}, 0),
}


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
def test_images_that_links_give_several_names_are_noted(tmp_path, name, packed):
    files, links, count = REPEATED[name]
    root = fill(tmp_path / "x", files)
    for link, target in links.items():
        (root / link).symlink_to(target)
    if packed:
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(root, ".")
        root = tmp_path / "x.tar"
    images = ImageSet(root, labelled=False)
    assert images.repeated == count
    assert ("more than once, because links" in images.note) == (count > 0)


@pytest.mark.parametrize("files", [0, 1], ids=["empty folders", "files"])
def test_links_that_multiply_in_an_archive_end(tmp_path, files):
    """Each level leads twice to the one below it, as in ``d1/a -> d0, d1/b -> d0, d2/a -> d1``."""
    path = archive(tmp_path / "x.tar", {f"d0/{i}.png": b"1" for i in range(files)} | {"keep/0.png": b"1"})
    with tarfile.open(path, "a") as tar:
        for level in range(1, 40):
            for name in ("a", "b"):
                info = tarfile.TarInfo(f"d{level}/{name}")
                info.type, info.linkname = tarfile.SYMTYPE, f"../d{level - 1}"
                tar.addfile(info)
    with pytest.raises(DataError, match="the links in the archive lead to more than"):
        ImageSet(path, labelled=False)


def test_a_real_archive_with_hard_links(tmp_path):
    """``tar`` stores the second name of a file as a link to the first."""
    fill(tmp_path / "x", {"cat/1.png": b"one"})
    (tmp_path / "x" / "dog").mkdir()
    os.link(tmp_path / "x/cat/1.png", tmp_path / "x/dog/1.png")
    with tarfile.open(tmp_path / "x.TAR", "w") as tar:
        tar.add(tmp_path / "x", ".")
    assert contents(ImageSet(tmp_path / "x.TAR")) == contents(ImageSet(tmp_path / "x"))


def test_a_member_that_is_stored_twice_counts_as_it_is_unpacked(tmp_path):
    path = archive(tmp_path / "x.tar", {"a.png": b"old"})
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("a.png")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"new"))
    assert contents(ImageSet(path)) == {"a.png": (None, b"new")}


@pytest.mark.parametrize("inner", ["", "train"])
@pytest.mark.parametrize("packed", [".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz", ".ZIP"])
def test_a_compressed_archive_is_refused_with_the_command_that_unpacks_it(tmp_path, packed, inner):
    source = fill(tmp_path / "source", {"train/cat/1.png": b"1", "train/dog/2.png": b"2"})
    path = tmp_path / f"my photos{packed}"
    if packed.lower() == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name in ("train/cat/1.png", "train/dog/2.png"):
                file.write(source / name, name)
    else:
        kind = {".tar.gz": "gz", ".tgz": "gz", ".tar.bz2": "bz2", ".tar.xz": "xz"}[packed]
        with tarfile.open(path, f"w:{kind}") as tar:
            tar.add(source, ".")
    with pytest.raises(DataError, match="compressed") as caught:
        ImageSet(path / inner)
    command, give = caught.value.remedy.removeprefix("unpack it once: ").split("   then give ")
    if shutil.which(shlex.split(command)[0]):
        subprocess.run(command, shell=True, check=True, cwd="/")
        assert len(ImageSet(give)) == 2


def test_a_compressed_archive_by_another_name(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(gzip.compress(good_archive(tmp_path)))
    with pytest.raises(DataError) as caught:
        ImageSet(path)
    command = caught.value.remedy.removeprefix("it is compressed: ")
    subprocess.run(command, shell=True, check=True)
    assert len(ImageSet(command.split(" > ")[1])) == 8
