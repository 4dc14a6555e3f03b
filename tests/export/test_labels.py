"""Files with the names of the classes, as other programs write them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest

from cmt_edge.cmt.weights import LoadedWeights
from cmt_edge.deploy.errors import InputError
from cmt_edge.export.config import ExportConfig
from cmt_edge.export.description import choose_labels
from cmt_edge.export.labels import read_class_names

LINES = {
    "in another order": ("1 dog\n0 cat\n2 eel", ("cat", "dog", "eel")),
    "falling": ("2 c\n1 b\n0 a", ("a", "b", "c")),
    "falling to 1": ("3 c\n2 b\n1 a", ("a", "b", "c")),
    "from 1": ("1: cat\n2: dog", ("cat", "dog")),
    "numbers behind": ("cat 0\ndog 1\neel 2", ("cat", "dog", "eel")),
    "numbers behind in another order": ("cat 2\ndog 0\neel 1", ("dog", "eel", "cat")),
    "YAML": ("1: dog\n0: cat", ("cat", "dog")),
    "YAML below a key": ("names:\n  1: dog\n  0: cat", ("cat", "dog")),
    "a list of YAML": ("names:\n- 'cat'\n- 'dog'", ("cat", "dog")),
    "a list of dashes": ("- cat\n- dog", ("cat", "dog")),
    "CSV with a head": ("index,label\n0,cat\n1,dog", ("cat", "dog")),
    "CSV with the index behind": ("label,index\ncat,1\ndog,0", ("dog", "cat")),
    "CSV of pandas": (',label\n0,"cat, big"\n1,dog', ("cat, big", "dog")),
    "quoted CSV": ('"0","cat ""big"""\n"1","dog"', ('cat "big"', "dog")),
    "quoted names": ('"crane, bird"\ndog', ("crane, bird", "dog")),
    "two cranes": ("crane 1\ndog 0\ncrane 2\neel 3", ("dog", "crane", "crane", "eel")),
    "numbers as names": ("0 1990\n1 1991", ("1990", "1991")),
    "JSON by another name": ('["cat","dog"]', ("cat", "dog")),
    "the ends of lines on old machines": ("cat\rdog\r", ("cat", "dog")),
    "separators inside names": ("cat\u2028x\ndog\x0cy\neel\x85z", ("cat\u2028x", "dog\x0cy", "eel\x85z")),
}


def read(folder: Path, text: str, name: str = "names.txt") -> tuple[str, ...]:
    (folder / name).write_bytes(text.encode())
    return read_class_names(folder / name).names


@pytest.mark.parametrize("name", LINES)
def test_lines_as_other_programs_write_them(tmp_path, name):
    text, names = LINES[name]
    assert read(tmp_path, text) == names


def test_names_that_are_sorted_are_noted(tmp_path):
    (tmp_path / "names.txt").write_text("1 dog\n0 cat\n")
    note = read_class_names(tmp_path / "names.txt").note
    assert note.startswith(str(tmp_path))
    assert "the numbers 0 to 1 in front of the names were left out, and the names were sorted" in note


KEPT = [
    ("1 euro", "2 euro", "3 euro"),
    ("class 2", "class 1", "class 0"),
    ("Acura Integra 2001", "Fiat 500 2012", "Volvo 240 1993"),
    ("0.5 litres", "0.7 litres", "1.0 litre"),
    ("cat", "7 up", "dog"),
    ("#", "[", "{", "1", "0"),
    ("[PAD]", "[UNK]"),
    ("n01440764 tench, Tinca", "n01443537 goldfish"),
    ("2", "0", "1"),
    ("C#", "#hashtag 1"),
]


@pytest.mark.parametrize("names", KEPT, ids=str)
def test_numbers_and_signs_that_are_parts_of_names_stay(tmp_path, names):
    assert read(tmp_path, "\n".join(names)) == names


REFUSED = {
    "a hole": ("0 cat\n2 dog", "2 numbers from 0 to 2"),
    "a later beginning": ("5 cat\n6 dog", "2 numbers from 5 to 6"),
    "one number twice": ("0 cat\n0 dog\n1 eel", "3 numbers from 0 to 1"),
    "a hole behind": ("cat,0\ndog,2", "behind the names"),
    "one line without a number": ("background\n1 cat\n2 dog", "'background' has no number"),
    "two orders": ("0 1\n1 2\n2 0", "two numbers"),
    "a head alone": ("id,name\nn01,cat\nn02,dog", "names columns"),
    "a comment": ("# classes\ncat\ndog", "comment"),
    "a key": ("nc: 2\nnames:\n  0: cat\n  1: dog", "'names:'"),
    "a list in YAML": ("names: [cat, dog]", "format that is not read"),
    "protobuf": ("item {\n  id: 1\n  name: 'cat'\n}", "'item {'"),
    "Python": ("['cat', 'dog']", "format that is not read"),
    "tuples": ("(0, 'cat')\n(1, 'dog')", "format that is not read"),
    "a list over several lines": ("[\n'cat',\n'dog',\n]", "format that is not read"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_lines_that_are_no_names_are_refused(tmp_path, name):
    text, why = REFUSED[name]
    with pytest.raises(InputError, match="names of the classes") as caught:
        read(tmp_path, text)
    assert why in str(caught.value)
    assert "JSON" in caught.value.remedy


@pytest.mark.parametrize("start", ["[", "a:[", "0 ", '"', "a 1", "(0,"])
def test_a_long_line_is_read_in_a_moment(tmp_path, start):
    began = time.process_time()
    for filling in (",", " ", "'", "1"):
        with suppress(InputError):
            read(tmp_path, f"{start}{filling * 200_000}]x\nb\n")
    assert time.process_time() - began < 5


CONTENTS = {
    "from 1": {"cat": 1, "dog": 2},
    "numbers from 1": {"2": "dog", "1": "cat"},
    "indices as texts": {"dog": "1", "cat": "0"},
    "pairs": [["dog", 1], ["cat", 0]],
    "id2label": {"model_type": "vit", "id2label": {"1": "dog", "0": "cat"}, "label2id": {"cat": 0, "dog": 1}},
    "classes": {"classes": ["cat", "dog"]},
    "names": {"names": {"0": "cat", "1": "dog"}},
    "IDs and names": {"1": ["n02", "dog"], "0": ["n01", "cat"]},
}


@pytest.mark.parametrize("name", CONTENTS)
def test_json_as_other_programs_write_it(tmp_path, name):
    assert read(tmp_path, json.dumps(CONTENTS[name]), "names.json") == ("cat", "dog")


def test_ids_become_the_ids_of_the_labels(tmp_path):
    """So that the images of ImageNet, whose folders are called by IDs, match the labels."""
    (tmp_path / "names.json").write_text('{"1": ["n01443537", "goldfish"], "0": ["n01440764", "tench"]}')
    config = ExportConfig("cmt_nano", weights="random", num_classes=2, labels=str(tmp_path / "names.json"))
    loaded = LoadedWeights(source="random")
    labels, source = choose_labels(config, loaded)
    assert labels == (("n01440764", "tench"), ("n01443537", "goldfish"))
    assert source == "file"


WRONG_JSON = {
    "one key twice": ('{"0": "cat", "0": "dog"}', "the key '0'"),
    "one number twice": ('{"01": "cat", "1": "dog"}', "2 indices from 1 to 1"),
    "two orders": ('{"0": "1", "1": "0"}', "either may be the index"),
    "two orders under two keys": ('{"classes": ["b", "a"], "class_to_idx": {"a": 0, "b": 1}}', "two orders"),
    "synonyms": ('{"0": ["cat", "Katze"], "1": ["dog", "Hund"]}', "a list where a name is expected"),
    "digits without end": ('{"' + "9" * 5000 + '": "cat", "1": "dog"}', "no whole number"),
}


@pytest.mark.parametrize("name", WRONG_JSON)
def test_json_without_a_certain_order_is_refused(tmp_path, name):
    text, why = WRONG_JSON[name]
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, "names.json")
    assert why in str(caught.value)
