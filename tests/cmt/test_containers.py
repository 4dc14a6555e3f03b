"""Checkpoints as training programs write them: one set of weights in many containers, and what is refused."""

from __future__ import annotations

import argparse
import collections
import datetime
import decimal
import random
import types
import uuid
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.cmt import compute_weights_fingerprint, load_weights
from cmt_edge.deploy.errors import WeightsError
from helpers.weights import GOOD, OTHER, holds, nano, result_of, saved, state_of


def behind(prefix: str, state=GOOD) -> dict:
    return {prefix + key: value for key, value in state.items()}


def inside(part: str) -> dict:
    """The wrapper's part inside every name of a block."""
    return {key.replace("stages.0.", f"stages.0.{part}."): value for key, value in GOOD.items()}


def profiled() -> dict:
    state = dict(GOOD)
    for key in GOOD:
        if key.endswith(".weight"):
            state[key.removesuffix("weight") + "total_ops"] = torch.zeros(1, dtype=torch.float64)
            state[key.removesuffix("weight") + "total_params"] = torch.zeros(1, dtype=torch.float64)
    return state | {"total_ops": torch.zeros(1), "total_params": torch.zeros(1)}


def logged() -> collections.defaultdict:
    log = collections.defaultdict(list)
    log["top1"].append(1.0)
    return log


PLAIN = {
    "bare": GOOD,
    "module.": behind("module."),
    "_orig_mod.": behind("_orig_mod."),
    "module._orig_mod.": behind("module._orig_mod."),
    "_orig_mod.module.": behind("_orig_mod.module."),
    "model.": behind("model."),
    "net.": behind("net."),
    "model.backbone.module._orig_mod.": behind("model.backbone.module._orig_mod."),
    "an attribute of any name": behind("classifier_net."),
    "a compiled block": inside("_orig_mod"),
    "a checkpointed block": inside("_checkpoint_wrapped_module"),
    "an FSDP block": inside("_fsdp_wrapped_module"),
    "state_dict": {"state_dict": GOOD, "epoch": 1},
    "CvT's trainer": {"model": "cls_cvt", "state_dict": GOOD, "epoch": 1, "perf": 0.9, "optimizer": {}},
    "best_acc1": {"epoch": 1, "state_dict": behind("module."), "best_acc1": torch.tensor(80.0)},
    "Lightning": {"state_dict": behind("model."), "hyper_parameters": {"lr": 1e-3}, "callbacks": {}},
    "a criterion's weight": {"state_dict": behind("model.") | {"criterion.weight": torch.ones(10)}},
    "a loss and metrics": {
        "state_dict": behind("net.") | {"loss_fn.pos": torch.ones(1), "val_metrics.top1.total": torch.ones(1)}
    },
    "a teacher of another kind": {"state_dict": behind("model.") | {"teacher.fc.weight": torch.ones(3, 3)}},
    "a teacher of the same kind": {"state_dict": behind("model.") | behind("teacher.", OTHER)},
    "mmengine": {"meta": {"epoch": 1}, "state_dict": behind("backbone."), "message_hub": {}},
    "pytorch-cifar": {"net": GOOD, "acc": 80.1, "epoch": 1},
    "model_state_dict": {"epoch": 1, "model_state_dict": GOOD, "optimizer_state_dict": {}, "loss": 0.5},
    "model_state": {"model_state": GOOD},
    "network": {"network": GOOD, "step": 5},
    "weights": {"weights": GOOD},
    "params": {"params": GOOD},
    "a key of any name": {"my_run_7": GOOD, "epoch": 3},
    "two levels": {"checkpoint": {"model": {"state_dict": behind("module.")}}},
    "the same twice": {"model": GOOD, "state_dict": dict(GOOD)},
    "an average that is none": {"model": GOOD, "ema": {"decay": 0.999, "updates": 10}},
    "an average that was not made": {"model": GOOD, "model_ema": None},
    "moments of an optimizer": {"model": GOOD, "optimizer": {"exp_avg": OTHER}},
    "moments of Adam": {"model": GOOD, "opt": {"exp_avg": OTHER, "exp_avg_sq": OTHER}},
    "moments in a state": {"model": GOOD, "opt_state": {"exp_avg": OTHER}},
    "moments by the name of Adam": {"model": GOOD, "adam": {"exp_avg": OTHER}},
    "moments in a file of a program": {"model": GOOD, "my_run": {"exp_avg": OTHER}},
    "moments at the top": {"model": GOOD, "exp_avg": OTHER},
    "averaged activations": {"model": GOOD, "avg_activations": OTHER},
    "an averaged Fisher matrix": {"model": GOOD, "ema_fisher": OTHER},
    "a list of moments": {"model": GOOD, "state": {"exp_avg": [torch.ones(3, 3)]}},
    "metrics and a criterion of any name": {
        "state_dict": behind("model.")
        | {"ce.weight": torch.ones(10), "class_weights": torch.ones(10), "f1.tp": torch.zeros(10)}
        | {"mixup.lam": torch.zeros(1), "mean": torch.ones(1, 3, 1, 1), "std": torch.ones(3)}
    },
    "counters of one element": {k: v.reshape(1) if "num_batches" in k else v for k, v in GOOD.items()},
    "NumPy times": {"model": GOOD, "when": np.datetime64("2024-01-01"), "took": np.timedelta64(3, "s")},
    "NumPy records": {"model": GOOD, "log": np.zeros(2, dtype=[("a", "f4"), ("when", "M8[s]")])},
    "a net of older weights": {"net": GOOD, "net_old": OTHER},
    "thop": profiled(),
    "NumPy scalars": {"model": GOOD, "acc": np.float64(84.2), "loss": np.float32(1), "n": np.int64(3)},
    "NumPy text and truth": {"model": GOOD, "name": np.str_("run"), "done": np.bool_(True)},
    "NumPy arrays": {"model": GOOD, "hist": np.arange(3.0), "ids": np.arange(6).reshape(2, 3).T},
    "NumPy objects": {"model": GOOD, "names": np.array(["a", None], dtype=object)},
    "big-endian": {"model": GOOD, "hist": np.arange(3, dtype=">f4")},
    "defaultdict": {"model": GOOD, "log": logged()},
    "paths": {"model": GOOD, "args": argparse.Namespace(out=Path("x"), data=PureWindowsPath("c:/d"))},
    "a pure path": {"model": GOOD, "out": PurePosixPath("/a/b")},
    "SimpleNamespace": {"model": GOOD, "args": types.SimpleNamespace(a=1)},
    "random states": {
        "model": GOOD,
        "rng": torch.get_rng_state(),
        "np_rng": np.random.get_state(),
        "generator": np.random.default_rng(0).bit_generator.state,
        "py_rng": random.getstate(),
    },
    "times": {
        "model": GOOD,
        "made": datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc),
        "day": datetime.date(2026, 1, 2),
        "took": datetime.timedelta(hours=3),
    },
    "other values": {
        "model": GOOD,
        "last": collections.deque([1.0, 2.0], maxlen=5),
        "count": collections.Counter("aab"),
        "frozen": frozenset({1, 2}),
        "steps": range(3),
        "run": uuid.UUID(int=7),
        "price": decimal.Decimal("1.5"),
    },
    "DeepSpeed": {"module": GOOD, "ds_config": {}, "global_steps": 3},
    "Composer": {
        "state": {"model": behind("module."), "optimizers": {}},
        "rng": [{"python": (3, (1,), None)}],
    },
    "Detectron2": {"model": {k: v.numpy() for k, v in GOOD.items()}, "matching_heuristics": True},
    "parameters": {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in GOOD.items()},
    "no counters": {k: v for k, v in GOOD.items() if "num_batches" not in k},
    "counters as floats": {k: v.float() if "num_batches" in k else v for k, v in GOOD.items()},
    "float64": {k: v.double() if v.is_floating_point() else v for k, v in GOOD.items()},
    "arrays": {k: v.numpy() for k, v in GOOD.items()},
    "arrays in state_dict": {"state_dict": {k: v.numpy() for k, v in GOOD.items()}},
    "a list": [GOOD, 3],
    "a tuple": (GOOD, {"state": {}}),
    "an epoch among the names": GOOD | {"epoch": 3},
}
"""Containers of the weights as they are."""

AVERAGED = {
    "timm": {"arch": "cmt_nano", "state_dict": OTHER, "state_dict_ema": GOOD, "metric": np.float64(84.1)},
    "BasicSR": {"params": OTHER, "params_ema": GOOD},
    "ema": {"model": OTHER, "ema": GOOD},
    "torchvision": {"model": OTHER, "model_ema": behind("module.") | {"n_averaged": torch.tensor(5)}},
    "AveragedModel": behind("module.") | {"n_averaged": torch.tensor(5)},
    "ema_state_dict": {"state_dict": OTHER, "ema_state_dict": GOOD},
    "ema of an object": {"model": OTHER, "ema": {"module": GOOD, "decay": 0.99}},
    "swa": {"state_dict": OTHER, "swa_model": GOOD},
    "a callback's": {"state_dict": behind("model.", OTHER), "callbacks": {"EMA": {"ema_weights": GOOD}}},
    "a prefix": {"state_dict": behind("model.", OTHER) | behind("model_ema.module.")},
    "a moving average": {"model": OTHER, "moving_average_weights": GOOD},
    "an average of a decay": {"model": OTHER, "ema_0.9999": GOOD},
    "ema-pytorch": behind("online_model.", OTHER)
    | behind("ema_model.")
    | {"initted": torch.tensor(True), "step": torch.tensor(4)},
}
"""Containers whose averaged weights are those wanted."""


@pytest.mark.parametrize("name", PLAIN)
def test_weights_are_found(tmp_path, name):
    assert not result_of(tmp_path, PLAIN[name]).ema


def test_moments_alone_are_no_weights(tmp_path):
    with pytest.raises(WeightsError, match="no state dict"):
        result_of(tmp_path, {"exp_avg": GOOD, "exp_avg_sq": GOOD})


@pytest.mark.parametrize("name", AVERAGED)
def test_averaged_weights_are_found(tmp_path, name):
    assert result_of(tmp_path, AVERAGED[name]).ema
    assert result_of(tmp_path, AVERAGED[name], ema=True).ema


@pytest.mark.parametrize("name", [name for name in AVERAGED if name != "AveragedModel"])
def test_the_other_weights_can_be_asked_for(tmp_path, name):
    model = nano()
    assert not load_weights(model, saved(tmp_path, AVERAGED[name]), ema=False).ema
    assert holds(model, OTHER)


def test_only_averaged_weights_though_others_are_asked_for(tmp_path):
    with pytest.raises(WeightsError, match="only averaged weights") as error:
        load_weights(nano(), saved(tmp_path, AVERAGED["AveragedModel"]), ema=False)
    assert "--no-ema" in error.value.remedy


def test_an_average_without_statistics_is_refused_and_the_flag_named(tmp_path):
    """Some averages hold parameters only; the statistics of the batch norms are not theirs."""
    average = {key: value for key, value in OTHER.items() if "running" not in key}
    content = {"model": GOOD, "ema": average}
    with pytest.raises(WeightsError, match=r"averaged weights \(ema\) lack") as error:
        load_weights(nano(), saved(tmp_path, content))
    assert "--no-ema takes the others (model)" in error.value.remedy
    assert not result_of(tmp_path, content, ema=False).ema


DIFFERENT = {
    "two usual keys": {"model": GOOD, "net": OTHER},
    "teacher and student": {"teacher": GOOD, "student": OTHER},
    "two prefixes": behind("first.") | behind("second.", OTHER),
    "a list of two": [GOOD, OTHER],
    "the last and the best model": {"model": OTHER, "best_model": GOOD},
    "the best state dict": {"state_dict": OTHER, "best_state_dict": GOOD},
    "the best model's state": {"model": OTHER, "best_model_state": GOOD, "best_acc": 0.9},
    "last and best": {"last": OTHER, "best": GOOD},
    "two averages": {"ema": GOOD, "swa": OTHER},
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_two_sets_of_weights_are_not_guessed_between(tmp_path, name):
    model, path = nano(), saved(tmp_path, DIFFERENT[name])
    before = compute_weights_fingerprint(model)
    with pytest.raises(WeightsError, match="different weights"):
        load_weights(model, path)
    assert compute_weights_fingerprint(model) == before


STRANGE = {
    "a layer beside": behind("model.") | {"projection.weight": torch.ones(4, 10)},
    "a value behind": GOOD | {"temperature": torch.ones(1)},
    "a layer behind": GOOD | {"calibration.weight": torch.ones(3)},
    "a second head": {"state_dict": behind("backbone.") | {"head.fc.weight": torch.ones(10, 10)}},
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_layer_that_the_model_lacks_is_not_dropped(tmp_path, name):
    with pytest.raises(WeightsError, match="unexpected"):
        load_weights(nano(), saved(tmp_path, STRANGE[name]))


def test_what_is_left_out_beside_the_model_is_named(tmp_path):
    content = {"state_dict": behind("net.") | {"normalize.mean": torch.ones(3), "val_loss": torch.ones(1)}}
    assert result_of(tmp_path, content).left_out == ("normalize.mean",)
    assert result_of(tmp_path, GOOD).left_out == ()


@pytest.mark.parametrize("key", ["ema", "model_ema", "shadow"])
def test_averaged_weights_without_names_are_not_passed_over(tmp_path, key):
    """As torch_ema and diffusers keep them; the others would be taken silently."""
    average = {
        "decay": 0.9,
        "num_updates": 3,
        "shadow_params": list(OTHER.values()),
        "collected_params": None,
    }
    path = saved(tmp_path, {"model": GOOD, key: average})
    with pytest.raises(WeightsError, match="in a list without names") as error:
        load_weights(nano(), path)
    assert f"({key}.shadow_params)" in error.value.what
    assert "--no-ema takes the others (model)" in error.value.remedy
    model = nano()
    load_weights(model, path, ema=False)
    assert holds(model, GOOD)


def test_lists_that_are_no_average_are_no_matter(tmp_path):
    content = {"model": GOOD, "log": [torch.ones(3, 3)], "ema": {"losses": [torch.ones(())] * 9}}
    result_of(tmp_path, content)


def test_averaged_weights_answer_which_of_two_sets_is_meant(tmp_path):
    content = {"model": OTHER, "best_model": state_of(3), "model_ema": GOOD}
    assert result_of(tmp_path, content).ema


def test_a_message_names_what_the_file_holds_and_the_nearest_match(tmp_path):
    half = {key: value for key, value in GOOD.items() if not key.startswith("stages.3")}
    content = {"epoch": 1, "my_net": behind("module.", half), "log": {"a": torch.ones(2)}}
    with pytest.raises(WeightsError) as error:
        load_weights(nano(), saved(tmp_path, content))
    assert "the file holds: epoch, my_net, log" in error.value.why
    had, all_ = (sum("num_batches" not in key for key in state) for state in (half, GOOD))
    assert f"my_net.module has {had} of the model's {all_} names" in error.value.why
