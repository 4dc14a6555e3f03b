"""Calibration images made from the model: what they match, their cache, and what cannot be made."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.calib import CalibrationSet, synthetic
from cmt_edge.calib.synthetic import make_synthetic_set, require_statistics, synthesise
from cmt_edge.cmt import compute_weights_fingerprint, create_model
from cmt_edge.cmt.reference import load_reference
from cmt_edge.deploy import Bundle
from cmt_edge.deploy.cache import CacheWarning
from cmt_edge.deploy.errors import DataError, InputError, StepError
from cmt_edge.deploy.preprocessing import Preprocess, decode_pixels
from cmt_edge.export import ExportConfig
from cmt_edge.export.steps import GOLDEN_IMAGES, count_synthetic
from helpers.cli import failed, succeeded

SIZE = 32
SPEC = Preprocess(SIZE, None, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
CROPPED = Preprocess(SIZE, 37, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3))
pytestmark = pytest.mark.usefixtures("one_thread")


class Small(nn.Module):
    """Two convs with norms that have seen a batch of smooth blue-ish images, one of them through a view of
    its map."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3, 2), norm(8), nn.GELU(), nn.Conv2d(8, 16, 3), norm(16))
        self.head = nn.Linear(16 * 13 * 13, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.net(x)
        return self.head(x.view(-1, x[0].numel()))  # fails channel-last


def seen(model: nn.Module) -> nn.Module:
    """``model`` with the statistics of some batches."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(60):
            x = torch.rand(16, 3, 4, 4, generator=generator) * torch.tensor([0.3, 0.5, 1.0]).reshape(
                1, 3, 1, 1
            )
            model.train()(nn.functional.interpolate(x * 2 - 0.5, SIZE, mode="bilinear"))
    return model.eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return seen(Small())


@pytest.fixture(scope="module")
def nano() -> nn.Module:
    return load_reference("cmt_nano", "pretrained")[0]


def the_set(model: nn.Module, cache=None, count: int = 4, **settings) -> CalibrationSet:
    return make_synthetic_set(
        model, count, SPEC, weights=compute_weights_fingerprint(model), cache=cache, **{"steps": 3} | settings
    )


# --- what they match ------------------------------------------------------------------------------


def test_statistics_come_much_closer(small):
    images, how = synthesise(small, 12, SPEC, steps=40)
    assert images.shape == (12, SIZE, SIZE, 3)
    assert images.dtype == np.uint8
    assert how.loss_after < 0.3 * how.loss_before
    assert (how.seed, how.steps, how.steps_asked, how.stopped_early) == (0, 40, 40, False)


def test_statistics_of_a_hybrid_come_closer(nano):
    spec = Preprocess(64, None, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    _, how = synthesise(nano, 8, spec, steps=8)
    assert how.loss_after < 0.6 * how.loss_before


def test_the_loss_is_what_the_docstring_says(small):
    images, how = synthesise(small, 6, SPEC, steps=2)
    x = (
        torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - torch.tensor(SPEC.mean).reshape(3, 1, 1)
    ) / torch.tensor(SPEC.std).reshape(3, 1, 1)
    terms = []
    with torch.no_grad():
        for layer in small.net:
            if isinstance(layer, nn.BatchNorm2d):
                deviation = (layer.running_var + layer.eps).sqrt()
                shift = (x.mean((0, 2, 3)) - layer.running_mean) / deviation
                spread = (x.var((0, 2, 3), correction=0) + layer.eps).sqrt() / deviation
                terms.append((shift**2 + (spread - 1) ** 2).mean().item())
            x = layer(x)
    assert how.loss_after == pytest.approx(np.mean(terms), rel=1e-4)


def test_equal_seeds_give_equal_images(small):
    first, again, other = (synthesise(small, 3, SPEC, seed, steps=3)[0] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(("count", "batches"), [(1, [1]), (50, [50]), (51, [26, 25]), (101, [34, 34, 33])])
def test_batches_are_even(count, batches):
    assert synthetic.split_into_batches(count, 50) == batches


@pytest.mark.parametrize("spec", [SPEC, CROPPED], ids=["whole", "cropped"])
def test_preprocessing_gives_exactly_the_images_that_were_made(small, spec):
    images, how = synthesise(small, 3, spec, steps=2)
    made = synthetic.convert_to_set(synthetic.Made(images, how, cached=False), spec)
    assert np.array_equal(np.stack([decode_pixels(blob, spec) for blob in made.blobs]), images)
    assert [b.shape for b in made.batches(spec)] == [(1, 3, SIZE, SIZE)] * 3


def test_the_model_is_left_alone(small):
    before, flags = compute_weights_fingerprint(small), [p.requires_grad for p in small.parameters()]
    synthesise(small, 2, SPEC, steps=2)
    assert compute_weights_fingerprint(small) == before
    assert [p.requires_grad for p in small.parameters()] == flags
    assert all(p.grad is None for p in small.parameters())
    hooks = [m._forward_pre_hooks for m in small.modules()]  # noqa: SLF001  # torch has no public list
    assert not any(hooks)


def test_progress_counts_every_step(small):
    seen_steps = []
    synthesise(small, 60, SPEC, steps=2, progress=lambda done, total: seen_steps.append((done, total)))
    assert seen_steps == [(1, 4), (2, 4), (3, 4), (4, 4)]


# --- what cannot be made --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: Small(lambda n: nn.GroupNorm(1, n)), "no batch norm"),
        (Small, "mean 0, variance 1"),
        (lambda: Small(lambda n: nn.BatchNorm2d(n, track_running_stats=False)), "no statistics"),
        (lambda: create_model("convit_tiny"), "no batch norm"),
    ],
    ids=["group norm", "fresh", "untracked", "convit_tiny"],
)
def test_a_model_without_statistics_is_refused(model, why, tmp_path):
    for call in (lambda: synthesise(model(), 2, SPEC), lambda: the_set(model(), tmp_path / "cache")):
        with pytest.raises(InputError) as error:
            call()
        assert why in error.value.why
        assert "--data generated" in error.value.remedy
    assert not (tmp_path / "cache").exists()


def test_untouched_norms_beside_trained_ones_are_left_out(small):
    mixed = nn.Sequential(nn.BatchNorm2d(3), small)
    assert require_statistics(mixed) == require_statistics(small)


def test_statistics_that_are_not_finite(tmp_path):
    broken = seen(Small())
    broken.net[1].running_mean.fill_(float("nan"))
    with pytest.raises(StepError, match="not finite"):
        the_set(broken, tmp_path)
    assert not [*tmp_path.glob("*.npz")]


def test_choose_names_the_function(small):
    with pytest.raises(DataError, match="made from a model"):
        CalibrationSet.choose("synthetic", 3, SPEC)


# --- bounded time ---------------------------------------------------------------------------------


def test_it_stops_when_the_time_is_up(small, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(synthetic.time, "monotonic", lambda: next(clock))  # a second a reading
    images, how = synthesise(small, 60, SPEC, steps=50, time_limit_s=20)
    assert how.stopped_early
    assert 5 <= how.steps <= 10  # a fair share for each of the two batches
    assert next(clock) <= 25
    assert how.loss_after < how.loss_before
    assert len(images) == 60


def test_no_time_at_all_is_said(small):
    images, how = synthesise(small, 2, SPEC, time_limit_s=0)
    assert (how.steps, how.stopped_early, len(images)) == (0, True, 2)
    assert how.loss_after == how.loss_before


# --- cache ----------------------------------------------------------------------------------------


def test_a_cached_set_is_the_same_without_work(small, tmp_path, monkeypatch):
    first = the_set(small, tmp_path)
    monkeypatch.setattr(synthetic, "synthesise", None)
    again = the_set(small, tmp_path)
    assert again.fingerprint == first.fingerprint
    assert again.blobs == first.blobs
    assert again.synthesis == replace(first.synthesis, cached=True)
    assert first.synthesis.cached is False


@pytest.mark.parametrize(
    "change",
    [{"count": 5}, {"steps": 4}, {"seed": 1}, {"weights": "others"}, {"time_limit_s": 99.0}],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_are_other_entries(small, tmp_path, change):
    the_set(small, tmp_path)
    settings = {"count": 4, "steps": 3, "weights": compute_weights_fingerprint(small)} | change
    other = make_synthetic_set(small, settings.pop("count"), SPEC, cache=tmp_path, **settings)
    assert other.synthesis.cached is False
    assert len([*tmp_path.glob("*.npz")]) == 2


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "shape", "garbage"])
def test_a_damaged_entry_is_made_again(small, tmp_path, damage):
    first = the_set(small, tmp_path)
    [entry] = tmp_path.glob("*.npz")
    content = entry.read_bytes()
    if damage == "shape":
        np.savez(entry, images=np.zeros((4, 8, 8, 3), np.uint8), synthesis="{}")
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        entry.write_bytes(
            {"truncated": content[:middle], "flipped": flipped, "empty": b"", "garbage": b"PK"}[damage]
        )
    again = the_set(small, tmp_path)
    assert again.synthesis.cached is False
    assert again.blobs == first.blobs
    assert the_set(small, tmp_path).synthesis.cached is True


def test_the_cache_is_bounded(small, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "CACHED_SETS", 2)
    for seed in range(4):
        the_set(small, tmp_path, count=1, seed=seed, steps=1)
    assert len([*tmp_path.glob("*.npz")]) == 2
    assert the_set(small, tmp_path, count=1, seed=3, steps=1).synthesis.cached is True
    assert not [*tmp_path.glob("*.tmp")]


def test_no_cache_leaves_nothing(small, tmp_path):
    assert the_set(small).synthesis.cached is False
    assert not [*tmp_path.iterdir()]


def test_a_cache_that_cannot_be_written_costs_only_the_keeping(small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(CacheWarning, match="cannot be used"):
        made = the_set(small, tmp_path / "file" / "below")
    assert made.synthesis.cached is False


# --- the command ----------------------------------------------------------------------------------

ARGV = ("--model", "cmt_nano", "--int8", "--data", "synthetic", "--calib-size", 4)


@pytest.mark.slow
@pytest.mark.usefixtures("one_trace")
def test_an_export_with_few_steps_verifies(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        synthetic.make_synthetic_set,
        "__kwdefaults__",
        synthetic.make_synthetic_set.__kwdefaults__ | {"steps": 2},
    )
    entries = [
        json.loads(succeeded(capsys, *ARGV, "-o", tmp_path / name, "--json"))["calibration"]
        for name in ("a", "b")
    ]
    assert entries[0]["source"] == "synthetic"
    assert entries[0]["images"] == 4
    made = entries[0]["synthesis"]
    assert (made["seed"], made["steps"], made["stopped_early"], made["cached"]) == (0, 2, False, False)
    assert 0 < made["loss_after"] < made["loss_before"]
    assert entries[1]["synthesis"] == made | {"cached": True}
    assert (entries[1]["fingerprint"], entries[1]["cached"]) == (entries[0]["fingerprint"], True)
    assert Bundle.open(tmp_path / "a" / "cmt_nano_int8_openvino").manifest.verification.golden.passed


@pytest.mark.slow
@pytest.mark.usefixtures("one_trace")
def test_ranges_of_fp16_are_observed_on_them(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(
        synthetic.make_synthetic_set,
        "__kwdefaults__",
        synthetic.make_synthetic_set.__kwdefaults__ | {"steps": 1},
    )
    succeeded(
        capsys,
        "--model",
        "cmt_nano",
        "--half",
        "--format",
        "trt",
        "--no-build",
        "--data",
        "synthetic",
        "--calib-size",
        3,
        "-o",
        tmp_path,
        "--no-cache",
    )
    observed = Bundle.open(tmp_path / "cmt_nano_fp16_trt").manifest.typing.observed
    assert (observed.source, observed.images, observed.synthesis.steps) == ("synthetic", 3 + GOLDEN_IMAGES, 1)


def test_the_plan_names_them_without_making_them(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "synthesise", None)
    plan = json.loads(succeeded(capsys, *ARGV, "-o", tmp_path, "--dry-run", "--json"))
    assert plan["calibration"] == {"source": "synthetic", "images": 4}
    assert "make 4 synthetic images" in plan["steps"]
    assert "calibrate on 4 images" in plan["steps"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("model", "settings", "count"),
    [
        ("cmt_nano", {}, 64),
        ("cmt_xs", {}, 32),
        ("cmt_xs", {"calib_size": 5}, 5),
        ("cmt_xs", {"precision": "fp16", "format": "trt", "calib_size": 99}, 32),
    ],
)
def test_how_many_are_made(model, settings, count):
    assert (
        count_synthetic(ExportConfig(model, **{"precision": "int8", "data": "synthetic"} | settings)) == count
    )


def test_random_weights_have_nothing_to_match(capsys, tmp_path):
    message = failed(capsys, *ARGV, "--weights", "random", "-o", tmp_path)
    assert "need trained weights" in message
    assert "--data generated" in message


def test_help_names_them(capsys):
    with pytest.raises(SystemExit):
        succeeded(capsys, "--help")
    assert "'synthetic'" in capsys.readouterr().out
