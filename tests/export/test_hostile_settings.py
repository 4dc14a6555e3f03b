"""Settings files and command lines with hostile values: exit code 0 or 2, never a trace."""

from __future__ import annotations

import contextlib
import json
import string
from dataclasses import fields

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmt_edge.__main__ import main
from cmt_edge.deploy.errors import CmtEdgeError, InputError
from cmt_edge.export.config import ExportConfig
from cmt_edge.export.config_file import read_config
from cmt_edge.export.options import make_flag, read_mapping

WORDS = [
    "",
    "0",
    "-1",
    "1e400",
    "nan",
    "-inf",
    "9" * 5000,
    "1_0",
    "٣",
    "true",
    "../../etc/passwd",
    "/dev/zero",
    "/proc/self/mem",
    "a" * 5000,
    "\x1b[2J",
    "a\rb",
    "\udcff",
    "os:system",
    "timm:",
    ":",
    "%s%n{0}",
    ",,,",
    "--",
    "-",
]
"""Values that some option may stumble over."""

FLAGS = {
    "predict": ["--top", "--backend", "--device", "--threads", "--key", "--color"],
    "verify": ["--data", "--max-drop", "--atol", "--eval-limit", "--backend", "--threads", "--markdown"],
    "bench": ["--warmup", "--iters", "--threads", "--backend", "--device", "--data"],
    "build": ["--device", "--workspace", "--key"],
    "export": sorted(make_flag(each) for each in fields(ExportConfig)),
}
"""Command -> flags that are tried with each word; some take no value."""

KEYS = [each.name for each in fields(ExportConfig)]
VALUES = st.recursive(
    st.one_of(
        st.booleans().map(lambda value: str(value).lower()),
        st.integers().map(str),
        st.floats().map(str),
        st.text(string.printable, max_size=9).map(lambda text: repr(text).replace("'", '"')),
        st.sampled_from(["inf", "nan", "1979-05-27", "[]", "{}", '""', "0x1F", "-0.0", "9" * 400]),
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda values: f"[{', '.join(values)}]"),
    max_leaves=4,
)
"""Values as TOML writes them, possible or not."""


def read_settings(path) -> None:
    """Read a settings file as the command does; typed errors are what is expected."""
    with contextlib.suppress(CmtEdgeError):
        ExportConfig(**{"model": "cmt_nano", **read_mapping(read_config(path), ExportConfig, path)})


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=4))
def test_settings_of_any_type_are_read_or_refused(tmp_path, entries):
    path = tmp_path / "settings.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in entries), "utf-8", "replace")
    read_settings(path)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text(max_size=200).map(str.encode)))
def test_settings_files_of_any_content_are_read_or_refused(tmp_path, content):
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    read_settings(path)


@pytest.mark.parametrize("content", ["[" * 100_000, "a." * 50_000 + "a = 1", "a = " + "[" * 50_000])
def test_settings_that_nest_deeply_are_refused(tmp_path, content):
    path = tmp_path / "settings.toml"
    path.write_text(content)
    with pytest.raises(CmtEdgeError):
        read_config(path)


@pytest.mark.parametrize("command", FLAGS)
def test_no_value_of_a_flag_leaves_a_trace(tmp_path, monkeypatch, capsys, command):
    """Nothing is at the places that the commands name, so that each ends before its work."""
    monkeypatch.chdir(tmp_path)
    place = ["--weights", "absent.pt"] if command == "export" else ["absent"]
    for flag in FLAGS[command]:
        for word in WORDS:
            try:
                code = main([command, *place, f"{flag}={word}"])
            except SystemExit as exc:
                code = exc.code
            printed = capsys.readouterr()
            assert code in {0, 2, 3}, (flag, word, code, printed.err)
            assert "Traceback" not in printed.err, (flag, word)
            assert "\x1b" not in printed.err + printed.out, (flag, word)


HALVES = [json.dumps(["\ud800", *map(str, range(9))]), json.dumps({str(i): f"a\udfff{i}" for i in range(10)})]
"""Files of labels with half of a surrogate pair, which JSON can hold and no file in UTF-8."""


@pytest.mark.parametrize("text", HALVES)
def test_a_label_that_no_manifest_can_hold_is_refused_before_any_work(tmp_path, capsys, text):
    path = tmp_path / "names.json"
    path.write_text(text)
    flags = ["--model", "cmt_nano", "--labels", str(path), "--dry-run"]
    assert main(["export", *flags]) == 2
    assert "half of a character" in capsys.readouterr().err


def test_a_label_that_is_too_long_is_refused_before_any_work(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(["x" * 70_000, *map(str, range(9))]))
    with pytest.raises(InputError, match="65536 characters"):
        ExportConfig("cmt_nano", labels=str(path)).check()


def test_labels_given_in_python_are_checked_too():
    with pytest.raises(InputError, match="half of a character"):
        ExportConfig("cmt_nano", labels=["\udcff", *map(str, range(9))]).check()


@pytest.mark.parametrize("number", ["0x" + "f" * 4000, "-" + "9" * 20, "9" * 20, "0b" + "1" * 64])
@pytest.mark.parametrize(
    "line", ["seed = {}", "threads = [{}]", "unknown = {}", "[other]\nx = {{a = [{{b = {}}}]}}"]
)
def test_a_number_that_toml_does_not_have_is_refused(tmp_path, capsys, number, line):
    path = tmp_path / "settings.toml"
    path.write_text(f'model = "cmt_nano"\n{line.format(number)}\n')
    assert main(["export", "--config", str(path), "--dry-run"]) == 2
    found = capsys.readouterr().err
    assert "does not fit in 64 bits" in found
    assert len(found) < 1000


def test_the_largest_number_of_toml_is_read(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text(f"seed = {2**63 - 1}\n")
    assert read_config(path) == {"seed": 2**63 - 1}
