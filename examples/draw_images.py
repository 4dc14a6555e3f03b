"""Draws a few pictures of CIFAR-10 classes, so that a demonstration needs no data set.

python examples/draw_images.py out/pictures
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE = 256
"""Height and width of a picture in pixels."""


def draw_canvas(top: tuple[int, int, int], bottom: tuple[int, int, int]) -> Image.Image:
    """A vertical gradient from one colour to another, with a little grain."""
    t = np.linspace(0, 1, SIZE)[:, None, None]
    values = (1 - t) * np.array(top) + t * np.array(bottom) + np.zeros((SIZE, SIZE, 3))
    grain = np.random.default_rng(0).normal(0, 4, (SIZE, SIZE, 1))
    return Image.fromarray(np.clip(values + grain, 0, 255).astype(np.uint8))


def draw_ship() -> Image.Image:
    """A ship at sea."""
    image = draw_canvas((150, 190, 230), (215, 225, 235))
    d = ImageDraw.Draw(image)
    d.rectangle((0, 165, 256, 256), fill=(35, 75, 120))
    d.polygon([(20, 140), (236, 140), (210, 185), (50, 185)], fill=(60, 25, 30))
    d.rectangle((70, 100, 190, 140), fill=(235, 235, 235))
    d.rectangle((90, 75, 160, 100), fill=(215, 215, 220))
    d.rectangle((115, 40, 140, 78), fill=(170, 40, 40))
    for x in range(78, 186, 16):
        d.rectangle((x, 112, x + 8, 122), fill=(60, 80, 110))
    for y in range(190, 256, 12):
        d.line((0, y, 256, y + 3), fill=(60, 105, 150), width=2)
    return image


def draw_airplane() -> Image.Image:
    """An airplane in the sky."""
    image = draw_canvas((90, 150, 220), (190, 215, 240))
    d = ImageDraw.Draw(image)
    d.ellipse((30, 112, 226, 146), fill=(230, 232, 238))
    d.polygon([(110, 130), (150, 130), (80, 215), (58, 215)], fill=(195, 200, 210))
    d.polygon([(120, 122), (155, 122), (110, 60), (92, 60)], fill=(205, 210, 220))
    d.polygon([(40, 125), (70, 125), (42, 70), (22, 70)], fill=(190, 60, 60))
    d.ellipse((205, 120, 222, 132), fill=(70, 80, 100))
    for x in range(85, 200, 14):
        d.ellipse((x, 122, x + 6, 129), fill=(80, 95, 120))
    return image


def draw_automobile() -> Image.Image:
    """A red car from the side."""
    image = draw_canvas((200, 215, 225), (180, 190, 190))
    d = ImageDraw.Draw(image)
    d.rectangle((0, 175, 256, 256), fill=(95, 95, 98))
    d.polygon([(70, 125), (100, 85), (175, 85), (205, 125)], fill=(170, 25, 30))
    d.rounded_rectangle((25, 120, 235, 180), 18, fill=(190, 30, 35))
    d.polygon([(82, 122), (104, 93), (134, 93), (134, 122)], fill=(150, 185, 205))
    d.polygon([(142, 122), (142, 93), (170, 93), (192, 122)], fill=(150, 185, 205))
    for x in (50, 165):
        d.ellipse((x, 150, x + 50, 200), fill=(25, 25, 25))
        d.ellipse((x + 14, 164, x + 36, 186), fill=(165, 165, 170))
    d.rectangle((222, 135, 235, 148), fill=(250, 240, 190))
    return image


def draw_truck() -> Image.Image:
    """A lorry with a blue cab."""
    image = draw_canvas((185, 205, 230), (215, 215, 205))
    d = ImageDraw.Draw(image)
    d.rectangle((0, 190, 256, 256), fill=(110, 108, 104))
    d.rectangle((15, 60, 170, 180), fill=(235, 235, 230))
    d.polygon([(174, 95), (215, 95), (240, 135), (240, 180), (174, 180)], fill=(30, 80, 160))
    d.polygon([(190, 103), (212, 103), (230, 135), (190, 135)], fill=(165, 195, 215))
    for x in (35, 85, 190):
        d.ellipse((x, 160, x + 44, 204), fill=(20, 20, 20))
        d.ellipse((x + 13, 173, x + 31, 191), fill=(150, 150, 150))
    return image


DRAWINGS = {"airplane": draw_airplane, "automobile": draw_automobile, "ship": draw_ship, "truck": draw_truck}
"""Each class and the function that draws it."""


def main(folder: Path) -> None:
    """Write all pictures to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        draw().filter(ImageFilter.GaussianBlur(1.2)).save(folder / f"{name}.png")
    print(f"{len(DRAWINGS)} pictures in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/pictures"))
