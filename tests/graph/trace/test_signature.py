"""How a model is called: keywords, *args, **kwargs, fixed arguments, containers; the signature stays."""

import collections
import copy
import dataclasses
import functools
import inspect
import pickle
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import ArgumentError, convert_fx, explain, graph_diff, prepare_fx, quantize_dynamic
from fxquant.graph.module import FxModule
from fxquant.nn import DynamicQuantizedLinear
from tests.samples import everything, same_bits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)


class KeywordOnly(Net):
    def forward(self, x: torch.Tensor, *, mask: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return self.net(x) * mask * scale


class PositionalOnly(Net):
    def forward(self, x, /, mask, scale=2.0):
        return self.net(x) * mask * scale


class Rest(Net):
    def forward(self, x, *others, scale=1.0, **extra):
        for other in others:
            x = x + other
        for name in sorted(extra):
            x = x + extra[name]
        return self.net(x) * scale


class Variadic(Net):
    def forward(self, *inputs):
        return self.net(torch.cat(inputs))


def x_():
    return torch.randn(2, 8)


fixed = pytest.mark.filterwarnings("ignore:.*was traced for")
CALLS = {
    "a dict of keywords": (KeywordOnly, lambda: ((), {"x": x_(), "mask": x_()}), {"as_dict": True}),
    "positional and keyword": (KeywordOnly, lambda: ((x_(),), {"mask": x_()}), {}),
    "positional only": (PositionalOnly, lambda: ((x_(),), {"mask": x_()}), {}),
    "the rest": (Rest, lambda: ((x_(), x_(), x_()), {"a": x_(), "b": x_()}), {}),
    "no rest": (Rest, lambda: ((x_(),), {}), {}),
    "only positional rest": (Variadic, lambda: ((x_(), x_()), {}), {}),
}


@pytest.fixture(params=CALLS.values(), ids=CALLS)
def case(request):
    kind, make, options = request.param
    model, (args, kwargs) = kind().eval(), make()
    given = {"example_inputs": kwargs} if options else {"example_inputs": args, "example_kwargs": kwargs}
    return model, args, kwargs, prepare_fx(model, everything(), **given)


@fixed
def test_a_call_gives_what_the_models_gives(case):
    model, args, kwargs, prepared = case
    assert torch.equal(prepared(*args, **kwargs), model(*args, **kwargs))
    quantized = convert_fx(prepared)
    assert isinstance(quantized, FxModule)
    assert [site.path for site in quantized.record.sites] == ["net"]
    expected = model(*args, **kwargs)
    assert (quantized(*args, **kwargs) - expected).norm() <= 0.02 * expected.norm()


@fixed
def test_the_signature_stays_in_copies_and_pickles_too(case):
    model, args, kwargs, prepared = case
    quantized = convert_fx(prepared)
    for module in (prepared, quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert inspect.signature(module.forward) == inspect.signature(model.forward)
        assert same_bits(module(*args, **kwargs), convert_fx(prepared)(*args, **kwargs)) or module is prepared


@fixed
def test_a_checkpoint_keeps_the_call(case, tmp_path):
    model, args, kwargs, prepared = case
    quantized = convert_fx(prepared)
    fxquant.save(quantized, tmp_path / "m")
    loaded = fxquant.load(model, tmp_path / "m")
    assert inspect.signature(loaded.forward) == inspect.signature(model.forward)
    assert same_bits(loaded(*args, **kwargs), quantized(*args, **kwargs))


def adds_what_is_not_given(forward):
    """A decorator as transformers has: it looks at which arguments are given by name, and adds others."""

    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs["mode"] = kwargs.get("mode") or "double"
        return forward(self, *args, **kwargs)

    return wrapper


class Decorated(Net):
    @adds_what_is_not_given
    def forward(self, x, mode=None):
        return self.net(x) * (2 if mode == "double" else 1)


@fixed
def test_a_decorated_forward_meets_the_arguments_of_the_call():
    model, x = Decorated().eval(), x_()
    prepared = prepare_fx(model, everything(), {"x": x})
    assert isinstance(prepared, FxModule)
    assert torch.equal(prepared(x), model(x))


def test_annotations_that_pickle_could_not_import_are_left_out():
    class Local:
        pass

    class Annotated(Net):
        def forward(self, x: "torch.Tensor", y: Local = None) -> torch.Tensor:
            return self.net(x)

    x = x_()
    quantized = convert_fx(prepare_fx(Annotated().eval(), everything(), x))
    for module in (quantized, pickle.loads(pickle.dumps(quantized))):
        assert str(inspect.signature(module.forward)) == "(x, y=None) -> torch.Tensor"
        assert same_bits(module(x), quantized(x))


class Branches(Net):
    def forward(self, x, mask=None, mode="sum", *others, **extra):
        x = self.net(x)
        if mode == "double":
            x = x * 2
        for other in (*others, *extra.values()):
            x = x + other
        return x if mask is None else x * mask


def test_fixed_arguments_are_warned_about():
    told = r"Branches was traced for mask=None, mode='sum', 1 \*others, \*\*extra of 'a', because its forward branches"
    x = x_()
    with pytest.warns(UserWarning, match=told):
        prepare_fx(Branches().eval(), everything(), (x, None, "sum", x), example_kwargs={"a": x})


@fixed
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: ((x, x, "sum", x), {"a": x}), r"'mask'.* prepared for mask=None.* got a tensor of shape \(2, 8\)"),
        (lambda x: ((x, None, "double", x), {"a": x}), "'mode'.* prepared for mode='sum'.* got mode='double'"),
        (lambda x: ((x, None, "sum"), {"a": x}), r"'others'.* prepared for 1 \*others.* got 0 \*others"),
        (lambda x: ((x, None, "sum", x), {"b": x}), r"'extra'.* for \*\*extra of 'a'.* got \*\*extra of 'b'"),
    ],
)
def test_a_fixed_argument_of_another_value_is_an_error(change, message):
    x = x_()
    prepared = prepare_fx(Branches().eval(), everything(), (x, None, "sum", x), example_kwargs={"a": x})
    args, kwargs = change(x)
    for module in (prepared, convert_fx(prepared), pickle.loads(pickle.dumps(convert_fx(prepared)))):
        with pytest.raises(ArgumentError, match=f"(?s){message}.*prepare the float model again"):
            module(*args, **kwargs)


@fixed
def test_the_check_outlives_dead_code_elimination_and_compiling():
    x = x_()
    quantized = convert_fx(prepare_fx(Branches().eval(), everything(), x))
    quantized.graph.eliminate_dead_code()
    quantized.recompile()
    with pytest.raises(ArgumentError, match="mode='double'"):
        quantized(x, mode="double")
    compiled = torch.compile(quantized, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert same_bits(compiled(x), quantized(x))


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


@dataclasses.dataclass
class Out:
    hidden: torch.Tensor
    extra: dict


class Containers(Net):
    """Takes and gives a dict, a tuple of a tuple, a named tuple and a dataclass."""

    def forward(self, batch, state, pair, out):
        h, (c, d) = state
        x = self.net(batch["x"] + h + c + d) + pair.first + pair.second + out.hidden
        return Out(x, {"pair": Pair(x, h), "list": [c, (d, x)]})


def containers():
    x = x_()
    return {"x": x}, (x, (x, x)), Pair(x, x), Out(x, {})


def test_containers_in_and_out():
    model, inputs = Containers().eval(), containers()
    prepared = prepare_fx(model, everything(), inputs)
    for module in (prepared, convert_fx(prepared)):
        got = module(*inputs)
        assert type(got) is Out
        assert type(got.extra["pair"]) is Pair
    expected, got = model(*inputs), prepared(*inputs)
    assert torch.equal(got.hidden, expected.hidden)
    assert torch.equal(got.extra["list"][1][1], expected.hidden)


class Fields(dict):
    """A dict whose keys are attributes."""

    __getattr__ = dict.__getitem__


class Rows(list):
    """A list of a type of its own."""


class Returns(Net):
    """Gives what a function makes of its output."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(self.net(x))


@pytest.mark.parametrize("twin_of", [copy.copy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("kind", [Fields, Rows])
def test_a_container_of_a_users_type_keeps_it(kind, twin_of):
    model = Returns((lambda y: Fields(y=y)) if kind is Fields else (lambda y: Rows([y]))).eval()
    prepared = prepare_fx(model, everything(), x_())
    for module in (prepared, twin_of(convert_fx(prepared))):
        got = module(x_())
        assert type(got) is kind
        assert (got.y if kind is Fields else got[0]).shape == (2, 8)


def test_a_container_that_no_graph_makes_is_still_what_comes_out():
    model = Returns(lambda y: collections.defaultdict(list, y=y)).eval()
    with pytest.warns(UserWarning, match=r"nor make a container of any type \(a collections.defaultdict"):
        prepared = prepare_fx(model, everything(), x_())
    quantized = convert_fx(prepared)
    assert type(quantized(x_())) is collections.defaultdict
    assert type(quantized.net) is DynamicQuantizedLinear


def test_a_model_whose_graph_fails_is_not_said_to_fail():
    model = Returns(lambda y: y.relu() if isinstance(y, torch.Tensor) else y.absent()).eval()
    with pytest.warns(UserWarning, match=r"Returns runs, but not as it was traced.*its graph fails at 'absent'"):
        prepared = prepare_fx(model, everything(), x_())
    assert len(prepared._fxquant_record.sites) == 1


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_nested_example_inputs_are_prepared_and_refused_by_the_layer():
    nested = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(2, 8)])
    prepared = prepare_fx(Returns(torch.relu).eval(), everything(), nested)
    with pytest.raises(fxquant.CheckError, match="takes a dense tensor, got a nested one"):
        convert_fx(prepared)
    quantized = convert_fx(prepared, check=False)
    with pytest.raises(fxquant.DTypeError, match="takes a dense tensor, got a nested one"):
        quantized(nested)


class Sampler(Net):
    """Its graph gives other values than it does, inside of a dataclass."""

    def forward(self, x):
        return Out(self.net(x) + torch.rand(8), {})


def test_values_inside_of_a_dataclass_are_verified():
    with pytest.warns(UserWarning, match="the graph's first call does not give what the model's does"):
        prepare_fx(Sampler().eval(), everything(), x_())


class Loops(nn.Module):
    """A forward that does not trace, with a method, a hook, and a weight of its own."""

    def __init__(self):
        super().__init__()
        self.net, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor, *rest, steps: int | None = None, **options):
        for row in x:  # the loop
            x = x + self.norm(self.net(row))
        return F.linear(x, self.weight)

    def generate(self, x, steps=2):
        for _ in range(steps):
            x = self(x)
        return x


@pytest.fixture
def whole():
    model, x, calls = Loops().eval(), x_(), []
    model.net.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(
        UserWarning, match=r"(?s)Loops does not trace: .*# the loop.*its modules are quantized where"
    ) as caught:
        prepared = prepare_fx(model, everything(), x)
    assert len(caught) == 1
    assert calls == []
    return model, x, prepared


def test_a_whole_model_that_does_not_trace_is_quantized_inside(whole):
    model, x, prepared = whole
    assert torch.equal(prepared(x), model(x))
    quantized = convert_fx(prepared)
    assert type(quantized.net).__name__ == "DynamicQuantizedLinear"
    assert type(prepared.net) is nn.Linear
    assert type(model.net) is nn.Linear
    assert same_bits(quantized(x), fxquant.quantize_dynamic(model)(x))


def test_it_stays_what_it_was(whole):
    model, x, prepared = whole
    quantized = convert_fx(prepared)
    assert type(quantized) is Loops
    assert inspect.signature(quantized.forward) == inspect.signature(model.forward)
    assert quantized.generate(x).shape == x.shape
    assert len(quantized.net._forward_hooks) == 1
    assert not quantized.training


def test_its_report_names_the_line_and_what_is_out_of_reach(whole):
    explained = explain(convert_fx(whole[2]))
    assert "not traced: the whole model: Loops does not trace" in str(explained)
    assert "# the loop" in str(explained)
    (left,) = [row for row in explained.rows if not row.is_quantized]
    assert left.decision == "float: its forward is not traced, so calls with weights of its own are out of reach"


def test_it_shares_nothing_with_the_model_and_goes_through_a_checkpoint(whole, tmp_path):
    model, x, prepared = whole
    quantized = convert_fx(prepared)
    mine = {t.data_ptr() for t in model.state_dict().values()}
    assert mine.isdisjoint(t.data_ptr() for t in quantized.state_dict().values())
    fxquant.save(quantized, tmp_path / "m")
    assert same_bits(fxquant.load(model, tmp_path / "m")(x), quantized(x))


def test_its_diff_is_module_by_module(whole):
    model, _, prepared = whole
    diff = graph_diff(model, convert_fx(prepared))
    assert {row.name: row.sign for row in diff.rows} == {"net": "~", "norm": " "}
    assert "1 of 2 candidates, " in diff.total


def test_converting_it_twice_is_an_error(whole):
    with pytest.raises(fxquant.ModelStateError, match="got a model that is quantized already"):
        convert_fx(convert_fx(whole[2]))


@pytest.mark.parametrize("name", ["class", "in"])
def test_a_submodule_with_the_name_of_a_keyword(name):
    model, x = nn.Sequential(nn.ModuleDict({name: nn.Linear(8, 8)}), nn.ReLU()).eval(), x_()

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts, self.out = model[0], nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.parts[name](x))

    outer = nn.Sequential(Calls(), nn.Linear(8, 8)).eval()
    quantized = convert_fx(prepare_fx(outer, everything(), x))
    assert f"'0.parts.{name}' contains the Python keyword '{name}'" in quantized.record.untraced["0"]
    assert [site.path for site in quantized.record.sites] == [f"0.parts.{name}", "0.out", "1"]
    assert (quantized(x) - outer(x)).norm() <= 0.05 * outer(x).norm()


def test_a_diff_of_submodules_with_the_names_of_keywords():
    model = nn.Sequential(nn.ModuleDict({"for": nn.Linear(8, 8)})).eval()
    rows = graph_diff(model, quantize_dynamic(model)).rows
    assert [(row.name, row.sign) for row in rows] == [("0.for", "~")]


def test_a_parameter_with_the_name_of_a_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_parameter("lambda", nn.Parameter(torch.randn(8, 8)))

        def forward(self, x):
            return F.linear(x, getattr(self, "lambda"))

    with pytest.raises(fxquant.TraceError, match=r"'lambda' contains the Python keyword 'lambda'.*rename it"):
        prepare_fx(Model().eval(), everything(), x_())


class Tokens(nn.Module):
    """Forward's order is not that of its callers."""

    def __init__(self):
        super().__init__()
        self.words, self.types, self.head = nn.Embedding(20, 16), nn.Embedding(20, 16), nn.Linear(16, 4)

    def forward(self, ids, mask=None, kinds=None):
        x = self.words(ids) if kinds is None else self.words(ids) + self.types(kinds)
        return self.head(x if mask is None else x * mask.unsqueeze(-1))


class TokensByKeyword(Tokens):
    def forward(self, ids, *, mask, kinds):
        return super().forward(ids, mask, kinds)


class TokensWithDefault(Tokens):
    def forward(self, ids, scale=2.0, kinds=None):
        return self.head(self.words(ids) * scale + self.types(kinds))


class TokensOfAnyName(Tokens):
    def forward(self, *args, **named):
        return super().forward(*args, **named)


IDS, KINDS, MASK = torch.arange(6).view(2, 3), torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[1, 1, 0]] * 2)


@pytest.mark.filterwarnings("ignore:.* was traced for")
@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        (Tokens, (), {"ids": IDS, "kinds": KINDS, "mask": MASK}),
        (Tokens, (), {"kinds": KINDS, "mask": MASK, "ids": IDS}),
        (Tokens, (IDS,), {"kinds": KINDS, "mask": MASK}),
        (Tokens, (IDS,), {"kinds": KINDS}),  # one in the middle left out
        (TokensByKeyword, (IDS,), {"kinds": KINDS, "mask": MASK}),
        (TokensWithDefault, (IDS,), {"kinds": KINDS}),
        (TokensOfAnyName, (IDS,), {"kinds": KINDS, "mask": MASK}),
        (TokensOfAnyName, (IDS, MASK, KINDS), {}),
    ],
)
def test_an_export_takes_keywords_by_name(kind, args, kwargs):
    quantized = convert_fx(prepare_fx(kind().eval(), everything(), args, example_kwargs=kwargs))
    exported = torch.export.export(quantized, args, kwargs).module()
    wanted = quantized(*args, **kwargs)
    assert same_bits(exported(*args, **kwargs), wanted)
    assert same_bits(exported(*args, **dict(reversed(kwargs.items()))), wanted)


def test_a_strict_and_a_dynamic_export_take_keywords_by_name():
    kwargs, batch = {"ids": IDS, "kinds": KINDS, "mask": MASK}, torch.export.Dim("batch")
    quantized = convert_fx(prepare_fx(Tokens().eval(), everything(), kwargs))
    more = {name: torch.cat([tensor, tensor]) for name, tensor in kwargs.items()}
    shapes = {name: {0: batch} for name in kwargs}
    exported = torch.export.export(quantized, (), kwargs, dynamic_shapes=shapes).module()
    assert same_bits(exported(**more), quantized(**more))
    exported = torch.export.export(quantized, (), kwargs, strict=True).module()
    assert same_bits(exported(**kwargs), quantized(**kwargs))


def test_another_interpreter_counts_arguments_off_as_ever():
    quantized = convert_fx(prepare_fx(Tokens().eval(), everything(), (IDS, MASK, KINDS)))

    def run(*args, **kwargs):  # of the name that torch.export's frame has, and not what is handed on
        return torch.fx.Interpreter(quantized).run(*args)

    assert same_bits(run(IDS, MASK, KINDS, verbose=True), quantized(IDS, MASK, KINDS))
