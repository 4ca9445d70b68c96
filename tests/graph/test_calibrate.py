"""Data given to convert: Hessians by hand, in every form of product, and what is said where there are none."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import ExampleInputsError, convert_fx, formats, int4_dynamic_qconfig, quantize_dynamic
from fxquant.gptq import round_with_gptq
from fxquant.graph.calibrate import _Counter, _unfused, gather
from fxquant.graph.record import record_of
from fxquant.graph.why import Rounded
from fxquant.operators import OPERATORS
from fxquant.operators.base import product_scheme
from tests.samples import SAMPLES, Call, WordLM, everything, lm_inputs, prepare
from tests.test_laws import same_snapshot, snapshot

INT4 = everything(int4_dynamic_qconfig)


def hessians_of(prepared, batches):
    """Return the Hessians that are gathered, by the path of each weight."""
    found = gather(prepared, record_of(prepared).sites, batches).sums
    return {name: total for (name, _), total in found.items()}


def product(*inputs):
    rows = torch.cat([x.reshape(-1, x.shape[-1]) for x in inputs])
    return rows.t() @ rows


def count(weights, call):
    """Return what is counted while something runs, by the names of the weights."""
    counter = _Counter(weights)
    with torch.no_grad(), _unfused(True), counter:
        call()
    return {name: total for (name, _), total in counter.close().items()}


GPTQ = (Rounded.GPTQ,)


def notes(quantized):
    return {site.call or site.path: site.rounded for site in record_of(quantized).sites}


def two_layers():
    return nn.Sequential(nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 5)).eval()


FORMS = {"tensors": lambda x: x, "tuples": lambda x: (x,), "lists": lambda x: [x], "dicts": lambda x: {"input": x}}


@pytest.mark.parametrize("form", FORMS)
def test_the_hessians_of_each_layer_s_inputs(form):
    model, batches = two_layers(), [torch.randn(rows, 24) for rows in (4, 30, 1)]
    found = hessians_of(prepare(model, batches[0], mapping=INT4), (FORMS[form](x) for x in batches))
    torch.testing.assert_close(found["0.weight"], product(*batches))
    torch.testing.assert_close(found["2.weight"], product(*(model[:2](x) for x in batches)))


TAKE_INT4 = [s for row in OPERATORS if product_scheme(formats.INT4) in row.schemes for s in SAMPLES[row.name]]


@pytest.mark.parametrize("sample", TAKE_INT4, ids=lambda s: s.covers)
def test_every_operator_that_takes_int4_weights_has_its_inputs_seen(sample):
    model = sample.model().eval()
    quantized = convert_fx(prepare(model, *sample.inputs(), mapping=INT4), data=[sample.inputs() for _ in range(3)])
    assert list(notes(quantized).values()) == [GPTQ]


def test_a_weight_s_integers_are_those_of_its_hessian():
    model, x = nn.Sequential(nn.Linear(80, 12)).eval(), torch.randn(50, 3) @ torch.randn(3, 80)
    layer = convert_fx(prepare(model, x, mapping=INT4), data=[x]).get_submodule("0")
    expected = round_with_gptq(model[0].weight, product(x), int4_dynamic_qconfig.weight)
    assert torch.equal(layer.weight_int4, expected.values)
    assert torch.equal(layer.weight_scale, expected.scale)


def test_a_weight_stored_as_io_is_rounded_as_its_transpose():
    x = torch.randn(50, 3) @ torch.randn(3, 24)
    model = Call(torch.matmul, 24, 12).eval()
    twin = nn.Sequential(nn.Linear(24, 12, bias=False)).eval()
    twin[0].weight = nn.Parameter(model.weight.detach().t().contiguous())
    ours, theirs = (convert_fx(prepare(m, x, mapping=INT4), data=[x]) for m in (model, twin))
    assert torch.equal(ours(x), theirs(x))


def test_rounding_with_data_costs_less_than_to_nearest():
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(300, 5) @ torch.randn(5, 64)
    prepared = prepare(model, x, mapping=INT4)
    fed, plain = (convert_fx(prepared, **options) for options in ({"data": x.split(100)}, {}))
    assert (fed(x) - model(x)).square().mean() < (plain(x) - model(x)).square().mean() / 3
    assert (notes(fed), notes(plain)) == ({"0": GPTQ}, {"0": ()})


def test_eager_and_graph_give_the_same_integers():
    model, x = two_layers(), torch.randn(40, 24)
    graph = convert_fx(prepare(model, x, mapping=INT4), data=[x])
    eager = quantize_dynamic(model, INT4, data=[x])
    assert torch.equal(graph.get_submodule("0").weight_int4, eager[0].weight_int4)
    assert notes(eager) == notes(graph) == {"0": GPTQ, "2": GPTQ}


def test_the_same_data_gives_the_same_model():
    prepared = prepare(two_layers(), torch.randn(4, 24), mapping=INT4)
    batches = [torch.randn(20, 24) for _ in range(3)]
    first, second = (convert_fx(prepared, data=batches).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


class Tied(nn.Module):
    """One weight, used by two layers with different inputs and as a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 24)
        self.first, self.second = nn.Linear(24, 30, bias=False), nn.Linear(24, 30, bias=False)
        self.first.weight = self.second.weight = self.table.weight

    def forward(self, words):
        x = self.table(words)
        return self.first(x) + self.second(x.tanh() * 3)


def test_a_tied_weight_is_rounded_once_for_the_inputs_of_all_its_layers():
    model, words = Tied().eval(), torch.randint(30, (50,))
    mapping = everything(int4_dynamic_qconfig).set_object_type(nn.Embedding, None)
    quantized = convert_fx(prepare(model, words, mapping=mapping), data=[words])
    x = model.table(words).detach()
    expected = round_with_gptq(model.table.weight, product(x, x.tanh() * 3), int4_dynamic_qconfig.weight)
    assert torch.equal(quantized.first.weight_int4, expected.values)
    assert quantized.second.weight_int4 is quantized.first.weight_int4


def test_a_table_tied_to_a_decoder_keeps_its_own_rounding():
    model = WordLM(ninp=16, nhid=16, tie=True).eval()
    rows = fxquant.float_qparams_weight_only_qconfig_4bit
    mapping = everything(int4_dynamic_qconfig).set_object_type(nn.Embedding, rows).set_object_type(nn.LSTM, None)
    inputs = lm_inputs(model)
    quantized = convert_fx(prepare(model, *inputs, mapping=mapping), data=[inputs])
    assert notes(quantized) == {"encoder": (), "decoder": GPTQ}
    assert torch.equal(quantized.encoder.weight_uint4, rows.quantize_weight(model.encoder.weight).values)


class Habits(nn.Module):
    """Writes into a buffer at each call, multiplies with a buffer, and enters inference mode by itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(24, 24)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("matrix", torch.randn(12, 24))

    def forward(self, x):
        self.calls.add_(1)
        return F.linear(self.linear(x), self.matrix)


def test_neither_the_model_nor_the_prepared_one_is_changed():
    model, x = Habits().eval(), torch.randn(4, 24)
    prepared = prepare(model, x, mapping=INT4)
    before, prepared_before = snapshot(model), snapshot(prepared)
    quantized = convert_fx(prepared, data=[x, x])
    assert same_snapshot(snapshot(model), before)
    assert same_snapshot(snapshot(prepared), prepared_before)
    assert torch.equal(quantized.calls, prepared.calls)
    assert set(notes(quantized).values()) == {GPTQ}


@pytest.mark.parametrize(
    "quantizer",
    [lambda m, x: convert_fx(prepare(m, x, mapping=INT4), data=[x]), lambda m, x: quantize_dynamic(m, INT4, data=[x])],
    ids=["graph", "eager"],
)
def test_attention_takes_no_fast_path_past_its_products(quantizer):
    layer = nn.TransformerEncoderLayer(24, 2, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    assert set(notes(quantizer(model, torch.randn(3, 5, 24))).values()) == {GPTQ}


def test_inference_mode_in_forward_hides_nothing():
    layer, x = nn.Linear(24, 12), torch.randn(4, 24)

    def call():
        with torch.inference_mode():
            layer(x)

    torch.testing.assert_close(count({"weight": layer.weight}, call)["weight"], product(x))


def test_an_lstm_s_matrices_meet_inputs_and_the_states_before_each_step():
    lstm, x = nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3), torch.randn(7, 2, 6)
    found = count(dict(lstm.named_parameters()), lambda: lstm(x))
    layer = nn.LSTM(6, 5, bidirectional=True, proj_size=3)
    layer.load_state_dict({name: value for name, value in lstm.state_dict().items() if "_l0" in name})
    with torch.no_grad(), _unfused(True):
        y = layer(x)[0]
    torch.testing.assert_close(found["weight_ih_l0"], product(x))
    torch.testing.assert_close(found["weight_hh_l0"], product(y[:-1, :, :3]))
    torch.testing.assert_close(found["weight_hh_l0_reverse"], product(y[1:, :, 3:]))
    torch.testing.assert_close(found["weight_ih_l1"], product(y))
    assert found["weight_hr_l1"].shape == (5, 5)


def test_of_a_recurrent_layer_only_the_weights_that_become_int4_are_rounded_so():
    model, x = nn.Sequential(nn.LSTM(6, 5)).eval(), torch.randn(7, 2, 6)
    mapping = everything().set_module_name("0.weight_hh_l0", int4_dynamic_qconfig)
    prepared = prepare(model, x, mapping=mapping)
    assert [*hessians_of(prepared, [x])] == ["0.weight_hh_l0"]
    ours, plain = (convert_fx(prepared, **options).get_submodule("0") for options in ({"data": [x]}, {}))
    with torch.no_grad(), _unfused(True):
        states = product(model(x)[0][:-1], torch.zeros(2, 5))
    expected = round_with_gptq(model[0].weight_hh_l0, states, int4_dynamic_qconfig.weight)
    assert torch.equal(ours.weight_hh_l0_int4, expected.values)
    assert torch.equal(ours.weight_ih_l0_int8, plain.weight_ih_l0_int8)
    assert not torch.equal(ours.weight_hh_l0_int4, plain.weight_hh_l0_int4)


class Passes(nn.Module):
    def forward(self, x):
        assert torch._C._get_mkldnn_enabled()  # slower without, and no recurrent layer here needs it
        return x


def test_a_model_without_recurrent_layers_runs_as_ever():
    quantize_dynamic(nn.Sequential(Passes(), nn.Linear(24, 12)).eval(), INT4, data=[torch.randn(4, 24)])


def test_torch_computes_as_before_afterwards_also_after_an_error():
    assert torch._C._get_mkldnn_enabled()
    prepared = prepare(two_layers(), torch.randn(4, 24), mapping=INT4)
    with pytest.raises(ExampleInputsError, match=r"data's batch 1 does not run through the model"):
        convert_fx(prepared, data=[torch.randn(4, 24), torch.randn(4, 23)])
    assert torch._C._get_mkldnn_enabled()
    assert torch._C._get_cudnn_enabled()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data held no batch"),
        (torch.randn(4, 24), "data is an iterable of batches, got one tensor"),
        ([(torch.randn(4, 24), torch.ones(4))], "a batch of 2 arguments does not fit forward"),
        (["words"], "got str"),
    ],
)
def test_data_that_cannot_be_run(data, message):
    model = two_layers()
    with pytest.raises(ExampleInputsError, match=message):
        convert_fx(prepare(model, torch.randn(4, 24), mapping=INT4), data=data)
    with pytest.raises(ExampleInputsError, match=message):
        quantize_dynamic(model, INT4, data=data)


def test_data_for_a_model_on_the_meta_device_is_said_to_be_of_no_use():
    prepared = prepare(two_layers().to("meta"), torch.empty(4, 24, device="meta"), mapping=INT4)
    with pytest.warns(UserWarning, match="the model is on the meta device and has no values"):
        quantized = convert_fx(prepared, data=[torch.randn(4, 24)])
    assert len(notes(quantized)) == 2


def test_data_for_a_model_without_int4_weights_is_said_to_be_of_no_use():
    prepared = prepare(two_layers(), torch.randn(4, 24))
    with pytest.warns(UserWarning, match="no weight becomes .*int4"):
        quantized = convert_fx(prepared, data=[])
    assert set(notes(quantized).values()) == {()}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_a_layer_whose_inputs_have_no_hessian_is_rounded_to_nearest_and_says_so(value):
    model, x = two_layers(), torch.randn(40, 24)
    x[3, 4] = value
    prepared = prepare(model, torch.randn(4, 24), mapping=INT4)
    fed, plain = (convert_fx(prepared, **options) for options in ({"data": [x]}, {}))
    assert notes(fed)["0"] == (Rounded.NOT_FINITE,)
    assert torch.equal(fed.get_submodule("0").weight_int4, plain.get_submodule("0").weight_int4)


class Chooses(nn.Module):
    def __init__(self):
        super().__init__()
        self.often, self.never = nn.Linear(24, 12), nn.Linear(24, 12)

    def forward(self, x):
        return self.often(x) if x.shape[0] > 0 else self.never(x)


def test_a_layer_that_data_never_reaches_is_rounded_to_nearest_and_says_so():
    model, x = Chooses().eval(), torch.randn(40, 24)
    quantized = quantize_dynamic(model, INT4, data=[x])
    assert notes(quantized) == {"often": GPTQ, "never": (Rounded.NO_INPUT,)}
    assert torch.equal(quantized.never.weight_int4, quantize_dynamic(model, INT4).never.weight_int4)


def test_a_checkpoint_keeps_the_integers_and_how_they_came_to_be(tmp_path):
    model, x = two_layers(), torch.randn(40, 24)
    quantized = convert_fx(prepare(model, x, mapping=INT4), data=[x])
    fxquant.save(quantized, tmp_path / "m.safetensors")
    loaded = fxquant.load(two_layers(), tmp_path / "m.safetensors")
    assert torch.equal(loaded(x), quantized(x))
    assert notes(loaded) == notes(quantized)


# int8 weights whose qconfig asks for it


STATIC_GPTQ = everything(fxquant.default_static_qconfig.with_gptq())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(4, 6, 3, 2, 1, 2), (2, 4, 11)),
        (lambda: nn.Conv2d(4, 6, (3, 2), (1, 2), (1, 0), (1, 2)), (3, 4, 5, 6)),
        (lambda: nn.Conv2d(4, 6, 3, padding="same"), (3, 4, 5, 6)),
        (lambda: nn.Conv3d(2, 6, 2), (2, 2, 3, 4, 3)),
    ],
)
def test_a_convolution_s_inputs_are_its_windows(layer, shape):
    layer, x = layer().eval(), torch.randn(shape)
    found = count({"weight": layer.weight}, lambda: layer(x))["weight"]
    columns = layer.weight[0].numel()
    taps = torch.eye(columns, dtype=torch.float64).view(columns, *layer.weight.shape[1:])
    options = layer.stride, layer.padding, layer.dilation
    convolve = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    windows = convolve(x.double(), taps, None, *options).movedim(1, -1).reshape(-1, columns)
    torch.testing.assert_close(found.double(), windows.t() @ windows, rtol=1e-5, atol=1e-4)


@torch.no_grad()
def test_int8_weights_are_rounded_with_it_where_the_qconfig_asks_for_that():
    x = torch.einsum("brl,rc->bcl", torch.randn(6, 2, 20), torch.randn(2, 8))
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv1d(8, 8, 3, groups=2), nn.Flatten(), nn.Linear(128, 5)).eval()
    fed = convert_fx(prepare(model, x, mapping=STATIC_GPTQ), data=[x])
    plain = convert_fx(prepare(model, x, mapping=everything(fxquant.default_static_qconfig)), data=[x])
    assert notes(fed) == {"0": GPTQ, "1": (Rounded.NO_CONVOLUTION,), "3": GPTQ}
    assert set(notes(plain).values()) == {()}
    windows = x.unfold(2, 3, 1).transpose(1, 2).flatten(2).flatten(0, 1)
    off = [(layer.get_submodule("0").dequantize("weight") - model[0].weight).flatten(1) for layer in (fed, plain)]
    ours, theirs = ((part @ windows.t()).square().sum(1) for part in off)
    assert (ours <= theirs * (1 + 1e-4)).all()
    assert ours.sum() < theirs.sum() / 3


@torch.no_grad()
def test_dynamic_int8_weights_can_be_too():
    model, x = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(300, 5) @ torch.randn(5, 64)
    mapping = everything(fxquant.default_dynamic_qconfig.with_gptq())
    quantized = convert_fx(prepare(model, x, mapping=mapping), data=[x])
    expected = round_with_gptq(model[0].weight, product(x), fxquant.default_dynamic_qconfig.weight)
    assert torch.equal(quantized.get_submodule("0").weight_int8, expected.values)
    assert expected.scale.shape == (32,)
