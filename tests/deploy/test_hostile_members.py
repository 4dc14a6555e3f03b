"""Members that are not what their names say, and graphs that ask for more than they bring."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import ONNX, onnx_caps
from cmt_edge.deploy.bundle.onnx_caps import MAX_MADE, ExcessiveGraph, require_modest
from cmt_edge.deploy.errors import BundleError
from helpers.bundles import SIZE, make_bundle, tiny_graph, tiny_manifest

FLOAT = TensorProto.FLOAT
BIG = 1 << 16
"""Twice this many of anything is more than a graph may ask for."""


def graph(nodes, *constants, sparse=()) -> bytes:
    source = helper.make_tensor_value_info("input", FLOAT, [1, 3, SIZE, SIZE])
    target = helper.make_tensor_value_info("logits", FLOAT, [1, 3])
    made = helper.make_graph(list(nodes), "g", [source], [target], list(constants))
    made.sparse_initializer.extend(sparse)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    ).SerializeToString()


def open_made(place: Path, **settings) -> Bundle:
    """A bundle that is written and then opened by its path, as a stranger's is."""
    return Bundle.open(make_bundle(place, **settings).path)


def whole(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def real(name: str, value: float) -> TensorProto:
    return numpy_helper.from_array(np.array(value, np.float32), name)


def declared(*dims: int, **values) -> TensorProto:
    return TensorProto(name="w", data_type=FLOAT, dims=dims, **values)


def sparse(*dims: int):
    values = helper.make_tensor("s", FLOAT, [1], [1.0])
    return helper.make_sparse_tensor(values, helper.make_tensor("i", TensorProto.INT64, [1], [0]), dims)


def inside(tensor: TensorProto):
    """A branch of an ``If`` that holds a tensor."""
    branch = helper.make_graph([], "b", [], [], [tensor])
    return helper.make_node("If", ["input"], ["logits"], then_branch=branch, else_branch=branch)


FILL = helper.make_node("ConstantOfShape", ["sizes"], ["logits"])
EXCESSIVE = {
    "no values": graph([], declared(1 << 20, 1 << 14)),
    "few bytes": graph([], declared(1 << 20, raw_data=b"1234")),
    "few numbers": graph([], declared(1 << 20, float_data=[1.0])),
    "a negative dimension": graph([], declared(-4, raw_data=bytes(16))),
    "few bytes in a branch": graph([inside(declared(1 << 20, raw_data=b"1234"))]),
    "few bytes in an attribute": graph(
        [helper.make_node("Constant", [], ["logits"], value=declared(1 << 20, raw_data=b"1234"))]
    ),
    "a large sparse tensor": graph([], sparse=[sparse(BIG, BIG)]),
    "ConstantOfShape": graph([FILL], whole("sizes", BIG, BIG)),
    "ConstantOfShape of numbers": graph(
        [FILL], helper.make_tensor("sizes", TensorProto.INT64, [2], [BIG, BIG])
    ),
    "ConstantOfShape of a constant": graph(
        [helper.make_node("Constant", [], ["sizes"], value=whole("", BIG, BIG)), FILL]
    ),
    "ConstantOfShape of integers": graph(
        [helper.make_node("Constant", [], ["sizes"], value_ints=[BIG, BIG]), FILL]
    ),
    "Expand": graph([helper.make_node("Expand", ["input", "sizes"], ["logits"])], whole("sizes", BIG, BIG)),
    "Tile": graph([helper.make_node("Tile", ["input", "t"], ["logits"])], whole("t", 1, 1, BIG, BIG)),
    "Pad": graph([helper.make_node("Pad", ["input", "p"], ["l"])], whole("p", 0, 0, BIG, 0, 0, 0, 0, BIG)),
    "Range": graph([helper.make_node("Range", ["a", "b", "c"], ["l"])], whole("b", 1 << 40)),
    "Resize": graph(
        [helper.make_node("Resize", ["input", "", "by"], ["logits"])],
        numpy_helper.from_array(np.array([1, 1, BIG, BIG], np.float32), "by"),
    ),
    "many that are small": graph([FILL] * 20, whole("sizes", 1 << 12, 1 << 12)),
    "a tensor of many dimensions": graph([], declared(*[1] * 80, 1 << 40, raw_data=b"1234")),
    "a negative sparse dimension": graph([], sparse=[sparse(-BIG, -BIG)]),
    "a shape of many dimensions": graph(
        [helper.make_node("RandomNormal", [], ["logits"], shape=[*[1] * 80, 1 << 40])]
    ),
    "many constants of one name": graph([FILL], *[whole("sizes", 1)] * 100),
    "Range down": graph(
        [helper.make_node("Range", ["b", "a", "c"], ["l"])],
        whole("a", 0),
        whole("b", -1 << 40),
        whole("c", 1),
    ),
    "Range from below": graph(
        [helper.make_node("Range", ["b", "a", "c"], ["l"])], whole("b", -1 << 40), whole("a", 0)
    ),
    "Range of tiny steps": graph(
        [helper.make_node("Range", ["a", "b", "c"], ["l"])], real("a", 0.0), real("b", 1.0), real("c", 1e-9)
    ),
    "Range of tiny steps in float64": graph(
        [helper.make_node("Range", ["a", "b", "c"], ["l"])],
        helper.make_tensor("c", TensorProto.DOUBLE, [], [1e-9]),
        real("a", 0.0),
        real("b", 1.0),
    ),
    "Range without a step": graph(
        [helper.make_node("Range", ["a", "b", "c"], ["l"])], real("a", 0.0), real("b", 1.0), real("c", 0.0)
    ),
    "HannWindow": graph([helper.make_node("HannWindow", ["n"], ["l"])], whole("n", 1 << 40)),
    "BlackmanWindow": graph([helper.make_node("BlackmanWindow", ["n"], ["l"])], whole("n", 1 << 40)),
    "MelWeightMatrix": graph(
        [helper.make_node("MelWeightMatrix", ["n", "m"], ["l"])], whole("n", 1 << 40), whole("m", 1)
    ),
    "strides": graph([helper.make_node("ConvTranspose", ["input", "w"], ["l"], strides=[1000, 1000])]),
    "a shape of an output": graph(
        [helper.make_node("ConvTranspose", ["input", "w"], ["l"], output_shape=[BIG, BIG])]
    ),
    "padding of a convolution": graph([helper.make_node("Conv", ["input", "w"], ["l"], pads=[BIG] * 4)]),
    "padding of a pool": graph(
        [helper.make_node("MaxPool", ["input"], ["l"], kernel_shape=[3, 3], pads=[BIG] * 4)]
    ),
    "RoiAlign": graph(
        [helper.make_node("RoiAlign", ["input", "r", "b"], ["l"], output_height=BIG, output_width=BIG)]
    ),
    "MaxRoiPool": graph([helper.make_node("MaxRoiPool", ["input", "r"], ["l"], pooled_shape=[BIG, BIG])]),
    "Identity": graph(
        [
            helper.make_node("Identity", ["sizes"], ["s"]),
            helper.make_node("Cast", ["s"], ["t"], to=7),
            helper.make_node("ConstantOfShape", ["t"], ["logits"]),
        ],
        whole("sizes", BIG, BIG),
    ),
    "a product": graph(
        [helper.make_node("Mul", ["n", "n"], ["s"]), helper.make_node("ConstantOfShape", ["s"], ["logits"])],
        whole("n", BIG),
    ),
    "a product of a shape of a constant": graph(
        [
            helper.make_node("Shape", ["n"], ["s"]),
            helper.make_node("Mul", ["s", "n"], ["t"]),
            helper.make_node("Tile", ["input", "t"], ["logits"]),
        ],
        whole("n", BIG),
    ),
    "OneHot": graph(
        [helper.make_node("OneHot", ["input", "n", "v"], ["l"])],
        helper.make_tensor("n", TensorProto.DOUBLE, [], [4e5]),
    ),
    "AffineGrid": graph([helper.make_node("AffineGrid", ["input", "n"], ["l"])], whole("n", 1, 1, BIG, BIG)),
    "RandomNormal": graph([helper.make_node("RandomNormal", [], ["logits"], shape=[BIG, BIG])]),
}
"""What a graph asks for -> its bytes."""


@pytest.mark.parametrize("name", EXCESSIVE)
def test_what_asks_for_more_than_it_brings_is_refused(name: str) -> None:
    with pytest.raises(ExcessiveGraph):
        require_modest(EXCESSIVE[name])


MODEST = {
    "the tiny graph": tiny_graph(),
    "packed numbers": graph([], declared(4, float_data=[0, 1, 2, 3])),
    "texts": graph([], TensorProto(name="t", data_type=TensorProto.STRING, dims=[2], string_data=[b"", b""])),
    "no elements": graph([], declared(0, 5)),
    "int4": graph([], TensorProto(name="t", data_type=TensorProto.INT4, dims=[3], raw_data=b"ab")),
    "a slice to the end": graph(
        [helper.make_node("Slice", ["input", "a", "b"], ["l"])], whole("a", 0), whole("b", (1 << 63) - 1)
    ),
    "a shape that is inferred": graph(
        [helper.make_node("Expand", ["input", "s"], ["l"])], whole("s", -1, 64)
    ),
    "padding of a large image": graph(
        [helper.make_node("Pad", ["input", "p"], ["l"])], whole("p", 0, 0, 300, 300, 0, 0, 300, 300)
    ),
    "a sparse tensor": graph([], sparse=[sparse(100, 100)]),
    "a range": graph(
        [helper.make_node("Range", ["a", "b", "c"], ["l"])], real("a", 0.0), real("b", 1.0), real("c", 0.01)
    ),
    "a range to a size of the input": graph(
        [helper.make_node("Size", ["input"], ["b"]), helper.make_node("Range", ["a", "b", "c"], ["l"])],
        whole("a", 0),
        whole("c", 1),
    ),
    "a shape from the input": graph(
        [
            helper.make_node("Shape", ["input"], ["s"]),
            helper.make_node("Mul", ["s", "n"], ["t"]),
            helper.make_node("Expand", ["input", "t"], ["l"]),
        ],
        whole("n", 1),
    ),
    "a shape behind Identity": graph(
        [helper.make_node("Identity", ["n"], ["s"]), helper.make_node("Expand", ["input", "s"], ["l"])],
        whole("n", 1, 3, SIZE, SIZE),
    ),
    "strides": graph(
        [helper.make_node("ConvTranspose", ["input", "w"], ["l"], strides=[32, 32], pads=[1] * 4)]
    ),
}
"""Graphs that are right -> their bytes."""


@pytest.mark.parametrize("name", MODEST)
def test_what_is_right_passes(name: str) -> None:
    require_modest(MODEST[name])


def test_two_graphs_in_one_file_are_refused() -> None:
    """Protobuf would merge them: each may be right while both together are another graph."""
    with pytest.raises(ExcessiveGraph, match="more than once"):
        require_modest(tiny_graph() + tiny_graph())


def test_two_contents_of_a_tensor_are_refused() -> None:
    field = declared(1 << 20, raw_data=b"1234").SerializeToString()
    tensor = field + declared(raw_data=bytes(4 << 20)).SerializeToString()
    initializer = b"\x2a" + encode_length(tensor)
    with pytest.raises(ExcessiveGraph, match="more than once"):
        require_modest(b"\x08\x09\x3a" + encode_length(initializer))


FOREIGN = {
    "nothing": b"",
    "XML in a field that ONNX does not know": b"\x08\x09" + b"\x7a\x05<net>" + tiny_graph()[2:],
    "XML as the version": b"\n\x05<net>" + tiny_graph()[2:],
    "another field first": b"\x12\x01x" + tiny_graph(),
    "a TensorFlow graph": b"\n\x10\n\x05input\x12\x07Unknown",
    "a TensorFlow graph behind the version": b"\x08\x09\n\x10\n\x05input\x12\x07Unknown",
    "a number as a graph": b"\x08\x09\x38\x01" + tiny_graph()[2:],
    "a graph as 64 bits": b"\x08\x09\x39" + bytes(8) + tiny_graph()[2:],
}
"""What a file called ``model.onnx`` is -> its content."""


@pytest.mark.parametrize("name", FOREIGN)
def test_only_what_onnx_itself_writes_is_onnx(tmp_path: Path, name: str) -> None:
    """Protobuf skips fields that it does not know; another reader may take them for the file."""
    with pytest.raises(BundleError, match=r"model\.onnx is no ONNX file"):
        open_made(tmp_path / "b", members={ONNX: FOREIGN[name]})


def test_two_versions_are_refused() -> None:
    with pytest.raises(ExcessiveGraph, match="more than once"):
        require_modest(b"\x08\x09" + tiny_graph())


@pytest.mark.parametrize("kind", onnx_caps.FIELDS)
def test_every_field_of_onnx_is_known(kind: str) -> None:
    """With the wire type of its type, and as often as ``onnx.proto`` says."""
    proto = {"Training": onnx.TrainingInfoProto}.get(kind) or getattr(onnx, f"{kind}Proto")
    fields = proto.DESCRIPTOR.fields
    wires = {1: 1, 2: 5, 3: 0, 4: 0, 5: 0, 9: 2, 11: 2, 12: 2, 13: 0, 14: 0}
    known = onnx_caps.FIELDS[kind]
    assert known.keys() == {field.number for field in fields}
    for field in fields:
        most, allowed = known[field.number]
        is_packed = field.is_repeated and wires[field.type] != 2
        assert allowed == ((wires[field.type], 2) if is_packed else (wires[field.type],)), field.name
        assert (most > 1) == field.is_repeated, field.name


def test_onnx_runtime_takes_bytes_for_onnx_alone() -> None:
    """The begin of a name in the file is where its own format has its sign."""
    pytest.importorskip("onnxruntime")
    from cmt_edge.deploy.backends.base import LoadOptions
    from cmt_edge.deploy.backends.onnxruntime import OnnxRuntimeSession

    model = onnx.load_from_string(tiny_graph())
    model.producer_name = "ORTM, a name"
    content = model.SerializeToString()
    assert content[4:8] == b"ORTM"
    require_modest(content)
    assert OnnxRuntimeSession(content, LoadOptions()).input_name == "input"


def test_openvino_asks_only_the_reader_of_onnx(tmp_path: Path) -> None:
    """The file is a graph in OpenVINO's format, which it finds out by itself if it is asked to."""
    read = pytest.importorskip("cmt_edge.deploy.backends.openvino_graph").read
    file = tmp_path / ONNX
    file.write_bytes(b'<?xml version="1.0"?>\n<net name="g" version="11"><layers/><edges/></net>')
    import openvino

    assert openvino.Core().read_model(file).get_friendly_name() == "g"
    with pytest.raises(Exception, match="can't be parsed"):
        read(file)


def fill(name: str) -> list[onnx.NodeProto]:
    """Operations that fill a tensor with as many zeros as the input's shape times ``k`` says."""
    return [
        helper.make_node("Shape", ["input"], ["s"]),
        helper.make_node("Mul", ["s", "k"], ["m"]),
        helper.make_node("ConstantOfShape", ["m"], ["f"]),
        helper.make_node("ReduceMax", ["f", "axes"], [name], keepdims=0),
    ]


def branch(name: str) -> onnx.GraphProto:
    result = helper.make_tensor_value_info(name, FLOAT, [1, 3])
    return helper.make_graph(fill(name), name, [], [result])


def body() -> onnx.GraphProto:
    given = [helper.make_tensor_value_info("i", TensorProto.INT64, [])]
    given += [helper.make_tensor_value_info("go", TensorProto.BOOL, [])]
    given += [helper.make_tensor_value_info("v", FLOAT, [1, 3])]
    again = helper.make_tensor_value_info("again", TensorProto.BOOL, [])
    nodes = [helper.make_node("Identity", ["go"], ["again"]), *fill("filled")]
    return helper.make_graph(
        nodes, "body", given, [again, helper.make_tensor_value_info("filled", FLOAT, [1, 3])]
    )


PERHAPS_LARGE = {
    "in a branch": [
        helper.make_node("ReduceMax", ["input"], ["most"], keepdims=0),
        helper.make_node("Cast", ["most"], ["c"], to=TensorProto.BOOL),
        helper.make_node("If", ["c"], ["logits"], then_branch=branch("x"), else_branch=branch("y")),
    ],
    "in a loop": [
        helper.make_node("ReduceMax", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("Loop", ["one", "", "mean"], ["logits"], body=body()),
    ],
    "padding, several times": [
        helper.make_node("Pad", ["input", "p"], ["a"]),
        helper.make_node("Pad", ["a", "p"], ["b"]),
        helper.make_node("ReduceMax", ["b", "axes"], ["logits"], keepdims=0),
    ],
    "strides, several times": [
        helper.make_node("ConvTranspose", ["input", "w"], ["a"], strides=[60, 60]),
        helper.make_node("ConvTranspose", ["a", "w"], ["b"], strides=[60, 60]),
        helper.make_node("ReduceMax", ["b", "axes"], ["logits"], keepdims=0),
    ],
}
"""Operations of which each asks for little, and all together for much."""


@pytest.mark.parametrize("name", PERHAPS_LARGE)
def test_openvino_refuses_what_it_infers_to_be_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before it computes anything, as the rewriting of a graph does."""
    rewriting = pytest.importorskip("cmt_edge.deploy.backends.openvino_graph")
    monkeypatch.setattr(rewriting, "make_unsigned", lambda _: pytest.fail("it was rewritten"))
    constants = (
        whole("k", 1, 1, 4000, 4000),
        numpy_helper.from_array(np.array(1, np.int64), "one"),
        whole("p", 0, 0, 4000, 4000, 0, 0, 4000, 4000),
        numpy_helper.from_array(np.ones((3, 3, 1, 1), np.float32), "w"),
        whole("axes", 2, 3),
    )
    content = graph(PERHAPS_LARGE[name], *constants)
    require_modest(content)
    bundle = make_bundle(tmp_path / "b", members={ONNX: content})
    with pytest.raises(BundleError, match="asks for more than a graph may") as found:
        Predictor.load(bundle.path, backend="openvino")
    assert "elements" in str(found.value.why)


def encode_length(content: bytes) -> bytes:
    """Protobuf's way to write bytes: their number in groups of seven bits, then themselves."""
    size, head = len(content), b""
    while size > 0x7F:
        head += bytes([size & 0x7F | 0x80])
        size >>= 7
    return head + bytes([size]) + content


@pytest.mark.parametrize(("cap", "value"), [("MAX_NODES", 1), ("MAX_FIELDS", 20), ("MAX_GRAPH", 10)])
def test_caps_on_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cap: str, value: int) -> None:
    (tmp_path / ONNX).write_bytes(tiny_graph())
    onnx_caps.require_modest_onnx(tmp_path / ONNX)
    monkeypatch.setattr(onnx_caps, cap, value)
    with pytest.raises(ExcessiveGraph):
        onnx_caps.require_modest_onnx(tmp_path / ONNX)


def test_a_hostile_graph_ends_before_a_runtime_opens_it(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b")
    content = graph([FILL], whole("sizes", BIG, BIG))
    with pytest.raises(BundleError, match=r"model\.onnx asks for more than a graph may") as found:
        open_made(tmp_path / "c", members={ONNX: content})
    assert str(MAX_MADE) in str(found.value)
    assert Bundle.open(bundle.path)


def test_the_walk_takes_little_memory() -> None:
    content = graph([], numpy_helper.from_array(np.zeros(4 << 20, np.float32), "w"))
    tracemalloc.start()
    try:
        require_modest(content)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["model.onnx", "more.ONNX"])
@pytest.mark.parametrize("place", [".cache/w.bin", "engines/w.bin", "openvino.bin"])
def test_weights_that_no_hash_covers_are_never_read(tmp_path: Path, name: str, place: str) -> None:
    model = onnx.load_from_string(tiny_graph())
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    with pytest.raises(BundleError, match="stores weights outside"):
        open_made(
            tmp_path / "b",
            format="openvino",
            members={name: model.SerializeToString(), "openvino.bin": data},
        )


def test_a_graph_in_a_format_of_openvino_is_not_read(tmp_path: Path) -> None:
    """Only ``model.onnx`` is: a runtime chooses a reader by the content of the file that it is given."""
    found = open_made(
        tmp_path / "b",
        format="openvino",
        members={"openvino.xml": b"<net/>", "openvino.bin": b""},
    )
    with Predictor.load(found.path) as predictor:
        assert predictor.logits(np.zeros((1, 3, SIZE, SIZE), np.float32)).shape == (1, 3)


# --- what a manifest may name ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fake", "torch", "tensorrt", "onnxruntime", ""])
def test_no_manifest_chooses_a_runtime_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(BundleError, match="expected 'onnx' or 'openvino' or 'trt'") as found:
        open_made(tmp_path / "b", format=name)
    assert "or 'fake'" not in str(found.value)


def test_what_a_manifest_calls_its_runtime_decides_nothing(tmp_path: Path) -> None:
    with Predictor.load(make_bundle(tmp_path / "b").path) as predictor:
        assert predictor.info.runtime.startswith("onnxruntime ")


@pytest.mark.parametrize("batch", [1 << 24, 1 << 21])
def test_an_input_that_no_machine_holds_is_refused(tmp_path: Path, batch: int) -> None:
    made = tiny_manifest()
    shape, logits = (batch, 3, SIZE, SIZE), (batch, 3)
    with pytest.raises(BundleError, match="elements, the cap is"):
        open_made(
            tmp_path / "b",
            input=replace(made.input, shape=shape),
            outputs=(replace(made.outputs[0], shape=logits),),
        )
