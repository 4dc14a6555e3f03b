"""Small checkpoints that take hours unless there are caps: many ways to one mapping, and many names."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cmt_edge.cmt import create_model
from cmt_edge.cmt.containers import MAX_VISITS, MAX_WAY, find_places
from cmt_edge.cmt.described import describe_by_shapes, describe_checkpoint, describe_input
from cmt_edge.cmt.hidden_layers import find_nameless_average
from cmt_edge.cmt.strangers import Stranger, find_strangers
from cmt_edge.cmt.weights import load_weights
from cmt_edge.deploy.errors import WeightsError

SECONDS = 40
"""CPU time that reading one file may take; the honest ones take less than one second."""


def make_cycle(**held: Any) -> dict[str, Any]:
    """A mapping that 60 keys lead back to."""
    content: dict[str, Any] = dict(held)
    content.update({f"k{i}": content for i in range(60)})
    return content


def make_ladder(held: Any, keys: int = 300, levels: int = 6) -> Any:
    """Mappings inside each other; each has the next one under every key."""
    for _ in range(levels):
        held = {f"a{i}": held for i in range(keys)}
    return held


def make_averages() -> dict[str, Any]:
    """As :func:`make_ladder`, under keys that name averages, with a list of no layers at the end."""
    held: Any = [0.0] * 3000
    for _ in range(5):
        held = {f"ema_{i}": held for i in range(300)}
    return {"ema": held}


def make_settings() -> dict[str, Any]:
    """Settings of images that hold themselves, and many other keys."""
    content: dict[str, Any] = {f"key{i}": i for i in range(20_000)}
    names = ("data", "dataset", "input", "transform", "transforms", "preprocess", "preprocessing", "meta")
    content.update(dict.fromkeys((*names, "config", "args", "hparams", "cfg", "opt"), content))
    return content


def make_list(levels: int, width: int) -> list[Any]:
    """Lists inside each other, each ``width`` times."""
    held: list[Any] = []
    for _ in range(levels):
        held = [held] * width
    return held


CONTENTS: dict[str, Callable[[], Any]] = {
    "a cycle": make_cycle,
    "a cycle with a tensor": lambda: make_cycle(w=torch.zeros(2, 2)),
    "a ladder": lambda: make_ladder({"w": torch.zeros(1)}),
    "a ladder of averages": make_averages,
    "a ladder of lists": lambda: {"shadow": {"shadow_params": make_list(40, 16)}},
    "settings in settings": make_settings,
    "a mean of many lists": lambda: {"config": {"mean": make_list(40, 16), "std": 1.0}},
    "deep lists": lambda: {"a": make_list(50_000, 1)},
    "a size of mappings": lambda: {"model": "cmt_nano", "imgsz": [{}, {}]},
    "a size of tensors": lambda: {"model": "cmt_nano", "imgsz": [torch.zeros(2), torch.zeros(2)]},
}
"""What a small file holds -> a function that makes it."""


def save_names(path: Path, names: list[str]) -> Path:
    """A safetensors file with tensors that have names and no elements."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps(dict.fromkeys(names, entry), separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    return path


def read_in_time(path: Path) -> None:
    """Do with a file what an export does; it is refused, and within :data:`SECONDS`."""
    started = time.process_time()
    for read in (describe_checkpoint, describe_input, describe_by_shapes):
        read(path)
    with pytest.raises(WeightsError):
        load_weights(create_model("cmt_nano"), path)
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("name", CONTENTS)
def test_a_small_file_takes_no_long_time(tmp_path: Path, name: str) -> None:
    path = tmp_path / "w.pth"
    try:
        torch.save(CONTENTS[name](), path)
    except RecursionError:  # Python's pickle writes no lists as deep as its readers accept
        path.write_bytes(save_deep(50_000))
    assert path.stat().st_size < 1 << 21
    read_in_time(path)


def save_deep(levels: int) -> bytes:
    """A file of torch.save with a list in a list in a list."""
    pickled = b"\x80\x02}q\x00X\x01\x00\x00\x00a" + b"]" * levels + b"a" * (levels - 1) + b"s."
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return buffer.getvalue()


NAMES = {
    "many beginnings": [f"p{i // 150}.a.b.c.d.e.w{i}" for i in range(20_000)],
    "many models": [f"m{i}.{key}" for i in range(100) for key in create_model("cmt_nano").state_dict()],
}
"""What the names of a safetensors file are -> themselves."""


@pytest.mark.parametrize("name", NAMES)
def test_many_names_take_no_long_time(tmp_path: Path, name: str) -> None:
    path = save_names(tmp_path / "w.safetensors", NAMES[name])
    read_in_time(path)
    with pytest.raises(WeightsError, match="more places where the model's weights may be"):
        load_weights(create_model("cmt_nano"), path)


# --- what honest programs write is found as before -------------------------------------------------


def test_a_state_dict_under_several_names_is_found_under_each() -> None:
    state = {"w": torch.zeros(2, 2)}
    content = {"model": state, "ema": {"module": state}, "best": [state, {"net": state}]}
    ways = [place.way for place in find_places(content)]
    assert ways == [("model",), ("ema", "module"), ("best", "[0]"), ("best", "[1]", "net")]


def test_places_come_in_the_order_of_the_file() -> None:
    inner = {"w": torch.zeros(1)}
    content = {"a": {"b": dict(inner)}, "w": torch.zeros(1), "c": dict(inner), "d": {"e": {"f": dict(inner)}}}
    ways = [place.way for place in find_places(content)]
    assert ways == [(), ("a", "b"), ("c",), ("d", "e", "f")]


def test_the_shortest_ways_are_taken_where_there_are_many() -> None:
    state = {"w": torch.zeros(2, 2)}
    content = {"first": {f"k{i}": state for i in range(50)}, "state_dict": state}
    ways = [place.way for place in find_places(content)]
    assert ("state_dict",) in ways
    assert len(ways) == MAX_VISITS
    deep: dict[str, Any] = state
    for _ in range(MAX_WAY):
        deep = {"k": deep}
    assert [len(place.way) for place in find_places(deep)] == [MAX_WAY]
    assert not list(find_places({"k": deep}))


def test_averages_and_objects_are_found_as_before() -> None:
    layers = [torch.zeros(2, 2)]
    assert find_nameless_average({"a": {"ema": {"shadow_params": layers}}}) == ("a", "ema", "shadow_params")
    assert find_nameless_average({"a": {"params": layers}}) is None
    stranger = Stranger()
    shared = {"x": stranger}
    content = {"a": [shared, {"b": shared}], "c": stranger}
    assert [way for way, _ in find_strangers(content)] == [("a", "x"), ("c",)]
