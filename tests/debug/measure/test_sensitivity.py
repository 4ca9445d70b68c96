"""What each site does alone and among the others, against models converted with mappings that say so."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    ExampleInputsError,
    ModelStateError,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    prepare_fx,
    sensitivity,
)


class Model(nn.Module):
    """Two linears and a functional, whose first makes most of the error."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)
        self.weight = nn.Parameter(torch.randn(4, 5))
        with torch.no_grad():
            self.first.weight[:, 0] *= 50

    def forward(self, x):
        return F.linear(self.second(torch.tanh(self.first(x))), self.weight)


class Branching(nn.Module):
    """A model that does not trace."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum() > 0 else -self.second(x)


EVERYTHING = QConfigMapping().set_global(default_dynamic_qconfig)


def make_model():
    torch.manual_seed(0)
    return Model().eval()


def make_data():
    torch.manual_seed(1)
    return [(torch.randn(3, 6),) for _ in range(4)]


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def data():
    return make_data()


def relative_rms(model, quantized, data):
    """Return √(Σ (y - ŷ)² / Σ y²) over all batches."""
    pairs = [(model(*batch).detach(), quantized(*batch).detach()) for batch in data]
    expected, got = (torch.cat(part).double() for part in zip(*pairs, strict=True))
    return math.sqrt(((expected - got) ** 2).sum() / (expected**2).sum())


def only(*names):
    """Return a mapping that quantizes nothing else."""
    mapping = QConfigMapping()
    for name in names:
        if name == "weight":
            mapping.set_object_type(F.linear, default_dynamic_qconfig)
        else:
            mapping.set_module_name(name, default_dynamic_qconfig)
    return mapping


def test_alone_and_without_are_those_of_models_so_converted(model, data):
    found = sensitivity(model, EVERYTHING, data)
    rows = {row.path: row for row in found.rows}
    names = ("first", "second", "weight")
    assert rows.keys() == set(names)

    def measure(*chosen):
        return relative_rms(model, convert_fx(prepare_fx(model, only(*chosen), data[0])), data)

    assert found.float_metric == 0
    assert found.quantized_metric == pytest.approx(measure(*names), rel=1e-12)
    for name in names:
        without = measure(*(other for other in names if other != name))
        assert rows[name].alone == pytest.approx(measure(name), rel=1e-12)
        assert rows[name].without == pytest.approx(without, rel=1e-12)
        assert rows[name].damage == rows[name].alone
        assert rows[name].gain == pytest.approx(found.quantized_metric - without, rel=1e-9)
        assert rows[name].saved_bytes > 0


def test_the_worst_comes_first(model, data):
    found = sensitivity(model, EVERYTHING, data)
    assert [row.damage for row in found.rows] == sorted((row.damage for row in found.rows), reverse=True)
    assert found.rows[0].path == "first"
    assert str(found).splitlines()[2].startswith("first")


def test_a_metric_of_ones_own_whose_higher_values_are_better(model, data):
    def likeness(candidate):
        return -relative_rms(model, candidate, data)

    own = sensitivity(model, EVERYTHING, data, likeness, higher_is_better=True)
    default = sensitivity(model, EVERYTHING, data)
    for row, other in zip(own.rows, default.rows, strict=True):
        assert row.path == other.path
        assert row.alone == pytest.approx(-other.alone)
        assert row.damage == pytest.approx(other.damage)
        assert row.gain == pytest.approx(other.gain)


def test_a_model_that_does_not_trace(data):
    torch.manual_seed(0)
    model = Branching().eval()
    with pytest.warns(UserWarning, match="the model's own code runs on"):
        found = sensitivity(model, EVERYTHING, data)
    assert {row.path for row in found.rows} == {"first", "second"}
    assert all(row.alone > 0 for row in found.rows)


def test_a_model_that_is_one_site(data):
    torch.manual_seed(0)
    linear = nn.Linear(6, 4).eval()
    (row,) = sensitivity(linear, EVERYTHING, data).rows
    quantized = convert_fx(prepare_fx(linear, EVERYTHING, data[0]))
    assert row.alone == pytest.approx(relative_rms(linear, quantized, data), rel=1e-12)
    assert row.without == 0


def test_the_model_is_not_changed_where_the_metric_fails(model, data):
    before, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())

    def fail(candidate):
        raise RuntimeError("no labels")

    with pytest.raises(RuntimeError, match="no labels"):
        sensitivity(model, EVERYTHING, data, fail)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("data", "words"),
    [([], "held no batch"), (torch.randn(3, 6), r"pass \[tensor\]"), ([(1, 2, 3)], "does not fit"), (3, "got int")],
)
def test_data_that_cannot_be_used_is_an_error(model, data, words):
    with pytest.raises(ExampleInputsError, match=words):
        sensitivity(model, EVERYTHING, data)


def test_a_mapping_that_quantizes_nothing_is_an_error(model, data):
    with pytest.raises(ModelStateError, match="nothing to try"):
        sensitivity(model, QConfigMapping(), data)


def test_progress_wraps_the_work(model, data):
    seen = []

    def progress(work):
        seen.append(len(work))
        return work

    sensitivity(model, EVERYTHING, data, progress=progress)
    sensitivity(model, EVERYTHING, data, lambda candidate: 1.0, progress=progress)
    assert seen == [len(data) * (2 + 2 * 3), 2 + 2 * 3]
