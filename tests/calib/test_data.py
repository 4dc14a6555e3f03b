"""Calibration images: the seeded choice, the fingerprint, generated images, batches."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmt_edge.calib import CalibrationSet
from cmt_edge.calib.generated import generate
from cmt_edge.deploy.errors import DataError, ImageError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.preprocessing import Preprocess, preprocess
from cmt_edge.deploy.scale.sources import open_source
from helpers.collections import archive
from helpers.kinds import KINDS, convert_folder

SPEC = Preprocess(32, None, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES = ("cat", "dog", "owl")


def png(seed: int, size: int = 12) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def make(folder: Path, counts: dict[str, int], seed: int = 0) -> Path:
    for c, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / name / f"{i:03}.png").write_bytes(png(seed + 1000 * c + i))
    return folder


def packed(folder: Path, archive: Path, prefix: str = "") -> Path:
    """``folder`` as a tar, its members in reversed order."""
    with tarfile.open(archive, "w") as tar:
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), reverse=True):
            tar.add(path, prefix + path.relative_to(folder).as_posix())
    return archive


@pytest.fixture
def photos(tmp_path) -> Path:
    return make(tmp_path / "photos", dict.fromkeys(CLASSES, 10))


def content(data: CalibrationSet) -> np.ndarray:
    return np.concatenate(list(data.batches(SPEC)))


def test_choice_is_reproducible_and_depends_on_the_seed(photos):
    first, again, other = (CalibrationSet.choose(photos, 9, SPEC, seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert np.array_equal(content(first), content(again))
    assert len(first) == first.count == 9


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ((10, 10, 10), 9, (3, 3, 3)),
        ((10, 10, 10), 10, (3, 3, 4)),
        ((1, 10, 10), 9, (1, 4, 4)),
        ((2, 1, 3), 6, (1, 2, 3)),
    ],
)
def test_classes_take_part_equally(tmp_path, counts, size, expected):
    make(tmp_path, dict(zip(CLASSES, counts, strict=True)))
    labels = {
        tuple(preprocess((tmp_path / i.name).read_bytes(), SPEC).ravel()): i.label for i in ImageSet(tmp_path)
    }
    chosen = content(CalibrationSet.choose(tmp_path, size, SPEC))
    assert len(np.unique(chosen.reshape(size, -1), axis=0)) == size  # none twice
    taken = Counter(labels[tuple(image.ravel())] for image in chosen)
    assert sorted(taken.values()) == sorted(expected)


def test_a_flat_folder_will_do(tmp_path):
    make(tmp_path, {"": 5})
    assert len(CalibrationSet.choose(tmp_path, 3, SPEC)) == 3


@pytest.mark.parametrize("inner", ["", "train"])
def test_a_tar_is_the_same_as_its_folder(photos, tmp_path, inner):
    archive = packed(photos, tmp_path / "photos.tar", f"{inner}/" if inner else "./")
    folder, tar = (CalibrationSet.choose(p, 8, SPEC, 3) for p in (photos, archive / inner))
    assert folder.fingerprint == tar.fingerprint
    assert np.array_equal(content(folder), content(tar))


def test_one_changed_image_changes_the_fingerprint(photos):
    before = CalibrationSet.choose(photos, None, SPEC).fingerprint
    (photos / "dog" / "004.png").write_bytes(png(99))
    assert CalibrationSet.choose(photos, None, SPEC).fingerprint != before


def test_names_do_not_count_for_the_fingerprint_but_content_does(photos, tmp_path):
    other = make(tmp_path / "elsewhere", dict.fromkeys(CLASSES, 10))
    assert (
        CalibrationSet.choose(photos, 5, SPEC).fingerprint
        == CalibrationSet.choose(other, 5, SPEC).fingerprint
    )
    different = make(tmp_path / "different", dict.fromkeys(CLASSES, 10), seed=50_000)
    assert (
        CalibrationSet.choose(photos, 5, SPEC).fingerprint
        != CalibrationSet.choose(different, 5, SPEC).fingerprint
    )


@pytest.mark.parametrize(("available", "chosen"), [(7, 7), (310, 300)])
def test_default_size(tmp_path, available, chosen):
    blob = png(0, 2)
    for i in range(available):
        (tmp_path / f"{i}.png").write_bytes(blob)
    assert len(CalibrationSet.choose(tmp_path, None, SPEC)) == chosen


def test_more_than_there_are_is_an_error_with_the_number(photos):
    with pytest.raises(DataError, match="holds 30 images, 31 were asked for") as error:
        CalibrationSet.choose(photos, 31, SPEC)
    assert "--calib-size 30" in error.value.remedy
    assert len(CalibrationSet.choose(photos, 30, SPEC)) == 30


@pytest.mark.parametrize("size", [0, -1])
@pytest.mark.parametrize("data", ["generated", "folder"])
def test_none_is_an_error(photos, data, size):
    with pytest.raises(DataError, match="1 or more"):
        CalibrationSet.choose(photos if data == "folder" else data, size, SPEC)


def test_no_such_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        CalibrationSet.choose(tmp_path / "gone", 1, SPEC)


def test_manifest_entry_tells_no_path_of_the_machine(photos):
    entry = CalibrationSet.choose(photos, 4, SPEC).describe()
    assert entry.source == f"{photos.parent.name}/photos"
    assert entry.images == 4
    assert len(entry.fingerprint) == 64
    root = CalibrationSet.choose(Path("/", *photos.parts[1:]), 4, SPEC).describe()
    assert not root.source.startswith("/")


def test_a_damaged_image_is_named(photos):
    (photos / "owl" / "003.png").write_bytes(png(1)[:60])
    with pytest.raises(ImageError, match=r"owl/003\.png"):
        content(CalibrationSet.choose(photos, None, SPEC))


@pytest.mark.parametrize("source", ["folder", "tar", "generated"])
def test_batches_are_single_preprocessed_images(photos, tmp_path, source):
    data = {"folder": photos, "tar": packed(photos, tmp_path / "a.tar"), "generated": "generated"}[source]
    chosen = CalibrationSet.choose(data, 4, SPEC)
    batches = list(chosen.batches(SPEC))
    assert [(b.shape, b.dtype) for b in batches] == [((1, 3, 32, 32), np.float32)] * 4
    assert np.array_equal(np.concatenate(batches), content(chosen))  # can be read again
    assert -2.01 < min(b.min() for b in batches) < max(b.max() for b in batches) < 2.01


def test_generated_images_by_name():
    first, again, other, more = (
        CalibrationSet.choose("generated", n, SPEC, s) for n, s in ((3, 0), (3, 0), (3, 1), (4, 0))
    )
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, more.fingerprint}) == 3
    assert first.describe().source == "generated"


def test_generated_images_are_deterministic_varied_landscapes():
    images = [np.asarray(Image.open(io.BytesIO(b))).astype(int) for b in generate(4, 48, seed=3)]
    assert generate(4, 48, seed=3) == generate(4, 48, seed=3) != generate(4, 48, seed=4)
    assert {i.shape for i in images} == {(48, 60, 3)}
    for i, image in enumerate(images):
        assert image.std() > 10  # not blank
        for other in images[:i]:
            assert np.abs(image - other).mean() > 5


# --- folders as people have them ------------------------------------------------------------------


def test_labels_do_not_matter(tmp_path):
    """Years and months, and a stray picture beside folders."""
    make(tmp_path, {"2023/01": 3, "2023/02": 3, "2024/01": 3, "": 1, "__MACOSX/2023": 2})
    data = CalibrationSet.choose(tmp_path, None, SPEC)
    assert len(data) == 10
    assert len(content(data)) == 10
    taken = CalibrationSet.choose(tmp_path, 4, SPEC).files
    assert taken is not None
    assert len({Path(item.name).parent for item in taken.items}) == 4  # the folders take turns


def test_images_below_a_folder_of_that_name(tmp_path):
    make(tmp_path, {"images": 3, "labels": 0})
    (tmp_path / "labels" / "0.txt").write_text("0 0.5 0.5 1 1")
    data = CalibrationSet.choose(tmp_path, None, SPEC)
    assert len(data) == 3
    assert "1 .txt" in data.note


@pytest.mark.parametrize("inner", ["", "images/", "dataset/images/"])
@pytest.mark.parametrize("below", ["", "/cat"])
@pytest.mark.parametrize(
    ("parts", "proposed"),
    [(("test", "train"), "train"), (("test", "valid"), "valid"), (("Val", "Train"), "Train")],
)
def test_a_whole_data_set_is_refused_and_its_training_part_proposed(tmp_path, parts, proposed, inner, below):
    make(tmp_path, {f"{inner}{part}{below}": 2 for part in parts})
    with pytest.raises(DataError, match="several parts") as error:
        CalibrationSet.choose(tmp_path, None, SPEC)
    assert error.value.remedy.endswith(str(tmp_path / inner / proposed))
    assert "test" not in error.value.remedy.removeprefix(f"give the part to train on: {tmp_path}")
    assert len(CalibrationSet.choose(tmp_path / inner / proposed, None, SPEC)) == 2


PARTS_AS_PEOPLE_CALL_THEM = [
    (("trainset", "testset"), "trainset"),
    (("TrainSet", "TestSet"), "TrainSet"),
    (("traindata", "testdata"), "traindata"),
    (("train", "evaluation"), "train"),
    (("train", "testA", "testB"), "train"),
    (("Training", "PublicTest", "PrivateTest"), "Training"),
    (("trn", "tst"), "trn"),
    (("tr", "te"), "tr"),
    (("train", "unseen"), "train"),
    (("train", "held-out"), "train"),
    (("cats_train", "cats_test"), "cats_train"),
    (("train2017", "val2017"), "train2017"),
]


@pytest.mark.parametrize(("parts", "proposed"), PARTS_AS_PEOPLE_CALL_THEM)
def test_parts_with_other_names_are_refused(tmp_path, parts, proposed):
    make(tmp_path, dict.fromkeys(parts, 2))
    with pytest.raises(DataError, match="several parts") as error:
        CalibrationSet.choose(tmp_path, None, SPEC)
    assert error.value.remedy == f"give the part to train on: {tmp_path / proposed}"


@pytest.mark.parametrize(
    "classes",
    [
        ("dev", "bus", "te"),
        ("en", "de", "te", "tr"),
        ("valid", "invalid"),
        ("bullet_train", "test_tube", "tram"),
        ("train", "trailer"),
        ("private", "public"),
        ("test", "testA"),  # nothing but the part to test on
    ],
)
def test_classes_that_are_called_like_parts_calibrate(tmp_path, classes):
    make(tmp_path, dict.fromkeys(classes, 2))
    data = CalibrationSet.choose(tmp_path, None, SPEC)
    assert (len(data), data.note) == (2 * len(classes), "")


@pytest.mark.parametrize(
    ("folders", "kept"), [(("test", "extra"), "extra"), (("testset", ""), ""), (("val", "photos"), "photos")]
)
def test_a_part_to_test_on_is_left_out_with_a_note(tmp_path, folders, kept):
    make(tmp_path, dict.fromkeys(folders, 2))
    data = CalibrationSet.choose(tmp_path, None, SPEC)
    assert data.files is not None
    assert {str(Path(item.name).parent) for item in data.files.items} == {kept or "."}
    assert f"2 in {folders[0]}/, by name a part to test on" in data.note


def test_parts_inside_the_classes_are_refused_and_no_single_class_is_proposed(tmp_path):
    make(tmp_path, {f"{name}/{part}": 2 for name in ("cat", "dog") for part in ("train", "test")})
    with pytest.raises(DataError, match="several parts") as error:
        CalibrationSet.choose(tmp_path, None, SPEC)
    assert "cat/train, dog/train" in error.value.remedy
    assert str(tmp_path) not in error.value.remedy
    with pytest.raises(DataError, match="same class") as error:
        ImageSet(tmp_path)
    assert "cat/test as test/cat, dog/test as test/dog" in error.value.remedy


def test_parts_by_the_names_of_the_files(tmp_path):
    make(tmp_path, {"": 2, "cat": 4})
    pictures = sorted((tmp_path / "cat").iterdir())
    for picture, name in zip(pictures, ["train_0", "train_1", "test_0", "test_1"], strict=True):
        picture.rename(picture.with_name(f"{name}.png"))
    with pytest.raises(DataError, match=r"several parts.*test_\* \(test\), train_\* \(train\)") as error:
        CalibrationSet.choose(tmp_path, None, SPEC)
    assert "train_*" in error.value.remedy
    for i in range(2):
        (tmp_path / "cat" / f"test_{i}.png").unlink()
    assert len(CalibrationSet.choose(tmp_path, None, SPEC)) == 4


def test_a_class_called_train_is_no_part(tmp_path):
    make(tmp_path, {"train": 2, "bus": 2})
    assert len(CalibrationSet.choose(tmp_path, None, SPEC)) == 4


@pytest.mark.parametrize(
    ("pictures", "masks"),
    [
        ("images", ["masks"]),
        ("images", ["labels", "annotations"]),
        ("JPEGImages", ["SegmentationClass", "SegmentationObject"]),
        ("images", ["Annotations/trimaps"]),
        ("city/images", ["city/gt"]),
    ],
)
@pytest.mark.parametrize("in_archive", [False, True])
def test_masks_beside_the_pictures_do_not_calibrate(tmp_path, pictures, masks, in_archive):
    folder = make(tmp_path / "photos", {pictures: 4} | dict.fromkeys(masks, 4))
    data = packed(folder, tmp_path / "photos.tar") if in_archive else folder
    chosen = CalibrationSet.choose(data, None, SPEC)
    assert len(chosen) == 4
    assert all(item.name.startswith(f"{pictures}/") for item in chosen.files.items)
    assert f"{4 * len(masks)} in " in chosen.note
    assert "beside the pictures" in chosen.note


@pytest.mark.parametrize(
    "folders", [["masks", "cats"], ["images/cats", "masked"], ["labels"], ["images/masks"]]
)
def test_folders_that_are_only_called_so_calibrate(tmp_path, folders):
    chosen = CalibrationSet.choose(make(tmp_path / "photos", dict.fromkeys(folders, 3)), None, SPEC)
    assert len(chosen) == 3 * len(folders)


def test_parts_of_a_data_set_with_masks_are_still_refused(tmp_path):
    parts = {f"{kind}/{part}": 2 for kind in ("images", "masks") for part in ("train", "val")}
    with pytest.raises(DataError, match="holds several parts") as refused:
        CalibrationSet.choose(make(tmp_path / "photos", parts), None, SPEC)
    assert refused.value.remedy.endswith("images/train")


# --- shards, tables and URLs ----------------------------------------------------------------------


def require_packages(kind: str) -> None:
    """Skip the test where a kind of source needs a package that is not here."""
    for package in {"url": ("pyarrow", "fsspec"), "table": ("pyarrow",), "tables": ("pyarrow",)}.get(
        kind, ()
    ):
        pytest.importorskip(package, reason='needs the extra "ray"')


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "tables"])
def test_the_same_images_give_the_same_choice_wherever_they_lie(tmp_path, kind):
    require_packages(kind)
    folder = make(tmp_path / "photos", {"cat": 9, "cat-like": 4, "dog": 1, "owl": 12})
    expected = CalibrationSet.choose(folder, 14, SPEC, 3)
    found = CalibrationSet.choose(convert_folder(folder, tmp_path / "there", kind), 14, SPEC, 3)
    assert found.digests == expected.digests
    assert np.array_equal(content(found), content(expected))


def test_rows_of_tables_are_chosen_in_their_order_and_classes_take_part_equally(tmp_path):
    require_packages("tables")
    folder = make(tmp_path / "photos", {"cat": 9, "dog": 1, "owl": 12})
    address = convert_folder(folder, tmp_path / "there", "tables")
    found, again = (CalibrationSet.choose(address, 9, SPEC, 1) for _ in range(2))
    assert found.digests == again.digests
    assert Counter(item.label for item in found.files.items) == {"cat": 4, "dog": 1, "owl": 4}
    assert found.describe().source == f"{tmp_path.name}/there"


@pytest.mark.parametrize("kind", ["webdataset", "table"])
def test_labels_of_calibration_images_may_be_missing(tmp_path, kind):
    require_packages(kind)
    blobs = [png(i) for i in range(3)]
    if kind == "table":
        parquet = pytest.importorskip("pyarrow.parquet", reason='needs the extra "ray"')
        pyarrow = pytest.importorskip("pyarrow", reason='needs the extra "ray"')
        parquet.write_table(pyarrow.table({"image": blobs}), tmp_path / "a.parquet")
        parquet.write_table(pyarrow.table({"image": blobs, "label": [0.5, None, 2]}), tmp_path / "b.parquet")
    else:
        archive(tmp_path / "a.tar", {f"{i}.png": blob for i, blob in enumerate(blobs)})
        archive(
            tmp_path / "b.tar", {"0.png": blobs[0], "1.png": blobs[1], "1.cls": b"", "2.cls": b"x" * 2000}
        )
    data = CalibrationSet.choose(tmp_path, None, SPEC)
    assert len(data) == (6 if kind == "table" else 5)
    assert len(content(data)) == len(data)


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("ending", [".tar", ".parquet"])
def test_shards_and_tables_of_several_parts_are_refused(tmp_path, ending, labelled):
    """As Hugging Face names them."""
    files = {f"cat/{i}.png": png(i) for i in range(2)}
    data = tmp_path / "data"
    data.mkdir()
    for part in ("train", "validation"):
        path = data / f"{part}-00000-of-00001{ending}"
        if ending == ".tar":
            archive(path, files)
        else:
            parquet = pytest.importorskip("pyarrow.parquet", reason='needs the extra "ray"')
            pyarrow = pytest.importorskip("pyarrow", reason='needs the extra "ray"')
            parquet.write_table(pyarrow.table({"image": list(files.values()), "label": [0, 1]}), path)
    with pytest.raises(DataError, match=rf"several parts.*train-00000-of-00001\{ending}") as caught:
        open_source(tmp_path, labelled=True) if labelled else CalibrationSet.choose(tmp_path, None, SPEC)
    assert "a folder of" in caught.value.remedy
    (data / f"validation-00000-of-00001{ending}").unlink()
    assert len(CalibrationSet.choose(tmp_path, None, SPEC)) == 2


def test_images_elsewhere_are_read_at_once_and_in_their_order(tmp_path):
    require_packages("url")
    folder = make(tmp_path / "photos", {"cat": 30})
    source = open_source(f"local://{folder}")
    shuffled = source.select(source.items[::-1])
    assert shuffled.read_each(bytes) == [source.read(item) for item in reversed(source.items)]


def test_a_manifest_tells_no_password(tmp_path):
    require_packages("url")
    fsspec = pytest.importorskip("fsspec", reason='needs the extra "ray"')
    with fsspec.open("memory://me:secret@there/photos/cat/0.png", "wb") as file:
        file.write(png(0))
    entry = CalibrationSet.choose("memory://me:secret@there/photos", 1, SPEC).describe()
    assert entry.source == "there/photos"
