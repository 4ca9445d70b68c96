"""The laws over random convolutional networks, each made from its number, in which static, dynamic and float mix."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_dynamic_qconfig, fuse_fx, prepare_fx
from tests.samples import same_bits, sqnr

COUNT = 40
CURVES = [
    F.relu, F.relu6, F.hardswish, F.silu, F.gelu, torch.sigmoid, torch.tanh, lambda x: F.leaky_relu(x, 0.1),
    lambda x: x.clamp(-1, 2), lambda x: x * 0.5 + 0.25, lambda x: x, lambda x: -x,
]  # fmt: skip
MOVES = [
    lambda x: x.flip(2), lambda x: F.dropout(x, 0.3, False), lambda x: F.pad(x, (1, 1, 1, 1))[:, :, 1:-1, 1:-1],
    lambda x: x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), lambda x: torch.cat(x.chunk(2, 1), 1),
    lambda x: F.max_pool2d(x, 3, 1, 1), lambda x: x.flatten(2).unflatten(2, x.shape[2:]),
    lambda x: F.interpolate(x, scale_factor=2.0)[:, :, ::2, ::2],
    lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear")[:, :, ::2, ::2],
]  # fmt: skip
FLOATS = [lambda x: x + F.softmax(x, 1), lambda x: x - x.amax((2, 3), keepdim=True)]


class Random(nn.Module):
    """A stem, some blocks that keep the shape, a head."""

    def __init__(self, draw):
        super().__init__()
        self.width = draw.choice((4, 6, 8))
        self.convs, self.norms, self.steps = nn.ModuleList(), nn.ModuleList(), []
        self._conv(draw, 3)
        for _ in range(draw.randrange(2, 6)):
            self._step(draw)
        self.head = nn.Linear(self.width, 5)
        self.mean = draw.choice((lambda x: x.mean((2, 3)), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1)))

    def _conv(self, draw, inputs):
        groups = draw.choice((1, 1, 2, inputs)) if inputs == self.width else 1
        kernel, dilation = draw.choice(((1, 1), (3, 1), (3, 2), ((3, 1), 1)))
        options = {"padding": "same", "dilation": dilation, "groups": groups, "bias": draw.random() < 0.5}
        self.convs.append(nn.Conv2d(inputs, self.width, kernel, **options))
        norm = nn.BatchNorm2d(self.width) if draw.random() < 0.6 else nn.Identity()
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.norms.append(norm)
        return len(self.convs) - 1

    def _step(self, draw):
        kind = draw.choice(("conv", "conv", "residual", "residual", "curve", "curve", "move", "move", "join", "float"))
        if kind in ("conv", "residual", "join"):
            self.steps.append((kind, self._conv(draw, self.width), draw.choice(CURVES)))
        else:
            self.steps.append((kind, None, draw.choice({"curve": CURVES, "move": MOVES, "float": FLOATS}[kind])))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x))
        for kind, number, function in self.steps:
            if number is None:
                x = function(x)
                continue
            y = self.norms[number](self.convs[number](x))
            if kind == "conv":
                x = function(y)
            elif kind == "residual":
                x = function(y + x)
            else:
                x = torch.cat([function(y), x], 1)[:, : self.width]
        return self.head(self.mean(x))


def mapping_of(draw, model):
    mapping = fxquant.default_static_qconfig_mapping()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and draw.random() < 0.2:
            is_dynamic = isinstance(module, nn.Linear) and draw.random() < 0.5
            mapping.set_module_name(name, default_dynamic_qconfig if is_dynamic else None)
    return mapping


@pytest.mark.parametrize("seed", range(COUNT))
@torch.no_grad()
def test_the_laws_hold(seed, tmp_path):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model = Random(draw).eval()
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(4, 3, 7, 9) for _ in range(3)]
    x = batches[0]
    mapping = mapping_of(draw, model)
    prepared = prepare_fx(model, mapping, (x,))
    assert same_bits(prepared(x), fuse_fx(model, (x,))(x))
    quantized = convert_fx(prepared, data=[(b,) for b in batches])

    # a model of some integers is near: each product or sum of values rounds to 8 bits
    y = quantized(x)
    assert sqnr(model(x), y) > 18

    # every candidate is decided
    candidates = {name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    record = quantized.record
    assert {site.path for site in record.sites} | {skipped.path for skipped in record.skipped} == candidates

    # an image is its own, where no float operator depends on batch or memory format in torch itself
    is_static = not record.skipped and all(site.is_static for site in record.sites)
    if is_static and all(kind != "float" for kind, _, _ in model.steps):
        assert all(torch.equal(quantized(x[i : i + 1]), y[i : i + 1]) for i in range(4))
        assert torch.equal(quantized(x.contiguous(memory_format=torch.channels_last)), y)

    # calibrated by hand, copied, and from a file: the same bits
    for b in batches:
        prepared(b)
    assert torch.equal(convert_fx(prepared)(x), y)
    fxquant.save(quantized, tmp_path / "q")
    with torch.device("meta"):
        skeleton = Random(random.Random(seed)).eval()
    assert torch.equal(fxquant.load(skeleton, tmp_path / "q")(x), y)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_networks_hold_every_kind():
    kinds = {kind for seed in range(COUNT) for kind, _, _ in Random(random.Random(seed)).steps}
    assert kinds == {"conv", "residual", "join", "curve", "move", "float"}
