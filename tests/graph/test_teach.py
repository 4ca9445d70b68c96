import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxquant
from fxquant import FakeQuantize, prepare_qat_fx
from fxquant.graph.teach import constants_by_mode
from fxquant.nn.modes import ByMode
from fxquant.nn.trained import Trained
from fxquant.ranges import Learned
from tests.samples import sqnr


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.other = nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.norm(self.conv(x)))
        x = F.dropout(F.relu(self.other(x)) + x, 0.5, self.training)
        return self.fc(x.mean((2, 3)))


def prepare(model=None, mapping=None, **options):
    torch.manual_seed(0)
    mapping = mapping or fxquant.default_qat_qconfig_mapping()
    return prepare_qat_fx(model or Net().train(), mapping, (torch.randn(2, 2, 6, 6),), **options)


def test_parts_keep_their_names_and_types():
    prepared = prepare()
    assert {n for n, _ in Net().named_parameters()} == {n for n, _ in prepared.named_parameters()}
    assert Net().state_dict().keys() <= prepared.state_dict().keys()
    assert type(prepared.norm) is nn.BatchNorm2d
    assert all(isinstance(m, Trained) for m in (prepared.conv, prepared.other, prepared.fc))
    assert isinstance(prepared.conv, nn.Conv2d)
    assert isinstance(prepared.fc, nn.Linear)


def test_values_are_rounded_where_the_quantized_model_rounds():
    prepared = prepare()
    rounded = {
        node.args[0].name
        for node in prepared.graph.nodes
        if node.op == "call_module" and isinstance(prepared.get_submodule(node.target), FakeQuantize)
    }
    (norm,) = [node for node in prepared.graph.nodes if node.target == "norm"]
    assert rounded == {"x", "add", "mean", norm.name, "other"}
    assert {m.rectifies != "" for n, m in prepared.named_children() if n in ("conv_observer", "other_observer")} == {
        True
    }
    assert not any(node.target is F.relu for node in prepared.graph.nodes)


def test_a_float_reader_of_a_float_reads_it_unrounded():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 1)

        def forward(self, x):
            return self.conv(x), x.softmax(1)

    prepared, x = prepare(Both().train()), torch.randn(2, 2, 6, 6)
    assert torch.equal(prepared(x)[1], x.softmax(1))
    quantized = fxquant.convert_fx(prepared)
    assert torch.equal(quantized(x)[1], x.softmax(1))


class Enlarges(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second, self.options = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 3, 3), options

    def forward(self, x):
        return self.second(F.interpolate(F.relu(self.first(x)), mode="bilinear", **self.options))


@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("qmax", [3, 255])
@pytest.mark.parametrize("options", [{"scale_factor": 2.0}, {"size": (7, 9), "align_corners": True}], ids=str)
def test_means_of_neighbours_are_rounded_as_the_integers_will_be(options, qmax, learns):
    activation = dataclasses.replace(fxquant.default_qat_qconfig.activation, qmax=qmax)
    activation = dataclasses.replace(activation, range=Learned()) if learns else activation
    qconfig = dataclasses.replace(fxquant.default_qat_qconfig, activation=activation)
    prepared = prepare(Enlarges(**options).train(), fxquant.QConfigMapping().set_global(qconfig))
    prepared(torch.randn(2, 2, 6, 6)).square().sum().backward()
    assert prepared.first.weight.grad.any()
    x = torch.randn(2, 2, 6, 6)
    with torch.no_grad():
        # a mean is often half a step from two integers: rounded as floats, 4 levels would agree to 20 dB
        assert sqnr(prepared.eval()(x), fxquant.convert_fx(prepared)(x)) > 90
    prepared.apply(fxquant.disable_fake_quant)
    y = F.interpolate(F.relu(F.conv2d(x, prepared.first.weight, prepared.first.bias)), mode="bilinear", **options)
    assert torch.allclose(prepared(x), F.conv2d(y, prepared.second.weight, prepared.second.bias), atol=1e-5)


def test_the_mode_decides_where_forward_asks_for_it():
    prepared, x = prepare(), torch.randn(2, 2, 6, 6)
    (mode,) = [m for m in prepared.modules() if isinstance(m, ByMode)]
    assert (mode.in_training, mode.in_eval) == (True, False)
    prepared(x)
    prepared.apply(fxquant.disable_observer)
    assert not torch.equal(prepared(x), prepared(x))
    prepared.eval()
    assert torch.equal(prepared(x), prepared(x))


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        (lambda x: F.dropout(x, 0.5, True), lambda x: F.dropout(x, 0.5, False), 1),
        (lambda x: x + 1, lambda x: x + 1, 0),
        (lambda x: x + 1, lambda x: x + 1.0, None),
        (lambda x: x + 1, lambda x: x * 1, None),
        (lambda x: x + 1, lambda x: (x + 1).relu(), None),
        (lambda x: (x + 1) - x, lambda x: x - (x + 1), None),
    ],
)
def test_constants_by_mode(one, other, count):
    found = constants_by_mode(fx.symbolic_trace(one).graph, fx.symbolic_trace(other).graph)
    if count is None:
        assert found is None or [c.place for c in found] == [1]
    else:
        assert len(found) == count


def test_a_forward_of_its_own_in_training_is_told():
    class Auxiliary(Net):
        def forward(self, x):
            y = super().forward(x)
            return (y, y.sum()) if self.training else y

    with pytest.warns(UserWarning, match="does something else in training mode"):
        prepared = prepare(Auxiliary().train())
    assert isinstance(prepared(torch.randn(2, 2, 6, 6)), torch.Tensor)


def test_an_operator_without_a_form_for_training_is_told():
    operators = [
        fxquant.operators.base.Operator(**{**vars(operator), "train_module": None}) for operator in fxquant.OPERATORS
    ]
    mapping = fxquant.QConfigMapping().set_module_name("fc", fxquant.default_qat_qconfig)
    with pytest.warns(UserWarning, match="'fc' .* trains in float"):
        prepared = prepare(mapping=mapping, operators=operators)
    prepared(torch.randn(2, 2, 6, 6)).sum().backward()
    assert "fc" in {site.path for site in fxquant.convert_fx(prepared).record.sites}
