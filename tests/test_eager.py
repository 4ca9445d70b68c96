"""quantize_dynamic: the same table and numbers as prepare_fx and convert_fx, by module swap."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxquant
from fxquant import (
    MappingNameError,
    ModelStateError,
    QConfigError,
    QConfigMapping,
    default_dynamic_qconfig,
    explain,
    float16_dynamic_qconfig,
    quantize_dynamic,
)
from fxquant.graph.record import record_of
from fxquant.nn import DynamicQuantizedLinear, DynamicQuantizedLSTM
from tests.samples import WordLM, everything, kinds, lm_inputs, quantize, same_bits


class Loop(nn.Module):
    """A model that does not trace: it loops over its input and branches on values."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = None
        for step in x:
            h = self.cell(step, h)
            if h.abs().sum() > 1e6:
                break
        return self.out(h)


def test_types_are_quantized_and_the_rest_says_why():
    model = WordLM().eval()
    quantized = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.int8)
    assert type(quantized) is WordLM
    assert kinds(quantized)["rnn"] == "DynamicQuantizedLSTM"
    assert kinds(quantized)["decoder"] == "DynamicQuantizedLinear"
    assert kinds(quantized)["encoder"] == "Embedding"
    assert [row.decision for row in explain(quantized).rows if row.path == "encoder"] == [
        "float: no mapping entry covers it"
    ]
    assert kinds(model)["decoder"] == "Linear"


def test_a_container_that_stands_at_two_paths_is_quantized_once():
    shared = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.LSTMCell(8, 8)))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.ModuleList([shared]), nn.ModuleList([shared])

        def forward(self, x):
            return self.b[0](self.a[0](x)[0])

    model, x = Model().eval(), torch.randn(3, 8)
    quantized = quantize_dynamic(model)
    assert [row.path for row in explain(quantized).rows] == ["a.0.0", "a.0.1.0"]
    assert quantized.a[0] is quantized.b[0]
    assert same_bits(quantized(x), quantize(model, x)(x))


def test_a_layer_that_stands_at_two_paths_is_one_module_still(tmp_path):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
            self.again = self.first

        def forward(self, x):
            return self.again(self.other(self.first(x)))

    model, x = Model().eval(), torch.randn(3, 8)
    quantized = quantize_dynamic(model)
    assert quantized.first is quantized.again
    assert quantized.first is not quantized.other
    assert same_bits(quantized(x), quantize(model, x)(x))
    fxquant.save(quantized, tmp_path / "q")
    assert (loaded := fxquant.load(model, tmp_path / "q")).first is loaded.again
    one = quantize_dynamic(model, {"first": fxquant.default_dynamic_qconfig, "again": None})
    assert (type(one.again), one.again.weight.dtype) == (nn.Linear, torch.float32)  # each place as its entry says
    assert one.first.weight_int8.dtype == torch.int8


def test_the_numbers_are_those_of_the_graph_form():
    model = WordLM().eval()
    inputs = lm_inputs(model)
    mapping = everything().set_object_type(nn.Embedding, None)
    assert same_bits(
        quantize_dynamic(model, {nn.LSTM, nn.Linear})(*inputs), quantize(model, *inputs, mapping=mapping)(*inputs)
    )


def test_a_model_that_does_not_trace_is_quantized():
    torch.manual_seed(0)
    model, x = Loop().eval(), torch.randn(5, 4, 6)
    quantized = quantize_dynamic(model)
    assert kinds(quantized)["cell"] == "DynamicQuantizedGRUCell"
    expected = model(x)
    assert (quantized(x) - expected).norm() <= 0.05 * expected.norm()


def test_a_dict_of_names_and_types_to_qconfigs():
    spec = {nn.Linear: default_dynamic_qconfig, "decoder": None, "rnn": float16_dynamic_qconfig}
    quantized = quantize_dynamic(WordLM().eval(), spec)
    assert kinds(quantized)["decoder"] == "Linear"
    assert quantized.rnn.weight_ih_l0_float16.dtype == torch.float16


def test_a_mapping_is_taken():
    quantized = quantize_dynamic(WordLM().eval(), QConfigMapping().set_module_name("decoder", default_dynamic_qconfig))
    assert [site.path for site in quantized._fxquant_record.sites] == ["decoder"]


def test_torch_aos_dtype_is_understood():
    quantized = quantize_dynamic(WordLM().eval(), {nn.LSTM}, dtype=torch.qint8)
    assert kinds(quantized)["rnn"] == "DynamicQuantizedLSTM"


def test_torch_aos_4_bit_dtype_is_that_of_embeddings():
    quantized = quantize_dynamic(WordLM().eval(), {nn.Embedding}, dtype=torch.quint4x2)
    assert quantized.encoder.qconfig.weight.dtype == "uint4"


@pytest.mark.parametrize("spec", [default_dynamic_qconfig, 8])
def test_a_spec_that_holds_no_names_is_an_error(spec):
    with pytest.raises(QConfigError, match=r"qconfig_spec is a set or dict of types and names, .*, got "):
        quantize_dynamic(WordLM().eval(), spec)


class Delegates(nn.Module):
    """Looks names that it does not have up among its parts, as a user's __getattr__ may, with whatever error."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"net": nn.Linear(8, 8)})

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "parts" else self.parts[name]

    def forward(self, x):
        return self.net(x)


def test_a_getattr_of_the_users_is_not_asked_for_names_that_nobody_has():
    assert type(quantize_dynamic(Delegates().eval()).net) is DynamicQuantizedLinear


def test_int16_is_a_dtype():
    quantized = quantize_dynamic(WordLM().eval(), {"decoder"}, dtype=torch.int16)
    assert quantized.decoder.weight_int16.dtype == torch.int16


def test_another_dtype_is_an_error():
    with pytest.raises(QConfigError, match=r"dtype torch\.int32 is not one of"):
        quantize_dynamic(WordLM().eval(), {nn.LSTM}, dtype=torch.int32)


def test_a_misspelt_name_is_an_error_with_the_nearest():
    with pytest.raises(MappingNameError, match="did you mean 'decoder'"):
        quantize_dynamic(WordLM().eval(), {"decodr"})


def test_twice_is_an_error():
    with pytest.raises(ModelStateError, match="needs the float model, got a model that is quantized already"):
        quantize_dynamic(quantize_dynamic(WordLM().eval()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: None, r"expected a torch.nn.Module, got NoneType"),
        (
            lambda: nn.DataParallel(nn.Linear(4, 4)),
            r"DataParallel is a wrapper; pass the model inside it: model.module",
        ),
        (lambda: nn.Sequential(nn.LazyLinear(4)), r"'0\.weight' is lazy and has no shape yet"),
    ],
)
def test_what_is_no_float_model_is_an_error(make, message):
    with pytest.raises(ModelStateError, match=message):
        quantize_dynamic(make())


@pytest.mark.parametrize("is_root", [True, False])
def test_a_part_compiled_in_place_is_quantized_and_not_the_original(is_root):
    """module.compile() leaves a call of the float original on the module, which a copy must not keep."""
    part = nn.Sequential(nn.Linear(8, 8))
    model, x = (part if is_root else nn.Sequential(part)).eval(), torch.randn(3, 8)
    part.compile(backend="eager")
    expected = quantize_dynamic(nn.Sequential(copy.deepcopy(part[0])))
    assert torch.equal(quantize_dynamic(model)(x), expected(x))
    assert not torch.equal(model(x), expected(x))


def test_an_averaged_model_is_quantized_inside():
    quantized = quantize_dynamic(AveragedModel(nn.Linear(4, 4)))
    assert [site.path for site in record_of(quantized).sites] == ["module"]


class Refers(nn.Module):
    """Calls its layers by other ways than their names."""

    def __init__(self):
        super().__init__()
        self.net, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.partial, self.several = functools.partial(self.net), {"last": [self.last]}

    def forward(self, x):
        return self.several["last"][0](self.partial(x))


def test_a_layer_that_is_referred_to_elsewhere_is_quantized_there_too():
    quantized = quantize_dynamic(Refers().eval())
    twins = (quantized.net, quantized.partial.func), (quantized.last, quantized.several["last"][0])
    for one, other in (*twins, *copy.deepcopy(twins)):
        assert type(one) is type(other) is DynamicQuantizedLinear
        assert one.weight is other.weight
    assert record_of(quantized).skipped == ()


def test_a_layer_whose_forward_an_attribute_holds_stays_float():
    model, x = Refers().eval(), torch.randn(2, 8)
    model.partial = model.net.forward
    quantized = quantize_dynamic(model)
    (left,) = record_of(quantized).skipped
    assert (left.path, left.reason) == (
        "net",
        "self.partial of tests.test_eager.Refers holds its forward; let it hold the module",
    )
    assert torch.equal(quantized.partial(x), model.net(x))


class Hides(nn.Module):
    """Has layers in containers that are no modules."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.steps, self.heads = [nn.Linear(8, 8), nn.ReLU()], {"out": nn.Sequential(nn.Linear(8, 4))}

    def forward(self, x):
        return self.heads["out"](self.steps[0](self.net(x)))


def test_layers_in_plain_containers_are_told_and_count():
    record = record_of(quantize_dynamic(Hides().eval()))
    assert {left.path: left.reason.partition(",")[0] for left in record.skipped} == {
        "steps[0]": "it is in a plain list",
        "heads[0]": "it is in a plain dict",
    }
    assert record.coverage.quantized_bytes == 8 * 8 * 4
    assert record.coverage.total_bytes == (8 * 8 + 8 * 8 + 8 * 4) * 4


def test_a_table_module_by_itself():
    assert isinstance(quantize_dynamic(nn.LSTM(4, 4)), DynamicQuantizedLSTM)


def test_a_model_in_training_mode_comes_back_in_eval_mode_and_stays_as_it_was():
    model = WordLM().train()
    assert not quantize_dynamic(model).training
    assert model.training
    assert model.drop.training


def test_hooks_methods_and_ties_survive():
    model, seen = WordLM(ninp=8, tie=True).eval(), []
    model.rnn.register_forward_hook(lambda *_: seen.append(1))
    quantized = quantize_dynamic(model)
    quantized(torch.zeros(2, 1, dtype=torch.long), quantized.init_hidden(1))
    assert seen == [1]
    assert quantized.encoder.weight is quantized.decoder.weight


@pytest.mark.parametrize("on_meta", [False, True])
def test_a_checkpoint_goes_round(tmp_path, on_meta):
    model = WordLM().eval()
    inputs = lm_inputs(model)
    quantized = quantize_dynamic(model, {nn.LSTM, nn.Linear})
    fxquant.save(quantized, tmp_path / "m.safetensors")
    with torch.device("meta" if on_meta else "cpu"):
        skeleton = WordLM().eval()
    loaded = fxquant.load(skeleton, tmp_path / "m.safetensors")
    assert type(loaded) is WordLM
    assert same_bits(loaded(*inputs), quantized(*inputs))
    assert str(explain(loaded)) == str(explain(quantized))


@pytest.mark.parametrize(
    "twin_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_remember(twin_of):
    model = WordLM().eval()
    quantized = quantize_dynamic(model)
    twin = twin_of(quantized)
    inputs = lm_inputs(model)
    assert same_bits(twin(*inputs), quantized(*inputs))
    assert str(explain(twin)) == str(explain(quantized))


def test_the_float_model_shares_nothing_with_the_result():
    model = WordLM().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantized = quantize_dynamic(model, {nn.LSTM})
    for tensor in (*quantized.parameters(), *quantized.buffers()):
        tensor.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_module_under_two_names_is_quantized_under_both():
    model = nn.Sequential(nn.Linear(8, 8))
    model.second = model[0]
    quantized = quantize_dynamic(model)
    assert type(quantized[0]) is type(quantized.second) is DynamicQuantizedLinear
    assert quantized[0].weight is quantized.second.weight


def test_a_graph_module_inside_is_quantized():
    model = nn.Sequential(torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))).eval()
    assert kinds(quantize_dynamic(model))["0.0"] == "DynamicQuantizedLinear"


@pytest.mark.parametrize(
    "hold", [lambda f: [f], lambda f: {"a": f}, functools.partial], ids=["a list", "a dict", "a partial"]
)
def test_a_layer_whose_forward_a_container_holds_stays_float_too(hold):
    model = Refers().eval()
    model.held = hold(model.net.forward)
    (left,) = record_of(quantize_dynamic(model)).skipped
    assert left.reason == "self.held of tests.test_eager.Refers holds its forward; let it hold the module"


def test_a_layer_of_slots_is_quantized():
    class Slotted(nn.Linear):
        __slots__ = ("extra",)

    quantized = quantize_dynamic(nn.Sequential(Slotted(8, 4)).eval())
    assert type(quantized[0]) is DynamicQuantizedLinear
