"""``--head features``: the stage maps instead of classes, on every path, against PyTorch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from cmt_edge.cmt import choose_head, create_model, find_model, fuse, list_models
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle import Golden
from cmt_edge.deploy.cli import bench as cmt_bench
from cmt_edge.deploy.cli import predict as cmt_predict
from cmt_edge.deploy.cli import verify as cmt_verify
from cmt_edge.deploy.errors import InputError, ParityError
from cmt_edge.deploy.measure.parity import check_golden, verify
from cmt_edge.deploy.measure.tolerance import MAP_ATOL, measure_distance
from cmt_edge.export import ExportConfig, run
from cmt_edge.export.to_onnx import require_parity
from helpers.models import SHALLOW, make_shallow, marked_models

pytestmark = pytest.mark.usefixtures("one_trace")

HIERARCHICAL = [n for n in list_models() if find_model(n).strides]
SMALLEST = ["cmt_nano", "cvt_13", "mvitv2_t", "xformer_reading"]
"""One of each family."""


def export(name, folder, form="onnx", precision="fp32", **settings):
    data = {"data": "generated", "calib_size": 8} if precision == "int8" else {}
    settings = (
        {"weights": "random", "imgsz": 64, "build": form != "trt", "head": "features"} | data | settings
    )
    return run(ExportConfig(name, form, precision, output=str(folder), **settings))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """cmt_nano's maps, fp32, ONNX, any batch size."""
    return export("cmt_nano", tmp_path_factory.mktemp("maps"), batch=0)


def photos(count: int, size: int = 64) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(count, 3, size, size)).astype(np.float32)


# --- models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", marked_models(HIERARCHICAL))
def test_strides_are_what_the_maps_have(name):
    size = find_model(name).img_size
    maps = choose_head(create_model(name).to("meta"), "features")(
        torch.empty(2, 3, size, size, device="meta")
    )
    assert [size / m.shape[-1] for m in maps] == list(find_model(name).strides)
    assert all(m.ndim == 4 and m.shape[2] == m.shape[3] and len(m) == 2 for m in maps)
    assert find_model(name).strides in ((4, 8, 16), (4, 8, 16, 32))


@pytest.mark.parametrize("name", SMALLEST)
def test_rewriting_keeps_the_maps(name, one_thread):
    model = create_model(name, img_size=64, seed=0).double()
    x = torch.from_numpy(photos(2)).double()
    with torch.inference_mode():
        for ours, expected in zip(fuse(model).features(x), choose_head(model, "features")(x), strict=True):
            torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["convit_tiny", "convit_base"])
def test_a_model_of_one_resolution_has_none(name, tmp_path):
    with pytest.raises(InputError, match=f"{name} has no feature maps"):
        export(name, tmp_path)
    assert not list(tmp_path.iterdir())


# --- bundles --------------------------------------------------------------------------------------


def test_the_bundle_says_what_it_gives(bundle):
    m = bundle.manifest
    assert bundle.path.name == "cmt_nano_features_fp32_onnx_dynamic"
    assert [o.name for o in m.outputs] == bundle.outputs == ["stage1", "stage2", "stage3", "stage4"]
    assert [o.shape for o in m.outputs] == [
        ("batch", c, s, s) for c, s in zip((24, 48, 96, 192), (16, 8, 4, 2), strict=True)
    ]
    assert (m.model.head, bundle.head, m.labels, m.labels_source) == ("features", "features", (), "none")
    assert m.verification.golden.output in bundle.outputs
    assert m.model.macs < find_model("cmt_nano").macs


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino", "torch"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_every_runtime_gives_the_maps_of_pytorch(bundle, backend, count):
    with Predictor.load(bundle, backend="torch") as reference, Predictor.load(bundle, backend=backend) as p:
        assert [m.shape for m in p.features(photos(count))] == [
            (count, c, s, s) for c, s in ((24, 16), (48, 8), (96, 4), (192, 2))
        ]
        for ours, expected in zip(p.features(photos(count)), reference.features(photos(count)), strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-3)


PATHS = [
    ("cmt_nano", "openvino", "int8"),
    pytest.param("cvt_13", "openvino", "bf16", marks=pytest.mark.giant),
    ("mvitv2_t", "trt", "fp16"),
    pytest.param("xformer_reading", "onnx", "int8", marks=pytest.mark.giant),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form", "precision"), PATHS)
def test_each_family_on_each_path(name, form, precision, tmp_path):
    made = export(make_shallow(name) if name in SHALLOW else name, tmp_path, form, precision)
    golden = made.manifest.verification.golden
    assert golden.passed
    assert 0 < golden.diff <= golden.atol
    again = verify(Bundle.open(made.path), backend="onnxruntime" if form == "trt" else None)
    assert again.passed


def test_a_fixed_batch_is_filled_up(tmp_path):
    with Predictor.load(export("cmt_nano", tmp_path, batch=2)) as p:
        five = p.features(photos(5))
        assert [len(m) for m in five] == [5] * 4
        for whole, alone in zip(five, p.features(photos(5)[4:]), strict=True):
            np.testing.assert_allclose(whole[4:], alone, atol=1e-5)


def test_prepare_takes_what_predict_takes(bundle):
    sources = bundle.golden().sources
    with Predictor.load(bundle) as p:
        batch = p.prepare(sources)
        assert (batch.shape, batch.dtype) == ((len(sources), 3, 64, 64), np.float32)
        for ours, expected in zip(p.features(batch), bundle.golden().outputs, strict=True):
            np.testing.assert_allclose(ours, expected, atol=1e-3)
        assert p.prepare([]).shape == (0, 3, 64, 64)


# --- refusals and gates ---------------------------------------------------------------------------


def test_classes_and_maps_are_not_mixed_up(bundle, fp32_bundle):
    with Predictor.load(bundle) as maps, Predictor.load(fp32_bundle) as classes:
        for call in (
            lambda: maps(bundle.golden().sources[0]),
            lambda: maps.logits(photos(1)),
            lambda: list(maps.stream([])),
        ):
            with pytest.raises(InputError, match=r"gives features, not classes[\s\S]*features\(\)"):
                call()
        with pytest.raises(InputError, match=r"gives logits, not feature maps[\s\S]*--head features"):
            classes.features(photos(1))


def test_commands_on_maps(bundle, tmp_path, capsys, cifar):
    assert cmt_verify.main([str(bundle.path), "--json"]) == 0
    assert '"output": "stage' in capsys.readouterr().out
    assert cmt_bench.main([str(bundle.path), "--iters", "2", "--seconds", "0", "--no-throughput"]) == 0
    assert "cmt_nano_features" in capsys.readouterr().out
    assert cmt_predict.main([str(bundle.path), str(tmp_path)]) == 2
    (tmp_path / "a.png").write_bytes(bundle.golden().sources[0])
    assert cmt_predict.main([str(bundle.path), str(tmp_path)]) == 2
    assert "gives features, not classes" in capsys.readouterr().err
    assert cmt_verify.main([str(bundle.path), "--data", f"{cifar}/test"]) == 2
    assert "feature maps have no top-1" in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"eval_data": "photos"}, {"labels": "names.txt"}, {"head": "masks"}])
def test_what_does_not_go_with_maps(settings, tmp_path):
    with pytest.raises(InputError, match=r"classes, which feature maps do not have|unknown head"):
        ExportConfig("cmt_nano", **{"head": "features", "output": str(tmp_path)} | settings).check()


@pytest.mark.parametrize("broken", range(4))
def test_one_wrong_map_fails_the_check(bundle, broken):
    golden = bundle.golden()
    outputs = [o + 0.1 * o.std() * (i == broken) for i, o in enumerate(golden.outputs)]

    class Changed(Bundle):
        def golden(self) -> Golden:
            return replace(golden, outputs=outputs)

    with Predictor.load(bundle) as p:
        check = check_golden(Changed(bundle.path, bundle.manifest), p)
    assert not check.passed
    assert check.output == f"stage{broken + 1}"
    assert check.diff > check.atol > 0


def test_a_step_names_the_map_it_changed():
    maps = [np.zeros((1, 2, 4, 4), np.float32), np.zeros((1, 2, 2, 2), np.float32)]
    assert require_parity("fuse", maps, maps) == 0
    with pytest.raises(ParityError, match="step 'fuse' changed feature map 2 by 1"):
        require_parity("fuse", [maps[0], maps[1] + 1], maps)
    with pytest.raises(ParityError, match="feature map 1 by inf"):
        require_parity("fuse", [maps[0] * np.nan, maps[1]], maps)


def test_distance_of_maps_is_that_of_the_worst_image():
    reference = np.zeros((2, 1, 10, 10), np.float32)
    ours = reference.copy()
    ours[1] += 0.5
    ours[0, 0, 0, 0] = 2.0
    assert measure_distance(ours, reference) == pytest.approx(0.5)
    assert measure_distance(ours[:, 0, 0], reference[:, 0, 0]) == pytest.approx(2.0)
    assert measure_distance(ours + np.inf, reference) == float("inf")
    assert set(MAP_ATOL) == {"fp32", "fp16", "bf16", "int8"}
