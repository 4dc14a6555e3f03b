"""The contract of a runtime: one object a name, and one file with one line in the table to add another."""

from __future__ import annotations

import doctest
import inspect
import sys
from importlib.util import find_spec

import numpy as np
import pytest

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.backends import (
    RUNTIME_OF_FORMAT,
    RUNTIMES,
    Entry,
    ExecutedPrecision,
    LoadOptions,
    Runtime,
    Session,
    base,
    fake,
    get_runtime,
    has_runtime,
)
from cmt_edge.deploy.errors import InputError, RuntimeMissingError
from helpers.bundles import make_bundle
from helpers.images import BLUE, GREEN, RED

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
LOCAL = ("openvino", "onnxruntime", pytest.param("torch", marks=needs_torch), "fake")
MINE = """
from cmt_edge.deploy.backends import Runtime
from cmt_edge.deploy.backends.fake import FakeSession

class Mine(Runtime):
    def check(self, device=None):
        return "mine 7"

    def load(self, bundle, options):
        session = FakeSession(len(bundle.labels))
        session.runtime = self.check(options.device)
        return session

RUNTIME = Mine()
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A runtime that the project does not know: its file, and its line in the table."""
    (tmp_path / "mine_runtime.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(RUNTIMES, "mine", Entry("mine_runtime"))
    yield
    sys.modules.pop("mine_runtime", None)


@pytest.mark.usefixtures("mine")
def test_one_file_and_one_line_add_a_runtime(tmp_path):
    bundle = make_bundle(tmp_path / "b")
    with Predictor.load(bundle, backend="mine") as p:
        assert p.info.runtime == "mine 7"
        assert [answer.label for answer in p.stream([RED, GREEN, BLUE])] == ["red", "green", "blue"]
        assert p.batch == 1  # the bundle's, because the runtime does not take any
    assert get_runtime("mine").float_precision("int8") == "fp32"


@pytest.mark.parametrize("name", LOCAL)
def test_a_name_is_one_object(name):
    runtime = get_runtime(name)
    assert isinstance(runtime, Runtime)
    assert runtime is get_runtime(name)
    assert runtime.check().split()[0] == name
    assert has_runtime(name)


def test_a_runtime_cannot_leave_out_what_it_must_do():
    class Half(Runtime):
        def check(self, device: str | None = None) -> str:
            return "half 1"

    with pytest.raises(TypeError, match="load"):
        Half()
    with pytest.raises(TypeError, match="abstract"):
        Session()


@pytest.mark.parametrize("name", LOCAL)
def test_every_method_is_called_as_the_contract_says(name):
    """A runtime that renames a parameter would break callers that pass it by name."""
    for verb in ("check", "float_precision", "load"):
        ours = inspect.signature(getattr(get_runtime(name), verb))
        assert list(ours.parameters) == list(inspect.signature(getattr(Runtime, verb)).parameters)[1:]


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [
        ("openvino", "fp32", "fp32"),
        ("onnxruntime", "fp32", "fp32"),
        ("onnxruntime", "int8", "fp32"),
        ("onnxruntime", "bf16", InputError),
        ("openvino", "fp4", InputError),
        pytest.param("torch", "int8", "fp32", marks=needs_torch),
        pytest.param("torch", "bf16", "fp32", marks=needs_torch),
    ],
)
def test_the_precision_of_what_is_not_quantized(name, precision, expected):
    runtime = get_runtime(name)
    if isinstance(expected, str):
        assert runtime.float_precision(precision) == expected
    else:
        with pytest.raises(expected, match=f"{precision}|bfloat16"):
            runtime.float_precision(precision)


@pytest.mark.parametrize("bf16", [True, False])
def test_openvino_computes_in_bfloat16_where_the_processor_has_it(monkeypatch, bf16):
    from cmt_edge.deploy.backends import openvino, openvino_devices

    able = frozenset({"FP32", "INT8", *(["BF16"] if bf16 else [])})
    monkeypatch.setattr(
        openvino_devices, "read_device", lambda core, name: openvino_devices.Device(name, able)
    )
    assert openvino.RUNTIME.float_precision("int8") == ("bf16" if bf16 else "fp32")
    if bf16:
        assert openvino.RUNTIME.float_precision("bf16") == "bf16"
        return
    with pytest.raises(RuntimeMissingError, match="no bfloat16 instructions"):
        openvino.RUNTIME.float_precision("bf16")


def test_a_refused_bundle_is_named(tmp_path):
    bundle = make_bundle(tmp_path / "b", precision="bf16")
    with pytest.raises(InputError, match="bfloat16") as caught:
        get_runtime("onnxruntime").load(bundle, LoadOptions())
    assert caught.value.where == str(bundle.path)


def test_a_package_that_cannot_be_loaded(tmp_path, monkeypatch):
    (tmp_path / "broken_runtime.py").write_text("raise OSError('libfoo.so is missing')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(RUNTIMES, "broken", Entry("broken_runtime", ("numpy",), "pip install it"))
    with pytest.raises(RuntimeMissingError, match="numpy is installed but cannot be loaded") as caught:
        get_runtime("broken")
    assert "libfoo" in caught.value.why
    assert "pip install it" in caught.value.remedy
    assert not has_runtime("broken")


def test_every_format_has_a_runtime_in_the_table():
    assert set(RUNTIME_OF_FORMAT.values()) <= set(RUNTIMES)


def test_the_example_of_the_fake_runtime_works():
    assert doctest.testmod(fake).attempted >= 5
    assert doctest.testmod(fake).failed == 0


def test_the_fake_session_can_be_slow_and_tells_colours():
    session = fake.FakeSession(3, delay_s=0.0)
    batch = np.zeros((2, 3, 4, 4), np.float32)
    batch[0, 0], batch[1, 2] = 1, 1
    assert session.run(batch)[0].argmax(1).tolist() == [0, 2]
    binding = session.bind(batch.shape)
    binding.batch[:] = batch
    np.testing.assert_array_equal(binding.run()[0], session.run(batch)[0])


@pytest.mark.parametrize(
    ("times", "operations", "text"),
    [
        ({"int8": 0.58, "bf16": 0.42}, {}, "int8 58 % + bf16 42 %"),
        ({"fp32": 0.996, "int8": 0.004}, {}, "fp32 100 %"),
        ({}, {"int8": 3, "fp32": 1}, "int8 75 % + fp32 25 %"),
        ({}, {}, "unknown"),
    ],
)
def test_executed_precision_in_a_table(times, operations, text):
    assert ExecutedPrecision(times, operations).summary() == text
    assert ExecutedPrecision is base.ExecutedPrecision
