"""Classifies every image of a folder and writes a table, CSV or Parquet.

python examples/batch/score_folder.py BUNDLE FOLDER -o scores.csv

What is done is noted beside the table until the table is complete. Run the same command again after an
interruption, and only the rest is computed.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from cmt_edge.deploy import Bundle, Predictor
from cmt_edge.deploy.cli.console import (
    add_key_flag,
    add_runtime_flags,
    make_parser,
    read_runtime_flags,
    run_command,
)
from cmt_edge.deploy.cli.output import say, tell
from cmt_edge.deploy.cli.ranges import CLASS_COUNTS
from cmt_edge.deploy.errors import ImageError, InputError, RuntimeMissingError
from cmt_edge.deploy.escaping import escape_surrogates
from cmt_edge.deploy.files import write_atomic, writing
from cmt_edge.deploy.folders import Item
from cmt_edge.deploy.images import ImageSet, is_archive
from cmt_edge.deploy.progress import Progress
from cmt_edge.deploy.report import to_json

ENDINGS = (".csv", ".parquet")
"""Kinds of tables."""

FLUSH_EVERY = 64
"""Answers after which the notes are written to the disk."""

Note = dict[str, Any]
"""What is noted of an image: its name, size in bytes and time, and its classes or its error."""


class Journal:
    """The notes of a run, one JSON object a line; the first line says what they are of.

    Attributes:
        path: a file beside the table.
        notes: name of an image -> what is noted of it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        """Read the notes of an earlier run with the same settings, if there are any.

        Raises:
            InputError: the notes were made with other settings.
        """
        self.path, self.notes = path, dict[str, Note]()
        self._settings = settings
        try:
            lines = self._read_whole_lines()
            notes = {note["name"]: note for note in lines[1:]}
        except (ValueError, KeyError, TypeError) as exc:
            remedy = "delete the file to begin again"
            raise InputError("is damaged", where=path, why=exc, remedy=remedy) from exc
        if lines and lines[0] != settings:
            changed = [name for name in settings if dict(lines[0]).get(name) != settings[name]]
            raise InputError(
                "belongs to an unfinished table with other settings",
                where=path,
                why=f"another {' and '.join(changed) or 'format'}",
                remedy="give the same command as before, or delete the file to begin again",
            )
        self.notes = notes

    def _read_whole_lines(self) -> list[dict[str, Any]]:
        """Every whole line. What follows the last line break was being written when the run ended."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]

    def begin(self) -> TextIO:
        """Open the file to add notes, after the whole lines of before."""
        kept = "".join(json.dumps(line) + "\n" for line in (self._settings, *self.notes.values()))
        write_atomic(self.path, kept.encode())
        return open(self.path, "a", encoding="utf-8")

    def find_rest(self, images: Iterable[tuple[str, Note]]) -> list[Note]:
        """The images that have no note, or that have changed since."""
        rest = []
        for name, found in images:
            noted = self.notes.get(name, {})
            if any(noted.get(key) != value for key, value in found.items()):
                rest.append(found)
        return rest


def look_at(folder: Path, items: Iterable[Item]) -> Iterator[tuple[str, Note]]:
    """Name of each image, and what tells whether it has changed."""
    for item in items:
        try:
            status = os.stat(folder / item.name)
        except OSError:  # it has gone; the Predictor says so
            yield item.name, {"name": item.name, "size": -1, "time_ns": -1}
        else:
            yield item.name, {"name": item.name, "size": status.st_size, "time_ns": status.st_mtime_ns}


def score(predictor: Predictor, folder: Path, rest: list[Note], journal: Journal, args: Any) -> None:
    """Classify the rest and note each answer."""
    progress = Progress(args.quiet)
    paths = (folder / note["name"] for note in rest)
    with journal.begin() as file:
        answers = predictor.attempt(paths, workers=args.workers)
        for done, (note, answer) in enumerate(zip(rest, answers, strict=True), 1):
            if isinstance(answer, ImageError):
                note["error"] = answer.what
            else:
                note["top"] = answer.top(args.topk)
            journal.notes[note["name"]] = note
            file.write(json.dumps(note) + "\n")
            if done % FLUSH_EVERY == 0 or done == len(rest):
                file.flush()
                os.fsync(file.fileno())
            progress.count(done, len(rest))
    progress.finish()


def make_rows(notes: Iterable[Note], topk: int) -> Iterator[dict[str, Any]]:
    """The rows of the table: the image, then labels and probabilities, the best first."""
    for note in notes:
        row: dict[str, Any] = {"image": escape_surrogates(note["name"])}
        for place, (label, probability) in enumerate(note["top"][:topk], 1):
            row |= {f"label_{place}": label, f"probability_{place}": probability}
        yield row


def write_csv(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write a table of comma-separated values; it is complete or absent."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, text.getvalue().encode())


def write_parquet(path: Path, rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Write a table as Parquet: texts, and float64 for probabilities; it is complete or absent."""
    import pyarrow
    from pyarrow import parquet

    kinds = {
        name: pyarrow.float64() if name.startswith("probability") else pyarrow.string() for name in columns
    }
    table = pyarrow.Table.from_pylist(rows, pyarrow.schema(list(kinds.items())))
    buffer = pyarrow.BufferOutputStream()
    parquet.write_table(table, buffer)
    write_atomic(path, buffer.getvalue().to_pybytes())


def require_writer(path: Path) -> None:
    """Raise what is wrong with the table's name, before any work."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"the table's name must end in {' or '.join(ENDINGS)}", where=path)
    if path.suffix.lower() == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401
        except ImportError as exc:
            remedy = 'pip install "cmt-edge[examples]", or give a name that ends in .csv'
            raise RuntimeMissingError("Parquet needs pyarrow", why=exc, remedy=remedy) from exc


def write_tables(args: Any, notes: list[Note], classes: int) -> int:
    """Write the table, and a list of the images that could not be read; how many these are."""
    topk = min(args.topk, classes)
    places = range(1, topk + 1)
    columns = ["image", *(name for n in places for name in (f"label_{n}", f"probability_{n}"))]
    good = [note for note in notes if "top" in note]
    bad = [{"image": escape_surrogates(n["name"]), "error": n["error"]} for n in notes if "error" in n]
    write = write_csv if args.output.suffix.lower() == ".csv" else write_parquet
    write(args.output, list(make_rows(good, topk)), columns)
    listed = name_beside(args.output, "bad.csv")
    if bad:
        write_csv(listed, bad, ["image", "error"])
        tell(f"{len(bad)} of {len(notes)} images could not be read: {listed} lists them")
    else:
        listed.unlink(missing_ok=True)
    return len(bad)


def name_beside(output: Path, ending: str) -> Path:
    """A file that belongs to the table: ``scores.csv`` -> ``scores.csv.bad.csv``."""
    return output.with_name(f"{output.name}.{ending}")


def run(args: argparse.Namespace) -> int:
    """Score the folder; returns the exit code."""
    require_writer(args.output)
    if is_archive(args.folder):
        raise InputError("this example reads folders", where=args.folder, remedy="unpack the archive")
    images = ImageSet(args.folder, labelled=False)
    bundle = Bundle.open(args.bundle, key=args.key)
    settings = {
        "bundle": bundle.manifest.checksum,
        "folder": str(args.folder.resolve()),
        "topk": args.topk,
        "runtime": [args.backend, args.device],
    }
    with writing(args.output):
        journal = Journal(name_beside(args.output, "part"), settings)
        rest = journal.find_rest(look_at(args.folder, images))
        if journal.notes:
            Progress(args.quiet).tell(f"{len(images) - len(rest)} of {len(images)} images were done before")
        with Predictor.load(
            bundle,
            **read_runtime_flags(args),
            throughput=True,
        ) as predictor:
            score(predictor, args.folder, rest, journal, args)
            notes = [journal.notes[item.name] for item in images]
            bad = write_tables(args, notes, len(predictor.labels))
    journal.path.unlink()
    say(to_json({"table": str(args.output), "images": len(images), "unreadable": bad, "computed": len(rest)}))
    return InputError.exit_code if bad else 0


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    p = make_parser("score_folder.py", "Classify every image of a folder, and write a table.")
    p.add_argument("bundle", type=Path)
    p.add_argument("folder", type=Path, help="a folder of images, at any depth")
    p.add_argument("-o", "--output", type=Path, required=True, help="the table: FILE.csv or FILE.parquet")
    p.add_argument("--topk", type=CLASS_COUNTS.parse_whole, default=1, help="classes of an image (default 1)")
    p.add_argument("--workers", type=CLASS_COUNTS.parse_whole, default=2, help="decoding threads (default 2)")
    add_runtime_flags(p)
    add_key_flag(p)
    return run_command(run, p.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
