"""Mapping entries that quantize nothing, and models in which nothing is quantized, are told."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import QConfigMapping, default_dynamic_qconfig, prepare_fx, quantize_dynamic
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
        r"module_name 'conv' quantizes nothing: conv \(nn.Conv1d\) stays float: nn.Conv1d has no dynamic form",
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
    "way", [lambda m, q, x: prepare_fx(m, q, x), lambda m, q, _: quantize_dynamic(m, q)], ids=["fx", "eager"]
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
    told = r"nothing in this Sequential is to be quantized: 0 \(nn.Conv1d\): nn.Conv1d has no dynamic.*; and 2 more"
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
