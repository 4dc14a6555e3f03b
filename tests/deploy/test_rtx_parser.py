"""Our rules of the parser against NVIDIA's real one: TensorRT for RTX parses and builds without a GPU."""

from __future__ import annotations

import onnx
import pytest

from cmt_edge.deploy.bundle import ONNX
from cmt_edge.deploy.errors import StepError
from cmt_edge.deploy.tensorrt.kernels import read_kernels
from cmt_edge.deploy.tensorrt.parser_rules import ACCEPTED_BY_RTX, SUPPORTED
from helpers.nvidia_names import RECEIVERS, RTX_RECEIVERS, find_module, list_uses
from helpers.parser_graphs import BROKEN, BROKEN_FOR_RTX
from helpers.rtx_parser import needs_rtx, parse_all
from helpers.trt import build_portable, trt_bundle

pytestmark = needs_rtx

SCHEMAS = onnx.defs.get_all_schemas_with_history()
WORDS = {
    "no such operation": "false",
    "zero point is not 0": "Non-zero zero point",
    "scale is not positive": "must all be positive",
    "axes must be constant": "must resolve to a build-time constant",
    "inputs from the 2. on must be constant": "symbolic execution",
    "only the first output": "outputs for LayerNormalization",
    "reads float32 and float16 at once": "must have same input types",
    "dilations must be 1": "dilations other than 1",
    "antialias must be 0": "Antialiasing is not supported",
    "keep_aspect_ratio_policy must be stretch": "Only `stretch` is supported",
    "coordinate_transformation_mode must be": "TensorRT only supports half_pixel",
    "reduction must be none": "ScatterND with reduction is not supported",
    "training_mode must be 0": "does not support training_mode == 1",
    "multiplies matrices of whole numbers": "unsupported input type of INT64",
    "more than 8": "Number of dimensions (9)",
    "p must be 1 or 2": "Only L1 and L2 normalization",
    "without fmod": "The fmod attribute is set to 0",
    "n3 (Celu): reads float16": "The rank of operands should be the same",
    "n3 (Range): reads float16": "only supports int32, int64, and float input types for Range",
    "its inputs from the 3. on must be constant": "training_mode input as an initializer",
    "is in training mode": "Dropout operator in training mode",
    "input 2 must be constant": "Invalid Node",
    "b0 (MaxPool): only the first output": "outputs for MaxPool",
    "b1 (Add): reads float32 and float16 at once": "must have same input types",
}
"""Rule that the real parser has too -> part of its message."""
WORDS_OF_RTX = {
    "reduction must be none": "Unsupported reduction type",
    "(NonZero)": "NonZero plugin creator version 1 was not found",
    "(RoiAlign)": "ROIAlign plugin was not found",
    "(NonMaxSuppression)": "has no runners that implement it",
    "(DeformConv)": "Plugin not found",
}
"""The same for what TensorRT for RTX alone does not run; its parser or its builder says so."""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What the real parser and builder make of each graph that breaks one of our rules."""
    known = {schema.name for schema in SCHEMAS if schema.domain == ""}
    graphs = BROKEN | {f"RTX: {rule}": graph for rule, graph in BROKEN_FOR_RTX.items()}
    return parse_all(tmp_path_factory.mktemp("graphs"), graphs, sorted(SUPPORTED | known))


@pytest.mark.parametrize("rule", WORDS)
def test_the_real_parser_refuses_it_too(verdicts, rule):
    verdict = verdicts[rule]
    assert not verdict["parsed"]
    assert WORDS[rule] in " ".join(verdict["errors"])


@pytest.mark.parametrize("rule", BROKEN_FOR_RTX)
def test_what_it_alone_refuses(verdicts, rule):
    verdict = verdicts[f"RTX: {rule}"]
    assert not verdict["built"]
    assert WORDS_OF_RTX[rule] in " ".join(verdict["errors"] + verdict["log"])


@pytest.mark.parametrize("rule", ACCEPTED_BY_RTX)
def test_what_it_accepts_has_another_reason(verdicts, rule):
    assert verdicts[rule]["built"], "the real parser refuses it now: move the rule to WORDS"


def test_every_rule_was_tried():
    assert set(WORDS) | set(ACCEPTED_BY_RTX) == set(BROKEN)
    assert not set(WORDS) & set(ACCEPTED_BY_RTX)


def test_the_operations_are_those_of_the_real_parser(verdicts):
    """Deformable convs are a plugin of TensorRT; windows and the STFT came after 10.3."""
    real = set(verdicts["operators"])
    old = {schema.name for schema in SCHEMAS if schema.domain == "" and schema.since_version <= 20}
    assert SUPPORTED - real == {"DeformConv"}
    assert real & old - SUPPORTED == {"BlackmanWindow", "HammingWindow", "HannWindow", "STFT"}


def test_every_name_we_use_is_in_the_real_module(verdicts):
    """Of the builder and of the session, which needs a GPU to run."""
    classes = verdicts["classes"]
    checked = 0
    for expression, name in list_uses():
        receiver = find_module(expression)
        owner = (RECEIVERS | RTX_RECEIVERS).get(receiver)
        if receiver == "trt":
            assert name in classes or name == "__version__", name
        elif receiver.startswith("trt.") and receiver != "trt.Logger.Severity":
            owner = receiver.split(".")[1]
        if owner is not None:
            checked += 1
            assert name in classes[owner], f"{owner}.{name}"
    assert checked > 40


# --- the real builder -----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, "batch"])
@pytest.mark.parametrize("half", [True, False])
def test_a_real_engine_without_a_gpu(tmp_path, batch, half):
    bundle = trt_bundle(tmp_path / "b", format="rtx", batch=batch, half=half)
    made = build_portable(bundle)
    assert len(made.plan) > 1000
    kernels = read_kernels(made.layers)
    nodes = {node for kernel in kernels for node in kernel.nodes}
    assert {"pool", "head"} <= nodes
    assert ("fp16" in " ".join(kernel.types for kernel in kernels)) == half


def test_engines_for_named_gpus_differ(tmp_path):
    bundle = trt_bundle(tmp_path / "b", format="rtx")
    plans = [build_portable(bundle, compute=compute).plan for compute in ((), ("SM86",), ("SM89", "SM120"))]
    assert len(set(plans)) == 3


@pytest.mark.parametrize("rule", ["zero point is not 0", "reads float32 and float16 at once"])
def test_a_broken_graph_is_a_typed_error_with_the_real_words(tmp_path, rule):
    content = BROKEN[rule].SerializeToString()
    bundle = trt_bundle(tmp_path / "b", format="rtx", batch="batch", members={ONNX: content})
    with pytest.raises(StepError, match="parser refused") as error:
        build_portable(bundle)
    assert WORDS[rule] in error.value.why


def test_too_little_memory_is_a_typed_error(tmp_path, monkeypatch):
    monkeypatch.setattr("cmt_edge.deploy.tensorrt.building.read_available_memory", lambda root: 8 << 20)
    with pytest.raises(StepError) as error:
        build_portable(trt_bundle(tmp_path / "b", format="rtx"))
    assert error.value.remedy
