"""Entries of a mapping for single weights: which one decides, what each weight becomes, and what the reports say."""

import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import fxquant
from fxquant import (
    MappingNameError,
    QConfigError,
    QConfigMapping,
    default_dynamic_qconfig,
    explain,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
    quantize_dynamic,
)
from tests.samples import everything, prepare, quantize

A, B, C, D = default_dynamic_qconfig, int4_dynamic_qconfig, float16_dynamic_qconfig, int16_dynamic_qconfig
SHARED_INT16 = replace(D, activation=replace(D.activation, axis="tensor"))
NAMES = ("weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1")


class Tagger(nn.Module):
    """An LSTM of two layers, a Linear, and a functional call of a weight of its own."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 8, 2)
        self.head = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(5, 8))

    def forward(self, x):
        return F.linear(self.head(self.lstm(x)[0]), self.weight)


X = (torch.randn(3, 2, 12),)
BYTES = {name: 4 * parameter.numel() for name, parameter in Tagger().named_parameters()}


def chosen(mapping, model=None, inputs=X):
    """Return the qconfig of each matrix of the sites, by its path."""
    found = {}
    for site in prepare(model or Tagger(), *inputs, mapping=mapping).record.sites:
        names = NAMES if site.operator == "lstm" else ("weight",)
        paths = [site.path] if site.call else [f"{site.path}.{name}" for name in names]
        found.update({path: site.qconfig.of(name) for path, name in zip(paths, names, strict=True)})
    return found


ALL = (*(f"lstm.{name}" for name in NAMES), "head.weight", "weight")


@pytest.mark.parametrize("qconfig", [None, B, C, D])
@pytest.mark.parametrize("name", NAMES)
def test_an_entry_for_a_weight_decides_for_that_weight_alone(name, qconfig):
    got = chosen(everything(A).set_module_name(f"lstm.{name}", qconfig))
    assert got == {**dict.fromkeys(ALL, A), f"lstm.{name}": qconfig}


def test_a_weight_outranks_its_module_and_that_its_parents():
    mapping = everything(A).set_module_name("", C).set_module_name("lstm", B).set_module_name("lstm.weight_hh_l1", A)
    assert chosen(mapping) == {**dict.fromkeys(ALL, C), **{f"lstm.{name}": B for name in NAMES[:3]}, ALL[3]: A}


def test_an_order_outranks_a_weights_name():
    mapping = everything(A).set_module_name("lstm.weight_hh_l1", C).set_module_name_object_type_order("", nn.LSTM, 0, B)
    assert chosen(mapping) == {**dict.fromkeys(ALL, A), **{f"lstm.{name}": B for name in NAMES}}


@pytest.mark.parametrize("pattern", [r".*weight_ih", r"lstm\.weight_ih_l.$"])
def test_a_regex_that_matches_a_weights_path_decides_for_it(pattern):
    got = chosen(everything(A).set_module_name_regex(pattern, B))
    assert {path for path, qconfig in got.items() if qconfig == B} == {"lstm.weight_ih_l0", "lstm.weight_ih_l1"}


def test_a_regex_that_matches_the_module_alone_decides_for_its_weights():
    got = chosen(everything(A).set_module_name_regex("lstm$", B))
    assert {path for path, qconfig in got.items() if qconfig == B} == set(ALL[:4])


@pytest.mark.parametrize(("patterns", "first"), [((r"lstm$", r".*hh"), C), ((r".*hh", r"lstm$"), B)])
def test_of_a_modules_and_a_weights_regex_the_first_wins(patterns, first):
    qconfigs = {"lstm$": C, r".*hh": B}
    mapping = everything(A)
    for pattern in patterns:
        mapping.set_module_name_regex(pattern, qconfigs[pattern])
    got = chosen(mapping)
    assert (got["lstm.weight_ih_l0"], got["lstm.weight_hh_l0"]) == (C, first)


@pytest.mark.parametrize("path", ["head.weight", "weight"])
@pytest.mark.parametrize("qconfig", [None, B])
def test_a_site_of_one_weight_is_decided_by_its_weights_name(path, qconfig):
    expected = {other: qconfig if other == path else A for other in ALL}
    got = chosen(everything(A).set_module_name(path, qconfig))
    assert got == {other: own for other, own in expected.items() if own is not None}


def test_a_fused_linear_and_an_embedding_are_decided_by_their_weights_names():
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 8), nn.ReLU())
    mapping = everything(A).set_module_name("0.weight", float_qparams_weight_only_qconfig)
    mapping.set_module_name("1.weight", None)
    record = prepare(model, torch.tensor([[1, 2]]), mapping=mapping).record
    assert [(site.path, site.qconfig) for site in record.sites] == [("0", float_qparams_weight_only_qconfig)]
    assert [(left.path, left.rule) for left in record.skipped] == [("1", "module_name '1.weight'")]


def test_a_regex_for_a_module_does_not_reach_calls_of_its_weight_elsewhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Embedding(9, 8)

        def forward(self, x):
            return F.linear(self.encoder(x), self.encoder.weight)

    mapping = everything(A).set_module_name_regex("encoder", float_qparams_weight_only_qconfig)
    record = prepare(Tied(), torch.tensor([[1, 2]]), mapping=mapping).record
    assert [(site.kind, site.rule) for site in record.sites] == [
        ("nn.Embedding", "module_name_regex 'encoder'"),
        ("F.linear", "global"),
    ]


def test_one_weight_of_a_module_that_no_entry_covers():
    record = prepare(Tagger(), *X, mapping=QConfigMapping().set_module_name("lstm.weight_hh_l1", A)).record
    (site,) = record.sites
    assert [site.qconfig.of(name) for name in NAMES] == [None, None, None, A]
    assert site.rule == "module_name 'lstm.weight_hh_l1'"
    assert [(left.path, left.reason) for left in record.skipped] == [
        *((f"lstm.{name}", "no mapping entry covers it") for name in NAMES[:3]),
        ("head", "no mapping entry covers it"),
        ("weight", "no mapping entry covers it"),
    ]


def test_a_module_all_of_whose_weights_are_to_stay_float_is_no_site():
    record = prepare(Tagger(), *X, mapping=everything(A).set_module_name_regex(r"lstm\.weight", None)).record
    assert [site.path for site in record.sites] == ["head", "weight"]
    (left,) = record.skipped
    assert (left.path, left.reason) == ("lstm", "the mapping says float")


def test_a_weight_of_a_shared_module_goes_by_any_of_its_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.LSTM(8, 8)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x)[0])[0]

    for name in ("a", "b"):
        mapping = everything(A).set_module_name("a", C).set_module_name(f"{name}.weight_ih_l0", None)
        (site,) = prepare(Shared(), torch.randn(3, 2, 8), mapping=mapping).record.sites
        assert (site.qconfig.of("weight_ih_l0"), site.qconfig.of("weight_hh_l0")) == (None, C)


def test_a_computed_weight_goes_by_the_name_that_it_is_computed_under():
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    mapping = everything(A).set_module_name("0.weight", None)
    for record in (
        prepare(model, torch.randn(2, 8), mapping=mapping).record,
        fxquant.graph.record.record_of(quantize_dynamic(model.eval(), mapping)),
    ):
        assert [site.path for site in record.sites] == ["1"]


@pytest.mark.parametrize("wrong", ["lstm.weight_hi_l0", "lstm.weight_ih_0", "lsmt.weight_ih_l0"])
def test_a_misspelt_weight_is_an_error_with_the_nearest(wrong):
    with pytest.raises(MappingNameError, match=rf"{wrong!r}, which is not in the model; did you mean 'lstm.weight_ih_"):
        prepare(Tagger(), *X, mapping=everything().set_module_name(wrong, None))


def test_a_bias_is_not_said_to_be_missing():
    told = r"'lstm.bias_ih_l0', which has fewer than two dimensions and stays float; did you mean 'lstm.weight_ih_l0'"
    with pytest.raises(MappingNameError, match=told):
        prepare(Tagger(), *X, mapping=everything().set_module_name("lstm.bias_ih_l0", None))


def test_an_order_entry_names_a_module_not_a_weight():
    mapping = everything().set_module_name_object_type_order("lstm.weight_ih_l0", nn.LSTM, 0, None)
    with pytest.raises(MappingNameError, match=r"names module 'lstm.weight_ih_l0', which is not in the model"):
        prepare(Tagger(), *X, mapping=mapping)


def test_a_scheme_that_a_named_weights_operator_cannot_take_is_an_error():
    mapping = everything().set_module_name("lstm.weight_ih_l0", float_qparams_weight_only_qconfig)
    told = r"'lstm.weight_ih_l0' \(nn.LSTM\) cannot take the qconfig that module_name 'lstm.weight_ih_l0' gives it"
    with pytest.raises(QConfigError, match=told):
        prepare(Tagger(), *X, mapping=mapping)


def test_a_scheme_that_a_matched_weights_operator_cannot_take_is_its_reason():
    mapping = everything().set_module_name_regex(".*weight_ih_l0", float_qparams_weight_only_qconfig)
    with pytest.warns(UserWarning, match=r"quantizes nothing: lstm.weight_ih_l0 \(nn.LSTM\) stays float: its qconfig"):
        record = prepare(Tagger(), *X, mapping=mapping).record
    (left,) = record.skipped
    assert left.path == "lstm.weight_ih_l0"
    assert "is for other operators; this one takes: int8 weights" in left.reason
    assert record.sites[0].qconfig.of("weight_ih_l0") is None


@pytest.mark.parametrize("part", ["in_proj_weight", "out_proj.weight"])
def test_a_weight_of_a_module_that_is_quantized_as_a_whole_is_an_error(part):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    mapping = everything().set_module_name(f"attention.{part}", None)
    with pytest.raises(QConfigError, match=rf"decides for '{part}', a part of .*is quantized as a whole: name 'attent"):
        prepare(Attention(), torch.randn(3, 2, 8), mapping=mapping)


@pytest.mark.parametrize(
    ("qconfig", "way"),
    [
        (per_tensor_dynamic_qconfig, "uint8 affine per tensor"),
        (A.with_reduce_range(), "uint8 0–127 affine per token"),
        (SHARED_INT16, "int16 symmetric per tensor"),
    ],
)
def test_weights_that_want_different_activations_are_an_error(qconfig, way):
    told = (
        rf"'lstm' \(nn.LSTM\) quantizes its activations in one way, but module_name 'lstm.weight_ih_l0' gives "
        rf"'weight_ih_l0' '{way}', global gives 'weight_hh_l0' 'uint8 affine per token'; give both the same activation"
    )
    with pytest.raises(QConfigError, match=told):
        prepare(Tagger(), *X, mapping=everything(A).set_module_name("lstm.weight_ih_l0", qconfig))


@pytest.mark.parametrize("qconfig", [B, C, D, None])
def test_one_way_of_activations_goes_with_every_scheme(qconfig):
    mapping = everything(per_tensor_dynamic_qconfig).set_module_name("lstm", A.with_reduce_range())
    reduced = qconfig.with_reduce_range() if qconfig == B else qconfig
    lstm = quantize(Tagger(), *X, mapping=mapping.set_module_name("lstm.weight_ih_l0", reduced)).lstm
    assert lstm._rows == (True, 127)


def test_the_weights_activations_count_and_not_those_of_a_module_that_no_weight_follows():
    mapping = everything(A).set_module_name("lstm", C).set_module_name("lstm.weight_ih_l0", per_tensor_dynamic_qconfig)
    x = torch.randn(3, 2, 12)
    x[:, 1] *= 1000
    lstm = quantize(Tagger(), *X, mapping=mapping).lstm
    assert not torch.allclose(lstm(x)[0][:, :1], lstm(x[:, :1])[0], atol=1e-3)  # one scale for both sequences


def test_a_qconfig_with_parts_is_refused():
    (site, *_) = prepare(Tagger(), *X, mapping=everything().set_module_name("lstm.weight_ih_l0", None)).record.sites
    with pytest.raises(QConfigError, match=r"without parts, got .*weight_ih_l0 float32; name its weights instead"):
        QConfigMapping().set_global(site.qconfig)


def test_strict_lists_the_weights_that_would_stay_float_unasked():
    mapping = everything(A).set_module_name("lstm", None).set_module_name("lstm.weight_ih_l0", A)
    prepare(Tagger(), *X, mapping=mapping, strict=True)  # asked for by the entry for lstm
    mapping = QConfigMapping().set_module_name("lstm.weight_ih_l0", A).set_object_type(nn.Linear, A)
    mapping.set_object_type(F.linear, A)
    with pytest.raises(QConfigError, match="strict: 3 of Tagger's candidates would stay float") as caught:
        prepare(Tagger(), *X, mapping=mapping, strict=True)
    named = re.findall(r"set_module_name\('(.*)', None\)", str(caught.value))
    assert named == [f"lstm.{name}" for name in NAMES[1:]]
    for name in named:
        mapping.set_module_name(name, None)
    prepare(Tagger(), *X, mapping=mapping, strict=True)


def test_bytes_of_float_weights_count_as_float():
    quantized = quantize(Tagger(), *X, mapping=everything(A).set_module_name("lstm.weight_ih_l0", None))
    weights = {name: size for name, size in BYTES.items() if "weight" in name}
    coverage = quantized.record.coverage
    assert coverage.total_bytes == sum(weights.values())
    assert coverage.quantized_bytes == sum(weights.values()) - weights["lstm.weight_ih_l0"]
    site, (left,) = quantized.record.sites[0], quantized.record.skipped
    assert left.float_bytes == weights["lstm.weight_ih_l0"]
    assert site.float_bytes == sum(size for name, size in BYTES.items() if name.startswith("lstm")) - left.float_bytes
    integers = sum(weights[f"lstm.{name}"] // 4 + 4 * 4 * 8 for name in NAMES[1:])  # and a scale for each of 4H rows
    assert site.int_bytes == integers + 2 * 4 * 4 * 8  # and two biases


def test_reports_name_the_weights():
    mapping = everything(A).set_module_name("lstm.weight_ih_l0", None).set_module_name_regex(".*_hh_l1", C)
    prepared = prepare(Tagger(), *X, mapping=mapping)
    quantized = fxquant.convert_fx(prepared)
    row, *_, last = explain(quantized).rows
    assert row.decision == ("default_dynamic_qconfig; weight_ih_l0 float32; weight_hh_l1 float16_dynamic_qconfig")
    assert row.rule == "global; module_name_regex '.*_hh_l1'"
    assert (last.path, last.decision, last.rule) == (
        "lstm.weight_ih_l0", "float: the mapping says float", "module_name 'lstm.weight_ih_l0'")  # fmt: skip
    assert explain(prepared).rows == explain(quantized).rows
    assert "weight_ih_l0 float32" in str(fxquant.graph_diff(prepared, quantized))
    assert "weight_ih_l0 float32; weight_hh_l1 float16" in repr(quantized.lstm)


@pytest.mark.parametrize("name", ["lstm.weight_ih_l0", "head.weight"])
def test_the_entry_that_opts_out_beats_the_one_for_the_weight(name):
    mapping = everything(A).set_module_name(name, C)
    site = next(s for s in prepare(Tagger(), *X, mapping=mapping).record.sites if name.startswith(s.path))
    eval(f"mapping.{site.opt_out}", {"mapping": mapping, "nn": nn})
    record = prepare(Tagger(), *X, mapping=mapping).record
    assert site.path not in [other.path for other in record.sites]
    assert site.path in [left.path for left in record.skipped]


def test_an_entry_for_a_weight_that_quantizes_nothing_is_a_warning():
    model = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Flatten(), nn.Linear(48, 8))
    mapping = everything(A).set_module_name("0.weight", A)
    with pytest.warns(UserWarning, match=r"module_name '0.weight' quantizes nothing: 0 \(nn.Conv1d\) stays float"):
        prepare(model, torch.randn(2, 8, 8), mapping=mapping)


def test_an_entry_for_a_weight_that_is_out_of_reach_is_a_warning():
    told = r"module_name 'weight' quantizes nothing: Tagger \(.*Tagger\) stays float: its forward is not traced"
    with pytest.warns(UserWarning, match=told):
        quantize_dynamic(Tagger().eval(), {"lstm": A, "weight": A})


def test_a_refused_module_is_the_reason_of_the_entry_for_its_weight():
    model = Tagger()
    with torch.no_grad():
        model.lstm.weight_ih_l0[0, 0] = float("nan")
    mapping = everything(A).set_module_name("lstm", None).set_module_name("lstm.weight_hh_l0", A)
    told = (
        r"module_name 'lstm.weight_hh_l0' quantizes nothing: lstm \(nn.LSTM\) stays float: its weight_ih_l0 holds NaN"
    )
    with pytest.warns(UserWarning, match=told):
        prepare(model, *X, mapping=mapping)


def test_an_entry_that_quantizes_a_weight_is_no_warning_where_something_else_stays_float():
    class Listener(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.lstm = nn.Conv1d(8, 8, 1), nn.LSTM(8, 8)

        def forward(self, x):
            return self.lstm(self.conv(x.mT).mT)[0]

    mapping = everything(A).set_module_name_regex("conv|.*weight_ih_l0", C)
    record = prepare(Listener(), torch.randn(3, 2, 8), mapping=mapping).record  # a warning is an error here
    assert [left.path for left in record.skipped] == ["conv"]
    assert record.sites[0].part_rules == (record.skipped[0].rule,)


def test_the_eager_form_takes_names_of_weights():
    model = Tagger().eval()
    quantized = quantize_dynamic(model, {"lstm": A, "lstm.weight_ih_l0": None})
    state = quantized.lstm.state_dict()
    assert torch.equal(state["weight_ih_l0"], model.lstm.weight_ih_l0)
    assert "weight_ih_l0_scale" not in state
    assert state["weight_hh_l0_int8"].dtype == torch.int8
    own = everything(None).set_module_name("lstm", A).set_module_name("lstm.weight_ih_l0", None)
    assert torch.equal(quantized(*X), quantize(model, *X, mapping=own)(*X))


def test_the_root_itself_may_be_named_by_a_weight():
    model = nn.LSTM(12, 8).eval()
    quantized = quantize_dynamic(model, {"": A, "weight_ih_l0": C})
    assert [quantized.qconfig.of(name) for name in NAMES[:2]] == [C, A]


def test_a_pattern_for_a_weight_of_a_module_that_is_quantized_as_a_whole_is_an_error_too():
    mapping = everything().set_module_name_regex(".*out_proj", None)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}).eval()
    with pytest.raises(QConfigError, match=r"^module_name_regex '\.\*out_proj' decides for 'out_proj', a part of 'att"):
        quantize_dynamic(model, mapping)


def test_an_entry_by_name_outranks_a_pattern_that_another_name_of_the_module_matches():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.block = nn.ModuleDict({"b": self.a})

        def forward(self, x):
            return self.a(x)

    mapping = QConfigMapping().set_module_name_regex("a", None).set_module_name("block", A)
    (site,) = prepare(Twice(), torch.randn(2, 4), mapping=mapping).record.sites
    assert site.rule == "module_name 'block'"
