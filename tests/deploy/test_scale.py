"""Sources of images for a cluster, and the folder that keeps answers: what needs no cluster itself."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from cmt_edge.deploy.cli import verify
from cmt_edge.deploy.errors import ClusterError, DataError, InputError, OutputError, RuntimeMissingError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.measure.labels import match_labels
from helpers.bundles import LABELS, make_bundle
from helpers.collections import archive
from helpers.images import COLOURS, coloured, coloured_folder

pytest.importorskip("pyarrow", reason='needs the extra "ray"')
pytest.importorskip("fsspec", reason='needs the extra "ray"')

import pyarrow
from pyarrow import parquet

from cmt_edge.deploy.scale import waiting
from cmt_edge.deploy.scale.answers import NOTE, AnswersFolder, Part, require_answers
from cmt_edge.deploy.scale.places import hide_credentials
from cmt_edge.deploy.scale.records import Record, divide
from cmt_edge.deploy.scale.rounds import Job
from cmt_edge.deploy.scale.sources import open_source
from cmt_edge.deploy.scale.worker import make_task_table, read_task_table

CONTENT = {f"{name}/{i}.png": coloured(name, i) for name in COLOURS for i in range(3)}
"""Images in class folders."""

SHARD = {
    f"{i:03}.{ending}": data
    for i, name in enumerate(COLOURS)
    for ending, data in (("png", coloured(name)), ("cls", str(i).encode()))
}
"""A shard in the manner of WebDataset."""


def contents(source) -> list[tuple[str, str, bytes]]:
    return [(item.name, item.label, source.read(item)) for item in source.items]


@pytest.mark.parametrize("kind", ["folder", "archive", "part"])
def test_folders_and_archives_are_those_of_a_serial_run(tmp_path, kind):
    path = coloured_folder(tmp_path / "photos")
    if kind != "folder":
        prefix = "photos/" if kind == "part" else ""
        path = archive(tmp_path / "photos.tar", CONTENT, prefix)
        path = path / "photos" if kind == "part" else path
    serial, source = ImageSet(path), open_source(str(path))
    assert contents(source) == [(item.name, item.label, serial.read(item)) for item in serial]
    assert (source.classes, source.has_numbers, source.note) == (serial.classes, False, serial.note)


@pytest.mark.parametrize("address", ["{0}", "local://{0}", "file://{0}"])
def test_shards_hold_keys_with_labels(tmp_path, address):
    folder = tmp_path / "shards"
    folder.mkdir()
    archive(folder / "b.tar", SHARD)
    archive(folder / "a.tar", {"deep/0.x.png": coloured("blue"), "deep/0.cls": b" 2\n"})
    source = open_source(address.format(folder))
    assert contents(source)[:2] == [
        ("a.tar/deep/0.x.png", "2", coloured("blue")),
        ("b.tar/000.png", "0", coloured("red")),
    ]
    assert source.has_numbers
    assert match_labels(make_bundle(tmp_path / "tiny"), source, False) == {"0": 0, "1": 1, "2": 2}


def test_a_single_shard_needs_no_name_before_its_keys(tmp_path):
    source = open_source(str(archive(tmp_path / "one.tar", SHARD)))
    assert [item.name for item in source.items] == ["000.png", "001.png", "002.png"]


def test_class_folders_elsewhere(tmp_path):
    path = coloured_folder(tmp_path / "photos")
    (path / ".hidden").mkdir()
    (path / ".hidden" / "x.png").write_bytes(b"junk")
    there, here = open_source(f"local://{path}"), open_source(str(path))
    assert contents(there) == contents(here)


@pytest.mark.parametrize("kind", ["binary", "structure", "names"])
def test_tables_hold_bytes_and_labels(tmp_path, kind):
    blobs, labels = [coloured(name) for name in COLOURS], [0, 1, 2]
    images = blobs if kind == "binary" else [{"bytes": blob, "path": "x.png"} for blob in blobs]
    table = pyarrow.table({"image": images, "label": labels})
    if kind == "names":
        noted = {"info": {"features": {"label": {"names": list(reversed(LABELS))}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(noted)})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path))
    expected = ["blue", "green", "red"] if kind == "names" else ["0", "1", "2"]
    names = [f"a.parquet/{row}" for row in range(3)]
    assert contents(source) == list(zip(names, expected, blobs, strict=True))
    assert source.has_numbers == (kind != "names")


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"label": [1]}, "no column of images"),
        ({"image": [b"x"]}, "no column of labels"),
        ({"image": ["x.png"], "label": [1]}, "holds no encoded images"),
        ({"image": [b"x"], "label": [1.5]}, "1.5 is no label"),
    ],
)
def test_other_tables_are_refused(tmp_path, columns, words):
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=words):
        open_source(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"0.png": b"x", "1.png": b"x", "1.cls": b"1"}, "an image has no label"),
        ({"0.png": b"x", "0.cls": b""}, "a label is empty"),
        ({"0.png": b"x", "0.cls": b"1" * 2000}, "a label has 2000 bytes"),
    ],
)
def test_shards_without_labels_are_refused(tmp_path, members, words):
    with pytest.raises(DataError, match=words):
        open_source(str(archive(tmp_path / "a.tar", members)))


@pytest.mark.parametrize("labelled", [True, False])
def test_masks_in_shards_are_refused(tmp_path, labelled):
    members = {"0.png": b"x", "0.seg.png": b"x", "0.cls": b"1"}
    with pytest.raises(DataError, match="the key '0' has several images") as caught:
        open_source(archive(tmp_path / "a.tar", members), labelled)
    assert caught.value.why == "0.png and 0.seg.png"


def test_a_damaged_shard_is_named(tmp_path):
    path = archive(tmp_path / "a.tar", SHARD)
    archive(tmp_path / "b.tar", SHARD)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match="cannot be read as a tar archive") as caught:
        open_source(str(tmp_path))
    assert caught.value.where.endswith("a.tar")


@pytest.mark.parametrize("url", ["nothing://there", "s3x://bucket/photos"])
def test_addresses_that_nothing_opens_are_refused(url):
    with pytest.raises(DataError, match="cannot be opened"):
        open_source(url)


def test_passwords_in_addresses_are_not_shown(tmp_path):
    with pytest.raises(DataError) as caught:
        open_source("nothing://me:secret@there/photos")
    assert caught.value.where == "nothing://there/photos"
    assert hide_credentials("s3://b/x@y?signature=b") == "s3://b/x@y?..."
    assert hide_credentials("/photos/a@b?c") == "/photos/a@b?c"


def test_an_empty_table_says_nothing_of_the_labels(tmp_path):
    for name, images, labels in (("a", [b"x"], ["red"]), ("b", [], [])):
        columns = {"image": pyarrow.array(images, pyarrow.binary()), "label": labels}
        parquet.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
    assert [(item.name, item.label) for item in open_source(str(tmp_path)).items] == [("a.parquet/0", "red")]


def test_two_labels_of_one_key_are_refused(tmp_path):
    members = {"1.0.png": b"x", "1.0.cls": b"0", "1.5.png": b"x", "1.5.cls": b"2"}
    with pytest.raises(DataError, match="the key '1' has two labels"):
        open_source(str(archive(tmp_path / "a.tar", members)))
    members["1.5.cls"] = b"00"
    assert [item.label for item in open_source(str(archive(tmp_path / "b.tar", members))).items] == ["0", "0"]


@pytest.mark.parametrize("address", ["{0}", "local://{0}"])
def test_shards_beside_images_are_refused(tmp_path, address):
    photos = coloured_folder(tmp_path / "photos")
    archive(photos / "old.tar", SHARD)
    with pytest.raises(DataError, match="holds images and shards") as caught:
        open_source(address.format(photos))
    assert "old.tar" in caught.value.why


@pytest.mark.parametrize("kind", ["shard", "table"])
def test_a_file_that_changed_since_it_was_listed_is_not_read(tmp_path, kind):
    path = tmp_path / "a.parquet"
    if kind == "table":
        parquet.write_table(pyarrow.table({"image": [b"x"], "label": [1]}), path)
    else:
        path = archive(tmp_path / "a.tar", SHARD)
    source = open_source(str(path))
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match="was changed since its images were listed"):
        source.read(source.items[0])


def test_names_that_are_no_text_reach_the_workers_and_the_answers(tmp_path):
    (record,) = make_records(1)
    odd = replace(record, name="red/\udcff\n.png", file="/x/\udcff\n.png", label="\udcff")
    (task,) = divide([odd], 16, 128)
    assert read_task_table(make_task_table(task)) == task
    folder = AnswersFolder(tmp_path / "answers", {})
    folder.write(task, Part(["a"], np.zeros((1, 3), np.float32), "{}"), LABELS)
    assert folder.read(task).digests == ["a"]


def test_an_empty_place_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        open_source(f"local://{tmp_path}")
    with pytest.raises(DataError, match="does not exist"):
        open_source(f"local://{tmp_path}/none")


def test_numbers_beyond_the_classes_are_refused(tmp_path):
    bundle = make_bundle(tmp_path / "tiny")
    source = open_source(str(archive(tmp_path / "a.tar", {"0.png": b"x", "0.cls": b"3"})))
    with pytest.raises(DataError, match="classes lack 3"):
        match_labels(bundle, source, False)
    with pytest.raises(DataError, match="have an order already"):
        match_labels(bundle, source, True)


def make_records(count: int) -> list[Record]:
    return [Record(f"{i}.png", "red", f"/x/{i}.png", state=str(i)) for i in range(count)]


def test_batches_do_not_depend_on_tasks():
    tasks = list(divide(make_records(50), 16, 40))
    assert [len(task.records) for task in tasks] == [32, 18]
    assert [record for task in tasks for record in task.records] == make_records(50)
    assert len({task.digest for task in tasks}) == 2


@pytest.fixture
def kept(tmp_path):
    """A folder with the answers to one task."""
    folder = AnswersFolder(tmp_path / "answers", {"bundle": "a"})
    (task,) = divide(make_records(3), 16, 128)
    logits = np.arange(9, dtype=np.float32).reshape(3, 3) / 7
    folder.write(task, Part(["a", "b", "c"], logits, "{}"), LABELS)
    return folder, task, logits


def test_answers_are_read_as_they_were_written(kept):
    folder, task, logits = kept
    part = folder.read(task)
    assert part.logits.tobytes() == logits.tobytes()
    assert (part.digests, part.worker) == (["a", "b", "c"], "{}")
    (file,) = folder.path.glob("*.parquet")
    table = parquet.read_table(file).to_pydict()
    assert table["image"] == ["0.png", "1.png", "2.png"]
    assert table["label"] == ["blue"] * 3


def test_answers_to_images_that_changed_do_not_count(kept):
    folder, task, _ = kept
    records = (replace(task.records[0], state="later"), *task.records[1:])
    assert folder.read(replace(task, records=records)) is None
    assert folder.read(replace(task, chunk=8)) is None


def test_damaged_answers_do_not_count(kept):
    folder, task, _ = kept
    (file,) = folder.path.glob("*.parquet")
    data = file.read_bytes()
    table = parquet.read_table(file)
    values = table["logits"].combine_chunks().flatten().to_numpy().copy()
    values[4] += 1e-6
    changed = pyarrow.FixedSizeListArray.from_arrays(values, 3)
    parquet.write_table(table.set_column(4, "logits", changed), file)
    assert folder.read(task) is None
    for damaged in (data[:-20], b"", data.replace(b"PAR1", b"none")):
        file.write_bytes(damaged)
        assert folder.read(task) is None
    file.write_bytes(data)
    assert folder.read(task) is not None


def test_answers_of_something_else_are_refused(kept, tmp_path):
    folder, _, _ = kept
    with pytest.raises(InputError, match="holds answers of something else") as caught:
        AnswersFolder(folder.path, {"bundle": "b"})
    assert "another bundle" in caught.value.why
    (folder.path / NOTE).write_text((folder.path / NOTE).read_text().replace('"a"', '"b"'))
    assert AnswersFolder(folder.path, {"bundle": "b"}).read(kept[1]) is None
    (folder.path / NOTE).write_text("{")
    with pytest.raises(InputError, match="cannot be understood"):
        AnswersFolder(folder.path, {"bundle": "a"})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x").write_text("mine")
    with pytest.raises(OutputError, match="no folder of answers"):
        AnswersFolder(tmp_path / "photos", {"bundle": "a"})
    with pytest.raises(OutputError, match="no folder of answers"):
        require_answers(tmp_path / "photos", ["bundle"])
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / f".{NOTE}.x").write_text("of a run that starts at the same time")
    assert AnswersFolder(tmp_path / "new", {"bundle": "a"}).path.exists()


def fake_cluster(nodes: list[int], looks: list[bool]):
    """What tells of a cluster, and gives cores at the last look; and the reservations that it has."""
    held: list[object] = []
    group = SimpleNamespace(wait=lambda seconds: looks.pop(0))

    def reserve(bundles):
        held.extend(bundles)
        return group

    util = SimpleNamespace(placement_group=reserve, remove_placement_group=lambda group: held.clear())
    found = [{"Alive": True, "Resources": {"CPU": cores}} for cores in nodes] + [
        {"Alive": False, "Resources": {"CPU": 64}},
        {"Alive": True, "Resources": {}},
    ]
    ray = SimpleNamespace(util=util, nodes=lambda: found, available_resources=lambda: {"CPU": 1})
    return ray, held


@pytest.mark.parametrize(("looks", "notes"), [([True], 0), ([False, False, True], 1)])
def test_free_cores_are_waited_for_and_given_back(monkeypatch, looks, notes):
    monkeypatch.setattr(waiting, "SILENT_S", 0)
    ray, held = fake_cluster([4, 8], looks)
    told: list[str] = []
    waiting.await_cores(ray, 2, waiting.Waiting(600, told.append))
    assert (len(told), held, looks) == (notes, [], [])
    if told:
        assert told[0].startswith("waiting for 2 cores free on one node, 600 s at most (--ray-wait)")
        assert told[0].endswith("cores of the cluster's nodes: 8, 4, 0; free: 1")


def test_cores_that_never_come_are_an_error():
    ray, held = fake_cluster([1], [False])
    with pytest.raises(ClusterError, match="had 2 cores free within 0 s") as caught:
        waiting.await_cores(ray, 2, waiting.Waiting(0))
    assert (caught.value.exit_code, held) == (3, [])


def test_a_worker_has_its_cores_on_one_node():
    ray, _ = fake_cluster([3, 3], [])
    assert [Job(object, None, lambda *_: None, n).count(ray) for n in (1, 2, 4)] == [6, 2, 1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--answers", "x"], "--answers means nothing without --ray"),
        (["--ray-wait", "9"], "--ray-wait means nothing without --ray"),
        (["--ray"], "--ray means nothing without --data"),
        (["--data", "x", "--ray", "--layers"], "--layers runs on this machine only"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, flags, words):
    bundle = make_bundle(tmp_path / "tiny")
    assert verify.main([str(bundle.path), *flags]) == 2
    assert words in capsys.readouterr().err


def test_answers_are_kept_outside_bundles(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "tiny")
    flags = ["--data", str(tmp_path), "--ray", "--answers"]
    assert verify.main([str(bundle.path), *flags, str(bundle.path)]) == 2
    assert "lies inside the bundle" in capsys.readouterr().err


def test_ray_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    bundle = make_bundle(tmp_path / "tiny")
    photos = coloured_folder(tmp_path / "photos")
    assert verify.main([str(bundle.path), "--data", str(photos), "--ray"]) == RuntimeMissingError.exit_code
    assert 'pip install "cmt-edge[ray]"' in capsys.readouterr().err
