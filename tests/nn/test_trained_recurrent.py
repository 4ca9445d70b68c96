import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import fxquant
from fxquant import convert_fx, prepare_qat_fx
from fxquant.nn.trained_recurrent import train_recurrent
from tests.samples import leaves, same_bits, sqnr

LAYERS = [
    nn.LSTM(6, 8), nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), nn.LSTM(6, 8, proj_size=4),
    nn.LSTM(6, 8, 2, bias=False), nn.GRU(6, 8), nn.GRU(6, 8, 2, bidirectional=True, bias=False), nn.RNN(6, 8),
    nn.RNN(6, 8, nonlinearity="relu", batch_first=True),
]  # fmt: skip
CELLS = [nn.LSTMCell(6, 8), nn.GRUCell(6, 8), nn.RNNCell(6, 8, nonlinearity="relu"), nn.GRUCell(6, 8, bias=False)]
DYNAMIC = fxquant.default_dynamic_qconfig


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def inputs(seed=0):
    return torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [*LAYERS, *CELLS], ids=str)
def test_switched_off_it_is_the_float_layer(layer):
    x = inputs()[0] if isinstance(layer, nn.RNNCellBase) else inputs()
    trained = train_recurrent(layer, DYNAMIC).eval()
    trained.apply(fxquant.disable_fake_quant)
    trained.token_roundings.apply(fxquant.disable_fake_quant)
    for got, expected in zip(leaves(trained(x)), leaves(layer(x)), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("layer", [*LAYERS, *CELLS], ids=str)
@pytest.mark.parametrize("qconfig", [DYNAMIC, fxquant.int4_dynamic_qconfig, fxquant.int16_dynamic_qconfig])
def test_it_gives_what_the_quantized_layer_gives(layer, qconfig):
    x = inputs()[0] if isinstance(layer, nn.RNNCellBase) else inputs()
    prepared = prepare_qat_fx(
        nn.Sequential(copy.deepcopy(layer)).train(), fxquant.QConfigMapping().set_global(qconfig), (x,)
    ).eval()
    quantized = convert_fx(prepared)
    with torch.no_grad():
        for got, expected in zip(leaves(quantized(x)), leaves(prepared(x)), strict=True):
            assert sqnr(expected, got) > 45
            assert not torch.equal(expected, got) or qconfig is fxquant.int16_dynamic_qconfig


@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[2], LAYERS[5]], ids=str)
def test_packed_sequences_and_states(layer):
    rows = [torch.randn(length, 6) for length in (5, 4, 4, 1)]
    trained = train_recurrent(layer, DYNAMIC).eval()
    trained.apply(fxquant.disable_fake_quant)
    initial = [0.5 * state for state in leaves(layer(pack_sequence(rows))[1])]
    hx = tuple(initial) if len(initial) == 2 else initial[0]
    for packed in (
        pack_sequence(rows),
        pack_padded_sequence(torch.randn(5, 3, 6), torch.tensor([2, 5, 3]), enforce_sorted=False),
    ):
        state = hx if packed.unsorted_indices is None else None
        for got, expected in zip(leaves(trained(packed, state)), leaves(layer(packed, state)), strict=True):
            assert torch.allclose(got, expected, atol=1e-6)
    alone = trained(rows[0])[0]
    assert torch.allclose(alone, layer(rows[0])[0], atol=1e-6)


@pytest.mark.parametrize("layer", [*LAYERS, *CELLS], ids=str)
def test_every_parameter_learns(layer):
    x = inputs()[0] if isinstance(layer, nn.RNNCellBase) else inputs()
    trained = train_recurrent(copy.deepcopy(layer), DYNAMIC)
    hx = torch.ones(3, 8) if isinstance(layer, nn.RNNCellBase) else None
    output = trained(x, (hx, hx) if isinstance(layer, nn.LSTMCell) else hx)
    sum(leaf.square().sum() for leaf in leaves(output)).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.parameters())


def test_dropout_between_layers_is_for_training():
    trained = train_recurrent(nn.LSTM(6, 8, 2, dropout=0.5), DYNAMIC)
    assert not torch.equal(trained(inputs())[0], trained(inputs())[0])
    trained.eval()
    assert torch.equal(trained(inputs())[0], trained(inputs())[0])


def test_weights_may_have_schemes_of_their_own():
    mapping = fxquant.QConfigMapping().set_global(DYNAMIC).set_module_name("0.weight_hh_l0", None)
    mapping.set_module_name("0.weight_ih_l0", fxquant.int4_dynamic_qconfig)
    prepared = prepare_qat_fx(nn.Sequential(nn.LSTM(6, 8)).train(), mapping, (inputs(),)).eval()
    quantized = convert_fx(prepared)
    with torch.no_grad():
        assert sqnr(prepared(inputs())[0], quantized(inputs())[0]) > 45


def test_bfloat16_autocast_trains():
    trained = train_recurrent(nn.LSTM(6, 8), DYNAMIC)
    with torch.autocast("cpu", torch.bfloat16):
        output = trained(inputs())[0]
    output.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained.parameters())


def test_a_step_at_a_time_is_the_sequence():
    trained, x = train_recurrent(nn.LSTM(6, 8), DYNAMIC).eval(), inputs()
    with torch.no_grad():
        whole, state, steps = trained(x)[0], None, []
        for t in range(len(x)):
            step, state = trained(x[t : t + 1], state)
            steps.append(step)
        assert torch.allclose(torch.cat(steps), whole, atol=1e-5)
    assert same_bits(trained(x), trained(x))
