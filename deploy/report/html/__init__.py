"""Reports as one HTML file that anyone can open: no script, no network, nothing outside the file."""

from .comparison import compare, make_comparison_figures, make_comparison_page
from .conclusion import Conclusion, State, conclude
from .figures import Reported, read_reported
from .fleet import (
    conclude_fleet,
    describe_machine,
    make_fleet_figures,
    make_fleet_page,
    name_members,
    require_distinct,
    require_one_model,
)
from .frame import make_conclusion_json, make_figures_file
from .pages import make_bundle_figures, make_bundle_page, make_own_page
from .subject import Subject, make_subject, read_subject

__all__ = [
    "Conclusion",
    "Reported",
    "State",
    "Subject",
    "compare",
    "conclude",
    "conclude_fleet",
    "describe_machine",
    "make_bundle_figures",
    "make_bundle_page",
    "make_comparison_figures",
    "make_comparison_page",
    "make_conclusion_json",
    "make_figures_file",
    "make_fleet_figures",
    "make_fleet_page",
    "make_own_page",
    "make_subject",
    "name_members",
    "read_reported",
    "read_subject",
    "require_distinct",
    "require_one_model",
]
