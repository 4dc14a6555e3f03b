"""Bundles: only a complete, unaltered one opens."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import (
    GOLDEN,
    MANIFEST,
    MAX_MANIFEST,
    ONNX,
)
from cmt_edge.deploy.bundle.sections import FileEntry
from cmt_edge.deploy.errors import BundleError
from helpers.bundles import (
    LABELS,
    SPEC,
    copy_bundle,
    edit_manifest,
    make_bundle,
    snapshot,
    tiny_golden,
)


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    return make_bundle(tmp_path / "tiny", members={"extra/notes.txt": b"hello"})


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["labels"].reverse(),
        lambda m: m["preprocess"].update(mean=[0.1, 0.2, 0.3]),
        lambda m: m.update(precision="int8"),
        lambda m: m.update(checksum=""),
    ],
)
def test_an_edited_manifest_is_refused(bundle, change):
    """Swapped labels would give wrong answers with right hashes."""
    edit_manifest(bundle, change, seal=False)
    with pytest.raises(BundleError, match="manifest was changed"):
        Bundle.open(bundle.path)


def test_a_resealed_manifest_is_read(bundle):
    """What the other tests edit is refused for what they edit, not for its checksum."""
    edit_manifest(bundle, lambda m: m.update(labels_source="file"))
    assert Bundle.open(bundle.path).manifest.labels_source == "file"


def test_a_written_bundle_opens_and_tells_what_it_holds(bundle):
    opened = Bundle.open(str(bundle.path))
    assert opened.manifest.to_bytes() == bundle.manifest.to_bytes() == (bundle.path / MANIFEST).read_bytes()
    assert opened.preprocess == SPEC
    assert opened.labels == opened.class_ids == list(LABELS)
    assert set(opened.manifest.files) == {GOLDEN, ONNX, "model.bin", "extra/notes.txt"}
    assert opened.file("extra/notes.txt").read_bytes() == b"hello"
    entry = opened.manifest.files["model.bin"]
    assert entry == FileEntry(7, hashlib.sha256(b"weights").hexdigest())
    assert opened.reference() == {}


def test_golden_and_reference_survive(tmp_path):
    golden, answers = tiny_golden(), {"a" * 32: 2, "b" * 32: 0}
    opened = Bundle.open(make_bundle(tmp_path / "b", golden=golden, reference=answers).path)
    assert opened.reference() == answers
    assert opened.golden().sources == golden.sources
    np.testing.assert_array_equal(opened.golden().pixels, golden.pixels)
    np.testing.assert_array_equal(opened.golden().logits, golden.logits)


def test_labels_and_class_ids_differ_where_the_data_set_has_ids(tmp_path):
    bundle = make_bundle(tmp_path / "b", labels=(("n01", "tench"), ("n02", "Fisch, groß")))
    assert Bundle.open(bundle.path).labels == ["tench", "Fisch, groß"]
    assert Bundle.open(bundle.path).class_ids == ["n01", "n02"]


def test_unknown_member_is_a_bundle_error(bundle):
    with pytest.raises(BundleError, match=r"openvino\.xml"):
        bundle.file("openvino.xml")


def test_real_bundles_open(fp32_bundle, onnx_bundle, int8_bundle):
    for bundle in (fp32_bundle, onnx_bundle, int8_bundle):
        assert Bundle.open(bundle.path).manifest.files == bundle.manifest.files


def rename_case(folder: Path) -> None:
    (folder / "model.bin").rename(folder / "Model.bin")


def test_weights_outside_the_model_file(onnx_bundle, tmp_path):
    """ONNX may refer to other files, also outside the bundle."""

    def split(folder: Path) -> None:
        model = onnx.load(folder / ONNX)
        onnx.save(
            model, folder / ONNX, save_as_external_data=True, location="weights.bin", size_threshold=1024
        )

    made = copy_bundle(onnx_bundle, tmp_path / "b", split)
    with pytest.raises(BundleError, match="outside the file"):
        Bundle.open(made.path)


DAMAGE = {
    "missing member": (lambda f: (f / "model.bin").unlink(), "model.bin"),
    "edited, same size": (lambda f: (f / "model.bin").write_bytes(b"Weights"), "model.bin"),
    "shortened": (lambda f: (f / "model.bin").write_bytes(b"weight"), "model.bin"),
    "edited below a folder": (lambda f: (f / "extra/notes.txt").write_bytes(b"HELLO"), "notes.txt"),
    "extra file": (lambda f: (f / "more.txt").write_text("x"), "more.txt"),
    "extra hidden file": (lambda f: (f / ".more").write_text("x"), ".more"),
    "extra file below a folder": (lambda f: (f / "extra/more.txt").write_text("x"), "extra/more.txt"),
    "other case": (rename_case, "Model.bin"),
    "member became a folder": (
        lambda f: ((f / "model.bin").unlink(), (f / "model.bin").mkdir()),
        "model.bin",
    ),
    "link to a member": (lambda f: (f / "link").symlink_to(f / "model.bin"), "link"),
    "link to a folder": (lambda f: (f / "link").symlink_to("/etc"), "link"),
    "broken link": (lambda f: (f / "link").symlink_to("nowhere"), "link"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_bundle_does_not_open(bundle, damage, named):
    damage(bundle.path)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle.path)
    assert named in str(caught.value)
    assert caught.value.remedy
    assert caught.value.exit_code == 2


EXTRAS = ["more.txt", ".more", "extra/more.txt", "README.md", "engines", "model.bin.bak"]


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("kind", ["file", "link", "link to a folder"])
def test_extra_files_are_to_be_removed(bundle, tmp_path, name, kind):
    extra = bundle.path / name
    if kind == "file":
        extra.write_text("x")
    else:
        extra.symlink_to(tmp_path if "folder" in kind else bundle.path / "model.bin")
    with pytest.raises(BundleError, match=re.escape(name)) as caught:
        Bundle.open(bundle.path)
    assert caught.value.remedy == "remove it"
    extra.unlink()
    Bundle.open(bundle.path)


LEFT = [
    ".DS_Store",
    "._model.bin",
    "Thumbs.db",
    "desktop.ini",
    ".nfs000000000123abcd00000001",
    ".fuse_hidden0000001",
    ".smbdeleteAAA12f3",
    "manifest.json:Zone.Identifier",
    ".model.onnx.icloud",
    ".localized",
    "Icon\r",
    ".AppleDouble/model.bin",
    ".Trash-1000/files/model.bin",
    ".stfolder/marker",
    ".stversions/model~20260102.bin",
    ".gitattributes",
    ".gitignore",
    ".git/config",
    ".dvc/tmp/lock",
    ".dropbox",
    ".Spotlight-V100/Store-V2/x",
    ".manifest.json.swp",
    ".~lock.report.md#",
    "manifest.json~",
    "~$report.md",
    "#report.md#",
    "$RECYCLE.BIN/S-1-5/desktop.ini",
    "System Volume Information/WPSettings.dat",
    "lost+found/1",
    "extra/.gitkeep",
    ".directory",
    "extra/.DS_Store",
    "extra/thumbs.DB",
    "__MACOSX/._model.bin",
    "@eaDir/model.bin/SYNO",
    ".ipynb_checkpoints/manifest-checkpoint.json",
    ".cache/huggingface/download/model.bin.metadata",
]


@pytest.mark.parametrize("name", LEFT)
def test_what_systems_leave_is_ignored(bundle, name):
    place = bundle.path / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(b"junk")
    opened = Bundle.open(bundle.path)
    assert opened.manifest.files == bundle.manifest.files
    with pytest.raises(BundleError):
        opened.file(name)


# --- bundles whose files are links ----------------------------------------------------------------


def linked(bundle: Bundle, folder: Path, store: Path) -> Path:
    """As Hugging Face's cache and DVC: every file is a link to one that is named by its content."""
    for name, data in snapshot(bundle.path).items():
        blob = store / hashlib.sha256(data).hexdigest()
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(data)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(os.path.relpath(blob, (folder / name).parent))
    return folder


def mounted(bundle: Bundle, folder: Path, dated: str = "..2026_01_02_03_04_05.678") -> Path:
    """As Kubernetes mounts a ConfigMap: ``file -> ..data/file``, ``..data -> ..2026_...``."""
    shutil.copytree(bundle.path, folder / dated)
    (folder / "..data").symlink_to(dated)
    for entry in (folder / dated).iterdir():
        (folder / entry.name).symlink_to(f"..data/{entry.name}")
    return folder


@pytest.mark.parametrize("kind", ["links", "mount"])
def test_a_bundle_of_links_opens(bundle, tmp_path, kind):
    target = tmp_path / "elsewhere"
    made = linked(bundle, target, tmp_path / "store") if kind == "links" else mounted(bundle, target)
    opened = Bundle.open(made)
    assert opened.manifest.files == bundle.manifest.files
    for name in bundle.manifest.files:
        assert opened.file(name).read_bytes() == bundle.file(name).read_bytes()
    with Predictor.load(made) as p:
        assert p.labels == list(LABELS)


@pytest.mark.parametrize("kind", ["other bytes", "nowhere", "folder", "device", "pipe"])
def test_a_link_to_anything_else_does_not_open(bundle, tmp_path, kind):
    made = linked(bundle, tmp_path / "elsewhere", tmp_path / "store")
    (tmp_path / "other").write_bytes(b"Weights")
    os.mkfifo(tmp_path / "pipe")
    targets = {
        "other bytes": "other",
        "nowhere": "absent",
        "folder": ".",
        "device": "/dev/zero",
        "pipe": "pipe",
    }
    (made / "model.bin").unlink()
    (made / "model.bin").symlink_to(tmp_path / targets[kind])
    with pytest.raises(BundleError, match=r"model\.bin"):
        Bundle.open(made)


def test_a_linked_manifest_is_checked_like_any_other(bundle, tmp_path):
    shutil.move(bundle.path / MANIFEST, tmp_path / "m.json")
    (bundle.path / MANIFEST).symlink_to(tmp_path / "m.json")
    assert Bundle.open(bundle.path).manifest.files == bundle.manifest.files
    (tmp_path / "m.json").write_bytes(b"{}")
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)


ENTRY = {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}


@pytest.mark.parametrize(
    "name",
    ["../model.bin", "/etc/passwd", "a/../../b", "..", ".", "", "C:\\x", "a\\b", "a//b", "./model.bin"],
)
def test_names_outside_the_bundle(bundle, name):
    (bundle.path.parent / "model.bin").write_bytes(b"weights")
    edit_manifest(bundle, lambda m: m["files"].update({name: ENTRY}))
    with pytest.raises(BundleError, match="outside the bundle"):
        Bundle.open(bundle.path)


def change(**entries):
    return lambda manifest: manifest.update(entries)


MANIFESTS = {
    "names that differ in case": lambda m: m["files"].update({"MODEL.BIN": ENTRY}),
    "too many files": lambda m: m["files"].update({f"f{i}": ENTRY for i in range(300)}),
    "absurd total size": lambda m: m["files"]["model.bin"].update(size=1 << 50),
    "entry without hash": lambda m: m["files"]["model.bin"].pop("sha256"),
    "entry without size": lambda m: m["files"]["model.bin"].pop("size"),
    "entry of another type": lambda m: m["files"].update({"model.bin": "x"}),
    "size as text": lambda m: m["files"]["model.bin"].update(size="7"),
    "files as list": change(files=[]),
    "model as text": change(model="cmt"),
    "labels as text": change(labels="cat"),
    "precision as number": change(precision=8),
    "newer schema": change(schema=3),
    "older schema": change(schema=1),
    "schema as text": change(schema="2"),
    "no schema": lambda m: m.pop("schema"),
    "unknown entry": change(surprise=1),
    "entry lacking": lambda m: m.pop("format"),
}


@pytest.mark.parametrize("edit", MANIFESTS.values(), ids=MANIFESTS.keys())
def test_manifest_that_cannot_be_trusted(bundle, edit):
    edit_manifest(bundle, edit)
    with pytest.raises(BundleError) as caught:
        Bundle.open(bundle.path)
    assert caught.value.remedy


BROKEN = {
    "empty": b"",
    "half": b'{"schema": 2, "model": {',
    "no JSON": b"schema: 1",
    "not UTF-8": b'{"schema": "\xff\xfe"}',
    "list": b"[1]",
    "text": b'"schema"',
    "number": b"1",
    "null": b"null",
    "deep": b"[" * 200_000,
    "only a schema": b'{"schema": 2}',
    "huge number": b'{"schema": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN.keys())
def test_broken_manifest(bundle, data):
    (bundle.path / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError):
        Bundle.open(bundle.path)


def test_oversized_manifest_is_not_read(bundle):
    with open(bundle.path / MANIFEST, "r+b") as file:
        file.truncate(MAX_MANIFEST + 1)
    with pytest.raises(BundleError, match="too large"):
        Bundle.open(bundle.path)


def test_what_is_not_a_bundle(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for name in ("absent", "file", "folder", "file/below", "x" * 300, "x" * 5000):
        with pytest.raises(BundleError) as caught:
            Bundle.open(tmp_path / name)
        assert name[:20] in str(caught.value)
        assert "cmt-export" in caught.value.remedy


USED = {
    "labels are no pairs": (change(labels=[1, 2, 3]), lambda b: (b.labels, b.class_ids)),
    "labels are empty pairs": (change(labels=[[], [], []]), lambda b: (b.labels, b.class_ids)),
    "fewer labels than logits": (change(labels=[["red", "red"]]), lambda b: b.labels),
    "preprocessing is a list": (change(preprocess=[]), lambda b: b.preprocess),
    "preprocessing lacks a size": (lambda m: m["preprocess"].pop("size"), lambda b: b.preprocess),
}


@pytest.mark.parametrize(("edit", "use"), USED.values(), ids=USED.keys())
def test_manifest_whose_inner_entries_are_wrong(bundle, edit, use):
    """A checksum proves no good sense: content is checked at the latest where it is used."""
    edit_manifest(bundle, edit)
    with pytest.raises(BundleError):
        use(Bundle.open(bundle.path))


@pytest.mark.parametrize("data", [b"", b"no archive", b"PK\x03\x04 half"], ids=["empty", "text", "half"])
def test_damaged_golden_file_is_a_bundle_error(tmp_path, data):
    made = make_bundle(tmp_path / "b")
    bad = copy_bundle(made, tmp_path / "c", lambda f: (f / GOLDEN).write_bytes(data))
    with pytest.raises(BundleError, match="golden"):
        Bundle.open(bad.path).golden()


def test_golden_file_is_never_unpickled(tmp_path):
    made = make_bundle(tmp_path / "b")
    pickled = np.array([{"an": "object"}], dtype=object)
    bad = copy_bundle(made, tmp_path / "c", lambda f: np.savez(f / GOLDEN, pixels=pickled, logits=pickled))
    with pytest.raises(BundleError, match="golden"):
        bad.golden()
