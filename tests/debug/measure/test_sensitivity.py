"""What each site does alone and among the others, against models converted with mappings that say so."""

import copy
import json
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    ArgumentError,
    CheckpointError,
    ExampleInputsError,
    ModelStateError,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    int4_dynamic_qconfig,
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


def test_an_interrupted_run_goes_on_where_it_stopped(model, data, tmp_path):
    calls, limit = [], 4

    def metric(candidate):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(relative_rms(model, candidate, data))
        return calls[-1]

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, EVERYTHING, data, metric, resume=tmp_path / "notes.json")
    limit = 100
    found = sensitivity(model, EVERYTHING, data, metric, resume=tmp_path / "notes.json")
    assert len(calls) == 2 + 2 * 3 + 2  # float and quantized once more, to know the run again
    assert found == sensitivity(model, EVERYTHING, data, metric)


@pytest.mark.parametrize(
    "text", ["", "{", "[]\n", '{"values": 3}\n', '{"sites": [], "batches": 4, "ends": []}\n["float"]\n']
)
def test_a_damaged_file_is_an_error(model, data, tmp_path, text):
    (tmp_path / "notes.json").write_text(text)
    with pytest.raises(CheckpointError, match="remove it to begin anew"):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")


def test_a_file_of_another_run_is_an_error(model, data, tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({"sites": ["other"], "batches": 4, "ends": [0.0]}) + "\n")
    with pytest.raises(CheckpointError, match="another model, mapping or data"):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")


def test_a_file_of_another_mapping_for_the_same_sites_is_an_error(model, data, tmp_path):
    sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")
    coarser = QConfigMapping().set_global(int4_dynamic_qconfig)
    with pytest.raises(CheckpointError, match="another model, mapping or data"):
        sensitivity(model, coarser, data, resume=tmp_path / "notes.json")


@pytest.mark.parametrize("is_traced", [True, False])
def test_a_file_of_other_data_is_an_error(data, tmp_path, is_traced):
    torch.manual_seed(0)
    model = Model().eval() if is_traced else Branching().eval()
    others = [*data[:-1], (data[-1][0] * 1.01,)]
    with nullcontext() if is_traced else pytest.warns(UserWarning, match="the model's own code runs on"):
        whole = sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")
        with pytest.raises(CheckpointError, match="another metric, data or weights: Σ y² of each batch's float output"):
            sensitivity(model, EVERYTHING, others, resume=tmp_path / "notes.json")
        assert sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json") == whole


def test_a_file_of_other_weights_is_an_error(model, data, tmp_path):
    sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")
    with torch.no_grad():
        model.second.weight.mul_(1.01)
    with pytest.raises(CheckpointError, match=r"another metric, data or weights: .*; remove it to begin anew"):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "notes.json")


def test_a_file_of_another_metric_is_an_error(model, data, tmp_path):
    resume = tmp_path / "notes.json"
    sensitivity(model, EVERYTHING, data, lambda candidate: relative_rms(model, candidate, data), resume=resume)
    with pytest.raises(
        CheckpointError, match=r"another metric.* float and quantized, was 0, 0\.\d+, now it is 1, 1\.0"
    ):
        sensitivity(model, EVERYTHING, data, lambda m: 1 + relative_rms(model, m, data), resume=resume)
    with pytest.raises(CheckpointError, match=r"another metric.*, now it is 0, "):  # 0 of the float model as well
        sensitivity(model, EVERYTHING, data, lambda m: relative_rms(model, m, data[:1]), resume=resume)
    with pytest.raises(CheckpointError, match="another metric"):
        sensitivity(model, EVERYTHING, data, resume=resume)


def test_the_number_of_threads_makes_no_other_run(model, data, tmp_path):
    values = iter([1.0, 2.0, 0, 0, 0, 0, 0, 0, 1.0 + 1e-7, 2.0 - 1e-7])
    for _ in range(2):
        found = sensitivity(model, EVERYTHING, data, lambda m: next(values), resume=tmp_path / "notes.json")
        assert (found.float_metric, found.quantized_metric) == pytest.approx((1.0, 2.0), rel=1e-6)


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


def test_outputs_without_a_tensor_need_a_metric(data):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x):
            return {"shape": self.linear(x).shape}

    with pytest.raises(ExampleInputsError, match="pass a metric"):
        sensitivity(Silent().eval(), EVERYTHING, data)


@pytest.mark.parametrize("torn", ["", '["without 2, bat'])
def test_an_interrupted_run_of_partial_passes_goes_on_too(model, data, tmp_path, torn):
    path, whole = tmp_path / "notes.json", sensitivity(model, EVERYTHING, data)

    def interrupt(work):
        for number, item in enumerate(work):
            if number == 13:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, EVERYTHING, data, resume=path, progress=interrupt)
    kept = path.read_text()
    assert len(kept.splitlines()) == 1 + 13
    path.write_text(kept + torn)
    assert sensitivity(model, EVERYTHING, data, resume=path) == whole
    assert path.read_text().startswith(kept)
    assert len(path.read_text().splitlines()) == 1 + 4 * (2 + 2 * 3)


def test_progress_wraps_the_work(model, data):
    seen = []

    def progress(work):
        seen.append(len(work))
        return work

    sensitivity(model, EVERYTHING, data, progress=progress)
    sensitivity(model, EVERYTHING, data, lambda candidate: 1.0, progress=progress)
    assert seen == [len(data) * (2 + 2 * 3), 2 + 2 * 3]


def test_notes_that_cannot_be_kept_are_an_error_at_once(model, data, tmp_path):
    with pytest.raises(
        ArgumentError, match=r"^resume=.*notes.json' cannot be written: .*; give a file in a folder that is there$"
    ):
        sensitivity(model, EVERYTHING, data, resume=tmp_path / "nowhere" / "notes.json")


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
    [(lambda y: y.argmax(-1), "none whose values are floats"), (lambda y: y[:0], "outputs are empty on a batch")],
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
