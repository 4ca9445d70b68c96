"""Parts of a model that are named as something of torch.fx's GraphModule, or of ours."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant import (
    TraceError,
    convert_fx,
    default_dynamic_qconfig_mapping,
    fuse_fx,
    load,
    prepare_fx,
    quantize_dynamic,
    save,
)
from fxquant.graph.module import FxModule, build
from fxquant.graph.record import Record
from fxquant.graph.trace.names import names_in, taken_names

# A user cannot reach a part that is named as a method of nn.Module, and nobody uses our private name.
NAMES = sorted(name for name in taken_names() if not hasattr(nn.Module(), name) and "_fxquant" not in name)


class Model(nn.Module):
    """Has a part of a name, and calls it."""

    def __init__(self, name, part):
        super().__init__()
        self.name = name
        setattr(self, name, part)

    def forward(self, x):
        return getattr(self, self.name)(x)


class Reads(nn.Module):
    """Has a tensor of a name beside a layer, and reads it."""

    def __init__(self, name, tensor):
        super().__init__()
        self.name, self.layer = name, nn.Linear(6, 4)
        self.register_buffer(name, tensor) if type(tensor) is torch.Tensor else self.register_parameter(name, tensor)

    def forward(self, x):
        return F.linear(self.layer(x), getattr(self, self.name))


def by_fx(model, x):
    return convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), x))


def test_the_names_are_those_of_torch_fx_and_ours():
    assert {"code", "graph", "meta", "recompile", "print_readable", "to_folder", "add_submodule"} <= {*NAMES}
    assert {"_graph", "_code"} <= {*NAMES}  # attributes of instances
    assert not {"record", "weight", "layer"} & taken_names()
    graph = build(nn.Module(), fx.Graph(), "Empty", Record(stage="fused"))
    others = {"smart_apply"}  # which transformers adds to nn.Module where it is imported
    names = {name for name in dir(graph) if not name.startswith("___")} - others  # without Dynamo's either
    shared = {*dir(object), "__module__", "get_extra_state", "set_extra_state"}
    assert names - shared <= taken_names()
    theirs = {*dir(fx.GraphModule(nn.Module(), fx.Graph())), "_fxquant_view", "__prepare_scriptable__"}
    assert taken_names() - theirs == {"_fxquant_record"}  # all that a graph of ours has beyond torch.fx's


def test_a_graph_that_ran_a_kept_method_has_no_name_that_is_free():
    kind = type("Mine", (nn.Sequential,), {"mine": lambda self, x: self(x)})
    model, x = kind(nn.Linear(6, 4)).eval(), torch.randn(2, 6)
    quantized = convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), x, preserved_attributes=("mine",)))
    before = {*dir(type(quantized))}
    quantized.mine(x)
    assert {*dir(type(quantized))} - before <= taken_names()


def test_names_in_code_are_those_of_what_is_inside_it_too():
    def one(self):
        def two():
            def three():
                return self.innermost

            return three

        return [self.body for _ in range(2)], two

    @functools.wraps(one)
    def wrapper(self):
        return one(self)

    for function in (one, wrapper, property(one)):
        assert names_in(function) == {"body", "innermost", "range"}
    assert names_in(len) == set()


OURS = ["build", "check_settable", "take_old_keys", "record"]


@pytest.mark.parametrize("name", OURS)
def test_a_name_of_a_function_of_ours_is_free(name):
    model, x = Model(name, nn.Linear(6, 4)).eval(), torch.randn(2, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = by_fx(model, x)
    assert isinstance(quantized, FxModule)
    assert [site.path for site in quantized._fxquant_record.sites] == [name]


@pytest.mark.parametrize("name", OURS)
def test_a_method_of_such_a_name_can_be_preserved(name):
    kind = type("Mine", (nn.Linear,), {name: lambda self, y: (self, y), "forward": lambda self, x: self.inner(x)})
    model, x = kind(1, 1).eval(), torch.randn(2, 6)
    model.inner = nn.Linear(6, 4)
    quantized = convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), x, preserved_attributes=(name,)))
    quantized.other = 3
    quantized.load_state_dict(quantized.state_dict())
    for twin in (quantized, copy.copy(quantized), copy.deepcopy(quantized)):
        assert getattr(twin, name)(4)[1] == 4


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_of_such_a_name_is_quantized_where_it_stands(name):
    torch.manual_seed(0)
    model, x = Model(name, nn.Sequential(nn.Linear(6, 4), nn.ReLU())).eval(), torch.randn(2, 6)
    with pytest.warns(
        UserWarning, match=rf"Model has a part self\.{name}, .* is something else; give the part another name"
    ):
        quantized = by_fx(model, x)
    assert type(quantized) is Model
    assert torch.equal(quantized(x), quantize_dynamic(model)(x))
    with pytest.raises(TraceError, match=rf"Model has a part self\.{name}, "):
        fuse_fx(model, x)


@pytest.mark.parametrize("tensor", [nn.Parameter(torch.ones(3, 4)), torch.ones(3, 4)], ids=["parameter", "buffer"])
def test_a_tensor_of_such_a_name(tensor):
    for name in ("code", "meta", "_graph"):
        with pytest.warns(UserWarning, match=rf"Reads has a part self\.{name}, "):
            quantized = by_fx(Reads(name, tensor).eval(), torch.ones(2, 6))
        assert quantized(torch.ones(2, 6)).shape == (2, 3)


def test_where_there_is_nothing_else_to_quantize_the_name_is_the_error():
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.code = nn.Parameter(torch.ones(3, 4))

        def forward(self, x):
            return F.linear(x, self.code)

    with pytest.raises(TraceError, match=r"Alone has a part self\.code, "):
        by_fx(Alone().eval(), torch.ones(2, 4))


def test_further_down_and_unused_such_names_are_free():
    inner = nn.ModuleDict({name: nn.Linear(6, 6) for name in NAMES if not name.startswith("__")})

    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.record, self.code = inner, nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            for layer in self.inner.values():
                x = layer(x)
            return self.record(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized = by_fx(Deep().eval(), torch.randn(2, 6))
    assert isinstance(quantized, FxModule)
    assert len(quantized._fxquant_record.sites) == len(inner) + 1


class Selfish(Model):
    """Has a part that is called self, and calls layers after it, which generated code finds in its own self."""

    def __init__(self, part):
        super().__init__("self", part)
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        part = getattr(self, self.name)
        return self.last(part(x) if isinstance(part, nn.Module) else F.linear(x, part))


def test_a_part_named_self_is_one_like_any_other(tmp_path):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 6), torch.randn(6, 6)
    layer = nn.Linear(6, 6, bias=False)
    layer.weight.data.copy_(weight)
    for part in (layer, nn.Parameter(weight), nn.Buffer(weight)):
        quantized = by_fx(Selfish(part).eval(), (x,))
        assert len(quantized._fxquant_record.sites) == 2
        save(quantized, tmp_path / "model.safetensors")
        loaded = load(Selfish(part).eval(), tmp_path / "model.safetensors")
        expected = quantize_dynamic(nn.Sequential(layer, quantized.last).eval())(x)
        for twin in (quantized, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), loaded):
            assert torch.equal(twin(x), expected)


def test_an_argument_named_self_is_an_error_that_says_so():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(this, self):  # noqa: N805
            return this.layer(self)

    x = torch.randn(2, 6)
    with pytest.raises(TraceError, match=r"Odd does not trace: forward has a second argument 'self', .*; rename it"):
        fuse_fx(Odd().eval(), x)
    with pytest.warns(UserWarning, match="forward has a second argument 'self'"):
        quantized = by_fx(Odd().eval(), (x,))
    assert [site.path for site in quantized._fxquant_record.sites] == ["layer"]
