"""The HTML report: what it concludes, that nothing from a file becomes markup, and that its figures are those
of the record."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cmt_edge.deploy.bundle import Manifest
from cmt_edge.deploy.bundle.sections import (
    ClassCheck,
    Flip,
    LayerRun,
    RanOn,
)
from cmt_edge.deploy.cli import bench, report, verify
from cmt_edge.deploy.measure.confusion import MOST_LISTED, compare_classes, count_flips
from cmt_edge.deploy.measure.statistics import BINS, summarise
from cmt_edge.deploy.measure.timing import Protocol
from cmt_edge.deploy.report.html import (
    State,
    Subject,
    compare,
    conclude,
    make_bundle_page,
    make_comparison_page,
    make_own_page,
    make_subject,
)
from cmt_edge.deploy.report.html.elements import Table, keep_units, make_code
from cmt_edge.deploy.report.html.flips import draw_confusion
from cmt_edge.deploy.report.html.scatter import WIDTH, Point, draw_scatter
from helpers.bundles import make_bundle, recorded_bundle, tiny_manifest
from helpers.cli import strict
from helpers.images import coloured_folder
from helpers.paths import ROOT
from helpers.reports import check, full_subject, measured, run_of, subject

WRITTEN = sorted((ROOT / "tests" / "data" / "manifests").glob("*.json"))
"""Manifests that the exporter wrote."""
VOID = {"meta", "link", "wbr", "img"}
"""Elements without an end."""
KNOWN = {
    *VOID, "html", "head", "title", "style", "body", "main", "nav", "section", "footer", "h1", "h2", "h3",
    "p", "ul", "li", "dl", "dt", "dd", "div", "span", "a", "pre", "code", "table", "caption", "thead",
    "tbody", "tr", "th", "td", "figure", "figcaption", "svg", "rect", "circle", "text", "img", "details",
    "summary",
}  # fmt: skip
"""Every element that a page has."""
EVIL = "</style><script>alert(1)</script>\"' onload=x <img src=https://example.org/x>\u202egpj"
"""A label that would like to be more."""


class Page(HTMLParser):
    """Reads a page: its elements must be known and nested; keeps attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.heads: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert tag in KNOWN
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.open += [] if tag in VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.heads.append(self.open[-1])

    @property
    def text(self) -> str:
        return "".join(self.texts).replace("\N{NO-BREAK SPACE}", " ")

    def of(self, name: str) -> list[str]:
        """The values of an attribute."""
        return [value for _, found, value in self.attributes if found == name]


def read_data(page: Page) -> dict:
    """What the page lets a reader download."""
    (address,) = [value for value in page.of("href") if value.startswith("data:application/json")]
    return strict(base64.b64decode(address.partition("base64,")[2]).decode())


# --- the conclusion -------------------------------------------------------------------------------


def test_what_is_verified_may_be_shipped():
    found = conclude(subject(check()))
    assert found.state is State.SHIP
    assert "a drop of +0.20 points (95 % interval -0.30 to +0.70), within the allowed 1" in found.sentence
    assert found.sentence.endswith("the median latency is 2.50 ms a batch of 1.")


@pytest.mark.parametrize(
    ("made", "state", "why"),
    [
        (subject(check(passed=False, drop=3.0)), State.STOP, "more than the allowed 1"),
        (
            subject(check(), passed=False),
            State.STOP,
            "differ from the reference's by 9, where 0.5 is allowed",
        ),
        (subject(check(), model=tiny_manifest().model), State.STOP, "weights are random"),
        (subject(check(drop_ci=(-0.3, 1.2))), State.CHECK, "cannot show that the drop is at most 1 points"),
        (subject(), State.CHECK, "top-1 was not measured"),
        (subject(check(), latency=None), State.CHECK, "its device has not run it"),
        (subject(check(), format="trt"), State.CHECK, "no GPU has run it"),
        (subject(verification=None), State.CHECK, "nothing was verified"),
    ],
    ids=lambda value: value.name if isinstance(value, State) else None,
)
def test_what_speaks_against_a_bundle(made, state, why):
    found = conclude(made)
    assert found.state is state
    assert why in found.sentence
    assert Page(make_bundle_page(made)).text.count(found.sentence) == 1


def test_fresh_weights_are_named():
    made = subject(check())
    weights = replace(made.manifest.model.weights, fresh=("head.weight",))
    model = replace(made.manifest.model, weights=weights)
    found = conclude(replace(made, manifest=replace(made.manifest, model=model)))
    assert (found.state, "head.weight" in found.sentence) == (State.CHECK, True)


@pytest.mark.parametrize(("interval", "doubt"), [((1.9, 2.1), False), ((0.9, 3.0), True)])
def test_the_fastest_of_those_that_may_be_shipped(interval, doubt):
    """The fastest of all drops too much."""
    made = [
        subject(check(), name="slow"),
        subject(check(), name="fast"),
        subject(check(passed=False), name="no"),
    ]
    run = run_of(
        measured("slow", 1.0, (0.9, 1.1)), measured("fast", 2.0, interval), measured("no", 9.0, (8.9, 9.1))
    )
    made = [one.with_speed(run, place) for place, one in enumerate(made)]
    found = compare(made, [conclude(one) for one in made], run)
    assert found.state is State.SHIP
    assert found.sentence.startswith(
        "Ship it: fast is the fastest of those within the allowed drop (slow, fast)"
    )
    assert ("no clear difference from slow" in found.sentence) == (doubt or interval[0] <= 1.1)


def test_without_a_common_run_none_is_called_the_fastest():
    made = [subject(check(), name="one"), subject(check(), name="two")]
    found = compare(made, [conclude(one) for one in made], None)
    assert found.state is State.SHIP
    why = "one, two are verified within the allowed drop; cmt-bench tells which of them is the fastest"
    assert found.why == why


@pytest.mark.parametrize(("second", "state"), [(True, State.CHECK), (False, State.STOP)])
def test_where_none_may_be_shipped(second, state):
    made = [subject(passed=False), subject(passed=second)]
    assert compare(made, [conclude(one) for one in made], None).state is state


# --- the page -------------------------------------------------------------------------------------


def hostile() -> Subject:
    """Every text that a file may bring would like to be markup."""
    data = check(
        reference_source=EVIL,
        classes=(ClassCheck(0, 10, 9, 8), ClassCheck(77, 10, 9, 8)),
        flips=(Flip(0, 1, 3),),
    )
    made = subject(data, name=EVIL, labels=((EVIL, EVIL), ("b", "b"), ("c", "c")), versions={EVIL: EVIL})
    verification = replace(made.verification, notes=(EVIL,), steps={EVIL: 1.0})
    manifest = replace(made.manifest, verification=verification)
    return replace(made, manifest=manifest, verification=verification, path=EVIL)


@pytest.mark.parametrize("make", [make_bundle_page, lambda one: make_comparison_page([one, one])])
def test_nothing_from_a_file_becomes_markup(make):
    page = Page(make(hostile()))
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in page.text
    assert {name for _, name, _ in page.attributes if name.startswith("on") or name == "style"} == set()
    assert all(value.startswith(("#", "data:")) for value in [*page.of("href"), *page.of("src")])
    assert read_data(page)  # JSON holds the texts as they are


def test_the_policy_allows_the_style_sheet_alone():
    text = make_bundle_page(subject())
    policy = Page(text).of("content")[0]
    style = re.search("<style>(.*?)</style>", text, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")
    assert "script-src" not in policy
    assert "url(" not in style
    assert "@import" not in style


@pytest.mark.parametrize("file", WRITTEN, ids=lambda file: file.stem)
def test_every_recorded_manifest_has_a_page(file):
    manifest = Manifest.from_bytes(file.read_bytes(), file)
    page = Page(make_bundle_page(make_subject("a bundle", "a bundle", manifest, None)))
    assert page.heads[0] == "h1"
    assert page.heads.count("h1") == 1
    anchors = {value for value in page.of("href") if value.startswith("#")}
    assert anchors == {f"#{name}" for name in page.of("id")}
    assert all(entry.sha256 in page.text for entry in manifest.files.values())
    data = read_data(page)
    assert data["manifest"] == json.loads(file.read_text()) | {"checksum": manifest.checksum}


def test_the_figures_of_the_page_are_those_of_the_record():
    data = check(classes=(ClassCheck(1, 40, 30, 20),), flips=(Flip(1, 2, 7),))
    run = run_of(measured("tiny", 1.0, (1.0, 1.0)))
    page = Page(make_bundle_page(subject(data).with_speed(run, 0)))
    for text in ("90.20 %", "green", "75.0", "50.0", "-10", "a processor", "p99", "100 images/s"):
        assert text in page.text
    assert read_data(page)["benchmark"]["results"][0]["model"]["p50"] == run.results[0].model.p50
    assert sum(name == "viewbox" for _, name, _ in page.attributes) >= 3


def test_a_reader_on_a_phone_sees_the_name_of_each_figure():
    page = Page(make_bundle_page(subject(check())))
    assert {"value", "hash", "differs by"} <= set(page.of("data-label"))
    assert "width=device-width, initial-scale=1" in page.of("content")
    assert page.of("role").count("table") > 3


@pytest.mark.parametrize(("measured_at", "marks"), [((2.0, 4.0), 2), ((2.0,), 0), ((0.0, 0.0), 2)])
def test_a_plot_has_a_mark_a_point_within_its_frame(measured_at, marks):
    points = [Point(EVIL, latency, 0.1, (-0.2, 0.4)) for latency in measured_at]
    page = Page(draw_scatter(points, 0.3, "Drop"))
    assert [tag for tag, name, _ in page.attributes if name == "r"] == ["circle"] * marks
    assert all(0 <= float(value) <= WIDTH for value in page.of("cx"))


def test_numbers_of_a_plot_do_not_lie_on_each_other():
    points = [Point(str(place), 2.0 + place / 1000, 0.1, (-0.2, 0.4)) for place in range(5)]
    heights = re.findall(r'y="([0-9.]+)" text-anchor="end">[1-5]</text>', draw_scatter(points, 0.3, "Drop"))
    distances = np.diff(sorted(map(float, heights)))
    assert (len(heights), bool(distances.min() > 10)) == (5, True)


def test_only_a_common_run_of_one_batch_size_makes_a_plot():
    made = [subject(check(), name="one"), subject(check(), name="two")]
    run = run_of(measured("one", 1.0, (1.0, 1.0)), measured("two", 2.0, (2.0, 2.0)))
    together = [one.with_speed(run, place) for place, one in enumerate(made)]
    assert Page(make_comparison_page(together, run)).of("class").count("scatter") == 1
    assert "scatter" not in Page(make_comparison_page(made)).of("class")
    other = replace(together[1], measured=replace(run.results[1], batch=8))
    assert "scatter" not in Page(make_comparison_page([together[0], other], run)).of("class")


def test_bundles_of_other_weights_are_called_so():
    one, two = subject(check()), subject(check())
    weights = replace(two.manifest.model.weights, sha256="1" * 64)
    model = replace(two.manifest.model, weights=weights)
    other = replace(two, manifest=replace(two.manifest, model=model))
    note = "do not hold the same weights"
    assert note in Page(make_comparison_page([one, other])).text
    assert note not in Page(make_comparison_page([one, two])).text


# --- what is recorded for it ----------------------------------------------------------------------


def test_classes_and_changed_answers():
    truth = np.array([0, 0, 0, 1, 1, 2])
    reference = np.array([0, 0, 1, 1, 1, 0])
    bundle = np.array([0, 1, 1, 2, 2, 2])
    assert compare_classes(truth, reference, bundle) == (
        ClassCheck(1, 2, 2, 0),
        ClassCheck(0, 3, 2, 1),
        ClassCheck(2, 1, 0, 1),
    )
    assert count_flips(reference, bundle) == (Flip(1, 2, 2), Flip(0, 1, 1), Flip(0, 2, 1))
    many = np.arange(MOST_LISTED + 5)
    assert len(compare_classes(many, many, many)) == MOST_LISTED
    assert len(count_flips(many, many + 1)) == MOST_LISTED


def test_commands_of_a_page_fit_and_can_be_pasted():
    long = "cmt-edge export --model cmt_xs --mean=0.485,0.456,0.406 --data 'my photos' --calib-size 300"
    page = Page(make_code([long, "cmt-edge bench x"]))
    lines = page.text.split("\n")
    assert len(lines) == 3
    assert max(map(len, lines)) <= 88
    words = shlex.split(page.text.replace("\\\n", " "))
    assert words == shlex.split(f"{long} cmt-edge bench x")


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("1.96 to 2.05", "1.96_to_2.05"),
        ("+0.20 (-0.30 to +0.70) points", "+0.20 (-0.30_to_+0.70) points"),
        ("1031.96 to 1032.05", "1031.96 to 1032.05"),
        ("image file to answer", "image file to answer"),
        ("5 % of 10 to 20 images", "5_% of 10_to_20 images"),
    ],
)
def test_short_intervals_stay_on_one_line(text, kept):
    assert keep_units(text).replace("\N{NO-BREAK SPACE}", "_") == kept


@pytest.mark.parametrize(
    ("runtime", "device", "kept"),
    [
        ("openvino 1.0", "CPU", True),
        ("openvino 2.0", "CPU", True),
        ("openvino 1.0", "GPU", False),
        ("onnxruntime 1.0", "CPU", False),
    ],
)
def test_a_check_without_labelled_images_keeps_top1_of_its_runtime(runtime, device, kept):
    made = subject(check())
    recorded = replace(made.verification, runtime=RanOn("openvino 1.0", "CPU"), notes=("too few",))
    made = replace(made, manifest=replace(made.manifest, verification=recorded))
    found = replace(recorded, data=None, notes=(), runtime=RanOn(runtime, device))
    page = Page(make_bundle_page(made.with_check(found, ())))
    assert ("Top-1 on 1000 labelled images" in page.text) == kept
    assert ("top-1 is what the export measured on openvino 1.0" in page.text) == kept
    assert ("Top-1 was not measured here. The export measured 90.00 %" in page.text) != kept
    notes = read_data(page)["verification"]["notes"]
    assert ("too few" in notes) == kept


def test_a_new_check_of_labelled_images_takes_the_place_of_the_recorded_one():
    made = subject(check())
    checked = made.with_check(replace(made.verification, data=check(drop=0.4)), ())
    assert (checked.data.drop, checked.verification.notes) == (0.4, made.verification.notes)


def test_the_page_that_a_bundle_holds_counts_itself():
    made = subject(check())
    text = make_own_page(made, {"report.json": 1_000_000})
    page, size = Page(text), len(text.encode())
    found = read_data(page)
    assert found["unlisted"] == {"report.json": 1_000_000, "report.html": size}
    total = (made.manifest.size_bytes + 1_000_000 + size) / 1e6
    assert {f"{total:.1f} MB", f"{size:,}"} <= {one.replace("\N{NO-BREAK SPACE}", " ") for one in page.texts}
    assert "unlisted" not in made.to_json()


@pytest.mark.parametrize(("rows", "folded"), [(8, False), (9, True)])
def test_a_long_table_is_folded_and_keeps_its_name(rows, folded):
    page = Page(Table("Names", ["name", "figure"], [["a", "1"]] * rows).write())
    assert page.of("aria-label") == (["Names"] if folded else [])
    assert ("Names: 9 rows" in page.text) == folded


def test_sections_fold_but_those_that_decide():
    page = make_comparison_page([subject(check(drop_ci=(-0.3, 1.2))), subject(check())])
    parts = re.findall(r'<details( open="")?><summary><h2>([^<]*)</h2>', page)
    assert [name for is_open, name in parts if is_open] == ["Bundles", "Accuracy", "Latency", "Warnings"]
    assert "How to reproduce it" in [name for is_open, name in parts if not is_open]


def test_a_matrix_bears_the_names_of_few_classes():
    few, many = ((5, 2), (1, 6)), tuple((1,) * 13 for _ in range(13))
    assert {"red", "green"} <= set(Page(draw_confusion(few, tiny_manifest())).texts)
    assert "Classes" not in Page(draw_confusion(few, tiny_manifest())).text
    assert "13 class 12" in Page(draw_confusion(many, tiny_manifest())).text


@pytest.mark.parametrize("beyond", [True, False])
def test_blocks_say_where_the_error_enters(beyond):
    made = full_subject()
    run = LayerRun(
        bundle="tiny",
        precision="int8",
        backend="openvino",
        runtime="openvino 1",
        threshold=0.5,
        first="stages.2" if beyond else None,
        grows="stages.2",
        output=0.7,
        watched=0.7,
        moved=0.0,
        hidden={},
    )
    found = replace(made, layer_runs=(run,))
    page = make_bundle_page(found)
    assert ("the error is first beyond 0.5 in stages.2 (1)" in page) == beyond
    assert "grows most in stages.2" in page
    assert page.count('class="limit"') - make_bundle_page(made).count('class="limit"') == 3
    assert found.to_json()["layer_runs"][0]["threshold"] == 0.5
    assert "layer_runs" not in made.to_json()


@pytest.mark.parametrize(
    "samples", [np.arange(1, 1001), np.full(7, 5), np.array([3]), np.array([1, 1, 1, 900])]
)
def test_a_histogram_counts_every_sample(samples):
    found = summarise(samples * 1_000_000).histogram
    assert len(found.counts) == BINS
    assert sum(found.counts) + found.beyond == len(samples)
    assert (found.low, found.beyond <= 1 + len(samples) // 100) == (samples.min(), True)


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture
def bundle(tmp_path):
    return make_bundle(tmp_path / "tiny")


def test_report_writes_a_page_of_one_and_of_several(call, bundle, tmp_path):
    one, both = tmp_path / "one.html", tmp_path / "both.html"
    code, out, err = call(report.main, bundle.path, "-o", one)
    assert (code, err) == (0, "")
    assert out.endswith(f"report: {one}\n")
    assert "tiny" in Page(one.read_text()).text
    code, out, _ = call(report.main, bundle.path, bundle.path, "-o", both, "--json")
    answer = strict(out)
    assert (code, answer["page"], len(answer["bundles"])) == (0, str(both), 2)
    assert answer["conclusion"]["state"] == "stop"  # its weights are random
    assert "Comparison of 2 bundles" in Page(both.read_text()).text


def test_report_of_a_packed_bundle(call, bundle, tmp_path):
    packed = tmp_path / "tiny.cmt.zip"
    bundle.pack(packed)
    assert call(report.main, packed, "-o", tmp_path / "page.html")[0] == 0


def test_a_page_is_not_written_into_a_bundle_nor_as_another_kind_of_file(fails, bundle, tmp_path):
    for command, more in ((report, ["-o"]), (verify, ["--html"]), (bench, ["--html"])):
        assert "is HTML" in fails(2, command.main, bundle.path, *more, tmp_path / "page.pdf")
        assert "lies inside the bundle" in fails(2, command.main, bundle.path, *more, bundle.path / "p.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]


def test_a_report_in_the_bundle_that_cannot_be_read(fails, tmp_path):
    made = make_bundle(tmp_path / "tiny", members={"report.json": b'{"benchmark": {"results": 5}}'})
    assert "report.json" in fails(2, report.main, made.path, "-o", tmp_path / "page.html")


def test_verify_and_bench_write_what_they_found(call, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "read_protocol", lambda _: Protocol(2, 0.0, 1, 0.0, 0.0))
    bundle = recorded_bundle(tmp_path / "tiny")
    data = coloured_folder(tmp_path / "data")
    page = tmp_path / "page.html"
    flags = ("--data", data, "-q")
    code, _, err = call(verify.main, bundle.path, *flags, "--html", page)
    assert code == 0, err
    assert read_data(Page(page.read_text()))["verification"]["data"]["images"] == 9
    assert call(bench.main, bundle.path, "--no-throughput", "--memory", "--html", page)[0] == 0
    (one,) = read_data(Page(page.read_text()))["benchmark"]["results"]
    assert one["memory"]["peak"] >= one["memory"]["kept"] > 10_000_000
    assert read_data(Page(page.read_text()))["benchmark"]["protocol"]["iters"] == 2
    assert call(bench.main, bundle.path, bundle.path, "--no-throughput", "--html", page)[0] == 0
    shown = read_data(Page(page.read_text()))
    assert [one["name"] for one in shown["bundles"]] == ["tiny", "tiny #2"]
    assert len(shown["benchmark"]["results"]) == 2


def test_the_page_stays_where_it_is_asked_for(call, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call(report.main, bundle.path)[0] == 0
    assert Path("report.html").is_file()
