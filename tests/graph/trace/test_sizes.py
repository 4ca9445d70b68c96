"""Sizes that forward computes with in Python are numbers in a static model's graph, which checks its inputs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_static_qconfig_mapping, ops, prepare_fx, prepare_qat_fx
from fxquant.errors import ShapeError
from fxquant.graph.trace.sizes import Sized, as_sized
from tests.samples import sqnr

X = torch.randn(2, 3, 11, 12, generator=torch.Generator().manual_seed(0))
traced = pytest.mark.filterwarnings("ignore:.*was traced for")


class Same(nn.Conv2d):
    """Pads as TensorFlow does."""

    def forward(self, x):
        height, width = x.size()[-2:]
        above = max((math.ceil(height / self.stride[0]) - 1) * self.stride[0] + 3 - height, 0)
        beside = max((math.ceil(float(width) / self.stride[1]) - 1) * self.stride[1] + 3 - width, 0)
        if above > 0 or beside > 0:
            x = F.pad(x, (beside // 2, beside - beside // 2, above // 2, above - above // 2))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0)


class Trunk(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = Same(3, 8, 3, 2), nn.BatchNorm2d(8), Same(8, 4, 3, 2)

    def forward(self, x):
        x = self.last(F.relu6(self.norm(self.first(x))))
        if x.shape[-1] > 2 and x.ndim == 4:
            x = F.max_pool2d(x, 2, 1)
        return x.reshape(x.size(0), -1) + float(x.dim())


@torch.no_grad()
def test_a_network_that_pads_in_python_is_integer_all_through():
    torch.manual_seed(0)
    model = Trunk().eval()
    with pytest.warns(
        UserWarning, match=r"Trunk was traced for x of \(any, 3, 11, 12\), because its forward computes with"
    ):
        prepared = prepare_fx(model, default_static_qconfig_mapping(), (X,))
    assert sqnr(model(X), prepared(X)) > 100
    module = convert_fx(prepared, data=[(X,)])
    assert [site.kind for site in module.record.sites] == ["torch.conv2d", "torch.conv2d"]
    ours = [node.target for node in module.graph.nodes if node.target in (ops.quantize, ops.pad_value, ops.dequantize)]
    assert ours == [ops.quantize, ops.pad_value, ops.pad_value]
    assert sqnr(model(X), module(X)) > 30
    more = torch.randn(5, 3, 11, 12)
    assert sqnr(model(more), module(more)) > 25


@traced
@torch.no_grad()
def test_other_sizes_are_an_error_that_says_what_to_do():
    module = convert_fx(prepare_fx(Trunk().eval(), default_static_qconfig_mapping(), (X,)), data=[(X,)])
    with pytest.raises(ShapeError, match=r"traced, for \(0 to any, 3, 11, 12\), got \(2, 3, 12, 12\).*prepare it with"):
        module(torch.randn(2, 3, 12, 12))


@torch.no_grad()
def test_a_batch_that_forward_computes_with_is_fixed_too():
    class Batch(Trunk):
        def forward(self, x):
            return super().forward(x) * math.sqrt(int(x.shape[0]))

    model = Batch().eval()
    with pytest.warns(UserWarning, match=r"x of \(2, 3, 11, 12\)"):
        module = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    assert sqnr(model(X), module(X)) > 30
    with pytest.raises(ShapeError, match="2, 3, 11, 12"):
        module(X[:1])


@traced
@torch.no_grad()
def test_files_and_training_keep_the_sizes(tmp_path):
    model = Trunk().eval()
    module = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    fxquant.save(module, tmp_path / "model.pt")
    assert torch.equal(fxquant.load(Trunk().eval(), tmp_path / "model.pt")(X), module(X))
    trained = prepare_qat_fx(Trunk(), fxquant.default_qat_qconfig_mapping(), (X,))
    trained(X)
    assert len(convert_fx(trained).record.sites) == 2


def test_dynamic_models_stay_free_of_sizes():
    class Tail(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(12, 4)

        def forward(self, x):
            x = self.linear(x)
            return x if x.shape[2] > 4 else x * 2

    with pytest.warns(UserWarning, match="the model's own code runs on"):
        module = convert_fx(prepare_fx(Tail().eval(), fxquant.default_dynamic_qconfig_mapping(), (X,)))
    assert module(torch.randn(2, 3, 7, 12)).shape == (2, 3, 7, 4)


def test_sizes_come_back_from_json():
    sized = Sized("float32", (2, 3, 4))
    assert as_sized(["float32", [2, 3, 4], True]) == sized
    assert sized.bounds == ((0, None), (3, 3), (4, 4))
    assert as_sized(3) is as_sized(["of", "two", "keywords"]) is None
    assert str(sized._replace(any_batch=False)) == "(2, 3, 4)"
