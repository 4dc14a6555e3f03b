"""Precisions read off an engine inspection, in the layouts of TensorRT 10 and 11."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy.errors import GateError, StepError
from cmt_edge.deploy.tensorrt.inspection import count_executed, read_layers, require_precision


def tensor(words: str, version: int = 10) -> dict:
    types = {"Format/Datatype": words} if version == 10 else {"Format": "Row major linear", "Datatype": words}
    return {"Name": "t", "Location": "Device", "Dimensions": [1, 3, 8, 8], **types}


def inspection(*entries: tuple[str, str, list[str], list[str]], version: int = 10) -> str:
    found = [
        {
            "Name": name,
            "LayerType": kind,
            "Inputs": [tensor(w, version) for w in ins],
            "Outputs": [tensor(w, version) for w in outs],
            "ParameterType": kind,
            "TacticValue": "0x00000000000003e8",
            "StreamId": 0,
            "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]",
        }
        for name, kind, ins, outs in entries
    ]
    return '{"Layers":' + json.dumps(found).replace("\\u001e", "\x1e") + ',"Bindings":["input","logits"]}'


WORDS = {
    "Row major linear FP32": "fp32",
    "Row major linear FP32 format": "fp32",
    "Float": "fp32",
    "Row major linear FP16 format": "fp16",
    "Half": "fp16",
    "Channel major FP16 format where channel % 8 == 0": "fp16",
    "Two wide channel vectorized row major FP16 format": "fp16",
    "Row major linear BFloat16 format": "bf16",
    "BFloat16": "bf16",
    "Four wide channel vectorized row major Int8 format": "int8",
    "Row major INT8 format where column stride % 64 == 0": "int8",
    "Int8": "int8",
    "Thirty-two wide channel vectorized row major Int8 format with 3 spatial dimensions": "int8",
    "FP8": "fp8",
    "Row major linear FP8 format": "fp8",
}


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("version", [10, 11])
def test_every_spelling(words, version):
    (layer,) = read_layers(inspection(("conv", "CaskConvolution", [words], ["Float"]), version=version))
    assert layer.precision == WORDS[words]


@pytest.mark.parametrize(
    "words",
    [
        "Row major linear Int32",
        "Row major linear Int64 format",
        "Row major linear BOOL",
        "Row major linear UInt8 format",
        "UInt8",
        "N/A due to dynamic shapes",
        "Unknown format",
    ],
)
def test_other_types_are_not_precisions(words):
    assert read_layers(inspection(("shape", "kgen", [words], [words]))) == []


def test_a_layer_counts_as_what_it_reads():
    found = read_layers(
        inspection(
            ("a", "CaskConvolution", ["Int8"], ["Half"]),
            ("b", "kgen", ["Half"], ["Int8"]),
            ("c", "kgen", [], ["Half"]),
        )
    )
    assert [layer.precision for layer in found] == ["int8", "fp16", "fp16"]


CONVERSIONS = [
    ("Reformatting CopyNode for Input Tensor 0", "Reformat"),
    ("cast", "Cast"),
    ("x", "NoOp"),
    ("s", "shuffle"),
    ("__myl_Move_myl0_1", "kgen"),
    ("__myl_Cast_myl0_2", "kgen"),
    ("__myl_QuanMove_myl0", "kgen"),
]


@pytest.mark.parametrize(("name", "kind"), CONVERSIONS)
def test_conversions(name, kind):
    (layer,) = read_layers(inspection((name, kind, ["Float"], ["Half"])))
    assert layer.conversion


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("__myl_MulSum_myl0_0", "kgen"),
        ("__myl_CastMulSum_myl0", "kgen"),
        ("_gemm_mha_v2_0", "kgen"),
        ("conv + gelu", "CaskConvolution"),
        ("m", "gemm"),
        ("p", "PointWiseV2"),
    ],
)
def test_computing_layers(name, kind):
    (layer,) = read_layers(inspection((name, kind, ["Half"], ["Half"])))
    assert not layer.conversion


def test_constants_and_signals_do_not_count():
    assert read_layers(inspection(("c", "Constant", [], ["Half"]), ("s", "signal", ["Half"], ["Half"]))) == []


def test_time_shares():
    found = read_layers(
        inspection(
            ("a", "gemm", ["Int8"], ["Half"]),
            ("b", "kgen", ["Half"], ["Half"]),
            ("r", "Reformat", ["Half"], ["Int8"]),
        )
    )
    result = count_executed(found, {"a": 6.0, "b": 3.0, "r": 1.0})
    assert result.time_share == pytest.approx({"int8": 0.6, "fp16": 0.4})
    assert result.conversion_share == pytest.approx(0.1)
    assert result.operations == {"int8": 1, "fp16": 1}
    assert count_executed(found).time_share == {}
    assert count_executed(found, {"unknown": 1.0}).time_share == {"other": 1.0}


@given(st.dictionaries(st.sampled_from(["a", "b", "r", "x"]), st.floats(1e-3, 1e3), min_size=1))
def test_shares_sum_to_one(times):
    found = read_layers(
        inspection(
            ("a", "gemm", ["Int8"], ["Half"]),
            ("b", "kgen", ["Half"], ["Half"]),
            ("r", "Reformat", ["Half"], ["Int8"]),
        )
    )
    assert sum(count_executed(found, times).time_share.values()) == pytest.approx(1)


def engine(low: int, high: int, words: str):
    return read_layers(
        inspection(
            *[(f"l{i}", "gemm", [words], ["Half"]) for i in range(low)],
            *[(f"h{i}", "gemm", ["Float"], ["Float"]) for i in range(high)],
        )
    )


@pytest.mark.parametrize(
    ("asked", "operations", "low", "high", "words", "share"),
    [
        ("fp32", {"fp32": 10}, 0, 5, "Half", 1.0),
        ("fp16", {"fp16": 90, "fp32": 10}, 9, 1, "Half", 0.9),
        ("fp16", {"fp16": 90, "fp32": 10}, 5, 5, "Half", 0.5),
        ("int8", {"int8": 30, "fp16": 70}, 2, 8, "Int8", 0.2),
        ("fp16", {"int8": 30, "fp16": 70}, 10, 0, "Int8", 1.0),
    ],
)
def test_an_engine_with_what_was_asked_passes(asked, operations, low, high, words, share):
    assert require_precision(asked, operations, engine(low, high, words)) == pytest.approx(share)


@pytest.mark.parametrize(
    ("asked", "operations", "low", "high", "words"),
    [
        ("fp16", {"fp16": 90, "fp32": 10}, 0, 5, "Half"),
        ("fp16", {"fp16": 100}, 4, 6, "Half"),
        ("int8", {"int8": 30, "fp16": 70}, 10, 0, "Half"),
    ],
)
def test_an_engine_without_it_fails(asked, operations, low, high, words):
    with pytest.raises(GateError, match=f"{asked} was asked for") as error:
        require_precision(asked, operations, engine(low, high, words))
    assert error.value.exit_code == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"Layers": 3}', "null", '{"Bindings": []}'])
def test_what_is_no_inspection(text):
    with pytest.raises(StepError, match="cannot be understood"):
        read_layers(text)


def test_names_only():
    with pytest.raises(StepError, match="verbosity"):
        read_layers('{"Layers": ["a", "b"], "Bindings": []}')
