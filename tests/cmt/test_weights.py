"""Checkpoints in every container, refusals that leave the model as it was, resizing, and downloads."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmt_edge.cmt import compute_weights_fingerprint, create_model, load_pretrained, load_weights
from cmt_edge.cmt.families.cmt import resize_position_bias
from cmt_edge.cmt.weights import randomize
from cmt_edge.deploy.errors import WeightsError
from helpers.golden import golden
from helpers.shared import shared
from helpers.weights import holds, nano, release, saved, state_of


def refused(path: Path, model=None, **options) -> WeightsError:
    """The error of loading ``path``, which must leave the model as it was."""
    model = nano() if model is None else model
    before = compute_weights_fingerprint(model)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path, **options)
    assert compute_weights_fingerprint(model) == before
    error = caught.value
    assert error.exit_code == 2
    assert error.remedy
    assert path.name in str(error)
    assert "Traceback" not in str(error)
    return error


# --- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["model.pth", "model.pt", "model.safetensors"])
def test_bare_state_dict(tmp_path, name, prefix):
    state, model = state_of(1), nano()
    loaded = load_weights(model, saved(tmp_path, {prefix + k: v for k, v in state.items()}, name))
    assert holds(model, state)
    assert (loaded.source, loaded.ema, loaded.fresh, loaded.resized, loaded.classes) == (
        name,
        False,
        (),
        (),
        None,
    )


def test_legacy_pickle_file(tmp_path):
    state, model = state_of(1), nano()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    load_weights(model, tmp_path / "old.pth")
    assert holds(model, state)


@pytest.mark.parametrize(
    ("has_ema", "asked", "takes_ema"),
    [
        (True, None, True),
        (True, True, True),
        (True, False, False),
        (False, None, False),
        (False, False, False),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_release_checkpoint(tmp_path, has_ema, asked, takes_ema, prefix):
    plain, averaged, model = state_of(1), state_of(2), nano()
    content = release({prefix + k: v for k, v in plain.items()}, averaged if has_ema else None)
    loaded = load_weights(model, saved(tmp_path, content), ema=asked)
    assert loaded.ema is takes_ema
    assert holds(model, averaged if takes_ema else plain)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("release.pth", release(state_of(1), None)),
        ("bare.pth", state_of(1)),
        ("bare.safetensors", state_of(1)),
    ],
    ids=["release", "bare", "safetensors"],
)
def test_averaged_weights_asked_for_but_absent(tmp_path, name, content):
    error = refused(saved(tmp_path, content, name), ema=True)
    assert "model_ema" in str(error)
    assert "ema" in error.remedy


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_cast(tmp_path, dtype):
    state, model = state_of(1), nano()
    stored = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    load_weights(model, saved(tmp_path, stored))
    assert holds(model, {k: v.to(state[k].dtype) for k, v in stored.items()})
    assert next(model.parameters()).dtype == torch.float32


def test_shared_checkpoint_has_class_names(tmp_path):
    model = nano()
    loaded = load_weights(model, shared("weights/cmt_nano_cifar10.pt"))
    assert loaded.classes is not None
    assert loaded.classes[:2] == ("airplane", "automobile")
    assert len(loaded.classes) == 10


def test_embedded_pretrained_is_the_shared_checkpoint_up_to_rounding():
    published, full = nano(), nano()
    loaded = load_pretrained(published)
    load_weights(full, shared("weights/cmt_nano_cifar10.pt"))
    assert loaded.source.endswith(".safetensors")
    for key, value in full.state_dict().items():
        rounded = value.half().to(value.dtype) if value.is_floating_point() else value
        assert torch.equal(published.state_dict()[key], rounded), key


def test_embedded_pretrained_fills_every_key():
    model = nano()
    load_pretrained(model)
    stored = load_file(str(resources.files("cmt_edge.cmt") / "data" / "cmt_nano_cifar10.safetensors"))
    assert holds(model, {k: v.to(model.state_dict()[k].dtype) for k, v in stored.items()})


@pytest.mark.parametrize("rule", ["fanin", "flat"])
def test_published_file_reproduces_the_golden_logits(tmp_path, rule):
    state = {
        f"module.{k}": torch.from_numpy(np.array(v)) for k, v in golden().weights("cmt_ti", rule).items()
    }
    model = create_model("cmt_ti")
    load_weights(model, saved(tmp_path, release(state, None)))
    with torch.inference_mode():
        logits = model(torch.from_numpy(golden().golden_input(160))).numpy()
    np.testing.assert_allclose(logits, golden().logits("cmt_ti", rule), rtol=0, atol=2e-5)


def test_fingerprint_is_of_content_not_of_container(tmp_path):
    models = [nano(s) for s in range(3)]
    load_weights(models[0], saved(tmp_path, state_of(1), "a.safetensors"))
    load_weights(models[1], saved(tmp_path, release(state_of(1), None), "b.pth"))
    load_weights(models[2], saved(tmp_path, state_of(2), "c.pth"))
    first, second, other = map(compute_weights_fingerprint, models)
    assert first == second != other


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gone.pth", "gone.safetensors"])
def test_missing_file(tmp_path, name):
    assert "no such" in refused(tmp_path / name).what


def test_folder_instead_of_a_file(tmp_path):
    refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 0.5, 0.999])
@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_truncated_file(tmp_path, name, keep):
    path = saved(tmp_path, state_of(1), name)
    data = path.read_bytes()
    path.write_bytes(data[: keep if keep in (0, 4) else int(len(data) * keep)])
    assert "cannot be read" in refused(path).what


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html><html>Not Found</html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\n",
        bytes(4096),
    ],
    ids=["web page", "lfs pointer", "zeros"],
)
def test_a_file_of_another_kind_is_unreadable_not_accused_of_running_code(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    error = refused(tmp_path / "model.pth")
    assert "cannot be read" in error.what
    assert "run code" not in str(error)


class Harmful:
    """Unpickling it writes a file."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("save", ["torch.save", "legacy torch.save", "pickle"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, save):
    victim, path = tmp_path / "pwned", tmp_path / "evil.pth"
    content = {"model": state_of(1), "epoch": Harmful(victim)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=save == "torch.save")
    with contextlib.suppress(Exception):  # the file is dangerous indeed
        torch.load(path, weights_only=False)
    victim.rmdir()
    assert "refused" in refused(path).what
    assert not victim.exists()


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        "text",
        {},
        {"model": {}},
        {"model": None},
        {"model": [1]},
        {"a": 1},
        {"stem.0.conv.weight": "x"},
    ],
)
def test_other_contents_are_refused(tmp_path, content):
    assert "state dict" in refused(saved(tmp_path, content)).what


def test_another_variant(tmp_path):
    path = saved(tmp_path, create_model("cmt_ti", img_size=64, seed=0).state_dict())
    error = refused(path)
    assert "does not fit cmt_nano" in error.what
    assert "unexpected" in error.why
    assert "wrong shape" in error.why
    assert "another variant" in error.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", ["head.fc.weight", "stem.0.norm.running_var"])
def test_values_that_are_not_finite(tmp_path, key, value):
    state = state_of(1)
    state[key].view(-1)[3] = value
    error = refused(saved(tmp_path, state))
    assert f"1 not finite: {key}" in error.why
    assert "diverged" in error.remedy


def test_every_kind_of_misfit_is_named_in_one_error(tmp_path):
    state = state_of(1)
    del state["head.conv.bias"], state["stages.3.norm.bias"]
    state["extra.weight"] = torch.zeros(2)
    state["stem.0.conv.weight"] = torch.zeros(16, 3, 5, 5)
    state["stem.1.conv.bias"] = torch.zeros(16, dtype=torch.int32)
    state["stem.2.conv.bias"][0] = float("nan")
    why = refused(saved(tmp_path, state)).why
    for text in (
        "2 missing: ",
        "head.conv.bias",
        "stages.3.norm.bias",
        "1 unexpected: extra.weight",
        "1 wrong shape: stem.0.conv.weight (16, 3, 5, 5), the model has (16, 3, 3, 3)",
        "1 wrong type: stem.1.conv.bias",
        "1 not finite: stem.2.conv.bias",
    ):
        assert text in why


def test_long_lists_are_cut_with_a_count(tmp_path):
    state = {k: v for k, v in state_of(1).items() if not k.startswith("stages.2")}
    why = refused(saved(tmp_path, state)).why
    total = len(state_of(1)) - len(state)
    assert f"{total} missing" in why
    assert re.search(rf"and {total - why.count('stages.2')} more", why)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_another_kind_of_number_than_float(tmp_path, dtype):
    state = state_of(1)
    state["head.fc.bias"] = torch.zeros(10, dtype=dtype)
    assert "1 wrong type: head.fc.bias" in refused(saved(tmp_path, state)).why


def test_another_class_count_names_the_flag(tmp_path):
    error = refused(saved(tmp_path, state_of(1, num_classes=37)))
    assert "--num-classes 37" in error.remedy
    assert "--fresh-head" in error.remedy
    assert "head.fc.weight (37, 512)" in error.why


def test_fresh_head_keeps_all_else(tmp_path):
    state, model = state_of(1, num_classes=37), nano(3)
    initial = {k: model.state_dict()[k].clone() for k in model.spec.head_keys}
    content = {"model": state, "classes": [str(i) for i in range(37)]}
    loaded = load_weights(model, saved(tmp_path, content), fresh_head=True)
    assert set(loaded.fresh) == {"head.fc.weight", "head.fc.bias"} == set(initial)
    assert loaded.classes is None  # the names belonged to the old head
    after = model.state_dict()
    assert all(torch.equal(after[k], initial[k]) for k in initial)
    assert all(torch.equal(after[k], state[k]) for k in state if k not in initial)


def test_fresh_head_is_not_taken_where_the_classifier_fits(tmp_path):
    state, model = state_of(1), nano(3)
    assert load_weights(model, saved(tmp_path, state), fresh_head=True).fresh == ()
    assert holds(model, state)


def test_nothing_published_or_unknown_leaves_a_remedy():
    model = nano()
    model.spec = replace(model.spec, pretrained=None)
    with pytest.raises(WeightsError, match="no weights are published") as error:
        load_pretrained(model)
    assert "--weights PATH" in error.value.remedy


# --- another resolution ---------------------------------------------------------------------------


def test_another_resolution_names_the_flags(tmp_path):
    error = refused(saved(tmp_path, state_of(1)), nano(img_size=96))
    assert "--imgsz" in error.remedy
    assert "--resize-position-bias" in error.remedy


@pytest.mark.parametrize("size", [32, 96, 128])
def test_resize_runs_and_keeps_all_else(tmp_path, size):
    state, model = state_of(1), nano(img_size=size)
    loaded = load_weights(model, saved(tmp_path, state), resize=True)
    assert loaded.resized
    assert all(k.endswith("position_bias") for k in loaded.resized)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k not in loaded.resized)
    with torch.inference_mode():
        assert model(torch.randn(2, 3, size, size)).isfinite().all()


def test_resize_of_pretrained_weights_keeps_most_decisions():
    """At 96 pixels the interpolated model still sees what the trained one saw at 64."""
    small, large = nano(), nano(img_size=96)
    load_pretrained(small)
    load_pretrained(large, resize=True)
    x = torch.nn.functional.interpolate(
        torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), 64, mode="bicubic"
    )
    with torch.inference_mode():
        a, b = small(x), large(torch.nn.functional.interpolate(x, 96, mode="bicubic"))
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1] > 0.7


def test_resize_to_the_same_size_changes_nothing(tmp_path):
    state, model = state_of(1), nano()
    assert load_weights(model, saved(tmp_path, state), resize=True).resized == ()
    assert holds(model, state)
    bias = torch.randn(2, 16, 4)
    assert resize_position_bias(bias, 16, 4) is bias


def test_resize_does_not_hide_another_misfit(tmp_path):
    state = state_of(1)
    state["stages.0.position_bias"] = torch.zeros(2, 256, 4)  # another number of heads
    assert (
        "stages.0.position_bias (2, 256, 4)"
        in refused(saved(tmp_path, state), nano(img_size=96), resize=True).why
    )


@pytest.mark.parametrize(("old", "new"), [(4, 6), (8, 5), (2, 7)])
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_resize_keeps_a_ramp_over_the_queries_monotonic(old, new, axis):
    ramp = torch.arange(float(old))
    table = (ramp[:, None] if axis == "rows" else ramp[None, :]).expand(old, old)
    bias = table.reshape(1, old * old, 1).repeat(3, 1, 4)
    grid = resize_position_bias(bias, new * new, 4).reshape(3, new, new, 4)
    along, across = (1, 2) if axis == "rows" else (2, 1)
    assert (grid.diff(dim=along) > 0).all()
    assert torch.allclose(grid.diff(dim=across), torch.tensor(0.0), atol=1e-5)


@pytest.mark.parametrize(("queries", "keys"), [((4, 6), (2, 2)), ((4, 4), (2, 3)), ((6, 4), (3, 2))])
def test_resize_is_bicubic_on_both_grids(queries, keys):
    (q, new_q), (k, new_k), heads = queries, keys, 3
    bias = torch.randn(heads, q * q, k * k, generator=torch.Generator().manual_seed(0))

    def bicubic(grid, size):
        return torch.nn.functional.interpolate(
            grid[None, None], (size, size), mode="bicubic", align_corners=False
        )[0, 0]

    expected = torch.empty(heads, new_q**2, k * k)
    for h in range(heads):
        for j in range(k * k):
            expected[h, :, j] = (
                bicubic(bias[h, :, j].reshape(q, q), new_q).flatten() if q != new_q else bias[h, :, j]
            )
    final = torch.empty(heads, new_q**2, new_k**2)
    for h in range(heads):
        for i in range(new_q**2):
            final[h, i] = (
                bicubic(expected[h, i].reshape(k, k), new_k).flatten() if k != new_k else expected[h, i]
            )
    assert torch.allclose(resize_position_bias(bias, new_q**2, new_k**2), final, atol=1e-6)


# --- random weights -------------------------------------------------------------------------------


def test_randomize_is_reproducible_and_fills_statistics():
    a, b, c = nano(0), nano(1), nano(0)
    randomize(a, 5)
    randomize(b, 5)
    randomize(c, 6)
    assert compute_weights_fingerprint(a) == compute_weights_fingerprint(b) != compute_weights_fingerprint(c)
    state = a.state_dict()
    assert (state["stem.0.norm.running_var"] >= 1).all()
    assert state["stem.0.norm.running_mean"].abs().min() > 0
    assert (state["head.fc.bias"] != 0).all()
