"""explain: every candidate, and why."""

import copy
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    ModelStateError,
    convert_fx,
    explain,
    fuse_fx,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    load,
    quantize_dynamic,
    save,
)
from fxquant.debug.report.table import megabytes
from tests.samples import WordLM, everything, lm_inputs, prepare, quantize


def test_rows_of_a_quantized_model():
    model = WordLM()
    mapping = everything().set_object_type(nn.LSTM, None)
    rows = {row.path: row for row in explain(quantize(model, *lm_inputs(model), mapping=mapping)).rows}
    assert rows.keys() == {"encoder", "rnn", "decoder"}
    assert (rows["decoder"].kind, rows["decoder"].operator) == ("nn.Linear", "linear")
    assert rows["decoder"].decision == "default_dynamic_qconfig"
    assert rows["decoder"].rule == "global"
    assert rows["decoder"].saved_bytes == 3 * 50 * 8 - 4 * 50  # a scale a row costs 4 bytes
    assert rows["rnn"].decision == "float: the mapping says float"
    assert (rows["rnn"].is_quantized, rows["rnn"].saved_bytes, rows["rnn"].rule) == (False, 0, "object_type nn.LSTM")


def test_the_total_line():
    model = WordLM()
    prepared = prepare(model, *lm_inputs(model), mapping=everything().set_module_name("encoder", None))
    weights = 4 * (4 * 8 * 12 + 3 * 4 * 8 * 8 + 50 * 8)  # of rnn and decoder, without their biases
    told = f"2 of 3 candidates, {weights:,} of {weights + 4 * 50 * 12:,} weight bytes"
    share = f"({100 * weights / (weights + 4 * 50 * 12):.1f} %)"
    saved = 3 * weights // 4 - 4 * (2 * 2 * 4 * 8 + 50)  # 3 bytes of 4, but for a scale a row
    saved += 4 * 2 * 4 * 8  # the two biases of an LSTM layer become one
    assert explain(prepared).total == f"{told} to be quantized by convert_fx {share}, {megabytes(saved)} saved"
    assert explain(convert_fx(prepared)).total == f"{told} quantized {share}, {megabytes(saved)} saved"
    assert repr(convert_fx(prepared).record) == f"<quantized: {told} quantized {share}>"


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(50, 8), nn.Linear(8, 50)
        self.decoder.weight = self.encoder.weight

    def forward(self, x):
        return self.decoder(self.encoder(x)) @ self.encoder.weight


@pytest.mark.parametrize(("left", "quantized"), [((), 1600), (("encoder",), 0), (("decoder",), 0)])
def test_a_tied_weight_counts_once_and_as_float_where_one_use_stays_so(left, quantized):
    mapping = everything()
    for name in left:
        mapping.set_module_name(name, None)
    coverage = explain(prepare(Tied(), torch.tensor([3, 4]), mapping=mapping)).coverage
    assert (coverage.quantized_bytes, coverage.total_bytes) == (quantized, 4 * 50 * 8)
    assert coverage.share == quantized / 1600


def test_a_tied_weight_is_saved_once():
    prepared = prepare(Tied(), torch.tensor([3, 4]))
    for explained in (explain(prepared), explain(convert_fx(prepared))):
        # Embedding and Linear share int8 rows of 8; x @ weight has 8 scales and integers of its own, of columns.
        assert explained.saved_bytes == 4 * 50 * 8 - (50 * 8 + 4 * 50) - (50 * 8 + 4 * 8)
        assert explained.total.endswith(f", {explained.saved_bytes} B saved")
    assert sum(row.saved_bytes for row in explained.rows) > 1600  # at each site what it alone would save


def test_coverage_comes_through_save_and_load(tmp_path):
    quantized = quantize(Tied(), torch.tensor([3, 4]), mapping=everything().set_object_type(nn.Linear, None))
    fxquant.save(quantized, tmp_path / "model.safetensors")
    loaded = fxquant.load(Tied().eval(), tmp_path / "model.safetensors")
    assert loaded.record.coverage == quantized.record.coverage
    assert loaded.record.sites == quantized.record.sites


class OtherAttention(nn.MultiheadAttention):
    def forward(self, x):
        return super().forward(x, x, x)


class MaskedAttention(nn.MultiheadAttention):
    def merge_masks(self, *args):
        return super().merge_masks(*args)


@pytest.mark.parametrize(
    ("kind", "own"), [(OtherAttention, "has a forward of its own"), (MaskedAttention, "redefines merge_masks")]
)
def test_candidates_inside_leaves_are_listed(kind, own):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = kind(8, 2)

        def forward(self, x):
            return self.attention(*[x] * (1 if kind is OtherAttention else 3))[0]

    found = {row.path: row.decision for row in explain(quantize(Model(), torch.randn(3, 2, 8))).rows}
    assert found == {
        "attention": f"float: it is a subclass of nn.MultiheadAttention that {own}",
        "attention.out_proj": f"float: {__name__}.{kind.__name__} reads its children's weights itself",
    }


def test_a_prepared_model_is_left_as_it_was():
    model = Tied()
    prepared = prepare(model, torch.tensor([3, 4]))
    before = (prepared.code, repr(prepared.record.sites), [*prepared.state_dict()], prepared(torch.tensor([3, 4])))
    explain(prepared)
    after = (prepared.code, repr(prepared.record.sites), [*prepared.state_dict()], prepared(torch.tensor([3, 4])))
    assert before[:3] == after[:3]
    assert torch.equal(before[3], after[3])


def test_fusions_are_told():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    text = str(explain(prepare(model, torch.randn(2, 4))))
    assert "fused: 0 → 1, at 0" in text


def test_it_fits_100_columns():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_name_that_goes_on_and_on_and_on_and_on = nn.ModuleDict({"x" * 60: nn.Linear(4, 4)})
            self.weight = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(self.a_name_that_goes_on_and_on_and_on_and_on["x" * 60](x), self.weight) @ self.weight

    for mapping in (everything(), everything().set_module_name_regex("a_name_that_goes_on.*", None)):
        text = str(explain(quantize(Model(), torch.randn(2, 4), mapping=mapping)))
        assert max(map(len, text.splitlines())) <= 100


def test_a_model_without_candidates():
    explained = explain(prepare(nn.Sequential(nn.ReLU()), torch.randn(2, 4)))
    assert explained.rows == ()
    assert "0 of 0 candidates" in str(explained)
    assert explained.coverage.share == 1


class Reader(nn.Module):
    """Reads one weight in two calls, the second of which has no quantized form."""

    def __init__(self):
        super().__init__()
        self.weight, self.linear = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        x = F.linear(x, self.weight)  # line 1
        x = self.linear(x)  # line 2
        return torch.cdist(x, self.weight)  # line 3


def test_each_row_knows_the_user_s_line(tmp_path):
    code, first = inspect.getsourcelines(Reader.forward)
    lines = {text.split("# ")[1].strip(): first + i for i, text in enumerate(code) if "# line" in text}
    quantized = quantize(Reader(), torch.randn(2, 4))
    save(quantized, tmp_path / "m.safetensors")
    twins = (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized)))
    for model in (quantized, *twins, load(Reader().eval(), tmp_path / "m.safetensors")):
        rows = {(row.path, row.call): row.source for row in explain(model).rows}
        assert rows == {
            ("weight", "linear"): f"{__file__}:{lines['line 1']}",
            ("linear", ""): f"{__file__}:{lines['line 2']}",
            ("weight", "cdist"): f"{__file__}:{lines['line 3']}",
        }


def test_the_text_gives_the_lines_of_what_stayed_float():
    explained = explain(quantize(Reader(), torch.randn(2, 4)))
    line = next(row.source for row in explained.rows if not row.is_quantized).rpartition(":")[2]
    assert str(explained).count("test_explain.py:") == 1
    assert f"test_explain.py:{line}" in str(explained)


def test_without_a_graph_there_are_no_lines():
    assert [row.source for row in explain(quantize_dynamic(Reader())).rows] == ["", ""]


def test_rows_sorted_by_what_they_save():
    model = WordLM()
    saved = [row.saved_bytes for row in explain(quantize(model, *lm_inputs(model))).sort("saved").rows]
    assert saved == sorted(saved, reverse=True)
    assert len(set(saved)) == 3


def test_a_notebook_gets_html():
    model = WordLM()
    html = explain(quantize(model, *lm_inputs(model)))._repr_html_()
    assert "<table>" in html
    assert "decoder" in html


@pytest.mark.parametrize("model", [nn.Linear(2, 2).eval(), fuse_fx(nn.Linear(2, 2).eval())])
def test_a_model_without_decisions_is_an_error(model):
    with pytest.raises(ModelStateError, match="explain needs the result of prepare_fx or convert_fx, got"):
        explain(model)


def test_int4_sites_say_so_and_what_they_save():
    quantized = quantize(
        nn.Sequential(nn.Linear(128, 64)), torch.randn(2, 128), mapping=everything(int4_dynamic_qconfig)
    )
    (row,) = explain(quantized).rows
    assert row.decision == "int4_dynamic_qconfig"
    assert row.saved_bytes == 64 * 128 * 4 - 64 * 128 // 2 - 64 * 2 * 2


def test_int16_sites_say_so_and_what_they_save():
    model = nn.Sequential(nn.Linear(128, 64))
    quantized = quantize(model, torch.randn(2, 128), mapping=everything(int16_dynamic_qconfig))
    (row,) = explain(quantized).rows
    assert row.decision == "int16_dynamic_qconfig"
    assert row.saved_bytes == 64 * 128 * 2 - 64 * 4
    assert row.regressions == ()
