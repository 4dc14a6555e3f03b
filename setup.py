"""Stops a build of a checkout without the links in src/cmt_edge, which would make an empty package."""

from pathlib import Path

from setuptools import setup

PACKAGE = Path(__file__).resolve().parent / "src" / "cmt_edge"
MISSING = [room for room in ("cmt", "export", "calib", "deploy") if not (PACKAGE / room).is_dir()]
if MISSING:
    raise SystemExit(
        f"src/cmt_edge/{MISSING[0]} is no folder, so the package would be empty: Git did not make the links"
        " of this checkout. On Windows switch the developer mode on, then: git config core.symlinks true,"
        " and check out again"
    )

setup()
