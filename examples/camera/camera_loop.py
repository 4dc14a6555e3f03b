"""Classifies a camera's newest frame again and again; frames that come meanwhile are skipped.

python examples/camera/camera_loop.py frames --record          # draws a short recording, once
python examples/camera/camera_loop.py frames BUNDLE --fps 30

The camera is a recording: a folder of frames that are played at ``--fps``. For a real one replace
:func:`play_frames` by a generator that yields its frames (docs/cameras.md).
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from cmt_edge.deploy import Predictor
from cmt_edge.deploy.cli.console import (
    add_key_flag,
    add_runtime_flags,
    make_parser,
    read_runtime_flags,
    run_command,
)
from cmt_edge.deploy.cli.output import say
from cmt_edge.deploy.cli.ranges import Range
from cmt_edge.deploy.errors import DataError, InputError
from cmt_edge.deploy.files import writing
from cmt_edge.deploy.images import ImageSet
from cmt_edge.deploy.report import to_json

RECORDED = 60
"""Frames of the recording that ``--record`` draws."""

WIDTH, HEIGHT = 320, 240
"""Size of its frames in pixels."""

RATES = Range(0, 1000)
"""Frames a second; 0 plays as fast as the disk gives them."""


@dataclass(frozen=True)
class Frame:
    """A frame: its number from 0 on, its pixels, uint8 ``(H, W, 3)`` RGB, and when it was taken, in seconds
    of ``time.perf_counter``."""

    number: int
    pixels: np.ndarray
    taken_s: float


class Newest:
    """Holds the newest frame that nobody has taken yet. One thread puts frames, another takes them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._frame: Frame | None = None
        self._failure: BaseException | None = None
        self._is_over = False

    def put(self, frame: Frame) -> None:
        """Replace the frame that waits."""
        with self._changed:
            self._frame = frame
            self._changed.notify()

    def end(self, failure: BaseException | None = None) -> None:
        """No more frames come; ``failure``: why the camera has failed."""
        with self._changed:
            self._is_over, self._failure = True, failure
            self._changed.notify()

    def take(self) -> Frame | None:
        """The newest frame, as soon as there is one; ``None`` at the end.

        Raises the camera's failure once its last frame was taken.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._frame is not None or self._is_over)
            frame, self._frame = self._frame, None
            if frame is None and self._failure is not None:
                raise self._failure
            return frame


class Camera:
    """Reads frames in a thread of its own, so that reading never waits for an answer; a context manager."""

    def __init__(self, frames: Iterable[np.ndarray]) -> None:
        """``frames``: uint8 ``(H, W, 3)``; each array stays as it is after it was given."""
        self.newest = Newest()
        self.read = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._read, args=(frames,), name="camera", daemon=True)

    def _read(self, frames: Iterable[np.ndarray]) -> None:
        failure: BaseException | None = None
        try:
            for number, pixels in enumerate(frames):
                if self._stop.is_set():
                    break
                self.newest.put(Frame(number, pixels, time.perf_counter()))
                self.read = number + 1
        except Exception as exc:
            failure = exc
        self.newest.end(failure)

    def __enter__(self) -> Camera:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@dataclass
class Tally:
    """What a loop did.

    Attributes:
        answered: numbers of the frames that were classified.
        ages_ms: for each of them, milliseconds from the frame to its answer.
    """

    answered: list[int] = field(default_factory=list)
    ages_ms: list[float] = field(default_factory=list)

    def summarise(self, read: int) -> dict[str, Any]:
        """The figures, for ``read`` frames."""
        found: dict[str, Any] = {
            "frames": read,
            "answered": len(self.answered),
            "skipped": read - len(self.answered),
        }
        if self.ages_ms:
            found |= {
                "median_age_ms": round(statistics.median(self.ages_ms), 2),
                "largest_age_ms": round(max(self.ages_ms), 2),
            }
        return found


def watch(predictor: Predictor, camera: Camera, show: Callable[[Frame, str, float], object]) -> Tally:
    """Classify the newest frame until the camera ends.

    ``show`` is told each new label with its frame and probability.
    """
    tally, shown = Tally(), ""
    while (frame := camera.newest.take()) is not None:
        ((label, probability),) = predictor(frame.pixels, color="rgb").top(1)
        tally.answered.append(frame.number)
        tally.ages_ms.append(1000 * (time.perf_counter() - frame.taken_s))
        if label != shown:
            show(frame, label, probability)
        shown = label
    return tally


def play_frames(folder: Path, fps: float) -> Iterator[np.ndarray]:
    """The frames of a recording, in the order of their names, at ``fps`` frames a second.

    A player that is late does not hurry: like a camera, it gives the frame when it is due, or at once.
    """
    start = time.perf_counter()
    for number, item in enumerate(ImageSet(folder, labelled=False)):
        with Image.open(folder / item.name) as image:
            pixels = np.asarray(image.convert("RGB"))
        if fps:
            time.sleep(max(0.0, start + number / fps - time.perf_counter()))
        yield pixels


def draw_frame(number: int, count: int) -> Image.Image:
    """A frame in which a ship sails from left to right, then an airplane flies back."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (150, 190, 230))
    canvas = ImageDraw.Draw(image)
    share = 2 * number / count
    if share < 1:
        x = int(share * WIDTH) - 80
        canvas.rectangle((0, 160, WIDTH, HEIGHT), fill=(35, 75, 120))
        canvas.polygon([(x, 135), (x + 160, 135), (x + 135, 180), (x + 25, 180)], fill=(60, 25, 30))
        canvas.rectangle((x + 45, 95, x + 115, 135), fill=(235, 235, 235))
        canvas.rectangle((x + 70, 60, x + 90, 95), fill=(170, 40, 40))
    else:
        x = int((2 - share) * WIDTH) - 80
        canvas.ellipse((x, 105, x + 170, 135), fill=(230, 232, 238))
        canvas.polygon([(x + 60, 120), (x + 95, 120), (x + 130, 200), (x + 112, 200)], fill=(195, 200, 210))
        canvas.polygon([(x + 130, 115), (x + 155, 115), (x + 168, 65), (x + 150, 65)], fill=(190, 60, 60))
    return image


def record(folder: Path, count: int = RECORDED) -> None:
    """Draw a recording of ``count`` frames into a new or empty folder."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise DataError("is not empty", where=folder, remedy="name a new folder for the recording")
        for number in range(count):
            draw_frame(number, count).save(folder / f"{number:04}.png")


def run(args: argparse.Namespace) -> int:
    """Record, or watch; returns the exit code."""
    if args.record:
        record(args.frames)
        say(f"{RECORDED} frames in {args.frames}; now leave --record out")
        return 0
    if args.bundle is None:
        raise InputError("no bundle was named", remedy="camera_loop.py FRAMES BUNDLE")
    ImageSet(args.frames, labelled=False)  # a folder without frames is told before the model is loaded
    with Predictor.load(
        args.bundle,
        **read_runtime_flags(args),
        key=args.key,
    ) as predictor:
        camera = Camera(play_frames(args.frames, args.fps))
        with camera:
            tally = watch(
                predictor,
                camera,
                lambda frame, label, p: say(f"frame {frame.number:>5}  {label}  {p:.1%}"),
            )
    found = tally.summarise(camera.read)
    say(to_json(found) if args.json else "\n".join(f"{name:<15} {value}" for name, value in found.items()))
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line; the exit code."""
    p = make_parser("camera_loop.py", "Classify the newest frame of a recorded camera again and again.")
    p.add_argument("frames", type=Path, help="folder of frames, played in the order of their names")
    p.add_argument("bundle", type=Path, nargs="?")
    p.add_argument("--record", action="store_true", help="draw a short recording into FRAMES, and end")
    p.add_argument(
        "--fps", type=RATES.parse_number, default=30.0, help="frames a second (default 30; 0: at once)"
    )
    add_runtime_flags(p)
    add_key_flag(p)
    return run_command(run, p.parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
