"""Reading a bundle: everything is checked before anything is parsed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from cmt_edge.startup import name_program

from ..errors import BundleError, InputError
from ..files import describe_irregular, hash_file, make_aside_path, read_regular, write_atomic, writing
from ..locks import Hold
from ..preprocessing import Preprocess
from .belongings import (
    describe_foreign,
    find_extra,
    is_certainly_ours,
    list_leftovers,
    require_no_links,
)
from .contents import check_contents, make_unreadable_error
from .golden import Golden, read_reference
from .manifest import (
    ENGINES,
    GOLDEN,
    MANIFEST,
    MAX_FILES,
    MAX_MANIFEST,
    REFERENCE,
    Manifest,
    make_bundle_error,
)
from .packed import pack, unpack
from .sections import LOGITS, MAX_TOTAL, FileEntry
from .signature import MAX_SIGNATURE, SIGNATURE, Signature, make_statement, require_signed

ATTEMPTS = 100
"""The largest number of times that a bundle is read because others keep replacing it."""
SWAP_S = 2.0
"""Seconds that a reader waits for a bundle whose writer must replace it in two steps."""
EXCHANGE_POLL_S = 0.01
"""Seconds between two looks while waiting."""

Result = TypeVar("Result")
"""What a function makes of a bundle."""
State = tuple[int, ...]
"""What identifies a bundle's folder and its manifest on this machine, and changes when either is replaced."""


@dataclass(frozen=True)
class Bundle:
    """An opened, verified bundle."""

    path: Path
    manifest: Manifest
    target: Path | None = None
    """Where a bundle that is still being written will lie; ``None`` once it is finished."""
    packed: Path | None = None
    """The file that a packed bundle was opened from; ``path`` is then a folder that it was unpacked to."""
    state: State | None = field(default=None, compare=False, repr=False)
    """Tells whether the folder is still the one that was opened; ``None`` while it is being written."""
    hold: Hold | None = field(default=None, compare=False, repr=False)
    """Keeps the folder of a packed bundle as long as this object, or a Predictor that was loaded from it,
    lives."""
    signature_checked: bool = field(default=False, compare=False, repr=False)
    """Whether the bundle was opened with a public key that it is signed with."""

    @property
    def name(self) -> str:
        """Name of the folder, of an unfinished bundle the one it will have."""
        return (self.target or self.path).resolve().name

    @property
    def title(self) -> str:
        """What reports call the bundle: the path it was opened by, or the name that it will have."""
        return str(self.packed or self.path) if self.target is None else self.name

    @classmethod
    def open(cls, path: str | Path, *, key: str | Path | None = None, cache: bool = False) -> Bundle:
        """Read the manifest and check every file's presence, size and hash.

        >>> bundle = Bundle.open("cmt_nano_fp32_openvino")
        >>> bundle.manifest.precision, bundle.labels[:2]
        ('fp32', ['airplane', 'automobile'])

        Where another process replaces the bundle meanwhile, this is the old one or the new one, never a
        mixture.

        Args:
            path: folder of the bundle, or the file of a packed one.
            key: file of the public key that the bundle must be signed with; ``None``: a signature is not
                checked.
            cache: what this machine has found out about the same graphs need not be found out again. The
                hash of every file is compared all the same.

        Raises:
            BundleError: no bundle, a missing, edited or extra file, or a manifest that cannot be understood.
            SignatureError: the bundle is not signed with ``key``, or was changed after that.
            InputError: ``key`` is no public key.
            RuntimeMissingError: a key was given, and ``cryptography`` is not installed.
        """
        path = Path(path)
        if os.path.isfile(path):
            return cls._open_packed(path, key, cache)
        for _ in range(ATTEMPTS):
            state = read_state(path)
            try:
                bundle = cls._read(path, state, key, cache)
            except (BundleError, OSError):
                if is_bundle_coming(path, state):
                    continue
                raise
            if read_state(path) == state:
                return bundle
        raise _make_replaced_error(path)

    @classmethod
    def _read(cls, path: Path, state: State | None, key: str | Path | None, cache: bool) -> Bundle:
        manifest_path = path / MANIFEST
        if not os.path.isdir(path) or not os.path.isfile(manifest_path):
            raise BundleError(
                _describe_missing(path),
                where=path,
                remedy=f"give the folder that {name_program('export')} printed",
            )
        if manifest_path.stat().st_size > MAX_MANIFEST:
            raise make_bundle_error("the manifest is too large", manifest_path)
        data = _read_member(manifest_path, MAX_MANIFEST)
        manifest = Manifest.from_bytes(data, manifest_path)
        if key is not None:
            statement = make_statement(json.loads(data), ENGINES)
            require_signed(statement, _read_signature(path), Path(key), path)
        _check_members(path, manifest, cache)
        return cls(path, manifest, state=state, signature_checked=key is not None)

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Read members in the body: where another bundle has taken this one's place by its end,
        :class:`BundleError` says so, whatever the body made of the other one's members."""
        try:
            yield
        except Exception:
            self.require_unchanged()
            raise
        self.require_unchanged()

    def require_unchanged(self) -> None:
        """Raise :class:`BundleError` where another bundle has taken this one's place since it was opened."""
        if self.state is not None and read_state(self.path) != self.state:
            raise _make_replaced_error(self.path)

    @classmethod
    def _open_packed(cls, file: Path, key: str | Path | None, cache: bool) -> Bundle:
        """Open a packed bundle; what the file holds counts, whatever the cache has of it."""
        folder, hold = unpack(file)
        try:
            bundle = cls.open(folder, key=key, cache=cache)
        except BundleError as exc:
            raise _locate_error(exc, file) from exc
        return replace(bundle, packed=file, hold=hold)

    def pack(self, file: str | Path) -> None:
        """Write the bundle as one file; raises :class:`OutputError`."""
        pack(self.path, self.manifest.files, Path(file))

    @property
    def preprocess(self) -> Preprocess:
        """How an image becomes the model's input."""
        return self.manifest.preprocess

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs in the graph's order: ``["logits"]``, or one a feature map."""
        return [output.name for output in self.manifest.outputs]

    @property
    def head(self) -> str:
        """What the model gives: ``"logits"`` or ``"features"``."""
        return LOGITS if self.outputs == [LOGITS] else "features"

    @property
    def kind(self) -> str:
        """What the values of a classifier's output are: ``"logits"``, ``"probabilities"`` or ``"scores"``."""
        return self.manifest.outputs[0].kind or LOGITS

    @property
    def labels(self) -> list[str]:
        """Readable class names in logit order."""
        return [name for _, name in self.manifest.labels]

    @property
    def class_ids(self) -> list[str]:
        """What data sets call the classes, in logit order (ImageNet: synset ids; elsewhere the names)."""
        return [class_id for class_id, _ in self.manifest.labels]

    @property
    def signed_by(self) -> str | None:
        """Fingerprint of the key that ``signature.json`` names, unchecked; ``None`` if there is no such
        file."""
        data = _read_signature(self.path)
        return None if data is None else Signature.from_bytes(data, self.path).key

    def file(self, name: str) -> Path:
        """Path of a member; raises :class:`BundleError` if the bundle has none of this name."""
        if name not in self.manifest.files:
            raise make_bundle_error(f"has no {name}", self.path)
        return self.path / name

    def update(
        self,
        manifest: Manifest,
        files: Mapping[str, bytes],
        drop: Collection[str] = (),
    ) -> Bundle:
        """Add ``files`` in place, the manifest last, then remove ``drop``: at every moment the folder is a
        whole bundle.

        New files go under ``engines/``, where :meth:`open` ignores files that an interrupted build left, and
        never replace one. Nothing is written or deleted through a link.
        """
        self._require_unchanged()
        require_no_links(self.path, [*files, *drop])
        entries = {name: entry for name, entry in self.manifest.files.items() if name not in drop}
        for name, data in files.items():
            entries[name] = self._add_file(name, data)
        manifest = replace(manifest, files=dict(sorted(entries.items())))
        write_atomic(self.path / MANIFEST, manifest.to_bytes())
        for name in drop:
            with contextlib.suppress(OSError):
                (self.path / name).unlink()
        self._clear_leftovers(manifest)
        return Bundle(self.path, manifest, state=read_state(self.path))

    def _clear_leftovers(self, manifest: Manifest) -> None:
        """Remove what an interrupted build left. What cannot be removed stays, without an error."""
        for name in list_leftovers(self.path, manifest.files):
            with contextlib.suppress(OSError):
                if is_certainly_ours(self.path, name):
                    (self.path / name).unlink()

    def _require_unchanged(self) -> None:
        """Raise an error where the bundle is packed, or was changed after it was opened."""
        if self.packed is not None:
            raise InputError(
                "is a packed bundle, which cannot be added to",
                where=self.packed,
                remedy=f"unpack it first: python -m zipfile -e {self.packed} {self.name}",
            )
        place = self.path / MANIFEST
        now = Manifest.from_bytes(_read_member(place, MAX_MANIFEST), place)
        if now.files != self.manifest.files:
            raise BundleError(
                "the bundle was changed meanwhile",
                where=self.path,
                remedy="run the command again",
            )

    def _add_file(self, name: str, data: bytes) -> FileEntry:
        """Write a new file; returns what the manifest will say of it."""
        entry = FileEntry(len(data), hashlib.sha256(data).hexdigest())
        known = self.manifest.files.get(name)
        if known is not None and known.sha256 != entry.sha256:
            raise ValueError(f"{name} would be replaced before the manifest knows")
        with writing(self.path):
            (self.path / name).parent.mkdir(exist_ok=True)
        write_atomic(self.path / name, data)
        return entry

    def golden(self) -> Golden:
        """The golden inputs and what the reference made of them."""
        with self.kept():
            return Golden.from_file(self.file(GOLDEN), self.preprocess.size)

    def reference(self) -> dict[str, int]:
        """Reference top-1 by image content (see :func:`cmt_edge.deploy.images.hash_image`), empty if none was
        recorded."""
        if REFERENCE not in self.manifest.files:
            return {}
        with self.kept():
            return read_reference(self.file(REFERENCE), len(self.labels))


def _describe_missing(path: Path) -> str:
    """Why there is no bundle at ``path``."""
    if os.path.isdir(path):
        return "is not a bundle: it has no manifest.json"
    kind = describe_irregular(path)
    return f"is {kind}, not a bundle" if kind else "no such bundle folder"


def read_whole(
    path: str | Path | Bundle,
    read: Callable[[Bundle], Result],
    *,
    key: str | Path | None = None,
    cache: bool = False,
) -> Result:
    """What ``read`` makes of a bundle's members, all of them from one state of the bundle.

    Where another process replaces a bundle given by its path meanwhile, the new one is read.

    Raises:
        BundleError: a bundle that was opened before has been replaced. What ``read`` raises comes through.
    """
    if isinstance(path, Bundle):
        with path.kept():
            return read(path)
    for _ in range(ATTEMPTS):
        bundle = Bundle.open(path, key=key, cache=cache)
        try:
            result = read(bundle)
        except Exception:
            if is_bundle_coming(bundle.path, bundle.state):
                continue
            raise
        if read_state(bundle.path) == bundle.state:
            return result
    raise _make_replaced_error(Path(path))


def read_state(path: Path) -> State | None:
    """The state of the bundle at ``path`` as it is now, ``None`` where there is none."""
    try:
        folder, manifest = path.stat(), (path / MANIFEST).stat()
    except OSError:
        return None
    return (folder.st_dev, folder.st_ino, manifest.st_ino, manifest.st_mtime_ns)


def is_bundle_coming(path: Path, state: State | None) -> bool:
    """Whether a bundle that could not be read in ``state`` has been replaced since; where a writer replaces
    it in two steps, after waiting for the second."""
    end = time.monotonic() + SWAP_S
    while (
        (now := read_state(path)) is None and os.path.isdir(make_aside_path(path)) and time.monotonic() < end
    ):
        time.sleep(EXCHANGE_POLL_S)
    return now is not None and now != state


def _make_replaced_error(path: Path) -> BundleError:
    return BundleError(
        "the bundle was replaced while it was being read",
        where=path,
        remedy="run the command again",
    )


def _locate_error(error: BundleError, file: Path) -> BundleError:
    """The same error, with the packed file as its place."""
    return type(error)(error.what, where=file, why=error.why, remedy=error.remedy)


def _read_signature(path: Path) -> bytes | None:
    """Content of a bundle's ``signature.json``, ``None`` if it has none."""
    file = path / SIGNATURE
    if not file.is_file():
        return None
    if file.stat().st_size > MAX_SIGNATURE:
        raise make_bundle_error(f"{SIGNATURE} is too large", path)
    return _read_member(file, MAX_SIGNATURE)


def _check_members(path: Path, manifest: Manifest, cache: bool) -> None:
    files = manifest.files
    different = {name.lower() for name in files}
    if len(files) > MAX_FILES or len(different) != len(files):
        raise make_bundle_error(
            "has too many files, or names that differ only in case",
            path,
        )
    total = sum(entry.size for entry in files.values())
    if total > MAX_TOTAL:
        raise make_bundle_error(f"declares {total} bytes, the cap is {MAX_TOTAL}", path)
    _check_present(path, manifest)
    for name, entry in files.items():
        member = path / name
        if not _is_unchanged(member, entry):
            raise make_bundle_error(
                f"{name} was changed after the export: its SHA-256 differs from the manifest",
                path,
            )
    check_contents(path, files, cache)


def _is_unchanged(member: Path, entry: FileEntry) -> bool:
    """Whether a file is what the manifest says; its size is compared before it is read."""
    try:
        return member.stat().st_size == entry.size and hash_file(member) == entry.sha256
    except OSError as exc:
        raise make_unreadable_error(member, exc) from exc


def _read_member(file: Path, limit: int) -> bytes:
    """The content of a file; raises :class:`BundleError`."""
    try:
        return read_regular(file, limit)
    except OSError as exc:
        raise make_unreadable_error(file, exc) from exc


def _check_present(path: Path, manifest: Manifest) -> None:
    """Check that the folder holds the manifest's files and no others, but for what systems leave there.

    A member may be a link, as in a ConfigMap or the caches of Hugging Face and DVC: its content counts.
    """
    missing = sorted(name for name in manifest.files if not (path / name).is_file())
    extra = find_extra(path, manifest.files)
    if missing:
        text = [f"missing: {', '.join(missing)}"]
        text += [f"not in the manifest: {describe_foreign(extra)}"] if extra else []
        raise make_bundle_error("does not match its manifest", path, "; ".join(text))
    if extra:
        raise BundleError(
            f"holds what its manifest does not name: {describe_foreign(extra)}",
            where=path,
            remedy="remove it" if len(extra) == 1 else "remove them",
        )
