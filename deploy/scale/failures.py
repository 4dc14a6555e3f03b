"""The error for images that workers cannot read."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..children import read_error
from ..errors import DataError, ImageError

SHOWN_IMAGES = 3
"""The largest number of unreadable images that an error names besides the first one."""


def raise_failures(found: Sequence[tuple[str, str]]) -> None:
    """Raise the error of the first image that cannot be read, with the names of more.

    Args:
        found: name and error, as JSON of :func:`cmt_edge.deploy.children.describe_error`, of each such image.
            Nothing is raised where there are none.
    """
    if not found:
        return
    first = read_error(json.loads(found[0][1]))
    if len(found) > 1:
        kind = ImageError if isinstance(first, ImageError) else DataError
        names = ", ".join(name for name, _ in found[1 : 1 + SHOWN_IMAGES])
        rest = len(found) - 1 - SHOWN_IMAGES
        more = f" and {rest} more" if rest > 0 else ""
        why = f"{first.why}; " if first.why else ""
        raise kind(first.what, where=first.where, why=f"{why}so are {names}{more}", remedy=first.remedy)
    raise first
