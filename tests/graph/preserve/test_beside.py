"""What code that is not traced calls of the model past its tree: it is quantized, saved, and fused with nothing."""

import copy
import functools
import pickle
import weakref

import pytest
import torch
from torch import nn

from fxquant import explain, load, prepare_fx, save
from tests.samples import everything, kinds, quantize, same_bits


class Holder:
    def __init__(self, module):
        self.module = module


REACHES = {
    "list": lambda module: [module],
    "tuple": lambda module: (module,),
    "dict": lambda module: {"shared": module},
    "object": Holder,
    "lambda": lambda module: lambda x: module(x),
    "partial": lambda module: functools.partial(lambda module, x: module(x), module),
    "weakref": weakref.ref,
}
CALLS = {
    "list": lambda held, x: held[0](x),
    "tuple": lambda held, x: held[0](x),
    "dict": lambda held, x: held["shared"](x),
    "object": lambda held, x: held.module(x),
    "lambda": lambda held, x: held(x),
    "partial": lambda held, x: held(x),
    "weakref": lambda held, x: held()(x),
}


class Branch(nn.Module):
    """A module that does not trace, and calls one that it does not hold in its tree."""

    def __init__(self, module, way):
        super().__init__()
        self.out, self.held, self.way = nn.Linear(64, 64), REACHES[way](module), way

    def forward(self, x):
        y = CALLS[self.way](self.held, x)
        return self.out(y) if y.sum() < 1e9 else y


class Parent(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.shared, self.spare = nn.Linear(64, 64), nn.Linear(64, 64)
        self.branch, self.last = Branch(self.shared, way), nn.Linear(64, 64)

    def forward(self, x):
        return self.last(self.branch(x))


X = torch.randn(2, 64)


@pytest.mark.parametrize("way", REACHES)
def test_a_module_that_only_untraced_code_calls_is_quantized(way):
    model = Parent(way).eval()
    quantized = quantize(model, X)
    explained = explain(quantized)
    assert {row.path: row.decision for row in explained.rows} == dict.fromkeys(
        ("shared", "branch.out", "last"), "default_dynamic_qconfig"
    )
    assert explained.coverage.share == 1.0
    assert kinds(quantized)["shared"] == "DynamicQuantizedLinear"
    expected = quantized.last(quantized.branch.out(quantized.shared(X)))
    assert same_bits(quantized(X), expected)


@pytest.mark.parametrize("way", ["list", "dict", "weakref"])
def test_it_is_saved_and_loaded_and_copied(way, tmp_path):
    quantized = quantize(Parent(way), X)
    save(quantized, tmp_path / "model.safetensors")
    with torch.device("meta"):
        skeleton = Parent(way).eval()
    loaded = load(skeleton, tmp_path / "model.safetensors")
    is_copied = way != "weakref"  # which copy.deepcopy takes as it is
    copies = [copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))] if is_copied else []
    for twin in (loaded, *copies):
        assert same_bits(twin(X), quantized(X))
        twin.shared.bias.data.add_(1.0)  # which the branch calls, and not the original's
        assert not same_bits(twin(X), quantized(X))


def test_it_is_not_fused_with_what_follows_in_the_graph():
    class Both(Parent):
        def __init__(self, way):
            super().__init__(way)
            self.norm = nn.BatchNorm1d(64)

        def forward(self, x):
            return self.norm(self.shared(x)) + self.branch(x)

    model = Both("list").eval()
    model.norm.running_mean.fill_(3.0)
    prepared = prepare_fx(model, everything(), (X,))
    assert same_bits(prepared(X), model(X))
    assert "not fused: shared → norm: code beside the graph uses shared" in explain(prepared).footer


def test_one_inside_another_module_brings_that_along():
    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.ModuleDict({"shared": nn.Linear(64, 64)})
            self.branch = Branch(self.inner["shared"], "list")

        def forward(self, x):
            return self.branch(x)

    quantized = quantize(Nested(), X)
    assert kinds(quantized)["inner.shared"] == "DynamicQuantizedLinear"
    assert quantized.branch.held[0] is quantized.inner.shared


def test_a_way_back_to_the_model_itself_brings_all_of_it_along():
    class Root(Parent):
        def __init__(self):
            super().__init__("list")
            self.branch.owner = (self,)

    quantized = quantize(Root(), X)
    assert {"shared", "spare"} <= kinds(quantized).keys()
    assert quantized.branch.owner[0].spare is quantized.spare
