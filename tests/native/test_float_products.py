"""Products with float16 and float32 weights: the same bits on every instruction set, near the exact product."""

import importlib
import math
from dataclasses import replace

import pytest
import torch

from fxquant import default_dynamic_qconfig, float16_dynamic_qconfig
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedLSTM
from tests.native import native
from tests.native.cases import kernels, same_bits, usable

SHAPES = [
    (1, 70, 2100),
    (2, 100, 33),
    (7, 1, 5),
    (13, 1030, 100),
    (40, 16, 64),
    (300, 203, 70),
    (6, 4100, 9),
    (3, 0, 5),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_is_exact_but_for_the_roundings_of_its_sums(isa, shape):
    rows, columns, outputs = shape
    x, weight, bias = torch.randn(rows, columns), torch.randn(outputs, columns).half(), torch.randn(outputs)
    with kernels(isa, 1):
        got = native.linear(x, weight, None, bias, format="float16")
    exact = x.double() @ weight.double().T + bias
    # a lane adds columns / 16 products, five more sums join the lanes and the bias: each rounds by 2^-24
    slack = (x.double().abs() @ weight.double().abs().T + bias.abs()) * (columns / 16 + 7) * 2**-24
    assert ((got - exact).abs() <= slack).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_every_instruction_set_gives_the_same_bits(shape):
    rows, columns, outputs = shape
    x, weight, bias = torch.randn(rows, columns), torch.randn(outputs, columns).half(), torch.randn(outputs)
    results = []
    for isa in usable():
        for threads in (1, 3):
            with kernels(isa, threads):
                results.append(native.linear(x, weight, None, bias, True, format="float16"))
    assert all(same_bits(result, results[0]) for result in results)


def test_a_row_gives_the_same_bits_alone_and_in_any_batch(isa):
    x, weight = torch.randn(2000, 1030), torch.randn(33, 1030).half()
    with kernels(isa, 1):
        together = native.linear(x, weight, None, format="float16")
        for rows in (1, 2, 3, 4, 5, 7, 33, 300):
            alone = native.linear(x[5 : 5 + rows], weight, None, format="float16")
            assert same_bits(alone, together[5 : 5 + rows]), rows


def test_every_half_is_widened_as_torch_does_it(isa):
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).view(512, 128)
    with kernels(isa, 1):
        rows = native.embedding(torch.arange(512), halves, None, None, 128, "float16")
    assert same_bits(rows, halves.float())


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_in_its_row_and_nowhere_else(isa, value, relu):
    x, weight = torch.ones(3, 70), torch.ones(5, 70, dtype=torch.half)
    x[1, 3] = value
    with kernels(isa, 1):
        y = native.linear(x, weight, None, None, relu, format="float16")
    expected = torch.full((5,), value)
    assert torch.equal(y[[0, 2]], torch.full((2, 5), 70.0))
    assert same_bits(y[1], expected.relu() if relu else expected)


@pytest.mark.parametrize("batch", [1, 5, 17])
def test_a_layer_of_float_matrices_gives_the_same_bits_on_every_instruction_set(batch):
    module = torch.nn.LSTM(70, 50, 2, bidirectional=True)
    mixed = replace(default_dynamic_qconfig, parts=(("weight_ih_l0", float16_dynamic_qconfig), ("weight_hh_l1", None)))
    x, results = torch.randn(9, batch, 70), []
    for qconfig in (float16_dynamic_qconfig, mixed):
        quantized = DynamicQuantizedLSTM.from_float(module, qconfig)
        for isa in usable():
            with kernels(isa, 2):
                results.append(quantized(x)[0])
        assert all(same_bits(result, results[0]) for result in results)
        assert (results.pop() - module(x)[0]).abs().max() < 0.02
        results.clear()


def test_float16_modules_do_not_wait_for_torch(isa, monkeypatch):
    module = DynamicQuantizedLinear.from_float(torch.nn.Linear(70, 5), float16_dynamic_qconfig)
    monkeypatch.setattr(importlib.import_module("fxquant.ops.linear"), "multiply", None)
    with kernels(isa, 1):
        assert module(torch.randn(2, 70)).shape == (2, 5)
