"""What a model's attributes hold of its layers past its tree leads to the quantized layers."""

import collections
import copy
import functools
import types
import warnings
import weakref

import pytest
import torch
from torch import nn

import fxquant
from fxquant.graph import edit
from fxquant.graph.references import reached, twin_of
from tests.samples import prepare, quantize


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.set_up()

    def forward(self, x):
        return self.run(x)


class ByLambda(Tagger):
    def set_up(self):
        self.tasks = {"tag": lambda x: self.head(self.body(x))}

    def run(self, x):
        return self.tasks["tag"](x)


class ByLocals(Tagger):
    def set_up(self):
        layers = [self.body, self.head]

        def run(x):
            for layer in layers:
                x = layer(x)
            return x

        self.run = run


class ByDefaults(Tagger):
    def set_up(self):
        self.run = lambda x, body=self.body, *, head=self.head: head(body(x))


class ByPartial(Tagger):
    def set_up(self):
        self.run = functools.partial(lambda x: self.head(self.body(x)))


class ByCache(Tagger):
    def set_up(self):
        self.find = functools.lru_cache(lambda name: getattr(self, name))

    def run(self, x):
        return self.find("head")(self.find("body")(x))


class BySlots(Tagger):
    class Holder:
        __slots__ = ("run",)

    def set_up(self):
        self.holder = self.Holder()
        self.holder.run = lambda x: self.head(self.body(x))

    def run(self, x):
        return self.holder.run(x)


class ByWeak(Tagger):
    def set_up(self):
        self.weak = [weakref.ref(self.body), weakref.ref(self.head)]

    def run(self, x):
        return self.weak[1]()(self.weak[0]()(x))


class ByWeakClosure(Tagger):
    def set_up(self):
        body, head = weakref.ref(self.body), weakref.ref(self.head)
        self.run = lambda x: head()(body()(x))


class ByProxy(Tagger):
    def set_up(self):
        self.proxies = [weakref.proxy(self.body), weakref.proxy(self.head)]

    def run(self, x):
        return self.proxies[1](self.proxies[0](x))


class ByWeakMethod(Tagger):
    def set_up(self):
        self.method = weakref.WeakMethod(self.compute)

    def compute(self, x):
        return self.head(self.body(x))

    def run(self, x):
        return self.method()(x)


class ByWeakDict(Tagger):
    def set_up(self):
        self.layers = weakref.WeakValueDictionary(body=self.body, head=self.head)

    def run(self, x):
        return self.layers["head"](self.layers["body"](x))


KINDS = [ByLambda, ByLocals, ByDefaults, ByPartial, ByCache, BySlots, ByWeak, ByWeakClosure, ByProxy, ByWeakMethod,
         ByWeakDict]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [quantize, lambda model, *_: fxquant.quantize_dynamic(model)], ids=["graph", "eager"])
def test_the_quantized_layers_are_what_is_called(kind, make):
    model, x = kind().eval(), torch.randn(3, 16)
    expected = model(x)
    quantized = make(model, x)
    body, head = quantized.get_submodule("body"), quantized.get_submodule("head")
    assert torch.equal(quantized(x), head(body(x)))
    assert fxquant.explain(quantized).coverage.share == 1
    assert torch.equal(model(x), expected)


def test_a_copy_s_closure_has_state_of_its_own():
    class Counting(Tagger):
        def set_up(self):
            count = 0

            def run(x):
                nonlocal count
                count += 1
                return self.head(x), count

            self.run, self.again = run, run

    model, x = Counting().eval(), torch.randn(3, 16)
    twin = edit.mirror(model)
    assert [twin(x)[1], twin(x)[1], model(x)[1]] == [1, 2, 1]
    assert twin.run is twin.again is not model.run


def test_functions_that_lead_to_no_layer_stay_the_same():
    model = Tagger.__new__(Tagger)
    nn.Module.__init__(model)
    seen = []
    model.note, model.scale = seen.append, (lambda x: seen.append(x))
    assert edit.mirror(model).scale is model.scale


def test_hooks_stay_the_user_s():
    model, x = ByLambda().eval(), torch.randn(3, 16)
    seen = []
    model.body.register_forward_hook(lambda module, *_: seen.append(module is model.body))
    twin = edit.mirror(model)
    twin(x)
    assert seen == [False]
    model(x)
    assert seen == [False, True]


def test_what_cannot_be_copied_is_kept():
    values = (value for value in range(3))
    assert twin_of(values, {}) is values


def test_a_deep_copy_is_python_s_own():
    value = {"a": [1, {2}], "b": (torch.ones(2), None)}
    twin = twin_of(value, {})
    assert twin["a"] == value["a"]
    assert twin["a"] is not value["a"]
    assert torch.equal(twin["b"][0], copy.deepcopy(value)["b"][0])


def under(name, hold):
    """Return a model that keeps a second reference to its head, which forward uses."""

    class Second(Tagger):
        def set_up(self):
            object.__setattr__(self, "held", hold(self.head))

        def run(self, x):
            if x.sum() > 1e9:  # which does not trace
                x = 2 * x
            held = self.held
            while not isinstance(held, nn.Linear):
                held = held["head"] if isinstance(held, dict) else getattr(held, "head", None) or held[0]
            return held(self.body(x))

    return pytest.param(Second, id=name)


Pair = collections.namedtuple("Pair", ["head", "size"])


@pytest.mark.parametrize(
    "kind",
    [
        under("itself", lambda layer: layer),
        under("list", lambda layer: [layer]),
        under("tuple", lambda layer: (layer, 1)),
        under("nested", lambda layer: [{"head": (1, layer)[1:]}]),
        under("named", lambda layer: Pair(layer, 1)),
        under("dict", lambda layer: {"head": layer}),
        under("namespace", lambda layer: types.SimpleNamespace(head=layer)),
        under("module", lambda layer: [nn.ModuleList([layer])]),
    ],
)
def test_a_second_reference_is_the_same_quantized_layer(kind):
    model = kind().eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* does not trace")
        quantized = quantize(model, torch.randn(3, 16))
    assert fxquant.explain(quantized).coverage.share == 1
    assert [row.path for row in fxquant.explain(quantized).rows] == ["body", "head"]
    for twin in (quantized, copy.deepcopy(quantized)):
        held = twin.held
        while not isinstance(held, nn.Linear):
            held = held["head"] if isinstance(held, dict) else getattr(held, "head", None) or held[0]
        assert held is twin.head
        assert isinstance(held, fxquant.nn.DynamicQuantizedLinear)


class Slot:
    __slots__ = "layer"

    def __init__(self, layer):
        self.layer = layer

    def find(self):
        return self.layer


class Attribute(dict):
    def __init__(self, layer):
        self.layer = layer


def noted(layer):
    def function():
        return None

    function.layer = layer
    return function


HOLDERS = {
    "partial": (lambda layer: functools.partial(print, layer), lambda held: held.args[0]),
    "partial of a keyword": (lambda layer: functools.partial(print, end=layer), lambda held: held.keywords["end"]),
    "partial of a layer": (lambda layer: functools.partial(layer), lambda held: held.func),
    "set": (lambda layer: {layer}, lambda held: next(iter(held))),
    "frozenset": (lambda layer: frozenset({layer}), lambda held: next(iter(held))),
    "deque": (lambda layer: collections.deque([layer]), lambda held: held[0]),
    "slot": (Slot, lambda held: held.layer),
    "method": (lambda layer: Slot(layer).find, lambda held: held()),
    "default": (lambda layer: lambda layer=layer: layer, lambda held: held()),
    "default of a keyword": (lambda layer: lambda *, layer=layer: layer, lambda held: held()),
    "attribute of a function": (noted, lambda held: held.layer),
    "attribute of a dict": (Attribute, lambda held: held.layer),
    "weak in a partial": (lambda layer: functools.partial(print, weakref.ref(layer)), lambda held: held.args[0]()),
    "weak in a set": (lambda layer: {weakref.ref(layer)}, lambda held: next(iter(held))()),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_whatever_holds_a_layer_holds_that_of_the_copy_and_of_the_quantized_model(name):
    hold, held_by = HOLDERS[name]
    model = Tagger.__new__(Tagger)
    nn.Module.__init__(model)
    model.head = nn.Linear(16, 4)
    model.held = [hold(model.head)]
    twin, quantized = edit.mirror(model), fxquant.quantize_dynamic(model.eval())
    assert isinstance(quantized.head, fxquant.nn.DynamicQuantizedLinear)
    assert held_by(quantized.held[0]) is quantized.head
    assert held_by(twin.held[0]) is twin.head
    assert held_by(model.held[0]) is model.head


def test_what_a_user_hangs_on_a_graph_leads_to_the_copy():
    prepared = prepare(nn.Sequential(nn.Linear(16, 4)), torch.randn(3, 16))
    layer = prepared.get_submodule("0")
    prepared.held, prepared.calls = [layer], [lambda: layer, lambda: prepared]
    twin = copy.deepcopy(prepared)
    assert twin.held[0] is twin.calls[0]() is twin.get_submodule("0")
    assert twin.calls[1]() is twin


def test_what_a_graph_keeps_leads_to_its_quantized_layers():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(16, 4)
            self.held, self.calls = [self.head], [lambda: self.head, lambda: self]

        def forward(self, x):
            return self.head(x)

    quantized = quantize(Kept().eval(), torch.randn(3, 16), preserved_attributes=("held", "calls"))
    assert isinstance(quantized.head, fxquant.nn.DynamicQuantizedLinear)
    for model in (quantized, copy.deepcopy(quantized)):
        assert model.held[0] is model.calls[0]() is model.head
        assert model.calls[1]() is model


def test_a_copied_function_keeps_its_names_and_a_cache_its_size():
    class Named(Tagger):
        def set_up(self):
            @functools.wraps(copy.copy)
            def run(x):
                return self.head(x) if x is not None else later(x)

            if self is None:
                later = None
            self.held = run
            self.cache = functools.lru_cache(maxsize=7, typed=True)(lambda name: getattr(self, name))

    model = Named()
    twin = edit.mirror(model)
    assert twin.held is not model.held
    for name in functools.WRAPPER_ASSIGNMENTS[:4]:
        assert getattr(twin.held, name) == getattr(copy.copy, name)
    assert twin.cache("head") is twin.head
    assert twin.cache.cache_parameters() == {"maxsize": 7, "typed": True}


def test_what_is_reached_only_past_a_module_of_interest_is_not_reached():
    inner, outer = nn.Linear(2, 2), nn.Linear(2, 2)
    outer.held = [inner]
    assert reached({"held": outer}, frozenset({id(inner), id(outer)})) == {id(outer)}
    assert reached({"held": outer}, frozenset({id(inner)})) == {id(inner)}
