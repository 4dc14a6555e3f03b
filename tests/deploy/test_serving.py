"""Model repositories: the servers' own schemas take them, and the graphs in them answer as the bundles do."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.bundle.sections import BATCH, TensorEntry
from cmt_edge.deploy.cli import serve_repo
from cmt_edge.deploy.errors import InputError, OutputError, RuntimeMissingError
from cmt_edge.deploy.serving import Options, make_repository, repository, triton
from helpers.bundles import LABELS, SIZE, make_bundle, make_calibration, snapshot
from helpers.trt import build, trt_bundle

needs_openvino = pytest.mark.skipif(find_spec("openvino") is None, reason="needs OpenVINO")

OVMS_KEYS = {
    "name": str,
    "base_path": str,
    "batch_size": (int, str),
    "model_version_policy": dict,
    "shape": (str, dict),
    "layout": (str, dict),
    "nireq": int,
    "target_device": str,
    "allow_cache": bool,
    "plugin_config": dict,
}
"""Entries of a model that the schema of OpenVINO Model Server allows, with their types."""


def make_dynamic(target, **changes) -> Bundle:
    return make_bundle(
        target,
        input=TensorEntry(name="input", shape=(BATCH, 3, SIZE, SIZE), dtype="float32"),
        outputs=(TensorEntry(name="logits", shape=(BATCH, len(LABELS)), dtype="float32"),),
        **changes,
    )


def read_config(folder):
    """``config.pbtxt`` as Triton's own message; a field that it does not know is an error."""
    model_config = pytest.importorskip(
        "tritonclient.grpc.model_config_pb2", reason='needs the extra "kserve"'
    )
    from google.protobuf import text_format

    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())


def test_triton_takes_the_settings(tmp_path):
    labels = ['a "b" \\', "tab\there", "é"]
    bundle = make_bundle(tmp_path / "tiny", labels=labels)
    made = make_repository([bundle], "triton", tmp_path / "models", Options(threads=2, instances=3))
    folder = made.path / "tiny"
    config = read_config(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny", "onnxruntime", 0)
    assert list(config.input[0].dims) == [1, 3, SIZE, SIZE]
    assert list(config.output[0].dims) == [1, len(LABELS)]
    assert (config.instance_group[0].count, config.instance_group[0].kind) == (3, 2), "three on the processor"
    assert config.parameters["intra_op_thread_count"].string_value == "2"
    assert not config.HasField("dynamic_batching"), "the graph takes one image alone"
    assert (folder / "1" / config.default_model_filename).is_file()
    lines = (folder / config.output[0].label_filename).read_text().splitlines()
    assert len(lines) == len(labels), "one line a label"
    warmup = config.model_warmup[0].inputs["input"]
    data = np.frombuffer((folder / "warmup" / warmup.input_data_file).read_bytes(), "<f4")
    assert data.size == np.prod(warmup.dims)
    np.testing.assert_array_equal(data.reshape(warmup.dims), made.models[0].make_batch())


def test_triton_batches_what_is_dynamic(tmp_path):
    bundle = make_dynamic(tmp_path / "tiny")
    make_repository([bundle], "triton", tmp_path / "models", Options(max_batch=16, version=7))
    config = read_config(tmp_path / "models" / "tiny")
    assert config.max_batch_size == 16
    assert list(config.input[0].dims) == [3, SIZE, SIZE], "without the batch"
    assert list(config.output[0].dims) == [len(LABELS)]
    assert config.dynamic_batching.max_queue_delay_microseconds == Options.queue_delay_us
    assert list(config.model_warmup[0].inputs["input"].dims) == [3, SIZE, SIZE]
    assert (tmp_path / "models" / "tiny" / "7" / "model.onnx").read_bytes() == bundle.file(
        "model.onnx"
    ).read_bytes()


def test_words_with_any_characters_come_through(tmp_path):
    bundle = make_bundle(tmp_path / "tiny")
    entry = replace(bundle.manifest.input, name='in"put\\ é\n')
    odd = replace(bundle, manifest=replace(bundle.manifest, input=entry))
    from cmt_edge.deploy.serving.served import Served
    from cmt_edge.deploy.serving.triton import make_config

    folder = tmp_path / "odd"
    folder.mkdir()
    (folder / "config.pbtxt").write_text(make_config(Served("tiny", odd, "onnxruntime", 0), Options()))
    assert read_config(folder).input[0].name == entry.name


@needs_openvino
@pytest.mark.parametrize("server", ["triton", "ovms"])
def test_the_intermediate_representation_answers_as_the_bundle(tmp_path, server):
    import openvino as ov

    bundle = make_dynamic(tmp_path / "tiny", format="openvino")
    make_repository([bundle], server, tmp_path / "models", Options(allow_bf16=True))
    compiled = ov.Core().compile_model(
        tmp_path / "models" / "tiny" / "1" / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    batch = np.random.default_rng(0).normal(size=(2, 3, SIZE, SIZE)).astype(np.float32)
    with Predictor.load(bundle) as predictor:
        np.testing.assert_array_equal(compiled([batch])[0], predictor.session.run(batch)[0])


@needs_openvino
def test_model_server_takes_the_settings(tmp_path):
    bundles = [make_bundle(tmp_path / name, format="openvino") for name in ("one", "two")]
    make_repository(bundles, "ovms", tmp_path / "models", Options(threads=3, instances=2))
    content = json.loads((tmp_path / "models" / "config.json").read_text())
    assert list(content) == ["model_config_list"]
    for bundle, outer in zip(bundles, content["model_config_list"], strict=True):
        assert list(outer) == ["config"]
        entry = outer["config"]
        assert all(isinstance(value, OVMS_KEYS[name]) for name, value in entry.items())
        assert entry["name"] == entry["base_path"] == bundle.name, "the folder is relative to the settings"
        assert (tmp_path / "models" / entry["base_path"] / "1" / "model.bin").is_file()
        assert all(isinstance(value, (str, bool, int, float)) for value in entry["plugin_config"].values())
        assert entry["plugin_config"]["INFERENCE_PRECISION_HINT"] == "f32", (
            "also where the processor has bf16"
        )
        assert entry["plugin_config"]["INFERENCE_NUM_THREADS"] == 6, "of both streams"


@needs_openvino
def test_the_properties_are_those_that_openvino_knows(tmp_path):
    import openvino as ov

    bundle = make_bundle(tmp_path / "tiny", format="openvino")
    make_repository([bundle], "ovms", tmp_path / "models", Options(threads=1, instances=2))
    entry = json.loads((tmp_path / "models" / "config.json").read_text())["model_config_list"][0]["config"]
    xml = tmp_path / "models" / entry["base_path"] / "1" / "model.xml"
    compiled = ov.Core().compile_model(xml, entry["target_device"], entry["plugin_config"])
    assert compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.f32


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_triton_would_compute_in_another_precision(tmp_path, precision):
    bundle = make_bundle(tmp_path / "tiny", format="openvino", precision=precision)
    with pytest.raises(InputError, match="keeps float32") as caught:
        make_repository([bundle], "triton", tmp_path / "models", Options())
    assert "--allow-bf16" in caught.value.remedy
    assert not (tmp_path / "models").exists()


@needs_openvino
def test_with_the_word_it_is_a_note(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "tiny", format="openvino")
    flags = ["-o", str(tmp_path / "models"), "--for", "triton", "--allow-bf16"]
    assert serve_repo.main([str(bundle.path), *flags]) == 0
    assert "note: on a processor with bfloat16" in capsys.readouterr().out


def test_a_tensorrt_engine_of_this_machine(tmp_path, gpu_machine):
    bundle = trt_bundle(tmp_path / "tiny")
    with pytest.raises(RuntimeMissingError, match="no TensorRT engine yet"):
        make_repository([bundle], "triton", tmp_path / "models", Options())
    assert not (tmp_path / "models").exists(), "nothing half-written stays"
    assert build(bundle, "--quiet") == 0
    built = Bundle.open(bundle.path)
    make_repository([built], "triton", tmp_path / "models", Options())
    config = read_config(tmp_path / "models" / "tiny")
    assert (config.backend, config.instance_group[0].kind) == ("tensorrt", 1)
    plan = (tmp_path / "models" / "tiny" / "1" / "model.plan").read_bytes()
    assert plan == built.file(built.manifest.engine.file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "server", "options", "words"),
    [
        ({}, "ovms", Options(runtime="onnxruntime"), "--runtime openvino"),
        ({"format": "rtx", "precision": "fp16"}, "triton", Options(), "--format onnx"),
        ({"format": "trt", "precision": "fp16"}, "ovms", Options(), "--format onnx or --format openvino"),
        ({}, "triton", Options(max_batch=4), "--batch 0"),
        ({}, "ovms", Options(max_batch=4), "leave --max-batch out"),
        ({}, "ovms", Options(queue_delay_us=5), "leave --queue-delay-us out"),
        ({"format": "openvino", "precision": "bf16"}, "triton", Options(runtime="onnxruntime"), "int8"),
        ({"format": "openvino", "precision": "fp16"}, "ovms", Options(), "fp32"),
    ],
)
def test_what_a_server_does_not_take(tmp_path, changes, server, options, words):
    bundle = make_bundle(tmp_path / "tiny")
    bundle = replace(bundle, manifest=replace(bundle.manifest, **changes))
    with pytest.raises(InputError) as caught:
        make_repository([bundle], server, tmp_path / "models", options)
    assert words in caught.value.remedy
    assert not (tmp_path / "models").exists()


def test_names(tmp_path):
    first = make_bundle(tmp_path / "tiny")
    (tmp_path / "more").mkdir()
    second = make_bundle(tmp_path / "more" / "tiny")
    with pytest.raises(InputError, match="two bundles are called tiny"):
        make_repository([first, second], "triton", tmp_path / "models", Options())
    (tmp_path / "upper").mkdir()
    upper = make_bundle(tmp_path / "upper" / "TINY")
    with pytest.raises(InputError, match="two bundles are called"):
        make_repository([first, upper], "triton", tmp_path / "models", Options())
    settings = make_bundle(tmp_path / "config.json")
    with pytest.raises(InputError, match="as the settings of the server"):
        make_repository([settings], "ovms", tmp_path / "models", Options())
    odd = make_bundle(tmp_path / "my model")
    with pytest.raises(InputError, match="name"):
        make_repository([odd], "triton", tmp_path / "models", Options())


def test_nothing_is_written_over(tmp_path, fails):
    bundle = make_bundle(tmp_path / "tiny")
    target = tmp_path / "models"
    target.mkdir()
    make_repository([bundle], "triton", target, Options())
    before = snapshot(target)
    with pytest.raises(OutputError, match="already exists"):
        make_repository([bundle], "triton", target, Options(version=2))
    assert snapshot(target) == before
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError):
        make_repository([bundle], "triton", link, Options())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "models", "tiny"], "no leftovers"


def test_the_object(tmp_path, capsys):
    bundle = make_bundle(tmp_path / "tiny")
    flags = ["-o", str(tmp_path / "my models"), "--for", "TRITON", "--json"]
    assert serve_repo.main([str(bundle.path), *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["models"] == [
        {"name": "tiny", "bundle": str(bundle.path), "runtime": "onnxruntime", "max_batch": 0, "notes": []}
    ]
    assert shlex.split(told["start"])[-1] == f"--model-repository={tmp_path / 'my models'}"


@pytest.mark.parametrize(
    ("runtime", "precision", "saturates", "words"),
    [
        ("openvino", "int8", False, "write the repository on such a server"),
        ("openvino", "int8", True, "such as this one"),
        ("onnxruntime", "int8", True, "can saturate"),
        ("openvino", "fp32", True, ""),
    ],
)
def test_a_server_without_vnni_is_spoken_of(tmp_path, monkeypatch, runtime, precision, saturates, words):
    monkeypatch.setattr(repository, "saturates_in_openvino", lambda: saturates)
    monkeypatch.setattr(repository, "multiplies_matrices_slowly", lambda: False)
    monkeypatch.setattr(triton, "write_model", lambda *_: None)
    bundle = make_bundle(tmp_path / "tiny", precision=precision)
    made = make_repository([bundle], "triton", tmp_path / "models", Options(runtime=runtime, allow_bf16=True))
    notes = " ".join(made.models[0].notes)
    assert words in notes
    assert ("VNNI" in notes) is bool(words)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_that_fit_16_bits_cannot_saturate_on_a_server(tmp_path, monkeypatch, runtime):
    monkeypatch.setattr(repository, "multiplies_matrices_slowly", lambda: False)
    monkeypatch.setattr(triton, "write_model", lambda *_: None)
    bundle = make_bundle(tmp_path / "tiny", precision="int8", calibration=make_calibration(True))
    made = make_repository([bundle], "triton", tmp_path / "models", Options(runtime=runtime, allow_bf16=True))
    assert "VNNI" not in " ".join(made.models[0].notes)


@pytest.mark.parametrize(
    ("runtime", "precision", "slow", "says"),
    [
        ("openvino", "int8", True, True),
        ("openvino", "int8", False, False),
        ("onnxruntime", "int8", True, False),
        ("openvino", "fp32", True, False),
    ],
)
def test_slow_linears_of_a_server_are_spoken_of(tmp_path, monkeypatch, runtime, precision, slow, says):
    monkeypatch.setattr(repository, "multiplies_matrices_slowly", lambda: slow)
    monkeypatch.setattr(triton, "write_model", lambda *_: None)
    bundle = make_bundle(tmp_path / "tiny", precision=precision)
    made = make_repository([bundle], "triton", tmp_path / "models", Options(runtime=runtime, allow_bf16=True))
    assert ("--keep-float @linears" in " ".join(made.models[0].notes)) is says


@needs_openvino
def test_linears_stay_int8_for_a_server(tmp_path, monkeypatch, int8_bundle):
    """A repository that is written on a laptop may be served by a newer processor."""
    from cmt_edge.deploy.backends import openvino_graph
    from cmt_edge.deploy.serving.served import write_ir

    for name in ("saturates_in_openvino", "multiplies_matrices_slowly"):
        monkeypatch.setattr(openvino_graph, name, lambda: True)
    write_ir(int8_bundle, tmp_path)
    assert (tmp_path / "model.bin").stat().st_size < 1.5 * int8_bundle.file("model.onnx").stat().st_size


@needs_openvino
def test_model_server_makes_no_batches(tmp_path, capsys):
    bundle = make_dynamic(tmp_path / "tiny")
    assert serve_repo.main([str(bundle.path), "-o", str(tmp_path / "models"), "--for", "ovms"]) == 0
    assert "batches as clients send them" in capsys.readouterr().out
