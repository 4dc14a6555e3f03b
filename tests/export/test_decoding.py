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

from cmt_edge.calib.generated import generate_photograph
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle.sections import DecodingEntry
from cmt_edge.deploy.decoding import NamedBytes
from cmt_edge.deploy.errors import GateError
from cmt_edge.deploy.preprocessing import decode_pixels
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.cli import main
from cmt_edge.export.steps import is_reduced
from cmt_edge.export.steps.decoding import require_faithful
from helpers.exports import content, nano

pytestmark = pytest.mark.usefixtures("quick_exports")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """Two classes of CIFAR-10, a large and a small photograph each."""
    folder = tmp_path_factory.mktemp("photographs")
    for number, name in enumerate(("cat", "dog")):
        (folder / name).mkdir()
        (folder / name / "large.jpg").write_bytes(generate_photograph(400, seed=number))
        (folder / name / "small.jpg").write_bytes(generate_photograph(90, seed=number))
    return folder


def require_open(bundle: Bundle) -> Bundle:
    """The bundle as it is read again."""
    return Bundle.open(bundle.path)


def test_bundle_of_reduced_images_says_what_that_changes(tmp_path, photographs):
    bundle = require_open(
        run(nano(tmp_path, decode="reduced", eval_data=str(photographs), by_order=False, max_drop=100))
    )
    assert (bundle.preprocess.decode, bundle.preprocess.reducing_gap) == ("reduced", 2.0)
    entry = bundle.manifest.decoding
    assert entry is not None
    assert (entry.images, entry.reduced) == (5, 3)  # with the golden photograph
    assert 0 < entry.pixel_mean < 1 <= entry.pixel_max
    assert 0 < entry.output_mean < 0.05
    assert entry.agreement is not None
    assert entry.drop is not None
    text = (bundle.path / "report.md").read_text()
    assert "3 of 5 images" in text
    assert json.loads((bundle.path / "report.json").read_text())["decoding"]["reduced"] == 3


def test_figures_are_those_of_the_images(tmp_path, photographs):
    """The golden photograph and two large ones, by hand."""
    bundle = run(nano(tmp_path, decode="reduced", eval_data=str(photographs), max_drop=100))
    entry, spec = bundle.manifest.decoding, bundle.preprocess
    full = replace(spec, decode="full")
    sources = [bundle.golden().sources[-1], *(p.read_bytes() for p in sorted(photographs.rglob("large.jpg")))]
    pairs = [(decode_pixels(s, spec).astype(int), decode_pixels(s, full)) for s in sources]
    difference = np.abs([a - b for a, b in pairs])
    assert entry.pixel_mean == pytest.approx(difference.mean())
    assert entry.pixel_max == difference.max()


def test_predictions_use_reduced_images(tmp_path, photographs):
    bundle = run(nano(tmp_path, decode="reduced"))
    image = photographs / "cat" / "large.jpg"
    with Predictor.load(bundle) as predictor:
        reduced = predictor(image).logits
        full = predictor(np.asarray(Image.open(image).convert("RGB"))).logits
        assert np.array_equal(predictor.logits(predictor.prepare([image]))[0], reduced)
    assert 0 < np.abs(reduced - full).max() < 0.2 * full.std()


def test_golden_photograph_is_large_enough_whatever_the_gap(tmp_path):
    for decode, gap in (("full", 2.0), ("reduced", 1.0), ("reduced", 5.0)):
        golden = run(nano(tmp_path, decode=decode, reducing_gap=gap)).golden()
        photograph = NamedBytes(golden.sources[-1], "golden")
        assert Image.open(io.BytesIO(golden.sources[-1])).format == "JPEG"
        spec = ExportConfig("cmt_nano", decode="reduced", reducing_gap=gap).preprocess
        assert is_reduced(photograph, spec)


def test_full_decoding_is_the_default_and_measures_nothing(tmp_path):
    bundle = run(nano(tmp_path))
    assert bundle.preprocess.decode == "full"
    assert "decoding" not in json.loads((bundle.path / "manifest.json").read_text())


@pytest.mark.parametrize("head", ["logits", "features"])
def test_feature_maps_are_compared_too(tmp_path, head):
    entry = run(nano(tmp_path, decode="reduced", head=head)).manifest.decoding
    assert entry is not None
    assert entry.output_mean > 0
    assert (entry.agreement is None) is (head == "features")


def test_calibration_on_reduced_images_is_its_own(tmp_path, photographs):
    """The images are the same, their pixels are not."""
    caches = {}
    for decode in ("full", "reduced"):
        config = nano(
            tmp_path, decode=decode, precision="int8", data=str(photographs), calib_size=4, cache=True
        )
        caches[decode] = run(replace(config, output=str(tmp_path / decode))).manifest.calibration
    assert not caches["reduced"].cached
    assert caches["full"].fingerprint == caches["reduced"].fingerprint


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


def test_entry_survives_the_manifest(tmp_path):
    bundle = run(nano(tmp_path, decode="reduced"))
    assert require_open(bundle).manifest.decoding == bundle.manifest.decoding
    assert content(bundle.path)
