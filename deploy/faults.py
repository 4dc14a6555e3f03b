"""Whose fault a failed decoding is: the image's, or that of the program around it."""

from __future__ import annotations

import sys

DECODING = ("PIL", "numpy", "defusedxml", __name__.split(".")[0])
"""Packages whose failures while an image is decoded are about the image, as are the standard library's."""


def is_about_data(exc: Exception) -> bool:
    """Whether a failure while an image was read or decoded is about the image's data, and not an exception of
    the caller's own: a time limit, or what the caller's file object raised."""
    if isinstance(exc, TimeoutError) and exc.errno is None:
        return False
    root = type(exc).__module__.split(".")[0]
    if root not in ("builtins", "PIL", "struct", "zlib", "xml"):
        return False
    trace = exc.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    module = trace.tb_frame.f_globals.get("__name__", "")
    place = str(module).split(".")[0]
    return place in DECODING or (place != "__main__" and place in sys.stdlib_module_names)
