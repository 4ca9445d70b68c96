"""The drawing of a diff: a box a node, as high as its bytes, wires from what is read to what reads it."""

import itertools
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from torch import nn

from fxquant import graph_diff
from tests.debug.diff.test_diff import Blocks
from tests.samples import WordLM, everything, lm_inputs, quantize

SVG = "{http://www.w3.org/2000/svg}"


class Drawing:
    """A drawing read back: by side, each box's name, decision, place and the height of its bytes."""

    def __init__(self, text):
        self.root = ET.fromstring(text)
        self.columns = {}
        for group in self.root.findall(f"{SVG}g"):
            box, *bar = group.findall(f"{SVG}rect")
            name = re.sub(r"^[-~+!×] ", "", group.find(f"{SVG}title").text.split("\n")[0])
            x, y, height = (float(box.get(key)) for key in ("x", "y", "height"))
            bytes_height = float(bar[0].get("height")) if bar else 0.0
            self.columns.setdefault(x, {})[name] = (box.get("class"), y, y + height, bytes_height)

    @property
    def before(self):
        return self.columns[min(self.columns)]

    @property
    def after(self):
        return self.columns[max(self.columns)]


def test_every_node_has_a_box_in_each_graph_that_has_it():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    drawn = Drawing(graph_diff(model, quantize(model, x, mapping=everything().set_module_name("2", None))).to_svg())
    assert {name: box[0] for name, box in drawn.before.items()} == {
        "input_1": "same", "_0": "same", "_1": "removed", "_2": "same", "output": "same",
    }  # fmt: skip
    assert {name: box[0] for name, box in drawn.after.items()} == {
        "input_1": "same", "_0": "changed", "_2": "float", "output": "same",
    }  # fmt: skip


def test_heights_are_proportional_to_bytes():
    model = WordLM(ntoken=3000, ninp=64, nhid=64).eval()
    diff = graph_diff(model, quantize(model, *lm_inputs(model)))
    drawn = Drawing(diff.to_svg())
    rows = {row.name: row for row in diff.rows if row.bytes_before}
    scale = drawn.before["encoder"][3] / rows["encoder"].bytes_before
    assert {name: drawn.before[name][3] for name in rows} == pytest.approx(
        {name: row.bytes_before * scale for name, row in rows.items()}, abs=0.01
    )
    assert {name: drawn.after[name][3] for name in rows} == pytest.approx(
        {name: row.bytes_after * scale for name, row in rows.items()}, abs=0.01
    )


@pytest.mark.parametrize("count", [3, 60])
def test_boxes_do_not_overlap_and_stay_inside(count):
    model, x = Blocks(count).eval(), torch.randn(3, 4)
    drawn = Drawing(graph_diff(model, quantize(model, x)).to_svg())
    width, height = (float(drawn.root.get(key)) for key in ("width", "height"))
    for column in (drawn.before, drawn.after):
        places = [(top, end) for _, top, end, _ in column.values()]
        assert all(end < top for (_, end), (top, _) in itertools.pairwise(places))
        assert places[-1][1] < height
    numbers = [
        float(n) for path in drawn.root.iter(f"{SVG}path") for n in re.findall(r"H(\S+?)(?=[A-Z]|$)", path.get("d"))
    ]
    assert all(0 < n < width for n in numbers)


def test_many_repeated_blocks_are_one():
    model, x = Blocks(60).eval(), torch.randn(3, 4)
    drawn = Drawing(graph_diff(model, quantize(model, x)).to_svg())
    assert [*drawn.after] == [
        "x", "first", "layers_0_0", "tanh", "add", "layers_0_1", "60 times", "last", "output",
    ]  # fmt: skip
    assert drawn.after["60 times"][0] == "changed folded"
    assert float(drawn.root.get("height")) < 1200


def test_a_wire_goes_around_what_does_not_read_it():
    model, x = Blocks(1).eval(), torch.randn(3, 4)
    drawn = Drawing(graph_diff(model, quantize(model, x)).to_svg())
    around = [path.get("d") for path in drawn.root.iter(f"{SVG}path") if "H" in path.get("d")]
    assert len(around) == 2  # in each graph, from the first norm past linear and tanh to add
    for path, column in zip(around, (drawn.before, drawn.after), strict=True):
        begin, end = (float(n) for n in re.fullmatch(r"M\S+? (\S+?)H\S+?V(\S+?)M.*", path).groups())
        assert column["first"][1] < begin < column["first"][2]
        assert column["add"][1] < end < column["add"][2]


def test_wires_side_by_side_have_lanes_of_their_own():
    class Model(nn.Module):
        def forward(self, x):
            a = torch.tanh(x)
            b = torch.sin(a)
            c = torch.cos(b)
            return torch.exp(c) + a + b + c

    drawn = Drawing(graph_diff(Model().eval(), Model().eval()).to_svg())
    left = min(drawn.columns)
    lanes = []
    for path in drawn.root.iter(f"{SVG}path"):
        around = re.fullmatch(r"M(\S+?) (\S+?)H(\S+?)V(\S+?)M.*", path.get("d"))
        if around and float(around[3]) < left:
            lanes.append((float(around[3]), float(around[2]), float(around[4])))
    assert len(lanes) == 3
    for i, (x, begin, end) in enumerate(lanes):
        assert not [other for other in lanes[i + 1 :] if other[0] == x and other[1] < end and begin < other[2]]


def test_names_and_types_are_escaped_and_no_weight_is_in_it(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("<b>&", nn.Linear(512, 512))

        def forward(self, x):
            return getattr(self, "<b>&")(x)

    model, x = Model().eval(), torch.randn(2, 512)
    text = graph_diff(model, quantize(model, x)).to_svg(tmp_path / "diff.svg")
    assert (tmp_path / "diff.svg").read_text(encoding="utf-8") == text
    Drawing(text)
    assert len(text) < 10_000
    assert not re.search(r"href|url\(|@import|<script", text)
