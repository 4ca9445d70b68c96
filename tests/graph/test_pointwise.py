"""Functions that a model writes out are found, whatever the spelling, and told apart from those that look like them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_static_qconfig_mapping, ops, prepare_fx, prepare_qat_fx
from fxquant.operators.values import Form
from tests.graph.plan.test_values import Net, forms, values_of
from tests.samples import sqnr

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 3


class Written(nn.Module):
    """x * f(x), where f is a module."""

    def __init__(self, gate):
        super().__init__()
        self.gate = gate

    def forward(self, x):
        return x * self.gate(x)


def write_into(x):
    x.mul_(x.sigmoid())
    return x


SPELLINGS = {
    "silu": [
        lambda x: x * torch.sigmoid(x),
        lambda x: F.sigmoid(x) * x,
        lambda x: x.mul(x.sigmoid()),
        lambda x: torch.mul(x, torch.sigmoid(1.0 * x)),
        lambda x: x.mul_(x.sigmoid()),
        write_into,
        Written(nn.Sigmoid()),
        nn.Sequential(nn.Identity(), nn.SiLU(inplace=True)),
    ],
    "hardswish": [
        lambda x: x * F.relu6(x + 3) / 6,
        lambda x: x * (F.relu6(x + 3) * (1 / 6)),
        lambda x: F.relu6(3 + x) / 6 * x,
        lambda x: x * F.relu6(x + 3.0, inplace=True) / 6.0,
        lambda x: x * (x + 3).clamp(0, 6).div(6),
        lambda x: x * F.hardtanh(x + 3, 0, 6) * 0.166667,
        lambda x: x * F.hardsigmoid(x),
        Written(nn.Hardsigmoid()),
    ],
    "leaky_relu": [
        lambda x: torch.max(0.1 * x, x),
        lambda x: torch.maximum(x, x * 0.1),
        lambda x: F.relu(x) - 0.1 * F.relu(-x),
    ],
}


@pytest.mark.parametrize(
    ("curve", "body"),
    [(name, body) for name, bodies in SPELLINGS.items() for body in bodies],
    ids=lambda part: str(part)[:12],
)
def test_a_product_ends_with_a_curve_however_it_is_written(curve, body):
    values = values_of(Net(body))
    assert forms(values) == [Form.PRODUCT, Form.PRODUCT]
    assert (values.calls[0].curve, values.calls[0].slope) == (curve, 0.1 if curve == "leaky_relu" else 0.0)


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        (lambda x: x.clamp(min=0).clamp(max=6), (0.0, 6.0)),
        (lambda x: torch.clamp_max(F.relu(x), 1.5), (0.0, 1.5)),
        (nn.Sequential(nn.Identity(), nn.ReLU6()), (0.0, 6.0)),
        (lambda x: (x.clamp(-2, 4) * 2) / 2, (-2.0, 4.0)),
    ],
)
def test_a_product_ends_with_a_clamp_however_it_is_written(body, bounds):
    values = values_of(Net(body))
    assert forms(values) == [Form.PRODUCT, Form.PRODUCT]
    assert (values.calls[0].low, values.calls[0].high) == bounds


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: x * F.relu6(x + 2.9) / 6,
        lambda x: x * F.relu6(x + 3) / 5.9,
        lambda x: 0.5 * x * (1 + torch.erf(x * 0.5**0.5)),
        lambda x: x * torch.tanh(F.softplus(x)),
        lambda x: x * torch.sigmoid(x) + x,
    ],
)
def test_another_function_is_one_table(body):
    torch.manual_seed(0)
    model = Net(body).eval()
    values = values_of(model)
    assert forms(values) == [Form.PRODUCT, Form.LOOKS_UP, Form.PRODUCT]
    assert not any(call.curve for call in values.calls)
    quantized = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    with torch.no_grad():
        assert [n.target for n in quantized.graph.nodes if n.op == "call_function"] == [ops.quantize, ops.lookup]
        assert sqnr(model(X), quantized(X)) > 35


def test_what_is_read_in_between_is_a_value_of_its_own():
    values = values_of(Net(lambda x: x * torch.sigmoid(x) + F.max_pool2d(x, 3, 1, 1)))
    assert forms(values) == [Form.PRODUCT, Form.LOOKS_UP, Form.POOLS, Form.ADDS, Form.PRODUCT]
    values = values_of(Net(lambda x: (lambda gate: x * gate + F.max_pool2d(gate, 3, 1, 1))(torch.sigmoid(x))))
    assert Form.MULTIPLIES in forms(values)


def test_the_larger_of_two_values_has_no_form():
    values = values_of(Net(lambda x: torch.max(F.max_pool2d(x, 3, 1, 1), x)))
    assert [value.node for value in values.floats] == ["max_pool2d", "max_1"]


def test_a_bound_that_is_computed_has_no_form():
    (value,) = values_of(Net(lambda x: x.clamp(max=x.shape[2]))).floats
    assert value.node == "clamp"


def test_a_function_of_normalized_channels_is_a_table_a_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.MaxPool2d(2), nn.BatchNorm2d(8), nn.SiLU(), nn.Conv2d(8, 4, 1)).eval()
    model[2].running_var.uniform_(0.2, 4)
    quantized = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    targets = [n.target for n in quantized.graph.nodes if n.op == "call_function"]
    assert targets == [ops.quantize, ops.max_pool_value, ops.lookup_channels]
    with torch.no_grad():
        assert sqnr(model(X), quantized(X)) > 35


def test_a_dynamic_model_keeps_what_is_written():
    model = nn.Sequential(nn.Linear(6, 8), Written(nn.Sigmoid()), nn.Linear(8, 4)).eval()
    quantized = convert_fx(prepare_fx(model, fxquant.default_dynamic_qconfig_mapping(), (X,)))
    assert [node.name for node in quantized.graph.nodes][2:4] == ["_1_gate", "mul"]


def test_training_and_calibration_agree_on_what_a_product_ends_with():
    torch.manual_seed(0)
    model = Net(SPELLINGS["hardswish"][0])
    trained = prepare_qat_fx(copy.deepcopy(model).train(), fxquant.default_qat_qconfig_mapping(), (X,))
    trained(X)
    quantized = convert_fx(trained)
    assert [n.target for n in quantized.graph.nodes if n.op == "call_function"] == [ops.quantize]
    with torch.no_grad():
        assert sqnr(model.eval()(X), quantized(X)) > 30


def test_the_diff_says_which_layer_does_what_a_module_wrote():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Written(nn.Sigmoid()), nn.Conv2d(8, 4, 1)).eval()
    quantized = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    rows = {row.name: row for row in fxquant.graph_diff(model, quantized).rows}
    assert rows["_1_gate"].note == rows["mul"].note == "done by _0"
    assert rows["mul"].fused_into == "0"
