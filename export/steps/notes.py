"""What a user should know of an export: what of a checkpoint file was not used, and images that int8 was
calibrated on and judged by."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from cmt_edge.cmt.described import describe_input
from cmt_edge.cmt.weights import LoadedWeights
from cmt_edge.deploy.bundle import Manifest

from ..config import ExportConfig
from ..settings import NAMED_WEIGHTS

MAX_KEYS = 6
"""Number of keys of a checkpoint that a note names."""

CHANNELS_REMEDY = "images are given as red, green, blue; a model of blue, green, red must turn them itself"
"""What a note says of an order of the channels."""

NOT_TAKEN_REMEDY = {
    "bgr_to_rgb": CHANNELS_REMEDY,
    "channel_order": CHANNELS_REMEDY,
    "color_order": CHANNELS_REMEDY,
    "crop_pct": "--crop-ratio gives it",
    "crop_ratio": "--crop-ratio gives it",
    "interpolation": "the model's own filter is kept",
    "to_rgb": CHANNELS_REMEDY,
}
"""Name of a setting that is not taken from a checkpoint -> what the note says of it."""


def write_notes_on_checkpoint(
    config: ExportConfig,
    manifest: Manifest,
    loaded: LoadedWeights,
) -> list[str]:
    """What a user should know of a checkpoint file: names of classes that it lacks, keys that were left
    out, and settings of the images that are not used."""
    notes = []
    source, labels = manifest.labels_source, manifest.labels
    from_file = config.weights not in NAMED_WEIGHTS
    if from_file and source in ("published", "numbered"):
        notes.append(
            f"{loaded.source} does not name its classes, so that their labels are {source}, from"
            f" {labels[0][1]!r} to {labels[-1][1]!r}: --labels FILE gives others"
        )
    if loaded.left_out:
        keys = _list_keys(loaded.left_out)
        notes.append(f"not of the model, left out: {keys} (all of its weights are in {loaded.entry})")
    if loaded.unread:
        unread = ", ".join(loaded.unread)
        notes.append(f"not read, because that would run its code: {unread} in {loaded.source}")
    if from_file:
        notes += _write_notes_on_images(config)
    return notes


def write_note_on_overlap(calibrated: Sequence[str], judged: Collection[str]) -> list[str]:
    """A sentence where images of the evaluation also calibrated the graph, else nothing.

    Only files with the same bytes are found: an image that was encoded again is another one here.

    Args:
        calibrated: digests of the calibration images, see :func:`cmt_edge.deploy.images.hash_image`.
        judged: those of the labelled images.
    """
    shared = sum(digest in judged for digest in calibrated)
    if not shared:
        return []
    are = "is" if shared == 1 else "are"
    return [
        f"{shared} of the {len(calibrated)} calibration images {are} among the {len(judged)} of --eval-data"
        " (the same files), so top-1 may look better than it is: calibrate on other images (--data)"
    ]


def _list_keys(keys: Sequence[str]) -> str:
    """The first :data:`MAX_KEYS` of ``keys``, and how many more there are."""
    rest = len(keys) - MAX_KEYS
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(keys[:MAX_KEYS]) + more


def _write_notes_on_images(config: ExportConfig) -> list[str]:
    """Which settings of the images in a checkpoint file differ from those of the export."""
    path, used = Path(config.weights), config.preprocess
    said = describe_input(path)
    differs = said.mean is not None and (said.mean, said.std) != (used.mean, used.std)
    notes = []
    if (said.fault or differs) and config.mean is None and config.std is None:
        what = said.fault or f"the mean {said.mean} and the standard deviation {said.std}"
        notes.append(
            f"what {path.name} says of mean and standard deviation is not used ({what}): --mean and --std"
            " give them"
        )
    agreed = {
        "interpolation": (used.interpolation,),
        "crop_pct": (config.crop_ratio or config.spec.crop_ratio,),
        "crop_ratio": (config.crop_ratio or config.spec.crop_ratio,),
    }
    for name, value in said.not_taken:
        if value not in agreed.get(name, (True, "rgb", "RGB")):
            notes.append(f"{name} = {_show(value)} in {path.name} is not used: {NOT_TAKEN_REMEDY[name]}")
    return notes


def _show(value: object) -> str:
    """A value of a checkpoint in a note; an object of another class is only named."""
    return repr(value) if isinstance(value, (bool, int, float, str)) else f"a {type(value).__name__}"
