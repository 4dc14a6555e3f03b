"""What an export may be asked for: every refusal, configuration files, names and preprocessing."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from cmt_edge.cmt import find_model, list_models
from cmt_edge.deploy.errors import InputError, UnknownNameError
from cmt_edge.export import ExportConfig
from cmt_edge.export.config_file import read_config

GOOD = ExportConfig("cmt_nano")
BAD_NAMES = ["a/b", "../a", ".", "..", ".hidden", "a b", "a\\b", "a\n", "-a", "a:b", "*"]
"""What ``--name`` refuses."""


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"format": "onnx"},
        {"precision": "bf16"},
        {"precision": "int8", "data": "generated"},
        {"batch": 0},
        {"weights": "random", "imgsz": 96},
        {"imgsz": 96, "resize_position_bias": True},
        {"precision": "int8", "data": "x", "calib_size": 1},
        {"num_classes": 3, "weights": "random"},
        {"max_drop": 0.0},
    ],
)
def test_possible_requests_pass(name, settings):
    ExportConfig(name, **settings).check()


@pytest.mark.parametrize(
    ("settings", "message", "remedy"),
    [
        ({"num_classes": 0}, "num-classes", "1 to 100000"),
        ({"num_classes": -2}, "num-classes", "1 to 100000"),
        ({"imgsz": 65}, "multiple of 32", "64 or 96"),
        ({"imgsz": 0}, "--imgsz 0", "1 to 16384"),
        ({"imgsz": -64}, "--imgsz -64", "1 to 16384"),
        ({"batch": -1}, "--batch -1", "0 to 4096"),
        ({"precision": "int8", "data": "d", "calib_size": 0}, "--calib-size 0", "1 to 100000"),
        ({"eval_limit": 0}, "--eval-limit 0", "1 to 5000000"),
        ({"threads": 0}, "--threads 0", "1 to 1024"),
        ({"max_drop": -0.5}, "--max-drop", "0 to 100"),
        ({"atol": -1.0}, "atol", ""),
        ({"format": "onnx", "precision": "bf16"}, "bf16", "--precision int8"),
        ({"precision": "int8"}, "calibration images", "--data generated"),
        ({"data": "photos"}, "int8", "--eval-data"),
        ({"precision": "bf16", "calib_size": 3}, "int8", "--eval-data"),
        ({"imgsz": 96}, "64 pixels, not 96", "--resize-position-bias"),
        ({"name": "x" * 300}, "a name of 3", "--name"),
        *(({"name": name}, "is not the name of a folder", "-o DIR") for name in BAD_NAMES),
    ],
    ids=lambda v: "-".join(f"{k}={x}" for k, x in v.items()) if isinstance(v, dict) else "",
)
def test_impossible_requests_are_refused(settings, message, remedy):
    with pytest.raises(InputError) as error:
        replace(GOOD, **settings).check()
    assert message in str(error.value)
    assert remedy in (error.value.remedy or "")
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("settings", "close"),
    [
        ({"model": "cmt_nanno"}, "cmt_nano"),
        ({"format": "openvno"}, "openvino"),
        ({"format": "ONX"}, "onnx"),
        ({"precision": "int4"}, "int8"),
        ({"precision": "fp61"}, "fp16"),
        ({"exif": "aply"}, "apply"),
    ],
    ids=lambda v: str(*v.values()) if isinstance(v, dict) else "",
)
def test_unknown_names_are_refused_with_the_closest(settings, close):
    with pytest.raises(UnknownNameError) as error:
        replace(GOOD, **settings).check()
    assert str(*settings.values()) in str(error.value)
    assert close in error.value.remedy


# --- mappings and files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "close"),
    [("modle", "model"), ("calib-siz", "calib_size"), ("eval", "eval_data"), ("zzz", "atol")],
)
def test_unknown_setting(key, close):
    with pytest.raises(UnknownNameError, match=f"unknown setting '{key}'") as error:
        ExportConfig.from_mapping({"model": "cmt_nano", key: 1})
    assert close in error.value.remedy


@pytest.mark.parametrize(
    ("key", "value", "kind"),
    [
        ("batch", "4", "int"),
        ("batch", 1.5, "int"),
        ("batch", True, "int"),
        ("model", 3, "str"),
        ("cache", 1, "bool"),
        ("cache", "no", "bool"),
        ("max_drop", "1", "float"),
        ("atol", [1], "float"),
        ("imgsz", {"a": 1}, "int"),
        ("by-order", 0, "bool"),
        ("batch", None, "int"),
    ],
)
def test_wrong_type(key, value, kind):
    with pytest.raises(InputError) as error:
        ExportConfig.from_mapping({"model": "cmt_nano", key: value}, "here.toml")
    text = str(error.value)
    assert text.startswith("here.toml: ")
    assert f"{key} = {value!r} should be {kind}" in text


def test_mapping_takes_fields_flags_and_whole_numbers():
    config = ExportConfig.from_mapping(
        {"model": "cmt_xs", "eval-limit": 5, "max_drop": 2, "by_order": True, "ema": None}
    )
    assert config == ExportConfig("cmt_xs", eval_limit=5, max_drop=2, by_order=True)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("mean = [0.5, 0.25, 0]", {"mean": "0.5,0.25,0"}),
        ("std = [1, 1, 1]", {"std": "1,1,1"}),
        ('mean = "0.5,0.5,0.5"', {"mean": "0.5,0.5,0.5"}),
        (
            'precision = "int8"\nkeep_float = ["stem", "head"]',
            {"precision": "int8", "keep_float": "stem,head"},
        ),
        ("int8 = true", {"precision": "int8"}),
        ("int8 = false", {}),
        ("half = true", {"precision": "fp16"}),
        ('int8 = true\nprecision = "int8"', {"precision": "int8"}),
        ('half = false\nprecision = "int8"', {"precision": "int8"}),
        ('int8 = true\nprecision = "INT8"', {"precision": "int8"}),
        ("no-build = true", {"build": False}),
        ("no_build = true", {"build": False}),
        ("no-build = false", {"build": True}),
        ("build = false", {"build": False}),
        ("no-build = true\nbuild = false", {"build": False}),
        ("no-cache = true", {"cache": False}),
        ("no-ema = true", {"ema": False}),
        ("ema = true", {"ema": True}),
        ('"--calib-size" = 5', {"calib_size": 5}),
        ("calib-size = 5\ncalib_size = 5", {"calib_size": 5}),
        ("device = 1", {"device": "1"}),
        ("workspace = 2", {"workspace": 2}),
        ("[export]\nbatch = 4", {"batch": 4}),
        ("batch = 4\n[export]\nimgsz = 96", {"batch": 4, "imgsz": 96}),
        ("[train]\nepochs = 3\n[export]\nbatch = 4", {"batch": 4}),
        ("[tool.cmt-edge]\nbatch = 4\n[tool.ruff]\nline-length = 3", {"batch": 4}),
        ("[tool.cmt-export]\nno-build = true", {"build": False}),
        ("[export]", {}),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_what_a_settings_file_may_say(tmp_path, text, settings, encoding):
    path = tmp_path / "export.toml"
    path.write_text(text, encoding=encoding)
    found = ExportConfig.from_mapping({"model": "cmt_nano", **read_config(path)}, path)
    assert found == ExportConfig("cmt_nano", **settings)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('int8 = true\nprecision = "fp32"', "int8 and precision contradict each other"),
        ("int8 = true\nhalf = true", "int8 and half contradict"),
        ("no-build = true\nbuild = true", "no-build and build contradict"),
        ("calib-size = 5\ncalib_size = 6", "calib-size and calib_size contradict"),
        ("int8 = 1", "int8 = 1 should be bool"),
        ('no-build = "yes"', "no-build = 'yes' should be bool"),
        ("mean = []", "should be a list of names or numbers"),
        ("mean = [[0.5], [0.5], [0.5]]", "should be a list of names or numbers"),
        ("mean = [true, true, true]", "should be a list of names or numbers"),
        ("mean = 0.5", "mean = 0.5 should be str or list"),
        ('data = ["a", "b"]', "should be str"),
        ("[train]\nepochs = 3", "unknown setting 'train'"),
        ("[export]\nbatchsize = 3", "did you mean batch"),
        ("batch = 1\n[export]\nbatch = 2", "both in [export] and outside it"),
        ("[export]\nbatch = 1\n[cmt-export]\nbatch = 2", "has the tables [export] and [cmt-export]"),
        ("no-modell = true", "unknown setting"),
        ("[[export]]\nbatch = 1", "unknown setting 'export'"),
    ],
)
def test_what_a_settings_file_may_not_say(tmp_path, text, message):
    path = tmp_path / "export.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        ExportConfig.from_mapping({"model": "cmt_nano", **read_config(path)}, path)
    assert message in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mean": "0.5,nan,0.5"}, "not three numbers"),
        ({"std": "inf,1,1"}, "not three numbers"),
        ({"std": "1,1,-inf"}, "not three numbers"),
        ({"mean": "1e999,0,0"}, "not three numbers"),
        ({"mean": "0.5,0.5"}, "not three numbers"),
        ({"crop_ratio": float("nan")}, "not a finite number"),
        ({"max_drop": float("inf")}, "not a finite number"),
        ({"precision": "auto", "data": "generated", "latency_budget": float("inf")}, "not a finite number"),
    ],
    ids=str,
)
def test_numbers_that_are_none(settings, message):
    with pytest.raises(InputError, match=message):
        ExportConfig("cmt_nano", **settings).check()


@pytest.mark.parametrize("values", [{}, {"format": "onnx"}])
def test_no_model(values):
    with pytest.raises(InputError, match="no model was named"):
        ExportConfig.from_mapping(values)


def test_toml_file_with_every_setting(tmp_path):
    config = ExportConfig(
        "cmt_s",
        "onnx",
        "int8",
        "features",
        "w.pth",
        True,
        True,
        True,
        5,
        96,
        "l.txt",
        "d.tar/train",
        7,
        "e",
        9,
        True,
        0.25,
        0.5,
        0,
        "0,0,0",
        "1,1,1",
        0.9,
        "ignore",
        "reduced",
        3.0,
        2,
        3,
        False,
        "1",
        "86",
        2.5,
        "out",
        "birds",
        "sign.key",
        True,  # slim
        True,
        False,  # thumbnails
        False,
        "stem",
        5.0,
        60.0,
        "avx2",
        "auto",
        "answers",
        3,
        9.0,
    )
    lines = []
    for field in fields(config):
        value = getattr(config, field.name)
        assert value != field.default  # a field added later must be added here
        lines.append(
            f"{field.name.replace('_', '-')} ="
            f" {str(value).lower() if isinstance(value, bool) else repr(value)}"
        )
    path = tmp_path / "export.toml"
    path.write_text("# all of it\n" + "\n".join(lines))
    assert ExportConfig.from_mapping(read_config(path), path) == config


@pytest.mark.parametrize(
    "content",
    [b"model = ", b"\xc3\x28", b"model cmt_nano", "folder"],
    ids=["cut", "not utf-8", "not toml", "a folder"],
)
def test_unreadable_file(tmp_path, content):
    path = tmp_path / "export.toml"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.mkdir()
    with pytest.raises(InputError, match="cannot be read") as error:
        read_config(path)
    assert str(path) in str(error.value)


def test_a_missing_file_is_called_missing(tmp_path):
    with pytest.raises(InputError, match="no such settings file"):
        read_config(tmp_path / "gone.toml")


# --- what follows from it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "cmt_nano_fp32_openvino"),
        ({"format": "onnx", "precision": "int8"}, "cmt_nano_int8_onnx"),
        ({"batch": 0}, "cmt_nano_fp32_openvino_dynamic"),
        ({"batch": 4, "precision": "bf16"}, "cmt_nano_bf16_openvino_b4"),
        ({"imgsz": 96}, "cmt_nano_96_fp32_openvino"),
        ({"imgsz": 64}, "cmt_nano_fp32_openvino"),
        ({"imgsz": 32, "batch": 2, "format": "onnx"}, "cmt_nano_32_fp32_onnx_b2"),
        ({"name": "birds"}, "birds_fp32_openvino"),
        ({"name": "birds-2.1", "imgsz": 96, "batch": 0}, "birds-2.1_96_fp32_openvino_dynamic"),
        ({"name": "vögel"}, "vögel_fp32_openvino"),
    ],
)
def test_bundle_name(settings, name):
    config = replace(GOOD, output="some/where", **settings)
    assert config.folder == name
    assert config.target == Path("some/where") / name


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("./cmt.py:small", "cmt.py_small"),
        ("../cmt.py:small", "cmt.py_small"),
        (".hidden/cmt.py:small", "hidden_cmt.py_small"),
        ("sub/net.py:small", "sub_net.py_small"),
        ("_net.py:small", "_net.py_small"),
        ("timm:resnet18.a1_in1k", "timm_resnet18.a1_in1k"),
    ],
)
def test_no_bundle_is_hidden(monkeypatch, model, name):
    spec = replace(GOOD.spec, name=model)
    monkeypatch.setattr("cmt_edge.export.derived.find_model", lambda *_: spec)
    assert replace(GOOD, model=model).folder == f"{name}_fp32_openvino"


@pytest.mark.parametrize(
    ("settings", "size", "short"),
    [
        ({"model": "cmt_nano"}, 64, None),
        ({"model": "cmt_nano", "imgsz": 96}, 96, None),
        ({"model": "cmt_ti"}, 160, 182),
        ({"model": "cmt_xs"}, 192, 219),
        ({"model": "cmt_s"}, 224, 256),
        ({"model": "cmt_b"}, 256, 292),
        ({"model": "cmt_xs", "imgsz": 224}, 224, 256),
    ],
)
def test_preprocessing(settings, size, short):
    spec = ExportConfig(**settings, exif="ignore").preprocess
    assert (spec.size, spec.short_side, spec.exif, spec.interpolation) == (size, short, "ignore", "bicubic")
    assert (spec.mean, spec.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.mark.parametrize("name", list_models())
def test_defaults_are_the_published_figures(name):
    config, spec = ExportConfig(name), find_model(name)
    assert (config.img_size, config.classes, config.spec) == (spec.img_size, spec.num_classes, spec)
    assert replace(config, num_classes=3, imgsz=96).classes == 3


# --- files as editors save them -------------------------------------------------------------------

NAMES = ["straße", "crane", "crane", "猫", "e", "f", "g", "h", "i", "j"]
ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le with a mark", "utf-16-be with a mark"]


def saved(path, text: str, encoding: str) -> str:
    """A text file with or without a byte order mark."""
    name, _, marked = encoding.partition(" ")
    path.write_bytes((("\ufeff" if marked else "") + text).encode(name))
    return str(path)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", ["\n", "\r\n", "\n\n"])
def test_labels_in_the_encodings_of_editors(tmp_path, encoding, ending):
    """Two classes may have one name: ImageNet has two cranes and two maillots."""
    path = saved(tmp_path / "names.txt", ending.join([*NAMES, ""]), encoding)
    config = ExportConfig("cmt_nano", labels=path)
    config.check()
    assert config.read_labels() == NAMES


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_settings_in_the_encodings_of_editors(tmp_path, encoding, ending):
    saved(tmp_path / "settings.toml", f'model = "cmt_nano"{ending}seed = 3{ending}', encoding)
    read = ExportConfig.from_mapping(read_config(tmp_path / "settings.toml"))
    assert read == ExportConfig("cmt_nano", seed=3)


@pytest.mark.parametrize("data", ["straße".encode("latin-1"), b"\xff\xfe\x00"])
def test_labels_that_are_no_unicode_say_so(tmp_path, data):
    (tmp_path / "names.txt").write_bytes(data)
    with pytest.raises(InputError, match="cannot be read") as caught:
        ExportConfig("cmt_nano", labels=str(tmp_path / "names.txt")).read_labels()
    assert "UTF-8" in caught.value.remedy


@pytest.mark.parametrize("separator", [" ", "\t", ": ", ",", ") "])
def test_numbers_that_count_the_lines_are_left_out_of_the_labels(tmp_path, separator):
    lines = [f"{i}{separator}{name}" for i, name in enumerate(NAMES)]
    config = ExportConfig("cmt_nano", labels=saved(tmp_path / "names.txt", "\n".join(lines), "utf-8"))
    assert config.read_labels() == NAMES
    assert "the numbers 0 to 9" in config.labels_note


@pytest.mark.parametrize("first", [1, 5])
def test_other_numbers_belong_to_the_names(tmp_path, first):
    lines = [f"{first + i} euro" for i in range(10)]
    config = ExportConfig("cmt_nano", labels=saved(tmp_path / "names.txt", "\n".join(lines), "utf-8"))
    assert (config.read_labels(), config.labels_note) == (lines, "")


LETTERS = list("jihgfedcba")
JSON_LABELS = {
    "list": LETTERS,
    "by number": {str(i): name for i, name in reversed(list(enumerate(LETTERS)))},
    "by name": {name: i for i, name in enumerate(LETTERS)},
}


@pytest.mark.parametrize("content", JSON_LABELS.values(), ids=JSON_LABELS)
def test_labels_as_json(tmp_path, content):
    path = saved(tmp_path / "names.json", json.dumps(content), "utf-8")
    config = ExportConfig("cmt_nano", labels=path)
    assert (config.read_labels(), config.labels_note) == (LETTERS, "")


@pytest.mark.parametrize("text", ["[1, 2]", '{"0": "a", "2": "b"}', '{"a": 0, "b": 0}', "3", "[]", "{", ""])
def test_json_that_holds_no_labels_is_refused(tmp_path, text):
    path = saved(tmp_path / "names.json", text, "utf-8")
    with pytest.raises(InputError, match=r"names of the classes|cannot be read") as caught:
        ExportConfig("cmt_nano", labels=path).read_labels()
    assert caught.value.where == path
    assert "JSON" in caught.value.remedy


def test_labels_in_a_settings_file(tmp_path):
    """A name may hold a comma."""
    names = ["crane, bird", *NAMES[1:]]
    saved(tmp_path / "settings.toml", f'model = "cmt_nano"\nlabels = {json.dumps(names)}\n', "utf-8")
    config = ExportConfig.from_mapping(read_config(tmp_path / "settings.toml"))
    config.check()
    assert config.read_labels() == names


@pytest.mark.parametrize("count", [9, 11])
def test_labels_are_as_many_as_classes(tmp_path, count):
    path = saved(tmp_path / "names.txt", "\n".join(["same"] * count), "utf-8")
    with pytest.raises(InputError, match=f"{count} labels for 10 classes"):
        ExportConfig("cmt_nano", labels=path).check()


@pytest.mark.parametrize(("value", "uses"), [("", True), ("0", True), ("1", False), ("yes", False)])
def test_one_variable_turns_every_cache_off(monkeypatch, value, uses):
    monkeypatch.setenv("CMT_EDGE_NO_CACHE", value)
    config = ExportConfig("cmt_nano", precision="int8", data="generated")
    assert config.uses_cache == config.keeps_results == uses
    assert not replace(config, cache=False).uses_cache
