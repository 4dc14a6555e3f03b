"""Exports whose images are decoded at a part of their size: what that changes is measured, and refused where
it is too much."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch import nn

from cmt_edge.calib.generated import generate_photograph
from cmt_edge.deploy import Bundle, Predictor, Preprocess
from cmt_edge.deploy.bundle.sections import DecodingEntry
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import GateError
from cmt_edge.deploy.preprocessing import decode_pixels
from cmt_edge.export import run
from cmt_edge.export.cli import main
from cmt_edge.export.steps import is_reduced
from cmt_edge.export.steps.decoding import require_faithful
from cmt_edge.export.steps.reference import make_golden
from helpers.exports import nano

pytestmark = pytest.mark.usefixtures("one_trace")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of CIFAR-10, a large and a small photograph each."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        (folder / name / "large.jpg").write_bytes(generate_photograph(400, seed=number))
        (folder / name / "small.jpg").write_bytes(generate_photograph(90, seed=number))
    return folder


@pytest.fixture(scope="module")
def reduced(tmp_path_factory, photographs) -> Bundle:
    """A bundle of reduced images, judged on the photographs, as it is read from the disk."""
    folder = tmp_path_factory.mktemp("reduced")
    return Bundle.open(run(nano(folder, decode="reduced", eval_data=str(photographs), max_drop=100)).path)


def test_bundle_of_reduced_images_says_what_that_changes(reduced):
    assert (reduced.preprocess.decode, reduced.preprocess.reducing_gap) == ("reduced", 2.0)
    entry = reduced.manifest.decoding
    assert entry is not None
    assert (entry.images, entry.reduced) == (5, 3)  # with the golden photograph
    assert 0 < entry.pixel_mean < 1 <= entry.pixel_max
    assert 0 < entry.output_mean < 0.05
    assert entry.agreement is not None
    assert entry.drop is not None
    assert "3 of 5 images" in (reduced.path / "report.md").read_text()
    assert json.loads((reduced.path / "report.json").read_text())["decoding"]["reduced"] == 3


def test_figures_are_those_of_the_images(reduced, photographs):
    """The golden photograph and two large ones, by hand."""
    entry, spec = reduced.manifest.decoding, reduced.preprocess
    full = replace(spec, decode="full")
    large = [path.read_bytes() for path in sorted(photographs.rglob("large.jpg"))]
    sources = [reduced.golden().sources[-1], *large]
    pairs = [(decode_pixels(source, spec).astype(int), decode_pixels(source, full)) for source in sources]
    difference = np.abs([ours - expected for ours, expected in pairs])
    assert entry.pixel_mean == pytest.approx(difference.mean())
    assert entry.pixel_max == difference.max()


def test_predictions_use_reduced_images(reduced, photographs):
    image = photographs / "cat" / "large.jpg"
    with Predictor.load(reduced) as predictor:
        ours = predictor(image).logits
        full = predictor(np.asarray(Image.open(image).convert("RGB"))).logits
        assert np.array_equal(predictor.logits(predictor.prepare([image]))[0], ours)
    assert 0 < np.abs(ours - full).max() < 0.2 * full.std()


@pytest.mark.parametrize(("decode", "gap"), [("full", 2.0), ("reduced", 1.0), ("reduced", 5.0)])
def test_golden_photograph_is_large_enough_whatever_the_gap(decode, gap):
    spec = Preprocess(16, 20, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), decode=decode, reducing_gap=gap)
    golden, _ = make_golden(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3)), spec)
    assert Image.open(io.BytesIO(golden.sources[-1])).format == "JPEG"
    assert is_reduced(NamedBytes(golden.sources[-1], "golden"), replace(spec, decode="reduced"))


def test_full_decoding_is_the_default_and_measures_nothing(onnx_bundle):
    assert onnx_bundle.preprocess.decode == "full"
    assert "decoding" not in json.loads((onnx_bundle.path / "manifest.json").read_text())


def test_feature_maps_are_compared_too(tmp_path):
    entry = run(nano(tmp_path, decode="reduced", head="features")).manifest.decoding
    assert entry is not None
    assert entry.output_mean > 0
    assert entry.agreement is None


GOOD = DecodingEntry(images=9, reduced=4, pixel_mean=0.3, pixel_max=9, output_mean=0.01, agreement=99.0)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pixel_mean": 1.2}, r"pixels differ by 1.20 grey levels on average \(allowed 1\)"),
        ({"output_mean": 0.06}, "outputs differ by 0.060 standard deviations"),
        ({"output_mean": float("nan")}, "outputs differ by nan standard deviations"),
        ({"drop": 1.5, "drop_ci": (0.5, 2.5)}, r"top-1 drops by 1.50 points \(allowed 1\)"),
    ],
)
def test_gate(change, why):
    require_faithful(replace(GOOD, drop=1.0, drop_ci=(0.0, 2.0)), 1.0)
    with pytest.raises(GateError, match=why) as caught:
        require_faithful(replace(GOOD, **change), 1.0)
    assert "4 of 9 images" in caught.value.what
    assert caught.value.exit_code == 1


def test_images_that_suffer_are_refused_and_nothing_is_written(tmp_path, capsys):
    """Lines of one pixel, of which reduced decoding makes something else than resizing does."""
    folder = tmp_path / "lines"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = np.repeat(rng.integers(0, 2, (300, 1, 1), np.uint8) * 255, 300, 1)
        Image.fromarray(np.repeat(noise, 3, 2)).save(folder / f"{number}.jpg", quality=95)
    output = tmp_path / "out"
    code = main(
        [
            *("--model", "cmt_nano", "--format", "onnx", "-o", str(output), "-q", "--int8"),
            *("--data", str(folder), "--decode", "reduced", "--reducing-gap", "1"),
        ]
    )
    assert code == 1
    told = capsys.readouterr().err
    assert "reduced decoding changes" in told
    assert "--decode full" in told
    assert not output.exists()


def test_plan_names_the_step(tmp_path, capsys):
    arguments = ["--model", "cmt_nano", "--format", "onnx", "-o", str(tmp_path / "out"), "--dry-run"]
    assert main([*arguments, "--decode", "reduced"]) == 0
    assert "compare reduced with full decoding" in capsys.readouterr().out
    assert main(arguments) == 0
    assert "compare reduced" not in capsys.readouterr().out
