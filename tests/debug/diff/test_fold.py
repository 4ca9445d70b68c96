"""Which lines of a diff are shown."""

import torch
from torch import nn

from fxquant import (
    graph_diff,
)
from fxquant.graph.edit import byte_count
from tests.debug.diff.test_diff import Blocks
from tests.samples import everything, quantize


def shown(diff):
    return [(row.sign, row.name, row.before) for row in diff.shown]


def test_a_repeated_block_is_shown_once_and_counted():
    model, x = Blocks(5).eval(), torch.randn(3, 4)
    quantized = quantize(model, x)
    diff = graph_diff(model, quantized)
    assert shown(diff) == [
        (" ", "x", "placeholder"),
        (" ", "first", "nn.LayerNorm"),
        ("~", "layers_0_0", "nn.Linear"),
        (" ", "tanh", "torch.tanh"),
        (" ", "add", "operator.add"),
        (" ", "layers_0_1", "nn.LayerNorm"),
        ("×", "5 times", "the 4 lines above"),
        ("~", "last", "nn.Linear"),
        (" ", "output", "output"),
    ]
    (times,) = [row for row in diff.shown if row.sign == "×"]
    layers = [byte_count(m.get_submodule("layers")) for m in (model, quantized)]
    assert [times.bytes_before, times.bytes_after] == layers
    assert times.after == "… layers_4_1"
    assert len(diff.rows) == 2 + 5 * 4 + 2
    assert graph_diff(model, quantized, fold=False).shown == list(diff.rows)


def test_a_block_that_differs_is_not_folded_with_the_others():
    model, x = Blocks(5).eval(), torch.randn(3, 4)
    quantized = quantize(model, x, mapping=everything().set_module_name("layers.2.0", None))
    rows = [row for row in shown(graph_diff(model, quantized)) if row[0] == "×" or "_2_0" in row[1]]
    assert rows == [
        ("×", "2 times", "the 4 lines above"),
        (" ", "layers_2_0", "nn.Linear"),
        ("×", "2 times", "the 4 lines above"),
    ]


def test_few_rows_are_not_folded():
    model = nn.Sequential(*[nn.Tanh() for _ in range(4)], nn.Linear(4, 4)).eval()
    diff = graph_diff(model, quantize(model, torch.randn(2, 4)))
    assert diff.shown == list(diff.rows)
    model = nn.Sequential(*[nn.Tanh() for _ in range(5)], nn.Linear(4, 4)).eval()
    diff = graph_diff(model, quantize(model, torch.randn(2, 4)))
    assert [row[:2] for row in shown(diff)] == [
        (" ", "input_1"), (" ", "_0"), (" ", "5 times"), ("~", "_5"), (" ", "output"),
    ]  # fmt: skip


def test_context_is_the_rows_around_a_change():
    model = nn.Sequential(*[nn.Tanh() for _ in range(3)], nn.Linear(4, 4), *[nn.Tanh() for _ in range(3)]).eval()
    quantized = quantize(model, torch.randn(2, 4))
    diff = graph_diff(model, quantized, context=1)
    assert [(row.sign, row.name) for row in diff.shown] == [("⋮", ""), (" ", "_2"), ("~", "_3"), (" ", "_4"), ("⋮", "")]
    assert diff.rows == graph_diff(model, quantized).rows
    only = graph_diff(model, quantized, only_changed=True)
    assert [(row.sign, row.name) for row in only.shown] == [("⋮", ""), ("~", "_3"), ("⋮", "")]
    assert only == graph_diff(model, quantized, context=0)


def test_nothing_changed_leaves_a_gap_alone():
    model = nn.Sequential(nn.Tanh()).eval()
    assert [row.sign for row in graph_diff(model, model, only_changed=True).shown] == ["⋮"]


def test_rows_left_out_are_counted():
    model, x = nn.Sequential(nn.Tanh(), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).eval(), torch.randn(2, 4)
    lines = str(graph_diff(model, quantize(model, x), only_changed=True)).splitlines()
    assert [line.split() for line in lines if "⋮" in line] == [["⋮", "3", "unchanged"], ["⋮", "2", "unchanged"]]
