"""How Sphinx makes a site of these pages: ``make docs``. Why Sphinx: ``docs/notes/docs-tool.md``."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
"""The repository."""
sys.path.insert(0, str(ROOT / "src"))

project = "cmt-edge"
author = "the cmt-edge authors"
copyright = "the cmt-edge authors, Apache-2.0"
language = "en"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
myst_heading_anchors = 4
"""Headings have the anchors that GitHub gives them, down to this level."""
suppress_warnings = ["myst.header"]
"""Pages may leave a level of headings out. A dead link and a page that no list of pages holds stay errors."""

autodoc_mock_imports = [
    "cmt_edge.calib.synthetic",
    "nncf",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxsim",
    "openvino",
    "safetensors",
    "threadpoolctl",
    "torch",
]
"""Packages that the docstrings do not need and that the environment of the pages lacks, and a module of ours
that joins PyTorch's types when it is imported."""
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80

html_theme = "pydata_sphinx_theme"
html_title = "cmt-edge"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False
html_sidebars = {"index": [], "quickstart": [], "faq": []}
html_theme_options = {
    "logo": {"text": "cmt-edge"},
    "header_links_before_dropdown": 6,
    "navbar_align": "left",
    "navigation_with_keys": False,
    "secondary_sidebar_items": ["page-toc"],
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_center": [],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

OUTSIDE = {
    "CHANGELOG.md": "project/changelog",
    "CONTRIBUTING.md": "project/contributing",
    "README.md": "index",
    "SECURITY.md": "project/security",
}
"""Page at the top of the repository -> the page of the site that stands for it."""
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
"""A link to a file, with its anchor; links to addresses have a colon."""


def show_file(_: Any, docname: str, source: list[str]) -> None:
    """Give a page of ``project/`` the text of its file, and lead links to pages of the site."""
    name = next((name for name, page in OUTSIDE.items() if page == docname and page != "index"), None)
    page = ROOT / name if name else ROOT / "docs" / f"{docname}.md"
    text = (ROOT / name).read_text(encoding="utf-8") if name else source[0]
    here = ROOT / "docs" / docname

    def turn(link: re.Match[str]) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        place = Path(os.path.normpath(page.parent / target))
        if place.is_relative_to(ROOT / "docs") and place.suffix:
            known = place
        elif other := OUTSIDE.get(place.relative_to(ROOT).as_posix()):
            known = ROOT / "docs" / f"{other}.md"
        else:
            return label  # a file of the repository, which the site does not hold
        return f"[{label}]({os.path.relpath(known, here.parent)}{anchor})"

    source[0] = LINK.sub(turn, text)


def setup(app: Any) -> None:
    """Register :func:`show_file`."""
    app.connect("source-read", show_file)
