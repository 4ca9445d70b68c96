"""What is written down of a float model: the same for the same computation, another for another."""

import dataclasses
import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant.graph.fingerprint.architecture import Architecture, describe, differences
from fxquant.graph.trace.trace import trace
from fxquant.operators import OPERATORS


class Net(nn.Module):
    def __init__(self, heads=4, act=nn.GELU, factor=1.0, dropout=0.1, eps=1e-5, function=F.gelu, calls=0, mode="mean"):
        super().__init__()
        self.attention = nn.MultiheadAttention(32, heads, dropout=dropout, batch_first=True)
        self.linear, self.act, self.norm = nn.Linear(32, 32), act(), nn.LayerNorm(32, eps=eps)
        self.drop, self.factor, self.function, self.calls, self.mode = (
            nn.Dropout(dropout),
            factor,
            function,
            calls,
            mode,
        )
        self.name_or_path = f"a/folder/{factor}"

    def forward(self, x):
        self.calls += 1
        y = self.function(self.act(self.linear(self.attention(x, x, x)[0])))
        y = F.dropout(self.drop(self.norm(y)), self.drop.p, self.training) * self.factor
        return y.mean(1) if self.mode == "mean" else y.sum(1)


def of_graph(model):
    return describe(trace(model.eval(), OPERATORS).module)


def of_meta(model):
    return describe(trace(model.eval(), OPERATORS, device="meta").module)


VIEWS = pytest.mark.parametrize("view", [of_graph, describe], ids=["graph", "tree"])


@VIEWS
@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"calls": 7}])
def test_what_does_not_count(view, options):
    assert differences(view(Net()), view(Net(**options))) == ([], [])


@pytest.mark.parametrize(
    ("options", "of_tree", "of_nodes"),
    [
        ({"heads": 8}, "module 'attention' is nn.MultiheadAttention(num_heads=8, head_dim=4), in the file "
         "nn.MultiheadAttention(num_heads=4, head_dim=8)", ""),
        ({"act": nn.SiLU}, "module 'act' is nn.SiLU(), in the file nn.GELU(approximate='none')", ""),
        ({"act": functools.partial(nn.GELU, "tanh")}, "nn.GELU(approximate='tanh'), in the file nn.GELU(approx", ""),
        ({"eps": 1e-3}, "module 'norm' is nn.LayerNorm(eps=0.001), in the file nn.LayerNorm(eps=1e-05)", ""),
        ({"factor": 3.0}, "(factor=3.0), in the file", "operator.mul(%8, 3.0), in the file operator.mul(%8, 1.0)"),
        ({"function": F.silu}, "(function=silu), in the file", "is F.silu(%4), in the file F.gelu(%4)"),
        ({"function": lambda x: F.gelu(x) * 0.5}, "(function=<lambda of ", "mul(%5, 0.5), in the file norm(%5)"),
        ({"mode": "sum"}, "(mode='sum'), in the file", "is .sum(%9, 1), in the file .mean(%9, 1)"),
    ],
)  # fmt: skip
def test_what_counts_is_said(options, of_tree, of_nodes):
    (told,), possible = differences(describe(Net()), describe(Net(**options)))
    assert of_tree in told
    assert not possible
    (told, *_), _ = differences(of_graph(Net()), of_graph(Net(**options)))
    assert (of_nodes or of_tree) in told


def test_a_skeleton_on_meta_is_the_same():
    assert of_meta(Net()) == of_graph(Net())


def test_a_lambda_s_constants_count():
    double, treble = (describe(Net(function=f)) for f in (lambda x: x * 2.0, lambda x: x * 3.0))
    assert len(differences(double, treble)[0]) == 1
    assert differences(double, describe(Net(function=lambda x: x * 2.0)))[0] == []


@pytest.mark.parametrize("hold", [lambda f: f, lambda f: [f], lambda f: {"a": f}, lambda f: functools.partial(f)])
def test_a_lambda_s_operators_count(hold):
    plus, times, minus = (
        describe(Net(function=hold(f))) for f in (lambda x: x + 1, lambda x: x * 1, lambda x: -(x + 1))
    )
    assert "operators" in differences(plus, times)[0][0]
    assert len(differences(plus, minus)[0]) == 1
    assert differences(plus, describe(Net(function=hold(lambda y: y + 1))))[0] == []


def test_a_file_that_was_written_before_operators_counted_is_read():
    found = describe(Net(function=lambda x: x * 2.0))
    kind = found.modules[""]
    texts = {name: text for name, text in kind.attributes.items() if "operators" not in name}
    saved = Architecture({**found.modules, "": dataclasses.replace(kind, attributes=texts)})
    assert differences(saved, found) == ([], [])


@VIEWS
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_the_root_count(register, view):
    def hooked(hook):
        model = Net()
        getattr(model, register)(hook)
        return view_of_hooked(view, model)

    double, add = (lambda _, inputs, *__: inputs[0] * 2), (lambda _, inputs, *__: inputs[0] + 2)

    def look(module, inputs, *output):
        print(inputs)

    assert len(differences(hooked(double), view(Net()))[0]) == 1
    assert len(differences(view(Net()), hooked(double))[0]) == 1
    assert len(differences(hooked(double), hooked(add))[0]) == 1
    assert differences(hooked(double), hooked(double)) == ([], [])
    assert differences(hooked(look), view(Net())) == ([], [])


def view_of_hooked(view, model):
    """Return the view of a model: a graph's has the hooks of the model that it was made from."""
    return describe(trace(model.eval(), OPERATORS).module, model) if view is of_graph else view(model)


def test_an_attribute_that_is_read_by_a_computed_name_counts():
    class Reads(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor_2 = factor

        def forward(self, x):
            return x * vars(self)[f"factor_{x.dim()}"]

    assert "factor_2=3.0" in differences(describe(Reads(2.0)), describe(Reads(3.0)))[0][0]


def test_modules_of_one_side_are_told():
    plain = nn.Sequential(nn.Linear(2, 2))
    more = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    idle = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    assert differences(describe(plain), describe(more))[0] == ["module '1', nn.Tanh(), is in this model, not the file"]
    assert differences(describe(more), describe(plain))[0] == ["module '1', nn.Tanh(), is in the file, not this model"]
    assert differences(describe(plain), describe(idle))[0] == []


@VIEWS
def test_it_goes_through_json(view):
    found = view(Net())
    assert Architecture.from_plain(json.loads(json.dumps(found.to_plain()))) == found


def test_dead_and_in_place_nodes():
    class Writes(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.register_buffer("count", torch.zeros(1))
            self.by = by

        def forward(self, x):
            self.count.add_(self.by)
            x.sum() + self.by  # which nothing uses
            return x * 1

    assert of_graph(Writes(1)).nodes == (
        "the argument x", "the tensor count", ".add_(%1, 1)", "operator.mul(%0, 1)", "output(%3)",
    )  # fmt: skip
    assert len(differences(of_graph(Writes(1)), of_graph(Writes(2)))[0]) == 1
