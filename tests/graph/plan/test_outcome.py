"""Mapping entries that quantize nothing, and models in which nothing is quantized, are told."""

import operator
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    QConfigError,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    explain,
    prepare_fx,
    quantize_dynamic,
)
from tests.samples import everything

Q = default_dynamic_qconfig


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.net, self.table = (
            nn.Conv1d(1, 4, 1),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Parameter(torch.randn(8, 8)),
        )

    def forward(self, x):
        return F.bilinear(x, self.norm(self.net(self.conv(x).sum(1, keepdim=True))), self.table[None])


def model_and_input():
    return Model().eval(), torch.randn(2, 1, 8)


IN_VAIN = [
    (
        lambda m: m.set_module_name("conv", Q),
        r"module_name 'conv' quantizes nothing: conv \(nn.Conv1d\) stays float: pointwise convolutions of fewer",
    ),
    (lambda m: m.set_module_name("norm", Q), "module_name 'norm' quantizes nothing: nothing there has a weight"),
    (lambda m: m.set_module_name_regex("co.*", Q), r"module_name_regex 'co\.\*' quantizes nothing: conv"),
    (lambda m: m.set_object_type(nn.Conv1d, Q), "object_type nn.Conv1d quantizes nothing: conv"),
    (lambda m: m.set_object_type(nn.LayerNorm, Q), "object_type nn.LayerNorm quantizes nothing: nothing there"),
    (
        lambda m: m.set_module_name_object_type_order("", nn.Conv1d, 0, Q),
        r"module_name_object_type_order \('', nn.Conv1d, 0\) quantizes nothing: conv",
    ),
]
ways = pytest.mark.parametrize(
    "way",
    [lambda m, q, x, **more: prepare_fx(m, q, x, **more), lambda m, q, _, **more: quantize_dynamic(m, q, **more)],
    ids=["fx", "eager"],
)


@ways
@pytest.mark.parametrize(("ask", "message"), IN_VAIN)
def test_an_entry_that_quantizes_nothing_is_warned_of(way, ask, message):
    model, x = model_and_input()
    with pytest.warns(UserWarning, match=f"the mapping's {message}") as caught:
        way(model, ask(everything()), x)
    assert len(caught) == 1


@ways
@pytest.mark.parametrize(
    "ask",
    [
        lambda m: m.set_module_name("conv", None).set_object_type(nn.LayerNorm, None),
        lambda m: m.set_object_type(nn.Linear, Q).set_module_name("net", Q),  # the type's entry has nothing left to it
        lambda m: m.set_module_name_regex("n.*", Q),
        lambda m: m.set_module_name("", Q),
    ],
)
def test_an_entry_that_is_obeyed_is_not(way, ask):
    model, x = model_and_input()
    way(model, ask(everything()), x)


@ways
def test_a_model_in_which_nothing_is_quantized_says_why_once(way):
    model, x = nn.Sequential(*[nn.Conv1d(1, 1, 1) for _ in range(5)]).eval(), torch.randn(2, 1, 8)
    mapping = everything().set_object_type(nn.Conv1d, Q)
    told = r"nothing in this Sequential is to be quantized: 0 \(nn.Conv1d\): pointwise convolutions of .*; and 2 more"
    with pytest.warns(UserWarning, match=told) as caught:
        way(model, mapping, x)
    assert len(caught) == 1


@ways
def test_a_model_without_weights_says_so(way):
    with pytest.warns(UserWarning, match="no module or call in it has a weight of two or more dimensions"):
        way(nn.Sequential(nn.ReLU()).eval(), everything(), torch.randn(2, 8))


@ways
def test_a_mapping_that_asks_for_nothing_gets_nothing(way, recwarn):
    model, x = model_and_input()
    way(model, QConfigMapping().set_module_name("net", None), x)
    assert not recwarn.list


@ways
def test_warnings_tell_the_coverage(way):
    model, x = model_and_input()
    told = r"; in all, 1 of 3 candidates, 256 of \d+ weight bytes (to be )?quantized"  # net's 8 × 8 floats
    with pytest.warns(UserWarning, match=told):
        way(model, everything().set_module_name("conv", Q), x)


@ways
def test_strict_lists_all_that_stays_float_unasked(way):
    model, x = model_and_input()
    with pytest.raises(QConfigError, match=r"strict: 2 of Model's candidates would stay float") as caught:
        way(model, everything(), x, strict=True)
    lines = str(caught.value).splitlines()[1:]
    assert any("conv (nn.Conv1d): pointwise convolutions of fewer than 256 channels" in line for line in lines)
    assert any(line.endswith("; set_module_name('conv', None)") for line in lines)
    assert len(lines) == 2


@ways
def test_strict_takes_no_entry_for_no_answer(way):
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    mapping = QConfigMapping().set_module_name("0", Q)
    told = r"\n  1 \(nn.Linear\): no mapping entry covers it; set_module_name\('1', None\)"
    with pytest.raises(QConfigError, match=told):
        way(model, mapping, x, strict=True)
    way(model, mapping.set_module_name("1", None), x, strict=True)


@ways
def test_the_entries_that_strict_names_make_it_content_and_leave_the_rest(way):
    model, x = model_and_input()
    with pytest.raises(QConfigError) as caught:
        way(model, everything(), x, strict=True)
    mapping = everything()
    for line in str(caught.value).splitlines()[1:]:
        call = line.rpartition("; ")[2]
        eval(f"mapping.{call}", {"mapping": mapping, "operator": operator, "tests": sys.modules["tests"]})
    result = way(model, mapping, x, strict=True)
    assert [row.path for row in explain(result).rows if row.is_quantized] == ["net"]


def test_strict_holds_where_the_model_does_not_trace():
    class Branches(Model):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else self.net(x)

    with pytest.raises(QConfigError, match=r"strict: 2 of Branches's candidates"):
        prepare_fx(Branches().eval(), everything(), torch.randn(2, 1, 8), strict=True)


def test_strict_changes_nothing_where_all_is_quantized():
    model, x = nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8)
    results = [convert_fx(prepare_fx(model, everything(), x, strict=strict))(x) for strict in (False, True)]
    assert torch.equal(*results)


def test_static_qconfigs_for_a_model_without_a_graph_are_warned_of():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(64, 64)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else self.linear(-x)

    mapping, x = fxquant.default_static_qconfig_mapping(), torch.randn(2, 64)
    told = "this Branches has no graph, and so no values to calibrate"
    with pytest.warns(UserWarning, match="does not trace"), pytest.warns(UserWarning, match=told):
        prepared = fxquant.prepare_fx(Branches().eval(), mapping, (x,))
    assert not prepared._fxquant_record.sites[0].is_static
    with pytest.warns(UserWarning, match="this Linear has no graph"):
        fxquant.quantize_dynamic(nn.Linear(64, 64).eval(), mapping)
