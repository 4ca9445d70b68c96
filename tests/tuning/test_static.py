"""suggest_mapping on static models: which sites to leave finer, for a budget."""

import pytest
import torch
from torch import nn

import fxquant
from fxquant import (
    QConfigError,
    convert_fx,
    default_static_qconfig,
    default_static_qconfig_mapping,
    prepare_fx,
    suggest_mapping,
)
from fxquant.tuning.static import LADDER

DATA = [(torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(n)),) for n in range(2)]


def network():
    """Return a network whose third layer reads an outlier that it does not need, and whose last is a Linear."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4),
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[2].weight[0] *= 300
        model[2].bias[0] *= 300
        model[3].weight[:, 0] /= 300
    return model


def suggest(budget, **more):
    return suggest_mapping(network(), DATA, budget=budget, qconfig_mapping=default_static_qconfig_mapping(), **more)


def test_what_is_good_enough_stays_static():
    found = suggest(0.9)
    assert [step.what for step in found.rows] == ["all int8"]
    assert found.sites == ()
    assert all(site.is_static for site in found.model.record.sites)


def test_the_layer_that_does_harm_becomes_finer_and_the_others_stay_static():
    found = suggest(0.05)
    assert found.is_within_budget
    assert found.kept == (("3", "float"),)
    assert "alone it worsens the metric by" in found.sites[0].why
    assert [site.path for site in found.model.record.sites] == ["0", "2", "6", "8"]
    assert not next(step for step in found.rows if step.what == "all int8").is_within


@torch.no_grad()
def test_the_mapping_gives_the_model():
    found = suggest(0.05)
    again = convert_fx(prepare_fx(network(), found.mapping, DATA[0]), data=DATA)
    assert torch.equal(again(DATA[0][0]), found.model(DATA[0][0]))


def test_a_linear_becomes_dynamic_or_int16_before_it_becomes_float():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 300
        model[1].weight[:, 0] /= 300
    data = [(torch.randn(64, 16),)]
    found = suggest_mapping(model, data, budget=0.01, qconfig_mapping=default_static_qconfig_mapping())
    assert found.is_within_budget
    assert dict(found.kept)["1"] == "int16"
    fewer = suggest_mapping(
        model, data, budget=0.01, qconfig_mapping=default_static_qconfig_mapping(), schemes=("int8", "float")
    )
    assert set(dict(fewer.kept).values()) == {"float"}


def test_what_the_mapping_leaves_alone_stays_so():
    mapping = default_static_qconfig_mapping().set_module_name("0", None)
    found = suggest_mapping(network(), DATA, budget=0.05, qconfig_mapping=mapping)
    assert "0" not in [site.path for site in found.model.record.sites]


def test_time_is_measured_on_whole_models():
    found = suggest(0.05, minimize="ms")
    assert found.is_within_budget
    assert all(step.ms > 0 for step in found.rows)


def test_a_budget_that_only_float_keeps_gives_float():
    model = network()
    found = suggest_mapping(model, DATA, budget=0.0, qconfig_mapping=default_static_qconfig_mapping())
    assert found.model is model
    assert found.metric == 0.0


def test_a_budget_that_no_scheme_keeps_gives_the_nearest_with_a_warning():
    with pytest.warns(UserWarning, match=r"outside the budget of 1e-06; it is the nearest of"):
        found = suggest(1e-6, schemes=("int8", "dynamic int8"))
    assert not found.is_within_budget


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        (
            ("int4",),
            r"schemes of a static model is a tuple of some of 'int8', 'dynamic int8', 'int16', 'float', got 'int4'",
        ),
        ("int8", "got 'int8'"),
        ((), "schemes is empty"),
        (("int16",), r"has none that 0 takes; add 'float'"),
    ],
)
def test_wrong_schemes_are_errors(schemes, message):
    with pytest.raises(QConfigError, match=message):
        suggest(0.1, schemes=schemes)


def test_dynamic_sites_of_the_same_model_are_units_too():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm = nn.Conv2d(3, 8, 3, padding=1), nn.LSTM(8, 8, batch_first=True)

        def forward(self, x):
            return self.lstm(self.conv(x).relu().mean(3).transpose(1, 2))[0]

    torch.manual_seed(0)
    found = suggest_mapping(Both().eval(), DATA, budget=1e-3, qconfig_mapping=default_static_qconfig_mapping())
    assert found.is_within_budget
    assert dict(found.kept)["lstm"] in LADDER[2:]
    assert fxquant.explain(found.model)
    assert default_static_qconfig.is_static
