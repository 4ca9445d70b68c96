"""Float modules that stand for fused chains compute exactly what the chain did."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.nn.fused import FLOAT_TYPES, WITH_RELU, linear_relu

INPUTS = {nn.Linear: (3, 4), nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 4, 9, 8), nn.Conv3d: (2, 4, 5, 6, 7)}


@pytest.mark.parametrize("plain", WITH_RELU)
def test_a_fused_module_is_its_plain_one_then_relu(plain):
    arguments = (4, 6) if plain is nn.Linear else (4, 6, 3)
    module, fused = plain(*arguments), WITH_RELU[plain](*arguments)
    fused.load_state_dict(module.state_dict())
    x = torch.randn(INPUTS[plain])
    assert torch.equal(fused(x), module(x).relu())


def test_the_two_tables_are_inverse():
    assert {fused: plain for plain, fused in WITH_RELU.items()} == FLOAT_TYPES


@pytest.mark.parametrize("bias", [True, False])
def test_linear_relu_is_linear_then_relu(bias):
    x, weight, b = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5) if bias else None
    assert torch.equal(linear_relu(x, weight, b), F.linear(x, weight, b).relu())


def test_linear_relu_traces_as_one_node():
    class Model(nn.Module):
        def forward(self, x, w):
            return linear_relu(x, w)

    graph = fx.symbolic_trace(Model()).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [linear_relu]
