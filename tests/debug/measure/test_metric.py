"""The default metric, and metrics that cannot be used."""

import math

import pytest
import torch
from torch import nn

import fxquant
from fxquant import (
    ArgumentError,
    ExampleInputsError,
    ModelStateError,
    QConfigMapping,
    convert_fx,
    prepare_fx,
    sensitivity,
)
from tests.debug.measure.test_sensitivity import EVERYTHING, data, model

__all__ = ["data", "model"]  # fixtures


def test_outputs_without_a_tensor_need_a_metric(data):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return {"shape": self.linear(x).shape}

    with pytest.raises(ExampleInputsError, match="pass a metric"):
        sensitivity(Silent().eval(), EVERYTHING, data)


class Tagger(nn.Module):
    """Gives labels before its scores, and what is hidden under a mask."""

    def __init__(self, form, is_traced=True):
        super().__init__()
        self.first, self.second, self.form, self.is_traced = nn.Linear(6, 8), nn.Linear(8, 5), form, is_traced

    def forward(self, x):
        if not self.is_traced and x.sum() > 1e9:
            x = 2 * x
        return self.form(self.second(self.first(x)))


def masked(y):
    scores = torch.cat([y[..., 1:], torch.full_like(y[..., :1], -math.inf)], -1)
    return {"label": y.argmax(-1), "scores": scores, "twice": (2 * y[..., :2],)}


@pytest.mark.filterwarnings("ignore:.*does not trace")
@pytest.mark.parametrize("is_traced", [True, False])
def test_the_worst_of_the_float_outputs_is_the_metric(data, is_traced):
    model = Tagger(masked, is_traced).eval()
    found = sensitivity(model, EVERYTHING, data)
    quantized = convert_fx(prepare_fx(model, EVERYTHING, data[0]))
    expected = []
    for name in ("scores", "twice"):
        noise = signal = 0.0
        for x in data:
            y, z = ({**m(*x), "twice": m(*x)["twice"][0]}[name].detach().double() for m in (model, quantized))
            known = y.isfinite()
            noise, signal = noise + float((y - z)[known].square().sum()), signal + float(y[known].square().sum())
        expected.append(math.sqrt(noise / signal))
    assert found.quantized_metric == pytest.approx(max(expected))
    assert found.float_metric == 0


@pytest.mark.parametrize(
    ("form", "match"),
    [(lambda y: y.argmax(-1), "hold no floating-point tensor"), (lambda y: y[:0], "outputs are empty on a batch")],
)
def test_a_metric_over_nothing_is_an_error(data, form, match):
    with pytest.raises(ExampleInputsError, match=match):
        sensitivity(Tagger(form).eval(), EVERYTHING, data)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_metric_that_tells_nothing_is_an_error(model, data, value):
    values = iter([0.5 if math.isnan(value) else value])  # the float model's comes first
    with pytest.raises(ArgumentError, match=r"gives 0 or NaN for all .* \(is its data empty\?\)"):
        sensitivity(model, EVERYTHING, data, lambda candidate: next(values, value))


def test_a_metric_of_0_counts_where_sites_lose_next_to_nothing(model, data):
    mapping = QConfigMapping().set_global(fxquant.float16_dynamic_qconfig)
    assert sensitivity(model, mapping, data, lambda candidate: 0.0).quantized_metric == 0.0


def test_a_float_model_whose_outputs_are_nan_is_an_error(model):
    with pytest.raises(ModelStateError, match="the metric of the float model is NaN"):
        sensitivity(model, EVERYTHING, [torch.full((2, 6), torch.nan)])
