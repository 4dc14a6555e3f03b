"""Files that others put beside ours, or where ours belong: none is written to, deleted or believed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import BundleWriter, packed
from cmt_edge.deploy.bundle.belongings import UNNAMED, find_foreign, is_certainly_ours
from cmt_edge.deploy.bundle.manifest import ENGINES, MANIFEST
from cmt_edge.deploy.errors import BundleError, CacheWarning, OutputError
from cmt_edge.deploy.files import NOWHERE, expand_home, find_cache_folder, find_shared_folder, make_aside_path
from cmt_edge.deploy.locks import LOCK, TEMPORARY, locked
from cmt_edge.deploy.tensorrt.build import exclusive
from cmt_edge.deploy.tensorrt.engine import name_member
from helpers.bundles import edit_manifest, make_bundle, snapshot
from helpers.trt import build, trt_bundle


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return make_bundle(tmp_path / "tiny", members={"extra/notes.txt": b"hello"})


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's folder outside any bundle."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "thesis.txt").write_bytes(b"precious")
    (folder / f".draft.12345678{TEMPORARY}").write_bytes(b"precious")
    (folder / "engine-0123456789ab.plan").write_bytes(b"precious")
    return folder


# --- links in a bundle ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["../home", "/etc", "nowhere"])
def test_a_link_in_place_of_the_folder_of_engines_is_no_part_of_a_bundle(
    bundle: Bundle, home: Path, target: str
) -> None:
    (bundle.path / ENGINES).symlink_to(target)
    with pytest.raises(BundleError, match="holds what its manifest does not name: engines"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize("name", [f".notes.12345678{TEMPORARY}", f"{ENGINES}/engine-0123456789ab.plan"])
def test_a_link_is_no_left_over(bundle: Bundle, home: Path, name: str) -> None:
    (bundle.path / name).parent.mkdir(exist_ok=True)
    (bundle.path / name).symlink_to(home / "thesis.txt")
    with pytest.raises(BundleError, match="does not name"):
        Bundle.open(bundle.path)
    with pytest.raises(OutputError, match="not replaced"):
        make_bundle(bundle.path)


def test_a_build_neither_writes_nor_deletes_through_a_link(
    gpu_machine: None, quick_builds: None, tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither where the link stands before the bundle is opened, nor where it is put there afterwards."""
    bundle = trt_bundle(tmp_path / "tiny_fp16_trt")
    before = snapshot(home)
    (bundle.path / ENGINES).symlink_to(home)
    assert build(bundle) == 2
    (bundle.path / ENGINES).unlink()
    opened = Bundle.open(bundle.path)
    (bundle.path / ENGINES).symlink_to(home)
    with pytest.raises(OutputError, match="engines is a link"), exclusive(bundle.path):
        pytest.fail("the body must not run")
    with pytest.raises(OutputError, match="engines is a link"):
        opened.update(opened.manifest, {f"{ENGINES}/new": b"x"})
    assert snapshot(home) == before
    assert "Traceback" not in capsys.readouterr().err


def test_members_below_a_link_are_read_but_not_dropped(bundle: Bundle, tmp_path: Path) -> None:
    """As in a ConfigMap, where folders of members are links."""
    outside = tmp_path / "outside"
    shutil.move(bundle.path / "extra", outside)
    (bundle.path / "extra").symlink_to(outside)
    opened = Bundle.open(bundle.path)
    before = snapshot(tmp_path)
    with pytest.raises(OutputError, match="extra is a link"):
        opened.update(opened.manifest, {}, ["extra/notes.txt"])
    assert snapshot(tmp_path) == before


def test_replacing_a_bundle_deletes_a_link_and_not_what_it_leads_to(bundle: Bundle, home: Path) -> None:
    (bundle.path / "model.bin").unlink()
    (bundle.path / "model.bin").symlink_to(home / "thesis.txt")
    shutil.rmtree(bundle.path / "extra")
    (bundle.path / "extra").symlink_to(home)
    before = snapshot(home)
    make_bundle(bundle.path)
    assert snapshot(home) == before


# --- left-overs of builds -------------------------------------------------------------------------


def test_only_files_that_builds_named_are_left_overs(bundle: Bundle) -> None:
    (bundle.path / ENGINES).mkdir()
    left = bundle.path / name_member(b"an engine", "engine", ".plan")
    left.write_bytes(b"an engine")
    other = bundle.path / name_member(b"another", "report", ".json")
    other.write_bytes(b"of a user, by chance under such a name")
    opened = Bundle.open(bundle.path)
    opened.update(opened.manifest, {})
    assert not left.exists()
    assert other.exists()
    (bundle.path / ENGINES / "thesis.txt").write_text("precious")
    with pytest.raises(BundleError, match=r"does not name: engines/thesis\.txt"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(("kind", "suffix"), [("engine", ".plan"), ("report", ".md"), ("report", ".json")])
def test_the_names_that_builds_give_are_known(tmp_path: Path, kind: str, suffix: str) -> None:
    name = name_member(b"content", kind, suffix)
    assert UNNAMED.fullmatch(name)
    (tmp_path / ENGINES).mkdir()
    (tmp_path / name).write_bytes(b"content")
    assert is_certainly_ours(tmp_path, name)


# --- what an export replaces ----------------------------------------------------------------------


def add_file(path: Path) -> None:
    (path / "my_notes.txt").write_text("precious")


def add_repository(path: Path) -> None:
    (path / ".git").mkdir()
    (path / ".git" / "HEAD").write_text("ref")


def add_nested(path: Path) -> None:
    (path / "extra" / "mine" / "deep").mkdir(parents=True)
    (path / "extra" / "mine" / "deep" / "a.txt").write_text("precious")


def add_backup(path: Path) -> None:
    (path / "report.md~").write_text("precious")


def add_swap(path: Path) -> None:
    (path / ".notes.txt.swp").write_text("unsaved")


def add_link(path: Path) -> None:
    (path / "mine").symlink_to("/nowhere")


def add_to_engines(path: Path) -> None:
    (path / ENGINES).mkdir()
    (path / ENGINES / "mine.plan").write_text("precious")


def add_with_a_name_of_ours(path: Path) -> None:
    (path / ENGINES).mkdir()
    (path / ENGINES / "report-0123456789ab.md").write_text("precious")


def add_folder_with_a_name_of_systems(path: Path) -> None:
    (path / "._mine").mkdir()
    (path / "._mine" / "a.txt").write_text("precious")


def add_temporary(path: Path) -> None:
    (path / ".mine.tmp").write_text("precious")


def replace_member_by_folder(path: Path) -> None:
    (path / "model.bin").unlink()
    (path / "model.bin").mkdir()
    (path / "model.bin" / "a.txt").write_text("precious")


FOREIGN = {
    add_file: "my_notes.txt",
    add_repository: ".git/",
    add_nested: "extra/mine/",
    add_backup: "report.md~",
    add_swap: ".notes.txt.swp",
    add_link: "mine",
    add_to_engines: "engines/",
    add_with_a_name_of_ours: "engines/",
    add_folder_with_a_name_of_systems: "._mine/",
    add_temporary: ".mine.tmp",
    replace_member_by_folder: "model.bin",
}


@pytest.mark.parametrize("add", FOREIGN, ids=lambda add: add.__name__)
def test_a_bundle_with_files_of_others_is_not_replaced(bundle: Bundle, add: Callable[[Path], None]) -> None:
    add(bundle.path)
    before = snapshot(bundle.path)
    with pytest.raises(OutputError, match="so it is not replaced") as caught:
        make_bundle(bundle.path)
    assert FOREIGN[add] in str(caught.value)
    assert "move it elsewhere" in str(caught.value)
    assert snapshot(bundle.path) == before
    assert [path.name for path in bundle.path.parent.iterdir()] == ["tiny"]


def test_files_of_others_that_come_while_a_bundle_is_written_stay(bundle: Bundle) -> None:
    with BundleWriter(bundle.path) as writer:
        add_file(bundle.path)
        with pytest.raises(OutputError, match=r"my_notes\.txt"):
            writer.commit(bundle.manifest)
    assert (bundle.path / "my_notes.txt").read_text() == "precious"


@pytest.mark.parametrize(
    "content",
    ['{"manifest_version": 3, "name": "extension"}', "[]", "no JSON", "", '{"files": {}, "checksum": ""}'],
)
def test_a_folder_with_another_programs_manifest_is_not_replaced(tmp_path: Path, content: str) -> None:
    target = tmp_path / "app"
    (target / "src").mkdir(parents=True)
    (target / MANIFEST).write_text(content)
    (target / "src" / "a.js").write_text("precious")
    before = snapshot(target)
    with pytest.raises(OutputError, match="is not a bundle, so it is not replaced"):
        make_bundle(target)
    assert snapshot(target) == before


def remove_member(path: Path) -> None:
    (path / "model.bin").unlink()


def change_member(path: Path) -> None:
    (path / "model.bin").write_bytes(b"changed")


def change_label(path: Path) -> None:
    edit_manifest(Bundle.open(path), lambda content: content["labels"].reverse(), seal=False)


def leave_by_system(path: Path) -> None:
    (path / ".DS_Store").write_bytes(b"x")
    (path / "extra" / "Thumbs.db").write_bytes(b"x")


def leave_by_build(path: Path) -> None:
    (path / ENGINES).mkdir()
    (path / name_member(b"an engine", "engine", ".plan")).write_bytes(b"an engine")
    (path / ENGINES / f".engine.plan.12345678{TEMPORARY}").write_bytes(b"half")


OWN = [remove_member, change_member, change_label, leave_by_system, leave_by_build]


@pytest.mark.parametrize("change", OWN, ids=lambda change: change.__name__)
def test_a_damaged_bundle_of_ours_is_replaced(bundle: Bundle, change: Callable[[Path], None]) -> None:
    change(bundle.path)
    assert find_foreign(bundle.path, bundle.manifest.files) == []
    make_bundle(bundle.path, members={"model.bin": b"newer"})
    assert Bundle.open(bundle.path).file("model.bin").read_bytes() == b"newer"


# --- what --pack replaces -------------------------------------------------------------------------


def write_text(file: Path) -> None:
    file.write_text("not mine")


def write_nothing(file: Path) -> None:
    file.write_bytes(b"")


def write_other_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(MANIFEST, '{"manifest_version": 3}')
        archive.writestr("src/a.js", "x")


def write_bundle_with_more(file: Path) -> None:
    make_bundle(file.with_name("made")).pack(file)
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("my_notes.txt", "precious")


@pytest.mark.parametrize("write", [write_text, write_nothing, write_other_zip, write_bundle_with_more])
def test_a_file_that_is_no_packed_bundle_is_not_replaced(
    bundle: Bundle, tmp_path: Path, write: Callable[[Path], None]
) -> None:
    file = tmp_path / f"tiny{packed.SUFFIX}"
    write(file)
    before = file.read_bytes()
    for attempt in (packed.require_replaceable, bundle.pack):
        with pytest.raises(OutputError, match="so it is not replaced"):
            attempt(file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_a_packed_bundle_of_ours_is_replaced_whole_or_cut_off(
    bundle: Bundle, tmp_path: Path, cache: Path, share: float
) -> None:
    file = tmp_path / f"tiny{packed.SUFFIX}"
    make_bundle(tmp_path / "older", members={"model.bin": b"older" * 1000}).pack(file)
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    bundle.pack(file)
    assert snapshot(Bundle.open(file).path) == snapshot(bundle.path)


# --- names beside the place -----------------------------------------------------------------------


@pytest.mark.parametrize("name", [".tiny.old", ".tiny.backup.tmp", ".tiny.12345678.tmp", ".tiny.lock"])
@pytest.mark.parametrize("existing", [True, False])
def test_hidden_folders_of_a_user_beside_the_place_stay(tmp_path: Path, name: str, existing: bool) -> None:
    if existing:
        make_bundle(tmp_path / "tiny")
    (tmp_path / name).mkdir()
    (tmp_path / name / "keep.txt").write_text("precious")
    os.utime(tmp_path / name, (0, 0))
    make_bundle(tmp_path / "tiny", members={"model.bin": b"newer"})
    assert (tmp_path / name / "keep.txt").read_text() == "precious"
    assert Bundle.open(tmp_path / "tiny").file("model.bin").read_bytes() == b"newer"


def test_a_link_in_place_of_the_folder_that_moves_aside_is_left_alone(bundle: Bundle, home: Path) -> None:
    make_aside_path(bundle.path).symlink_to(home)
    before = snapshot(home)
    make_bundle(bundle.path)
    assert snapshot(home) == before


def test_a_lock_is_not_made_through_a_link(tmp_path: Path) -> None:
    (tmp_path / f"place{LOCK}").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"), locked(tmp_path / "place"):
        pytest.fail("the body must not run")
    assert not (tmp_path / "elsewhere").exists()


# --- the cache of unpacked bundles ----------------------------------------------------------------


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CMT_EDGE_CACHE", str(folder))
    return folder


@pytest.fixture
def file(bundle: Bundle, tmp_path: Path, cache: Path) -> Path:
    path = tmp_path / f"tiny{packed.SUFFIX}"
    bundle.pack(path)
    return path


def reverse_labels(folder: Path) -> None:
    """With the right checksum, and of the same length."""
    edit_manifest(Bundle.open(folder), lambda content: content["labels"].reverse())
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()), indent=2, ensure_ascii=False) + "\n")


def add_signature(folder: Path) -> None:
    (folder / "signature.json").write_text("{}")


def add_engine(folder: Path) -> None:
    leave_by_build(folder)


def replace_by_link(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    shutil.move(folder / "model.bin", elsewhere)
    (folder / "model.bin").symlink_to(elsewhere)


def replace_folder_by_link(folder: Path) -> None:
    elsewhere = folder.parent.parent / "elsewhere"
    shutil.move(folder, elsewhere)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize(
    "change",
    [
        reverse_labels,
        add_signature,
        add_engine,
        leave_by_system,
        replace_by_link,
        replace_folder_by_link,
        change_member,
    ],
    ids=lambda change: change.__name__,
)
def test_the_file_counts_and_not_what_the_cache_has_of_it(
    bundle: Bundle, file: Path, change: Callable[[Path], None]
) -> None:
    first = Bundle.open(file)
    change(first.path)
    again = Bundle.open(file)
    assert again.labels == bundle.labels
    assert snapshot(again.path) == snapshot(bundle.path)
    assert not again.path.is_symlink()
    assert not (again.path / "model.bin").is_symlink()
    with Predictor.load(file) as predictor, Predictor.load(bundle.path) as plain:
        image = np.full((4, 4, 3), (255, 0, 0), np.uint8)
        assert predictor(image).label == plain(image).label


def test_a_link_in_the_cache_leads_nowhere(file: Path, cache: Path, tmp_path: Path) -> None:
    """The folder that the unpacked bundle takes the place of would be a user's."""
    first = Bundle.open(file)
    home = tmp_path / "home"
    (home / first.path.name).mkdir(parents=True)
    (home / first.path.name / "thesis.txt").write_text("precious")
    shutil.rmtree(first.path.parent)
    first.path.parent.symlink_to(home)
    before = snapshot(home)
    opened = Bundle.open(file)
    assert not opened.path.is_relative_to(cache)
    assert snapshot(home) == before


@pytest.mark.parametrize("name", [".zip", "..zip", "...zip", "..cmt.zip", "...cmt.zip"])
def test_the_name_of_a_file_leads_to_no_other_folder(file: Path, cache: Path, name: str) -> None:
    other = file.with_name(name)
    shutil.copy(file, other)
    opened = Bundle.open(other)
    assert opened.path.parent.parent == cache / packed.FOLDER
    assert opened.name == "bundle"


def test_folders_of_a_user_beside_the_unpacked_bundles_stay(file: Path, cache: Path) -> None:
    names = [f"mine{number}" for number in range(packed.KEEP + 2)]
    for name in names:
        (cache / packed.FOLDER / name).mkdir(parents=True)
        (cache / packed.FOLDER / name / "keep.txt").write_text("precious")
    Bundle.open(file)
    assert all((cache / packed.FOLDER / name / "keep.txt").exists() for name in names)


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that other users may enter, which those of pytest's are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
@pytest.mark.parametrize(
    ("mode", "trusted"), [(0o700, True), (0o755, True), (0o1777, True), (0o777, False), (0o757, False)]
)
def test_a_cache_that_others_can_write_to_is_not_used(
    file: Path, open_place: Path, monkeypatch: pytest.MonkeyPatch, mode: int, trusted: bool
) -> None:
    cache = open_place / "cache"
    cache.mkdir()
    cache.chmod(mode)
    monkeypatch.setenv("CMT_EDGE_CACHE", str(cache))
    if trusted:
        assert Bundle.open(file).path.is_relative_to(cache)
        return
    with pytest.warns(CacheWarning, match=f"another user may write to {cache}"):
        opened = Bundle.open(file)
    assert not opened.path.is_relative_to(cache)
    assert opened.golden().logits.shape[0] == 2


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_below_a_private_folder_permissions_do_not_count(open_place: Path) -> None:
    inner = open_place / "private" / "open"
    inner.mkdir(parents=True)
    inner.chmod(0o777)
    assert find_shared_folder(inner) == inner
    inner.parent.chmod(0o700)
    assert find_shared_folder(inner) is None
    open_place.chmod(0o777)
    assert find_shared_folder(inner) == open_place, "whoever renames the private folder puts another there"


@pytest.mark.skipif(os.name == "nt" or os.getuid() != 0, reason="only root gives files away")
def test_a_folder_that_another_user_owns_is_not_trusted(open_place: Path) -> None:
    (open_place / "theirs").mkdir(mode=0o700)
    os.chown(open_place / "theirs", 12345, 12345)
    assert find_shared_folder(open_place / "theirs") == open_place / "theirs"


@pytest.mark.parametrize("text", ["~/c", "~nobody-of-this-name/c", "~"])
def test_no_folder_is_called_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """A shell leaves it as it is in ``CMT_EDGE_CACHE="~/c"``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CMT_EDGE_CACHE", text)
    folder = find_cache_folder()
    assert folder == (NOWHERE if "nobody" in text else tmp_path / "home" / text[2:])
    state = expand_home(text)
    assert state == folder
