"""What every report can do: sort, print what it has, hand its rows on."""

import json
import math
import re
import sys
import types
from dataclasses import asdict, dataclass, replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from fxquant import ColumnError, MissingPackageError, compare, explain, profile
from fxquant.debug.report.report import Column, Report
from tests.samples import quantize


@dataclass(frozen=True)
class Row:
    name: str
    size: int
    noise_db: float
    hidden: float


@dataclass(frozen=True)
class Listing(Report):
    rows: tuple[Row, ...]
    note: str = "a note"

    columns: ClassVar[tuple[Column, ...]] = (
        Column("called", "name", 10, lambda row: row.name, is_number=False),
        Column("bytes", "size", 10, lambda row: str(row.size)),
        Column("noise", "noise_db", 10, lambda row: "" if math.isnan(row.noise_db) else f"{row.noise_db} dB"),
    )

    @property
    def footer(self):
        return (self.note,)


LISTING = Listing((Row("b", 5, 20.0, 1.0), Row("a", 70, math.nan, 3.0), Row("c", 6, -math.inf, 2.0)))


@pytest.mark.parametrize(
    ("column", "order"),
    [
        ("called", "abc"),
        ("name", "abc"),
        ("bytes", "acb"),
        ("size", "acb"),
        ("hidden", "acb"),
        ("noise", "cba"),
        ("noise_db", "cba"),
    ],
)
def test_text_rises_numbers_fall_decibels_rise_and_nan_is_last(column, order):
    assert "".join(row.name for row in LISTING.sort(column).rows) == order
    filled = [name for name in order if (column[:5], name) != ("noise", "a")]
    assert "".join(r.name for r in LISTING.sort(column, reverse=True).rows).startswith("".join(reversed(filled)))
    assert LISTING.sort(column).note == "a note"


def test_sorting_keeps_the_order_of_equals():
    rows = tuple(Row(name, 1, 0.0, 0.0) for name in "bca")
    assert Listing(rows).sort("size").rows == rows


def test_an_unknown_column_is_an_error_that_knows_the_near_ones():
    with pytest.raises(ColumnError, match="Listing has no column 'nois'; did you mean 'noise'"):
        LISTING.sort("nois")


def test_numbers_stand_flush_right_and_the_footer_below():
    assert str(LISTING).splitlines() == [
        "called      bytes    noise",
        "--------  -------  -------",
        "b               5  20.0 dB",
        "a              70",
        "c               6  -inf dB",
        "",
        "a note",
    ]


def test_a_column_in_which_nothing_is_said_is_left_out():
    assert str(Listing((Row("b", 5, math.nan, 1.0),))).splitlines()[0].split() == ["called", "bytes"]
    assert "noise" not in Listing((Row("b", 5, math.nan, 1.0),))._repr_html_()


def test_no_rows_give_the_headers():
    assert str(Listing(())).splitlines()[0].split() == ["called", "bytes", "noise"]


def test_a_notebook_gets_escaped_html():
    html = Listing((Row("<b>", 5, 1.0, 1.0),), note="<i>")._repr_html_()
    assert "<table>" in html
    assert "<b>" not in html
    assert "<i>" not in html


def reports():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    quantized = quantize(model, x)
    return [compare(model, quantized, [x]), profile(quantized, x, rounds=1), explain(quantized)]


def test_to_dict_is_json():
    for report in reports():
        plain = json.loads(json.dumps(report.to_dict()))
        assert plain.keys() == vars(report).keys()
        rows = [{k: v for k, v in json.loads(json.dumps(asdict(row))).items() if v == v} for row in report.rows]
        assert [{k: v for k, v in row.items() if v == v} for row in plain["rows"]] == rows
        assert rows


def test_every_report_s_columns_can_be_sorted_by():
    for report in reports():
        for column in report.columns:
            assert sorted(map(str, report.sort(column.header).rows)) == sorted(map(str, report.rows))


def test_to_dataframe_gives_pandas_the_rows(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda rows: ("frame", rows)))
    for report in reports():
        assert str(report.to_dataframe()) == str(("frame", [asdict(row) for row in report.rows]))


def test_to_dataframe_without_pandas_is_an_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="needs pandas, which is not installed: pip install pandas"):
        LISTING.to_dataframe()
    assert issubclass(MissingPackageError, ImportError)


def test_json_is_strict():
    report = Listing((Row("é", 1, math.nan, math.inf), Row("b", 2, -math.inf, 0.5)))
    plain = json.loads(report.to_json(), parse_constant=lambda name: pytest.fail(name))
    assert [(row["noise_db"], row["hidden"]) for row in plain["rows"]] == [(None, "Infinity"), ("-Infinity", 0.5)]
    assert plain["note"] == "a note"
    assert float("Infinity") == math.inf


def test_a_page_has_the_table_with_what_it_is_sorted_by(tmp_path):
    text = Listing((Row("<b>", 5, math.nan, 1.0), Row("a", 70, -math.inf, 1.0))).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == text
    cells = re.findall(r'<td(?: class="(\w+)")? data-value="(.*?)">(.*?)</td>', text)
    assert cells == [
        ("", "&lt;b&gt;", "&lt;b&gt;"), ("number", "5", "5"), ("number", "", ""),
        ("", "a", "a"), ("number", "70", "70"), ("number", "-Infinity", "-inf dB"),
    ]  # fmt: skip
    assert re.findall(r"<button>(.*?)</button>", text) == ["called", "bytes", "noise"]
    assert "<p>a note</p>" in text


def test_long_names_are_whole_on_a_page():
    name = "a.path." * 30
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    quantized = quantize(model, torch.randn(2, 4))
    for report in (compare(model, quantized, [torch.randn(2, 4)]), profile(quantized, torch.randn(2, 4), rounds=1)):
        long = replace(report, rows=tuple(replace(row, path=name) for row in report.rows))
        assert f">{name}</td>" in long.to_html()
        assert max(map(len, str(long).split("\n\n")[0].splitlines())) <= 100
