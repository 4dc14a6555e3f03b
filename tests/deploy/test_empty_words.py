"""Small faults of what a user gives: each is refused by its own name, and not blamed on something else."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from cmt_edge.__main__ import main
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.errors import BundleError, RuntimeMissingError
from helpers.bundles import edit_manifest, make_bundle, tiny_golden

EMPTY = [
    ("predict {bundle} ''", "an argument is empty"),
    ("predict '' image.png", "an argument is empty"),
    ("verify {bundle} --data ''", "--data is empty"),
    ("verify {bundle} --data=", "--data is empty"),
    ("verify {bundle} --key ''", "--key is empty"),
    ("verify {bundle} --reference=", "--reference is empty"),
    ("verify {bundle} --device ''", "--device is empty"),
    ("bench {bundle} --markdown ''", "--markdown is empty"),
    ("bench '' {bundle}", "an argument is empty"),
    ("build ''", "an argument is empty"),
    ("export --config ''", "--config is empty"),
    ("export --model cmt_nano --data '' --dry-run", "--data is empty"),
]
"""A command in which a variable of a script was not set -> what the message says."""


@pytest.mark.parametrize(("command", "message"), EMPTY)
def test_an_empty_word_is_bad_usage(tmp_path, capsys, command, message):
    """``cmt-verify BUNDLE --data "$DATA"`` must not say that it verified anything."""
    bundle = make_bundle(tmp_path / "tiny").path
    words = [word if word != "''" else "" for word in command.format(bundle=bundle).split(" ")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_value_that_ends_with_an_equals_sign_is_a_value(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "tiny").path
    assert main(["verify", str(bundle), "--data=photos="]) == 2
    assert "photos=: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["CPU.99", "CPU.0", "CPU.", "GPU.", "AUTO.1"])
def test_a_device_without_such_a_number_is_not_the_bundles_fault(device):
    openvino = pytest.importorskip("cmt_edge.deploy.backends.openvino", reason="needs OpenVINO")
    with pytest.raises(RuntimeMissingError, match="has no device"):
        openvino.RUNTIME.check(device)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["tiny", "tiny.cmt.zip"])
def test_a_named_pipe_is_called_one(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(BundleError, match="is a named pipe, not a bundle"):
        Bundle.open(tmp_path / name)


@pytest.mark.parametrize("seed", [1 << 64, -1])
def test_a_seed_that_no_generator_takes_is_refused_with_the_manifest(tmp_path, seed):
    bundle = make_bundle(tmp_path / "tiny")
    edit_manifest(bundle, lambda content: content["model"]["weights"].update(seed=seed))
    with pytest.raises(BundleError, match="seed"):
        Bundle.open(bundle.path)


def test_bench_names_the_bundle_whose_golden_image_is_no_image(tmp_path, capsys):
    golden = replace(tiny_golden(), sources=[b"no image", b"no image"])
    bundle = make_bundle(tmp_path / "tiny", golden=golden).path
    assert main(["bench", str(bundle), "--iters", "2", "--seconds", "0", "--no-throughput", "-q"]) == 2
    err = capsys.readouterr().err
    assert f"{bundle / 'golden.npz'}, image 0" in err


def test_the_largest_seed_is_read(tmp_path):
    bundle = make_bundle(tmp_path / "tiny")
    edit_manifest(bundle, lambda content: content["model"]["weights"].update(seed=(1 << 64) - 1))
    with Predictor.load(bundle.path) as predictor:
        assert predictor.labels
