"""What a slim bundle lacks."""

from __future__ import annotations

from dataclasses import dataclass

from .model import FileEntry
from .values import Count


@dataclass(frozen=True, kw_only=True)
class SlimEntry:
    """What an export made and left out, because the device does not need it.

    Attributes:
        files: name of each file that is missing -> its size and hash.
        golden_images: number of golden images that are missing.
    """

    files: dict[str, FileEntry]
    golden_images: Count
