"""Each published architecture goes through both forms: what is quantized, how near it stays, what its rows depend on.

How near: `oracle.simulate` gives the float model with every quantized weight and activation rounded. Where only linear
layers and tables are quantized, the result is the oracle's to the bit. Recurrent layers, attention, products of
activations in a graph and folded normalizations round in an order of their own, by some 1e-7; where that tips a value
that lies between two integers, its row is another draw of the same rounding noise from there on. Two independent draws
of noise of power N lie 2 N apart; so if no more than half of the rows are tipped, result and oracle lie within N of
each other, and, since √(noise of the result) ≤ √N + √N, the SQNR is at most 20 log10(2) = 6.02 dB below the oracle's: a
bound for each model that nobody has tuned. (Additive rounding noise: Widrow and Kollár 2008, *Quantization Noise*.)
"""

import math

import pytest
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxquant import explain, prepare_fx, quantize_dynamic
from fxquant.graph.convert.invariant import PRODUCTS
from fxquant.graph.record import record_of
from tests.architectures.base import (
    FORMS,
    byte_sum,
    coverable_bytes,
    matrices,
    measure,
    narrow,
    noise,
    power,
    slow_path,
    sqnr,
)
from tests.architectures.collection import ARCHITECTURES
from tests.samples import everything, leaves, same_bits
from tests.test_laws import same_snapshot, snapshot

ROUNDING = (1000 * 2**-24) ** 2
"""How much of a signal's power float32 sums of up to 1,000 products may round away."""

each = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.name)
form = pytest.mark.parametrize("form", FORMS)


def has(model, *kinds):
    return any(isinstance(module, kinds) for module in model.modules())


def test_there_are_thirty_or_more_and_each_has_its_name():
    assert len({architecture.name for architecture in ARCHITECTURES}) == len(ARCHITECTURES) >= 30


@each
def test_what_does_not_trace_is_kept_and_nothing_else(architecture):
    assert set(record_of(measure(architecture).prepared).untraced) == set(architecture.kept)


@each
def test_the_prepared_graph_computes_what_the_model_does(architecture):
    measured = measure(architecture)
    with torch.no_grad(), slow_path():
        got = leaves(measured.prepared(*measured.inputs))
    if has(measured.model, _BatchNorm):  # which is folded
        assert noise(measured.expected, got) <= ROUNDING * power(measured.expected)
    else:
        assert same_bits(got, measured.expected)


@each
@form
def test_the_matrices_that_can_be_are_integers_and_no_other(architecture, form):
    measured = measure(architecture)
    left = byte_sum(matrices(measured.quantized[form]).values())
    expected = coverable_bytes(measured.model, architecture.called, form)
    assert byte_sum(matrices(measured.model).values()) - left == expected


@each
@form
def test_every_matrix_is_a_site_or_has_a_reason(architecture, form):
    measured = measure(architecture)
    rows = explain(measured.quantized[form]).rows
    told = {row.path for row in rows}
    assert all(row.is_quantized or row.decision.startswith("float: ") for row in rows)
    for path, parameter in measured.model.named_parameters(remove_duplicate=False):
        names = path.split(".")
        holders = {".".join(names[:depth]) for depth in range(len(names) + 1)}  # itself, its module, what holds that
        assert parameter.dim() < 2 or holders & told, path


@each
@form
def test_the_answers_are_as_near_as_rounding_allows(architecture, form):
    measured = measure(architecture)
    got, simulated, expected = measured.results[form], measured.simulated[form], measured.expected
    graph = getattr(measured.quantized[form], "graph", fx.Graph())
    has_products = any(node.target in PRODUCTS for node in graph.nodes)  # of activations: summed in an order of ours
    if not has_products and not has(measured.model, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, _BatchNorm):
        assert same_bits(got, simulated)
    rounded = noise(expected, simulated)
    assert noise(simulated, got) <= rounded + ROUNDING * power(expected)
    if rounded:
        assert sqnr(expected, got) >= sqnr(expected, simulated) - 20 * math.log10(2)


@each
@form
def test_a_row_does_not_depend_on_its_neighbours(architecture, form):
    # In a batch of one shape torch's own float kernels do the same for every row too, convolutions and all.
    measured = measure(architecture)
    quantized, dims = measured.quantized[form], architecture.rows
    batch = measured.inputs[0].shape[dims[0] if dims else 0]
    for row in (0, batch - 1):
        others = []
        for i, x in enumerate(measured.inputs):
            dim = dims[i] if i < len(dims) else 0
            other = x.roll(1, dim) * (1000 if x.is_floating_point() else 1)
            others.append(other.index_copy(dim, torch.tensor([row]), x.narrow(dim, row, 1)))
        with torch.no_grad():
            among = leaves(quantized(*others))
        assert not same_bits(among, measured.results[form])
        assert same_bits(
            narrow(among, architecture.outputs, row), narrow(measured.results[form], architecture.outputs, row)
        )


def dependents(architecture, form):
    """Return what torch computes between the layers in another order in another batch, as explain names it."""
    quantized = measure(architecture).quantized["fx"]
    told = list(explain(quantized).dependent)
    if form == "eager":  # the model's own code runs on
        nodes = quantized.graph.nodes if isinstance(quantized, fx.GraphModule) else ()
        told += [*architecture.called, *(node.name for node in nodes if node.target in PRODUCTS)]
    return told


@each
@form
def test_a_row_alone_gives_the_same_bits(architecture, form):
    dependent = dependents(architecture, form)
    if dependent:
        pytest.skip(f"nothing is promised: {'; '.join(dependent)}")
    measured = measure(architecture)
    for row in range(measured.inputs[0].shape[architecture.rows[0] if architecture.rows else 0]):
        with torch.no_grad():
            alone = leaves(measured.quantized[form](*narrow(measured.inputs, architecture.rows, row)))
        assert same_bits(alone, narrow(measured.results[form], architecture.outputs, row))


def test_what_is_promised_of_a_row_alone_is_not_little():
    promised = {architecture.name for architecture in ARCHITECTURES if not dependents(architecture, "fx")}
    assert promised >= {"DeepSpeech", "RNN-T", "BiLSTM tagger", "AWD-LSTM", "MiniLM sentence encoder", "BERT"}
    assert "BERT" in {architecture.name for architecture in ARCHITECTURES if not dependents(architecture, "eager")}


@each
@pytest.mark.filterwarnings("ignore:.* does not trace")
def test_the_model_is_not_changed(architecture):
    measured = measure(architecture)
    before = snapshot(measured.model)
    with slow_path():
        prepare_fx(measured.model, everything(), measured.inputs)
        quantize_dynamic(measured.model)
    assert same_snapshot(snapshot(measured.model), before)


def test_the_collection_has_calls_kept_parts_and_every_kind_of_site():
    records = [record_of(measure(architecture).quantized["fx"]) for architecture in ARCHITECTURES]
    found = {site.operator for record in records for site in record.sites}
    assert found >= {"linear", "attention", "lstm", "rnn", "cell", "embedding", "embedding_bag"}
    assert {site.kind for record in records for site in record.sites} >= {"F.linear", "torch.addmm", "operator.matmul"}
    assert any(site.call for record in records for site in record.sites)
    assert any(record.untraced for record in records)
