"""A weight and the name of its format go together, or an error says what was expected."""

import pytest
import torch

from fxquant import ArgumentError, ShapeError, int4_dynamic_qconfig, int16_dynamic_qconfig
from fxquant.formats import INT4, INT8
from fxquant.numerics import QuantizedTensor
from fxquant.ops.weights import check_format, check_matrix, prepare_scale


def test_a_format_is_one_of_those_that_are_known():
    assert check_format("linear", "int4", (INT8, INT4)) is INT4
    with pytest.raises(ArgumentError, match="a quantized linear takes one of the formats 'int8', 'int4', got 'int3'"):
        check_format("linear", "int3", (INT8, INT4))


@pytest.mark.parametrize("qconfig", [int4_dynamic_qconfig, int16_dynamic_qconfig])
def test_what_was_quantized_is_a_matrix_of_its_rows_and_no_others(qconfig):
    weight = qconfig.quantize_weight(torch.randn(5, 75))
    check_matrix("weight", weight, 5)
    with pytest.raises(ShapeError, match=r"weight, \(6, 75\) in int(4|16): expected .* got .* \(5, "):
        check_matrix("weight", weight, 6)


def test_a_scale_of_float16_becomes_float32_for_the_library():
    weight = QuantizedTensor(INT8, torch.zeros(3, 4, dtype=torch.int8), torch.ones(3).half(), None, 4)
    assert prepare_scale(weight).dtype == torch.float32
