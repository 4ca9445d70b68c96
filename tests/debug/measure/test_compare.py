"""compare: every site's error, by equations computed here from the modules themselves."""

import collections
import copy
import dataclasses
import math
import pickle
import types
import weakref
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fxquant
from fxquant import ExampleInputsError, compare, quantize_dynamic
from tests.samples import Call, WordLM, everything, lm_inputs, prepare, quantize


def errors(pairs):
    """Return SQNR in dB, relative RMS and the largest error of pairs of float and quantized outputs."""
    expected = torch.cat([a.detach().double().flatten() for a, _ in pairs])
    got = torch.cat([b.detach().double().flatten() for _, b in pairs])
    ratio = (expected - got).norm() / expected.norm()
    return pytest.approx((float(-20 * torch.log10(ratio)), float(ratio), float((expected - got).abs().max())))


def accumulated(row):
    return row.sqnr_db, row.relative_rms, row.max_error


def local(row):
    return row.local_sqnr_db, row.local_relative_rms, row.local_max_error


def by_path(comparison):
    return {row.call or row.path: row for row in comparison.rows}


@pytest.mark.parametrize("make", [quantize, lambda model, *_: quantize_dynamic(model)], ids=["graph", "eager"])
def test_two_layers_by_hand(make):
    model = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 5)).eval()
    batches = [torch.randn(rows, 16) * size for rows, size in ((4, 1), (7, 3), (1, 0.1))]
    quantized = make(model, batches[0])
    first, second = quantized.get_submodule("0"), quantized.get_submodule("2")
    found = compare(model, quantized, batches)
    rows = by_path(found)

    assert accumulated(rows["0"]) == local(rows["0"]) == errors([(model[0](x), first(x)) for x in batches])
    assert local(rows["2"]) == errors([(model(x), second(model[:2](x))) for x in batches])
    assert accumulated(rows["2"]) == errors([(model(x), quantized(x)) for x in batches])
    assert (found.output_sqnr_db, found.output_relative_rms, found.output_max_error) == accumulated(rows["2"])
    assert accumulated(rows["2"]) != local(rows["2"])
    assert [(rows[path].calls, rows[path].unpaired) for path in ("0", "2")] == [(3, 0), (3, 0)]
    assert found.batches == 3


def test_the_input_s_range_and_peak():
    model = nn.Sequential(nn.Linear(6, 3)).eval()
    batches = [torch.randn(4, 6), torch.tensor([[0.0, 0, 0, -9, 0, 0]]), torch.zeros(2, 6)]
    (row,) = compare(model, quantize(model, batches[0]), batches).rows
    x = torch.cat(batches).double()
    assert (row.input_min, row.input_max) == (-9, float(x.max()))
    largest = x.abs().amax(-1)
    assert row.peak == pytest.approx(float((6 * largest.square().sum() / x.square().sum()).sqrt()))


@pytest.mark.parametrize(("x", "peak"), [(torch.ones(2, 9), 1), (torch.eye(9), 3)])
def test_peak_is_1_for_equals_and_the_root_of_k_for_a_single_value(x, peak):
    model = nn.Sequential(nn.Linear(9, 3)).eval()
    assert compare(model, quantize(model, x), [x]).rows[0].peak == pytest.approx(peak)


def test_a_peak_twice_as_high_costs_six_decibels():
    x = torch.randn(200, 256)
    x[:, :2] = torch.tensor([20.0, -20])
    twice = x.clone()
    twice[:, :2] *= 2
    model = nn.Sequential(nn.Linear(256, 64, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[:, :2] = 0  # so that only the step's size is felt in the output
        model[0].weight[:, 2:] = (model[0].weight[:, 2:] > 0) * 2.0 - 1  # which int8 holds exactly
    a, b = (compare(model, quantize(model, t), [t]).rows[0] for t in (x, twice))
    assert a.sqnr_db - b.sqnr_db == pytest.approx(20 * math.log10(2), abs=0.5)


class TwiceLinear(nn.Module):
    """Calls one weight twice, the second time through a ReLU, with a bias that is computed."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6) / 3), nn.Parameter(torch.randn(6))

    def forward(self, x):
        return F.relu(F.linear(F.linear(x, self.weight), self.weight, bias=self.bias * 2))


@pytest.mark.parametrize(
    "call",
    [
        lambda x, weight: x @ weight,
        lambda x, weight: x.matmul(weight.t()),
        lambda x, weight: F.linear(x, weight.T),
        lambda x, weight: torch.matmul(other=weight, input=x),
    ],
    ids=["operator", "method", "transposed", "keywords"],
)
def test_products_with_a_weight_of_either_orientation(call):
    model, x = Call(call, 6, 6).eval(), torch.randn(3, 6)
    quantized = quantize(model, x)
    (row,) = compare(model, quantized, [x]).rows
    assert accumulated(row) == local(row) == errors([(model(x), quantized(x))])
    assert (row.path, row.input_max) == ("weight", float(x.max()))


def test_a_model_that_does_not_trace_at_all():
    model, x = Loop().eval(), torch.randn(5, 2, 4)
    with pytest.warns(UserWarning, match="does not trace"):
        quantized = quantize(model, x)
    found = compare(model, quantized, [x])
    assert [(row.path, row.calls) for row in found.rows] == [("cell", 5)]
    assert found.output_sqnr_db == errors([(model(x), quantized(x))]).expected[0]


@pytest.mark.parametrize("function", [F.embedding, F.embedding_bag])
def test_functional_tables(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(20, 8))

        def forward(self, indices):
            return function(indices, self.table)

    model, indices = Model().eval(), torch.randint(20, (4, 3))
    quantized = quantize(model, indices)
    (row,) = compare(model, quantized, [indices]).rows
    assert accumulated(row) == local(row) == errors([(model(indices), quantized(indices))])
    assert math.isnan(row.input_min)
    assert math.isnan(row.input_max)
    assert math.isnan(row.peak)


def test_of_a_recurrent_layer_the_output_is_compared():
    model = WordLM().eval()
    data = [lm_inputs(model) for _ in range(2)]
    quantized = quantize(model, *data[0])
    rows = by_path(compare(model, quantized, data))
    embedded = [(model.encoder(words), hidden) for words, hidden in data]
    assert local(rows["rnn"]) == errors([(model.rnn(*i)[0], quantized.rnn(*i)[0]) for i in embedded])
    own = [(quantized.encoder(words), hidden) for words, hidden in data]
    assert accumulated(rows["rnn"]) == errors(
        [(model.rnn(*i)[0], quantized.rnn(*j)[0]) for i, j in zip(embedded, own, strict=True)]
    )


def test_packed_sequences_are_compared_by_their_data():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 6)

        def forward(self, packed):
            return self.rnn(packed)[0]

    model, packed = Model().eval(), pack_padded_sequence(torch.randn(5, 2, 4), torch.tensor([5, 3]))
    quantized = quantize(model, packed)
    (row,) = compare(model, quantized, [(packed,)]).rows
    assert accumulated(row) == errors([(model(packed).data, quantized(packed).data)])
    assert (row.input_min, row.input_max) == (float(packed.data.min()), float(packed.data.max()))


class Loop(nn.Module):
    """Does not trace; calls its cell once a step."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 4)

    def forward(self, x):
        state = torch.zeros(x.shape[1], 4)
        for step in x:
            state = self.cell(step, state)
        return state if float(state.detach().sum()) > -1e9 else -state


class Fickle(nn.Module):
    """Calls its layer, as often or on as many rows as the layer's type says."""

    def __init__(self, calls, rows=None):
        super().__init__()
        self.layer, self.calls, self.rows = nn.Linear(4, 4), calls, rows

    def forward(self, x):
        is_float = type(self.layer) is nn.Linear
        if self.rows is not None:
            return self.layer(x[: self.rows[is_float]])
        for _ in range(self.calls[is_float]):
            x = self.layer(x)
        return x


@pytest.mark.parametrize(
    ("options", "calls", "unpaired"),
    [(((1, 3),), 2, 4), (((3, 1),), 2, 4), (((0, 0), (2, 3)), 0, 2)],
    ids=["more float calls", "more quantized calls", "other shapes"],
)
def test_calls_without_a_counterpart_are_told(options, calls, unpaired):
    model = Fickle(*options).eval()
    found = compare(model, quantize_dynamic(model), [torch.randn(5, 4)] * 2)
    (row,) = found.rows
    assert (row.calls, row.unpaired) == (calls, unpaired)
    assert f"calls without a counterpart in the other model: layer: {unpaired}" in str(found)


def test_a_site_that_is_never_called_says_so():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)}).eval()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = model

        def forward(self, x):
            return self.parts["used"](x)

    found = compare(Model(), quantize_dynamic(Model()), [torch.randn(2, 4)])
    last = found.rows[-1]
    assert (last.path, last.calls, math.isnan(last.sqnr_db), math.isnan(last.max_error)) == (
        "parts.unused",
        0,
        True,
        True,
    )
    assert "never called: parts.unused" in str(found)


def test_exact_sites_have_infinite_sqnr():
    model = nn.Sequential(nn.Embedding(4, 2), nn.Linear(2, 2)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1], [0, 1], [1, 0], [-1, 1]]) * 127)
    found = compare(model, quantize_dynamic(model, {nn.Embedding}), [torch.tensor([0, 1, 2, 3])])
    (row,) = found.rows
    assert accumulated(row) == (math.inf, 0.0, 0.0)
    assert "exact" in str(found)


def test_where_the_float_output_is_not_finite_there_is_no_error():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4)
    spoilt = torch.cat((x, torch.full((1, 4), math.nan)))
    quantized = quantize(model, x)
    (row,) = compare(model, quantized, [spoilt]).rows
    assert accumulated(row) == errors([(model(x), quantized(x))])
    assert (row.input_min, row.input_max) == (float(x.min()), float(x.max()))


def test_a_quantized_nan_is_the_worst_there_is():
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).eval(), torch.randn(5, 4)
    quantized = quantize(model, x)
    quantized.get_submodule("1").bias[0] = math.nan
    found = compare(model, quantized, [x])
    assert found.rows[0].path == "1"
    assert accumulated(found.rows[0]) == (-math.inf, math.inf, math.inf)


def test_values_that_forward_writes_over_are_compared_as_they_were():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            x.add_(1)
            return self.layer(x).mul_(100)

    model, x = Model().eval(), torch.randn(3, 4)
    quantized, before = quantize(model, x), x.clone()
    (row,) = compare(model, quantized, [x]).rows
    assert accumulated(row) == errors([(model.layer(before + 1), quantized.layer(before + 1))])
    assert torch.equal(x, before)


def test_both_models_draw_the_same_random_numbers():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x + torch.rand_like(x))

    model, x = Model().eval(), torch.randn(3, 4)
    quantized, state = quantize(model, x), torch.get_rng_state()
    (row,) = compare(model, quantized, [x]).rows
    assert accumulated(row) == local(row)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_user_s_hook_is_part_of_the_model_but_not_of_the_site():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).eval(), torch.randn(6, 4)
    model[0].register_forward_hook(lambda _, __, output: output * 3)
    quantized = quantize(model, x)
    rows = by_path(compare(model, quantized, [x]))
    assert [len(m.get_submodule("0")._forward_hooks) for m in (model, quantized)] == [1, 1]
    first, second = quantized.get_submodule("0"), quantized.get_submodule("1")
    plain = first.forward(x)
    assert accumulated(rows["0"]) == errors([(model[0].forward(x), plain)])
    assert accumulated(rows["1"]) == errors([(model(x), second(3 * plain))])


class Counting(nn.Module):
    """Counts its calls in a buffer, which the result shows."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        return self.layer(x) + self.count


def test_state_goes_on_from_batch_to_batch():
    model, x = Counting().eval(), torch.randn(3, 4)
    quantized = quantize(model, x)
    found = compare(model, quantized, [x, x])
    expected = [model(x), model(x)]
    assert found.output_sqnr_db == errors(list(zip(expected, [quantized(x), quantized(x)], strict=True))).expected[0]


def test_a_batch_is_a_tuple_a_list_a_dict_or_a_tensor():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(5, 4)
    quantized = quantize(model, x)
    found = [compare(model, quantized, [batch]) for batch in (x, (x,), [x], {"input": x})]
    assert found == [found[0]] * 4


def test_nothing_is_kept_of_a_batch():
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    seen = []

    def batches():
        for _ in range(4):
            x = torch.randn(2, 4)
            assert sum(ref() is not None for ref in seen) <= 1  # the one before, which the loop still names
            seen.append(weakref.ref(x))
            yield x

    assert compare(model, quantize(model, torch.randn(2, 4)), batches()).batches == 4


def test_arguments_that_the_graph_was_made_for():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, mask=None):
            return self.layer(x) if mask is None else self.layer(x) * mask

    model, x = Model().eval(), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="was traced for mask=None"):
        quantized = quantize(model, x)
    assert compare(model, quantized, [x, {"x": x}, (x, None)]).rows[0].calls == 3


def test_copies_loaded_models_and_prepared_ones_compare_alike(tmp_path):
    model, x = TwiceLinear().eval(), torch.randn(3, 6)
    prepared = prepare(model, x)
    quantized = fxquant.convert_fx(prepared)
    fxquant.save(quantized, tmp_path / "m.safetensors")
    loaded = fxquant.load(model, tmp_path / "m.safetensors")
    twins = [copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)), loaded]
    found = compare(model, quantized, [x])
    assert [compare(model, twin, [x]) for twin in twins] == [found] * 3
    assert compare(prepared, quantized, [x]) == found


def test_the_worst_comes_first():
    model = WordLM().eval()
    found = compare(model, quantize(model, *lm_inputs(model)), [lm_inputs(model)])
    assert [row.sqnr_db for row in found.rows] == sorted(row.sqnr_db for row in found.rows)


def test_it_fits_100_columns():
    inner: nn.Module = nn.Linear(4, 4)
    for _ in range(6):
        inner = nn.Sequential(nn.ModuleDict({"a_rather_long_name": nn.Sequential(inner)})["a_rather_long_name"])
    model = nn.ModuleDict({"x" * 60: inner})["x" * 60]
    x = torch.randn(3, 4) * 1.2345e-20
    text = str(compare(model.eval(), quantize(model, x), [x]))
    assert max(map(len, text.splitlines()[:-4])) <= 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data held no batch"),
        (torch.randn(3, 4), r"data is an iterable of batches, got one tensor \(3, 4\); pass \[tensor\]"),
        ({"x": torch.randn(3, 4)}, r"an iterable of batches, got one dict; pass \[dict\]"),
        (5, r"an iterable of batches, got int; pass \[inputs\]"),
        ("words.txt", r"an iterable of batches, got str"),
        ([5], "a batch is a tuple of positional arguments.*got int"),
        ([(torch.randn(3, 4), 1)], r"a batch of 2 arguments does not fit forward\(.*\(x,\) for x, _ in loader"),
    ],
)
def test_data_that_does_not_fit_is_an_error(data, message):
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(3, 4)
    with pytest.raises(ExampleInputsError, match=message):
        compare(model, quantize(model, x), data)


def test_what_stays_float_is_no_row():
    model = WordLM().eval()
    quantized = quantize(model, *lm_inputs(model), mapping=everything().set_module_name("rnn", None))
    assert by_path(compare(model, quantized, [lm_inputs(model)])).keys() == {"encoder", "decoder"}


def test_progress_wraps_the_data():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(2, 4)
    seen = []

    def watched(batches):
        for batch in batches:
            seen.append(batch)
            yield batch

    found = compare(model, quantize(model, x), [x, 2 * x, 3 * x], progress=watched)
    assert found.batches == len(seen) == 3


def test_the_plot_has_a_pair_of_bars_a_site(tmp_path):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).eval(), torch.randn(2, 4)
    found = compare(model, quantize(model, x), [x])
    text = found.plot(tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text(encoding="utf-8") == text
    svg = "{http://www.w3.org/2000/svg}"
    titles = [group.find(f"{svg}title").text for group in ElementTree.fromstring(text).findall(f"{svg}g")]
    assert titles == [f"{row.path}: {row.sqnr_db:.1f} dB, {row.local_sqnr_db:.1f} dB" for row in found.rows]
    assert text in found.to_html()


@dataclasses.dataclass
class Answer:
    scores: torch.Tensor


class Tagger(nn.Module):
    """Gives its scores, and twice the hidden state, in some form."""

    def __init__(self, form):
        super().__init__()
        self.body, self.head, self.form = nn.Linear(8, 8), nn.Linear(8, 3), form

    def forward(self, x):
        hidden = self.body(x)
        return self.form(self.head(hidden), hidden)


@pytest.mark.parametrize(
    "form",
    [
        lambda y, h: (y.argmax(-1), y),
        lambda y, h: {"label": y.argmax(-1), "scores": y},
        lambda y, h: Answer(y),
        lambda y, h: Packed(y.argmax(-1), {"deep": [y]}),
        lambda y, h: types.SimpleNamespace(mask=y > 0, scores=y),
    ],
    ids=["tuple", "dict", "dataclass", "named tuple", "object"],
)
def test_the_floats_of_an_output_are_judged(form):
    model, x = Tagger(form).eval(), torch.randn(5, 8)
    quantized = quantize_dynamic(model)
    expected, got = model.head(model.body(x)), quantized.head(quantized.body(x))
    found = compare(model, quantized, [x])
    assert (found.output_sqnr_db, found.output_relative_rms, found.output_max_error) == errors([(expected, got)])


Packed = collections.namedtuple("Packed", "label rest")


def test_each_output_is_named_and_the_worst_one_counts():
    model = Tagger(lambda y, h: {"scores": y, "hidden": 100 * h, "none": 0 * h, "label": y.argmax(-1)}).eval()
    x = torch.randn(5, 8)
    quantized = quantize_dynamic(model)
    expected = {
        "hidden": errors([(100 * model.body(x), 100 * quantized.body(x))]).expected,
        "scores": errors([(model.head(model.body(x)), quantized.head(quantized.body(x)))]).expected,
    }
    found = compare(model, quantized, [x, x])
    rows = {row.name: row for row in found.outputs}
    assert rows.keys() == {"hidden", "scores", "none"}
    for name, sums in expected.items():
        row = rows[name]
        assert (row.sqnr_db, row.relative_rms, row.max_error) == pytest.approx(sums)
        assert row.batches == 2
    assert rows["none"].sqnr_db == math.inf
    worst = min(expected, key=lambda name: expected[name][0])
    assert (found.outputs[0].name, found.output_sqnr_db) == (worst, rows[worst].sqnr_db)
    assert f"outputs, SQNR: {worst} {found.output_sqnr_db:.1f} dB, " in str(found)
    assert "the worst of 3 outputs: SQNR" in str(found)


def test_labels_alone_say_nothing():
    model = Tagger(lambda y, h: y.argmax(-1)).eval()
    with pytest.raises(ExampleInputsError, match="hold no floating-point tensor to compare"):
        compare(model, quantize_dynamic(model), [torch.randn(5, 8)])


def test_outputs_that_are_all_nan_are_not_exact():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    found = compare(model, quantize_dynamic(model), [torch.randn(2, 4)])
    assert math.isnan(found.output_sqnr_db)
    assert math.isnan(found.outputs[0].sqnr_db)
    assert "not compared, the float model gives only NaN and infinities" in str(found)
