"""What the table takes a module for: subclasses, parametrized and weight-normed modules, LoRA."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import fxquant
from fxquant import QConfigMapping, default_dynamic_qconfig, quantize_dynamic
from fxquant.graph.record import record_of
from fxquant.graph.trace.leaves import redefined
from tests.samples import kinds, leaves, prepare, quantize, same_bits


class MyLinear(nn.Linear):
    """A subclass that adds an initialization and a method, as many do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        nn.init.xavier_uniform_(self.weight)

    def extra_repr(self):
        return "mine"


class MyLSTM(nn.LSTM):
    pass


class MyCell(nn.GRUCell):
    pass


class MyTable(nn.Embedding):
    pass


class MyBag(nn.EmbeddingBag):
    pass


SUBCLASSES = {
    "linear": (lambda: MyLinear(8, 6), nn.Linear, lambda: torch.randn(3, 8)),
    "lstm": (lambda: MyLSTM(8, 6), nn.LSTM, lambda: torch.randn(4, 3, 8)),
    "cell": (lambda: MyCell(8, 6), nn.GRUCell, lambda: torch.randn(3, 8)),
    "embedding": (lambda: MyTable(9, 6), nn.Embedding, lambda: torch.arange(5)),
    "embedding_bag": (lambda: MyBag(9, 6), nn.EmbeddingBag, lambda: torch.arange(6).view(2, 3)),
}
both = pytest.mark.parametrize(
    "way", [lambda m, x: quantize(m, x), lambda m, _: quantize_dynamic(m)], ids=["fx", "eager"]
)


@both
@pytest.mark.parametrize(("make", "base", "inputs"), SUBCLASSES.values(), ids=SUBCLASSES)
def test_a_subclass_with_an_inherited_forward_is_what_its_base_is(way, make, base, inputs):
    model, x = nn.Sequential(make()).eval(), inputs()
    quantized = way(model, x)
    (site,) = record_of(quantized).sites
    assert site.path == "0"
    assert site.kind.endswith(type(model[0]).__name__)
    twin = copy.deepcopy(model)
    twin[0].__class__ = base
    assert same_bits(quantized(x), way(twin, x)(x))


def test_an_entry_for_the_base_covers_a_subclass_and_its_own_goes_before():
    model, x = nn.Sequential(MyLinear(8, 8), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    base = QConfigMapping().set_object_type(nn.Linear, default_dynamic_qconfig)
    assert [site.path for site in prepare(model, x, mapping=base).record.sites] == ["0", "1"]
    own = base.copy().set_object_type(MyLinear, None)
    assert [site.path for site in prepare(model, x, mapping=own).record.sites] == ["1"]
    named = own.copy().set_module_name("0", default_dynamic_qconfig)
    assert [site.path for site in prepare(model, x, mapping=named).record.sites] == ["0", "1"]
    second = QConfigMapping().set_module_name_object_type_order("", nn.Linear, 1, default_dynamic_qconfig)
    assert [site.path for site in prepare(model, x, mapping=second).record.sites] == ["1"]


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Doubled(nn.Linear):
    """Its weight is not what it says."""

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value * 2 if name == "weight" else value


class Reversed(nn.LSTM):
    def permute_hidden(self, hx, permutation):
        return super().permute_hidden(tuple(-h for h in hx), permutation)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Scaled, "it is a subclass of nn.Linear that has a forward of its own"),
        (Doubled, "it is a subclass of nn.Linear that redefines __getattr__"),
        (Reversed, "it is a subclass of nn.LSTM that redefines permute_hidden"),
    ],
)
def test_a_subclass_that_computes_something_else_stays_float_with_a_reason(kind, reason):
    model = nn.Sequential(kind(8, 8), nn.Linear(8, 8)).eval()
    quantized = quantize_dynamic(model)
    assert [left.reason for left in record_of(quantized).skipped] == [reason]
    assert type(quantized[0]) is kind


def test_names_that_forward_does_not_use_may_be_redefined():
    class Named(nn.LSTM):
        def state_dict(self, *args, **kwargs):
            return super().state_dict(*args, **kwargs)

        def check_input(self, input, batch_sizes):
            super().check_input(input, batch_sizes)

    assert redefined(Named, nn.LSTM) == ["check_input"]
    assert redefined(MyLinear, nn.Linear) == []


class Clipped(nn.Module):
    def forward(self, weight):
        return weight.clamp(-0.1, 0.1)


def parametrized(linear):
    parametrize.register_parametrization(linear, "weight", Clipped())
    return linear


def old(function, **options):
    def apply(linear):
        with pytest.warns(FutureWarning, match="deprecated"):
            return function(linear, **options)

    return apply


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": parametrized,
    "two": lambda linear: parametrized(parametrizations.weight_norm(linear)),
    "old weight_norm": old(nn.utils.weight_norm),
    "old spectral_norm": lambda linear: nn.utils.spectral_norm(linear),
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "pruned twice": lambda linear: prune.random_unstructured(
        prune.l1_unstructured(linear, "weight", 0.5), "weight", 0.5
    ),
}


@pytest.fixture(params=NORMS.values(), ids=NORMS)
def normed(request):
    try:
        linear = request.param(nn.Linear(8, 6))
    except pytest.fail.Exception:
        linear = nn.utils.weight_norm(nn.Linear(8, 6))
    model = nn.Sequential(linear, nn.Linear(6, 6))
    x = torch.randn(3, 8)
    model.train()(x)  # spectral_norm takes a step
    return model.eval(), x


@both
def test_the_weight_in_force_is_quantized(normed, way):
    model, x = normed
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = way(model, x)
    assert [site.path for site in record_of(quantized).sites] == ["0", "1"]
    model(x)
    unnormed = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6)).eval()
    with torch.no_grad():
        unnormed[0].weight.copy_(model[0].weight)
        unnormed[0].bias.copy_(model[0].bias)
    unnormed[1].load_state_dict(model[1].state_dict())
    assert same_bits(quantized(x), way(unnormed, x)(x))
    assert kinds(quantized)["0"] == "DynamicQuantizedLinear"
    assert len(list(quantized.state_dict())) == len(list(way(unnormed, x).state_dict()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_prepared_model_computes_what_the_model_does(normed):
    model, x = normed
    prepared = prepare(model, x)
    assert same_bits(prepared(x), model(x))
    assert sorted(prepared.state_dict()) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_copies_pickles_and_checkpoints_of_it(normed, tmp_path):
    model, x = normed
    quantized = quantize(model, x)
    assert same_bits(copy.deepcopy(quantized)(x), quantized(x))
    assert same_bits(pickle.loads(pickle.dumps(quantized))(x), quantized(x))
    fxquant.save(quantized, tmp_path / "m")
    assert same_bits(fxquant.load(model, tmp_path / "m")(x), quantized(x))


@both
def test_a_users_hook_stays_beside_the_norm(way):
    model, x, calls = nn.Sequential(nn.utils.spectral_norm(nn.Linear(8, 6))).eval(), torch.randn(3, 8), []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    quantized = way(model, x)
    assert calls == []
    quantized(x)
    assert calls == [1]
    assert len(model[0]._forward_pre_hooks) == 2


@both
def test_a_recurrent_layers_parametrized_weight(way):
    model, x = nn.Sequential(nn.LSTM(8, 6)).eval(), torch.randn(4, 3, 8)
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    expected = model(x)
    quantized = way(model, x)
    assert kinds(quantized)["0"] == "DynamicQuantizedLSTM"
    for got, want in zip(leaves(quantized(x)), leaves(expected), strict=True):
        assert (got - want).norm() <= 0.03 * want.norm()


def test_a_convolution_with_weight_norm_is_reported_by_its_own_name():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv1d(2, 3, 3)), nn.Linear(8, 8)).eval()
    (left,) = prepare(model, torch.randn(1, 2, 10)).record.skipped
    assert (left.path, left.kind) == ("0", "nn.Conv1d")


@pytest.mark.parametrize("way", [quantize, lambda model, x: quantize_dynamic(model)])
def test_a_convolution_with_weight_norm_is_pickled(way):
    model, x = (
        nn.Sequential(parametrizations.weight_norm(nn.Conv1d(4, 8, 3)), nn.Linear(6, 2)).eval(),
        torch.randn(2, 4, 8),
    )
    quantized = way(model, x)
    quantized.load_state_dict(quantized.state_dict())
    assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), quantized(x))


class LoRA(nn.Module):
    """A wrapper of a base layer with two small ones, as peft has it."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = nn.Linear(8, rank, bias=False), nn.Linear(rank, 8, bias=False)

    def forward(self, x):
        return self.base(x) + self.lora_B(self.lora_A(x)) * 2


class LoRAParameters(nn.Module):
    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(torch.randn(8, rank)), nn.Parameter(torch.randn(rank, 8))

    def forward(self, x):
        return self.base(x) + x @ self.A @ self.B


class LoRASubclass(nn.Linear):
    """A subclass with a forward of its own, as loralib has it."""

    def __init__(self, rank=2):
        super().__init__(8, 8)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(rank, 8)), nn.Parameter(torch.randn(8, rank))

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + F.linear(F.linear(x, self.lora_A), self.lora_B)


@pytest.mark.parametrize(
    ("make", "inside"),
    [
        (lambda: LoRA(nn.Linear(8, 8)), {"0.base", "0.lora_A", "0.lora_B"}),
        (lambda: LoRAParameters(nn.Linear(8, 8)), {"0.base", "0.A", "0.B"}),
        (LoRASubclass, {"0.weight", "0.lora_A", "0.lora_B"}),
    ],
)
def test_lora_is_accounted_for(make, inside):
    model, x = nn.Sequential(make(), nn.Linear(8, 8)).eval(), torch.randn(3, 8)
    quantized = quantize(model, x)
    accounted = {entry.path for entry in (*quantized.record.sites, *quantized.record.skipped)}
    assert accounted == inside | {"1"}
    assert {site.path for site in quantized.record.sites} >= {min(inside & {"0.base", "0.weight"}), "1"}
    assert (quantized(x) - model(x)).norm() <= 0.05 * model(x).norm()
