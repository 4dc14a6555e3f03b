"""Archives of images as people have them: links inside, members stored twice, compressed ones."""

from __future__ import annotations

import gzip
import io
import os
import shlex
import shutil
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

from cmt_edge.deploy.errors import DataError
from cmt_edge.deploy.images import ImageSet
from helpers.collections import archive, contents, fill, good_archive


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
