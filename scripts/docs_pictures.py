"""Take the picture of a report that the pages show: ``docs/report.png``.

usage: python scripts/docs_pictures.py BUNDLE [--browser chromium]

``BUNDLE`` is best one with a measured accuracy:

    cmt-edge export --model cmt_nano --weights cmt_nano_cifar10.pt --precision int8 \\
                    --data cifar10.tar/train --eval-data cifar10.tar/test

The picture shows the top of its ``report.html``, without a network. It must show no image of a data set.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "report.png"
"""The picture."""
SIZE = (1000, 900)
"""Width and height of the window, in CSS pixels."""
COLOURS = 128
"""Number of colours of the picture: a page of text and bars needs no more, and the file is smaller."""
TIME_LIMIT_S = 300
"""The time that the browser may take, in seconds."""


def photograph(page: Path, picture: Path, browser: str) -> None:
    """Let a browser without a window draw the top of a page.

    Raises:
        SystemExit: there is no such browser, or it drew nothing.
    """
    program = shutil.which(browser)
    if program is None:
        raise SystemExit(f"error: {browser} is not installed; name a Chromium with --browser")
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}"]
        command += [
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--screenshot={picture}",
            page.resolve().as_uri(),
        ]
        try:
            subprocess.run(command, capture_output=True, timeout=TIME_LIMIT_S, check=False)
        except subprocess.TimeoutExpired as exc:
            raise SystemExit(f"error: {browser} took more than {TIME_LIMIT_S} s") from exc
    if not picture.is_file():
        raise SystemExit(f"error: {browser} drew nothing")


def main(arguments: list[str] | None = None) -> int:
    """Take the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args(arguments)
    page = options.bundle / "report.html"
    if not page.is_file():
        raise SystemExit(f"error: {options.bundle} holds no report.html")
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "report.png"
        photograph(page, drawn, options.browser)
        with Image.open(drawn) as image:
            image.convert("RGB").quantize(COLOURS).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1000} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
