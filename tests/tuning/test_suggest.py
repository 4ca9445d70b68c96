"""Suggested mappings: within the budget as measured on the model that they give, and no finer than need be."""

import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    QConfigError,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    int4_dynamic_qconfig,
    per_channel_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
    prepare_fx,
    suggest_mapping,
    uint4_weight_only_qconfig,
)
from fxquant.errors import ArgumentError, ModelStateError
from fxquant.graph.edit import byte_count
from fxquant.graph.record import record_of
from fxquant.graph.why import Rounded
from fxquant.qconfig import BEST
from fxquant.tuning import search
from fxquant.tuning.ladder import LADDER, scheme_name
from fxquant.tuning.suggest import _rows
from tests.debug.measure.test_sensitivity import EVERYTHING, Branching, data, make_data, make_model, model, relative_rms

__all__ = ["data", "model"]  # fixtures
SMALLEST = next(iter(LADDER))


def quantize(model, mapping, data):
    """Return the model quantized, with GPTQ from the data where a format uses it."""
    prepared = prepare_fx(model, mapping, data[0])
    uses_gptq = any(site.qconfig.weight.format.uses_gptq for site in record_of(prepared).sites)
    return convert_fx(prepared, data=data if uses_gptq else None, check=False)  # coarse on purpose, some


def test_a_wide_budget_makes_everything_as_small_as_can_be(model, data):
    found = suggest_mapping(model, data, budget=1.0)
    assert found.mapping == (
        QConfigMapping()
        .set_global(default_dynamic_qconfig)
        .set_object_type(nn.Linear, BEST[SMALLEST])
        .set_object_type(F.linear, BEST[SMALLEST])
    )
    assert found.kept == ()
    assert found.coarser == (("first", SMALLEST), ("second", SMALLEST), ("weight (linear)", SMALLEST))


def test_embeddings_get_4_bit_rows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 8)).eval()
    found = suggest_mapping(model, [torch.randint(50, (4, 6))], budget=1.0)
    sites = {site.path: site.qconfig for site in record_of(found.model).sites}
    assert sites == {"0": uint4_weight_only_qconfig, "1": BEST[SMALLEST]}


def test_the_site_that_does_the_harm_is_kept_finer_and_no_other(model, data):
    without_first = (
        QConfigMapping().set_global(default_dynamic_qconfig).set_module_name("first", float16_dynamic_qconfig)
    )
    budget = relative_rms(model, quantize(model, without_first, data), data) * 1.001
    assert relative_rms(model, quantize(model, EVERYTHING, data), data) > budget
    found = suggest_mapping(model, data, budget=budget)
    assert found.kept == (("first", "float16"),)
    assert found.coarser == ()
    assert found.mapping == without_first


SCHEMES = [int4_dynamic_qconfig, default_dynamic_qconfig, float16_dynamic_qconfig, None]


def measure(model, mappings, batches, data):
    """Return (bytes, metric) on the batches of the model quantized by each of the mappings, rounded by the data."""
    models = [quantize(model, mapping, data) for mapping in mappings]
    return [(byte_count(quantized), relative_rms(model, quantized, batches)) for quantized in models]


@pytest.fixture(scope="module")
def all_mixtures():
    """Return (bytes, metric) of every mixture of the fixture `model`, measured once, and of all int8."""
    model, data = make_model(), make_data()
    mappings = [
        QConfigMapping()
        .set_object_type(F.linear, call)
        .set_module_name("first", first)
        .set_module_name("second", second)
        for first, second, call in itertools.product(SCHEMES, repeat=3)
        if (first, second, call) != (None, None, None)
    ]
    return measure(model, mappings, data, data), *measure(model, [EVERYTHING], data, data)


@pytest.mark.parametrize("share", [3.0, 1.0, 0.6, 0.3, 0.05])
def test_it_is_as_small_as_the_best_of_all_mixtures(model, data, all_mixtures, share):
    mixtures, (_, metric) = all_mixtures
    budget = metric * share
    best = min(size for size, error in [(byte_count(model), 0.0), *mixtures] if error <= budget)
    assert suggest_mapping(model, data, budget=budget, schemes=tuple(map(scheme_name, SCHEMES))).bytes == best


def test_schemes_are_all_that_is_used(model, data):
    budget = relative_rms(model, quantize(model, EVERYTHING, data), data) * 0.9
    found = suggest_mapping(model, data, budget=budget, schemes=("float", "int8"))
    assert {choice for _, choice in found.kept} == {"float"}
    assert found.coarser == ()
    assert all("int4" not in row.what and "float16" not in row.what for row in found.rows)


def test_a_budget_that_the_schemes_cannot_keep_is_warned_of(model, data):
    with pytest.warns(UserWarning, match="outside the budget of 1e-06; it is the nearest of"):
        found = suggest_mapping(model, data, budget=1e-6, schemes=("int4", "int8"))
    assert not found.is_within_budget
    assert found.metric == min(row.metric for row in found.rows)
    assert "OUTSIDE the budget" in str(found)


def test_sites_of_a_mapping_of_ones_own_keep_to_it(model, data):
    own = QConfigMapping().set_global(per_channel_dynamic_qconfig).set_module_name("second", None)
    found = suggest_mapping(model, data, budget=1.0, qconfig_mapping=own, schemes=("int8", "float16"))
    assert found.mapping == own
    found = suggest_mapping(model, data, budget=1.0, qconfig_mapping=own)
    assert dict(found.coarser) == {"first": SMALLEST, "weight (linear)": SMALLEST}
    assert found.mapping.module_name_qconfigs == {"second": None, "first": BEST[SMALLEST]}


def test_what_it_states_is_measured_on_the_model_that_its_mapping_gives(model, data):
    everything = relative_rms(model, quantize(model, EVERYTHING, data), data)
    for share in (0.9, 0.5, 0.1, 0.0):
        found = suggest_mapping(model, data, budget=everything * share)
        quantized = quantize(model, found.mapping, data)
        assert found.metric == pytest.approx(relative_rms(model, quantized, data), rel=1e-9, abs=1e-12)
        assert found.metric <= everything * share
        assert found.is_within_budget
        assert found.bytes == byte_count(quantized) == byte_count(found.model)
        (chosen,) = [row for row in found.rows if row.is_chosen]
        assert (chosen.metric, chosen.bytes) == (found.metric, found.bytes)
        assert all(row.bytes >= found.bytes for row in found.rows if row.is_within)
        assert [row.bytes for row in found.rows] == sorted(row.bytes for row in found.rows)
        x = data[1][0]
        assert torch.equal(found.model(x), quantized(x))


def test_int4_weights_are_rounded_with_error_feedback_from_the_data(model, data):
    found = suggest_mapping(model, data, budget=1.0, schemes=("int4",))
    assert found.has_feedback
    assert {site.rounded for site in record_of(found.model).sites} == {(Rounded.GPTQ,)}
    again = "rounded by GPTQ: to get this model again, convert_fx(prepare_fx(model, found.mapping, …), data=data)"
    assert again in str(found)
    plain = suggest_mapping(model, data, budget=1.0, schemes=("int4",), error_feedback=False)
    assert not plain.has_feedback
    assert "with GPTQ" not in str(plain)
    nearest = convert_fx(prepare_fx(model, plain.mapping, data[0]))
    assert torch.equal(plain.model(data[0][0]), nearest(data[0][0]))
    assert found.metric < plain.metric


def test_where_float16_is_not_fine_enough_sites_stay_float(model, data):
    found = suggest_mapping(model, data, budget=0.0)
    assert set(dict(found.kept).values()) == {"float"}
    assert len(found.kept) == 3
    assert found.metric == 0


def test_the_same_arguments_give_the_same_mapping(model, data):
    first, second = (suggest_mapping(model, data, budget=0.002) for _ in range(2))
    assert first.mapping == second.mapping
    assert first.rows == second.rows


def test_a_metric_whose_higher_values_are_better(model, data):
    everything = relative_rms(model, quantize(model, EVERYTHING, data), data)
    found = suggest_mapping(
        model,
        data,
        lambda candidate: -relative_rms(model, candidate, data),
        budget=everything / 2,
        higher_is_better=True,
    )
    assert -found.metric <= everything / 2
    assert found.kept


def test_milliseconds_are_measured(model, data):
    found = suggest_mapping(model, data, budget=1.0, minimize="ms")
    assert found.is_within_budget
    assert all(row.ms > 0 for row in found.rows)


def test_a_model_that_does_not_trace(data):
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="the model's own code runs on"):
        found = suggest_mapping(Branching().eval(), data, budget=0.0)
    assert dict(found.kept) == {"first": "float", "second": "float"}
    assert found.model(data[0][0]).shape == (3, 5)


def test_a_budget_that_nothing_keeps_is_warned_of(model, data):
    with pytest.warns(UserWarning, match="outside the budget of -1"):
        found = suggest_mapping(model, data, budget=-1.0)
    assert not found.is_within_budget
    assert "OUTSIDE" in str(found)


def test_a_metric_that_is_nan_is_not_within_any_budget(model, data):
    calls = []

    def metric(candidate):
        calls.append(candidate)
        return 0.0 if len(calls) == 1 else float("nan")

    with pytest.warns(UserWarning, match="nan, is outside"):
        assert not suggest_mapping(model, data, metric, budget=1e9).is_within_budget


def test_something_else_to_minimize_is_an_error(model, data):
    with pytest.raises(QConfigError, match="'bytes' or 'ms', got 'watts'"):
        suggest_mapping(model, data, budget=1.0, minimize="watts")


@pytest.mark.parametrize("budget", ["1%", None, math.nan])
def test_a_budget_that_is_no_number_is_an_error(model, data, budget):
    with pytest.raises(ArgumentError, match=rf"budget is how much worse .*, a number, got {budget!r}"):
        suggest_mapping(model, data, budget=budget)


@pytest.mark.parametrize(
    ("metric", "words"),
    [("loss", "got 'loss'"), (lambda m: None, "gave NoneType"), (lambda m: torch.ones(2), "gave Tensor")],
)
def test_a_metric_that_gives_no_number_is_an_error(model, data, metric, words):
    with pytest.raises(ArgumentError, match=rf"metric is a function of a model that gives a number, .*{words}"):
        suggest_mapping(model, data, metric, budget=1.0)


def test_a_float_model_whose_metric_is_nan_is_an_error(model, data):
    with pytest.raises(ModelStateError, match=r"the metric of the float model is NaN.*look for NaN in the model's"):
        suggest_mapping(model, data, lambda m: math.nan, budget=1.0)


class Speech(nn.Module):
    """What a speech model begins with: LSTM layers over energies, and scores of the symbols.

    The first matrix weighs what is soft more than what is loud, and one of its rows is 30 times the median row.
    """

    def __init__(self, inputs, hidden, layers, outputs):
        super().__init__()
        self.lstm, self.scores = nn.LSTM(inputs, hidden, layers, batch_first=True), nn.Linear(hidden, outputs)
        with torch.no_grad():
            self.lstm.weight_ih_l0 *= torch.logspace(-5, math.log10(20), inputs) ** -0.45
            rows = self.lstm.weight_ih_l0.abs().amax(1)
            self.lstm.weight_ih_l0[hidden // 2] *= 30 * rows.median() / rows[hidden // 2]

    def forward(self, energies):
        return self.scores(self.lstm(energies)[0])


def energies(batch, time, inputs, seed):
    """Return raw energies, from 1e-9 to 60."""
    generator = torch.Generator().manual_seed(seed)
    loudness = torch.logspace(-5, math.log10(20), inputs)
    found = (loudness * torch.randn(batch, time, inputs, generator=generator).mul(2).exp()).clamp(1e-9, 60)
    found[0, 0, 0] = 1e-9
    return found


def test_an_lstm_that_int8_ruins_is_saved_by_its_first_matrix_alone():
    torch.manual_seed(0)
    model, data = Speech(80, 256, 3, 64).eval(), [(energies(2, 30, 80, 0),)]
    everything = quantize(model, EVERYTHING, data)
    assert relative_rms(model, everything, data) > 0.2
    found = suggest_mapping(model, data, budget=0.01, schemes=("int8", "int16"))
    assert found.kept == (("lstm.weight_ih_l0", "int16"),)
    quantized = quantize(model, found.mapping, data)
    assert relative_rms(model, quantized, data) == pytest.approx(
        found.metric, rel=1e-5
    )  # with gradients torch runs an LSTM otherwise
    assert found.metric <= 0.01
    assert byte_count(quantized) < 1.1 * byte_count(everything)
    assert relative_rms(model, quantized, [(energies(2, 30, 80, 1),)]) < 0.0125  # no luck of the data searched with


class Words(nn.Module):
    """A language model of a few units."""

    def __init__(self):
        super().__init__()
        self.e, self.rnn, self.d = nn.Embedding(50, 32), nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 50)

    def forward(self, x):
        return self.d(self.rnn(self.e(x))[0])


def words_and_data():
    """Return a Words and data for which a budget of 0.1 mixes schemes within the LSTM."""
    torch.manual_seed(0)
    model = Words().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model, [(torch.randint(50, (4, 6)),)]


@pytest.mark.parametrize("qconfig", [per_tensor_dynamic_qconfig, default_dynamic_qconfig.with_reduce_range()])
def test_weights_of_one_site_measure_their_inputs_as_the_mapping_says(qconfig):
    model, data = words_and_data()
    mapping = QConfigMapping().set_global(qconfig)
    found = suggest_mapping(model, data, budget=0.1, qconfig_mapping=mapping, error_feedback=False)
    rnn = next(site.qconfig for site in record_of(found.model).sites if site.path == "rnn")
    assert [scheme_name(own) for _, own in rnn.parts] == [SMALLEST]
    assert {own.activation for own in (rnn, *dict(rnn.parts).values())} == {qconfig.activation}


def test_no_two_models_of_the_curve_are_called_the_same():
    def point(schemes, size):
        return search.Point(tuple({"4": "int4", "8": "int8"}[letter] for letter in schemes), 0.0, 0.0, size, math.nan)

    points = [point("44484", 1), point("88844", 2), point("84888", 3), point("88888", 4)]
    found = SimpleNamespace(
        units="abcde", name=str, points=points, is_within=lambda metric: True, cost=lambda point: point.bytes
    )
    assert [row.what for row in _rows(found, points[0])][1:3] == ["int4 ×2, int8 ×3", "int4 ×1, int8 ×4"]
    points[2] = point("48848", 3)
    assert [row.what for row in _rows(found, points[0])] == [
        "int4 ×4, int8 ×1",
        "suggested, but a int8, b int8, c int8, d int4",
        "suggested, but b int8, c int8, d int4, e int8",
        "all int8",
    ]


def test_that_a_model_does_not_trace_is_said_once():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(x) if x.sum() > 0 else x

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        suggest_mapping(Branches().eval(), [(torch.ones(2, 8),)], budget=0.5, schemes=("int8",))
    assert [str(w.message).startswith("Branches does not trace") for w in caught] == [True]
    assert caught[0].filename == __file__


def test_a_metric_that_is_0_for_all_is_an_error(model, data):
    with pytest.raises(ArgumentError, match=r"metric gives 0 or NaN for all .* quantized models that were tried"):
        suggest_mapping(model, data, lambda candidate: 0.0, budget=1.0)
