"""equalize_fx and smooth_fx: the same function to the bit, and what it is for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import ArgumentError, FxQuantError, QConfig, TensorSpec, convert_fx, default_static_qconfig, prepare_fx
from tests.samples import everything, sqnr

PER_TENSOR = QConfig(
    activation=default_static_qconfig.activation,
    weight=TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="tensor"),
)


class Separable(nn.Module):
    """Pointwise, depthwise, pointwise, with channels of very different sizes; everything that may stand between."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Conv2d(3, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depth = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.slopes = nn.PReLU(16)
        self.groups = nn.Conv2d(16, 12, 1, groups=2)
        self.up = nn.ConvTranspose2d(12, 8, 2, 2, groups=2)
        self.last = nn.Conv2d(8, 5, 1)
        with torch.no_grad():
            self.norm.weight.copy_(torch.logspace(-2, 2, 16)[torch.randperm(16)])
            self.depth.weight.div_(self.norm.weight.view(-1, 1, 1, 1))

    def forward(self, x):
        x = self.slopes(self.depth(F.relu(self.norm(self.wide(x)))))
        x = self.up(F.max_pool2d(F.leaky_relu(self.groups(x), 0.1), 2))
        return self.last(F.avg_pool2d(x.relu(), 2))


def normed(channels=16, outlier=50.0):
    """Return a LayerNorm with an outlier channel, two Linears that read it, and an RMSNorm before a third one."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.query, self.key = nn.LayerNorm(channels), nn.Linear(channels, 8), nn.Linear(channels, 8)
            self.rms, self.out = nn.RMSNorm(8), nn.Linear(8, 4)
            with torch.no_grad():
                self.norm.weight[3] = outlier
                self.norm.bias.normal_()
                self.query.weight[:, 3] /= outlier
                self.key.weight[:, 3] /= outlier

        def forward(self, x):
            x = self.norm(x)
            return self.out(self.rms(self.query(x) * self.key(x).sigmoid()))

    return Net().eval()


def decibels(model, source, x, qconfig=default_static_qconfig):
    """Return the SQNR of a model's quantized form beside what a float model gives."""
    with torch.no_grad():
        quantized = convert_fx(prepare_fx(source, everything(qconfig), (x,)), data=[(x,)])
        return sqnr(model(x), quantized(x))


def test_equalized_it_computes_the_same_bits_and_is_nearer_with_one_scale_a_tensor():
    torch.manual_seed(0)
    model, x = Separable().eval(), torch.randn(4, 3, 8, 8)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    equalized = fxquant.equalize_fx(model, (x,))
    with torch.no_grad():
        assert torch.equal(equalized(x), fxquant.fuse_fx(model, (x,))(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert decibels(model, equalized, x, PER_TENSOR) > decibels(model, model, x, PER_TENSOR) + 6  # a bit and more


def test_equalized_pairs_have_ranges_within_a_factor_of_two_of_each_other():
    torch.manual_seed(0)
    model, x = Separable().eval(), torch.randn(1, 3, 8, 8)
    equalized = fxquant.equalize_fx(model, (x,))
    for given, taken in (  # a factor of 2 ** (s / 2), and each of two shifts is rounded by half at most
        (equalized.wide.weight.abs().amax((1, 2, 3)), equalized.depth.weight.abs().amax((1, 2, 3))),
        (
            equalized.depth.weight.abs().amax((1, 2, 3)),
            equalized.groups.weight.unflatten(0, (2, 6)).abs().amax((1, 3, 4)).flatten(),
        ),
        (equalized.groups.weight.abs().amax((1, 2, 3)), equalized.up.weight.abs().amax((1, 2, 3))),
        (
            equalized.up.weight.unflatten(0, (2, 6)).abs().amax((1, 3, 4)).flatten(),
            equalized.last.weight.abs().amax((0, 2, 3)),
        ),
    ):
        assert (given.log2() - taken.log2()).abs().max() <= 2.0 + 1e-3


@pytest.mark.parametrize(
    "between",
    [nn.ReLU6(), nn.Sigmoid(), nn.AvgPool1d(1), nn.Sequential(nn.Linear(8, 8), nn.ReLU6())],
    ids=lambda between: type(between).__name__,
)
def test_what_does_not_scale_along_is_left_with_a_warning(between):
    model, x = (
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), between, nn.Linear(8, 8)).eval(),
        torch.randn(2, 8),
    )
    if isinstance(between, nn.Sequential):
        with torch.no_grad():  # two Linears with nothing between them do
            assert torch.equal(fxquant.equalize_fx(model, (x,))(x), fxquant.fuse_fx(model, (x,))(x))
        return
    with pytest.warns(UserWarning, match="equalize_fx changed nothing"):
        equalized = fxquant.equalize_fx(model, (x,))
    assert torch.equal(equalized.get_submodule("2").weight, model[2].weight)


def test_layers_that_something_else_uses_are_left():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.second(F.relu(self.first(x))) + F.linear(x, self.first.weight)

    model, x = Net().eval(), torch.randn(2, 8)
    with pytest.warns(UserWarning, match="changed nothing"):
        equalized = fxquant.equalize_fx(model, (x,))
    with torch.no_grad():
        assert torch.equal(equalized(x), fxquant.fuse_fx(model, (x,))(x))


def test_smoothed_it_computes_the_same_bits_and_is_nearer():
    torch.manual_seed(0)
    model, x = normed(), torch.randn(64, 16)
    smoothed = fxquant.smooth_fx(model, (x,), data=[x[:32], x[32:]])
    with torch.no_grad():
        assert torch.equal(smoothed(x), fxquant.fuse_fx(model, (x,))(x))
    assert decibels(model, smoothed, x) > decibels(model, model, x) + 6


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_factors_are_those_of_the_equation_but_for_rounding(strength):
    torch.manual_seed(0)
    model, x = normed(), torch.randn(64, 16)
    smoothed = fxquant.smooth_fx(model, (x,), data=[x], strength=strength)
    with torch.no_grad():
        peak = model.norm(x).abs().amax(0)
        weight = torch.cat([model.query.weight, model.key.weight]).abs().amax(0)
        wanted = (1 - strength) * weight.log2() - strength * peak.log2()
        shift = (smoothed.norm.weight / model.norm.weight).log2()
    assert torch.equal(shift, shift.round())
    assert (shift - wanted).abs().max() <= 0.5 + 1e-4
    torch.testing.assert_close(smoothed.key.weight * shift.exp2(), model.key.weight, rtol=0, atol=0)


def test_smoothing_without_a_norm_or_with_another_strength_or_no_data_says_so():
    x = torch.randn(2, 8)
    with pytest.warns(UserWarning, match="smooth_fx changed nothing"):
        fxquant.smooth_fx(nn.Sequential(nn.Linear(8, 8)).eval(), (x,), data=[x])
    with pytest.raises(ArgumentError, match="strength is from 0 to 1, got 2"):
        fxquant.smooth_fx(normed(8), (x,), data=[x], strength=2)
    with pytest.raises(FxQuantError, match="no batch"):
        fxquant.smooth_fx(normed(8), (x,), data=[])


def test_what_is_quantized_then_is_compared_saved_and_loaded_as_any_model(tmp_path):
    torch.manual_seed(0)
    model, x = normed(), torch.randn(64, 16)
    smoothed = fxquant.smooth_fx(model, (x,), data=[x])
    quantized = convert_fx(prepare_fx(smoothed, everything(default_static_qconfig), (x,)), data=[(x,)])
    assert min(row.local_sqnr_db for row in fxquant.compare(smoothed, quantized, [(x,)]).rows) > 30
    fxquant.save(quantized, tmp_path / "q.safetensors")
    with torch.no_grad():
        for skeleton in (smoothed, fxquant.fuse_fx(normed(), (x,)), fxquant.smooth_fx(normed().to("meta"), data=[])):
            assert torch.equal(fxquant.load(skeleton, tmp_path / "q.safetensors")(x), quantized(x))
