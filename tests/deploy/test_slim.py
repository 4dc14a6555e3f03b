"""A slim bundle: what is left out, what its manifest says of it, and what can still be verified."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import COMPILED, GOLDEN, REFERENCE, REPORT_JSON, REPORT_TEXT, BundleWriter
from cmt_edge.deploy.bundle.golden import Golden, save_reference
from cmt_edge.deploy.bundle.sections import FileEntry, SlimEntry
from cmt_edge.deploy.bundle.slim import choose_golden, leave_out
from cmt_edge.deploy.cli import verify as command
from cmt_edge.deploy.errors import BundleError, RuntimeMissingError
from cmt_edge.deploy.images import hash_image
from cmt_edge.deploy.measure.parity import verify
from helpers.bundles import copy_bundle, make_bundle, tiny_golden, tiny_graph, tiny_manifest
from helpers.images import coloured, folder_of


def make_slim_bundle(target: Path) -> Bundle:
    """A slim bundle that knew the reference's answer to one image."""
    with BundleWriter(target) as writer:
        tiny_golden().save(writer.folder / GOLDEN)
        (writer.folder / "model.onnx").write_bytes(tiny_graph())
        for name in (REPORT_TEXT, REPORT_JSON, COMPILED):
            (writer.folder / name).write_text("{}")
        save_reference(writer.folder / REFERENCE, {hash_image(coloured("red")): 0})
        return writer.commit(leave_out(writer.staged(tiny_manifest()), golden_images=3))


def test_what_is_left_out_is_named(tmp_path: Path) -> None:
    made = make_slim_bundle(tmp_path / "b")
    bundle = Bundle.open(made.path)
    assert sorted(bundle.manifest.files) == [GOLDEN, "model.onnx"]
    slim = bundle.manifest.slim
    assert slim is not None
    assert set(slim.files) == {REFERENCE, REPORT_TEXT, REPORT_JSON, COMPILED}
    assert slim.files[REPORT_TEXT].size == 2
    assert slim.golden_images == 3
    assert verify(bundle).passed


def test_a_whole_bundle_says_nothing_of_it(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    assert b'"slim"' not in (bundle.path / "manifest.json").read_bytes()


def test_a_file_that_is_left_out_and_there_is_refused(tmp_path: Path) -> None:
    bundle = make_slim_bundle(tmp_path / "b")
    entry = FileEntry(1, "0" * 64)
    copied = copy_bundle(bundle, tmp_path / "c", slim=SlimEntry(files={GOLDEN: entry}, golden_images=0))
    with pytest.raises(BundleError, match=r"slim and files both name 'golden\.npz'"):
        Bundle.open(copied.path)


def test_images_without_a_reference_say_what_to_do(tmp_path: Path, no_torch: None) -> None:
    bundle = make_slim_bundle(tmp_path / "b")
    data = folder_of(tmp_path / "d", {"red": [coloured("red")]})
    with pytest.raises(
        RuntimeMissingError, match=r"reference\.npz was left out of this slim bundle"
    ) as caught:
        verify(bundle, data=data)
    assert "without --slim" in caught.value.remedy
    assert "--reference BUNDLE" in caught.value.remedy


def test_the_command_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = make_slim_bundle(tmp_path / "b")
    assert command.main([str(bundle.path)]) == 0
    said = capsys.readouterr().err
    assert "left out of this slim bundle: reference.npz (" in said
    assert "3 golden images" in said


def test_the_golden_images_that_stay_are_the_first_and_the_large_one() -> None:
    two = tiny_golden()
    assert choose_golden(two) is two
    four = Golden(
        [*two.sources, *two.sources[::-1]],
        np.concatenate([two.pixels, two.pixels[::-1]]),
        [np.concatenate([output, output[::-1]]) for output in two.outputs],
    )
    four = replace(four, sources=[b"a", b"b", b"c", b"d"])
    kept = choose_golden(four)
    assert kept.sources == [b"a", b"d"]
    assert (kept.pixels == four.pixels[[0, 3]]).all()
    assert (kept.outputs[0] == four.outputs[0][[0, 3]]).all()
