"""compare shows the values between a static model's sites, dequantized."""

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    compare,
    convert_fx,
    default_dynamic_qconfig_mapping,
    default_static_qconfig_mapping,
    ops,
    prepare_fx,
)
from tests.samples import sqnr

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)

    def forward(self, x):
        x = self.a(x)
        y = F.max_pool2d(x, 3, 1, 1) * x.sigmoid()
        return self.c(F.relu(y - self.b(x)).mean((2, 3)))


@torch.no_grad()
def test_every_value_that_is_computed_has_an_error_of_its_own():
    torch.manual_seed(0)
    model = Net().eval()
    quantized = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    report = compare(model, quantized, [X])
    assert {row.name for row in report.values} == {"sigmoid", "mul", "sub", "mean"}
    assert [row.sqnr_db for row in report.values] == sorted(row.sqnr_db for row in report.values)
    assert all(row.calls == 1 for row in report.values)
    assert "values, SQNR: " in str(report)
    gate = model.a(X).sigmoid()
    integers = ops.quantize(quantized_first(quantized), quantized.sigmoid_scale, quantized.sigmoid_zero_point)
    expected = sqnr(gate, ops.dequantize(integers, quantized.sigmoid_scale, quantized.sigmoid_zero_point))
    assert abs(next(row.sqnr_db for row in report.values if row.name == "sigmoid") - float(expected)) < 0.1


def quantized_first(quantized):
    """Return sigmoid of the first convolution's dequantized result."""
    x = ops.quantize(X, quantized.x_scale, quantized.x_zero_point)
    scale, zero_point = quantized.a_scale, quantized.a_zero_point
    y = quantized.a(x, quantized.x_scale, quantized.x_zero_point, scale=scale, zero_point=zero_point)
    return ops.dequantize(y, scale, zero_point).sigmoid()


def test_a_dynamic_model_has_none():
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 4)).eval()
    quantized = convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), (X,)))
    assert compare(model, quantized, [X]).values == ()
