"""What writes into its operand is read by its result: integers are other tensors than the floats that are written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_qat_qconfig_mapping, default_static_qconfig_mapping, prepare_fx, prepare_qat_fx
from tests.samples import sqnr

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Writes(nn.Module):
    """Two convolutions; what lies between them is written into the first one's result."""

    def __init__(self, write):
        super().__init__()
        self.first, self.last, self.write = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1), write
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.first(x)
        self.write(self, x)
        return self.last(x)


WRITES = {
    "method": lambda _, x: x.relu_(),
    "keyword": lambda _, x: F.relu(x, inplace=True),
    "position": lambda _, x: F.leaky_relu(x, 0.3, True),
    "function": lambda _, x: torch.clamp_(x, 0, 1),
    "module": lambda self, x: self.relu(x),
    "sum": lambda _, x: x.add_(1.0),
    "twice": lambda _, x: x.add_(1.0).mul_(3.0).relu_(),
    "view": lambda _, x: x.flatten(2).relu_(),
    "part": lambda _, x: x[:, :4].add_(2.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@torch.no_grad()
def test_static_layers_read_what_was_written(write):
    torch.manual_seed(0)
    model = Writes(write).eval()
    prepared = prepare_fx(model, default_static_qconfig_mapping(), (X,))
    assert torch.equal(prepared(X), model(X))
    assert sqnr(model(X), convert_fx(prepared, data=[(X,)])(X)) > 35


def test_so_do_layers_in_training():
    torch.manual_seed(0)
    model = Writes(WRITES["method"])
    trained = prepare_qat_fx(model, default_qat_qconfig_mapping(), (X,))
    trained(X)
    with torch.no_grad():
        assert sqnr(model.eval()(X), convert_fx(trained)(X)) > 30


class Early(nn.Module):
    """A reader before the write, which reads what was there, and a view, which shows what is written."""

    def __init__(self):
        super().__init__()
        self.first, self.early, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.first(x)
        early, turned = self.early(x), x.transpose(2, 3)
        x.relu_()
        return early, self.last(turned)


@torch.no_grad()
def test_readers_before_a_write_and_of_views_read_what_float_readers_do():
    torch.manual_seed(0)
    model = Early().eval()
    quantized = convert_fx(prepare_fx(model, default_static_qconfig_mapping(), (X,)), data=[(X,)])
    for expected, got in zip(model(X), quantized(X), strict=True):
        assert sqnr(expected, got) > 35


@torch.no_grad()
def test_dynamic_models_keep_their_bits_and_nodes():
    class Rectified(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, x):
            x = self.first(x)
            x.relu_()
            return self.last(x)

    model = Rectified().eval()
    quantized = convert_fx(prepare_fx(model, fxquant.default_dynamic_qconfig_mapping(), (X,)))
    assert [node.name for node in quantized.graph.nodes] == ["x", "first", "relu_", "last", "output"]
    first, last = quantized.first, quantized.last
    assert torch.equal(quantized(X), last(first(X).relu()))


@torch.no_grad()
def test_a_counter_that_forward_counts_up_stays_a_buffer():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return self.conv(x) * self.count

    prepared = prepare_fx(Counts().eval(), default_static_qconfig_mapping(), (X,))
    assert torch.equal(prepared(X) * 2, prepared(X))
