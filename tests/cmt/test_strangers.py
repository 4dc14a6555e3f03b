"""Objects of other programs' classes beside the weights: read around, and never run."""

from __future__ import annotations

import collections
import contextlib
import enum
import sys
import types
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from cmt_edge.cmt import compute_weights_fingerprint, load_weights
from cmt_edge.cmt.described import describe_checkpoint
from cmt_edge.cmt.strangers import may_stand_in_settings
from cmt_edge.deploy.errors import WeightsError
from helpers.weights import nano, saved, state_of

GOOD, OTHER = state_of(1), state_of(2)
"""The weights that every file must give, and others."""


@contextlib.contextmanager
def imitated(name: str, made: type) -> Iterator[type]:
    """``made`` as the class ``name`` of a package that only the training program has."""
    module, _, last = name.rpartition(".")
    made.__module__, made.__qualname__, made.__name__ = module, last, last
    parts = module.split(".")
    packages = {".".join(parts[: i + 1]): types.ModuleType("imitated") for i in range(len(parts))}
    setattr(packages[module], last, made)
    with mock.patch.dict(sys.modules, packages):
        yield made


def make_mapping(**attributes) -> type:
    """A subclass of dict whose objects have attributes of their own, as those of yacs and EasyDict do."""

    def start(self, *values, **items):
        dict.__init__(self, *values, **items)
        self.__dict__.update(attributes)

    return type("Mapping", (dict,), {"__init__": start})


class Plain:
    """An object with attributes, as those of OmegaConf."""

    def __init__(self, **attributes) -> None:
        self.__dict__.update(attributes)


def make_plain() -> type:
    return type("Plain", (Plain,), {})


def make_slots() -> type:
    """A class whose state is a tuple of a dictionary and slots."""
    made = type("Slots", (), {"__slots__": ("a", "b")})

    def build(**values):
        found = made()
        for name, value in values.items():
            setattr(found, name, value)
        return found

    made.build = staticmethod(build)
    return made


SETTINGS = {
    "yacs.config.CfgNode": (make_mapping(_immutable=True, _deprecated_keys=set()), {"lr": 1}),
    "easydict.EasyDict": (make_mapping(lr=1), {"lr": 1}),
    "addict.addict.Dict": (make_mapping(), {"lr": 1}),
    "mmengine.config.config.ConfigDict": (make_mapping(__frozen=False), {"lr": 1}),
    "box.box.Box": (make_mapping(_box_config={"frozen_box": False}), {"lr": 1}),
    "lightning_fabric.utilities.data.AttributeDict": (make_mapping(), {"lr": 1}),
    "munch.Munch": (make_mapping(), {"lr": 1}),
    "dotmap.DotMap": (type("DotMap", (collections.OrderedDict,), {}), {"lr": 1}),
    "omegaconf.dictconfig.DictConfig": (make_plain(), {"_content": {"lr": [1, 2]}, "_parent": None}),
    "ml_collections.config_dict.config_dict.ConfigDict": (make_plain(), {"_fields": {"lr": 1}}),
    "transformers.training_args.TrainingArguments": (make_plain(), {"lr": 1}),
    "my_project.config.Config": (make_plain(), {"lr": 1, "hook": len}),
    "detectron2.config.lazy.Slots": (make_slots(), {"a": 1, "b": 2}),
}
"""Name of a class of settings -> an imitation of it, and what its object holds."""


def make_object(made: type, values: dict):
    return getattr(made, "build", made)(**values)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("zipped", [True, False])
def test_settings_of_other_programs_are_read_around(tmp_path, name, zipped):
    made, values = SETTINGS[name]
    values = {key: value for key, value in values.items() if value is not len}
    path = tmp_path / "a.pt"
    with imitated(name, made):
        settings = make_object(made, values)
        content = {"model": GOOD, "config": settings, "inner": {"config": [settings]}}
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    model = nano()
    load_weights(model, path)
    assert compute_weights_fingerprint(model) == compute_weights_fingerprint(holding(GOOD))


def holding(state) -> nn.Module:
    model = nano()
    model.load_state_dict(state)
    return model


class Colour(enum.Enum):
    RED = 1


class Names(list):
    pass


NT = collections.namedtuple("NT", "a b")
OBJECTS = {
    "an enumeration": Colour.RED,
    "a list of its own class": Names([1]),
    "a named tuple": NT(1, 2),
    "a generator of NumPy": np.random.default_rng(0),
    "an old generator of NumPy": np.random.RandomState(0),
    "a bit generator": np.random.PCG64(0),
    "a seed": np.random.SeedSequence(0),
    "a type of NumPy": np.float32,
    "a class of torch": torch.optim.SGD,
    "a criterion": nn.CrossEntropyLoss(),
    "a criterion with weights": nn.CrossEntropyLoss(weight=torch.ones(10)),
    "an exception": ValueError("x"),
    "a class": type(None),
    "a slice": slice(1, 2),
    "a chain": collections.ChainMap({"a": 1}),
}


@pytest.mark.parametrize("name", OBJECTS)
def test_objects_beside_the_weights_are_read_around(tmp_path, name):
    model = nano()
    load_weights(model, saved(tmp_path, {"model": GOOD, "x": OBJECTS[name]}))
    assert compute_weights_fingerprint(model) == compute_weights_fingerprint(holding(GOOD))


def test_what_was_not_read_is_told(tmp_path):
    content = {"model": GOOD, "x": {"deep": [Colour.RED]}, "rng": np.random.default_rng(0)}
    loaded = load_weights(nano(), saved(tmp_path, content))
    assert loaded.unread == ("numpy.random._pickle.__generator_ctor", f"{__name__}.Colour")


def test_an_optimizer_object_holds_no_weights_of_the_model(tmp_path):
    optimizer = torch.optim.SGD(holding(OTHER).parameters(), lr=0.1)
    loaded = load_weights(nano(), saved(tmp_path, {"model": GOOD, "optimizer": optimizer}))
    assert loaded.unread == ("torch.optim.sgd.SGD",)


def test_settings_in_a_mapping_of_another_class_are_used(tmp_path):
    with imitated("yacs.config.CfgNode", make_mapping(_immutable=True)) as node:
        settings = node(model="cmt_nano", imgsz=64, classes=[f"c{i}" for i in range(10)])
        path = saved(tmp_path, {"model": GOOD, "config": settings})
    described = describe_checkpoint(path)
    assert (described.model, described.img_size, described.num_classes) == ("cmt_nano", 64, 10)


def test_weights_in_a_mapping_of_another_class_are_found(tmp_path):
    with imitated("easydict.EasyDict", make_mapping()) as easy:
        path = saved(tmp_path, {"model": easy(GOOD)})
    model = nano()
    assert load_weights(model, path).entry == "model"


# --- what would be lost is refused ----------------------------------------------------------------


def test_a_network_in_an_object_is_not_left_out_silently(tmp_path):
    """It may be the averaged model: nobody but its class knows."""
    content = {"model": GOOD, "ema": holding(OTHER)}
    with pytest.raises(WeightsError, match="refused") as error:
        load_weights(nano(), saved(tmp_path, content))
    assert "ema is an object of the class" in str(error.value.why)


def test_a_matrix_in_an_object_is_no_layer_of_the_model(tmp_path):
    with imitated("secret.log.History", make_plain()) as history:
        path = saved(tmp_path, {"model": GOOD, "history": history(confusion=torch.ones(17, 19))})
    assert load_weights(nano(), path).unread == ("secret.log.History",)


class NamedList(list):
    """A list with an attribute."""


def test_a_list_with_attributes_is_no_code(tmp_path):
    names = NamedList(["a"])
    names.origin = "elsewhere"
    with pytest.raises(WeightsError, match="which only its own code can rebuild") as error:
        load_weights(nano(), saved(tmp_path, {"model": GOOD, "log": names}))
    assert f"{__name__}.NamedList" in error.value.what
    assert "torch.save(model.state_dict(), NEW)" in error.value.remedy


def test_weights_behind_an_unknown_function_are_not_left_out_silently(tmp_path):
    with imitated("secret.pack.Packed", make_plain()) as packed:
        content = {"model": GOOD, "ema": {key: packed(value=value) for key, value in OTHER.items()}}
        path = saved(tmp_path, content)
    with pytest.raises(WeightsError, match="refused") as error:
        load_weights(nano(), path)
    assert "secret.pack.Packed" in str(error.value.why)


def test_a_network_among_the_settings_whose_weights_are_read_is_no_loss(tmp_path):
    """Lightning's save_hyperparameters keeps the network that the state dict is of."""
    net = holding(GOOD)
    state = {f"net.{key}": value for key, value in net.state_dict().items()}
    content = {"state_dict": state, "hyper_parameters": {"net": net, "lr": 1}}
    model = nano()
    load_weights(model, saved(tmp_path, content))
    assert compute_weights_fingerprint(model) == compute_weights_fingerprint(net)


def test_two_whole_models_are_refused_by_their_class(tmp_path):
    with imitated("ultralytics.nn.tasks.ClassificationModel", make_plain()) as made:
        path = saved(tmp_path, {"model": made(a=1), "ema": made(a=2)})
    with pytest.raises(WeightsError, match="refused: the file asks to run code") as error:
        load_weights(nano(), path)
    assert "model is an object of the class ultralytics.nn.tasks.Classif" in str(error.value.why)
    assert "state_dict()" in error.value.remedy


def test_class_names_in_an_object_are_a_fault_and_not_overlooked(tmp_path):
    with imitated("secret.names.Labels", make_plain()) as labels:
        path = saved(tmp_path, {"model": GOOD, "class_names": labels(names=["a"])})
    loaded = load_weights(nano(), path)
    assert loaded.classes is None
    assert "secret.names.Labels" in str(loaded.classes_fault)


# --- code never runs ------------------------------------------------------------------------------


RAN: list[object] = []
"""What the functions of a hostile file were called with."""


def run(*values):
    RAN.append(values)
    return {}


class Hostile:
    """A pickle that calls a function of this file, and hands a state to what it returns."""

    def __reduce__(self):
        return run, ("reduce",), {"state": 1}


class Watcher(dict):
    """A dictionary that notices whatever is done to it."""

    def __reduce_ex__(self, protocol):
        return Watcher, (), {"state": 1}, iter([]), iter([("a", 1)])

    def __init__(self, *values) -> None:
        RAN.append(values)

    def __setitem__(self, key, value) -> None:
        RAN.append((key, value))

    def __setstate__(self, state) -> None:
        RAN.append(state)


@pytest.mark.parametrize("hostile", [Hostile, Watcher])
@pytest.mark.parametrize("zipped", [True, False])
def test_functions_and_classes_that_can_be_imported_are_not(tmp_path, hostile, zipped):
    path = tmp_path / "a.pt"
    torch.save({"model": GOOD, "x": hostile()}, path, _use_new_zipfile_serialization=zipped)
    RAN.clear()
    load_weights(nano(), path)
    assert not RAN


REFUSED = [
    ("os", "system"),
    ("posix", "system"),
    ("subprocess", "Popen"),
    ("commands", "getoutput"),
    ("builtins", "eval"),
    ("__builtin__", "eval"),
    ("builtins", "getattr"),
    ("functools", "partial"),
    ("importlib", "import_module"),
    ("pickle", "loads"),
    ("cPickle", "loads"),
    ("operator", "attrgetter"),
    ("urllib2", "urlopen"),
    ("torch", "load"),
    ("torch.hub", "load"),
    ("torch.utils.data", "default_collate"),
    ("torch._utils", "_rebuild_unknown"),
    ("torch._C", "Generator"),
    ("torch.nested._internal.nested_tensor", "NestedTensor"),
    ("torch.distributed.tensor", "DTensor"),
    ("numpy", "load"),
    ("numpy.lib.npyio", "load"),
    ("numpy.testing._private.utils", "runstring"),
    ("cmt_edge.cmt", "create_model"),
]
TAKEN = [
    ("yacs.config", "CfgNode"),
    ("__main__", "Config"),
    ("my_project.os", "Config"),
    ("numpy", "float32"),
    ("numpy.random._pickle", "__generator_ctor"),
    ("torch.optim.lr_scheduler", "CosineAnnealingLR"),
    ("torch.nn.modules.loss", "CrossEntropyLoss"),
    ("typing", "Any"),
    ("exceptions", "ValueError"),
]


@pytest.mark.parametrize(("module", "name"), REFUSED)
def test_names_that_honest_settings_do_not_hold(module, name):
    assert not may_stand_in_settings(module, name)


@pytest.mark.parametrize(("module", "name"), TAKEN)
def test_names_that_honest_settings_hold(module, name):
    assert may_stand_in_settings(module, name)


# --- tensors of other layouts ---------------------------------------------------------------------


def test_sparse_weights_are_made_dense(tmp_path):
    state = {key: value.to_sparse() if value.ndim == 2 else value for key, value in GOOD.items()}
    model = nano()
    load_weights(model, saved(tmp_path, state))
    assert compute_weights_fingerprint(model) == compute_weights_fingerprint(holding(GOOD))


def make_huge() -> torch.Tensor:
    return torch.sparse_coo_tensor(torch.zeros(2, 1, dtype=torch.long), torch.ones(1), (2**24, 2**24))


ODD = {
    "a sparse one of many terabytes": make_huge,
    "one without values": lambda: torch.empty(3, 3, device="meta"),
    "a compressed one": lambda: torch.eye(3).to_sparse_csc(),
    "a sparse one of no dimension": lambda: torch.tensor(1.0).to_sparse(),
}


pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
"""PyTorch warns of its own sparse tensors when a test makes one."""


@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_beside_the_weights_do_no_harm(tmp_path, name):
    load_weights(nano(), saved(tmp_path, {"model": GOOD, "mask": {"a": ODD[name]()}}))


@pytest.mark.parametrize("name", ODD)
def test_odd_tensors_in_place_of_weights_are_named(tmp_path, name):
    with pytest.raises(WeightsError, match=r"head\.fc\.weight"):
        load_weights(nano(), saved(tmp_path, GOOD | {"head.fc.weight": ODD[name]()}))


def test_a_sparse_tensor_that_would_write_outside_its_memory_is_refused(tmp_path):
    far = torch.tensor([[2**40], [0]])
    forged = torch.sparse_coo_tensor(far, torch.ones(1), (10, 192), check_invariants=False)
    with pytest.raises(WeightsError, match="cannot be read"):
        load_weights(nano(), saved(tmp_path, GOOD | {"head.fc.weight": forged}))
