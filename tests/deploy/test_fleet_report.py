"""Reports of many devices as one, and what is read again from pages and figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from cmt_edge.deploy.bundle import make_plain
from cmt_edge.deploy.cli import report
from cmt_edge.deploy.errors import InputError
from cmt_edge.deploy.report.html import (
    Reported,
    State,
    conclude_fleet,
    make_bundle_figures,
    make_bundle_page,
    make_comparison_figures,
    make_figures_file,
    make_fleet_figures,
    make_fleet_page,
    name_members,
    read_reported,
)
from helpers.bundles import make_bundle
from helpers.cli import strict
from helpers.reports import check, full_measured, full_subject, run_of, subject


@pytest.fixture
def figures(tmp_path):
    """Writes the figures of a report, edited as another device would have them."""

    def write(device: str, cpu: str, slower: float = 1.0, weights: str | None = None):
        content = json.loads(make_figures_file(make_bundle_figures(full_subject())))
        content["benchmark"]["host"]["cpu"] = cpu
        latency = content["benchmark"]["results"][0]["model"]
        for name in ("p50", "p90", "p95", "p99", "max"):
            latency[name] *= slower
        latency["histogram"] |= {end: slower * latency["histogram"][end] for end in ("low", "high")}
        if weights:
            content["manifest"]["model"]["weights"]["sha256"] = weights
        file = tmp_path / f"{device}.json"
        file.write_text(json.dumps(content))
        return file

    return write


def test_a_row_a_device(call, figures, tmp_path):
    files = [figures("orin", "an ARM", 3.0), figures("server", "a Xeon"), figures("laptop", "a Ryzen", 2.0)]
    page, again = tmp_path / "fleet.html", tmp_path / "fleet.json"
    code, out, err = call(report.main, "--merge", *files, "-o", page, "--figures", again, "--json")
    assert (code, err) == (0, "")
    answer = strict(out)
    assert [one["device"] for one in answer["devices"]] == ["orin", "server", "laptop"]
    assert [one["machine"] for one in answer["devices"]] == ["an ARM", "a Xeon", "a Ryzen"]
    assert answer["conclusion"]["sentence"] == (
        "Ship it: all 3 reports are verified within the allowed drop; the median latency is 2.00 ms (server)"
        " to 6.00 ms (orin)."
    )
    text = page.read_text()
    assert text.count(">an ARM<") == 1
    assert set(re.findall(r'<th [^>]*role="rowheader"[^>]*data-label="([^"]*)"', text)) == {"device"}
    assert "6.00</td>" in text
    for source in (page, again):  # a page and its figures can be merged again
        members = read_reported(source)
        assert [one.device for one in members] == ["orin", "server", "laptop"]
        assert make_fleet_page(members) == text


def test_other_weights_are_refused(fails, figures, tmp_path):
    one, other = figures("one", "a"), figures("other", "b", weights="1" * 64)
    message = fails(2, report.main, "--merge", one, other, "-o", tmp_path / "fleet.html")
    assert "different weights" in message
    assert "other has tiny with weights 111111111111" in message
    assert not (tmp_path / "fleet.html").exists()


def test_bundles_and_comparisons_are_merged_too(call, figures, tmp_path):
    bundle = make_bundle(tmp_path / "tiny")
    assert [one.device for one in read_reported(bundle.path)] == ["tiny"]
    run = run_of(full_measured("a"), full_measured("b", 2.0))
    both = [full_subject("a").with_speed(run, 0), full_subject("b").with_speed(run, 1)]
    file = tmp_path / "box.json"
    file.write_bytes(make_figures_file(make_comparison_figures(both, run)))
    members = name_members(read_reported(file))
    assert [one.device for one in members] == ["box / a", "box / b"]
    assert [one.subject.measured.ratio for one in members] == [1.0, 2.0]


@pytest.mark.parametrize("name", ["same", "b\udcff", "Ger\u00e4t \u202e\n"])
def test_a_report_counts_once_under_whatever_name(fails, call, figures, tmp_path, name):
    one, page = figures("one", "a"), tmp_path / "fleet.html"
    other = tmp_path / f"{name}.json"
    try:
        other.write_bytes(one.read_bytes())
    except (OSError, UnicodeError):
        pytest.skip("this file system has no such names")
    message = fails(2, report.main, "--merge", one, other, "-o", page)
    assert "are the same report" in message
    code, _, err = call(report.main, "--merge", other, "-o", page)
    assert (code, err) == (0, "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"p50": 2.85}, "do not rise"),
        ({"p50": -2.0}, "do not rise"),
        ({"p50": 0.002, "p90": 0.0028}, "lies outside its own histogram"),
    ],
)
def test_latencies_that_no_measurement_gives_are_refused(fails, figures, tmp_path, change, why):
    file = figures("mixed", "a")
    content = json.loads(file.read_text())
    content["benchmark"]["results"][0]["model"] |= change
    file.write_text(json.dumps(content))
    assert why in fails(2, report.main, "--merge", file, "-o", tmp_path / "fleet.html")


def test_a_large_fleet_is_not_named_whole():
    found = conclude_fleet([Reported(f"d{number}", subject()) for number in range(9)])
    assert found.why.startswith("d0, d1, d2, d3, d4 and 4 more (9 of 9); of d0: ")


def test_a_check_that_contradicts_itself_is_not_passed():
    made = subject(check())
    golden = replace(made.verification.golden, diff=99.0)
    (found,) = {
        conclude_fleet(
            [Reported("one", replace(made, verification=replace(made.verification, golden=golden)))]
        )
    }
    assert found.state is State.STOP


def test_names_that_repeat_are_numbered():
    made = [Reported("report", full_subject()) for _ in range(3)]
    assert [one.device for one in name_members(made)] == ["report", "report #2", "report #3"]


@pytest.mark.parametrize("change", [{"passed": False, "drop": 3.0}, {"drop_ci": (-0.3, 1.2)}])
def test_the_gravest_conclusion_counts(change):
    members = [Reported("good", subject(check())), Reported("bad", subject(check(**change)))]
    found = conclude_fleet(members)
    assert found.state is (State.STOP if "passed" in change else State.CHECK)
    assert found.why.startswith("bad (1 of 2); of bad: ")


def test_a_page_is_read_as_it_was_written(tmp_path):
    made = full_subject()
    page = tmp_path / "page.html"
    page.write_text(make_bundle_page(made))
    (member,) = read_reported(page)
    assert make_plain(member.subject) == make_plain(replace(made, path=made.name))
    assert make_fleet_figures([member])["fleet"][0]["report"]["flipped"]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "cannot be read|Expecting"),
        (b"[]", "no object"),
        (b"{}", "no manifest"),
        (b'{"bundles": []}', "lists no bundles"),
        (b'{"fleet": [{"device": "a"}]}', "lists no bundles"),
        (b'{"fleet": [{"report": {}}]}', "device is null"),
        (b'{"manifest": {"schema": 2}, "name": "a", "verification": null, "benchmark": null, "device": null}',
         "lacks entries"),
        (b'{"manifest": {}, "name": 5, "verification": null, "benchmark": null, "device": null}',
         "name is 5"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("suffix", [".json", ".html"])
def test_what_is_no_report_is_refused(tmp_path, content, why, suffix):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(content)
    with pytest.raises(InputError, match=why if suffix == ".json" else "no report") as caught:
        read_reported(file)
    assert caught.value.remedy


def test_a_picture_that_is_none_is_refused(tmp_path):
    content = json.loads(make_figures_file(make_bundle_figures(full_subject())))
    content["flipped"][0]["jpeg"] = 'x" onerror="alert(1)'
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match="JPEG file in base64"):
        read_reported(file)
