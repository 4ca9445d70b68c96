"""prepare_fx, convert_fx and fuse_fx as a user meets them: forms, hooks, attributes, stages, a row of one's own."""

import collections
import copy
import dataclasses
import inspect
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    OPERATORS,
    AttributeNameError,
    ModelStateError,
    Operator,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    fuse_fx,
    prepare_fx,
)
from tests.samples import SCHEMES, WordLM, everything, kinds, leaves, lm_inputs, prepare, quantize, same_bits


class Net(nn.Module):
    """A Linear whose forward is given."""

    def __init__(self, forward):
        super().__init__()
        self.net = nn.Linear(4, 4)
        self.use = forward

    def forward(self, x):
        return self.use(self, x)


def test_the_names_are_where_torch_ao_has_them():
    from fxquant import quantize_fx

    for name in ("prepare_fx", "convert_fx", "fuse_fx"):
        assert getattr(quantize_fx, name) is getattr(fxquant, name)
    assert list(inspect.signature(prepare_fx).parameters)[:3] == ["model", "qconfig_mapping", "example_inputs"]


# Forms of inputs and outputs.


@dataclasses.dataclass
class Scores(dict):
    """A dataclass that is a dict, as transformers' outputs are."""

    y: torch.Tensor
    loss: torch.Tensor | None = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


torch.utils._pytree.register_pytree_node(
    Scores,
    lambda scores: (list(scores.values()), list(scores)),
    lambda values, names: Scores(**dict(zip(names, values, strict=True))),
)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: {"y": m.net(x), "x": x},
        lambda m, x: (m.net(x), x, None),
        lambda m, x: [m.net(x), [x, {"deep": x}]],
        lambda m, x: None if m.net(x) is None else (None, m.net(x)),
        lambda m, x: {"pair": (m.net(x), 3), "text": "a", "none": None},
        lambda m, x: x,
        lambda m, x: collections.OrderedDict(y=m.net(x), x=x),
        lambda m, x: [Scores(y=m.net(x)), x],
    ],
)
def test_outputs_keep_their_form(forward):
    model, x = Net(forward).eval(), torch.randn(2, 4)
    expected, prepared = model(x), prepare(model, x)
    for got in (prepared(x), convert_fx(prepared)(x)):
        flat, spec = torch.utils._pytree.tree_flatten(got)
        flat_expected, spec_expected = torch.utils._pytree.tree_flatten(expected)
        assert spec == spec_expected
        for a, b in zip(flat, flat_expected, strict=True):
            assert type(a) is type(b)
            assert isinstance(a, torch.Tensor) or a == b


class Options(nn.Module):
    """Defaults, keywords, numbers, and a structure of tensors."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, 4)

    def forward(self, x, pair, scale: float = 2.0, shift=None, *, power: int = 1):
        a, b = pair
        y = self.net(x) * scale + a - b["b"]
        return y**power


def test_inputs_keep_their_form_and_defaults():
    model = Options().eval()
    pair = torch.ones(2, 4), {"b": torch.zeros(2, 4)}
    inputs = torch.randn(2, 4), pair
    prepared = prepare(model, *inputs)
    assert torch.equal(prepared(*inputs), model(*inputs))
    assert torch.equal(prepared(*inputs, 3.0), model(*inputs, 3.0))
    quantized = convert_fx(prepared)
    assert torch.equal(quantized(*inputs), quantized(*inputs, 2.0, None))
    assert torch.equal(quantized(*inputs, scale=5.0, power=2), quantized(*inputs, 5.0, power=2))
    assert (quantized(*inputs, 5.0) - model(*inputs, 5.0)).norm() < 0.1 * model(*inputs, 5.0).norm()


def test_non_tensor_example_inputs():
    class Model(Options):
        def forward(self, x, scale, name, flag, nothing):
            return self.net(x) * scale

    model, inputs = Model(), (torch.randn(2, 4), 3.0, "name", True, None)
    prepared = prepare(model, *inputs)
    assert torch.equal(prepared(*inputs), model(*inputs))
    assert torch.equal(prepared(inputs[0], 5.0, "other", False, None), model(inputs[0], 5.0, "", True, None))


def test_other_batch_sizes_and_lengths_than_the_examples():
    model = WordLM().eval()
    quantized = quantize(model, *lm_inputs(model, 5, 3))
    for time, batch in ((1, 1), (9, 2), (0, 3), (4, 0)):
        output, hidden = quantized(*lm_inputs(model, time, batch))
        assert output.shape == (time, batch, 50)
        assert hidden[0].shape == (2, batch, 8)


def test_a_model_without_memory_is_prepared_on_inputs_without_memory():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(8, 6), nn.ReLU()).eval(), torch.randn(3, 8)
        quantized = convert_fx(prepare_fx(model, everything(), x))
        y = quantized(x)
    assert (y.shape, y.is_meta, len(fxquant.explain(quantized).rows)) == ((3, 6), True, 1)


def test_an_empty_batch_as_the_example():
    model = WordLM().eval()
    quantized = quantize(model, *lm_inputs(model, 5, 0))
    inputs = lm_inputs(model, 5, 3)
    assert same_bits(quantized(*inputs), quantize(model, *inputs)(*inputs))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_dtypes(dtype):
    model = WordLM().eval().to(dtype)
    inputs = lm_inputs(model)
    prepared = prepare(model, *inputs)
    quantized = convert_fx(prepared)
    assert same_bits(prepared(*inputs), model(*inputs))
    for got, expected in zip(leaves(quantized(*inputs)), leaves(model(*inputs)), strict=True):
        assert got.dtype == expected.dtype == dtype
        assert (got.double() - expected.double()).norm() < 0.05 * expected.double().norm()


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "grad"])
def test_any_grad_mode(mode):
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[mode]
    with context():
        quantized = quantize(model, x)
        assert quantized(x).shape == (2, 4)
    assert torch.equal(quantized(x), quantize(model, x)(x))


def test_the_default_device_is_left_alone():
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    prepare(model, x)
    assert torch.empty(1).device.type == "cpu"
    assert torch.is_grad_enabled()


# Hooks.


class Log:
    """A hook that can be copied and pickled, and counts its calls on the class."""

    count = 0

    def __init__(self, add=0):
        self.add = add

    def __call__(self, module, args, output=None):
        Log.count += 1
        return output + self.add if isinstance(output, torch.Tensor) else None


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.inner(x))


def hooked(place):
    model = nn.Sequential(Block(), nn.Linear(4, 4)).eval()
    target = {"leaf": model[1], "container": model[0], "root": model, "inner leaf": model[0].inner}[place]
    target.register_forward_hook(Log(add=10))
    return model


PLACES = ["leaf", "container", "root", "inner leaf"]


@pytest.mark.parametrize("place", PLACES)
def test_hooks_are_not_fired_by_prepare_and_convert(place):
    model, x = hooked(place), torch.randn(2, 4)
    Log.count = 0
    quantize(model, x)
    assert Log.count == 0


@pytest.mark.parametrize("place", PLACES)
def test_hooks_fire_once_a_call_at_each_stage_and_in_twins(place):
    model, x = hooked(place), torch.randn(2, 4)
    expected = model(x)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    assert torch.equal(prepared(x), expected)
    twins = [
        twin(m) for m in (prepared, quantized) for twin in (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)))
    ]
    for module in (prepared, quantized, *twins):
        Log.count = 0
        output = module(x)
        assert Log.count == 1
        assert (output - expected).abs().max() < 0.2  # without the hook's + 10 it would not be


@pytest.mark.parametrize("place", PLACES)
def test_a_hook_added_to_the_result_is_not_the_models(place):
    model, x = hooked(place), torch.randn(2, 4)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    counts = [[len(m._forward_hooks) for m in tree.modules()] for tree in (model, prepared)]
    for module in (*quantized.modules(),):
        module.register_forward_hook(Log())
    assert [[len(m._forward_hooks) for m in tree.modules()] for tree in (model, prepared)] == counts


def test_every_kind_of_hook_survives():
    model, x, calls = nn.Sequential(nn.Linear(4, 4)).eval(), torch.randn(2, 4), []
    model[0].register_forward_pre_hook(lambda m, a: calls.append("pre"))
    model[0].register_forward_pre_hook(lambda m, a, k: calls.append("pre with kwargs"), with_kwargs=True)
    model[0].register_forward_hook(lambda m, a, k, o: calls.append("with kwargs"), with_kwargs=True)
    model[0].register_forward_hook(lambda m, a, o: calls.append("always"), always_call=True)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    assert calls == []
    for module in (prepared, quantized):
        calls.clear()
        module(x)
        assert calls == ["pre", "pre with kwargs", "with kwargs", "always"]


def test_a_hook_that_changes_the_input_is_in_force():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4)
    model[0].register_forward_pre_hook(lambda m, args: (args[0] * 3,))
    assert torch.equal(quantize(model, x)(x), quantize(nn.Sequential(nn.Linear(4, 4)), x)(x)) is False
    assert (quantize(model, x)(x) - model(x)).norm() < 0.1 * model(x).norm()


def test_hooked_modules_are_not_fused_away():
    model, x, seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(2, 4), []
    model[0].register_forward_hook(lambda m, a, o: seen.append(o.min().item()))
    quantized = quantize(model, x)
    assert kinds(quantized) == {"": "Sequential", "0": "DynamicQuantizedLinear", "1": "ReLU"}
    quantized(x)
    assert seen[0] < 0


def test_the_model_has_no_hooks_of_ours():
    model = WordLM()
    quantize(model, *lm_inputs(model))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# Preserved attributes.


class Rich(WordLM):
    version = "3"

    def __init__(self):
        super().__init__()
        self.vocabulary = {"<eos>": 0}

    @property
    def size(self):
        return self.nhid * self.nlayers

    @staticmethod
    def tokenize(text):
        return text.split()

    @classmethod
    def kind(cls):
        return cls.__name__

    def twice(self, bsz):
        return self.init_hidden(bsz), self.init_hidden(bsz)


NAMES = ("init_hidden", "nhid", "nlayers", "vocabulary", "size", "tokenize", "kind", "version", "twice")


def stages_of(model, **options):
    prepared = prepare(model, *lm_inputs(model), **options)
    quantized = convert_fx(prepared)
    yield from (prepared, quantized)
    for module in (prepared, quantized):
        yield from (copy.deepcopy(module), pickle.loads(pickle.dumps(module)))


def test_preserved_attributes_are_reachable_at_every_stage_and_in_twins():
    model = Rich()
    for module in stages_of(model, preserved_attributes=NAMES):
        assert (module.nhid, module.nlayers, module.size) == (8, 2, 16)
        assert module.vocabulary == {"<eos>": 0}
        assert module.tokenize("a b") == ["a", "b"]
        assert module.version == "3"
        assert isinstance(module.kind(), str)
        hidden = module.init_hidden(3)
        assert [h.shape for h in hidden] == [(2, 3, 8)] * 2
        assert hidden[0].dtype == torch.float32
        assert len(module.twice(2)) == 2
        assert module(torch.zeros(4, 3, dtype=torch.int64), hidden)[0].shape == (4, 3, 50)


def test_what_a_preserved_method_names_comes_along():
    model = Rich()
    for module in stages_of(model, preserved_attributes=("twice",)):
        assert [h.shape for pair in module.twice(3) for h in pair] == [(2, 3, 8)] * 4
        assert not hasattr(module, "vocabulary")


def test_a_preserved_method_brings_no_float_weights_along():
    class Model(WordLM):
        def embed(self, ids):
            return self.encoder(ids)

    model = Model()
    quantized = quantize(model, *lm_inputs(model), preserved_attributes=("embed",))
    ids = torch.arange(4)
    assert (quantized.record.preserved.bound, quantized.record.preserved.kept) == (("embed",), ("encoder",))
    assert torch.equal(quantized.embed(ids), quantized.encoder(ids))


def test_a_preserved_value_is_a_copy():
    model = Rich()
    quantized = quantize(model, *lm_inputs(model), preserved_attributes=("vocabulary",))
    quantized.vocabulary["new"] = 1
    assert model.vocabulary == {"<eos>": 0}


def test_an_unknown_preserved_attribute_is_an_error_with_the_nearest():
    model = WordLM()
    with pytest.raises(
        AttributeNameError, match="names 'init_hiden', which WordLM does not have; did you mean 'init_hidden'"
    ):
        prepare(model, *lm_inputs(model), preserved_attributes=("init_hiden",))


def test_fuse_fx_preserves_too():
    model = WordLM().eval()
    assert fuse_fx(model, preserved_attributes=("init_hidden", "nlayers", "nhid")).init_hidden(2)[0].shape == (2, 2, 8)


# Stages.


def test_convert_of_something_else_is_an_error():
    for thing in (nn.Linear(2, 2), None, torch.fx.symbolic_trace(nn.Linear(2, 2))):
        with pytest.raises(
            ModelStateError, match=rf"convert_fx needs the result of prepare_fx\(.*got {type(thing).__name__}"
        ):
            convert_fx(thing)


def test_convert_of_a_quantized_model_is_an_error():
    with pytest.raises(ModelStateError, match="got a model that is quantized already"):
        convert_fx(quantize(nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)))


def test_convert_of_a_fused_model_is_an_error():
    with pytest.raises(ModelStateError, match="got a model that is fused already"):
        convert_fx(fuse_fx(nn.Sequential(nn.Linear(4, 4)).eval()))


@pytest.mark.parametrize("call", [lambda m, x: prepare(m, x), lambda m, x: fuse_fx(m, x)])
def test_preparing_a_prepared_or_quantized_model_is_an_error(call):
    x = torch.randn(2, 4)
    for model in (prepare(nn.Sequential(nn.Linear(4, 4)), x), quantize(nn.Sequential(nn.Linear(4, 4)), x)):
        with pytest.raises(ModelStateError, match=f"got a model that is {model.record.stage} already"):
            call(model, x)


def test_a_model_with_a_quantized_part_can_be_prepared():
    part = quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    model, x = nn.Sequential(part, nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["1"]
    assert (quantized(x) - model(x)).norm() < 0.1 * model(x).norm()


def test_results_are_in_eval_mode():
    model = WordLM()
    for module in (prepare(model, *lm_inputs(model)), quantize(model, *lm_inputs(model))):
        assert not any(m.training for m in module.modules())


def test_nothing_is_written_or_warned(capsys):
    model = WordLM()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(model, *lm_inputs(model))
    assert capsys.readouterr() == ("", "")


# A row of one's own.


class Scale(nn.Module):
    """A user's operator."""

    def __init__(self, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(columns, columns))

    def forward(self, x):
        return x * self.weight.diagonal()


class QuantizedScale(nn.Module):
    def __init__(self, values, scale):
        super().__init__()
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return x * (self.values.diagonal() * self.scale)


def convert_scale(module, qconfig, quantize_weight):
    values, scale, _ = quantize_weight(module.weight, qconfig)
    return QuantizedScale(values, scale)


SCALE = Operator(
    name="scale",
    summary="a user's own",
    modules=(Scale,),
    schemes=(fxquant.operators.base.INT8_ROWS,),
    convert_module=convert_scale,
)


def test_a_row_of_ones_own(tmp_path):
    model, x = nn.Sequential(Scale(4), nn.Linear(4, 4)).eval(), torch.randn(2, 4)
    table = (*OPERATORS, SCALE)
    prepared = prepare_fx(model, everything(), x, operators=table)
    assert [site.operator for site in prepared.record.sites] == ["scale", "linear"]
    assert torch.equal(prepared(x), model(x))
    quantized = convert_fx(prepared)
    assert kinds(quantized)["0"] == "QuantizedScale"
    step = model[0].weight.detach().abs().amax(1) / 254 * 1.001
    assert bool(((quantized.get_submodule("0")(x) - model[0](x)).abs() <= step * x.abs()).all())
    path = tmp_path / "own.safetensors"
    fxquant.save(quantized, path)
    missing = r"'0' needs the operator 'scale', which is not in the table; pass load\(\.\.\., operators="
    with pytest.raises(fxquant.CheckpointError, match=missing):
        fxquant.load(nn.Sequential(Scale(4), nn.Linear(4, 4)).eval(), path)
    loaded = fxquant.load(nn.Sequential(Scale(4), nn.Linear(4, 4)).eval(), path, operators=table)
    assert torch.equal(loaded(x), quantized(x))


def test_without_the_row_the_users_module_is_traced_through():
    model, x = nn.Sequential(Scale(4)).eval(), torch.randn(2, 4)
    assert [site.operator for site in prepare(model, x).record.sites] == []


# Presets through the whole path.


@pytest.mark.parametrize("preset", [*SCHEMES, "per tensor", "per channel", "reduced"])
def test_every_preset_goes_through_the_language_model(preset):
    qconfigs = {
        **SCHEMES,
        "per tensor": fxquant.per_tensor_dynamic_qconfig,
        "per channel": fxquant.per_channel_dynamic_qconfig,
        "reduced": default_dynamic_qconfig.with_reduce_range(),
    }
    model = WordLM().eval()
    inputs = lm_inputs(model)
    quantized = quantize(model, *inputs, mapping=QConfigMapping().set_global(qconfigs[preset]))
    spec = qconfigs[preset].weight
    first = "encoder" if spec.format.is_table or spec.format.name == "int8" else "decoder"
    assert first in {site.path for site in quantized.record.sites}
    for got, expected in zip(leaves(quantized(*inputs)), leaves(model(*inputs)), strict=True):
        assert (got - expected).norm() < max(0.05, 3.2 / 2**spec.bits) * expected.norm()


def test_functional_and_module_forms_give_the_same_bits():
    class Functional(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight, self.bias = linear.weight, linear.bias

        def forward(self, x):
            return F.relu(F.linear(x, self.weight, self.bias))

    linear, x = nn.Linear(40, 30), torch.randn(5, 40)
    modules, functional = nn.Sequential(linear, nn.ReLU()), Functional(linear)
    assert torch.equal(quantize(modules, x)(x), quantize(functional, x)(x))
