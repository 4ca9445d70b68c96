"""Learned step sizes: their gradients, and that the converted model has them."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QConfig, QConfigError, QConfigMapping, convert_fx, default_qat_qconfig, prepare_fx, prepare_qat_fx
from fxquant.learned import LearnedFakeQuantize, LearnedWeight
from fxquant.ranges import Learned
from fxquant.straight_through import learned_value, learned_weight
from tests.samples import sqnr


def learning(qconfig, weight=True, activation=True):
    """Return a qconfig of which training learns the step sizes."""
    parts = {}
    if weight:
        parts["weight"] = dataclasses.replace(qconfig.weight, range=Learned())
    if activation and qconfig.is_static:
        parts["activation"] = dataclasses.replace(qconfig.activation, range=Learned())
    return dataclasses.replace(qconfig, **parts)


def written_out(x, scale, low, high):
    """LSQ as its paper writes it, by autograd alone: v = x / s clipped, rounded straight through, times s."""
    v = (x / scale).clamp(low, high)
    return (v + (v.round() - v).detach()) * scale


def test_the_gradients_of_a_value_are_the_papers():
    torch.manual_seed(0)
    ours, theirs = ((torch.randn(4, 50).requires_grad_(), torch.tensor(0.021).requires_grad_()) for _ in range(2))
    with torch.no_grad():
        theirs[0].copy_(ours[0])
    zero, weights = torch.tensor(100, dtype=torch.int32), torch.randn(4, 50)
    (learned_value(*ours, zero, 255) * weights).sum().backward()
    (written_out(*theirs, -100, 155) * weights).sum().backward()
    assert torch.allclose(ours[0].grad, theirs[0].grad, atol=1e-6)
    assert torch.allclose(ours[1].grad, theirs[1].grad / (50 * 255) ** 0.5, rtol=1e-4)


@pytest.mark.parametrize("qconfig", [fxquant.default_dynamic_qconfig, fxquant.per_tensor_dynamic_qconfig])
def test_the_gradients_of_a_weight_are_the_papers(qconfig):
    torch.manual_seed(0)
    spec, weight = qconfig.weight, torch.randn(3, 40).requires_grad_()
    scale = torch.full((3 if spec.axis == "channel" else 1,), 0.015).requires_grad_()
    (learned_weight(weight, scale, spec) ** 3).sum().backward()
    twin, steps = weight.detach().clone().requires_grad_(), scale.detach().clone().requires_grad_()
    (written_out(twin, steps.unsqueeze(1), spec.qmin, spec.qmax) ** 3).sum().backward()
    assert torch.allclose(weight.grad, twin.grad, rtol=1e-4)
    count = 40 if spec.axis == "channel" else 120
    assert torch.allclose(scale.grad, steps.grad / (count * spec.qmax) ** 0.5, rtol=1e-3)


@pytest.mark.parametrize("name", ["int8", "int16", "int4", "int3"])
def test_the_largest_weights_learn_from_the_first_step_on(name):
    qconfig, weight = learning(fxquant.qconfig.BEST[name]), torch.randn(200, 64)
    rounding, weight = LearnedWeight(qconfig, weight), weight.requires_grad_()
    rounding(weight).sum().backward()
    groups = weight.detach().view(-1, qconfig.weight.group_size or 64)
    largest = groups.abs().argmax(1, keepdim=True)  # 127 steps of int8, give or take a rounding of the float
    assert (weight.grad.view(groups.shape).gather(1, largest) == 1).all()
    if not qconfig.weight.group_size:  # whose integers reach farther on one side, so that some are clipped
        spec = qconfig.weight
        assert rounding.scale.grad.abs().max() * (64 * spec.qmax) ** 0.5 <= 64 * 0.51  # at most half a step of each


@pytest.mark.parametrize("name", ["int8", "int4", "int3", "int16"])
@pytest.mark.parametrize(
    "layer", [nn.Linear(70, 5), nn.LSTM(70, 5), nn.GRUCell(70, 5), nn.MultiheadAttention(70, 2)], ids=str
)
def test_what_is_learned_is_converted(name, layer):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, x, x)[0] if isinstance(self.layer, nn.MultiheadAttention) else self.layer(x)

    x, mapping = torch.randn(6, 70), QConfigMapping().set_global(learning(fxquant.qconfig.BEST[name]))
    prepared = prepare_qat_fx(Net().train(), mapping, (x,))
    scales = [p for n, p in prepared.named_parameters() if n.endswith("scale")]
    before = [scale.detach().clone() for scale in scales]
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        first(prepared(x)).square().sum().backward()
        optimizer.step()
    assert scales
    assert not all(map(torch.equal, before, scales))
    prepared.eval()
    with torch.no_grad():
        assert sqnr(first(prepared(x)), first(convert_fx(prepared)(x))) > 45


def first(output):
    return output[0] if isinstance(output, tuple) else output


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.up, self.fc = nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.up(F.relu(self.norm(self.conv(x)))).mean((2, 3)))


def trained(qconfig):
    torch.manual_seed(0)
    prepared = prepare_qat_fx(Net().train(), QConfigMapping().set_global(qconfig), (torch.randn(2, 1, 6, 6),))
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(4):
        optimizer.zero_grad()
        prepared(torch.randn(8, 1, 6, 6)).square().sum().backward()
        optimizer.step()
    return prepared


@pytest.mark.parametrize("qmax", [3, 255])
def test_a_static_network_learns_its_steps(qmax):
    activation = dataclasses.replace(default_qat_qconfig.activation, qmax=qmax)
    prepared = trained(learning(dataclasses.replace(default_qat_qconfig, activation=activation))).eval()
    steps = [m for m in prepared.modules() if isinstance(m, LearnedFakeQuantize)]
    assert len(steps) == 4
    assert sum(isinstance(m, LearnedWeight) for m in prepared.modules()) == 3
    assert all(m.scale.grad is not None and m.scale.grad != 0 for m in steps)
    x = torch.randn(8, 1, 6, 6)
    quantized = convert_fx(prepared)
    with torch.no_grad():
        assert sqnr(prepared(x), quantized(x)) > 30
    assert torch.equal(quantized.x_scale, prepared.x_observer.scale)


def test_a_checkpoint_holds_what_was_learned():
    one, other = trained(learning(default_qat_qconfig)), trained(learning(default_qat_qconfig))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 1, 6, 6)
    assert torch.equal(one.eval()(x), other.eval()(x))


def test_without_training_there_is_nothing_to_learn():
    mapping = QConfigMapping().set_global(learning(default_qat_qconfig))
    with pytest.raises(QConfigError, match=r"'conv' .* range=Learned\(\): use prepare_qat_fx"):
        prepare_fx(Net().eval(), mapping, (torch.randn(2, 1, 6, 6),))
    with pytest.raises(QConfigError, match="use prepare_qat_fx"):
        fxquant.quantize_dynamic(
            nn.Sequential(nn.Linear(2, 2)).eval(), {nn.Linear: learning(fxquant.default_dynamic_qconfig)}
        )


def test_what_cannot_be_learned_is_refused():
    with pytest.raises(QConfigError, match="symmetric integers"):
        learning(fxquant.float_qparams_weight_only_qconfig)
    with pytest.raises(QConfigError, match="symmetric integers"):
        learning(fxquant.float16_dynamic_qconfig)


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(20, 8))

    def forward(self, x):
        return F.embedding(x, self.table)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x))


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(nn.Embedding(20, 8)), lambda: nn.Sequential(nn.EmbeddingBag(20, 8)), Looked]
)
def test_a_table_learns_the_steps_of_the_rows_that_it_reads(make):
    qconfig = learning(QConfig(activation=None, weight=fxquant.default_dynamic_qconfig.weight))
    words = torch.tensor([[3, 4, 3], [0, 7, 7]])
    prepared = prepare_qat_fx(make().train(), QConfigMapping().set_global(qconfig), (words,))
    ((_, scale),) = [(n, p) for n, p in prepared.named_parameters() if n.endswith("scale")]
    prepared(words).square().sum().backward()
    assert set(scale.grad.nonzero().flatten().tolist()) <= {0, 3, 4, 7}
    assert scale.grad.any()
    torch.optim.SGD(prepared.parameters(), 0.01).step()
    prepared.eval()
    assert torch.allclose(prepared(words), convert_fx(prepared)(words), atol=1e-6)


def test_one_weight_has_one_step_size_wherever_it_is_read():
    words, mapping = torch.randint(20, (3, 4)), QConfigMapping().set_global(learning(fxquant.default_dynamic_qconfig))
    prepared = prepare_qat_fx(Tied().train(), mapping, (words,))
    assert prepared.encoder.weight_rounding.scale is prepared.decoder.weight_rounding.scale
    prepared(words).square().sum().backward()
    torch.optim.SGD(prepared.parameters(), 0.01).step()
    prepared.eval()
    quantized = convert_fx(prepared)
    assert quantized.encoder.weight_int8 is quantized.decoder.weight_int8
    assert sqnr(prepared(words), quantized(words)) > 60


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("more", [[], [nn.BatchNorm2d(8)]], ids=["", "BatchNorm2d"])
def test_a_transposed_convolution_in_groups_learns_its_steps(groups, more):
    x, model = torch.randn(4, 4, 5, 5), nn.Sequential(nn.ConvTranspose2d(4, 8, 3, 2, groups=groups), *more)
    prepared = prepare_qat_fx(model.train(), QConfigMapping().set_global(learning(default_qat_qconfig)), (x,))
    scale = prepared.get_parameter("0.weight_rounding.scale")
    before = scale.detach().clone()
    for _ in range(2):
        prepared(x).pow(3).sum().backward()
        torch.optim.SGD(prepared.parameters(), 1e-3).step()
    assert not torch.equal(before, scale)
    prepared.eval()
    with torch.no_grad():
        assert sqnr(prepared(x), convert_fx(prepared)(x)) > 60


def test_a_step_begins_as_the_folded_weights_say():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8))
    model[1].running_var.fill_(0.01)  # folded, the weights are ten times as large
    mapping = QConfigMapping().set_global(learning(default_qat_qconfig))
    prepared = prepare_qat_fx(model.train(), mapping, (torch.randn(2, 4, 6, 6),))
    layer, norm = prepared.get_submodule("0"), prepared.get_submodule("1")
    with torch.no_grad():
        assert sqnr(layer.weight, layer.rounded(norm.weight, norm.running_var)) > 40


@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated")  # torch itself does
def test_a_compiled_model_learns_the_same_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).train()
    mapping = QConfigMapping().set_global(learning(default_qat_qconfig))
    plain = prepare_qat_fx(model, mapping, (torch.randn(2, 2, 6, 6),))
    twin = copy.deepcopy(plain)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for scale in (1, 3):  # the first batch alone makes a range
        x = scale * torch.randn(2, 2, 6, 6)
        for each in (plain, compiled):
            each(x).square().sum().backward()
    for (name, one), other in zip(plain.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(one, other), name
        assert torch.allclose(one.grad, other.grad, rtol=1e-3), name
    assert all(torch.equal(one, other) for one, other in zip(plain.buffers(), twin.buffers(), strict=True))


def test_a_value_begins_with_its_first_batch():
    module = LearnedFakeQuantize(learning(default_qat_qconfig).activation, "'x'")
    module(torch.tensor([-1.0, 1.55]))
    assert module.scale.item() == pytest.approx(0.01)
    assert module.zero_point == 100
    module(torch.tensor([-5.0, 5.0]))
    assert module.scale.item() == pytest.approx(0.01)
