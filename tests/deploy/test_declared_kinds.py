"""A bundle that says it gives probabilities must give some: in every answer, and in its golden outputs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import ONNX, Golden
from cmt_edge.deploy.bundle.sections import TensorEntry
from cmt_edge.deploy.cli import predict as cmt_predict
from cmt_edge.deploy.cli import verify as cmt_verify
from cmt_edge.deploy.errors import BundleError
from cmt_edge.deploy.values import PROBABILITY_ROUNDING, require_kind
from helpers.bundles import LABELS, SIZE, make_bundle, tiny_golden, tiny_graph

IMAGE = np.full((SIZE, SIZE, 3), (255, 0, 0), np.uint8)


def bundle_of(target: Path, kind: str | None, operation: str | None = None) -> Bundle:
    """A bundle whose outputs have a ``kind``; ``operation`` ends its graph."""
    graph, golden = onnx.load_from_string(tiny_graph()), tiny_golden()
    logits = golden.logits
    if operation is not None:
        graph.graph.node[-1].output[:] = ["raw"]
        graph.graph.node.append(onnx.helper.make_node(operation, ["raw"], ["logits"], "last"))
        powers = np.exp(logits)
        divisors = {"Softmax": powers.sum(axis=1, keepdims=True), "Sigmoid": 1 + powers, "Exp": 1}
        logits = powers / divisors[operation]
    output = TensorEntry(name="logits", shape=(1, len(LABELS)), dtype="float32", kind=kind)
    return make_bundle(
        target,
        golden=Golden(golden.sources, golden.pixels, [logits.astype(np.float32)]),
        members={ONNX: graph.SerializeToString()},
        outputs=(output,),
    )


@pytest.mark.parametrize(
    ("kind", "operation"),
    [("probabilities", "Exp"), ("scores", "Exp"), ("probabilities", "Sigmoid")],
)
def test_what_is_no_probability_is_refused(tmp_path: Path, call, kind: str, operation: str | None) -> None:
    bundle = bundle_of(tmp_path / "b", kind, operation)
    with Predictor.load(bundle.path) as predictor:
        for attempt in (
            lambda: predictor(IMAGE),
            lambda: predictor.predict([IMAGE, IMAGE]),
            lambda: list(predictor.attempt([IMAGE])),
            lambda: predictor.logits(predictor.prepare([IMAGE])),
        ):
            with pytest.raises(BundleError, match=f"says that the model gives {kind}"):
                attempt()
    code, out, err = call(cmt_verify.main, bundle.path)
    assert (code, out) == (2, "")
    assert f"says that the model gives {kind}" in err
    source = tmp_path / "image.png"
    source.write_bytes(bundle.golden().sources[0])
    code, out, err = call(cmt_predict.main, bundle.path, source)
    assert (code, out) == (2, "")
    assert "remedy" in err


@pytest.mark.parametrize(
    ("kind", "operation"),
    [("probabilities", "Softmax"), ("scores", "Sigmoid"), ("scores", "Softmax"), (None, None)],
)
def test_what_is_as_declared_is_answered(
    tmp_path: Path, call, kind: str | None, operation: str | None
) -> None:
    bundle = bundle_of(tmp_path / "b", kind, operation)
    with Predictor.load(bundle.path) as predictor:
        assert predictor(IMAGE).kind == (kind or "logits")
        predictor.logits(predictor.prepare([IMAGE]))
    assert call(cmt_verify.main, bundle.path)[0] == 0


def test_golden_outputs_that_are_no_probabilities(tmp_path: Path, call) -> None:
    bundle = bundle_of(tmp_path / "b", "probabilities", "Softmax")
    golden = bundle.golden()
    changed = Golden(golden.sources, golden.pixels, [golden.logits * 1.02])
    members = {ONNX: bundle.file(ONNX).read_bytes()}
    other = make_bundle(tmp_path / "o", golden=changed, members=members, outputs=bundle.manifest.outputs)
    code, _, err = call(cmt_verify.main, other.path, "--atol", 1)
    assert (code, "sum to 1.02" in err) == (2, True), err


@pytest.mark.parametrize("kind", ["probabilities", "scores"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_is_no_fault(kind: str, dtype: str) -> None:
    """Of 1000 classes, by a model that rounds its own probabilities down."""
    rng = np.random.default_rng(0)
    powers = np.exp(rng.normal(0, 3, (64, 1000)))
    values = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    if dtype == "float16":
        values = values.astype(np.float16).astype(np.float32)
    else:
        values = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    require_kind(values, kind, None)


@pytest.mark.parametrize("share", [0.5, 2.0])
@pytest.mark.parametrize("sign", [-1, 1])
def test_how_far_off_is_too_far(share: float, sign: int) -> None:
    off = sign * share * PROBABILITY_ROUNDING
    values = np.array([[0.25, 0.75 + off]], np.float32)
    low_or_high = np.array([[0.5, off if sign < 0 else 1 + off]], np.float32)
    if share < 1:
        require_kind(values, "probabilities", None)
        require_kind(low_or_high, "scores", None)
        return
    with pytest.raises(BundleError, match="sum to"):
        require_kind(values, "probabilities", None)
    with pytest.raises(BundleError, match="lie between"):
        require_kind(low_or_high, "scores", None)
