"""Checkpoints as training programs write them: one set of weights in many containers, and what is refused."""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import decimal
import functools
import gzip
import os
import pickle
import random
import tarfile
import types
import uuid
import zipfile
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.cmt import compute_weights_fingerprint, create_model, load_weights
from cmt_edge.deploy.errors import WeightsError
from helpers.weights import GOOD, holds, nano, result_of, saved, state_of

OTHER = state_of(2)
"""Weights that a container holds beside those."""


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


class Enclosing(nn.Module):
    """A trainer's module around a model."""

    def __init__(self, **parts) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def trained() -> nn.Module:
    model = nano()
    model.load_state_dict(GOOD)
    return model


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
    "ema-pytorch": behind("online_model.", OTHER)
    | behind("ema_model.")
    | {"initted": torch.tensor(True), "step": torch.tensor(4)},
}
"""Containers whose averaged weights are those wanted."""


@pytest.mark.parametrize("name", PLAIN)
def test_weights_are_found(tmp_path, name):
    assert not result_of(tmp_path, PLAIN[name]).ema


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


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.SAFETENSORS", "m.bin", "m.pth", "m.ckpt", "m"])
def test_safetensors_of_any_name(tmp_path, name):
    saved(tmp_path, GOOD, "m.safetensors").rename(tmp_path / name)
    model = nano()
    load_weights(model, tmp_path / name)
    assert holds(model, GOOD)


@pytest.mark.parametrize("name", ["m.safetensors", "m.PTH", "m.pth.tar", "m.ckpt", "m.bin", "m"])
@pytest.mark.parametrize("zipped", [True, False])
def test_pytorch_files_of_any_name(tmp_path, name, zipped):
    torch.save({"state_dict": GOOD}, tmp_path / name, _use_new_zipfile_serialization=zipped)
    model = nano()
    load_weights(model, tmp_path / name)
    assert holds(model, GOOD)


def make_foreign(path: Path, kind: str) -> None:
    texts = {
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12345\n",
        "saved web page": b"\n <!DOCTYPE html><html><body>Virus scan warning</body></html>",
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "JSON": b'{"weight_map": {}}',
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64),
        "GGUF": b"GGUF" + bytes(64),
        "empty": b"",
    }
    if kind in texts:
        path.write_bytes(texts[kind])
    elif kind == "TorchScript":
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(path))
    elif kind == "torch.export":
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, a=np.zeros(3))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(b"weights"))
    elif kind == "tar archive":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "a.py")
    elif kind == "ZIP archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "x")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "kind",
    [
        "Git LFS pointer",
        "saved web page",
        "XML",
        "JSON",
        "HDF5",
        "GGUF",
        "empty",
        "TorchScript",
        "torch.export",
        "npz",
        "gzip",
        "tar archive",
        "ZIP archive",
    ],
)
def test_other_files_are_named_as_what_they_are(tmp_path, kind, suffix):
    path = tmp_path / f"model{suffix}"
    with (
        contextlib.suppress(UserWarning),
        pytest.warns() if kind == "TorchScript" else contextlib.nullcontext(),
    ):
        make_foreign(path, kind)
    with pytest.raises(WeightsError, match="cannot be read as a checkpoint: it is") as error:
        load_weights(nano(), path)
    assert kind in error.value.what
    assert error.value.remedy


# --- code never runs ------------------------------------------------------------------------------


class Call:
    """A pickle that calls ``function``."""

    def __init__(self, function, *values) -> None:
        self.function, self.values = function, values

    def __reduce__(self):
        return self.function, self.values


ATTACKS = {
    "os.mkdir": lambda victim: Call(os.mkdir, victim),
    "os.system": lambda victim: Call(os.system, f"mkdir {victim}"),
    "eval": lambda victim: Call(eval, f"__import__('os').mkdir({victim!r})"),
    "exec": lambda victim: Call(exec, f"__import__('os').mkdir({victim!r})"),
    "getattr": lambda victim: Call(getattr, "a", "upper"),
    "np.load": lambda victim: Call(np.load, victim, None, True),
    "np.fromfile": lambda victim: Call(np.memmap, victim, "u1", "w+", 0, (4,)),
    "Path.mkdir": lambda victim: Call(Path.mkdir, Path(victim)),
    "open": lambda victim: Call(open, victim, "w"),
    "torch.load": lambda victim: Call(torch.load, victim),
    "a class of ours": lambda victim: Call(create_model, "cmt_nano"),
    "a partial": lambda victim: Call(__import__("functools").partial, os.mkdir, victim),
    "a dictionary's factory": lambda victim: Call(collections.defaultdict, Call(os.mkdir, victim)),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("zipped", [True, False])
def test_no_code_of_a_checkpoint_runs(tmp_path, attack, zipped):
    victim, path = tmp_path / "victim", tmp_path / "evil.pth"
    content = {"model": GOOD, "x": ATTACKS[attack](str(victim))}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="refused: the file asks to run code"):
        load_weights(nano(), path)
    assert not victim.exists()


class ForgedArray:
    """An array whose bytes would be taken for pointers to objects by NumPy's own constructor."""

    def __init__(self, code: str, data: object) -> None:
        self.code, self.data = code, data

    def __reduce__(self):
        make, values, _ = np.zeros(1).__reduce__()
        kind = np.dtype(self.code)
        return make, values, (1, (2,), kind, False, self.data)


@pytest.mark.parametrize(
    ("code", "data"),
    [("O", b"A" * 16), ("f8", b"A" * 3), ("f8", "A" * 3), ("f8", 7)],
)
def test_forged_arrays_are_refused(tmp_path, code, data):
    with pytest.raises(WeightsError, match=r"cannot be read|refused"):
        load_weights(nano(), saved(tmp_path, {"model": GOOD, "x": ForgedArray(code, data)}))


@pytest.mark.parametrize("code", ["V8", "M8[s]", "m8[s]"])
def test_arrays_that_nobody_reads_are_skipped(tmp_path, code):
    result_of(tmp_path, {"model": GOOD, "x": ForgedArray(code, b"A" * 3)})


def test_a_partial_among_the_settings_is_named(tmp_path):
    content = {"model": GOOD, "cfg": {"optimizer": functools.partial(int, base=2)}}
    with pytest.raises(WeightsError, match="refused") as error:
        load_weights(nano(), saved(tmp_path, content))
    assert "functools.partial" in str(error.value.why)
    assert "save the weights without these settings" in error.value.remedy


def test_a_whole_model_is_refused(tmp_path):
    torch.save(trained(), tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match="refused") as error:
        load_weights(nano(), tmp_path / "whole.pt")
    assert "state_dict()" in error.value.remedy


def test_the_allowed_names_are_known():
    """A name that is added here must be looked at by somebody."""
    from cmt_edge.cmt.unpickling import ALLOWED

    modules = {name.rpartition(".")[0] for _, name in ALLOWED}
    assert modules == {
        "argparse",
        "builtins",
        "collections",
        "datetime",
        "decimal",
        "mmengine.logging.history_buffer",
        "numpy",
        "numpy._core.multiarray",
        "numpy.core.multiarray",
        "pathlib",
        "pathlib._local",
        "types",
        "uuid",
    }
    ours = {made.__module__ for made, _ in ALLOWED}
    assert ours == {"argparse", "cmt_edge.cmt.unpickling"}


def test_a_defaultdict_of_another_factory_calls_nothing(tmp_path):
    result_of(tmp_path, {"model": GOOD, "log": collections.defaultdict(int, a=1)})


# --- values ---------------------------------------------------------------------------------------


class Masked(nn.Module):
    """A model with a causal mask among its weights."""

    def __init__(self, mask) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)
        self.register_buffer("mask", mask)


def masked(mask) -> nn.Module:
    model = Masked(mask)
    model.spec, model.num_classes = nano().spec, 2
    return model


CAUSAL = torch.full((4, 4), float("-inf")).triu(1)


@pytest.mark.parametrize("made", [CAUSAL, torch.zeros(4, 4)], ids=["made", "loaded"])
def test_a_mask_is_no_divergence(tmp_path, made):
    model = masked(made.clone())
    path = saved(tmp_path, masked(CAUSAL.clone()).state_dict())
    load_weights(model, path)
    assert torch.equal(model.mask, CAUSAL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_other_values_in_a_mask_are_a_divergence(tmp_path, value):
    state = masked(CAUSAL.clone()).state_dict()
    state["mask"][0, 1] = value
    with pytest.raises(WeightsError, match="1 not finite: mask"):
        load_weights(masked(CAUSAL.clone()), saved(tmp_path, state))


def test_values_beyond_the_models_type_are_a_divergence(tmp_path):
    state = {k: v.double() if v.is_floating_point() else v for k, v in GOOD.items()}
    state["head.fc.weight"][0, 0] = 1e39
    with pytest.raises(WeightsError, match=r"not finite: head\.fc\.weight"):
        load_weights(nano(), saved(tmp_path, state))


TYPES = [
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.uint16,
    torch.float8_e4m3fn,
    torch.int8,
]


@pytest.mark.parametrize("dtype", TYPES)
def test_a_fingerprint_of_any_type(dtype):
    hashes = set()
    for value in (0, 1):
        model = nn.Linear(2, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        model.register_buffer("t", torch.full((3,), float(value)).to(dtype))
        model.register_buffer("scalar", torch.tensor(float(value)).to(dtype))
        hashes.add(compute_weights_fingerprint(model))
    assert len(hashes) == 2


def test_a_fingerprint_is_the_one_of_earlier_bundles():
    """Bundles hold it: it must not change for the types that they have."""
    model = nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.zero_()
    assert compute_weights_fingerprint(model).startswith(FINGERPRINT)


FINGERPRINT = "c78fe3e46a1e585c"
"""First digits of the hash that the first release gives."""


# --- saved by the programs themselves -------------------------------------------------------------


def test_averaged_model_of_torch(tmp_path):
    """What torchvision's reference training saves as ``model_ema``, and swa_utils alone."""
    average = torch.optim.swa_utils.AveragedModel(trained(), use_buffers=True)
    average.update_parameters(trained())
    assert result_of(tmp_path, average.state_dict()).ema
    assert result_of(tmp_path, {"model": OTHER, "model_ema": average.state_dict()}).ema


def test_compiled_model(tmp_path):
    compiled = torch.compile(trained(), backend="eager")
    result_of(tmp_path, compiled.state_dict())
    result_of(tmp_path, {"state_dict": Enclosing(net=compiled, criterion=nn.BCELoss()).state_dict()})


def test_data_parallel_model(tmp_path):
    result_of(tmp_path, nn.DataParallel(trained()).state_dict())


def test_a_pickled_model_keeps_its_answers(tmp_path):
    model = trained()
    torch.save(model, tmp_path / "whole.pt")
    other = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert compute_weights_fingerprint(other) == compute_weights_fingerprint(model)
    assert pickle.loads(pickle.dumps(model)).spec is model.spec
