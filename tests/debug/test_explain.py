"""explain: every candidate, and why."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ModelStateError, convert_fx, explain, fuse_fx, int4_dynamic_qconfig
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
    floats = {row.path: row.float_bytes for row in explain(prepared).rows}
    share = 100 * (floats["rnn"] + floats["decoder"]) / sum(floats.values())
    assert explain(prepared).total.startswith(f"2 of 3 candidates to be quantized by convert_fx: {share:.1f} % of ")
    assert explain(convert_fx(prepared)).total.startswith(f"2 of 3 candidates quantized: {share:.1f} % of ")
    assert explain(convert_fx(prepared)).total.endswith(" saved")


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
