"""Checkpoint files: what they contain, read without running any of their code.

The content decides how a file is read, not its name: training programs write ``.pth``, ``.pt``, ``.bin``,
``.ckpt`` and ``.pth.tar`` for the same thing.
"""

from __future__ import annotations

import ast
import json
import re
import zipfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cmt_edge.deploy.errors import WeightsError

from .spec import StateDict
from .strangers import ExcessiveCheckpoint, Stranger, find_unloadable, make_stand_ins
from .unpickling import ALLOWED

WORD = re.compile(r"[^\W\d_]{2}")
"""What a reason holds that tells people something: letters."""

MAX_REASON = 300
"""Length, in characters, at which the text of another library's error is cut."""

MAX_SAID = 2 << 20
"""Length, in characters, of the texts beside the tensors of a file, at most, that are parsed. The names of
22,000 classes take less than half of it; parsing takes a hundred times as much memory."""

HEAD_BYTES = 512
"""Length, in bytes, of the beginning of a file that tells its kind."""

REFUSALS = (
    "Unsupported global",
    "GLOBAL",
    "Unsupported class",
    "unrecognized function",
)
"""Words with which torch's restricted unpickler refuses to call something."""

SAVE_REMEDY = "save model.state_dict() with torch.save or safetensors"
"""The remedy for a file that is not a checkpoint."""

WITHOUT_SETTINGS = "save the weights without these settings, in the program that trained the model"
"""The remedy for settings that cannot be read, before the command."""

CALLS = {
    "functools.partial": "it holds a functools.partial, as settings of Hydra with _partial_ do, which names a"
    " function to call",
}
"""What a file may hold beside its weights that is not read -> what it is."""

AGAIN = "download the file itself again"
"""The remedy for a page or a note that was saved in place of a file."""


@dataclass(frozen=True)
class Foreign:
    """A kind of file that is taken for a checkpoint.

    Attributes:
        what: it is.
        fits: whether a file is one, from its first bytes and the names in it where it is a ZIP archive.
        remedy: what the user does with it.
    """

    what: str
    fits: Callable[[bytes, tuple[str, ...]], bool]
    remedy: str


def _begins(*words: bytes) -> Callable[[bytes, tuple[str, ...]], bool]:
    return lambda head, _: head.lstrip().lower().startswith(words)


def _has(*endings: str) -> Callable[[bytes, tuple[str, ...]], bool]:
    return lambda _, names: any(name.endswith(endings) for name in names)


FOREIGN = (
    Foreign("it is empty", lambda head, _: not head, "copy it again"),
    Foreign(
        "it is a Git LFS pointer, a note that stands for the file",
        _begins(
            b"version https://git-lfs",
            b"version http://git-media",
            b"version https://hawser",
        ),
        "run `git lfs pull` in the repository, or " + AGAIN,
    ),
    Foreign(
        "it is a saved web page",
        _begins(b"<!doctype", b"<html", b"<head", b"<body"),
        AGAIN,
    ),
    Foreign(
        "it is an XML text, often an error message of a server",
        _begins(b"<?xml", b"<error"),
        AGAIN,
    ),
    Foreign(
        "it is a JSON text, as an index of shards or an error message of a server",
        _begins(b"{", b"["),
        "give the file that holds the weights",
    ),
    Foreign(
        "it is a program exported by torch.export",
        _has("serialized_exported_program.json", "archive_format"),
        "load it with torch.export.load, then " + SAVE_REMEDY,
    ),
    Foreign(
        "it is a TorchScript program",
        lambda _, names: any("/code/" in name or name.endswith("constants.pkl") for name in names),
        "torch.save(torch.jit.load(PATH).state_dict(), NEW), then give NEW",
    ),
    Foreign(
        "it is a NumPy archive (.npz)",
        _has(".npy"),
        "torch.save({k: torch.from_numpy(v) for k, v in numpy.load(PATH).items()}, NEW), then give NEW",
    ),
    Foreign("it is a NumPy array", _begins(b"\x93numpy"), SAVE_REMEDY),
    Foreign("it is a Keras model", _has("model.weights.h5"), SAVE_REMEDY),
    Foreign("it is an HDF5 file", _begins(b"\x89hdf"), SAVE_REMEDY),
    Foreign("it is a GGUF file", _begins(b"gguf"), SAVE_REMEDY),
    Foreign(
        "it is a ZIP archive without a checkpoint's data.pkl",
        lambda _, names: bool(names) and not any(name.endswith("data.pkl") for name in names),
        "unpack it and give the file with the weights",
    ),
    Foreign(
        "it is compressed (gzip)",
        _begins(b"\x1f\x8b"),
        "unpack it with `gunzip` or `tar -xzf` first",
    ),
    Foreign(
        "it is compressed (xz)",
        _begins(b"\xfd7zxz"),
        "unpack it with `xz -d` or `tar -xJf` first",
    ),
    Foreign(
        "it is compressed (zstd)",
        _begins(b"\x28\xb5\x2f\xfd"),
        "unpack it with `zstd -d` first",
    ),
    Foreign(
        "it is compressed (bzip2)",
        _begins(b"bzh"),
        "unpack it with `bunzip2` or `tar -xjf` first",
    ),
    Foreign(
        "it is a tar archive",
        lambda head, _: head[257:262] == b"ustar",
        "unpack it with `tar -xf` and give the file with the weights",
    ),
    Foreign(
        "it is an ONNX model",
        lambda head, _: b"pytorch" in head[:64],
        "give the PyTorch checkpoint",
    ),
)
"""Kinds of files that are no checkpoints; the first one that fits is named."""


def read_content(path: Path) -> Any:
    """What a ``.safetensors`` or PyTorch file holds: a mapping, or whatever was saved.

    Raises:
        WeightsError: the file is missing, unreadable or unsafe.
    """
    if path.is_dir():
        raise WeightsError(
            "is a folder",
            where=path,
            remedy="give the file in it that holds the weights",
        )
    if not path.is_file():
        raise WeightsError(
            "no such checkpoint file",
            where=path,
            remedy="check the path given to --weights",
        )
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError as exc:
        raise WeightsError(
            "cannot be read",
            where=path,
            why=exc,
            remedy="check its permissions",
        ) from exc
    if _is_safetensors(head, path.stat().st_size):
        return _load_safetensors(path)
    names = _list_zip_members(path, head)
    for kind in FOREIGN:
        if kind.fits(head, names):
            what = f"cannot be read as a checkpoint: {kind.what}"
            raise WeightsError(what, where=path, remedy=kind.remedy)
    if path.suffix.lower() == ".safetensors" and not names and not head.startswith(b"\x80"):
        return _load_safetensors(path)
    return _load_torch(path)


def read_metadata(path: Path) -> dict[str, Any]:
    """What a ``.safetensors`` file says beside its tensors; empty for a file of another kind.

    The file holds text only. Text that is JSON, or that Python prints for a list, is given as what it means,
    unless all texts together are longer than :data:`MAX_SAID`.

    Raises:
        WeightsError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if not _is_safetensors(head, path.stat().st_size):
        return {}
    try:
        with safe_open(path, framework="np") as opened:
            said = opened.metadata() or {}
    except (SafetensorError, OSError, ValueError) as exc:
        raise _make_damaged_error(path, exc) from exc
    is_long = sum(map(len, said.values())) > MAX_SAID
    return {name: text if is_long else _parse_or_none(text) for name, text in said.items()}


def _parse_or_none(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _is_safetensors(head: bytes, size: int) -> bool:
    """Whether a file begins with the length of a JSON header and that header."""
    length = int.from_bytes(head[:8], "little")
    return len(head) > 8 and head[8:9] == b"{" and length <= size


def _list_zip_members(path: Path, head: bytes) -> tuple[str, ...]:
    """Names of the members of a ZIP archive; none for another file, and for a damaged one."""
    if not head.startswith(b"PK"):
        return ()
    try:
        with zipfile.ZipFile(path) as archive:
            return tuple(archive.namelist())
    except Exception:  # zipfile raises many types for damaged files, such as NotImplementedError
        return ()


def _load_torch(path: Path) -> Any:
    try:
        # An open file, because torch.load takes the suffix .safetensors for the content.
        with (
            path.open("rb") as file,
            torch.serialization.safe_globals([*ALLOWED, *make_stand_ins(path)]),
            _checked_sparse_tensors(),
        ):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except ExcessiveCheckpoint as exc:
        raise WeightsError(
            "asks for more than a checkpoint may",
            where=path,
            why=exc,
            remedy="save the weights alone: torch.save(model.state_dict(), NEW)",
        ) from exc
    except Exception as exc:  # torch raises many types for damaged files; all mean the same to the user
        raise _make_unreadable_error(path, exc) from exc
    if isinstance(content, Stranger):
        raise make_refusal(path, f"it holds one object of the class {content.title} and no state dict")
    return content


def _checked_sparse_tensors() -> AbstractContextManager[Any]:
    """A context in which torch refuses sparse tensors whose indices lie outside of their shape; without it,
    making them dense writes into foreign memory."""
    check: Callable[[], AbstractContextManager[Any]] = torch.sparse.check_sparse_tensor_invariants
    return check()


def make_refusal(path: Path, why: str, remedy: str = SAVE_REMEDY) -> WeightsError:
    """The error for a file of which what is needed cannot be read without running code."""
    return WeightsError(
        "refused: the file asks to run code while it is read",
        where=path,
        why=why,
        remedy=remedy,
    )


def _make_unreadable_error(path: Path, exc: Exception) -> WeightsError:
    """Tell a file that wants to run code from a damaged or foreign one."""
    # Before these words torch advises to switch the check off, which nobody should read here.
    text = str(exc).rpartition("WeightsUnpickler error:")[2].strip()
    lines = text.splitlines() or [type(exc).__name__]
    refusal = next(
        (line for line in lines if any(word in line for word in REFUSALS)),
        None,
    )
    words = refusal.split() if refusal else []
    held = next((what for name, what in CALLS.items() if name in words), None)
    unloadable = next((name for name in find_unloadable(path) if name in words), None)
    if unloadable:
        return WeightsError(
            f"holds an object of the class {unloadable}, which only its own code can rebuild",
            where=path,
            why="it is a list or a dictionary with attributes of its own",
            remedy=f"{WITHOUT_SETTINGS}: torch.save(model.state_dict(), NEW)",
        )
    if held:
        return make_refusal(path, held, f"{WITHOUT_SETTINGS}: torch.save(model.state_dict(), NEW)")
    if refusal:
        why = refusal.strip().partition(" was not an allowed global")[0]
        return make_refusal(path, why[:MAX_REASON])
    return WeightsError(
        "cannot be read as a PyTorch checkpoint",
        where=path,
        why=lines[0][:MAX_REASON] if WORD.search(lines[0]) else "its bytes are none that torch.save writes",
        remedy="check that it is complete and was saved by torch.save, or copy it again",
    )


def _load_safetensors(path: Path) -> StateDict:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as exc:
        raise _make_damaged_error(path, exc) from exc


def _make_damaged_error(path: Path, exc: Exception) -> WeightsError:
    return WeightsError(
        "cannot be read as safetensors",
        where=path,
        why=exc,
        remedy="check that it is complete, or copy it again",
    )
