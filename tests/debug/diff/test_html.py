"""The page of a diff: every node once, links that lead somewhere, nothing of the weights."""

import html.parser
import re

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import compare, graph_diff, profile, quantize_dynamic
from tests.debug.diff.test_diff import Blocks
from tests.samples import Call, WordLM, everything, lm_inputs, quantize


class Page(html.parser.HTMLParser):
    """The rows of a page's table by their ids, and whether every tag is closed."""

    VOID = frozenset({"meta", "br", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.ids, self.links, self.text = [], {}, [], [], ""
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if tag == "tr" and "id" in attributes:
            self.rows[attributes["id"]] = {**attributes, "cells": [], "links": []}
        if tag == "td" and self.rows:
            self.last["cells"].append("")
        if tag == "a":
            self.links.append(attributes["href"])
            self.last["links"].append(attributes["href"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open}:
            self.text += data
        if "td" in self.open:
            self.last["cells"][-1] += f"{data} "

    @property
    def last(self):
        return self.rows[next(reversed(self.rows))]

    @property
    def nodes(self):
        return {key: row for key, row in self.rows.items() if row.get("class") != "run"}


def test_every_node_is_there_once_and_links_lead_to_what_it_reads():
    model, x = Blocks(5).eval(), torch.randn(3, 4)
    diff = graph_diff(model, quantize(model, x))
    page = Page(diff.to_html())
    assert len(page.ids) == len({*page.ids})
    assert [row["cells"][1].split()[0] for row in page.nodes.values()] == [row.name for row in diff.rows]
    names = {row.name: f"#{key}" for key, row in zip(page.nodes, diff.rows, strict=True)}
    for told, row in zip(page.nodes.values(), diff.rows, strict=True):
        assert told["links"] == [names[name] for name in (*row.inputs_before, *row.inputs_after)]
    assert any(page.links)


def test_repeated_blocks_belong_to_a_row_that_opens_them():
    model, x = Blocks(5).eval(), torch.randn(3, 4)
    page = Page(graph_diff(model, quantize(model, x)).to_html())
    (run,) = [key for key, row in page.rows.items() if row.get("class") == "run"]
    assert [row.get("data-run") for row in page.nodes.values()] == [None] * 6 + [run] * 16 + [None] * 2


def test_what_was_fused_belongs_to_the_node_that_took_it():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    page = Page(graph_diff(model, quantize(model, x)).to_html())
    by_name = {row["cells"][1].split()[0]: (key, row) for key, row in page.nodes.items()}
    assert by_name["_1"][1]["data-with"] == by_name["_0"][0]
    assert by_name["_1"][1]["data-decision"] == "removed"


def test_signs_stand_with_the_colours():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    page = Page(graph_diff(model, quantize(model, x, mapping=everything().set_module_name("2", None))).to_html())
    signs = {row["data-decision"]: row["cells"][0].strip() for row in page.nodes.values()}
    assert signs == {"same": "", "changed": "~", "removed": "-", "float": "!"}


def test_kernels_and_measurements_stand_beside():
    model = WordLM().eval()
    inputs = lm_inputs(model)
    quantized = quantize(model, *inputs)
    errors, times = compare(model, quantized, [inputs]), profile(quantized, inputs, float_model=model, rounds=1)
    page = Page(graph_diff(model, quantized, errors=errors, times=times).to_html())
    (cells,) = [row["cells"] for row in page.nodes.values() if row["cells"][1].startswith("rnn ")]
    (ran,) = [row for row in times.rows if row.path == "rnn"]
    (error,) = [row for row in errors.rows if row.path == "rnn"]
    assert cells[3].split("  ") == [
        f"{ran.kernel} {ran.ms:.3f} ms, float {ran.float_ms:.3f} ms SQNR {error.sqnr_db:.1f} dB "
    ]


def test_it_holds_no_weights_and_says_so():
    model = nn.Sequential(nn.Linear(512, 512)).eval()
    text = graph_diff(model, quantize(model, torch.randn(2, 512))).to_html()
    assert len(text) < 20_000  # the weights take 262,144 bytes
    assert "and no weights; it loads nothing" in Page(text).text
    assert not re.search(r"https?:|src=|url\(|@import", text)


def test_names_and_types_are_escaped():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<img src=x>", type("<script>", (nn.Linear,), {})(4, 4))

        def forward(self, x):
            return getattr(self, "<img src=x>")(x)

    model, x = Model().eval(), torch.randn(2, 4)
    text = graph_diff(model, quantize_dynamic(model)).to_html()  # module by module: paths for names
    assert "&lt;img src=x&gt;</b>" in text
    text += graph_diff(model, quantize(model, x)).to_html()
    assert text.count("<script>") == 2  # the pages' own
    assert "<img" not in text
    assert "&lt;script&gt;" in text


def test_it_is_written_where_asked_for(tmp_path):
    model, x = Call(F.linear, 4, 6).eval(), torch.randn(2, 6)
    diff = graph_diff(model, quantize(model, x))
    assert (tmp_path / "diff.html").exists() is False
    text = diff.to_html(tmp_path / "diff.html")
    assert (tmp_path / "diff.html").read_text(encoding="utf-8") == text
