"""Collections of images as folders and archives; their bytes are no images."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from cmt_edge.deploy.images import ImageSet

CLASSES = {
    "dog/b.png": b"bee",
    "cat/2.jpg": b"two",
    "cat/10.JPG": b"ten",
    "dog/a.webp": b"ay",
    "cat/notes.txt": b"no image",
    "cat/.hidden.jpg": b"hidden",
    "dog/._b.png": b"left by macOS",
    ".DS_Store": b"junk",
}

"""Images in class folders, and what else lies there."""

FLAT = {"b.png": b"bee", "a.jpg": b"ay", "readme.md": b"no", ".c.png": b"hidden"}

"""Images without classes."""

SPLIT = {
    f"{part}/{name}": data for part in ("train", "test") for name, data in CLASSES.items() if "/" in name
}
""":data:`CLASSES` in two parts."""


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    """A folder of these files."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def archive(path: Path, files: dict[str, bytes], prefix: str = "", mode: str = "w") -> Path:
    """A tar archive of these files."""
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def contents(images: ImageSet) -> dict[str, tuple[str | None, bytes]]:
    """Name of each image -> its label and its bytes."""
    return {item.name: (item.label, images.read(item)) for item in images}


def good_archive(folder: Path) -> bytes:
    """An archive of :data:`CLASSES`."""
    return archive(folder / "good.tar", {f"c/{i}.png": bytes([i]) * 3000 for i in range(8)}).read_bytes()
