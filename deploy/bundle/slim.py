"""A slim bundle: without the files that its device does not need, which its manifest names."""

from __future__ import annotations

from dataclasses import replace

from .bundle import Bundle
from .golden import Golden
from .manifest import COMPILED, REFERENCE, REPORT_JSON, REPORT_PAGE, REPORT_TEXT, Manifest
from .sections import SlimEntry

NEEDLESS = (REFERENCE, REPORT_TEXT, REPORT_JSON, REPORT_PAGE, COMPILED)
"""Names of the files that neither a prediction nor the check of the golden vectors reads."""
LEAST_GOLDEN_IMAGES = 2
"""Number of golden images in a slim bundle: one of each kind, a PNG and a large JPEG."""


def choose_golden(golden: Golden) -> Golden:
    """The golden images that a slim bundle keeps: the first, and the last, which is the large one."""
    if len(golden.sources) <= LEAST_GOLDEN_IMAGES:
        return golden
    return golden.select([0, -1])


def leave_out(staged: Bundle, golden_images: int) -> Manifest:
    """Delete the files of an unfinished bundle that its device does not need; the manifest names them.

    Args:
        staged: the bundle, whose golden vectors are chosen already.
        golden_images: number of golden images that were not chosen.

    Raises:
        OSError: a file cannot be deleted.
    """
    manifest = staged.manifest
    left_out = {name: manifest.files[name] for name in NEEDLESS if name in manifest.files}
    for name in left_out:
        (staged.path / name).unlink()
    compiled = manifest.compiled
    if compiled is not None and compiled.details in left_out:
        compiled = replace(compiled, details=None)
    files = {name: entry for name, entry in manifest.files.items() if name not in left_out}
    slim = SlimEntry(files=left_out, golden_images=golden_images)
    return replace(manifest, files=files, compiled=compiled, slim=slim)
