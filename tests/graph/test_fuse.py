"""Fusion: every spelling, folded weights against float64, and the chains that must stay as they are."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxquant
from fxquant import convert_fx, explain, fuse_fx, load, save
from fxquant.graph.fuse import fuse
from fxquant.graph.record import Unfused
from fxquant.graph.why import NotFused, because
from fxquant.nn import ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU, linear_relu
from tests.samples import everything, kinds, prepare, quantize, same_bits

RELUS = {
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "F.relu": F.relu,
    "F.relu in place": lambda x: F.relu(x, inplace=True),
    "F.relu by name": lambda x: F.relu(input=x),
    "F.relu_": F.relu_,
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    ".relu()": lambda x: x.relu(),
    ".relu_()": lambda x: x.relu_(),
}


class Chain(nn.Module):
    """Calls its parts one after the other."""

    def __init__(self, *parts):
        super().__init__()
        self.parts = parts
        for i, part in enumerate(parts):
            if isinstance(part, nn.Module):
                self.add_module(f"m{i}", part)

    def forward(self, x):
        for i, part in enumerate(self.parts):
            x = getattr(self, f"m{i}")(x) if isinstance(part, nn.Module) else part(x)
        return x


class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return F.linear(x, self.weight)


def calls(module):
    """Return what a graph calls, by kind."""
    return [
        type(module.get_submodule(n.target)) if n.op == "call_module" else n.target
        for n in module.graph.nodes
        if n.op.startswith("call_")
    ]


@pytest.mark.parametrize("relu", RELUS)
def test_linear_relu_in_every_spelling(relu):
    model, x = Chain(nn.Linear(4, 5), RELUS[relu]).eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert calls(fused) == [LinearReLU]
    assert torch.equal(fused(x), model(x))
    assert kinds(quantize(model, x))["m0"] == "DynamicQuantizedLinearReLU"


@pytest.mark.parametrize("relu", RELUS)
def test_functional_linear_relu_in_every_spelling(relu):
    model, x = Chain(FunctionalLinear(), RELUS[relu]).eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert calls(fused) == [linear_relu]
    assert torch.equal(fused(x), model(x))
    (node,) = [n for n in quantize(model, x).graph.nodes if n.op == "call_function"]
    assert node.kwargs["relu"] is True


@pytest.mark.parametrize(
    ("conv", "kind", "shape"),
    [
        (nn.Conv1d, ConvReLU1d, (2, 4, 9)),
        (nn.Conv2d, ConvReLU2d, (2, 4, 9, 8)),
        (nn.Conv3d, ConvReLU3d, (2, 4, 5, 6, 7)),
    ],
)
def test_conv_relu(conv, kind, shape):
    model, x = nn.Sequential(conv(4, 6, 3), nn.ReLU()).eval(), torch.randn(shape)
    fused = fuse_fx(model, x)
    assert calls(fused) == [kind]
    assert torch.equal(fused(x), model(x))


def trained_norm(kind, features, **options):
    norm = kind(features, **options)
    with torch.no_grad():
        if norm.running_mean is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.1, 4)
        if norm.weight is not None:
            norm.weight.normal_()
            norm.bias.normal_()
    return norm


CONVOLUTIONS = {
    "conv1d": (nn.Conv1d, nn.BatchNorm1d, (2, 4, 9)),
    "conv2d": (nn.Conv2d, nn.BatchNorm2d, (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d, nn.BatchNorm3d, (2, 4, 5, 6, 7)),
    "transposed1d": (nn.ConvTranspose1d, nn.BatchNorm1d, (2, 4, 9)),
    "transposed2d": (nn.ConvTranspose2d, nn.BatchNorm2d, (2, 4, 9, 8)),
    "transposed3d": (nn.ConvTranspose3d, nn.BatchNorm3d, (2, 4, 5, 6, 7)),
}


@torch.no_grad()
def assert_folded(model, x):
    """Assert that a fused model is one module, as near to float64 as float32 sums of its products are."""
    fused = fuse_fx(model, x)
    assert len(calls(fused)) == 1
    exact = fused.double()(x.double())
    expected = model.double()(x.double())
    # Folding rounds each weight and the bias to float32 once: 2⁻²⁴ of the sum of the products' magnitudes.
    magnitude = fused.get_submodule(next(n.target for n in fused.graph.nodes if n.op == "call_module"))
    bias = magnitude.bias.abs().max()
    for p in magnitude.parameters():
        p.abs_()
    bound = 2**-23 * (magnitude(x.double().abs()).abs() + bias)
    assert bool(((exact - expected).abs() <= bound).all())


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"groups": 2}, {"bias": False}, {"groups": 4, "stride": 2, "bias": False}], ids=str
)
def test_norm_folds_into_convolutions(name, options):
    conv, norm, shape = CONVOLUTIONS[name]
    assert_folded(nn.Sequential(conv(4, 8, 3, **options), trained_norm(norm, 8)).eval(), torch.randn(shape))


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}, {"momentum": None}], ids=str)
def test_norm_folds_with_all_its_options(options):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), trained_norm(nn.BatchNorm2d, 8, **options)).eval()
    assert_folded(model, torch.randn(2, 4, 9, 8))


@pytest.mark.parametrize("bias", [True, False])
def test_norm_folds_into_linear(bias):
    model = nn.Sequential(nn.Linear(4, 8, bias=bias), trained_norm(nn.BatchNorm1d, 8)).eval()
    assert_folded(model, torch.randn(3, 4))


def test_linear_norm_relu_becomes_one_quantized_module():
    model = nn.Sequential(nn.Linear(4, 8), trained_norm(nn.BatchNorm1d, 8), nn.ReLU()).eval()
    x = torch.randn(3, 4)
    prepared = prepare(model, x)
    assert [fusion.chain for fusion in prepared.record.fusions] == [("0", "1", "2")]
    assert calls(prepared) == [LinearReLU]
    assert torch.allclose(prepared(x), model(x), atol=1e-5)
    assert kinds(convert_fx(prepared)) == {"": "Sequential", "0": "DynamicQuantizedLinearReLU"}


def test_conv_norm_relu_is_fused_and_left_float_with_a_reason():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), trained_norm(nn.BatchNorm2d, 4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 8, 8)
    quantized = quantize(model, x)
    assert calls(quantized) == [ConvReLU2d]
    (left,) = quantized.record.skipped
    assert left.reason.endswith("3 → 4 channels, kernel 3×3")
    assert torch.allclose(quantized(x), model(x), atol=1e-5)


def test_norm_after_3d_linear_output_is_not_folded():
    model = nn.Sequential(nn.Linear(4, 8), trained_norm(nn.BatchNorm1d, 5)).eval()  # the norm is over dimension 1
    x = torch.randn(3, 5, 4)
    assert calls(fuse_fx(model, x)) == [nn.Linear, nn.BatchNorm1d]


def test_norm_after_3d_linear_output_of_the_same_size_is_not_folded():
    model = nn.Sequential(nn.Linear(4, 5), trained_norm(nn.BatchNorm1d, 5)).eval()
    x = torch.randn(3, 5, 4)
    fused = fuse_fx(model, x)
    assert calls(fused) == [nn.Linear, nn.BatchNorm1d]
    assert torch.equal(fused(x), model(x))
    assert torch.equal(prepare(model, x)(x), model(x))


def test_unbatched_conv_output_is_not_folded_into():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), trained_norm(nn.BatchNorm1d, 6)).eval()
    x = torch.randn(3, 7)  # (C, L): the norm takes the 4 channels for a batch
    fused = fuse_fx(model, x)
    assert torch.equal(fused(x), model(x))


def test_without_example_inputs_a_folded_norm_is_guarded():
    model = nn.Sequential(nn.Linear(4, 5), trained_norm(nn.BatchNorm1d, 5)).eval()
    fused = fuse_fx(model)
    x = torch.randn(3, 4)
    assert torch.allclose(fused(x), model(x), atol=1e-5)
    with pytest.raises(AssertionError, match="BatchNorm1d was folded for 2-D values; call fuse_fx with example_inputs"):
        fused(torch.randn(3, 5, 4))


@pytest.mark.parametrize("options", [{"track_running_stats": False}])
def test_a_norm_without_statistics_is_not_folded(options):
    model, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, **options)).eval(), torch.randn(3, 4)
    assert calls(fuse_fx(model, x)) == [nn.Linear, nn.BatchNorm1d]


def test_a_norm_that_is_in_training_mode_is_not_folded():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval(), torch.randn(3, 4)
    model[1].train()
    assert calls(fuse_fx(model, x)) == [nn.Linear, nn.BatchNorm1d]


def test_a_half_convolution_stays_half():
    model = nn.Sequential(nn.Conv1d(3, 4, 2), trained_norm(nn.BatchNorm1d, 4)).eval().half()
    fused = fuse_fx(model, torch.randn(2, 3, 5).half())
    assert {p.dtype for p in fused.parameters()} == {torch.float16}


class Branching(nn.Module):
    """A Linear whose result is used otherwise than by one ReLU alone."""

    def __init__(self, use):
        super().__init__()
        self.linear, self.relu, self.other, self.use = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), use

    def forward(self, x):
        return self.use(self, x)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: (lambda y: y + m.relu(y))(m.linear(x)),
        lambda m, x: (lambda y: (m.relu(y), y))(m.linear(x)),
        lambda m, x: m.relu(m.linear(x)) + m.linear(x),
        lambda m, x: m.relu(m.linear(m.linear(x))),
        lambda m, x: F.relu(m.linear(x)) @ m.linear.weight,
        lambda m, x: F.relu6(m.linear(x)),
        lambda m, x: F.leaky_relu(m.linear(x)),
        lambda m, x: m.linear(x).clamp(min=0),
    ],
)
def test_what_must_not_be_fused(use):
    model, x = Branching(use).eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert LinearReLU not in calls(fused)
    assert same_bits(fused(x), model(x))


def test_one_relu_shared_by_two_linears_fuses_into_both():
    model, x = Branching(lambda m, x: m.relu(m.other(m.relu(m.linear(x))))).eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert calls(fused) == [LinearReLU, LinearReLU]
    assert torch.equal(fused(x), model(x))


def test_a_second_relu_stays():
    model, x = Chain(nn.Linear(4, 5), F.relu, torch.relu).eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert calls(fused) == [LinearReLU, torch.relu]


def test_an_inplace_relu_on_a_value_seen_elsewhere_is_not_fused():
    def use(m, x):
        y = m.linear(x)
        F.relu_(y)
        return y * 2

    model, x = Branching(use).eval(), torch.randn(3, 4)
    assert torch.equal(fuse_fx(model, x)(x), model(x))
    assert torch.equal(prepare(model, x)(x), model(x))


def test_an_inplace_add_between_is_kept():
    model, x = Chain(nn.Linear(4, 5), lambda y: operator.iadd(y, 1), F.relu).eval(), torch.randn(3, 4)
    assert torch.equal(fuse_fx(model, x)(x), model(x))


def test_a_fused_parameter_keeps_requires_grad():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU()).eval().requires_grad_(False)
    assert not any(p.requires_grad for p in fuse_fx(model, torch.randn(3, 4)).parameters())


def test_the_stack_trace_of_the_linear_stays():
    model, x = Chain(nn.Linear(4, 5), F.relu).eval(), torch.randn(3, 4)
    (node,) = [n for n in fuse_fx(model, x).graph.nodes if n.op == "call_module"]
    assert "in forward" in node.stack_trace


def test_a_fused_model_can_be_prepared():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU()).eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert torch.equal(convert_fx(prepare(fused, x, mapping=everything()))(x), quantize(model, x)(x))


@pytest.mark.parametrize("relus", ["each", "one", "in between"])
def test_a_layer_called_twice_takes_in_the_relus_behind_both_calls(relus, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.relu = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x):
            y = F.relu(self.layer(x)) if relus != "one" else self.layer(x)
            y = self.layer(y) if relus != "in between" else y + self.layer(y)
            return self.relu(y)

    torch.manual_seed(0)
    model, x = Twice().eval(), torch.randn(3, 4)
    fused = fuse_fx(model, x)
    assert torch.equal(fused(x), model(x))
    assert [fusion.chain for fusion in fused.record.fusions] == ([("layer", "relu", "relu")] if relus == "each" else [])
    assert type(fused.get_submodule("layer")) is (LinearReLU if relus == "each" else nn.Linear)
    quantized = quantize(model, x)
    fxquant.save(quantized, tmp_path / "twice.safetensors")
    assert torch.equal(fxquant.load(model, tmp_path / "twice.safetensors")(x), quantized(x))


def untracked():
    return nn.BatchNorm1d(4, track_running_stats=False)


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


class Normed(nn.Module):
    """A layer and a normalization, called by a function."""

    def __init__(self, layer, norm, forward=lambda self, x: self.norm(self.layer(x))):
        super().__init__()
        self.layer, self.norm, self.call = layer, norm, forward

    def forward(self, x):
        return self.call(self, x)


CASES = {
    "untracked": (lambda: Normed(nn.Linear(4, 4), untracked()), "the normalization keeps no running statistics"),
    "other rank": (
        lambda: Normed(
            nn.Linear(4, 5), nn.BatchNorm1d(5), lambda self, x: self.norm(self.layer(x[:, None].expand(3, 5, 4)))
        ),
        "the layer gives 3-D values, and the normalization is over its outputs only if they are 2-D",
    ),
    "hook": (lambda: Normed(hooked(nn.Linear(4, 4)), nn.BatchNorm1d(4)), "layer has a hook, which would see something"),
    "read": (
        lambda: Normed(nn.Linear(4, 4), nn.BatchNorm1d(4), lambda self, x: (y := self.layer(x)) + self.norm(y)),
        "something else reads what layer gives",
    ),
    "called twice": (
        lambda: Normed(nn.Linear(4, 4), nn.BatchNorm1d(4), lambda self, x: self.norm(self.layer(self.layer(x)))),
        "layer is called, or its tensors are read, elsewhere too",
    ),
    "tensor read": (
        lambda: Normed(
            nn.Linear(4, 4), nn.BatchNorm1d(4), lambda self, x: self.norm(self.layer(x)) @ self.layer.weight
        ),
        "layer is called, or its tensors are read, elsewhere too",
    ),
    "another norm": (
        lambda: Normed(nn.Linear(4, 4), OtherNorm(4)),
        "a OtherNorm is not folded into a Linear",
    ),
}


class OtherNorm(nn.BatchNorm1d):
    """A subclass, which may compute something else."""


@pytest.mark.parametrize("name", CASES)
def test_a_normalization_that_is_not_folded_says_why(name):
    make, reason = CASES[name]
    model, x = make().eval(), torch.randn(3, 4)
    told = [line for line in explain(prepare(model, x)).remarks if line.startswith("not fused")]
    assert len(told) == 1
    assert told[0].startswith(f"not fused: layer → norm: {reason}")


def test_a_normalization_in_training_mode_or_of_other_channels_says_why():
    module = fx.symbolic_trace(Normed(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval())
    module.norm.train()
    assert fuse(module)[1] == (Unfused(chain=("layer", "norm"), why=because(NotFused.TRAINING)),)
    module.norm = nn.BatchNorm1d(6).eval()
    assert fuse(module)[1] == (Unfused(chain=("layer", "norm"), why=because(NotFused.OTHER_CHANNELS, 6, 4)),)


def test_a_normalization_without_a_layer_says_so_once_with_the_others():
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(5)), nn.Linear(4, 4)).eval()
    prepared = prepare(model, torch.randn(3, 4))
    assert {unfused.why for unfused in prepared.record.unfused} == {because(NotFused.NO_LAYER)}
    assert [unfused.chain for unfused in prepared.record.unfused] == [(str(i),) for i in range(5)]
    assert any(
        line.startswith("not fused: 0, 1, 2 and 2 more: there is no nn.Linear") for line in explain(prepared).remarks
    )


def test_a_relu_that_is_not_fused_says_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x)
            return y + F.relu(y)

    (unfused,) = prepare(Model(), torch.randn(3, 4)).record.unfused
    assert (unfused.chain, unfused.why) == (("layer", "relu"), because(NotFused.READ_ELSEWHERE, "layer"))


def test_what_is_fused_has_no_reason():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()).eval()
    assert prepare(model, torch.randn(1, 1, 3, 3)).record.unfused == ()


def test_reasons_come_through_save_and_load(tmp_path):
    make, _ = CASES["read"]
    quantized = quantize(make(), torch.randn(3, 4))
    save(quantized, tmp_path / "model.safetensors")
    assert load(make().eval(), tmp_path / "model.safetensors").record.unfused == quantized.record.unfused != ()
