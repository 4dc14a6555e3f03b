"""The same labelled images as each kind of source."""

from __future__ import annotations

from pathlib import Path

from .collections import archive

KINDS = ("tar", "url", "escaped", "shards", "webdataset", "table", "tables")
"""What :func:`convert_folder` makes."""


def convert_folder(folder: Path, target: Path, kind: str) -> str:
    """The class folders of ``folder`` as another kind of source below ``target``; what opens it.

    Shards and tables hold images of all classes each, so that every class is spread over them; the names are
    those of the folder.
    """
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.glob("*/*"))}
    halves = dict(list(files.items())[::2]), dict(list(files.items())[1::2])
    target.mkdir()
    if kind == "tar":
        return str(archive(target / "photos.tar", dict(reversed(files.items()))))
    if kind == "url":
        return f"local://{folder}"
    if kind == "escaped":
        (target / "my photos").symlink_to(folder)
        return f"file://{target}/my%20photos"
    if kind in ("table", "tables"):
        for i, rows in enumerate([files] if kind == "table" else halves):
            _write_table(target / f"{i}.parquet", rows)
        return str(target / "0.parquet" if kind == "table" else target)
    for i, part in enumerate(halves):
        archive(target / f"{i}.tar", _add_labels(part) if kind == "webdataset" else part)
    return str(target)


def _add_labels(files: dict[str, bytes]) -> dict[str, bytes]:
    """``0007.png`` beside ``0007.cls`` in place of ``owl/7.png``; a key has one image."""
    found: dict[str, bytes] = {}
    for name, data in files.items():
        label, _, last = name.partition("/")
        found |= {f"{last[:3]}-{label}.png": data, f"{last[:3]}-{label}.cls": label.encode()}
    return found


def _write_table(path: Path, files: dict[str, bytes]) -> None:
    import pyarrow
    from pyarrow import parquet

    labels = [name.partition("/")[0] for name in files]
    table = pyarrow.table({"image": list(files.values()), "label": labels})
    parquet.write_table(table, path, row_group_size=4)
