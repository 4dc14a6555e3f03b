"""Fetch published weights into the user's cache: resumable, checked, never half-written."""

from __future__ import annotations

import os
import tempfile
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cmt_edge.deploy.cache import can_keep
from cmt_edge.deploy.errors import DownloadError
from cmt_edge.deploy.files import find_cache_folder, hash_file
from cmt_edge.deploy.locks import Hold, clear_lock, locked, make_scratch

from .spec import Pretrained

ANSWER_TIMEOUT_S = 30
"""Seconds without an answer after which a connection is given up."""

DOWNLOAD_CHUNK_BYTES = 1 << 20
"""Bytes that are read at once."""

MAX_DOWNLOAD_BYTES = 4 << 30
"""Largest file, in bytes, that is accepted."""

SCRATCH = "cmt-edge-weights-"
"""What the name of a temporary folder of this process begins with."""

_holds: list[Hold] = []
"""What keeps the temporary folders until the process ends."""

PARTIAL = ".partial"
"""Ending of the name of a file that is not complete yet."""


def fetch(published: Pretrained, folder: Path | None = None) -> Path:
    """Path of the published file in the cache; the file is downloaded first if the cache does not have it.

    An interrupted download goes on where it stopped. The length that the server announces is always checked,
    and ``size`` and ``sha256`` where the registry knows them.

    Args:
        published: has a ``url``.
        folder: where the file is kept (default: ``weights`` in the user's cache).

    Raises:
        DownloadError: no network, a wrong length or hash, or a full disk.
    """
    assert published.url is not None
    name = published.url.rsplit("/", 1)[-1]
    folder = folder or _choose_folder(name)
    target = folder / name
    if target.is_file():
        clear_lock(target)
        return target  # complete: it has its name only since it passed its check
    try:
        with locked(target):
            if not target.exists():
                partial = target.with_name(target.name + PARTIAL)
                _download(published.url, partial)
                _check(published, partial)
                partial.replace(target)
    except (OSError, HTTPException) as exc:  # URLError is an OSError
        raise _make_download_error(published.url, exc) from exc
    return target


def is_kept(published: Pretrained) -> bool:
    """Whether the user's cache has the published file, so that nothing needs to be downloaded."""
    assert published.url is not None
    name = published.url.rsplit("/", 1)[-1]
    return (find_cache_folder() / "weights" / name).is_file()


def _choose_folder(name: str) -> Path:
    """Where a download is kept: ``weights`` in the user's cache, or, where that cannot be written to and does
    not have the file, a temporary folder of this process."""
    folder = find_cache_folder() / "weights"
    if (folder / name).is_file() or can_keep(folder):
        return folder
    try:
        temporary, hold = make_scratch(Path(tempfile.gettempdir()), SCRATCH)
    except OSError as exc:
        raise _make_download_error(name, exc) from exc
    _holds.append(hold)
    return temporary


def _make_download_error(url: str, why: object) -> DownloadError:
    return DownloadError(
        "cannot download the published weights",
        where=url,
        why=why,
        remedy="fetch the file elsewhere and give --weights PATH, or use --weights random for latency alone",
    )


def _download(url: str, partial: Path) -> None:
    """Append to ``partial`` until it has the announced length."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=ANSWER_TIMEOUT_S) as response:
            _receive(response, partial, have if response.status == 206 else 0)
    except urllib.error.HTTPError as exc:
        exc.close()
        if exc.code != 416 or not have:  # 416: nothing left to send, or a stale partial file
            raise
        told = exc.headers.get("Content-Range") or ""
        if told.rpartition("/")[2] != str(have):
            partial.unlink()
            _download(url, partial)


def _receive(response: Any, partial: Path, have: int) -> None:
    """Write the body behind the first ``have`` bytes of ``partial``.

    Raises :class:`OSError` if the body is too long or ends early.
    """
    length = int(response.headers.get("Content-Length") or 0)
    if have + length > MAX_DOWNLOAD_BYTES:
        raise OSError(
            f"the server announces {have + length} bytes, more than the cap of {MAX_DOWNLOAD_BYTES}"
        )
    if have and not (response.headers.get("Content-Range") or "").startswith(f"bytes {have}-"):
        raise OSError("the server continues at another place than asked for")
    received = 0
    mode = "ab" if have else "wb"
    with (
        open(partial, mode) as out,
        _make_bar(partial, have, have + length) as bar,
    ):
        while (chunk := response.read(DOWNLOAD_CHUNK_BYTES)) and received <= MAX_DOWNLOAD_BYTES:
            out.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    if received > MAX_DOWNLOAD_BYTES:
        raise OSError(f"more than the cap of {MAX_DOWNLOAD_BYTES} bytes")
    if length and received != length:
        raise OSError(f"the connection ended after {received} of {length} bytes; run again to go on")


def _make_bar(partial: Path, have: int, total: int) -> tqdm[Any]:
    """A bar of progress in bytes; a ``total`` of 0 is unknown."""
    return tqdm(
        total=total or None,
        initial=have,
        unit="B",
        unit_scale=True,
        disable=None,
        desc=partial.name.removesuffix(PARTIAL),
    )


def _check(published: Pretrained, partial: Path) -> None:
    """Delete ``partial`` and raise :class:`DownloadError` unless it has the published length and hash."""
    size = partial.stat().st_size
    wrong = None
    if published.size is not None and size != published.size:
        wrong = f"{size} bytes, expected {published.size}"
    elif published.sha256 is not None:
        actual = hash_file(partial)
        if actual != published.sha256:
            wrong = f"SHA-256 {actual}, expected {published.sha256}"
    if wrong:
        partial.unlink()
        raise _make_download_error(str(published.url), f"the file fails its check: {wrong}")
