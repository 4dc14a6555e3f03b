"""On a terminal nothing from a file can steer it: labels, names of files and of a graph's operations."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import ONNX
from helpers.bundles import LABELS, SIZE, make_bundle, tiny_graph
from helpers.images import coloured

pty = pytest.importorskip("pty", reason="needs a pseudo-terminal")
termios = pytest.importorskip("termios", reason="needs a pseudo-terminal")

HOSTILE = "\x1b[2J\r\0\x9b31m\u202e\nerror: pretended"
"""Characters that clear a terminal, hide a line or turn its direction, and a line of its own."""
RAW = (b"\x1b[2J", b"\r", b"\0", "\x9b".encode(), "\u202e".encode(), b"\nerror: pretended")
"""What of them must not reach a terminal."""


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Its labels are hostile, and so are the names in its graph."""
    graph = onnx.load_from_string(tiny_graph())
    for node in graph.graph.node:
        node.name += HOSTILE
    labels = tuple((f"id {label}{HOSTILE}", f"{label}{HOSTILE}") for label in LABELS)
    return make_bundle(tmp_path / "tiny", labels=labels, members={ONNX: graph.SerializeToString()})


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "red\x1b[2J\r\u202e\nerror: pretended.png"
    path.write_bytes(coloured("red"))
    return path


def show(*command: object) -> tuple[int, bytes]:
    """The exit code of a command, and all that reaches the terminal on which it runs."""
    master, terminal = pty.openpty()
    settings = termios.tcgetattr(terminal)
    settings[1] &= ~termios.OPOST  # a terminal would put \r before each \n
    termios.tcsetattr(terminal, termios.TCSANOW, settings)
    words = [sys.executable, "-m", "cmt_edge", *map(str, command), "-q"]
    with subprocess.Popen(words, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(master, 1 << 16):
                shown += chunk
        except OSError:  # Linux's way to say that nobody writes any more
            pass
    os.close(master)
    return process.returncode, shown


FORMS = ([], ["--json"], ["--csv"])


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_predict(bundle: Bundle, image: Path, form: list[str]) -> None:
    code, shown = show("predict", bundle.path, image, *form)
    assert code == 0
    assert b"red\\u001b[2J" in shown
    assert [raw for raw in RAW if raw in shown] == []


@pytest.mark.parametrize(
    "command", [["verify"], ["verify", "--json"], ["bench", "--iters", "3", "--seconds", "0.05"]]
)
def test_other_commands(bundle: Bundle, command: list[str]) -> None:
    name, *flags = command
    code, shown = show(name, bundle.path, *flags)
    assert (code, bool(shown)) == (0, True), shown
    assert [raw for raw in RAW if raw in shown] == []


def test_a_file_still_gets_the_names_as_they_are(bundle: Bundle, image: Path) -> None:
    words = [sys.executable, "-m", "cmt_edge", "predict", str(bundle.path), str(image), "--csv"]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    assert f'"{image}","red{HOSTILE}"'.encode() in done.stdout


def test_what_a_runtime_says_of_an_operation_that_fails(tmp_path: Path, image: Path) -> None:
    """ONNX Runtime has a log of its own, which writes names of the graph to standard error."""
    graph = onnx.load_from_string(tiny_graph())
    count = numpy_helper.from_array(np.array([1000], np.int64), "count")
    graph.graph.initializer.append(count)
    for name, operation, inputs in (
        ("size", "Shape", ["input"]),
        ("far", "Mul", ["size", "count"]),
        (HOSTILE, "Gather", ["mean", "far"]),
        ("least", "ReduceMin", [HOSTILE]),
    ):
        options = (
            {"axis": 1} if operation == "Gather" else {"keepdims": 0} if operation == "ReduceMin" else {}
        )
        graph.graph.node.append(onnx.helper.make_node(operation, inputs, [name], name, **options))
    head = next(node for node in graph.graph.node if "logits" in node.output)
    head.output[:] = ["plain"]
    graph.graph.node.append(onnx.helper.make_node("Add", ["plain", "least"], ["logits"], "last"))
    nodes = sorted(graph.graph.node, key=lambda node: "logits" in node.output)
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    bundle = make_bundle(tmp_path / "failing", members={ONNX: graph.SerializeToString()})
    code, shown = show("predict", bundle.path, image, "--backend", "onnxruntime")
    assert (code, b"Gather" in shown) == (2, True), shown
    assert [raw for raw in RAW if raw in shown] == []


def test_images_of_an_archive_are_named_inside_it(tmp_path: Path, bundle: Bundle, image: Path) -> None:
    archive = tmp_path / "x.tar"
    with tarfile.open(archive, "w") as tar:
        for name in ("/etc/y.png", "plain/a.png"):
            entry = tarfile.TarInfo(name)
            entry.size = image.stat().st_size
            with image.open("rb") as content:
                tar.addfile(entry, content)
    words = [sys.executable, "-m", "cmt_edge", "predict", str(bundle.path), str(archive), "--csv"]
    done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
    names = [f"{archive}/{name}" for name in ("etc/y.png", "plain/a.png")]
    assert [name for name in names if f"\n{name},".encode() not in done.stdout] == [], done.stdout


def test_a_warning_is_a_sentence(tmp_path: Path, bundle: Bundle) -> None:
    """Pillow warns of a TIFF file whose values are cut off; Python would show the line that says so."""
    from PIL import Image

    path = tmp_path / "cut.tif"
    Image.new("RGB", (SIZE, SIZE), (255, 0, 0)).save(path, tiffinfo={270: "description" * 40})
    content = bytearray(path.read_bytes())
    place = content.index((270).to_bytes(2, "little") + (2).to_bytes(2, "little"))
    content[place + 8 : place + 12] = (len(content) + 1000).to_bytes(4, "little")
    path.write_bytes(content)
    words = [sys.executable, "-m", "cmt_edge", "predict", str(bundle.path), str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "warnings.warn" not in done.stderr
    assert "site-packages" not in done.stderr
    assert done.stderr.startswith("warning: ")
