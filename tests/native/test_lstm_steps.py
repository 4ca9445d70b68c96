"""LSTMs over sequences: where the kernels pack weight_hh and step through time with it, to the reference's bits."""

import pytest
import torch

from tests.native import native
from tests.native.cases import int8, kernels, same_bits, usable
from tests.ops import reference


def layer(steps, batch, hidden, seed):
    """Return the arguments of one LSTM layer of `hidden` units with 20 inputs."""
    torch.manual_seed(seed)
    weights = [int8(4 * hidden, 20), int8(4 * hidden, hidden)]
    scales = [torch.rand(4 * hidden) * 0.02 for _ in weights]
    states = torch.randn(1, batch, hidden), torch.randn(1, batch, hidden)
    return torch.randn(steps, batch, 20), None, *states, weights, scales, [torch.randn(4 * hidden)]


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("hidden", [1, 16, 33, 130])
@pytest.mark.parametrize(("steps", "batch"), [(9, 1), (8, 2), (4, 3), (4, 4), (5, 5), (4, 16), (4, 21)])
def test_sequences(isa, hidden, steps, batch):
    arguments = layer(steps, batch, hidden, seed=steps * batch + hidden)
    expected = reference.lstm(*arguments)
    for threads in (1, 2):
        with kernels(isa, threads):
            assert all(map(same_bits, native.lstm(*arguments), expected))


@pytest.mark.parametrize("isa", usable())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38, -1e38, 0.0, -0.0, 1e-41])
def test_special_values_reach_the_same_bits(isa, value):
    x, sizes, h0, c0, weights, scales, biases = layer(8, 3, 40, seed=1)
    x[2, 1, 3] = c0[0, 0, 5] = h0[0, 2, 7] = biases[0][50] = value
    expected = reference.lstm(x, sizes, h0, c0, weights, scales, biases)
    with kernels(isa, 1):
        assert all(map(same_bits, native.lstm(x, sizes, h0, c0, weights, scales, biases), expected))
