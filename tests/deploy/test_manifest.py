"""The manifest: what is written keeps its bytes, and what is read is checked entry by entry."""

from __future__ import annotations

import copy
import json
from dataclasses import FrozenInstanceError, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmt_edge.deploy import report
from cmt_edge.deploy.bundle import Bundle, Manifest, make_plain, read_record
from cmt_edge.deploy.bundle.manifest import hash_content
from cmt_edge.deploy.bundle.record import EMPTIED, OMITTED, Between, Matches
from cmt_edge.deploy.bundle.sections import ModelEntry, SynthesisEntry
from cmt_edge.deploy.errors import BundleError
from helpers.bundles import edit_manifest, make_bundle
from helpers.paths import ROOT
from helpers.trees import list_places

FOLDER = ROOT / "tests" / "data" / "manifests"
WRITTEN = sorted(FOLDER.glob("*.json"))
"""Manifests of ``cmt_nano`` that the exporter wrote when the sections were still dictionaries."""


def read(content: Any) -> Manifest:
    """A manifest from its content, whose checksum is made right."""
    if isinstance(content, dict):
        content = content | {"checksum": hash_content(content)}
    return Manifest.from_bytes(json.dumps(content).encode(), "manifest.json")


def refusal(content: Any) -> str:
    """The first line of the error for a content that is refused."""
    with pytest.raises(BundleError) as caught:
        read(content)
    assert caught.value.exit_code == 2
    assert caught.value.remedy
    return str(caught.value).splitlines()[0]


def content_of(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def test_there_are_manifests_of_every_kind():
    assert len(WRITTEN) >= 11
    sections = {name for path in WRITTEN for name, value in content_of(path.stem).items() if value}
    assert sections >= {"typing", "calibration", "verdict", "latency", "engine", "host", "runtime"}


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_the_bytes_stay_what_they_were(path):
    data = path.read_bytes()
    assert Manifest.from_bytes(data, path).to_bytes() == data


@pytest.mark.parametrize("path", WRITTEN, ids=lambda path: path.stem)
def test_reports_show_what_the_manifest_holds(path, tmp_path):
    manifest = Manifest.from_bytes(path.read_bytes(), path)
    content, bundle = content_of(path.stem), Bundle(tmp_path / "cmt_nano", manifest)
    shown = json.loads(report.to_json(report.make_bundle_json(bundle)))
    for section in ("verification", "latency", "calibration", "verdict"):
        assert shown[section] == content[section]
    assert shown["bytes"] == sum(entry["size"] for entry in content["files"].values())
    text = report.describe_bundle(bundle)
    assert f"{shown['bytes'] / 1e6:.1f} MB" in text
    assert ("latency: not measured" in text) == (content["latency"] is None)
    assert ("recommended: " in text) == (content["verdict"] is not None)


def test_fields_cannot_be_changed():
    manifest = read(content_of("fp32_openvino"))
    with pytest.raises(FrozenInstanceError):
        manifest.model.weights.seed = 1


def test_entries_with_a_default_may_be_missing():
    content = content_of("fp32_openvino")
    for name in ("runtime", "versions", "typing", "calibration", "verdict", "engine", "host"):
        del content[name]
    manifest = read(content)
    assert manifest.runtime is manifest.host is manifest.engine is None
    assert json.loads(manifest.to_bytes())["runtime"] == {}


# --- errors name the entry --------------------------------------------------------------------------


def put(path: str, value: Any, name: str = "auto") -> dict[str, Any]:
    """The content of a manifest with another value at ``path``."""
    content = content_of(name)
    *way, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    entry: Any = content
    for part in way:
        entry = entry[part]
    entry[last] = value
    return content


REFUSED = {
    "a number for a text": (("model/weights/sha256", 5), "model.weights.sha256 is 5, expected text"),
    "no hash": (("model/weights/sha256", "x"), "model.weights.sha256 is 'x', expected 64 hexadecimal digits"),
    "text for a number": (("latency/p50_ms", "2"), "latency.p50_ms is '2', expected a number"),
    "true for a number": (("latency/batch", True), "latency.batch is true, expected a whole number"),
    "fraction for a count": (("model/opset", 20.5), "model.opset is 20.5, expected a whole number"),
    "below the range": (("model/img_size", 0), "model.img_size is 0, expected at least 1"),
    "a negative size": (
        ("files/golden.npz/size", -1),
        "files.golden.npz.size is -1, expected 0 to 8589934592",
    ),
    "null": (("verification/golden", None), "verification.golden is null, expected an object"),
    "a list for an object": (("host", []), "host is an empty list, expected an object or null"),
    "an object for a list": (("outputs", {}), "outputs is an empty object, expected a list"),
    "a wrong item": (("labels/3", ["cat"]), "labels[3] is a list of 1 items, expected 2 items"),
    "an item of a list": (
        ("verdict/candidates/0/speed/ratio_ci/1", None),
        "verdict.candidates[0].speed.ratio_ci[1] is null, expected a number",
    ),
    "neither of two types": (
        ("input/shape/0", None),
        "input.shape[0] is null, expected a whole number or text",
    ),
    "another entry": (("model/colour", 1), "model holds unknown entries: 'colour'"),
    "another entry at the top": (("surprise", 1), "the manifest holds unknown entries: 'surprise'"),
    "half a character": (
        ("labels_source", "\ud800"),
        "labels_source is '\\ud800', expected text without half characters",
    ),
    "beyond any float": (("latency/p50_ms", 10**400), "expected a finite number"),
    "a long text": (("latency/p50_ms", "x" * 9999), "latency.p50_ms is 'xxxxx"),
}


@pytest.mark.parametrize(("edit", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_an_error_names_the_entry(edit, message):
    said = refusal(put(*edit))
    assert said.startswith("manifest.json: ")
    assert message in said
    assert len(said) < 160


def test_a_missing_entry_is_named():
    content = content_of("int8_openvino")
    del content["calibration"]["recipe"], content["calibration"]["cached"]
    assert refusal(content) == "manifest.json: calibration lacks entries: recipe, cached"


@pytest.mark.parametrize("name", ["bundle", "fp32_openvino", ""])
def test_a_manifest_that_is_no_object(name):
    with pytest.raises(BundleError, match="cannot be read"):
        Manifest.from_bytes(json.dumps(name).encode(), "manifest.json")


# --- the reader -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    size: Annotated[int, Between(1, 3)]
    name: Annotated[str, Matches("[a-z]+", "small letters")] = "a"


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    pair: tuple[int, str] = (1, "b")
    numbers: list[float] = field(default_factory=list)
    either: int | str | None = None
    table: dict[str, Part] = field(default_factory=dict)
    omitted: Part | None = field(default=None, metadata=OMITTED)
    emptied: Part | None = field(default=None, metadata=EMPTIED)


parts = st.builds(Part, st.integers(1, 3), st.text("abc", min_size=1))
wholes = st.builds(
    Whole,
    st.lists(parts).map(tuple),
    st.tuples(st.integers(-(2**64), 2**64), st.text("é\n'")),
    st.lists(st.floats(allow_nan=False, allow_infinity=False)),
    st.none() | st.integers(-(2**64), 2**64) | st.text(),
    st.dictionaries(st.text(), parts),
    st.none() | parts,
    st.none() | parts,
)


@given(wholes)
def test_a_record_is_read_as_it_was_written(whole):
    assert read_record(Whole, json.loads(json.dumps(make_plain(whole))), "file") == whole


def test_how_absent_parts_are_written():
    content = make_plain(Whole((Part(1),)))
    assert content["emptied"] == {}
    assert "omitted" not in content
    assert content["parts"] == ({"size": 1, "name": "a"},)


def test_plain_reaches_into_containers():
    assert make_plain({"a": [Part(1)], "b": (Part(2), None)}) == {
        "a": [{"size": 1, "name": "a"}],
        "b": ({"size": 2, "name": "a"}, None),
    }


def test_whole_numbers_are_not_turned_into_fractions():
    """A number keeps its form, so that the bytes of a manifest that is written again stay the same."""
    assert make_plain(read_record(Whole, {"parts": [], "numbers": [1, 1.0]}, "file"))["numbers"] == [1, 1.0]
    assert (
        json.dumps(make_plain(read_record(Whole, {"parts": [], "numbers": [1]}, "file"))["numbers"]) == "[1]"
    )


# --- random damage ----------------------------------------------------------------------------------

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 1, 2**63, 10**400, 10**4299])
    | st.floats()
    | st.text(st.characters())
    | st.sampled_from(["\ud800", "\0", "", "..", "logits", "batch", "0" * 64]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


CONTENTS = [content_of(path.stem) for path in WRITTEN]
PLACES = [list_places(content) for content in CONTENTS]


def damage(data: st.DataObject, content: dict[str, Any], way: tuple[Any, ...]) -> None:
    """Replace, remove, double or surround the entry at ``way``."""
    *above, last = way
    holder: Any = content
    for part in above:
        holder = holder[part]
    match data.draw(st.sampled_from(["replace", "remove", "add", "copy"])):
        case "replace":
            holder[last] = data.draw(json_values)
        case "remove":
            del holder[last]
        case "add" if isinstance(holder, dict):
            holder[data.draw(st.text(max_size=8))] = data.draw(json_values)
        case "add":
            holder.append(data.draw(json_values))
        case "copy":
            other = content
            for part in data.draw(st.sampled_from(list_places(content))):
                other = other[part]
            holder[last] = copy.deepcopy(other)


@settings(max_examples=600, deadline=None)
@given(st.data())
def test_damage_gives_a_bundle_error_or_a_manifest_that_holds(data):
    index = data.draw(st.integers(0, len(CONTENTS) - 1))
    content = copy.deepcopy(CONTENTS[index])
    damage(data, content, data.draw(st.sampled_from(PLACES[index])))
    try:
        manifest = read(content)
    except BundleError as error:
        str(error).encode()
        return
    again = Manifest.from_bytes(manifest.to_bytes(), "again")
    assert repr(again.model) == repr(manifest.model)
    assert json.dumps(make_plain(again) | {"checksum": ""}) == json.dumps(
        make_plain(manifest) | {"checksum": ""}
    )
    report.describe_bundle(Bundle(Path("bundle"), manifest)).encode()
    json.dumps(report.make_bundle_json(Bundle(Path("bundle"), manifest)))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damaged_bytes_give_a_bundle_error_or_the_same_manifest(data):
    original = data.draw(st.sampled_from(WRITTEN)).read_bytes()
    start = data.draw(st.integers(0, len(original)))
    length = data.draw(st.integers(0, 8))
    damaged = original[:start] + data.draw(st.binary(max_size=8)) + original[start + length :]
    try:
        manifest = Manifest.from_bytes(damaged, "manifest.json")
    except BundleError:
        return
    assert manifest == Manifest.from_bytes(original, "manifest.json")


def test_sections_are_read_alone():
    content = content_of("fp32_openvino")["model"]
    assert make_plain(read_record(ModelEntry, content, "file")) == content | {
        "weights": content["weights"] | {"fresh": (), "resized": ()}
    }
    with pytest.raises(BundleError, match="the manifest lacks entries: seed"):
        read_record(SynthesisEntry, {}, "file")


def test_the_kind_of_an_output_is_known(tmp_path):
    """A kind that this version does not know is refused: its values would be taken for logits."""
    bundle = make_bundle(tmp_path / "b")
    assert "kind" not in json.loads((bundle.path / "manifest.json").read_text())["outputs"][0]
    edit_manifest(bundle, lambda content: content["outputs"][0].update(kind="probabilities"))
    assert Bundle.open(bundle.path).kind == "probabilities"
    edit_manifest(bundle, lambda content: content["outputs"][0].update(kind="distances"))
    with pytest.raises(BundleError, match=r"outputs.*kind is 'distances'"):
        Bundle.open(bundle.path)


@pytest.mark.parametrize(
    ("entry", "twice"),
    [
        ('"labels": [', '"labels": [["z", "z"]],\n  "labels": ['),
        ('"format": ', '"format": "openvino",\n  "format": '),
        ('"size": 16', '"size": 999, "size": 16'),
        ('"checksum": ', '"checksum": "0",\n  "checksum": '),
    ],
)
def test_an_entry_that_stands_twice_is_refused(tmp_path, entry, twice):
    """Readers differ in which of the two they take: what one checks, another does not use."""
    bundle = make_bundle(tmp_path / "b")
    path = bundle.path / "manifest.json"
    text = path.read_text()
    assert entry in text
    path.write_text(text.replace(entry, twice, 1))
    with pytest.raises(BundleError, match="stands in it twice"):
        Bundle.open(bundle.path)
