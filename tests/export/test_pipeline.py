"""The export from end to end: what a bundle holds, and that nothing is left where a step, a gate or a user
says no."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from cmt_edge.calib.generated import generate
from cmt_edge.cmt import compute_weights_fingerprint, count_macs, count_params, create_model, load_pretrained
from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.backends.openvino import has_bf16
from cmt_edge.deploy.bundle.sections import ModelEntry, TensorEntry, WeightsEntry
from cmt_edge.deploy.errors import (
    BundleError,
    DataError,
    GateError,
    ImageError,
    InputError,
    OutputError,
    ParityError,
    RuntimeMissingError,
    WeightsError,
)
from cmt_edge.deploy.preprocessing import preprocess
from cmt_edge.export import ExportConfig, pipeline, run
from cmt_edge.export.steps import bundle as bundle_steps
from cmt_edge.export.steps import graph as graph_steps
from helpers.exports import NAME, OWN, content, nano
from helpers.images import labelled
from helpers.paths import ROOT
from helpers.shared import find_shared

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
COMMON = {"model.onnx", "golden.npz", "report.md", "report.json", "report.html"}


pytestmark = pytest.mark.usefixtures("one_trace")


def batch(count: int) -> np.ndarray:
    return np.stack(
        [preprocess(b, ExportConfig("cmt_nano").preprocess) for b in generate(count, 64, seed=12)]
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A training checkpoint in the published container, with the published keys if the shared data exists."""
    model, published = create_model("cmt_nano"), find_shared("weights/cmt_nano_cifar10.pt")
    load_pretrained(model)
    state = torch.load(published, weights_only=True)["model"] if published else model.state_dict()
    path = tmp_path_factory.mktemp("training") / "trained.pth"
    torch.save(
        {
            "model": state,
            "model_ema": None,
            "optimizer": {},
            "epoch": 3,
            "classes": [c.upper() for c in CIFAR],
        },
        path,
    )
    return path


@pytest.fixture(scope="module")
def checkpoint_bundle(checkpoint, tmp_path_factory) -> Bundle:
    """OpenVINO fp32 of ``checkpoint``, evaluated on folders matched in sorted order."""
    folder = tmp_path_factory.mktemp("checkpoint")
    images = labelled(folder / "images", [f"{i:02}" for i in range(10)])
    return run(nano(folder / "out", weights=str(checkpoint), eval_data=str(images), by_order=True))


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory) -> Bundle:
    """ONNX fp32, random weights, 7 classes, batch 4."""
    return run(
        nano(
            tmp_path_factory.mktemp("random"), weights="random", seed=3, num_classes=7, batch=4, format="onnx"
        )
    )


# --- what a bundle holds --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("fp32_bundle", set()),
        ("onnx_bundle", set()),
        ("int8_bundle", set()),
        ("checkpoint_bundle", {"reference.npz"}),
        ("random_bundle", set()),
    ],
)
def test_files(name, more, request):
    bundle: Bundle = request.getfixturevalue(name)
    assert set(bundle.manifest.files) == COMMON | more
    assert {p.name for p in bundle.path.iterdir()} == COMMON | more | {"manifest.json"}
    assert not [p for p in bundle.path.parent.iterdir() if p.name.startswith(".")]
    assert Bundle.open(bundle.path).manifest == Bundle.open(str(bundle.path)).manifest


def test_manifest(fp32_bundle):
    m = Bundle.open(fp32_bundle.path).manifest
    reference = create_model("cmt_nano")
    load_pretrained(reference)
    assert fp32_bundle.path.name == NAME
    assert (m.precision, m.format, m.calibration) == ("fp32", "openvino", None)
    assert m.model == ModelEntry(
        provider="cmt",
        name="cmt_nano",
        family="CMT",
        img_size=64,
        num_classes=10,
        head="logits",
        params=count_params(reference),
        macs=count_macs(reference),
        opset=20,
        weights=WeightsEntry(
            source="pretrained",
            sha256=compute_weights_fingerprint(reference),
            seed=0,
            ema=False,
            fresh=(),
            resized=(),
        ),
    )
    assert m.input == TensorEntry(name="input", shape=(1, 3, 64, 64), dtype="float32")
    assert m.outputs == (TensorEntry(name="logits", shape=(1, 10), dtype="float32"),)
    assert fp32_bundle.preprocess == ExportConfig("cmt_nano").preprocess
    assert m.runtime.backend == "openvino"
    assert {"torch", "onnx", "openvino"} <= set(m.versions)
    assert m.verification.bundle == NAME
    assert m.verification.golden.passed is True
    assert set(m.verification.steps) == {"fuse", "onnx", "simplify"}
    assert 0 <= max(m.verification.steps.values()) < 1e-3
    assert 0 < m.latency.p50_ms <= m.latency.p95_ms
    assert set(m.latency.executed.time_share) == {"fp32"}


def test_manifest_of_int8(int8_bundle):
    m = int8_bundle.manifest
    assert m.calibration.source == "generated"
    assert m.calibration.images == 32
    assert len(m.calibration.fingerprint) == len(m.calibration.recipe) == 64
    assert "int8" in m.latency.executed.time_share


def test_reports_tell_what_the_manifest_tells(checkpoint_bundle):
    content = json.loads((checkpoint_bundle.path / "report.json").read_text())
    assert content["verification"]["data"]["top1"] == checkpoint_bundle.manifest.verification.data.top1
    assert content["benchmark"]["results"][0]["name"] == NAME
    assert (checkpoint_bundle.path / "report.md").read_text().startswith(f"# {NAME}\n")
    page = (checkpoint_bundle.path / "report.html").read_text()
    assert checkpoint_bundle.manifest.files["model.onnx"].sha256 in page
    assert str(checkpoint_bundle.path.parent) not in page


@pytest.mark.parametrize(
    "name", ["fp32_bundle", "onnx_bundle", "int8_bundle", "checkpoint_bundle", "random_bundle"]
)
def test_graph_is_valid_and_says_nothing_of_the_machine(name, request):
    path = request.getfixturevalue(name).path / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    data = path.read_bytes()
    for word in (
        str(ROOT),
        sys.prefix,
        str(Path.home()),
        "site-packages",
        ".py",
        "/tmp",
        "stack_trace",
        "namespace",
    ):
        assert word.encode() not in data, word
    graph = onnx.load(path)
    assert not graph.metadata_props
    assert not [n.name for n in graph.graph.node if n.metadata_props or n.doc_string]
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 20)]


@pytest.mark.parametrize("name", ["fp32_bundle", "checkpoint_bundle", "random_bundle"])
def test_no_file_names_a_folder_of_the_machine(name, request):
    bundle = request.getfixturevalue(name)
    for file in bundle.path.iterdir():
        data = file.read_bytes()
        for word in (str(bundle.path.parent), str(ROOT), sys.prefix):
            assert word.encode() not in data, file.name


@pytest.mark.slow
def test_another_process_makes_the_same_bytes(fp32_bundle, tmp_path):
    code = "import sys; from cmt_edge.export.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--model", "cmt_nano", "--json", "-o", "out"]
    env = os.environ | {"PYTHONHASHSEED": "123"}
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bundle"] == f"out/{NAME}"
    other = Bundle.open(tmp_path / "out" / NAME)
    assert other.manifest.files["model.onnx"] == fp32_bundle.manifest.files["model.onnx"]
    assert np.array_equal(other.golden().logits, fp32_bundle.golden().logits)


@pytest.mark.parametrize("format", ["openvino", "onnx"])
def test_a_bundle_is_opened_once_to_be_verified_and_measured(tmp_path, monkeypatch, format):
    opened, load = [], Predictor.load

    def counted(*args, **settings):
        opened.append(load(*args, **settings))
        return opened[-1]

    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Predictor, "load", counted)
    bundle = run(ExportConfig("own.py:small", format=format, imgsz=32, weights="random", output="out"))
    assert bundle.manifest.verification.golden.passed
    assert bundle.manifest.latency.p50_ms > 0
    (predictor,) = opened
    with pytest.raises(InputError, match="closed"):
        predictor.logits(np.zeros((1, 3, 32, 32), np.float32))


# --- what it answers ------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_dynamic_batch(onnx_bundle, backend):
    assert onnx_bundle.manifest.input.shape == ("batch", 3, 64, 64)
    assert [s for s in onnx_bundle.manifest.verification.steps if "batch" in s] == [
        f"dynamic batch of {n}" for n in (1, 3, 8)
    ]
    x = batch(8)
    with (
        Predictor.load(onnx_bundle, backend=backend) as p,
        Predictor.load(onnx_bundle, backend="torch") as reference,
    ):
        expected = reference.logits(x)
        for count in (1, 3, 8):
            np.testing.assert_allclose(p.session.run(x[:count])[0], expected[:count], atol=1e-3)


@pytest.mark.parametrize("name", ["fp32_bundle", "onnx_bundle", "random_bundle"])
def test_fp32_equals_pytorch(name, request):
    bundle = request.getfixturevalue(name)
    x = batch(6)
    with Predictor.load(bundle) as p, Predictor.load(bundle, backend="torch") as reference:
        assert p.session.runtime.split()[0] == bundle.manifest.runtime.backend
        np.testing.assert_allclose(p.logits(x), reference.logits(x), atol=1e-3)
    golden = bundle.golden()
    assert golden.logits.std(axis=0).min() > 1e-3  # golden images differ: the comparison means something


def test_static_batch(random_bundle):
    graph = onnx.load(random_bundle.path / "model.onnx").graph
    shapes = [
        tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in (graph.input[0], graph.output[0])
    ]
    assert (
        shapes
        == [(4, 3, 64, 64), (4, 7)]
        == [random_bundle.manifest.input.shape, random_bundle.manifest.outputs[0].shape]
    )
    with Predictor.load(random_bundle) as p:
        assert p.batch == 4
        assert p.logits(batch(6)).shape == (6, 7)  # 4 and 2, padded
        with pytest.raises(Exception, match=r"(?i)dimension"):
            p.session.run(batch(3))


# --- labels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "source", "labels"),
    [
        ("fp32_bundle", "published", CIFAR),
        ("checkpoint_bundle", "checkpoint", [c.upper() for c in CIFAR]),
        ("random_bundle", "numbered", [f"class_{i}" for i in range(7)]),
    ],
)
def test_labels(name, source, labels, request):
    bundle = request.getfixturevalue(name)
    assert bundle.manifest.labels_source == source
    assert bundle.labels == labels


def test_labels_of_a_file_and_replacing_a_bundle(fp32_bundle, tmp_path):
    shutil.copytree(fp32_bundle.path, tmp_path / NAME)
    (tmp_path / "names.txt").write_text("\n".join(f"  thing {i} " for i in range(10)) + "\n\n")
    bundle = run(nano(tmp_path, labels=str(tmp_path / "names.txt")))
    assert (bundle.manifest.labels_source, bundle.labels[9]) == ("file", "thing 9")
    assert Bundle.open(tmp_path / NAME).labels == bundle.labels
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "names.txt"]


@pytest.mark.parametrize(
    "lines",
    [CIFAR[:9], [*CIFAR, "more"], None],
    ids=["few", "many", "missing"],
)
def test_labels_that_do_not_fit(tmp_path, lines):
    if lines:
        (tmp_path / "names.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match="label"):
        run(nano(tmp_path / "out", labels=str(tmp_path / "names.txt")))
    assert content(tmp_path / "out") == {}


# --- checkpoints ----------------------------------------------------------------------------------


def test_checkpoint_is_named_without_its_folder(checkpoint_bundle, checkpoint):
    assert checkpoint_bundle.manifest.model.weights.source == checkpoint.name


def test_torch_reference_of_a_checkpoint_needs_the_file(checkpoint_bundle, checkpoint, tmp_path):
    with pytest.raises(WeightsError, match=r"trained\.pth"):
        Predictor.load(checkpoint_bundle, backend="torch")
    with (
        Predictor.load(checkpoint_bundle, backend="torch", weights=checkpoint) as p,
        Predictor.load(checkpoint_bundle) as ours,
    ):
        np.testing.assert_allclose(p.logits(batch(2)), ours.logits(batch(2)), atol=1e-3)
    state = torch.load(checkpoint, weights_only=True)
    next(iter(state["model"].values())).view(-1)[0] += 1e-3
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(BundleError, match="not the weights"):
        Predictor.load(checkpoint_bundle, backend="torch", weights=tmp_path / "other.pth")


def test_evaluation_in_sorted_order(checkpoint_bundle):
    data = checkpoint_bundle.manifest.verification.data
    assert (data.images, data.drop, data.agreement) == (20, 0.0, 100.0)
    assert data.top1 == data.reference_top1
    assert len(checkpoint_bundle.reference()) == 20


# --- refusals: nothing is written, an old bundle survives -----------------------------------------


@pytest.fixture(params=["empty folder", "old bundle"])
def output(request, fp32_bundle, tmp_path):
    """A folder whose content must not change."""
    folder = tmp_path / "out"
    folder.mkdir()
    if request.param == "old bundle":
        shutil.copytree(fp32_bundle.path, folder / NAME)
    before = content(folder)
    yield folder
    assert content(folder) == before


def perturbed_module(model, target):
    from cmt_edge.cmt import fuse

    fused = fuse(model, target=target)
    with torch.no_grad():
        fused.head.fc.bias[0] += 0.01
    return fused


def perturbed_graph(graph):
    logits = next(n for n in reversed(graph.graph.node) if n.op_type == "Gemm")
    bias = next(i for i in graph.graph.initializer if i.name == logits.input[2])
    array = onnx.numpy_helper.to_array(bias).copy()
    array[0] += 0.1
    bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))
    return graph


@pytest.mark.parametrize("step", ["fuse", "export to ONNX", "simplify"])
def test_a_step_that_changes_the_logits_stops_the_export(step, output, monkeypatch):
    traced, simplify = graph_steps.export_onnx, graph_steps.simplify
    fault = {
        "fuse": ("fuse", perturbed_module),
        "export to ONNX": (
            "export_onnx",
            lambda *a: traced(*a[:-1], lambda graph: a[-1](perturbed_graph(graph))),
        ),
        "simplify": ("simplify", lambda g: perturbed_graph(simplify(g))),
    }[step]
    monkeypatch.setattr(graph_steps, *fault)
    with pytest.raises(ParityError, match=f"step '{step}' changed the logits") as error:
        run(nano(output, cache=False))
    assert error.value.exit_code == 1
    assert "nothing was written" in error.value.remedy


def test_a_step_that_makes_nan_stops_the_export(output, monkeypatch):
    def broken(model, target):
        fused = perturbed_module(model, target)
        with torch.no_grad():
            fused.head.fc.bias[0] = float("nan")
        return fused

    monkeypatch.setattr(graph_steps, "fuse", broken)
    with pytest.raises(ParityError, match="'fuse' changed the logits by inf"):
        run(nano(output))


@pytest.mark.parametrize(
    "settings", [{"precision": "int8", "data": "generated", "calib_size": 4}, {}], ids=["int8", "fp32"]
)
def test_a_failed_gate_writes_nothing(tmp_path, settings):
    with pytest.raises(GateError, match="differs from the reference") as error:
        run(nano(tmp_path / "out" / "deep", atol=1e-9, **settings))
    assert error.value.exit_code == 1
    assert "--atol" in error.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "place", [(bundle_steps, "benchmark"), (pipeline, "write_report")], ids=lambda p: p[1]
)
def test_an_interruption_near_the_end_changes_nothing(output, monkeypatch, place):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(*place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(nano(output))


def test_a_full_disk_is_a_typed_error(output):
    """Files may not grow beyond 1 MB: the graph is larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OutputError):
            run(nano(output))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_folder_that_is_no_bundle_is_not_replaced(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "thesis.tex").write_text("years of work")
    before = content(tmp_path)
    with pytest.raises(OutputError, match="not a bundle"):
        run(nano(tmp_path))
    assert content(tmp_path) == before


@pytest.fixture
def no_long_work(monkeypatch):
    """Refusals that need no graph come before it is made."""

    def too_late(*_):
        raise AssertionError("the long work was begun")

    monkeypatch.setattr(graph_steps, "fuse", too_late)


@pytest.mark.usefixtures("no_long_work")
def test_int8_without_images(output):
    with pytest.raises(InputError, match="calibration images"):
        run(nano(output, precision="int8"))


@pytest.mark.usefixtures("no_long_work")
@pytest.mark.parametrize("classes", [["airplane", "zebra"], [*CIFAR[:9], "lorry"]])
def test_class_folders_that_do_not_match(output, tmp_path, classes):
    with pytest.raises(DataError, match="do not match") as error:
        run(nano(output, eval_data=str(labelled(tmp_path / "images", classes, 1))))
    assert classes[-1] in error.value.why
    assert "--by-order" in error.value.remedy


@pytest.mark.usefixtures("no_long_work")
def test_another_number_of_class_folders_in_sorted_order(output, tmp_path):
    with pytest.raises(DataError, match="9 class folders for 10 labels"):
        run(nano(output, eval_data=str(labelled(tmp_path / "images", CIFAR[:9], 1)), by_order=True))


@pytest.mark.usefixtures("no_long_work")
def test_evaluation_images_without_class_folders(output, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(generate(1, 64)[0])
    with pytest.raises(DataError, match="not in class folders"):
        run(nano(output, eval_data=str(tmp_path / "images")))


def test_a_damaged_calibration_image_is_named(output, tmp_path):
    images = labelled(tmp_path / "images", ["a", "b"])
    path = images / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ImageError, match=r"b/1\.png"):
        run(nano(output, precision="int8", data=str(images)))


def test_a_damaged_evaluation_image_is_named(output, tmp_path):
    path = labelled(tmp_path / "images", CIFAR, 1) / "frog" / "0.png"
    path.write_bytes(b"not an image")
    with pytest.raises(ImageError, match=r"frog/0\.png"):
        run(nano(output, eval_data=str(tmp_path / "images")))


@pytest.mark.skipif(has_bf16(), reason="this processor has bfloat16")
@pytest.mark.usefixtures("no_long_work")
def test_bf16_without_bf16_instructions_is_refused(output):
    with pytest.raises(RuntimeMissingError, match="bfloat16") as error:
        run(nano(output, precision="bf16"))
    assert error.value.exit_code == 3


@pytest.mark.skipif(not has_bf16(), reason="this processor has no bfloat16")
def test_bf16(tmp_path):
    bundle = run(nano(tmp_path, precision="bf16"))
    assert bundle.manifest.latency.executed.time_share["bf16"] > 0.3
    assert bundle.manifest.verification.golden.diff > 1e-4  # it was not fp32


# --- real images ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_on_cifar10(cifar, tmp_path):
    common = {"eval_data": f"{cifar}/test", "eval_limit": 250, "max_drop": 2.0}
    int8 = run(nano(tmp_path, precision="int8", data=f"{cifar}/train", **common)).manifest
    fp32 = run(nano(tmp_path, **common)).manifest
    assert (int8.calibration.source, int8.calibration.images) == ("cifar10.tar/train", 300)
    quantized, exact = int8.verification.data, fp32.verification.data
    assert quantized.images == exact.images == 250
    assert exact.reference_top1 == quantized.reference_top1 > 80
    assert exact.drop == 0
    assert quantized.drop <= 2
    assert quantized.agreement >= 95
