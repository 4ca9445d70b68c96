"""The table of what stands between products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.operators.values import VALUE_OPERATORS, Form, arguments_of, find_value_operator


def test_no_kind_is_in_two_rows():
    kinds = [kind for row in VALUE_OPERATORS for kind in (*row.modules, *row.functions)]
    assert len(kinds) == len(set(kinds))
    assert len({row.name for row in VALUE_OPERATORS}) == len(VALUE_OPERATORS)


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        (nn.Flatten, Form.KEEPS), (torch.cat, Form.KEEPS), ("view", Form.KEEPS), (F.pad, Form.PADS),
        (nn.MaxPool1d, Form.POOLS), (F.gelu, Form.LOOKS_UP), ("relu", Form.LOOKS_UP), (torch.add, Form.ADDS),
        ("mul", Form.MULTIPLIES), (nn.AvgPool3d, Form.AVERAGES), (torch.mean, Form.AVERAGES),
    ],
)  # fmt: skip
def test_a_kind_has_its_form(kind, form):
    assert find_value_operator(kind).form is form


@pytest.mark.parametrize("kind", [nn.Softmax, F.softmax, nn.LayerNorm, torch.cumsum, "matmul"])
def test_others_have_none(kind):
    assert find_value_operator(kind) is None


@pytest.mark.parametrize(
    ("kind", "given", "takes"),
    [
        (F.pad, {"mode": "constant", "value": 0}, True),
        (F.pad, {"mode": "constant", "value": 1.5}, False),
        (F.pad, {"mode": "reflect"}, True),
        (F.max_pool2d, {"return_indices": True}, False),
        (F.interpolate, {"mode": "nearest"}, True),
        (F.interpolate, {"mode": "bilinear"}, True),
        (F.interpolate, {"mode": "bilinear", "antialias": True}, False),
        (F.interpolate, {"mode": "bicubic"}, False),
        (nn.BatchNorm2d, {"track_running_stats": True, "training": False}, True),
        (nn.BatchNorm2d, {"track_running_stats": False, "training": False}, False),
    ],
)
def test_some_arguments_have_no_integer_form(kind, given, takes):
    assert find_value_operator(kind).takes(given) is takes


def test_functions_of_the_channel_need_a_table_each():
    assert find_value_operator(nn.PReLU).channels({"num_parameters": 1}) == 0
    assert find_value_operator(nn.PReLU).channels({"num_parameters": 8}) == 8
    assert find_value_operator(nn.BatchNorm1d).channels({"num_features": 6}) == 6


def test_arguments_are_known_by_name_however_they_are_given():
    assert arguments_of(F.avg_pool2d, ("x", 2, 1), {"ceil_mode": True}, None) == {
        "kernel_size": 2, "stride": 1, "ceil_mode": True,
    }  # fmt: skip
    module = nn.MaxPool2d(3, 2)
    found = arguments_of(nn.MaxPool2d, ("x",), {}, module)
    assert (found["kernel_size"], found["stride"], found["padding"]) == (3, 2, 0)
