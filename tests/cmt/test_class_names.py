"""Names of classes that a checkpoint holds, under any of the usual keys."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch

from cmt_edge.cmt.class_names import ClassNames, find_class_names
from helpers.weights import GOOD, NAMES, result_of

FORWARD = dict(enumerate(NAMES))


BACKWARD = {name: i for i, name in enumerate(NAMES)}


SHUFFLED = dict(sorted(BACKWARD.items(), key=lambda pair: -pair[1]))


CLASSES = {
    "classes": {"classes": list(NAMES)},
    "a tuple": {"classes": NAMES},
    "an array": {"classes": np.array(NAMES)},
    "an array of objects": {"classes": np.array(NAMES, dtype=object)},
    "class_names": {"class_names": list(NAMES)},
    "index to name": {"classes": FORWARD},
    "index as text": {"idx_to_class": {str(i): name for i, name in FORWARD.items()}},
    "name to index": {"class_to_idx": BACKWARD},
    "in another order": {"class_to_idx": SHUFFLED},
    "both": {"class_to_idx": SHUFFLED, "classes": list(NAMES)},
    "names": {"names": FORWARD},
    "meta.CLASSES": {"meta": {"CLASSES": NAMES}},
    "mmengine": {"meta": {"dataset_meta": {"classes": NAMES}}},
    "Lightning": {"hyper_parameters": {"class_names": list(NAMES)}},
    "id2label": {"config": {"id2label": {str(i): name for i, name in FORWARD.items()}}},
    "args": {"args": argparse.Namespace(class_names=list(NAMES))},
    "names of something else": {"names": ["conv", "fc"], "class_names": list(NAMES)},
    "index from 1": {"idx_to_class": {i + 1: name for i, name in FORWARD.items()}},
    "indices as real numbers": {"names": {float(i): name for i, name in FORWARD.items()}},
    "indices in tensors": {"class_to_idx": {name: torch.tensor(i) for name, i in BACKWARD.items()}},
    "pairs of index and name": {"classes": [[i, name] for i, name in FORWARD.items()]},
    "bytes": {"classes": [name.encode() for name in NAMES]},
    "a text": {"classes": ", ".join(NAMES)},
    "label_map": {"label_map": FORWARD},
    "settings": {"settings": {"classes": list(NAMES)}},
    "class_to_idx of args": {"args": argparse.Namespace(class_to_idx=SHUFFLED)},
    "idx_to_class of Lightning": {"hyper_parameters": {"idx_to_class": FORWARD}},
    "a data module": {"datamodule_hyper_parameters": {"class_names": list(NAMES)}},
    "config": {"config": {"classes": list(NAMES)}},
    "data of config": {"config": {"data": {"classes": list(NAMES)}}},
    "numbers first": {"classes": list(range(10)), "idx_to_class": FORWARD},
}


@pytest.mark.parametrize("name", CLASSES)
def test_class_names_are_found(tmp_path, name):
    loaded = result_of(tmp_path, {"model": GOOD} | CLASSES[name])
    assert (loaded.classes, loaded.classes_fault) == (NAMES, None)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1],
        {"classes": 10},
        {"classes": {}},
        {"classes": []},
        {"classes": "data/classes.txt"},
        {"args": {"classes": [0, 2]}},
        {"names": ["conv", "fc"]},
        {"labels": torch.zeros(10)},
    ],
)
def test_what_is_no_list_of_classes(content):
    assert find_class_names(content, 10) == ClassNames()


UNUSABLE = {
    "a hole": ({"class_to_idx": {"a": 0, "b": 2}}, "class_to_idx has 2 indices from 0 to 2"),
    "a later beginning": ({"idx_to_class": {i + 2: n for i, n in FORWARD.items()}}, "from 2 to 11"),
    "one index twice": ({"class_to_idx": dict.fromkeys(NAMES, 0)}, "10 indices from 0 to 0"),
    "nine": ({"class_names": list(NAMES[:9])}, "class_names has 9 names for 10 classes"),
    "nine from 1": ({"idx_to_class": {i: NAMES[i] for i in range(1, 10)}}, "9 names for 10 classes"),
    "nine of the settings": ({"args": {"classes": list(NAMES[:9])}}, "args.classes has 9 names"),
    "a set": ({"classes": set(NAMES)}, "classes is a set"),
    "pairs of names": ({"classes": [[name, "x"] for name in NAMES]}, "holds a list"),
    "no names": ({"classes": [None] * 10}, "holds a NoneType"),
    "bytes of another code": ({"classes": [b"\xff"] * 10}, "UTF-8"),
    "numbers to numbers": ({"classes": {i: 9 - i for i in range(10)}}, "numbers to numbers"),
    "half an index": ({"class_to_idx": {name: i / 2 for name, i in BACKWARD.items()}}, "no whole number"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_names_without_a_certain_order_are_told(name):
    content, fault = UNUSABLE[name]
    found = find_class_names(content, 10)
    assert found.names is None
    assert fault in str(found.fault)


def test_names_that_fit_are_taken_beside_some_that_do_not():
    content = {"class_names": list(NAMES[:9]), "settings": {"classes": list(NAMES)}}
    assert find_class_names(content, 10) == ClassNames(NAMES)


@pytest.mark.parametrize("names", [["dog"], ["cat", "dog"]])
def test_one_logit_has_one_name_or_two(names):
    assert find_class_names({"classes": names}, 1) == ClassNames(tuple(names))


def test_classes_that_are_digits_keep_their_indices():
    folders = sorted(map(str, range(12)))  # "0", "1", "10", "11", "2", ...: as ImageFolder sorts them
    backward = {name: i for i, name in enumerate(folders)}
    assert find_class_names({"class_to_idx": backward}, 12).names == tuple(folders)
    assert find_class_names({"classes": backward}, 12).names == tuple(folders)


def test_two_orders_of_the_classes_are_told(tmp_path):
    content = {"model": GOOD, "classes": list(NAMES[::-1]), "class_to_idx": BACKWARD}
    loaded = result_of(tmp_path, content)
    assert loaded.classes is None
    assert loaded.classes_fault == "gives its classes in two orders: classes and class_to_idx"


def test_ids_and_readable_names_are_no_contradiction():
    ids = [f"n{i:08}" for i in range(10)]
    assert find_class_names({"classes": ids, "class_names": list(NAMES)}, 10).names == tuple(ids)
