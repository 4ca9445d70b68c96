"""Conditions on which forward raises: a static model's graph checks them; other branches do not trace."""

import sys

import pytest
import torch
from torch import fx, nn

import fxquant
from fxquant import ArgumentError, convert_fx, default_static_qconfig_mapping, prepare_fx
from fxquant.graph.trace.conditions import required_outcome
from tests.graph.trace.refusals import chained, either, goes_both_ways, in_a_loop, inverted, joined, plain, returned
from tests.samples import everything, same_bits

CONDITIONS = (plain, joined, either, inverted, chained, returned)


class Reader(nn.Module):
    """The first layers of a CRNN, which squeezes the height."""

    def __init__(self, check):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, (2, 1)), nn.Linear(4, 3)
        self.check = check

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        b, _, h, w = x.size()
        self.check(h, w)
        return self.head(x.squeeze(2).permute(2, 0, 1)) * b


class Net(nn.Module):
    def __init__(self, check):
        super().__init__()
        self.linear, self.check = nn.Linear(8, 8), check

    def forward(self, x):
        self.check(x[0, 0], x[0, 1])  # of values: a graph can hold branches on sizes
        return self.linear(x)


@pytest.mark.parametrize("check", CONDITIONS)
def test_a_static_graph_checks_what_forward_does(check, tmp_path):
    torch.manual_seed(0)
    model, x = Reader(check).eval(), torch.randn(2, 1, 4, 8)
    prepared = prepare_fx(model, default_static_qconfig_mapping(), x)
    assert isinstance(prepared, fx.GraphModule)
    assert torch.equal(prepared(x), model(x))
    quantized = convert_fx(prepared, data=[x])
    with torch.no_grad():
        assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()
        with pytest.raises(ArgumentError, match=r"forward refuses such an input, at .*refusals\.py:\d+, in \w+"):
            quantized(torch.randn(2, 1, 5, 8))
        fxquant.save(quantized, tmp_path / "reader.safetensors")
        loaded = fxquant.load(Reader(check).eval(), tmp_path / "reader.safetensors")
        assert same_bits(loaded(x), quantized(x))


def test_training_and_export_keep_the_check():
    x = torch.randn(2, 1, 4, 8)
    trained = fxquant.prepare_qat_fx(Reader(plain).train(), fxquant.default_qat_qconfig_mapping(), x)
    trained(x).sum().backward()
    quantized = convert_fx(trained.eval())
    exported = torch.export.export(quantized, (x,)).module()
    assert torch.equal(exported(x), quantized(x))


@pytest.mark.filterwarnings("ignore:.*has no graph")
@pytest.mark.parametrize("branch", [goes_both_ways, in_a_loop])
def test_a_branch_that_goes_on_both_ways_does_not_trace(branch):
    with pytest.warns(UserWarning, match="Net does not trace: symbolically traced variables"):
        prepare_fx(Net(branch).eval(), default_static_qconfig_mapping(), torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore:.*does not trace")
def test_a_dynamic_model_keeps_its_class_and_its_error():
    prepared = prepare_fx(Reader(plain).eval(), everything(), torch.randn(2, 1, 4, 8))
    assert not isinstance(prepared, fx.GraphModule)
    with pytest.raises(AssertionError, match="the height must be 1, not 2"):
        prepared(torch.randn(2, 1, 5, 8))


COMPARISONS = ("__eq__", "__gt__", "__add__")


class Asks:
    """A condition that says what it has to be."""

    def __bool__(self):
        self.required = required_outcome(sys._getframe(1))
        return bool(self.required)


@pytest.mark.parametrize(("check", "required"), [(plain, True), (inverted, False), (goes_both_ways, None)])
def test_outcomes_are_read_from_the_bytecode(check, required):
    asked = Asks()
    number = type("Number", (), dict.fromkeys(COMPARISONS, lambda *_: asked))
    check(number(), 0)
    assert asked.required is required


def test_without_a_graph_a_static_mapping_names_the_way_to_one(recwarn):
    prepared = prepare_fx(Net(goes_both_ways).eval(), default_static_qconfig_mapping(), torch.randn(2, 8))
    told = [str(warning.message) for warning in recwarn]
    assert any("data calibrates nothing. torch.export can make a graph of most models" in text for text in told)
    recwarn.clear()
    convert_fx(prepared, data=[torch.randn(2, 8)])
    assert [str(warning.message) for warning in recwarn] == []
