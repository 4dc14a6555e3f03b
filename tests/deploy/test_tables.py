"""Tables fold to a width: cells within their column first, then columns into a second table."""

from __future__ import annotations

import pytest

from cmt_edge.deploy.report import format_table

HEADER = ["bundle", "MB", "what really ran"]
ROWS = [["cmt_xs_int8", "36.4", "int8 63 % + bf16 35 %"], ["b", "1.0", "fp32 100 %"]]


def longest(text: str) -> int:
    return max(map(len, text.splitlines()))


@pytest.mark.parametrize("width", [None, 40, 200])
def test_a_table_that_fits_is_left_alone(width):
    assert format_table(HEADER, ROWS, width=width) == format_table(HEADER, ROWS)
    assert longest(format_table(HEADER, ROWS)) == 40


def test_a_cell_folds_between_words():
    assert format_table(HEADER, ROWS, width=30).splitlines() == [
        "bundle         MB  what really",
        "                           ran",
        "-----------  ----  -----------",
        "cmt_xs_int8  36.4  int8 63 % +",
        "                     bf16 35 %",
        "b             1.0   fp32 100 %",
    ]


def test_columns_that_do_not_fit_follow_with_the_first_column():
    text = format_table(["name", "p50", "p90"], [["a" * 8, "1" * 8, "2" * 8]], width=20)
    assert text.splitlines() == [
        "name           p50",
        "--------  --------",
        "aaaaaaaa  11111111",
        "",
        "name           p90",
        "--------  --------",
        "aaaaaaaa  22222222",
    ]


@pytest.mark.parametrize("width", [10, 20, 33, 50, 80])
def test_no_line_is_too_long_and_no_character_is_lost(width):
    rows = [["x" * 70, "y" * 30, "three words told", "z" * 9], ["", "", "", ""]]
    text = format_table(["a name", "two words", "third", "q"], rows, width=width)
    assert longest(text) <= width
    for letter, count in (("y", 30), ("z", 9)):
        assert text.count(letter) == count
    assert text.count("x") % 70 == 0


def test_a_file_has_no_width():
    assert format_table(HEADER, ROWS, markdown=True, width=10) == format_table(HEADER, ROWS, markdown=True)
