"""Options are written once: flags, help, choices and settings files say the same."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from typing import get_type_hints

import pytest

from cmt_edge.__main__ import main as edge_main
from cmt_edge.cmt.features import HEADS
from cmt_edge.deploy.errors import InputError
from cmt_edge.export import ExportConfig
from cmt_edge.export import settings as settings_module
from cmt_edge.export.cli import build_parser
from cmt_edge.export.cli import main as export_main
from cmt_edge.export.options import (
    add_flags,
    get_option,
    list_changed_flags,
    list_types,
    make_flag,
    make_option,
    read_flags,
    read_mapping,
)
from cmt_edge.export.settings import GROUPS, TENSORRT, Settings

HELP = """
import sys
from cmt_edge.export.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
print(sorted({"torch", "onnx", "onnxruntime", "openvino", "nncf"} & set(sys.modules)))
"""


def parsed(*argv: str) -> dict[str, object]:
    return read_flags(build_parser().parse_args(argv), Settings)


def values(field) -> list[str]:
    """Arguments that change a field from its default."""
    flag = make_flag(field)
    if isinstance(field.default, bool) or field.name == "ema":
        return [flag]
    return [flag, "0.7" if field.name == "crop_ratio" else "7"]


@pytest.mark.parametrize("field", fields(Settings), ids=lambda f: f.name)
def test_every_field_has_its_flag_its_group_and_its_help(field):
    found = parsed(*values(field))
    assert list(found) == [field.name]
    assert found[field.name] != field.default
    assert get_option(field).group in GROUPS
    assert len(get_option(field).help) > 10


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {}),
        (["--int8"], {"precision": "int8"}),
        (["--half"], {"precision": "fp16"}),
        (["--no-build"], {"build": False}),
        (["--no-cache"], {"cache": False}),
        (["--no-ema"], {"ema": False}),
        (["--ema"], {"ema": True}),
        (["-o", "here"], {"output": "here"}),
        (["--batch", "0", "--workspace", "2"], {"batch": 0, "workspace": 2.0}),
        (["--imgsz", "64", "--precision", "int8"], {"imgsz": 64, "precision": "int8"}),
        (["--int8", "--int8", "--precision", "INT8"], {"precision": "INT8"}),
        (["--batch", "2", "--batch", "4"], {"batch": 4}),
    ],
)
def test_only_flags_that_were_given_have_a_say(argv, expected):
    assert parsed(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "first", "second"),
    [
        (["--half", "--int8"], "--half", "--int8"),
        (["--int8", "--half"], "--int8", "--half"),
        (["--half", "--precision", "int8"], "--half", "--precision int8"),
        (["--precision=fp32", "--int8"], "--precision fp32", "--int8"),
        (["--precision", "auto", "--precision", "bf16"], "--precision auto", "--precision bf16"),
        (["--int8", "--precision", "int8", "--half"], "--precision int8", "--half"),
        (["--ema", "--no-ema"], "--ema", "--no-ema"),
    ],
)
@pytest.mark.parametrize("main", [export_main, edge_main], ids=["cmt-export", "cmt-edge"])
def test_flags_that_contradict_each_other_are_refused(capsys, main, argv, first, second):
    command = ["export"] if main is edge_main else []
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--model", "cmt_nano", *argv, "--json"])
    out, err = capsys.readouterr()
    what = f"{first} and {second} contradict each other; keep one of them"
    assert f"error: {what}\n" in err
    assert json.loads(out)["error"]["what"] == what


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--fp16", "did you mean --precision fp16?"),
        ("--BF16", "did you mean --precision bf16?"),
        ("--onnx", "did you mean --format onnx?"),
        ("--fp8", "cmt-export --help lists the flags"),
    ],
)
def test_a_value_that_is_written_as_a_flag(capsys, flag, words):
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(["--model", "cmt_nano", flag])
    assert capsys.readouterr().err.endswith(f"unrecognized arguments: {flag}; {words}\n")


def test_help_is_grouped_and_imports_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, check=True)
    *text, heavy = done.stdout.splitlines()
    assert heavy == "[]"
    headings = [line[:-1] for line in text if line.endswith(":") and not line.startswith(" ")]
    assert headings == ["options", *GROUPS.values(), "examples"]
    assert "40 % of what is free" in " ".join(done.stdout.split())


def test_lists_that_heavy_modules_have_too():
    assert settings_module.HEAD_CHOICES == HEADS


@pytest.mark.parametrize(
    "field", [f for f in fields(Settings) if get_option(f).choices], ids=lambda f: f.name
)
def test_choices_are_checked(field):
    with pytest.raises(InputError, match=r"unknown .* 'nonsense'"):
        replace(ExportConfig("cmt_nano"), **{field.name: "nonsense"}).check()


NUMBERS = [f for f in fields(Settings) if {int, float} & set(list_types(get_type_hints(Settings)[f.name]))]
"""Every option that is a number."""


def outside(field) -> list[str]:
    """Numbers that an option refuses: below and above its range, and none at all."""
    numbers = get_option(field).range
    low = numbers.least if numbers.above else numbers.least - 1
    return [str(low), str(numbers.most + 1), "1" + "0" * 30, "nan", "inf", "-inf", "1e999", "x", ""]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_every_number_has_a_range(field):
    numbers = get_option(field).range
    assert 0 <= numbers.least < numbers.most
    assert field.default is None or not numbers.find_fault(field.default)


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_a_number_out_of_range_is_refused_on_the_command_line(capsys, field):
    for value in outside(field):
        with pytest.raises(SystemExit, match="2"):
            build_parser().parse_args([f"{make_flag(field)}={value}"])
        what = f"argument {make_flag(field)}: {value[:40]!r}" if value else f"{make_flag(field)} is empty"
        assert what in capsys.readouterr().err


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_a_number_out_of_range_is_refused_in_python(field):
    kind = int if int in list_types(get_type_hints(Settings)[field.name]) else float
    for value in outside(field)[:3]:
        with pytest.raises(InputError, match=rf"{make_flag(field)} .* is too (small|large)"):
            replace(ExportConfig("cmt_nano"), **{field.name: kind(value)}).check()
    for value in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(InputError, match=rf"{make_flag(field)} .* is not a finite number"):
            replace(ExportConfig("cmt_nano"), **{field.name: float(value)}).check()


@pytest.mark.parametrize("field", NUMBERS, ids=lambda f: f.name)
def test_the_ends_of_a_range_are_in_it(field):
    numbers = get_option(field).range
    ends = [numbers.most] if numbers.above else [numbers.least, numbers.most]
    for end in ends:
        assert getattr(build_parser().parse_args([f"{make_flag(field)}={end}"]), field.name) == end


TEXTS = [f for f in fields(Settings) if str in list_types(get_type_hints(Settings)[f.name])]


@pytest.mark.parametrize("field", TEXTS, ids=lambda f: f.name)
def test_an_empty_text_is_no_value(field):
    """``--data "$DATA"`` with a variable that is not set must not mean the folder one stands in."""
    with pytest.raises(InputError, match=rf"{make_flag(field)} is empty"):
        replace(ExportConfig("cmt_nano"), **{field.name: ""}).check()


@pytest.mark.parametrize("field", TEXTS, ids=lambda f: f.name)
def test_a_text_with_a_nul_character_is_no_value(field):
    """Only a settings file can hold one; no file can be called so."""
    with pytest.raises(InputError, match=rf"{make_flag(field)} 'a\\x00b' holds a NUL character"):
        replace(ExportConfig("cmt_nano"), **{field.name: "a\0b"}).check()


def test_options_of_a_group_that_differ_from_their_defaults():
    config = ExportConfig("cmt_nano", build=False, device="1")
    assert list_changed_flags(config, TENSORRT) == ["--no-build", "--device"]
    assert list_changed_flags(ExportConfig("cmt_nano"), TENSORRT) == []


@dataclass(frozen=True)
class Small:
    """Options of a test."""

    share: float = make_option(0.5, help="5 % or more", group="g")
    name: str | None = make_option(None, help="a name", group="g", metavar="NAME")
    fast: bool = make_option(True, help="be slow", group="g")


def test_the_helpers_work_for_any_dataclass(capsys):
    import argparse

    parser = argparse.ArgumentParser()
    add_flags(parser, Small, {"g": "of a group"})
    assert read_flags(parser.parse_args(["--share", "1", "--no-fast"]), Small) == {
        "share": 1.0,
        "fast": False,
    }
    parser.print_help()
    assert "5 % or more (default: 0.5)" in capsys.readouterr().out
    assert read_mapping({"share": 1, "name": None}, Small) == {"share": 1, "name": None}
    with pytest.raises(InputError, match="fast = None should be bool"):
        read_mapping({"fast": None}, Small)


def test_names_are_read_in_any_case(tmp_path, monkeypatch):
    config = ExportConfig("CMT_Nano", weights="Random", format="OpenVINO", precision="INT8", data="Generated")
    assert (config.weights, config.format, config.precision) == ("random", "openvino", "int8")
    assert (config.data, config.model_name) == ("generated", "cmt_nano")
    assert ExportConfig("cmt_nano", format="Engine").format == "trt"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Random").write_text("a checkpoint")
    assert ExportConfig("cmt_nano", weights="Random").weights == "Random", "a file is meant"
