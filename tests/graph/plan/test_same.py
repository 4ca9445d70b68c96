"""Subclasses of nn.Linear whose forward is nn.Linear's in other words; and those that do something else."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import quantize_dynamic
from tests.samples import kinds


def linear(forward):
    """Return a subclass of nn.Linear with a forward."""
    return type("Linear", (nn.Linear,), {"forward": forward})


SAME = {
    "plain": lambda self, x: F.linear(x, self.weight, self.bias),
    "whisper": lambda self, x: F.linear(
        x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
    ),
    "super": lambda self, x: nn.Linear.forward(self, x),
    "keywords": lambda self, x: F.linear(bias=self.bias, input=x, weight=self.weight.type_as(x)),
}
OTHERS = {
    "scaled": lambda self, x: F.linear(x, self.weight * 2, self.bias),
    "scaled output": lambda self, x: F.linear(x, self.weight, self.bias) * 2,
    "scaled input": lambda self, x: F.linear(x * 2, self.weight, self.bias),
    "no bias": lambda self, x: F.linear(x, self.weight),
    "another bias": lambda self, x: F.linear(x, self.weight, self.bias * 2),
    "transposed": lambda self, x: F.linear(x, self.weight.t(), self.bias),
    "branches": lambda self, x: F.linear(x, self.weight, self.bias) if x.sum() > 0 else x,
    "the input too": lambda self, x: (F.linear(x, self.weight, self.bias), x),
    "writes": lambda self, x: F.linear(x.mul_(2), self.weight, self.bias),
    "writes its weight": lambda self, x: (self.weight.mul_(2), F.linear(x, self.weight, self.bias))[1],
    "the second input": lambda self, other, x: F.linear(x, self.weight, self.bias),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("forward", SAME.values(), ids=SAME)
def test_the_eager_form_takes_it_for_a_linear(forward, bias):
    model, x = nn.Sequential(linear(forward)(16, 16, bias=bias)).eval(), torch.randn(3, 16)
    quantized = quantize_dynamic(model)
    assert kinds(quantized)["0"] == "DynamicQuantizedLinear"
    assert (quantized(x) - model(x)).norm() <= 0.02 * model(x).norm()
    assert quantized(x.half()).dtype == torch.float16


@pytest.mark.parametrize("forward", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore:nothing in this Sequential is to be quantized")
def test_what_computes_something_else_stays_float(forward):
    quantized = quantize_dynamic(nn.Sequential(linear(forward)(16, 16)).eval())
    (row,) = fxquant.explain(quantized).rows
    assert row.decision.endswith("is a subclass of nn.Linear that has a forward of its own")
