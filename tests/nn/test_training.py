"""Who would train a quantized model is told that its integers do not train; adapters, biases and norms train unharmed.

What is called costs nothing for that: a model's outputs require no gradient unless something in it does.
"""

import copy
import pickle

import pytest
import torch
from torch import nn

import fxquant
from fxquant import QConfigMapping, convert_fx, quantize_dynamic
from fxquant.nn import DynamicQuantizedLinear
from fxquant.nn.training import FrozenParameter
from tests.samples import Call, prepare, quantize

ALL = r"requires_grad was set on all parameters of a quantized module, whose weights are integers and do not train: on"

PUT = r"\w+ was put into training mode, but its quantized weights are integers and do not train: "


class Net(nn.Module):
    """Two layers, and a norm between them that stays float and trains."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


MAKERS = {"eager": quantize_dynamic, "graph": lambda model: convert_fx(prepare(model, torch.randn(2, 8)))}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request):
    return request.param


@pytest.fixture
def quantized(make):
    return make(Net().eval())


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def unfreeze(model):
    for parameter in model.parameters():
        parameter.requires_grad = True


TWINS = {
    "itself": lambda m: m,
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "moved": lambda m: m.to(torch.float64),
    "to another device": lambda m: m.to("meta"),
    "loaded": lambda m: m.load_state_dict(m.state_dict()) and m,
    "part": lambda m: nn.Sequential(m, nn.ReLU())[0],
}


@pytest.mark.parametrize("twin_of", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("ask", [nn.Module.requires_grad_, unfreeze])
def test_who_unfreezes_every_parameter_is_warned_and_trains_the_others(quantized, twin_of, ask):
    model = twin_of(quantized)
    with pytest.warns(UserWarning, match=ALL) as caught:
        ask(model)
    assert {warning.filename for warning in caught} == {__file__}
    assert trainable(model) == {"first.bias", "norm.weight", "norm.bias", "last.bias"}


def test_biases_alone_may_train(quantized):
    quantized.requires_grad_(False)
    for name, parameter in quantized.named_parameters():
        if name.endswith("bias"):
            parameter.requires_grad_()
    quantized.train()
    before = copy.deepcopy(quantized.state_dict())
    optimizer = torch.optim.SGD(quantized.parameters(), 0.1)
    quantized(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    changed = {name for name, tensor in quantized.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"first.bias", "norm.bias", "last.bias"}


@pytest.mark.parametrize("twin_of", [TWINS[name] for name in ("itself", "deepcopy", "pickle", "moved", "loaded")])
def test_who_trains_what_the_conversion_left_float_is_warned(quantized, twin_of):
    model, told = twin_of(quantized), PUT + r"only norm\.bias, norm\.weight do\. Train adapters \(LoRA\) beside"
    with pytest.warns(UserWarning, match=told) as caught:
        model.train()
    assert [warning.filename for warning in caught] == [__file__]
    assert model.training
    assert all(part.training for part in model.modules())


def test_who_has_nothing_to_train_is_warned(quantized):
    quantized.requires_grad_(False)
    with pytest.warns(
        UserWarning, match=PUT + r"nothing else in it does, so that backward\(\) of a loss fails"
    ) as caught:
        quantized.train()
    assert len(caught) == 1


@pytest.mark.parametrize(
    "wrap_in", [lambda m: nn.Sequential(m, nn.ReLU()), lambda m: torch.compile(m, backend="eager")]
)
def test_a_wrapper_with_nothing_to_train_warns_too(quantized, wrap_in):
    with pytest.warns(UserWarning, match=PUT + r"only norm\.bias, norm\.weight do") as caught:
        wrap_in(quantized).train()
    assert len(caught) == 1


def test_a_graph_of_calls_alone_warns_too():
    quantized = quantize(Call(nn.functional.linear, 8, 16), torch.randn(2, 16))
    assert not any(isinstance(part, fxquant.nn.base.QuantizedModule) for part in quantized.modules())
    with pytest.warns(UserWarning, match=PUT):
        quantized.train()


def test_a_layer_of_its_own_warns_too():
    with pytest.warns(UserWarning, match="Dynamic" + PUT):
        quantize_dynamic(nn.Linear(8, 4).eval()).train()


def test_a_loaded_file_warns_too(quantized, tmp_path):
    fxquant.save(quantized, tmp_path / "model")
    with pytest.warns(UserWarning, match=r"only norm\.bias, norm\.weight do"):
        fxquant.load(Net().eval(), tmp_path / "model").train()


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(8, 2, bias=False), nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def put_in(model):
    model.last = Adapted(model.last)
    return model


def wrap(model):
    return nn.Sequential(model, nn.Linear(4, 2))


@pytest.mark.parametrize("adapt", [put_in, wrap])
@pytest.mark.parametrize("is_frozen", [False, True])
def test_adapters_and_heads_train_without_a_word(quantized, adapt, is_frozen):
    quantized.requires_grad_(not is_frozen) if is_frozen else None
    model = adapt(quantized).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trainable(model)
    assert not any("int8" in name or "scale" in name for name in changed)


NONE = QConfigMapping()
SILENT = {
    "float": lambda: Net().train(),
    "prepared": lambda: prepare(Net().eval(), torch.randn(2, 8)).train(),
    "eval mode": lambda: quantize_dynamic(Net().eval()).train(False),
    "a float part": lambda: quantize_dynamic(Net().eval()).norm.train(),
    "nothing quantized": lambda: quantize_dynamic(Net().eval(), NONE).train(),
    "nothing quantized in a graph": lambda: convert_fx(prepare(Net().eval(), torch.randn(2, 8), mapping=NONE)).train(),
}


@pytest.mark.parametrize("other", SILENT.values(), ids=SILENT)
def test_what_is_not_quantized_or_not_put_into_training_mode_is_silent(other):
    other()  # a warning is an error in this suite


def test_a_class_with_a_train_of_its_own_warns_too():
    class Own(Net):
        def train(self, mode=True):
            return super().train(mode)

    with pytest.warns(UserWarning, match="Own was put into training mode") as caught:
        quantize_dynamic(Own().eval()).train()
    assert len(caught) == 1


@pytest.mark.parametrize("is_training", [False, True])
def test_a_loss_of_what_does_not_train_fails_in_torch(make, is_training):
    """An error of torch's, "element 0 of tensors does not require grad": .backward() asks nothing of ours, and an
    output that requires a gradient where no parameter does could not become an array, would have frozen layers
    differentiated, and would fail beside adapters. The warning of .train() comes before it.
    """
    model = make(Net().eval().requires_grad_(False))
    if is_training:
        with pytest.warns(UserWarning, match="backward"):
            model.train()
    y = model(torch.randn(2, 8))
    assert y.numpy().shape == (2, 4)
    assert not y.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        y.sum().backward()


def test_the_frozen_parameter_is_a_plain_one_to_others():
    parameter = next(DynamicQuantizedLinear.from_float(nn.Linear(8, 4).half()).parameters())
    assert isinstance(parameter, FrozenParameter)
    assert type(parameter.new_zeros(2)) is torch.Tensor
    assert parameter.requires_grad_(False) is parameter
    assert (parameter.numel(), parameter.dtype) == (0, torch.float16)
