"""``cmt-predict``: classify images with a bundle."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cmt_edge.startup import name_program

from ..bundle.belongings import read_listed
from ..bundle.manifest import MANIFEST
from ..decoding import ImageLike, NamedBytes
from ..errors import ImageError, InputError
from ..escaping import escape_line
from ..folders import Item
from ..images import ImageSet, is_archive
from ..prediction import Prediction
from ..predictor import Predictor
from ..progress import Progress
from .console import (
    add_cache_flag,
    add_key_flag,
    add_runtime_flags,
    describe_as_json,
    make_parser,
    read_runtime_flags,
    run_command,
)
from .output import is_terminal, say, say_data, say_folded, tell, tell_error
from .predict_times import Timeline
from .ranges import CLASS_COUNTS

MANY = 32
"""Number of images from which it is worth opening the bundle for several inferences at once."""
QUOTED = frozenset(',"\r\n')
"""Characters for which a cell of comma-separated values is quoted."""
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)
"""How the address of a file in a network begins; ``Path`` makes one slash of two."""
SHOW_PROGRESS = 20
"""Fewer images show no progress: they are done before anybody could read it."""

Show = Callable[[Prediction], bool]
"""Prints one answer; says whether anybody reads the answers."""


@dataclass(frozen=True)
class _Source:
    """An image to classify: a file, or an image of an archive."""

    name: str
    archive: ImageSet | None = None
    item: Item | None = None

    def open(self) -> ImageLike:
        """What the Predictor takes."""
        if self.archive is None or self.item is None:
            return Path(self.name)
        return NamedBytes(self.archive.read(self.item), self.name)


EXAMPLES = """\
examples:
  %(prog)s cmt_xs_int8_openvino ship.jpg
  %(prog)s cmt_xs_int8_openvino photos --topk 1 --csv
  %(prog)s cmt_xs_int8_openvino photos.tar --json
"""
"""What ``--help`` prints last."""


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``cmt-predict``."""
    return run_command(_main, build_parser().parse_args(argv))


def build_parser() -> argparse.ArgumentParser:
    """The flags of ``cmt-predict``."""
    p = make_parser(
        name_program("predict"),
        f"Classify images with a bundle; {MANY} images or more with several inferences at once. Each answer"
        " is printed as soon as it is known. Images that cannot be read are named on standard error, and the"
        " exit code is then 2.",
        EXAMPLES,
        json_help="print every answer, and every error, as one machine-readable object on a line of its own",
        verbose_help="show where the time until the first answer went, and the trace of an error",
    )
    p.add_argument("bundle", type=Path)
    p.add_argument(
        "images",
        type=Path,
        nargs="+",
        help="image files, or folders or .tar archives of them",
    )
    output = p.add_argument_group("output")
    output.add_argument(
        "--topk",
        type=CLASS_COUNTS.parse_whole,
        default=5,
        help="classes to print (default 5)",
    )
    output.add_argument(
        "--csv",
        action="store_true",
        help="print comma-separated values, one row an image; cells that begin with =, +, - or @ stay as they"
        " are, so import the file as text into a spreadsheet",
    )
    add_runtime_flags(p)
    add_cache_flag(p)
    add_key_flag(p)
    return p


def _main(args: argparse.Namespace) -> int:
    timeline = Timeline() if args.verbose else None
    _check(args)
    sources = [source for path in args.images for source in _expand(path, args.quiet)]
    failed = 0
    with _open(args, throughput=len(sources) >= MANY) as predictor:
        if timeline:
            timeline.watch(predictor)
        show = _show(args, sources, predictor.labels)
        for answer in _iterate_answers(predictor, sources, args.quiet):
            if isinstance(answer, ImageError):
                failed += 1
                tell_error(answer)
                if args.json:
                    say(describe_as_json(answer))
            elif not show(answer):
                break  # the reader of the pipe has seen enough
    if timeline:
        tell(timeline.describe())
    if failed:
        tell(f"{failed} of {len(sources)} images could not be read")
    return InputError.exit_code if failed else 0


def _open(args: argparse.Namespace, throughput: bool) -> Predictor:
    """The bundle, as the flags ask for it."""
    with Progress(args.quiet).shown("open the bundle"):
        return Predictor.load(
            args.bundle,
            **read_runtime_flags(args),
            key=args.key,
            cache=not args.no_cache,
            throughput=throughput,
        )


def _check(args: argparse.Namespace) -> None:
    """Raise :class:`InputError` for flags that cannot be used."""
    if args.json and args.csv:
        raise InputError(
            "--json and --csv were both given",
            remedy="choose one of them",
        )


def _iterate_answers(
    predictor: Predictor, sources: list[_Source], quiet: bool
) -> Iterator[Prediction | ImageError]:
    """The answer for each image, named; progress is shown only where no answers appear between."""
    progress = Progress(
        quiet or len(sources) < SHOW_PROGRESS or (sys.stdout is not None and sys.stdout.isatty())
    )
    answers = predictor.attempt(_open_sources(sources), copy=False)
    for done, (source, answer) in enumerate(zip(sources, answers, strict=True), 1):
        progress.count(done, len(sources))
        yield (replace(answer, source=source.name) if isinstance(answer, Prediction) else answer)
    progress.finish()


def _open_sources(sources: Iterable[_Source]) -> Iterator[ImageLike]:
    return (source.open() for source in sources)


def _show(args: argparse.Namespace, sources: list[_Source], labels: list[str]) -> Show:
    """What prints an answer in the form that was asked for."""
    from .. import (
        report,
    )  # here, because the command should start without what measures

    if args.json:
        return lambda answer: say(report.to_json(report.make_prediction_json(answer, args.topk)))
    if args.csv:
        return _start_csv(min(args.topk, len(labels)))
    width = max((len(escape_line(source.name)) for source in sources), default=0)
    safe = [escape_line(label) for label in labels]  # no label can pretend to be another line

    def show(answer: Prediction) -> bool:
        source = escape_line(answer.source or "")
        return say_folded(
            report.describe_prediction(replace(answer, labels=safe, source=source), args.topk, width)
        )

    return show


def _start_csv(topk: int) -> Show:
    """Prints the header now, and one line an answer: its source, then labels and probabilities by turns."""
    # on a terminal no name can pretend to be another line; a program gets the names as they are
    show_text = escape_line if is_terminal() else str
    columns = [f"{what}_{i}" for i in range(1, topk + 1) for what in ("label", "probability")]
    say_data(_format_csv_line(["source", *columns]))

    def show(answer: Prediction) -> bool:
        best = answer.top(topk)
        return say_data(
            _format_csv_line(
                [
                    show_text(answer.source or ""),
                    *(cell for label, p in best for cell in (show_text(label), f"{p:.6f}")),
                ]
            )
        )

    return show


def _format_csv_line(cells: Iterable[object]) -> str:
    """One row; a cell with a comma, a quote or a line break is quoted. Cells that a spreadsheet takes for
    formulas stay as they are, because a changed file name would name no file. Python 3.10's ``csv`` refuses
    NUL, which a label may hold."""
    return ",".join(_quote_cell(str(cell)) for cell in cells)


def _quote_cell(text: str) -> str:
    """A cell as RFC 4180 has it."""
    return '"' + text.replace('"', '""') + '"' if QUOTED & set(text) else text


def _require_images(path: Path) -> None:
    """Raise :class:`InputError` for what is no place of images, but of a bundle or in a network."""
    if read_listed(path / MANIFEST) is not None:
        raise InputError(
            "is a bundle, and stands where images belong",
            where=path,
            remedy=f"name the bundle first, then images: {name_program('predict')} BUNDLE IMAGE",
        )
    if ADDRESS.match(str(path)):
        raise InputError(
            "is an address, and nothing is downloaded",
            where=path,
            remedy="download the image, and give its file",
        )


def _expand(path: Path, quiet: bool) -> list[_Source]:
    """``path``, or the images below it."""
    _require_images(path)
    if is_archive(path):
        archive = ImageSet(path, labelled=False)
        sources = [_Source(archive.locate(item), archive, item) for item in archive]
    elif os.path.isdir(path):
        archive = ImageSet(path, labelled=False)
        sources = [_Source(str(path / item.name)) for item in archive]
    else:
        return [_Source(str(path))]
    Progress(quiet).tell(archive.note)
    return sources
