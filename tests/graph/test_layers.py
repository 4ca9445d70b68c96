"""Layers whose own forward calls functions, as EfficientNet's and timm's do, are folded like plain ones."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import convert_fx, default_qat_qconfig_mapping, default_static_qconfig_mapping, fuse_fx, prepare_qat_fx
from tests.samples import prepare, same_bits, sqnr


class PaddingConv(nn.Conv2d):
    """Pads by itself, with a module of its own or a function, as convolutions that came from TensorFlow do."""

    def __init__(self, *sizes, by_module=True, **options):
        super().__init__(*sizes, bias=False, **options)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if by_module else (lambda x: F.pad(x, (0, 1, 0, 1)))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.weight, self.bias, self.stride, (0, 0), self.dilation, self.groups)


class ActingNorm(nn.BatchNorm2d):
    """A normalization with its activation, as timm has it."""

    def __init__(self, size, act):
        super().__init__(size)
        self.act = act

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4D input")
        in_training = True if self.training else (self.running_mean is None and self.running_var is None)
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        return self.act(F.batch_norm(x, *tensors, in_training, self.momentum, self.eps))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn0 = PaddingConv(3, 16, 2, stride=2), nn.BatchNorm2d(16)
        self.deep, self.bn1 = PaddingConv(16, 16, 2, groups=16, by_module=False), ActingNorm(16, nn.ReLU6())
        self.out, self.bn2 = nn.Conv2d(16, 16, 1, bias=False), ActingNorm(16, nn.Identity())
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu6(self.bn0(self.stem(x)))
        x = x + self.bn2(self.out(self.bn1(self.deep(x))))
        return self.head(x.mean((2, 3)))


def trained(net):
    """Return a network with statistics that matter, in eval mode."""
    torch.manual_seed(3)
    for norm in (module for module in net.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.3, 3)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return net.eval()


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def fused(model, x=X):
    result = fuse_fx(model, (x,))
    return result, {fusion.chain for fusion in result._fxquant_record.fusions}


def sites(model):
    """Return what each site was, by its path."""
    return {site.path: site.kind for site in model._fxquant_record.sites}


def test_normalizations_are_folded_into_them():
    model = trained(Net())
    before = copy.deepcopy(model.state_dict())
    result, chains = fused(model)
    assert chains == {("stem", "bn0"), ("deep", "bn1"), ("out", "bn2")}
    assert not [module for module in result.modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [node for node in result.graph.nodes if node.target is torch._assert]
    torch.testing.assert_close(result(X), model(X), rtol=1e-4, atol=1e-4)
    assert same_bits(before, model.state_dict())


def test_such_a_network_is_integer_all_through():
    model = trained(Net())
    quantized = convert_fx(prepare(model, X, mapping=default_static_qconfig_mapping()), data=[(X,)])
    assert sites(quantized) == {
        "stem": "torch.conv2d",  # as the user wrote it
        "deep": "torch.conv2d",
        "out": "nn.Conv2d",
        "head": "nn.Linear",
    }
    assert "float between integers" not in str(fxquant.explain(quantized))
    assert sqnr(model(X), quantized(X)) > 30


def test_entries_of_the_function_decide_first_then_the_layers():
    model, mapping = trained(Net()), default_static_qconfig_mapping()
    by_function = mapping.copy().set_object_type(F.conv2d, None)
    assert set(sites(prepare(model, X, mapping=by_function))) == {"out", "head"}
    by_layer = mapping.copy().set_object_type(nn.Conv2d, None)
    assert set(sites(prepare(model, X, mapping=by_layer))) == {"head"}


def test_files_come_back(tmp_path):
    model = trained(Net())
    quantized = convert_fx(prepare(model, X, mapping=default_static_qconfig_mapping()), data=[(X,)])
    fxquant.save(quantized, tmp_path / "model.fxq")
    for loaded in (fxquant.load(trained(Net()), tmp_path / "model.fxq"), copy.deepcopy(quantized)):
        assert same_bits(loaded(X), quantized(X))


def test_they_train_as_one_and_keep_their_names():
    model = trained(Net()).train()
    prepared = prepare_qat_fx(model, default_qat_qconfig_mapping(), (X,))
    assert {name for name, _ in model.named_parameters()} <= {name for name, _ in prepared.named_parameters()}
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(3):
        prepared(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(prepared.stem.weight, model.stem.weight)
    expected = prepared.eval()(X)
    quantized = convert_fx(prepared)
    assert not [module for module in quantized.modules() if isinstance(module, nn.BatchNorm2d)]
    assert sqnr(expected, quantized(X)) > 30


class Twice(Net):
    """Reads a convolution's weight once more, so that it cannot be folded."""

    def forward(self, x):
        return super().forward(x) + self.stem.weight.sum()


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.stem.register_forward_hook(lambda *_: None)


class Computed(Net):
    """Has a convolution whose stride depends on the input."""

    def forward(self, x):
        x = F.conv2d(x, self.stem.weight, None, stride=x.shape[0] // 2)
        return self.head(self.bn2(self.out(self.bn0(x))).mean((2, 3)))


@pytest.mark.parametrize("case", [Twice, Hooked, Computed])
def test_those_that_are_not_alone_stay_as_they_are(case):
    model = trained(case())
    result, chains = fused(model)
    assert not [chain for chain in chains if chain[0] == "stem"]
    torch.testing.assert_close(result(X), model(X), rtol=1e-4, atol=1e-4)


def test_a_normalization_in_training_mode_stays():
    class Batchwise(ActingNorm):
        def forward(self, x):
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True)

    model = trained(nn.Sequential(nn.Conv2d(3, 8, 1), Batchwise(8, nn.Identity())))
    assert not fused(model)[1]


def test_one_that_kept_code_uses_stays():
    class Early(Net):
        def early(self, x):
            return self.stem(x)

    model = trained(Early())
    result = fuse_fx(model, (X,), preserved_attributes=("early",))
    assert torch.equal(result.early(X), model.early(X))
    torch.testing.assert_close(result(X), model(X), rtol=1e-4, atol=1e-4)
    assert not [fusion for fusion in result._fxquant_record.fusions if fusion.chain[0] == "stem"]
