"""Schemes and refusals."""

import dataclasses

import pytest
import torch
from torch import nn

from fxquant import (
    QConfig,
    TensorSpec,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    int16_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.formats import INT16, UINT8
from fxquant.numerics import MAX_COLUMNS
from fxquant.operators import OPERATORS, find_function_operator, find_module_operator, find_operator
from fxquant.operators.base import (
    INT8_DYNAMIC,
    INT8_ROWS,
    product_scheme,
    refuse_parameters,
    refuse_weight,
    table_scheme,
)

WEIGHT = default_dynamic_qconfig.weight


def with_activation(**fields):
    return QConfig(activation=TensorSpec(**{"dtype": "uint8", "qmax": 255, "dynamic": True, **fields}), weight=WEIGHT)


@pytest.mark.parametrize(
    ("scheme", "qconfig", "is_taken"),
    [
        (INT8_DYNAMIC, default_dynamic_qconfig, True),
        (INT8_DYNAMIC, per_tensor_dynamic_qconfig, True),
        (INT8_DYNAMIC, per_tensor_dynamic_qconfig.with_reduce_range(), True),
        (INT8_DYNAMIC, float16_dynamic_qconfig, False),
        (INT8_DYNAMIC, float_qparams_weight_only_qconfig, False),
        (INT8_DYNAMIC, QConfig(activation=None, weight=WEIGHT), False),
        (INT8_DYNAMIC, with_activation(dynamic=False), False),
        (INT8_DYNAMIC, with_activation(symmetric=True), False),
        (INT8_DYNAMIC, with_activation(qmin=1), False),
        (INT8_DYNAMIC, with_activation(dtype="int8", qmax=127), False),
        (INT8_DYNAMIC, int16_dynamic_qconfig, False),
        (product_scheme(INT16), int16_dynamic_qconfig, True),
        (product_scheme(INT16), default_dynamic_qconfig, False),
        (product_scheme(INT16), QConfig(activation=None, weight=int16_dynamic_qconfig.weight), False),
        (product_scheme(INT16), QConfig(default_dynamic_qconfig.activation, int16_dynamic_qconfig.weight), False),
        (INT8_ROWS, default_dynamic_qconfig, True),
        (INT8_ROWS, float_qparams_weight_only_qconfig, False),
        (table_scheme(UINT8), float_qparams_weight_only_qconfig, True),
        (table_scheme(UINT8), default_dynamic_qconfig, False),
    ],
)
def test_what_a_scheme_accepts(scheme, qconfig, is_taken):
    assert scheme.accepts(qconfig) is is_taken


def test_a_later_row_overrides_an_earlier_one():
    mine = dataclasses.replace(OPERATORS[0], summary="mine")
    table = (*OPERATORS, mine)
    assert find_module_operator(table, nn.Linear) is mine
    assert find_function_operator(table, torch.nn.functional.linear) is mine
    assert find_operator(table, "linear") is mine


@pytest.mark.parametrize("name", ["matmul", "mm", "addmm", "einsum"])
def test_what_was_an_operator_is_a_call_of_linear(name):
    function = getattr(torch, name)
    linear = find_function_operator(OPERATORS, function)
    assert linear is find_operator(OPERATORS, name) is find_operator(OPERATORS, "linear")
    mine = dataclasses.replace(linear, name=name)
    assert find_operator((*OPERATORS, mine), name) is mine


def test_a_pattern_gives_operands_by_their_roles():
    pattern = find_operator(OPERATORS, "linear").find_pattern(torch.addmm)
    assert pattern.name_operands(("b", "x"), {"mat2": "w", "beta": 1, "out": "y"}) == {
        "bias": "b", "input": "x", "weight": "w", "beta": 1, "out": "y"}  # fmt: skip


def test_rows_know_exact_types_only():
    class MyLinear(nn.Linear):
        pass

    assert find_module_operator(OPERATORS, MyLinear) is None


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), "its weight is torch.int64, not floating point"),
        (torch.zeros(2, 2, dtype=torch.complex64), "its weight is torch.complex64, not floating point"),
        (torch.tensor([[1.0, float("inf")]]), "its weight holds NaN or infinity"),
        (torch.empty(1, MAX_COLUMNS + 1, device="meta"), f"int32 sums are exact up to {MAX_COLUMNS}"),
    ],
)
def test_weights_that_cannot_become_integers(weight, reason):
    assert reason in refuse_weight(weight)


@pytest.mark.parametrize(
    "weight", [torch.ones(2, 2), torch.ones(2, 2).half(), torch.empty(2, MAX_COLUMNS, device="meta")]
)
def test_weights_that_can(weight):
    assert refuse_weight(weight) is None


def test_a_module_in_training_mode_is_refused():
    assert refuse_parameters(nn.Linear(2, 2)) == "it is in training mode; call .eval() on it"
    assert refuse_parameters(nn.Linear(2, 2).eval()) is None


def test_the_refused_parameter_is_named():
    module = nn.LSTM(2, 2).eval()
    with torch.no_grad():
        module.weight_hh_l0[0, 0] = float("nan")
    assert refuse_parameters(module) == "its weight_hh_l0 holds NaN or infinity"
