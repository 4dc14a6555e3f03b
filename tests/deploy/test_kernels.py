"""What a compiler says of an engine's kernels: both spellings, sizes, operations, blocks, and the summary."""

from __future__ import annotations

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cmt_edge.deploy import report
from cmt_edge.deploy.errors import StepError
from cmt_edge.deploy.tensorrt.compiled import EngineFacts, describe_kernels, summarise_kernels
from cmt_edge.deploy.tensorrt.kernels import TensorUse, count_operations, find_blocks, read_kernels
from cmt_edge.deploy.tensorrt.open_sizes import close_sizes
from cmt_edge.deploy.tensorrt.roofline import GPUS, LAUNCH_US, Gpu, choose_gpus, estimate_latency


def tensor(dims, datatype="Half") -> str:
    sizes = ",".join(map(str, dims))
    return (
        f"{{ Name: t, Dimensions: [{sizes}], Strides: [1], StrideOrder: [0], Datatype: {datatype},"
        " Format: (NHWC) Channel major format }"
    )


def line(name, kind, inputs, outputs, constants=(), nodes=()) -> str:
    read, fixed, written = (", ".join(group) for group in (inputs, constants, outputs))
    metadata = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {read}], Constants: [ {fixed}], Outputs: [ {written}],"
        f" TacticName: , StreamId: 0, Metadata: {metadata}"
    )


CONV = line(
    "conv_myl0_0",
    "correlation",
    [tensor((1, 3, 8, 8), "Int8")],
    [tensor((1, 16, 8, 8), "Float")],
    [tensor((16, 3, 3, 3), "Int8"), tensor((1, 16, 1, 1), "Float")],
    ["conv", "quantize"],
)
MOVE = line("__myl_TranReshConc_myl0_1", "kgen", [tensor((4, 8))], [tensor((8, 4))], nodes=["permute"])
GEMM = line("mm_myl0_2", "gemm", [tensor((1, 64, 16))], [tensor((1, 64, 32))], [tensor((1, 16, 32))], ["mm"])
PAIR = line("qk_myl0_3", "gemm", [tensor((2, 5, 7)), tensor((2, 7, 9))], [tensor((2, 5, 9))], nodes=["qk"])
ATTENTION = line(
    "_gemm_mha_v2_myl0_4",
    "kgen",
    [tensor((4, 144, 56)), tensor((4, 56, 36)), tensor((4, 36, 56))],
    [tensor((4, 144, 56))],
    [tensor((1, 4, 144, 36))],
    ["qk", "softmax", "av"],
)
CLASS_TOKEN = line(
    "_gemv_mha_v1_myl0_5",
    "kgen",
    [tensor((8, 1, 48)), tensor((8, 48, 197)), tensor((8, 197, 48))],
    [tensor((8, 1, 48))],
    nodes=["qk", "softmax", "av"],
)
FLAT_CLASS_TOKEN = line(
    "_gemv_mha_v1_myl0_6",
    "kgen",
    [tensor((2, 384)), tensor((12, 64, 50)), tensor((12, 50, 64))],
    [tensor((12, 1, 64))],
    [tensor((1, 384))],
    ["qk", "softmax", "av"],
)
SIGNAL = line("signal_0", "signal", [], [])
LOG = "\n".join([CONV, MOVE, GEMM, PAIR, ATTENTION, SIGNAL, "", "Bindings:", "input", "logits"])

NEW = {"Format": "Row major linear", "Datatype": "Half"}
OLD = {"Format/Datatype": "Row major linear FP16 format"}


def inspection(words) -> str:
    source = {"Name": "x", "Location": "Device", "Dimensions": [1, 16, 8, 8], **words}
    entry = {
        "Name": "conv",
        "LayerType": "CaskConvolution",
        "Inputs": [source],
        "Outputs": [source | {"Dimensions": [-1, 32, 8, 8]}],
        "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: b]",
    }
    return json.dumps({"Layers": [entry, "a name only"], "Bindings": ["x"]})


def test_a_line_of_the_log():
    conv = read_kernels(LOG)[0]
    assert (conv.name, conv.kind, conv.nodes) == ("conv_myl0_0", "correlation", ("conv", "quantize"))
    assert conv.inputs == (TensorUse((1, 3, 8, 8), "int8"),)
    assert conv.outputs == (TensorUse((1, 16, 8, 8), "fp32"),)
    assert conv.types == "int8 -> fp32"
    assert conv.activation_bytes == 3 * 64 + 4 * 16 * 64
    assert conv.weight_bytes == 16 * 27 + 4 * 16


@pytest.mark.parametrize("words", [NEW, OLD])
def test_the_inspector_of_tensorrt(words):
    (kernel,) = read_kernels(inspection(words))
    assert kernel.nodes == ("a", "b")
    assert kernel.types == "fp16 -> fp16"
    assert kernel.activation_bytes == 2 * (16 * 64 + 32 * 64)  # an open batch counts as one image


@pytest.mark.parametrize(
    "text",
    ["", "nothing", "{", '{"Layers": 3}', json.dumps({"Layers": ["names", "only"]}), "Name: a, LayerType: b"],
)
def test_what_names_no_kernels(text):
    with pytest.raises(StepError, match="cannot be understood"):
        read_kernels(text)


@given(st.text(max_size=300))
def test_no_text_ends_in_another_error(text):
    for given_text in (text, f"Name: x, LayerType: {text}", "{" + text):
        with contextlib.suppress(StepError):
            read_kernels(given_text)


@pytest.mark.parametrize(
    ("text", "operations"),
    [
        (CONV, 2 * 16 * 64 * 27),
        (GEMM, 2 * 64 * 32 * 16),
        (PAIR, 2 * 2 * 5 * 9 * 7),
        (ATTENTION, 2 * 2 * 4 * 144 * 36 * 56),
        (CLASS_TOKEN, 2 * 2 * 8 * 197 * 48),
        (FLAT_CLASS_TOKEN, 2 * 2 * 12 * 50 * 64),
        (MOVE, 0),
    ],
)
def test_operations_are_counted_from_the_shapes(text, operations):
    (kernel,) = read_kernels(text)
    assert count_operations(kernel) == operations


def test_the_attention_of_one_query_is_one():
    assert all(kernel.is_attention for kernel in read_kernels("\n".join([CLASS_TOKEN, FLAT_CLASS_TOKEN])))


def test_the_summary():
    found = summarise_kernels(read_kernels(LOG), EngineFacts("tensorrt_rtx", "1.7", 10, attentions=2))
    assert found.kernels == {"correlation": 1, "gemm": 2, "kgen": 2}
    assert (found.kernel_count, found.sync_nodes) == (5, 1)
    assert (found.attention, found.attentions) == (1, 2)
    assert (found.fused, found.conversions) == (2, 1)
    assert found.types == {"fp16 -> fp16": 3, "int8 -> fp32": 1}
    assert found.activation_bytes == sum(k.activation_bytes for k in read_kernels(LOG))
    assert found.blocks == ()
    assert [estimate.gpu for estimate in found.estimates] == ["RTX 3090", "L4", "RTX 4090", "RTX 5090"]


def test_blocks_add_up():
    blocks = {"conv": "stem", "mm": "stages.0", "qk": "stages.0", "av": "stages.1", "softmax": "stages.0"}
    kernels = read_kernels(LOG)
    assert find_blocks(kernels, blocks) == ["stem", "stages.0", "stages.0", "stages.0", "stages.0", ""]
    found = summarise_kernels(kernels, EngineFacts("tensorrt_rtx", "1.7", 10, blocks=blocks))
    assert [(b.name, b.kernels, b.attention) for b in found.blocks] == [
        ("stem", 1, 0),
        ("stages.0", 4, 1),
    ]
    assert sum(b.activation_bytes for b in found.blocks) == found.activation_bytes
    listed = describe_kernels(kernels, blocks)
    assert len(listed) == 6
    assert listed[0].block == "stem"
    assert listed[0].reads + listed[0].writes == kernels[0].activation_bytes


def test_the_estimate_is_the_slower_of_memory_and_arithmetic():
    kernels = read_kernels("\n".join([GEMM, SIGNAL]))
    size = kernels[0].activation_bytes + kernels[0].weight_bytes
    slow_memory = estimate_latency(kernels, Gpu("a", "8.9", 1, 1e6, 1e6, 1e6, "test"))
    assert slow_memory.memory_ms == pytest.approx(size / 1e6)
    assert slow_memory.arithmetic_ms == 0
    slow_units = estimate_latency(kernels, Gpu("b", "8.9", 1e6, 1, 0.001, 1, "test"))
    assert slow_units.arithmetic_ms == pytest.approx(count_operations(kernels[0]) / 1e6)
    assert slow_units.memory_ms == 0
    for found in (slow_memory, slow_units):  # a signal costs nothing
        assert found.launch_ms == pytest.approx(LAUNCH_US / 1e3)
        assert found.total_ms == pytest.approx(found.memory_ms + found.arithmetic_ms + found.launch_ms)


@pytest.mark.parametrize(
    ("product", "targets", "names"),
    [
        ("tensorrt_rtx", ("8.9",), ["L4", "RTX 4090"]),
        ("tensorrt_rtx", ("7.5", "12.0"), ["T4", "RTX 5090"]),
        ("tensorrt_rtx", ("12.1",), [gpu.name for gpu in GPUS]),  # none of the table: graphs are compared
        ("tensorrt", ("8.7",), [gpu.name for gpu in GPUS]),
    ],
)
def test_an_estimate_is_for_gpus_that_run_the_engine(product, targets, names):
    found = summarise_kernels(read_kernels(LOG), EngineFacts(product, "1.7", 10, targets))
    assert [estimate.gpu for estimate in found.estimates] == names


def test_no_portable_engine_runs_on_an_h100():
    assert "H100" not in {gpu.name for gpu in choose_gpus(("8.0", "8.6", "8.9", "12.0"))}


OPEN_LOG = "\n".join(
    [
        line("sizes", "shape_call", [], []),
        line("hvar", "cast", [tensor((1,), "Int64")], [tensor((1,), "Int64")]),
        line("norm", "kgen", [tensor((-1, 64, 24))], [tensor((-1, 64, 1), "Float")], nodes=["norm"]),
        line("kv", "gemm", [tensor((-1, 24))], [tensor((2, -1, 48))], [tensor((1, 24, 48))], ["k", "v"]),
        line(
            "_gemm_mha_v2",
            "kgen",
            [tensor((-1, 64, 12)), tensor((-1, 12, 4)), tensor((-1, 4, 12))],
            [tensor((-1, 64, 12))],
            nodes=["qk", "av"],
        ),
        line("head", "gemm", [tensor((-1, 24))], [tensor((-1, 10))], [tensor((1, 24, 10))], ["head"]),
        line("alone", "kgen", [tensor((-1, 7))], [tensor((-1, 7))]),
        line("move", "kgen", [tensor((-1, 4, 12))], [tensor((-1, 4, 12))]),
        line("other", "kgen", [tensor((-1, 64))], [tensor((-1, 64))], nodes=["av"]),
    ]
)
SHAPES = {
    "norm": [(1, 64, 24), (1, 64, 24)],
    "k": [(1, 4, 24), (24, 24), (1, 4, 24)],
    "v": [(1, 4, 24), (24, 24), (1, 4, 24)],
    "qk": [(1, 2, 64, 12), (1, 2, 12, 4), (1, 2, 64, 4)],
    "av": [(1, 2, 64, 4), (1, 2, 4, 12), (1, 2, 64, 12)],
    "head": [(1, 24), (24, 10), (1, 10)],
}


def test_open_sizes_are_those_of_one_image():
    """A compiler merges the number of images with that of tokens or heads."""
    kernels = close_sizes(read_kernels(OPEN_LOG), SHAPES)
    dims = {kernel.name: [each.dims for each in (*kernel.inputs, *kernel.outputs)] for kernel in kernels}
    assert dims == {  # what the host computes of sizes is left out
        "norm": [(1, 64, 24), (1, 64, 1)],
        "kv": [(4, 24), (2, 4, 48)],
        "_gemm_mha_v2": [(2, 64, 12), (2, 12, 4), (2, 4, 12), (2, 64, 12)],
        "head": [(1, 24), (1, 10)],
        "alone": [(1, 7), (1, 7)],
        "move": [(2, 4, 12), (2, 4, 12)],  # names no operation, but moves the values of the next kernel
        "other": [(8, 64), (8, 64)],
    }
    operations = {kernel.name: count_operations(kernel) for kernel in kernels}
    assert operations["kv"] == 2 * 2 * 4 * 48 * 24
    assert operations["_gemm_mha_v2"] == 2 * 2 * 2 * 64 * 4 * 12


def test_integers_have_their_own_peak():
    kernels = read_kernels(CONV)
    gpu = Gpu("a", "8.9", 1e9, 1, 2, 1000, "test")
    assert estimate_latency(kernels, gpu).arithmetic_ms == pytest.approx(count_operations(kernels[0]) / 1e12)


def test_the_report_calls_estimates_estimates():
    found = summarise_kernels(
        read_kernels(LOG), EngineFacts("tensorrt_rtx", "1.7", 10, ("8.6",), 3.2, attentions=2)
    )
    text = report.describe_compiled(found)
    assert "TensorRT for RTX 1.7 for compute capability 8.6 in 3 s" in text
    assert "attentions fused: 1 of 2" in text
    assert "not measured" in text
    page = report.describe_compiled(found, markdown=True)
    assert "Estimates, not measurements" in page
    assert "RTX 3090" in page
