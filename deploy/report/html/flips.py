"""Answers that changed: all pairs of answers, the most frequent changes, and the images themselves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ...bundle import Manifest
from ...bundle.sections import DataCheck, Flip
from ...measure.flipped import FlippedImage
from .charts import draw_bar
from .elements import NOTHING, Markup, Table, join, make

CELL = 10.0
"""Width and height of a cell of the matrix, in the units of its drawing."""
EDGE = 10.0
"""Width of the row of numbers above the matrix and of the column beside it."""
FAINTEST, STRONGEST = 0.12, 0.45
"""Opacity of the rarest and of the most frequent change; the number on a stronger one could not be read."""


def name_class(manifest: Manifest, label: int) -> str:
    """The name of a class by its index."""
    known = label < len(manifest.labels)
    return manifest.labels[label][1] if known else f"class {label}"


def write_changes(data: DataCheck, flipped: Sequence[FlippedImage], manifest: Manifest) -> Markup:
    """What is known of the answers that changed; nothing where none did."""
    parts = [
        draw_confusion(data.confusion or (), manifest),
        _write_flips(data.flips or (), manifest),
        _show_images(flipped, data, manifest),
    ]
    return join([make("h3", "Changed answers"), *parts]) if any(parts) else NOTHING


def draw_confusion(counts: tuple[tuple[int, ...], ...], manifest: Manifest) -> Markup:
    """A cell a pair of answers, with the number of images, the darker the more of them changed."""
    if not counts:
        return NOTHING
    size = EDGE + CELL * len(counts)
    changed = [
        count for row, cells in enumerate(counts) for column, count in enumerate(cells) if row != column
    ]
    summary = (
        f"Answers of the reference (rows) against those of the bundle (columns): {sum(changed)} images of"
        f" {sum(map(sum, counts))} changed theirs"
    )
    picture = make(
        "svg",
        *_draw_numbers(len(counts)),
        *_draw_cells(counts, max(changed, default=0) or 1),
        viewBox=f"0 0 {size:g} {size:g}",
        role="img",
        aria_label=summary,
        class_="matrix",
    )
    names = ", ".join(f"{place + 1} {name_class(manifest, place)}" for place in range(len(counts)))
    return make("figure", picture, make("figcaption", f"{summary}. Classes: {names}."))


def _draw_numbers(classes: int) -> Iterator[Markup]:
    for place in range(classes):
        middle = EDGE + CELL * (place + 0.5)
        yield _write(middle, EDGE / 2, str(place + 1), "number")
        yield _write(EDGE / 2, middle, str(place + 1), "number")


def _draw_cells(counts: tuple[tuple[int, ...], ...], most: int) -> Iterator[Markup]:
    for row, cells in enumerate(counts):
        for column, count in enumerate(cells):
            x, y = EDGE + CELL * column, EDGE + CELL * row
            kind = "same" if row == column else "cell" if count else "none"
            strength = f"{FAINTEST + (STRONGEST - FAINTEST) * count / most:.3f}"
            yield make(
                "rect",
                x=f"{x + 0.3:.2f}",
                y=f"{y + 0.3:.2f}",
                width=f"{CELL - 0.6:.2f}",
                height=f"{CELL - 0.6:.2f}",
                class_=kind,
                fill_opacity=strength if kind == "cell" else None,
            )
            if count:
                yield _write(x + CELL / 2, y + CELL / 2, str(count), "count")


def _write(x: float, y: float, text: str, class_: str) -> Markup:
    return make("text", text, x=f"{x:.2f}", y=f"{y + 1.3:.2f}", text_anchor="middle", class_=class_)


def _write_flips(flips: tuple[Flip, ...], manifest: Manifest) -> Markup:
    most = max((flip.images for flip in flips), default=1)
    rows = [
        [
            name_class(manifest, flip.reference),
            name_class(manifest, flip.bundle),
            str(flip.images),
            draw_bar(flip.images / most),
        ]
        for flip in flips
    ]
    return Table(
        "The most frequent changes of an answer, whichever is right",
        ["the reference says", "the bundle says", "images", ""],
        rows,
    ).write()


def _show_images(flipped: Sequence[FlippedImage], data: DataCheck, manifest: Manifest) -> Markup:
    """The images as the model sees them, each with its label and both answers."""
    if not flipped:
        return NOTHING
    changed = round(data.images * (100 - data.agreement) / 100)
    text = (
        f"{len(flipped)} of {changed} images whose answer changed, as the model sees them; first"
        " those that only the reference gets right, then those that only the bundle does."
    )
    pictures = make("ul", *(make("li", _show_image(one, manifest)) for one in flipped), class_="flips")
    return join([make("p", text), pictures])


def _show_image(one: FlippedImage, manifest: Manifest) -> Markup:
    def tell(who: str, answer: int) -> Markup:
        verdict = "right" if answer == one.label else "wrong"
        return make("span", f"{who}: {name_class(manifest, answer)}, {verdict}")

    picture = make("img", src=f"data:image/jpeg;base64,{one.jpeg}", alt=f"{name_class(manifest, one.label)}")
    caption = [
        make("span", one.name, class_="soft"),
        make("span", f"label: {name_class(manifest, one.label)}"),
        tell("reference", one.reference),
        tell("bundle", one.bundle),
    ]
    return make("figure", Markup(picture.removesuffix("</img>")), make("figcaption", *caption))
