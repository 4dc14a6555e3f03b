"""The blocks of a bundle against PyTorch: a damaged block is named, int8 is farther off than fp32, the names
are the model's own, and what cannot be compared is refused or said."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cmt_edge.deploy import report
from cmt_edge.deploy.bundle import ONNX
from cmt_edge.deploy.bundle.sections import LAST, MAP, SAME, TOKENS, LayerError, LayerRun
from cmt_edge.deploy.cli.verify import main
from cmt_edge.deploy.errors import BundleError, InputError, RuntimeMissingError
from cmt_edge.deploy.measure.layers import THRESHOLDS, compare_layers
from cmt_edge.deploy.measure.layouts import FARTHEST, Distance, find_layouts, restore_layout
from helpers.bundles import copy_bundle

DAMAGED = "stages.1.blocks.1"
"""The block whose weights a test damages."""


def damage(folder):
    """Enlarge the last weights of one block by half."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(folder / ONNX)
    name = f"{DAMAGED}.ffn.project.weight"
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(tensor), name))
    onnx.save(model, folder / ONNX)


def move_place(bundle, name, /, **changes):
    """The places of the blocks, one of them changed."""
    return tuple(replace(p, **changes) if p.name == name else p for p in bundle.manifest.blocks)


def compare_quickly(*bundles, **settings):
    return compare_layers(bundles, backend="onnxruntime", limit=2, **settings)


def test_every_block_of_a_float_bundle_is_the_models_own(fp32_bundle):
    from cmt_edge.cmt import create_model

    seen = []
    found = compare_quickly(fp32_bundle, progress=lambda *done: seen.append(done))
    names = [error.name for error in found.errors]
    assert set(names) <= {name for name, _ in create_model("cmt_nano").named_modules()}
    assert {"stem.0", "stem.2", "stages.0.embed", "stages.2.blocks.3", "head"} <= set(names)
    assert len(set(names)) == len(names) == 22
    assert all(error.relative_error < 1e-5 and error.cosine > 0.999999 for error in found.errors)
    assert all(error.relative_error <= error.worst and error.images == 2 for error in found.errors)
    (run,) = found.runs
    assert (run.first, run.moved, run.hidden) == (None, 0.0, {})
    assert run.output == run.watched > 0
    assert seen == [(1, 2), (2, 2)]


def test_a_damaged_block_is_the_first_beyond_the_threshold(fp32_bundle, tmp_path):
    damaged = copy_bundle(fp32_bundle, tmp_path / "damaged", damage)
    found = compare_quickly(damaged)
    names = [error.name for error in found.errors]
    before = found.errors[: names.index(DAMAGED)]
    assert found.runs[0].first == DAMAGED
    assert all(error.relative_error < 1e-5 for error in before)
    assert compare_quickly(damaged, threshold=1e6).runs[0].first is None
    text = report.describe_layers(found.errors, found.runs)
    assert f"the error is first beyond 0.001 in {DAMAGED} (" in text


def test_int8_is_farther_off_than_fp32_and_alike_on_both_runtimes(int8_bundle, fp32_bundle):
    """Convs without padding are rewritten for OpenVINO: their tensors must be those of the graph all the
    same."""
    found = compare_layers([int8_bundle, fp32_bundle], limit=2)
    sides = [(run.precision, run.backend) for run in found.runs]
    assert sides == [(p, b) for p in ("int8", "fp32") for b in ("openvino", "onnxruntime")]
    errors = {side: {} for side in sides}
    for error in found.errors:
        errors[error.precision, error.backend][error.name] = error.relative_error
    openvino, here, single, plain = errors.values()
    deep = [name for name in plain if name.startswith("stages")]
    assert all(here[name] > 10 * plain[name] for name in deep)
    assert all(openvino[name] < 3 * here[name] + 0.01 for name in here)
    assert all(single[name] < 1e-4 for name in plain)
    assert all(run.first is None for run in found.runs)
    assert [run.moved for run in found.runs if run.backend == "onnxruntime"] == [0.0, 0.0]


def test_a_graph_without_names_is_refused(fp32_bundle, tmp_path, fails):
    bundle = copy_bundle(fp32_bundle, tmp_path / "nameless", blocks=None)
    with pytest.raises(InputError, match="does not say which tensors"):
        compare_quickly(bundle)
    assert "export it again" in fails(2, main, bundle.path, "--layers", "--backend", "onnxruntime", "-q")


def test_a_tensor_that_is_not_there_or_another_ones_is_refused(fp32_bundle, tmp_path):
    places = move_place(fp32_bundle, "head", tensor="nothing")
    with pytest.raises(BundleError, match="'nothing' that the graph does not have"):
        compare_quickly(copy_bundle(fp32_bundle, tmp_path / "unknown", blocks=places))
    places = move_place(fp32_bundle, "stem.0", layout=TOKENS)
    with pytest.raises(BundleError, match=r"is not the output of the block stem\.0"):
        compare_quickly(copy_bundle(fp32_bundle, tmp_path / "other", blocks=places))
    places = move_place(fp32_bundle, "stem.0", name="trunk.0")
    with pytest.raises(BundleError, match=r"no block 'trunk\.0'"):
        compare_quickly(copy_bundle(fp32_bundle, tmp_path / "renamed", blocks=places))


def test_other_weights_are_no_company(fp32_bundle, tmp_path):
    model = fp32_bundle.manifest.model
    weights = replace(model.weights, sha256="0" * 64)
    other = copy_bundle(fp32_bundle, tmp_path / "other", model=replace(model, weights=weights))
    with pytest.raises(InputError, match="other weights"):
        compare_quickly(fp32_bundle, other)


def test_without_pytorch_the_remedy_is_named(fp32_bundle, no_torch):
    with pytest.raises(RuntimeMissingError) as raised:
        compare_quickly(fp32_bundle)
    assert "cmt-edge[export]" in raised.value.remedy


def test_a_runtime_that_shows_nothing_is_refused(fp32_bundle):
    with pytest.raises(InputError, match="does not show what it computes"):
        compare_layers([fp32_bundle], backend="torch")


def test_the_command_prints_the_errors(fp32_bundle, call):
    command = [fp32_bundle.path, "--layers", "--backend", "onnxruntime", "--limit", 1, "-q"]
    code, out, _ = call(main, *command, "--json")
    printed = json.loads(out)
    assert code == 0
    assert printed["layers"][0]["name"] == "stem.0"
    wanted = {"name", "precision", "backend", "relative_error", "cosine", "images"}
    assert all(wanted <= set(error) for error in printed["layers"])
    assert printed["layer_runs"][0]["first"] is None


def test_flags_for_layers_need_layers(fp32_bundle, fails):
    assert "--beside" in fails(2, main, fp32_bundle.path, "--beside", fp32_bundle.path)
    assert "--layer-threshold" in fails(2, main, fp32_bundle.path, "--layer-threshold", 1)


def make_run(errors, **changes) -> tuple[list[LayerError], LayerRun]:
    made = [
        LayerError(
            name=name,
            precision="int8",
            backend="openvino",
            relative_error=error,
            cosine=0.99,
            images=5,
            worst=error,
        )
        for name, error in errors.items()
    ]
    run = LayerRun(
        bundle="nano",
        precision="int8",
        backend="openvino",
        runtime="openvino 2026.4",
        threshold=THRESHOLDS["int8"],
        first="stages.2.blocks.10",
        grows="stages.2.blocks.10",
        output=0.5,
        watched=0.4,
        moved=0.125,
        hidden={"norm": "no tensor of the graph has its values"},
    )
    return made, replace(run, **changes)


def test_the_table_fits_80_columns_and_the_sentences_say_where():
    errors, run = make_run({"stem": 0.01, "stages.2.blocks.10": 0.3, "head": FARTHEST})
    text = report.describe_layers([*errors, *errors, *errors], [run, run, run], width=80)
    table = text.split("\nint8 on")[0].splitlines()[1:]
    assert all(len(line) <= 80 for line in table)
    assert sum("0.3*" in line for line in table) >= 1
    assert "finite*" in text, "folded"
    assert "first beyond 0.2 in stages.2.blocks.10 (0.3)" in text
    assert "grows most in stages.2.blocks.10, from 0.01 to 0.3; at the output it is 0.5" in text
    assert "moved the output by 0.12: its error is 0.5 as the bundle runs, 0.4 watched" in text
    assert "not compared: norm (no tensor of the graph has its values)" in text


def test_what_the_graph_has_in_part_is_said():
    errors, run = make_run({"stem.2": 0.01, "blocks.11": 0.1}, first=None, grows=None, moved=0.0, hidden={})
    errors = [replace(errors[0], before="norm"), replace(errors[1], rows=1)]
    text = report.describe_layers(errors, [run])
    assert "stem.2 before its norm, the first token of blocks.11" in text
    assert "no block is beyond 0.2" in text
    assert "bit for bit" in text


@pytest.mark.parametrize(
    ("layout", "tensor"),
    [(SAME, (2, 3, 4, 5)), (TOKENS, (2, 20, 3)), (LAST, (2, 4, 5, 3))],
)
def test_layouts_of_a_map(layout, tensor):
    map_ = np.arange(120.0).reshape(2, 3, 4, 5)
    stored = map_ if layout == SAME else map_.transpose(0, 2, 3, 1).reshape(tensor)
    assert layout in find_layouts(tensor, map_.shape)
    assert (restore_layout(stored, layout, map_.shape) == map_).all()


def test_tokens_that_the_graph_holds_as_a_map():
    tokens = np.arange(120.0).reshape(2, 20, 3)
    map_ = tokens.reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    assert find_layouts(map_.shape, tokens.shape) == [MAP]
    assert (restore_layout(map_, MAP, tokens.shape) == tokens).all()
    with pytest.raises(ValueError, match="does not hold"):
        restore_layout(map_, SAME, tokens.shape)


def test_distance_by_hand():
    distance = Distance()
    distance.add(np.array([3.0, 0.0]), np.array([3.0, 4.0]))
    distance.add(np.array([1.0, 0.0]), np.array([0.0, 0.0]))
    assert distance.relative_error == pytest.approx((17 / 25) ** 0.5)
    assert distance.cosine == pytest.approx(9 / (10 * 25) ** 0.5)
    assert distance.worst == FARTHEST
    with pytest.raises(ValueError, match="cannot be compared"):
        distance.add(np.zeros(2), np.zeros(3))


def test_what_is_not_finite_is_as_far_as_can_be():
    distance = Distance()
    distance.add(np.array([np.nan, 1.0]), np.array([1.0, 1.0]))
    assert (distance.relative_error, distance.cosine, distance.worst) == (FARTHEST, 0.0, FARTHEST)


def test_bfloat16_is_read_as_float32():
    ov = pytest.importorskip("openvino")
    from cmt_edge.deploy.backends.openvino_watched import read_values

    tensor = ov.Tensor(ov.Type.bf16, [2])
    halves = (np.array([1.5, -3.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    tensor.data.view(np.uint16)[:] = halves
    assert read_values(tensor).tolist() == [1.5, -3.0]
