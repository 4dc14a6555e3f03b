"""A manifest whose hashes agree may still be wrong: values may be impossible, and entries may contradict each
other or the graph. Each fault is one :class:`BundleError`; nothing is answered in silence."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import MANIFEST, ONNX
from cmt_edge.deploy.bundle.manifest import hash_content
from cmt_edge.deploy.bundle.sections import TensorEntry
from cmt_edge.deploy.cli.predict import main as predict
from cmt_edge.deploy.errors import BundleError
from helpers.bundles import SIZE, make_bundle
from helpers.trees import list_places
from helpers.trt import tiny_graph

RED = np.zeros((SIZE, SIZE, 3), np.uint8)
RED[..., 0] = 255
NAN = float("nan")
HUGE = "x" * 3_000_000


def onnx_bundle(target: Path, batch: int | str = 1) -> Bundle:
    """A bundle whose graph ONNX Runtime runs."""
    return make_bundle(
        target,
        members={ONNX: tiny_graph(batch, half=False).SerializeToString()},
        format="onnx",
        input=TensorEntry(name="input", shape=(batch, 3, SIZE, SIZE), dtype="float32"),
        outputs=(TensorEntry(name="logits", shape=(batch, 3), dtype="float32"),),
    )


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Bundle:
    """Is copied before it is changed."""
    return onnx_bundle(tmp_path_factory.mktemp("kept") / "tiny")


@pytest.fixture
def bundle(kept, tmp_path) -> Bundle:
    shutil.copytree(kept.path, tmp_path / "tiny")
    return Bundle(tmp_path / "tiny", kept.manifest)


def content_of(bundle: Bundle) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((bundle.path / MANIFEST).read_text())
    return content


def write(bundle: Bundle, content: Any) -> None:
    """A manifest whose checksum is right."""
    if isinstance(content, dict):
        content = content | {"checksum": hash_content(content)}
    (bundle.path / MANIFEST).write_text(json.dumps(content))


def put(content: Any, path: str, value: Any) -> None:
    """Set the entry at ``path``, whose parts are keys and numbers of items; after a backslash a key may hold
    slashes."""
    above, _, name = path.rpartition("\\")
    *way, last = [int(part) if part.isdigit() else part for part in (above or name).split("/")]
    for part in way:
        content = content[part]
    if above:
        content[last][name] = value
    else:
        content[last] = value


def answer(bundle: Bundle) -> np.ndarray:
    """The logits of a red image."""
    with Predictor.load(bundle.path, threads=1) as predictor:
        return predictor(RED).logits


def test_the_bundle_is_right_as_it_is(bundle):
    write(bundle, content_of(bundle))
    assert answer(bundle).argmax() == 0


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown head": (
        {"model/head": "boxes"},
        "model.head is 'boxes', expected 'logits' or 'features'",
    ),
    "another head": (
        {"model/head": "features"},
        "model.head is 'features', but the outputs are 'logits'",
    ),
    "an unknown precision": (
        {"precision": "fp8"},
        "precision is 'fp8', expected 'fp32' or 'fp16' or 'bf16' or 'int8'",
    ),
    "a precision to ask for": ({"precision": "auto"}, "precision is 'auto'"),
    "one of another format": (
        {"precision": "bf16"},
        "precision is 'bf16', expected 'fp32' or 'int8' in a bundle of format 'onnx'",
    ),
    "an unknown format": (
        {"format": "tflite"},
        "format is 'tflite', expected 'onnx' or 'openvino' or 'trt'",
    ),
    "a path as format": ({"format": "../onnx"}, "format is '../onnx'"),
    "an input of another type": (
        {"input/dtype": "float16"},
        "input.dtype is 'float16', expected 'float32'",
    ),
    "an output of another": ({"outputs/0/dtype": "int64"}, "outputs[0].dtype is 'int64'"),
    "a source of labels": ({"labels_source": "guessed"}, "labels_source is 'guessed'"),
    "a batch of -1": (
        {"input/shape/0": -1},
        "input.shape[0] is -1, expected 1 to 16777216",
    ),
    "a batch of 0": ({"input/shape/0": 0}, "input.shape[0] is 0"),
    "a batch of a billion": ({"input/shape/0": 10**9}, "input.shape[0] is 1000000000"),
    "a batch of another name": ({"input/shape/0": "N"}, "input.shape[0] is 'N', expected 'batch'"),
    "a batch of true": (
        {"input/shape/0": True},
        "input.shape[0] is true, expected a whole number or text",
    ),
    "a dynamic size": (
        {"input/shape/2": "batch"},
        "the manifest's input is not one of images of 16 pixels",
    ),
    "batches that differ": (
        {"outputs/0/shape/0": 2},
        "output 'logits' has a batch of 2, but the input one of 1",
    ),
    "dynamic classes": (
        {"outputs/0/shape/1": "batch"},
        "output 'logits' has two dynamic dimensions",
    ),
    "no shape": ({"outputs/0/shape": []}, "has no shape"),
    "a shape of one number": ({"input/shape": [1]}, "not one of images"),
    "no output": ({"outputs": []}, "the manifest names no output"),
    "two outputs of a name": (
        {"outputs": [{"name": "logits", "shape": [1, 3], "dtype": "float32"}] * 2},
        "two outputs have the same name",
    ),
    "logits of three axes": (
        {"outputs/0/shape": [1, 1, 3]},
        "the logits are not one row an image",
    ),
    "another size": (
        {"model/img_size": 32},
        "preprocess.size is 16, but model.img_size is 32",
    ),
    "another size prepared": (
        {"preprocess/size": 32},
        "preprocess.size is 32, but model.img_size is 16",
    ),
    "no class": (
        {"model/num_classes": 0},
        "model.num_classes is 0, but there are 3 labels",
    ),
    "more classes than labels": (
        {"model/num_classes": 10},
        "model.num_classes is 10, but there are 3 labels",
    ),
    "a label less": (
        {"labels": [["a", "a"], ["b", "b"]]},
        "labels are not one [id, name] pair a logit",
    ),
    "a label more": (
        {"labels": [["a", "a"]] * 4},
        "labels are not one [id, name] pair a logit",
    ),
    "a label of a number": ({"labels/0/1": 5}, "labels[0][1] is 5, expected text"),
    "a label of megabytes": ({"labels/0/1": HUGE}, "expected text of at most 65536 characters"),
    "a mean beyond floats": (
        {"preprocess/mean": [1e308] * 3},
        "preprocess.mean[0] is 1e+308, expected -10 to 10",
    ),
    "a mean of 0 to 255": (
        {"preprocess/mean/2": 103.5},
        "preprocess.mean[2] is 103.5, expected -10 to 10",
    ),
    "a mean of nothing": (
        {"preprocess/mean/1": NAN},
        "preprocess.mean[1] is nan, expected a finite number",
    ),
    "a mean of two": (
        {"preprocess/mean": [0, 0]},
        "preprocess.mean is a list of 2 items, expected 3 items",
    ),
    "a mean of words": ({"preprocess/mean": ["a", "b", "c"]}, "preprocess.mean[0] is 'a'"),
    "an infinite mean": ({"preprocess/mean/0": float("inf")}, "preprocess.mean[0] is inf"),
    "a deviation of 0": (
        {"preprocess/std/2": 0},
        "preprocess.std[2] is 0, expected 0.0001 to 100",
    ),
    "a negative deviation": ({"preprocess/std/0": -1}, "preprocess.std[0] is -1"),
    "a tiny deviation": ({"preprocess/std/0": 1e-308}, "preprocess.std[0] is 1e-308"),
    "a deviation of nothing": ({"preprocess/std/0": NAN}, "preprocess.std[0] is nan"),
    "a deviation of 0 to 255": ({"preprocess/std/0": 58e10}, "preprocess.std[0] is 5.8e+11"),
    "a size of 0": (
        {"preprocess/size": 0},
        "preprocess.size is 0, expected 1 to 16384",
    ),
    "a negative size": ({"preprocess/size": -8}, "preprocess.size is -8"),
    "a gigantic size": (
        {"preprocess/size": 10**6, "model/img_size": 10**6},
        "preprocess.size is 1000000",
    ),
    "an infinite size": ({"preprocess/size": float("inf")}, "preprocess.size is inf"),
    "a size of null": ({"preprocess/size": None}, "preprocess.size is null"),
    "a short side too small": (
        {"preprocess/short_side": 15},
        "preprocess.short_side is 15, expected 16 to 32768",
    ),
    "a gigantic short side": (
        {"preprocess/short_side": 10**6},
        "preprocess.short_side is 1000000",
    ),
    "an EXIF policy": (
        {"preprocess/exif": "maybe"},
        "preprocess.exif is 'maybe', expected 'apply' or 'ignore'",
    ),
    "an EXIF list": ({"preprocess/exif": []}, "preprocess.exif is an empty list"),
    "an interpolation": (
        {"preprocess/interpolation": "lanczos"},
        "preprocess.interpolation is 'lanczos', expected 'bicubic' or 'bilinear'",
    ),
    "an interpolation list": (
        {"preprocess/interpolation": []},
        "preprocess.interpolation is an empty list, expected text",
    ),
    "no preprocessing": ({"preprocess": None}, "preprocess is null, expected an object"),
    "an empty preprocessing": ({"preprocess": {}}, "preprocess lacks entries"),
    "a list of preprocessing": ({"preprocess": []}, "preprocess is an empty list"),
    "huge parameters": (
        {"model/params": 10**400},
        "model.params is a huge number, expected a whole number of at most 64 bits",
    ),
    "a count of true": (
        {"model/params": True},
        "model.params is true, expected a whole number",
    ),
    "a fraction of opsets": ({"model/opset": 20.0}, "model.opset is 20.0"),
    "a name of megabytes": ({"model/name": HUGE}, "model.name is 'xxxx"),
    "a wrong nesting": ({"model": [{}]}, "model is a list of 1 items, expected an object"),
    "a nesting too deep": (
        {"model/weights": {"weights": {}}},
        "model.weights holds unknown entries: 'weights'",
    ),
    "null for the model": ({"model": None}, "model is null"),
    "a negative latency": ({"latency": {"p50_ms": -1}}, "latency"),
    "an engine that is none": ({"engine": {}}, "engine lacks entries"),
    "a kind of output": ({"outputs/0/kind": "distances"}, "outputs[0].kind is 'distances'"),
    "files of null": ({"files": None}, "files is null"),
    "a file's name": (
        {"files/\0": {"size": 1, "sha256": "0" * 64}},
        "files names a file outside the bundle, or one that cannot be: '\\x00'",
    ),
    "a file's long path": (
        {"files\\" + "/".join(["n" * 200] * 20): {"size": 1, "sha256": "0" * 64}},
        "files names a file outside the bundle",
    ),
    "a file above": ({"files\\../model.onnx": {"size": 1, "sha256": "0" * 64}}, "files names a file outside"),
    "a file's long name": (
        {"files/" + "n" * 5000: {"size": 1, "sha256": "0" * 64}},
        "files names a file outside the bundle, or one that cannot be: 'nnnn",
    ),
    "an unknown long entry": ({HUGE: 1}, "the manifest holds unknown entries: 'xxxx"),
    "a schema of text": ({"schema": "2"}, "manifest schema '2' is not supported"),
    "a schema of a long text": ({"schema": HUGE}, f"manifest schema '{HUGE[:39]}... is not supported"),
    "a schema of many entries": (
        {"schema": [7] * 9000},
        f"manifest schema [{'7, ' * 13}... is not supported",
    ),
    "a schema of a fraction": ({"schema": 2.0}, "schema is 2.0, expected a whole number"),
}
"""What is wrong: the entries that are changed, and what the message says."""


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_manifest_is_one_error(bundle, changes, message):
    content = content_of(bundle)
    for path, value in changes.items():
        put(content, path, value)
    write(bundle, content)
    with pytest.raises(BundleError) as caught:
        Predictor.load(bundle.path)
    assert message in caught.value.what
    assert caught.value.exit_code == 2
    assert caught.value.where == str(bundle.path / MANIFEST)
    assert caught.value.remedy
    assert len(str(caught.value)) < 700


def test_a_command_ends_with_2(bundle, capsys, tmp_path):
    content = content_of(bundle)
    put(content, "preprocess/mean", [1e308] * 3)
    write(bundle, content)
    (tmp_path / "red.png").write_bytes(bundle.golden().sources[0])
    assert predict([str(bundle.path), str(tmp_path / "red.png")]) == 2
    assert "preprocess.mean[0] is 1e+308" in capsys.readouterr().err


# --- the graph --------------------------------------------------------------------------------------

CONTRADICTED: dict[str, tuple[dict[str, Any], str]] = {
    "another name of the input": (
        {"input/name": "pixels"},
        "the graph has input float32 (1, 3, 16, 16); the manifest says pixels float32 (1, 3, 16, 16)",
    ),
    "another size": (
        {"model/img_size": 32, "preprocess/size": 32, "input/shape": [1, 3, 32, 32]},
        "the graph has input float32 (1, 3, 16, 16); the manifest says input float32 (1, 3, 32, 32)",
    ),
    "another batch": (
        {"input/shape/0": 4, "outputs/0/shape/0": 4},
        "the graph has input float32 (1, 3, 16, 16); the manifest says input float32 (4, 3, 16, 16)",
    ),
    "a dynamic batch": (
        {"input/shape/0": "batch", "outputs/0/shape/0": "batch"},
        "the manifest says input float32 (batch, 3, 16, 16)",
    ),
    "another number of classes": (
        {"outputs/0/shape/1": 2, "labels": [["a", "a"], ["b", "b"]], "model/num_classes": 2},
        "the graph has logits float32 (1, 3); the manifest says logits float32 (1, 2)",
    ),
    "another head": (
        {
            "model/head": "features",
            "outputs": [{"name": "stage1", "shape": [1, 3], "dtype": "float32"}],
            "labels": [],
        },
        "the graph has logits float32 (1, 3); the manifest says stage1 float32 (1, 3)",
    ),
    "another output": (
        {
            "model/head": "features",
            "outputs": [{"name": f"stage{i}", "shape": [1, 3], "dtype": "float32"} for i in range(9)],
            "labels": [],
        },
        "stage4 float32 (1, 3) and 4 more",
    ),
}
"""What a manifest says that its graph does not, and what the message says."""


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("changes", "message"), CONTRADICTED.values(), ids=CONTRADICTED.keys())
def test_a_graph_that_is_another(bundle, changes, message, backend):
    content = content_of(bundle)
    for path, value in changes.items():
        put(content, path, value)
    write(bundle, content)
    Bundle.open(bundle.path)  # every entry is possible
    with pytest.raises(BundleError, match=r"the graph's .* not what the manifest says") as caught:
        Predictor.load(bundle.path, backend=backend)
    assert message in caught.value.why
    assert caught.value.where == str(bundle.path / ONNX)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_dynamic_graph_is_not_a_fixed_one(tmp_path, backend):
    dynamic = onnx_bundle(tmp_path / "dynamic", "batch")
    Predictor.load(dynamic, backend=backend).close()
    content = content_of(dynamic)
    put(content, "input/shape/0", 1)
    put(content, "outputs/0/shape/0", 1)
    write(dynamic, content)
    with pytest.raises(BundleError, match="the graph's input is not what the manifest says"):
        Predictor.load(dynamic.path, backend=backend)


# --- random changes ---------------------------------------------------------------------------------

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([0, -1, 1, 2, 3, 16, 2**31, 2**63, 10**9, 10**400])
    | st.sampled_from(["", "..", "logits", "features", "batch", "fp32", "int8", "onnx", "\ud800", "0" * 64])
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
MEANING = ("preprocess", "precision", "format")
"""Entries that say how a graph is fed and run: another possible value gives another answer."""


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_changed_manifest_is_refused_or_answers_as_before(kept, bundle, data):
    """The checksum is made right, as only somebody would who changes the manifest on purpose."""
    original = content_of(kept)
    changed = copy.deepcopy(original)
    for _ in range(data.draw(st.integers(1, 3))):
        ways = list_places(changed)
        *above, last = data.draw(st.sampled_from(ways)) if ways else ("surprise",)
        holder: Any = changed
        for part in above:
            holder = holder[part]
        holder[last] = data.draw(values)
    write(bundle, changed)
    result = answer_or_refusal(bundle)
    if isinstance(result, BundleError):
        assert result.exit_code == 2
        assert result.remedy
        assert str(result).encode()
    elif all(changed.get(name) == original[name] for name in MEANING):
        np.testing.assert_array_equal(result, answer(kept))
    else:
        assert np.isfinite(result).all()


def answer_or_refusal(bundle: Bundle) -> np.ndarray | BundleError:
    """The logits of a red image, or the error where the bundle cannot be opened."""
    try:
        opened = Bundle.open(bundle.path)
        with Predictor.load(opened, backend="onnxruntime", threads=1) as predictor:
            return predictor(RED).logits
    except BundleError as error:
        return error
