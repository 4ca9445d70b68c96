"""ATen calls on values become torch's: exported networks are integer all through."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_static_qconfig_mapping, prepare_fx
from fxquant.graph.trace.exported import adopt
from tests.graph.test_layers import Net, X, trained
from tests.samples import sqnr

pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self", "ignore:.*LeafSpec.*:FutureWarning")

FUNCTIONS = {
    "add": lambda x: x + x.flip(3),
    "add in place": lambda x: (x * 2).add_(x),
    "sub": lambda x: x - 0.25,
    "mul": lambda x: x * x,
    "div": lambda x: x / 3,
    "relu": F.relu,
    "relu in place": lambda x: F.relu(x * 2, inplace=True),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 0.75),
    "hardtanh in place": lambda x: F.hardtanh(x * 2, -0.5, 0.75, inplace=True),
    "hardswish": F.hardswish,
    "hardswish in place": lambda x: F.hardswish(x * 2, inplace=True),
    "hardsigmoid": F.hardsigmoid,
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x * 2, inplace=True),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "elu": lambda x: F.elu(x, 0.7),
    "leaky relu": lambda x: F.leaky_relu(x, 0.2),
    "mish": F.mish,
    "softplus": lambda x: F.softplus(x, 2.0),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "clamp": lambda x: x.clamp(-0.5, 1.5),
    "clamp from below": lambda x: torch.clamp_min(x, -0.5).clamp_max(1.5),
    "maximum": lambda x: torch.maximum(0.1 * x, x).minimum(x.square()),
    "erf": lambda x: torch.erf(x) + x.pow(2),
    "reversed sub": lambda x: torch.rsub(x, 1.5) * x,
    "div in place": lambda x: (x * 2).div_(4),
    "flatten": lambda x: x.flatten(1).view(x.shape),
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "cat": lambda x: torch.cat([x, -x], 1)[:, :8],
    "chunk": lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "split": lambda x: torch.cat(torch.split(x, [3, 5], 1)[::-1], 1),
    "slice": lambda x: x[:, :, 1:9:2],
    "select": lambda x: x[:, :, 3].unsqueeze(2),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "constant pad": lambda x: torch.constant_pad_nd(x, (1, 2)),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 2),
    "mean": lambda x: x.mean((2, 3), keepdim=True),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, size=(7, 9), mode="bilinear", align_corners=False),
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2),
    "dropout": lambda x: F.dropout(x, 0.5, False),
}


class Around(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_goes_on_with_integers(name):
    torch.manual_seed(1)
    model = Around(FUNCTIONS[name]).eval()
    with torch.no_grad():
        program = torch.export.export(model, (X,)).module()
        quantized = convert_fx(prepare_fx(program, default_static_qconfig_mapping(), (X,)), data=[(X,)])
        assert "float between integers" not in str(fxquant.explain(quantized))
        assert sqnr(model(X), quantized(X)) > 30
        assert torch.equal(adopt(program)(X), model(X))


@pytest.mark.parametrize("decomposed", [False, True])
def test_normalizations_are_folded(decomposed):
    model = trained(Net())
    with torch.no_grad():
        exported = torch.export.export(model, (X,))
        program = (exported.run_decompositions() if decomposed else exported).module()
        prepared = prepare_fx(program, default_static_qconfig_mapping(), (X,))
        chains = {fusion.chain for fusion in prepared._fxquant_record.fusions}
        assert chains == {("stem", "bn0"), ("deep", "bn1"), ("out", "bn2")}
        assert sqnr(model(X), convert_fx(prepared, data=[(X,)])(X)) > 30
