"""What reads files of strangers, given mutated ones: only errors of our own may come out.

A target is a function of bytes. ``scripts/fuzz.py`` runs the targets with atheris, which is guided by
coverage, or with the mutations of this module; the test suite runs the latter for a moment.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import random
import resource
import tarfile
import time
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmt_edge.deploy import Bundle
from cmt_edge.deploy.bundle import GOLDEN, MANIFEST, ONNX, Golden
from cmt_edge.deploy.bundle.golden import read_reference
from cmt_edge.deploy.bundle.packed import pack
from cmt_edge.deploy.bundle.signature import Signature
from cmt_edge.deploy.decoding import decode
from cmt_edge.deploy.errors import CmtEdgeError
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.jpeg import has_many_scans, strip_metadata
from cmt_edge.deploy.preprocessing import Preprocess, decode_pixels

from .bundles import LABELS, SIZE, make_bundle
from .trt import tiny_graph

SLOW_S = 10.0
"""Seconds of CPU from which on one input is a finding."""
LARGEST_INPUT = 1 << 16
"""Bytes of the largest input that mutations make."""
EXIT_CODES = {1, 2, 3}
"""Exit codes of the errors that an input may end with."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 63, (1 << 64) - 1)
"""Numbers at the edges of what fields of a file hold."""
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**300, -0.0, 1e308, float("nan"), float("inf"),
    "", "0", "../x", "\ud800", "\x1b[2J", "a" * 70_000, [], [[]], {}, {"": {}}, [None] * 300,
)  # fmt: skip
"""Values that stand in place of others in JSON."""

Run = Callable[[bytes], object]
"""Reads an input."""


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: for reports.
        run: reads one input.
        seeds: right inputs, with which mutations begin.
        is_json: whether the inputs are JSON, whose values are mutated too.
        needs: the module without which the target cannot run.
    """

    name: str
    run: Run
    seeds: tuple[bytes, ...]
    is_json: bool = False
    needs: str = ""


@dataclass
class Findings:
    """What came out that must not, once for each place in the code.

    Attributes:
        executions: inputs that were tried.
        refused: those that ended with an error of ours.
        found: the place -> the input and the trace.
    """

    executions: int = 0
    refused: int = 0
    found: dict[str, tuple[bytes, str]] = field(default_factory=dict)

    def attempt(self, target: Target, data: bytes) -> None:
        """Run one input."""
        self.executions += 1
        start = time.process_time()
        try:
            target.run(data)
        except CmtEdgeError as exc:
            self.refused += 1
            if exc.exit_code not in EXIT_CODES:
                self._add(exc, data)
        except Exception as exc:
            self._add(exc, data)
        spent = time.process_time() - start
        if spent > SLOW_S:
            self.found.setdefault("slow", (data, f"took {spent:.1f} s of CPU"))

    def _add(self, exc: Exception, data: bytes) -> None:
        ours = [frame for frame in traceback.extract_tb(exc.__traceback__) if "cmt_edge" in frame.filename]
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        text = "".join(traceback.format_exception(exc))
        self.found.setdefault(f"{type(exc).__name__} at {place}", (data, text))


def fuzz(target: Target, seconds: float, seed: int = 17) -> Findings:
    """Try mutations of the seeds for so long; the same seed tries the same inputs in the same order."""
    findings = Findings()
    for data in target.seeds:
        findings.attempt(target, data)
    end = time.monotonic() + seconds
    for data in mutations(target, random.Random(seed)):
        if time.monotonic() > end:
            return findings
        findings.attempt(target, data)
    return findings


# --- mutations ------------------------------------------------------------------------------------


def mutations(target: Target, generator: random.Random) -> Iterator[bytes]:
    """Mutated seeds without end."""
    while True:
        data = generator.choice(target.seeds)
        if target.is_json and generator.random() < 0.7:
            yield _mutate_json(data, generator)
            continue
        for _ in range(generator.choice((1, 1, 2, 4, 16))):
            data = _mutate(data, target, generator)
        yield data[:LARGEST_INPUT]


def _mutate(data: bytes, target: Target, generator: random.Random) -> bytes:  # noqa: PLR0911, a table of changes
    """One change of bytes."""
    at = generator.randrange(len(data) + 1)
    length = generator.choice((1, 2, 4, 8, 64, 1024))
    change = generator.randrange(7)
    if change == 0:  # one bit
        return (
            data[:at] + bytes(b ^ (1 << generator.randrange(8)) for b in data[at : at + 1]) + data[at + 1 :]
        )
    if change == 1:
        return data[:at] + generator.randbytes(length) + data[at + length :]
    if change == 2:
        return data[:at] + data[at + length :]
    if change == 3:
        return data[:at] + data[at : at + length] * generator.choice((2, 2, 100)) + data[at + length :]
    if change == 4:  # a number of the file
        size = generator.choice((1, 2, 4, 8))
        number = generator.choice(NUMBERS) % (1 << 8 * size)
        return data[:at] + number.to_bytes(size, generator.choice(("little", "big"))) + data[at + size :]
    if change == 5:
        other = generator.choice(target.seeds)
        return data[:at] + other[generator.randrange(len(other) + 1) :]
    return data[:at]


def _mutate_json(data: bytes, generator: random.Random) -> bytes:
    """One value of a JSON text replaced, removed or moved."""
    content = json.loads(data)
    places = list(_list_places(content))
    for _ in range(generator.choice((1, 1, 2, 4))):
        holder, key = generator.choice(places)
        if isinstance(holder, dict) and generator.random() < 0.2:
            holder.pop(key, None)
        elif generator.random() < 0.2:
            other, from_key = generator.choice(places)
            with _forgiving():
                holder[key] = json.loads(json.dumps(other[from_key]))
        else:
            with _forgiving():
                holder[key] = generator.choice(VALUES)
    return json.dumps(content).encode()


def _list_places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a JSON value, with each of its keys."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    for key in list(keys):
        yield content, key
        yield from _list_places(content[key])


def _forgiving() -> Any:
    """A place may have gone with what held it."""
    return contextlib.suppress(KeyError, IndexError, ValueError)


# --- targets --------------------------------------------------------------------------------------


def list_targets(folder: Path) -> dict[str, Target]:
    """Every target by name; their files lie in ``folder``, and the cache too."""
    os.environ["CMT_EDGE_CACHE"] = str(folder / "cache")
    warnings.simplefilter("ignore")
    Image.MAX_IMAGE_PIXELS = None  # the limits are ours
    made = [
        *_list_bundle_targets(_make_tiny(folder / "bundle"), folder),
        *_list_image_targets(folder),
        *_list_text_targets(folder),
        *_list_checkpoint_targets(folder),
    ]
    return {target.name: target for target in made}


def _make_tiny(folder: Path) -> Bundle:
    """A small bundle of a real runtime."""
    graph = tiny_graph(half=False).SerializeToString()
    return make_bundle(folder, format="onnx", members={ONNX: graph}, reference={"0" * 32: 1})


def _list_bundle_targets(bundle: Bundle, folder: Path) -> Iterator[Target]:
    place = bundle.path
    manifest = (place / MANIFEST).read_bytes()

    def open_manifest(data: bytes) -> None:
        """With the right checksum, so that the reader gets beyond it, unless the text begins with a space."""
        (place / MANIFEST).write_bytes(data if data[:1] == b" " else seal(data))
        Bundle.open(place)

    yield Target("manifest", open_manifest, (manifest, b" " + manifest), is_json=True)
    yield Target("signature", lambda data: Signature.from_bytes(data, "x"), (_sign(),), is_json=True)
    graph = (place / ONNX).read_bytes()
    yield Target("graph", _make_member_target(_make_tiny(folder / "graph"), ONNX), (graph,))
    yield Target(
        "golden vectors",
        _make_file_target(folder / GOLDEN, lambda path: Golden.from_file(path, SIZE)),
        ((place / GOLDEN).read_bytes(), _store_arrays(place / GOLDEN)),
    )
    yield Target(
        "reference answers",
        _make_file_target(folder / "reference.npz", lambda path: read_reference(path, len(LABELS))),
        ((place / "reference.npz").read_bytes(),),
    )
    packed = folder / "tiny.cmt.zip"
    pack(place, bundle.manifest.files, packed)
    yield Target(
        "packed bundle", _make_file_target(packed, lambda path: Bundle.open(path)), (packed.read_bytes(),)
    )


def _list_image_targets(folder: Path) -> Iterator[Target]:
    spec = Preprocess(SIZE, None, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    images = tuple(_encode_images())
    jpegs = tuple(data for data in images if data[:2] == b"\xff\xd8")

    def scan(data: bytes) -> None:
        has_many_scans(data)
        for keep in (False, True):
            stripped = strip_metadata(data, keep_exif=keep)
            assert stripped is None or len(stripped) <= len(data)

    def read_all(path: Path) -> None:
        archive = ImageSet(path, labelled=False)
        for item in archive.items[:8]:
            archive.read(item)

    yield Target("image", lambda data: decode_pixels(data, spec), images)
    yield Target("image, turned", lambda data: decode(data, "apply"), images)
    yield Target("JPEG scan", scan, jpegs)
    yield Target("archive", _make_file_target(folder / "images.tar", read_all), tuple(_make_archives(images)))


def _list_text_targets(folder: Path) -> Iterator[Target]:
    def read_settings(path: Path) -> None:
        from cmt_edge.export.config import ExportConfig
        from cmt_edge.export.config_file import read_config

        ExportConfig.from_mapping(read_config(path), path)

    def read_labels(path: Path) -> None:
        from cmt_edge.export.labels import read_class_names

        read_class_names(path)

    settings = (
        b'model = "cmt_nano"\nseed = 3\nprecision = "int8"\n',
        b'[export]\nmodel = "cmt_xs"\nhead = "features"\nlabels = ["a", "b"]\nmean = [0.5, 0.5, 0.5]\n',
        b'[tool.cmt-export]\nmodel = "cmt_nano"\n"--half" = true\nimgsz = 0x40\nbatch = 1_0\natol = 1e-3\n'
        b"[other]\nx = {a = [1]}\n",
    )
    names = (
        b"cat\ndog\n",
        b"0 cat\n1 dog\n",
        "\ufeffkaffee\r\ncrêpe\r\n".encode(),
        "a\nb\n".encode("utf-16"),
    )
    maps = (b'["cat", "dog"]', b'{"0": "cat", "1": "dog"}', b'{"cat": 0, "dog": 1}')
    torch = "torch"
    yield Target("settings", _make_file_target(folder / "s.toml", read_settings), settings, needs=torch)
    yield Target("labels", _make_file_target(folder / "names.txt", read_labels), names, needs=torch)
    json_labels = _make_file_target(folder / "names.json", read_labels)
    yield Target("labels in JSON", json_labels, maps, is_json=True, needs=torch)


def _list_checkpoint_targets(folder: Path) -> Iterator[Target]:
    def read(path: Path) -> None:
        from cmt_edge.cmt.described import describe_checkpoint

        describe_checkpoint(path)

    checkpoint = _make_file_target(folder / "weights.pth", read)
    tensors = _make_file_target(folder / "weights.safetensors", read)
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"__metadata__":{"model":"cmt_nano"}}'
    safe = len(header).to_bytes(8, "little") + header + bytes(8)
    yield Target("checkpoint", checkpoint, tuple(_save_checkpoints()), needs="torch")
    yield Target("safetensors", tensors, (safe,), needs="torch")


def seal(data: bytes) -> bytes:
    """A manifest with the checksum that its content has; what is no object stays as it is."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if not isinstance(content, dict):
        return data
    content.pop("checksum", None)
    try:
        text = json.dumps(content, sort_keys=True)
        content["checksum"] = hashlib.sha256(text.encode()).hexdigest()
        return json.dumps(content).encode()
    except (ValueError, RecursionError, TypeError):
        return data


def _make_file_target(path: Path, read: Callable[[Path], object]) -> Run:
    def run(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return run


def _make_member_target(bundle: Bundle, name: str) -> Run:
    """Opens a bundle whose member ``name`` is the input, with its hash."""
    manifest = json.loads((bundle.path / MANIFEST).read_bytes())

    def run(data: bytes) -> object:
        (bundle.path / name).write_bytes(data)
        manifest["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (bundle.path / MANIFEST).write_bytes(seal(json.dumps(manifest).encode()))
        return Bundle.open(bundle.path)

    return run


def _sign() -> bytes:
    return Signature("0" * 64, bytes(64)).to_bytes()


def _store_arrays(path: Path) -> bytes:
    """The same arrays, not compressed."""
    with np.load(path) as arrays:
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)
    return buffer.getvalue()


def _encode_images() -> Iterator[bytes]:
    """A small image in every format that is read, and JPEGs and TIFFs of several kinds."""
    values = np.random.default_rng(1).integers(0, 256, (24, 20, 3), np.uint8)
    image = Image.fromarray(values)
    exif = Image.Exif()
    exif[0x0112] = 6
    variants: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", image, {"exif": exif, "comment": b"x" * 40}),
        ("JPEG", image, {"progressive": True}),
        ("JPEG", image.convert("CMYK"), {}),
        ("JPEG", image.convert("L"), {"icc_profile": b"y" * 200}),
        ("PNG", image, {"exif": exif}),
        ("PNG", image.convert("P"), {"transparency": 3}),
        ("PNG", image.convert("I;16"), {}),
        ("WEBP", image, {"exif": exif}),
        ("GIF", image, {}),
        ("BMP", image, {}),
        ("DIB", image, {}),
        ("PPM", image, {}),
        ("TIFF", image, {}),
        ("TIFF", image, {"compression": "tiff_lzw"}),
        ("TIFF", image.convert("CMYK"), {"compression": "tiff_adobe_deflate"}),
        ("AVIF", image, {}),
    ]
    for kind, variant, options in variants:
        buffer = io.BytesIO()
        try:
            variant.save(buffer, kind, **options)
        except (OSError, KeyError):  # this Pillow lacks the format
            continue
        yield buffer.getvalue()


def _make_archives(images: tuple[bytes, ...]) -> Iterator[bytes]:
    for layout in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=layout) as archive:
            for name in ("cat/1.jpg", "dog/2.jpg", "x" * 90 + "/3.jpg"):
                entry = tarfile.TarInfo(name)
                entry.size = len(images[0])
                archive.addfile(entry, io.BytesIO(images[0]))
            link = tarfile.TarInfo("dog/4.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "2.jpg"
            archive.addfile(link)
        yield buffer.getvalue()


def _save_checkpoints() -> Iterator[bytes]:
    """Checkpoints in both formats of PyTorch; nothing without PyTorch."""
    try:
        import torch
    except ImportError:
        yield b"\x80"
        return
    state = OrderedDict(weight=torch.zeros(2, 3), bias=torch.ones(2))
    content = {"state_dict": state, "epoch": 3, "model": "cmt_nano", "class_names": ["a", "b"], "lr": [1e-3]}
    for new in (True, False):
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=new)
        yield buffer.getvalue()


def limit_memory(gibibytes: int) -> None:
    """Let this process take at most so much address space."""
    size = gibibytes << 30
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
