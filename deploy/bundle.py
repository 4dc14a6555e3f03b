"""The product: a folder that any runtime can finish, serve, check and measure.

``manifest.json`` names every other file with its size and SHA-256; it is written last, so a folder with a manifest is
complete. Hashes protect against accidents; they do not prove where a bundle comes from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from .errors import BundleError, OutputError
from .files import sha256_of, sync_folder, sync_tree, write_atomic, writing
from .preprocess import Preprocess

SCHEMA = 2
MANIFEST = "manifest.json"
ONNX = "model.onnx"
GOLDEN = "golden.npz"
REFERENCE = "reference.npz"
ENGINES = "engines"
LOGITS = "logits"
"""Name of a classifier's output; feature maps are called ``stage1`` and so on."""
MAX_MANIFEST = 16 << 20
MAX_FILES = 256
MAX_TOTAL = 8 << 30


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds and how it was made; see ``docs/bundle.md`` for every field."""

    model: dict[str, Any]
    input: dict[str, Any]
    outputs: list[dict[str, Any]]
    preprocess: dict[str, Any]
    labels: list[list[str]]
    labels_source: str
    precision: str
    format: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    runtime: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    typing: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None
    verification: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None
    engine: dict[str, Any] | None = None
    host: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA
    checksum: str = ""
    """SHA-256 of all other entries, set when the manifest is written: an edited label or mean does not go unnoticed."""

    def to_bytes(self) -> bytes:
        content = asdict(self)
        content["checksum"] = _content_hash(content)
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes, where: object) -> Manifest:
        """Parse and check the types of the top level; raises :class:`BundleError`."""
        try:
            content = json.loads(data)
            schema = content["schema"]
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise _broken("the manifest cannot be read", where, exc) from exc
        if schema != SCHEMA:
            raise _broken(f"manifest schema {schema} is not supported, this version reads {SCHEMA}", where)
        unknown = set(content) - {f.name for f in fields(cls)}
        if unknown:
            raise _broken(f"unknown manifest entries: {', '.join(sorted(unknown))}", where)
        try:
            manifest = cls(**content)
        except TypeError as exc:
            raise _broken("the manifest lacks entries", where, exc) from exc
        for name, kind in (("model", dict), ("input", dict), ("outputs", list), ("files", dict), ("runtime", dict),
                           ("labels", list), ("precision", str), ("format", str)):  # fmt: skip
            if not isinstance(getattr(manifest, name), kind):
                raise _broken(f"manifest entry {name!r} is not a {kind.__name__}", where)
        _check_shapes(manifest, where)
        _check_engine(manifest.engine, where)
        if manifest.checksum != _content_hash(content):
            raise _broken("the manifest was changed after the export: its checksum differs", where)
        return manifest


def _check_engine(entry: Any, where: object) -> None:
    if entry is None:
        return
    texts = ("file", "seal", "report", "text")
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("key"), dict)
        or not all(isinstance(entry.get(t), str) for t in texts)
    ):
        raise _broken("the manifest's engine entry lacks its file, key or seal", where)


def _content_hash(content: Mapping[str, Any]) -> str:
    """Over what the file says, not what this version knows, so that bundles of other versions stay readable."""
    rest = {k: v for k, v in content.items() if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _check_shapes(manifest: Manifest, where: object) -> None:
    ends = [manifest.input, *manifest.outputs]
    if len(ends) < 2 or not all(isinstance(end, dict) and isinstance(end.get("name"), str) for end in ends):
        raise _broken("the manifest's input or an output has no name", where)
    if not all(isinstance(end.get("shape"), list) and end["shape"] for end in ends):
        raise _broken("the manifest's input or an output has no shape", where)
    pairs = all(isinstance(pair, list) and len(pair) == 2 for pair in manifest.labels)
    logits = [output["shape"][-1] for output in manifest.outputs if output["name"] == LOGITS]
    if not pairs or [len(manifest.labels)] != (logits or [0]):
        raise _broken("the manifest's labels are not one [id, name] pair a logit", where)


def _broken(what: str, where: object, why: object = None) -> BundleError:
    return BundleError(what, where=where, why=why, remedy="copy the whole bundle again, or export it again")


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Read the manifest and check every file's presence, size and hash.

        Raises:
            BundleError: no bundle, a missing, edited, extra or linked file, or a manifest that cannot be understood.
        """
        path = Path(path)
        manifest_path = path / MANIFEST
        if not os.path.isdir(path) or not os.path.isfile(manifest_path):
            what = "is not a bundle: it has no manifest.json" if os.path.isdir(path) else "no such bundle folder"
            raise BundleError(what, where=path, remedy="give the folder that cmt-export printed")
        if manifest_path.is_symlink() or manifest_path.stat().st_size > MAX_MANIFEST:
            raise _broken("the manifest is a link or too large", manifest_path)
        manifest = Manifest.from_bytes(manifest_path.read_bytes(), manifest_path)
        _check_members(path, manifest)
        return cls(path, manifest)

    @property
    def preprocess(self) -> Preprocess:
        return Preprocess.from_json(self.manifest.preprocess)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs in the graph's order: ``["logits"]``, or one a feature map."""
        return [output["name"] for output in self.manifest.outputs]

    @property
    def head(self) -> str:
        """What the model gives: ``"logits"`` or ``"features"``."""
        return LOGITS if self.outputs == [LOGITS] else "features"

    @property
    def labels(self) -> list[str]:
        """Readable class names in logit order."""
        return [str(pair[-1]) for pair in self.manifest.labels]

    @property
    def class_ids(self) -> list[str]:
        """What data sets call the classes, in logit order (ImageNet: synset ids; elsewhere the names)."""
        return [str(pair[0]) for pair in self.manifest.labels]

    def file(self, name: str) -> Path:
        """Path of a member; raises :class:`BundleError` if the bundle has none of this name."""
        if name not in self.manifest.files:
            raise _broken(f"has no {name}", self.path)
        return self.path / name

    def update(self, manifest: Manifest, files: Mapping[str, bytes], drop: Collection[str] = ()) -> Bundle:
        """Add ``files`` in place, the manifest last, then remove ``drop``: at every moment the folder is a whole bundle.

        New files go under ``engines/``, where :meth:`open` ignores what the manifest does not name, and never replace one.
        """
        now = Manifest.from_bytes((self.path / MANIFEST).read_bytes(), self.path / MANIFEST)
        if now.files != self.manifest.files:
            raise BundleError("the bundle was changed meanwhile", where=self.path, remedy="run the command again")
        entries = {name: entry for name, entry in self.manifest.files.items() if name not in drop}
        for name, data in files.items():
            digest = hashlib.sha256(data).hexdigest()
            if name in self.manifest.files and self.manifest.files[name]["sha256"] != digest:
                raise ValueError(f"{name} would be replaced before the manifest knows")
            entries[name] = {"size": len(data), "sha256": digest}
            with writing(self.path):
                (self.path / name).parent.mkdir(exist_ok=True)
            write_atomic(self.path / name, data)
        manifest = replace(manifest, files=dict(sorted(entries.items())))
        write_atomic(self.path / MANIFEST, manifest.to_bytes())
        for name in [*drop, *_ignored(self.path, manifest)]:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        return Bundle(self.path, manifest)

    def golden(self) -> Golden:
        """The golden inputs and what the reference made of them."""
        return Golden.from_file(self.file(GOLDEN))

    def reference(self) -> dict[str, int]:
        """Reference top-1 by image content (see :func:`deploy.images.digest`), empty if none was recorded."""
        if REFERENCE not in self.manifest.files:
            return {}
        with _npz(self.file(REFERENCE)) as data:
            return dict(zip(data["digest"].tolist(), data["top1"].tolist(), strict=True))


@dataclass(frozen=True)
class Golden:
    """Generated inputs with what the PyTorch reference made of them.

    Attributes:
        sources: encoded PNG files, one an image.
        pixels: ``(K, S, S, 3)`` uint8, the sources after decode, resize and crop.
        outputs: float32 ``(K, ...)``, what the reference makes of the normalised pixels, in the order of the manifest's outputs.
    """

    sources: list[bytes]
    pixels: np.ndarray
    outputs: list[np.ndarray]

    @property
    def logits(self) -> np.ndarray:
        """``(K, classes)``, of a classifier."""
        return self.outputs[0]

    def save(self, path: Path) -> None:
        blobs = {f"source{i}": np.frombuffer(s, np.uint8) for i, s in enumerate(self.sources)}
        blobs |= {f"output{i}": output for i, output in enumerate(self.outputs)}
        np.savez_compressed(path, pixels=self.pixels, **blobs)  # type: ignore[arg-type]

    @classmethod
    def from_file(cls, path: Path) -> Golden:
        with _npz(path) as data:
            sources = [data[f"source{i}"].tobytes() for i in range(len(data["pixels"]))]
            count = sum(name.startswith("output") for name in data.files)
            return cls(sources, data["pixels"], [data[f"output{i}"] for i in range(count)])


def save_reference(path: Path, top1: dict[str, int]) -> None:
    """Write :data:`REFERENCE`: content digest -> top-1 class of the PyTorch reference."""
    np.savez_compressed(path, digest=np.array(list(top1), "U32"), top1=np.array(list(top1.values()), np.int32))


@contextmanager
def _npz(path: Path) -> Iterator[Any]:
    """An ``.npz`` opened without pickle, damage as a typed error."""
    try:
        with np.load(path, allow_pickle=False) as data:
            yield data
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile) as exc:
        raise _broken("cannot be read", path, exc) from exc


def _check_members(path: Path, manifest: Manifest) -> None:
    files = manifest.files
    if len(files) > MAX_FILES or len({n.lower() for n in files}) != len(files):
        raise _broken("has too many files, or names that differ only in case", path)
    total = 0
    for name, entry in files.items():
        parts = PurePosixPath(name).parts
        if (
            not parts
            or name != PurePosixPath(name).as_posix()
            or ".." in parts
            or parts[0] == "/"
            or "\\" in name
            or ":" in name
        ):
            raise _broken(f"names a file outside the bundle: {name!r}", path)
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int) or not isinstance(entry.get("sha256"), str):
            raise _broken(f"the entry of {name} lacks size or sha256", path)
        total += entry["size"]
    if total > MAX_TOTAL:
        raise _broken(f"declares {total} bytes, the cap is {MAX_TOTAL}", path)
    present = set()
    for found in path.rglob("*"):
        if found.is_symlink():
            raise _broken("holds a link, which bundles may not", found)
        if not found.is_dir():
            present.add(found.relative_to(path).as_posix())
    extra = sorted(present - set(files) - {MANIFEST} - _ignored(path, manifest))
    missing = sorted(set(files) - present)
    if extra or missing:
        text = [f"missing: {', '.join(missing)}"] if missing else []
        text += [f"not in the manifest: {', '.join(extra)}"] if extra else []
        raise _broken("does not match its manifest", path, "; ".join(text))
    for name, entry in files.items():
        member = path / name
        if member.stat().st_size != entry["size"] or sha256_of(member) != entry["sha256"]:
            raise _broken(f"{name} was changed after the export: its SHA-256 differs from the manifest", path)
        if name.endswith(".onnx") and _has_external_data(member):
            raise _broken(f"{name} stores weights outside the file, which bundles may not", path)


def _ignored(path: Path, manifest: Manifest) -> set[str]:
    """Files that a power loss may leave: temporary ones, and engines the manifest was to name next. They are never read."""
    left = {p.relative_to(path).as_posix() for p in path.rglob(".*.tmp")}
    left |= {p.relative_to(path).as_posix() for p in (path / ENGINES).glob("*") if p.is_file()}
    return left - set(manifest.files)


def _has_external_data(onnx: Path) -> bool:
    """Whether an ONNX file refers to another file, found without parsing it: the key that protobuf writes for such tensors."""
    if onnx.stat().st_size == 0:
        return False
    with open(onnx, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b"\x0a\x08location\x12") >= 0


class BundleWriter:
    """Collects the files of a bundle in a hidden folder beside ``target`` and moves them there in one step.

    Use as a context manager: on any error or interruption the hidden folder is removed and an existing bundle stays
    as it was. Stale folders of runs that were killed are removed when the next one starts.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.folder = target
        self._previous: Any = None

    def check(self) -> None:
        """Raise :class:`OutputError` where something that is no bundle stands in the way."""
        if self.target.is_symlink() or (self.target.exists() and not (self.target / MANIFEST).is_file()):
            raise OutputError(
                "exists and is not a bundle, so it is not replaced", where=self.target, remedy="choose another -o DIR"
            )

    def __enter__(self) -> BundleWriter:
        self.check()
        parent = self.target.parent
        with writing(parent):
            parent.mkdir(parents=True, exist_ok=True)
            self._recover()
            self.folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}.{os.getpid()}.", suffix=".tmp", dir=parent))
            self.folder.chmod(0o755)
        self._previous = terminate_as_interrupt()
        return self

    def __exit__(self, *exc: object) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        old = self._old()
        if old.exists() and self.target.exists():
            shutil.rmtree(old, ignore_errors=True)
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def staged(self, manifest: Manifest) -> Bundle:
        """The unfinished bundle, to be verified and measured before :meth:`commit`."""
        files = {}
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            name = path.relative_to(self.folder).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": sha256_of(path)}
        return Bundle(self.folder, replace(manifest, files=files))

    def commit(self, manifest: Manifest) -> Bundle:
        """Hash every file, write the manifest last, and move the folder into place."""
        with writing(self.folder):
            manifest = self.staged(manifest).manifest
            write_atomic(self.folder / MANIFEST, manifest.to_bytes())
            sync_tree(self.folder)
            self._swap()
        return Bundle(self.target, manifest)

    def _old(self) -> Path:
        return self.target.with_name(f".{self.target.name}.old")

    def _swap(self) -> None:
        old = self._old()
        shutil.rmtree(old, ignore_errors=True)
        try:
            if self.target.exists():
                self.target.rename(old)
            self.folder.rename(self.target)
        except BaseException:
            if old.exists() and not self.target.exists():
                old.rename(self.target)
            raise
        sync_folder(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)

    def _recover(self) -> None:
        """Finish or undo what a killed run left: its hidden folders go, a bundle moved aside comes back."""
        old = self._old()
        if old.exists() and not self.target.exists():
            old.rename(self.target)
        for stale in self.target.parent.glob(f".{self.target.name}.*.tmp"):
            pid = stale.name[len(self.target.name) + 2 :].split(".", 1)[0]
            if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
                shutil.rmtree(stale, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def terminate_as_interrupt(number: int = signal.SIGTERM) -> Any:
    """Let a signal unwind like Ctrl-C, so that cleaning up happens; the previous handler, or ``None`` off the main thread."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(number, interrupt)
    except ValueError:
        return None
