"""Reports as one HTML file that anyone can open: no script, no network, nothing outside the file."""

from .conclusion import Conclusion, State, conclude
from .pages import compare, make_bundle_page, make_comparison_page, make_conclusion_json
from .subject import Subject, make_subject, read_subject

__all__ = [
    "Conclusion",
    "State",
    "Subject",
    "compare",
    "conclude",
    "make_bundle_page",
    "make_comparison_page",
    "make_conclusion_json",
    "make_subject",
    "read_subject",
]
