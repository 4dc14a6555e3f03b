"""The registry: its order, what it loads when, and entries that travel between processes."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cmt_edge.cmt import compute_weights_fingerprint, create_model, find_model, fuse, list_models
from cmt_edge.cmt.registry import FAMILIES, collect

ORDER = """
    cmt_nano cmt_ti cmt_xs cmt_s cmt_b
    cvt_13 cvt_21 cvt_13_384 cvt_21_384 cvt_w24
    convit_tiny convit_small convit_base
    mvitv1_b16 mvitv2_t mvitv2_s mvitv2_b mvitv2_l
    xformer_reading
"""


def test_models_are_listed_by_family_and_size():
    assert list_models() == ORDER.split()


def test_entries_have_their_own_names_and_cannot_be_replaced():
    specs = collect(FAMILIES)
    assert all(spec.name == name for name, spec in specs.items())
    with pytest.raises(TypeError):
        specs["cmt_nano"] = specs["cmt_ti"]


def test_families_are_imported_when_the_registry_is_asked():
    code = """
import sys, cmt_edge.cmt
families = lambda: [name for name in sys.modules if name.startswith("cmt_edge.cmt.families.")]
assert not families(), families()
cmt_edge.cmt.list_models()
assert families()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("change", [lambda model: model, fuse], ids=["plain", "fused"])
def test_a_model_can_be_pickled(change):
    model = change(create_model("cmt_nano", num_classes=7, seed=0))
    other = pickle.loads(pickle.dumps(model))
    assert other.spec is model.spec
    assert (other.img_size, other.num_classes) == (64, 7)
    assert compute_weights_fingerprint(other) == compute_weights_fingerprint(model)
    x = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(other(x), model(x))


def test_a_copy_shares_the_registry_entry():
    model = create_model("cmt_nano")
    assert copy.deepcopy(model).spec is model.spec is find_model("cmt_nano")


def test_a_changed_entry_is_copied_with_its_changes():
    changed = replace(find_model("cmt_nano"), num_classes=3)
    for copied in (copy.copy(changed), copy.deepcopy(changed)):
        assert copied.num_classes == 3
        assert copied.constructor is changed.constructor
