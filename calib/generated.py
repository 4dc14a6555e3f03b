"""Images made from nothing: dead leaves with texture, whose edges, scales and colours are spread like those
of photographs.

Overlapping discs and polygons with power-law sizes reproduce the scale invariance and occlusion statistics of
natural images (Lee, Mumford and Huang, IJCV 2001); 1/f noise inside the shapes adds texture. They are used
where no data set is needed: for golden vectors, and for calibration when a user asks for them by name. Real
images calibrate better.
"""

from __future__ import annotations

import io
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

ASPECT = 1.25
"""Width of an image divided by its height."""

LARGEST_DRAWN = 1200
"""Height in pixels up to which every pixel is drawn."""

QUALITY = 90
"""Of JPEG images, as cameras use it."""

SHAPES = 90
"""Number of discs and polygons in an image."""


def generate(count: int, size: int, seed: int = 0) -> list[bytes]:
    """``count`` images as encoded PNG, ``size`` pixels high and wider than that.

    Equal arguments give equal pixels.
    """
    rng = np.random.default_rng(seed)
    width = round(size * ASPECT)
    images = (draw_dead_leaves(width, size, rng) for _ in range(count))
    return [_encode(image) for image in images]


def generate_photograph(size: int, seed: int = 0) -> bytes:
    """A JPEG image ``size`` pixels high and wider than that, as a camera might have taken it.

    Beyond :data:`LARGEST_DRAWN` pixels a smaller picture is enlarged.
    """
    drawn = min(size, LARGEST_DRAWN)
    image = draw_dead_leaves(round(drawn * ASPECT), drawn, np.random.default_rng(seed))
    if drawn != size:
        image = image.resize((round(size * ASPECT), size), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def draw_dead_leaves(
    width: int,
    height: int,
    rng: np.random.Generator,
) -> Image.Image:
    """One RGB image."""
    tint = rng.uniform(40, 215, 3)  # scenes have a dominant colour and light
    spread = rng.uniform(15, 70)
    image = Image.new(
        "RGB",
        (width, height),
        _draw_colour(rng, tint, spread),
    )
    draw = ImageDraw.Draw(image)
    smallest, largest = 0.02 * height, 0.6 * height
    for _ in range(SHAPES):
        radius = _draw_radius(rng, smallest, largest)
        centre = rng.uniform((0, 0), (width, height))
        _draw_leaf(
            draw,
            rng,
            centre,
            radius,
            _draw_colour(rng, tint, spread),
        )
    noise = _make_pink_noise(rng, height, width) * rng.uniform(4, 18)
    slope = np.linspace(-1, 1, height)[:, None]
    light = slope * rng.uniform(-25, 25)
    values = np.asarray(image, np.float32) + (noise + light)[..., None]
    pixels = np.clip(values, 0, 255).astype(np.uint8)
    radius = rng.uniform(0.2, 1.0) * height / 200
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius))


def _draw_radius(rng: np.random.Generator, low: float, high: float) -> float:
    """A radius with density proportional to r**-3, which makes the picture scale-invariant."""
    u = rng.uniform()
    return math.pow(low**-2 + u * (high**-2 - low**-2), -0.5)


def _draw_leaf(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    centre: np.ndarray,
    radius: float,
    colour: tuple[int, ...],
) -> None:
    """Draw a disc or a polygon."""
    x, y = centre
    if rng.uniform() < 0.5:
        stretch = rng.uniform(0.5, 1.0)
        draw.ellipse(
            (
                x - radius,
                y - radius * stretch,
                x + radius,
                y + radius * stretch,
            ),
            fill=colour,
        )
        return
    corners = int(rng.integers(3, 7))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    draw.polygon(
        [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles],
        fill=colour,
    )


def _draw_colour(
    rng: np.random.Generator,
    tint: np.ndarray,
    spread: float,
) -> tuple[int, ...]:
    """Red, green and blue near ``tint``; ``spread`` is the standard deviation of the brightness."""
    light = rng.normal(0, spread)
    colour = tint + light + rng.normal(0, spread / 2, 3)
    return tuple(int(v) for v in np.clip(colour, 0, 255))


def _make_pink_noise(
    rng: np.random.Generator,
    height: int,
    width: int,
) -> np.ndarray:
    """1/f noise of unit standard deviation, ``(height, width)``."""
    frequency = np.hypot(
        *np.meshgrid(
            np.fft.fftfreq(height),
            np.fft.rfftfreq(width),
            indexing="ij",
        )
    )
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
    spectrum[0, 0] = 0
    noise: np.ndarray = np.fft.irfft2(spectrum, (height, width))
    return noise / float(noise.std())


def _encode(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)  # a higher level would take most of the time
    return buffer.getvalue()
