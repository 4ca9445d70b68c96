"""An LSTM fed with raw energies, whose first matrix int8 ruins: the case that schemes for single weights are for."""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxquant
from fxquant import (
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from tests.architectures import oracle
from tests.samples import prepare, same_bits

FIRST = "lstm.weight_ih_l0"
NAMES = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1")


class Listener(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(40, 128, 2)

    def forward(self, x):
        return self.lstm(x)[0]


def make(gain=1.0):
    """Return the model and its input: energies from 1e-9 to 60; a row of the first matrix is 30 times the median row.

    gain: how much larger the first matrix is than torch makes it, as in a model that was trained on such energies.
    """
    torch.manual_seed(0)
    model = Listener().eval()
    with torch.no_grad():
        weight = model.lstm.weight_ih_l0.mul_(gain)
        sizes = weight.abs().amax(1)
        weight[7] *= 30 * sizes.median() / sizes[7]
    return model, torch.empty(30, 4, 40).uniform_(math.log(1e-9), math.log(60.0)).exp()


def error(got, expected):
    """Return the relative RMS error."""
    return float((got - expected).detach().norm() / expected.detach().norm())


def quantized(model, x, qconfig, *first):
    """Return the quantized model; first: what its first matrix gets, if something else."""
    mapping = QConfigMapping().set_global(qconfig)
    for other in first:
        mapping.set_module_name(FIRST, other)
    return convert_fx(prepare(model, x, mapping=mapping))


def simulate(lstm, x, exact):
    """Return what the LSTM gives in float64 where all weights but one, and what they multiply, are rounded to int8."""
    for layer in range(lstm.num_layers):
        h, c, outputs = torch.zeros(x.shape[1], lstm.hidden_size), 0.0, []
        weights = {name: getattr(lstm, f"weight_{name}_l{layer}").detach() for name in ("ih", "hh")}
        bias = (getattr(lstm, f"bias_ih_l{layer}") + getattr(lstm, f"bias_hh_l{layer}")).detach().double()
        for row in x:
            products = [
                value.double() @ weights[name].double().T
                if f"weight_{name}_l{layer}" == exact
                else oracle.linear(value, weights[name]).double()
                for name, value in (("ih", row), ("hh", h))
            ]
            h, c = oracle.step("LSTM", products[0] + bias, products[1], h, c)
            h = h.float()
            outputs.append(h)
        x = torch.stack(outputs)
    return x


@pytest.mark.parametrize(("qconfig", "gain"), [(per_tensor_dynamic_qconfig, 1), (default_dynamic_qconfig, 100)])
def test_int8_everywhere_ruins_it_and_everywhere_but_in_the_first_matrix_does_not(qconfig, gain):
    model, x = make(gain)
    expected = model(x)
    everywhere, elsewhere = (error(quantized(model, x, qconfig, *first)(x), expected) for first in ((), (None,)))
    assert elsewhere < 0.01 < 0.04 < everywhere


def to_half(x):
    return x.half().float()


def to_int16(x):
    scale = x.abs().amax(-1, keepdim=True) / 32767
    return (x / scale).round() * scale


@pytest.mark.parametrize(
    ("first", "round_weight", "round_input"),
    [(float16_dynamic_qconfig, to_half, torch.clone), (int16_dynamic_qconfig, to_int16, to_int16)],
)
@pytest.mark.parametrize("gain", [1, 100])
def test_a_finer_first_matrix_costs_what_its_own_rounding_costs(first, round_weight, round_input, gain):
    model, x = make(gain)
    expected = model(x)
    elsewhere = error(quantized(model, x, default_dynamic_qconfig, None)(x), expected)
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        rounded.lstm.weight_ih_l0.copy_(round_weight(rounded.lstm.weight_ih_l0))
    alone = error(rounded(round_input(x)), expected)  # two errors come to their sum at most
    assert error(quantized(model, x, default_dynamic_qconfig, first)(x), expected) <= elsewhere + alone


def test_float16_in_the_first_matrix_takes_less_than_a_tenth_more_bytes():
    model, x = make()
    sizes = [
        quantized(model, x, default_dynamic_qconfig, *first).record.sites[0].int_bytes
        for first in ((), (float16_dynamic_qconfig,))
    ]
    assert sizes[1] - sizes[0] == 512 * 40 - 4 * 512  # a byte more a weight, no scales
    assert sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize("name", NAMES)
def test_with_one_float_weight_it_computes_what_the_equations_say(name):
    model, x = make()
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_module_name(f"lstm.{name}", None)
    got = convert_fx(prepare(model, x, mapping=mapping))(x)
    assert error(got, simulate(model.lstm, x, name)) < 1e-5  # float rounding; a value that tipped would cost 1e-4
    assert error(got, model(x)) > 1e-3


@pytest.fixture(scope="module")
def mixed():
    """Return a model of all schemes, quantized, and its input."""
    model, x = make()
    mapping = QConfigMapping().set_module_name("lstm", default_dynamic_qconfig).set_module_name(FIRST, None)
    mapping.set_module_name("lstm.weight_ih_l1", int4_dynamic_qconfig)
    mapping.set_module_name("lstm.weight_hh_l1", float16_dynamic_qconfig)
    return convert_fx(prepare(model, x, mapping=mapping)), x


def test_each_weight_is_a_buffer_of_its_scheme(mixed):
    state = mixed[0].lstm.state_dict()
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items() if "weight" in name} == {
        "weight_ih_l0": (torch.float32, (512, 40)),
        "weight_hh_l0_int8": (torch.int8, (512, 128)),
        "weight_hh_l0_scale": (torch.float32, (512,)),
        "weight_ih_l1_int4": (torch.uint8, (512, 64)),
        "weight_ih_l1_scale": (torch.bfloat16, (512, 2)),
        "weight_hh_l1_float16": (torch.float16, (512, 128)),
    }
    assert not any(parameter.requires_grad for parameter in mixed[0].lstm.parameters())


def test_a_float_weight_is_a_copy_that_keeps_its_dtype():
    model, x = make()
    before = model.lstm.weight_ih_l0.clone()
    got = quantized(model, x, default_dynamic_qconfig, None)
    got.lstm.weight_ih_l0.zero_()
    assert torch.equal(model.lstm.weight_ih_l0, before)
    assert got.half().lstm.weight_ih_l0.dtype == torch.float32


def test_a_float_state_dict_is_refused(mixed):
    with pytest.raises(
        RuntimeError,
        match=r"weight_hh_l0 is a weight that is not quantized, or quantized differently: here it is weight_hh_l0_int8",
    ):
        copy.deepcopy(mixed[0]).load_state_dict(make()[0].state_dict())


def test_copies_pickles_and_checkpoints_give_the_same_bits(mixed, tmp_path):
    model, x = mixed
    expected = model(x)
    assert same_bits(copy.deepcopy(model)(x), expected)
    assert same_bits(pickle.loads(pickle.dumps(model))(x), expected)
    fxquant.save(model, tmp_path / "q")
    with torch.device("meta"):
        skeleton = Listener().eval()
    loaded = fxquant.load(skeleton, tmp_path / "q")
    assert same_bits(loaded(x), expected)
    assert loaded.record.sites == model.record.sites
    assert loaded.record.skipped == model.record.skipped
    assert loaded.record.coverage == model.record.coverage
    assert fxquant.explain(loaded).rows[0].decision == fxquant.explain(model).rows[0].decision


def test_compiled_and_exported_it_gives_the_same_bits(mixed):
    model, x = mixed
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, inside export and dynamo
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        exported = torch.export.export(model, (x,)).module()(x)
    assert same_bits(compiled, model(x))
    assert same_bits(exported, model(x))


def test_the_views_take_it(mixed):
    model, x = mixed
    compared = fxquant.compare(make()[0], model, [(x,)])
    assert [row.path for row in compared.rows] == ["lstm"]
    assert fxquant.profile(model, x, rounds=1).rows[0].bytes == sum(
        tensor.nbytes for tensor in model.lstm.state_dict().values()
    )
