"""What the caches of compiled models and of optimised graphs share: :mod:`.openvino_cache` and
:mod:`.onnxruntime_cache`.
"""

from __future__ import annotations

from pathlib import Path

from ..bundle import ONNX, Bundle
from ..errors import BundleError
from ..files import hash_file

PROCESSORS = Path("/proc/cpuinfo")
"""Where Linux describes the processors."""
PROCESSOR_CHARACTERS = 1 << 14
"""The number of characters there that are read; the first processor takes fewer."""
PROCESSOR_WORDS = ("flags", "features", "model name", "cpu part", "stepping")
"""Starts, in lower case, of the lines there that tell what is compiled for a processor."""


def read_instructions() -> list[str]:
    """What Linux says of the first processor and its instructions, empty elsewhere."""
    try:
        with open(PROCESSORS, errors="replace") as file:  # it is long where there are many processors
            first = file.read(PROCESSOR_CHARACTERS).partition("\n\n")[0]
    except OSError:
        return []
    return sorted(line for line in first.splitlines() if line.lower().startswith(PROCESSOR_WORDS))


def require_same_file(bundle: Bundle) -> None:
    """Raise :class:`BundleError` where the graph is no longer the one that the bundle was opened with.

    What was made of another file must never be kept under the hash of this one.
    """
    path = bundle.file(ONNX)
    try:
        found = hash_file(path)
    except OSError:
        found = ""
    if found != bundle.manifest.files[ONNX].sha256:
        raise BundleError(
            "a file of the bundle was changed while it was being opened",
            where=path,
            remedy="run the command again",
        )


def find_mode(bundle: Bundle) -> int:
    """Permissions of what is kept: whoever may not read the bundle's weights may not read them there.

    The owner's alone where the file is gone; then the runtime says what is wrong.
    """
    try:
        return bundle.file(ONNX).stat().st_mode & 0o444 | 0o200
    except OSError:
        return 0o600
