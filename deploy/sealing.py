"""Seals: the proof that this machine's user wrote a file, so that it may be opened although it is code in
effect.

A seal is an HMAC-SHA256 under a secret that never leaves the machine. TensorRT's engines carry one in the
bundle's manifest; what is kept in the cache carries one beside it, see :class:`SealedCache`.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import os
import secrets
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from platformdirs import user_data_path

from .cache import Cache, Files, warn_once
from .errors import CacheWarning, GateError, OutputError
from .files import expand_home, read_regular, write_atomic
from .locks import clear_lock, locked

T = TypeVar("T")
"""The type of a result."""

SECRET_BYTES = 32
"""Length of the secret."""
MAX_SECRET = 4096
"""A larger file, in bytes, is not read as the secret."""
SEAL = ".seal"
"""Suffix of the file that holds an entry's seal."""


def make_seal(text: str) -> str:
    """Hex HMAC-SHA256 of ``text`` under this machine's secret.

    Each kind of text begins with words of its own, or with a hash, so that no seal can stand for another.

    Raises :class:`OutputError` where the secret cannot be kept.
    """
    return hmac.new(_read_secret(), text.encode(), hashlib.sha256).hexdigest()


def is_sealed(text: str, seal: str) -> bool:
    """Whether ``seal`` is that of ``text``; raises :class:`OutputError` as :func:`make_seal`."""
    return hmac.compare_digest(make_seal(text).encode(), seal.encode())


def _read_secret() -> bytes:
    """This machine's secret, made at first use; ``CMT_EDGE_STATE`` moves the folder it lies in."""
    override = os.environ.get("CMT_EDGE_STATE")
    folder = expand_home(override) if override else user_data_path("cmt-edge", appauthor=False)
    path = folder / "machine.key"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _make_secret(path)
        clear_lock(path)
        _require_secret(path)
        secret = read_regular(path, MAX_SECRET)
        if len(secret) != SECRET_BYTES:
            raise OSError(f"it holds {len(secret)} bytes instead of {SECRET_BYTES}; delete it")
        return secret
    except (OSError, OutputError) as exc:
        raise OutputError(
            "the secret that seals engines and compiled models cannot be kept",
            where=path,
            why=getattr(exc, "strerror", None) or exc,
            remedy="name a writable folder in CMT_EDGE_STATE",
        ) from exc


def _require_secret(path: Path) -> None:
    """Raise ``OSError`` where every user of this machine may read or replace the secret: what they seal would
    be opened here. A group that was given one folder may share it."""
    if os.name != "posix":
        return
    if path.stat().st_mode & stat.S_IRWXO:
        raise OSError(errno.EPERM, "every user may read or write it; delete it, a new one is made")
    mode = path.parent.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise OSError(errno.EPERM, f"every user may replace it; run: chmod o-w {path.parent}")


def _make_secret(path: Path) -> None:
    """Write a new secret, unless another process has just done so: its seals must stay good."""
    with locked(path):
        if not path.exists():
            write_atomic(path, secrets.token_bytes(SECRET_BYTES), mode=0o600)


@dataclass(frozen=True)
class Result(Generic[T]):
    """A result, and whether an earlier process had made it."""

    value: T
    is_kept: bool


class SealedCache:
    """A cache whose entries are used only if this machine's user wrote them.

    They are code in effect, or spare a check.

    The seal covers the key and the content, so that an entry of another key, of another machine, or with a
    changed byte is none. It is made again, and a :class:`CacheWarning` says so.
    """

    def __init__(
        self, folder: Path, what: str, suffix: str, keep: int, most_bytes: int | None = None
    ) -> None:
        """``what``: what an entry is, for messages and inside the seal; the rest: :class:`.cache.Cache`."""
        self.what = what
        self._cache = Cache(folder, (SEAL, suffix), keep, most_bytes)

    def get(
        self,
        key: str,
        *,
        decode: Callable[[bytes], T],
        make: Callable[[], T],
        encode: Callable[[T], bytes],
        mode: int = 0o666,
        make_unkept: Callable[[], T] | None = None,
        waits: bool = True,
    ) -> Result[T]:
        """What is kept under ``key``, or is made now and kept; see :meth:`.cache.Cache.get`.

        Without a secret nothing is read or kept, which a :class:`CacheWarning` says.

        Args:
            key: the name of the entry.
            decode: makes the result of an entry's content.
            make: makes the result anew.
            encode: makes the content of an entry.
            mode: permissions of the files.
            make_unkept: makes the result where nothing can be kept; default: ``make``.
            waits: for another process that makes the same result, rather than to make it, too.
        """
        try:
            make_seal(key)
        except OutputError as exc:
            warn_once(
                Path(str(exc.where)),
                f"{exc.what} ({exc.where}: {exc.why}): results are not kept for the next run;"
                " CMT_EDGE_STATE=FOLDER names another place",
            )
            return Result((make_unkept or make)(), is_kept=False)
        entry = _Entry(f"{self.what}: {key}", decode, make, encode)
        value = self._cache.get(
            key,
            decode=entry.open,
            make=entry.make,
            encode=entry.seal,
            mode=mode,
            make_unkept=make_unkept,
            waits=waits,
        )
        if entry.fault and not entry.is_kept:
            warnings.warn(
                f"the {self.what} in the cache was not used, because {entry.fault}; it was made again",
                CacheWarning,
                stacklevel=3,
            )
        return Result(value, entry.is_kept)


class _Entry(Generic[T]):
    """What happens to one entry while it is asked for: opening, making, sealing."""

    def __init__(
        self,
        title: str,
        decode: Callable[[bytes], T],
        make: Callable[[], T],
        encode: Callable[[T], bytes],
    ) -> None:
        self._title, self._decode, self._make, self._encode = title, decode, make, encode
        self.fault = ""
        """Why what lies there was not used, empty if nothing does."""
        self.is_kept = False
        """Whether what lay there is the result."""

    def open(self, files: Files) -> T:
        """The result in the files of the entry; raises whatever is wrong with it."""
        seal, content = files
        self.fault = "it is not as this machine wrote it"
        if not is_sealed(self._describe(content), seal.decode("ascii", "replace")):
            raise ValueError(self.fault)
        self.fault = "it cannot be opened"
        try:
            value = self._decode(content)
        except GateError as exc:
            self.fault = f"it does not pass: {exc.what}"
            raise
        self.is_kept = True
        return value

    def make(self) -> T:
        """The result, made anew."""
        return self._make()

    def seal(self, value: T) -> Files:
        """The files of the entry."""
        content = self._encode(value)
        return make_seal(self._describe(content)).encode(), content

    def _describe(self, content: bytes) -> str:
        return f"{self._title} {hashlib.sha256(content).hexdigest()}"
