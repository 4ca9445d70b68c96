"""QConfigMapping: torch.ao's setters, precedence, dict form; as a value; and how it reaches a model."""

import copy
import pickle
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    MappingNameError,
    QConfig,
    QConfigError,
    QConfigMapping,
    TensorSpec,
    default_dynamic_qconfig,
    default_dynamic_qconfig_mapping,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    int4_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.qconfig_mapping import Entry, Setter
from tests.samples import WordLM, everything, kinds, lm_inputs, prepare, quantize

A, B, C = default_dynamic_qconfig, per_tensor_dynamic_qconfig, float16_dynamic_qconfig
STATIC = QConfig(activation=TensorSpec(dtype="uint8", qmax=255), weight=A.weight)


class Nested(nn.Module):
    """Two blocks of two Linears and a functional one each, and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return F.linear(self.second(self.first(x)), self.weight)


def decisions(mapping, model=None):
    """Return each site's qconfig by its path."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepared = prepare(model or Nested(), torch.randn(2, 4), mapping=mapping)
    return {site.path: site.qconfig for site in prepared.record.sites}


ALL = [f"blocks.{i}.{name}" for i in range(2) for name in ("first", "second", "weight")] + ["head"]


def test_nothing_is_quantized_by_an_empty_mapping():
    prepared = prepare(Nested(), torch.randn(2, 4), mapping=QConfigMapping())
    assert prepared.record.sites == ()
    assert {left.reason for left in prepared.record.skipped} == {"no mapping entry covers it"}


def test_global_reaches_everything():
    assert decisions(QConfigMapping().set_global(A)) == dict.fromkeys(ALL, A)


def test_setters_change_the_mapping_and_return_it():
    mapping = QConfigMapping()
    returned = [
        mapping.set_global(A),
        mapping.set_object_type(nn.Linear, B),
        mapping.set_module_name_regex("blocks.*", B),
        mapping.set_module_name("head", B),
        mapping.set_module_name_object_type_order("", nn.Linear, 0, B),
    ]
    assert all(each is mapping for each in returned)


def test_object_type_outranks_global():
    assert decisions(everything(A).set_object_type(nn.Linear, B)) == {
        path: A if path.endswith("weight") else B for path in ALL
    }


def test_object_type_of_a_function():
    assert decisions(everything(A).set_object_type(F.linear, B)) == {
        path: B if path.endswith("weight") else A for path in ALL
    }


def test_regex_outranks_object_type():
    mapping = everything(A).set_object_type(nn.Linear, C).set_module_name_regex(r".*second", B)
    assert {path for path, qconfig in decisions(mapping).items() if qconfig == B} == {
        "blocks.0.second", "blocks.1.second"}  # fmt: skip


def test_regex_matches_from_the_start_only():
    mapping = everything(A).set_module_name_regex("locks", B)
    with pytest.raises(MappingNameError, match="'locks' matches no module or weight from its start"):
        prepare(Nested(), torch.randn(2, 4), mapping=mapping)


@pytest.mark.parametrize("order", [("blocks.*", "blocks.0.*"), ("blocks.0.*", "blocks.*")])
def test_the_first_regex_that_matches_wins(order):
    qconfigs = dict(zip(order, (B, C), strict=True))
    mapping = everything(A)
    for pattern in order:
        mapping.set_module_name_regex(pattern, qconfigs[pattern])
    got = decisions(mapping)
    assert got["blocks.0.first"] == B
    assert got["blocks.1.first"] == qconfigs["blocks.*"]


def test_setting_a_regex_again_keeps_its_place():
    mapping = (
        QConfigMapping().set_module_name_regex("a", B).set_module_name_regex(".*", C).set_module_name_regex("a", A)
    )
    assert list(mapping.module_name_regex_qconfigs.items()) == [("a", A), (".*", C)]


def test_a_name_outranks_a_regex_and_covers_its_children():
    mapping = everything(A).set_module_name_regex(".*", C).set_module_name("blocks.1", B)
    assert {path for path, qconfig in decisions(mapping).items() if qconfig == B} == {
        path for path in ALL if path.startswith("blocks.1.")}  # fmt: skip


def test_a_childs_name_outranks_its_parents():
    mapping = everything(A).set_module_name("blocks.1", B).set_module_name("blocks.1.first", C)
    got = decisions(mapping)
    assert (got["blocks.1.first"], got["blocks.1.second"], got["blocks.0.first"]) == (C, B, A)


def test_a_name_is_no_prefix_of_a_longer_name():
    model = nn.Sequential()
    model.add_module("a", nn.Linear(4, 4))
    model.add_module("ab", nn.Linear(4, 4))
    assert decisions(everything(A).set_module_name("a", B), model) == {"a": B, "ab": A}


def test_the_root_has_the_empty_name():
    assert decisions(everything(A).set_module_name("", B)) == dict.fromkeys(ALL, B)


def test_order_outranks_a_name_and_counts_within_its_module():
    mapping = (
        everything(A).set_module_name("blocks.0", B).set_module_name_object_type_order("blocks.0", nn.Linear, 1, C)
    )
    got = decisions(mapping)
    assert (got["blocks.0.second"], got["blocks.0.first"], got["blocks.1.second"]) == (C, B, A)


def test_order_counts_functions_too():
    mapping = everything(A).set_module_name_object_type_order("blocks.1", F.linear, 0, None)
    assert "blocks.1.weight" not in decisions(mapping)


@pytest.mark.parametrize("index", [2, -1])
def test_an_order_never_reached_is_an_error(index):
    mapping = everything(A).set_module_name_object_type_order("blocks.0", nn.Linear, index, None)
    with pytest.raises(MappingNameError, match=r"'blocks.0' has 2 quantizable nn.Linear, numbered from 0"):
        prepare(Nested(), torch.randn(2, 4), mapping=mapping)


@pytest.mark.parametrize(
    "mapping",
    [
        everything().set_module_name("head", None),
        everything().set_module_name_regex("he.d", None),
        everything().set_module_name_object_type_order("", nn.Linear, 0, None),
        {"": A, "module_name": [("head", None)]},
    ],
)
def test_none_means_float(mapping):
    quantized = quantize(Nested(), torch.randn(2, 4), mapping=mapping)
    assert type(quantized.head) is nn.Linear
    (left,) = quantized.record.skipped
    assert left.path == "head"
    assert "the mapping says float" in left.reason


def test_the_linears_entry_decides_for_a_fused_pair():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    assert decisions(QConfigMapping().set_object_type(nn.Linear, A), model) == {"0": A}


def test_the_function_entry_decides_for_a_fused_call():
    class Model(Block):
        def forward(self, x):
            return F.relu(F.linear(x, self.weight))

    assert decisions(QConfigMapping().set_object_type(F.linear, A), Model()) == {"weight": A}


@pytest.mark.parametrize("name", ["haed", "blocks.2", "blocks.0.frist"])
def test_a_misspelt_name_is_an_error_with_the_nearest(name):
    mapping = everything().set_module_name(name, None)
    with pytest.raises(MappingNameError, match=rf"{name!r}, which is not in the model; did you mean"):
        prepare(Nested(), torch.randn(2, 4), mapping=mapping)


def test_a_misspelt_name_in_an_order_entry_is_an_error():
    mapping = everything().set_module_name_object_type_order("haed", nn.Linear, 0, None)
    with pytest.raises(MappingNameError, match=r"'haed'.*did you mean 'head'"):
        prepare(Nested(), torch.randn(2, 4), mapping=mapping)


def test_a_misspelt_regex_is_an_error():
    with pytest.raises(MappingNameError, match="'haed' matches no module"):
        prepare(Nested(), torch.randn(2, 4), mapping=everything().set_module_name_regex("haed", None))


def test_a_regex_behind_another_that_covers_it_is_no_error():
    mapping = QConfigMapping().set_module_name_regex(".*", A).set_module_name_regex("head", B)
    assert decisions(mapping)["head"] == A


def test_a_name_that_holds_nothing_quantizable_is_fine():
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4))
    assert decisions(everything().set_module_name("0", None), model) == {"1": A}


def test_a_type_that_occurs_nowhere_is_a_warning():
    with pytest.warns(UserWarning, match=r"entry for nn.LSTM, which occurs nowhere in the model") as caught:
        prepare(Nested(), torch.randn(2, 4), mapping=everything().set_object_type(nn.LSTM, None))
    assert len(caught) == 1


def test_a_type_inlined_by_tracing_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(Nested(), torch.randn(2, 4), mapping=everything().set_object_type(Block, None))


def test_a_relu_that_was_fused_away_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4),
                mapping=everything().set_object_type(nn.ReLU, None))  # fmt: skip


def test_a_global_qconfig_that_an_operator_cannot_take_is_its_reason():
    prepared = prepare(Nested(), torch.randn(2, 4), mapping=everything(float_qparams_weight_only_qconfig))
    assert prepared.record.sites == ()
    assert "is for other operators; this one takes: int8 weights" in prepared.record.skipped[0].reason


@pytest.mark.parametrize(
    "mapping",
    [
        everything().set_module_name("head", float_qparams_weight_only_qconfig),
        everything().set_object_type(nn.Linear, float_qparams_weight_only_qconfig),
        everything().set_module_name_object_type_order("", nn.Linear, 0, float_qparams_weight_only_qconfig),
    ],
)
def test_a_direct_qconfig_that_an_operator_cannot_take_is_an_error(mapping):
    with pytest.raises(QConfigError, match=r"'.*' \(nn.Linear\) cannot take the qconfig that .* gives it"):
        prepare(Nested(), torch.randn(2, 4), mapping=mapping)


def test_a_parents_qconfig_that_one_child_cannot_take_is_a_reason():
    model = WordLM()
    mapping = QConfigMapping().set_module_name("", float_qparams_weight_only_qconfig)
    prepared = prepare(model, *lm_inputs(model), mapping=mapping)
    assert [site.path for site in prepared.record.sites] == ["encoder"]


SETTERS = [
    lambda m, q: m.set_global(q),
    lambda m, q: m.set_object_type(nn.Linear, q),
    lambda m, q: m.set_module_name_regex(".*", q),
    lambda m, q: m.set_module_name("head", q),
    lambda m, q: m.set_module_name_object_type_order("", nn.Linear, 0, q),
]


@pytest.mark.parametrize("setter", SETTERS)
def test_a_static_qconfig_is_one_like_another(setter):
    mapping = setter(QConfigMapping(), STATIC)
    assert mapping == setter(QConfigMapping(), STATIC) != setter(QConfigMapping(), A)


@pytest.mark.filterwarnings("ignore")  # torch.ao's own deprecation
@pytest.mark.parametrize("setter", SETTERS)
def test_a_torch_ao_qconfig_is_refused_with_the_way_over(setter):
    from torch.ao.quantization import default_dynamic_qconfig as theirs

    with pytest.raises(QConfigError, match="got QConfig; import the preset of the same name from fxquant"):
        setter(QConfigMapping(), theirs)


@pytest.mark.filterwarnings("ignore")  # torch.ao's own deprecation
def test_a_torch_ao_mapping_is_refused_with_the_way_over():
    from torch.ao.quantization import QConfigMapping as Theirs

    with pytest.raises(QConfigError, match="import QConfigMapping from fxquant"):
        prepare(Nested(), torch.randn(2, 4), mapping=Theirs())


def test_something_else_is_no_qconfig():
    with pytest.raises(QConfigError, match=r"must be a fxquant.QConfig, got type; use a fxquant.QConfig, or None"):
        QConfigMapping().set_global(torch.nn.Linear)


def test_something_else_is_no_mapping():
    with pytest.raises(QConfigError, match=r"must be a QConfigMapping or its dict form, got QConfig$"):
        prepare(Nested(), torch.randn(2, 4), mapping=A)


@pytest.mark.parametrize("kind", [3, None])
def test_an_object_type_is_a_class_a_function_or_a_name(kind):
    with pytest.raises(QConfigError, match="set_object_type takes a module class, a function or a method's name"):
        QConfigMapping().set_object_type(kind, A)


def test_a_module_name_is_a_string():
    with pytest.raises(QConfigError, match="set_module_name takes a path"):
        QConfigMapping().set_module_name(nn.Linear, A)


@pytest.mark.parametrize("pattern", ["(", "*", 3, re.compile("a")])
def test_a_regex_compiles(pattern):
    with pytest.raises(QConfigError, match="is not a regular expression"):
        QConfigMapping().set_module_name_regex(pattern, A)


FULL = (
    QConfigMapping()
    .set_global(A)
    .set_object_type(nn.Linear, B)
    .set_object_type(F.linear, None)
    .set_module_name_regex("b.*", C)
    .set_module_name_regex("a", None)
    .set_module_name("head", None)
    .set_module_name_object_type_order("blocks.0", nn.Linear, 1, C)
)


def test_dict_form_is_torch_aos():
    assert FULL.to_dict() == {
        "": A,
        "object_type": [(nn.Linear, B), (F.linear, None)],
        "module_name_regex": [("b.*", C), ("a", None)],
        "module_name": [("head", None)],
        "module_name_object_type_order": [("blocks.0", nn.Linear, 1, C)],
    }


@pytest.mark.filterwarnings("ignore")  # torch.ao's own deprecation
def test_dict_keys_are_torch_aos():
    from torch.ao.quantization import QConfigMapping as Theirs

    assert FULL.to_dict().keys() == Theirs().to_dict().keys()


def test_from_dict_takes_to_dict_back():
    assert QConfigMapping.from_dict(FULL.to_dict()) == FULL


def test_a_plain_dict_is_a_mapping():
    assert decisions({"": A, "object_type": [(nn.Linear, B)]}) == decisions(everything(A).set_object_type(nn.Linear, B))


def test_an_unknown_key_is_an_error_with_the_nearest():
    with pytest.raises(QConfigError, match="unknown key 'object_types'; did you mean 'object_type'"):
        QConfigMapping.from_dict({"object_types": []})


@pytest.mark.parametrize("entry", [("head",), ("head", None, None), 3])
def test_a_malformed_entry_is_an_error(entry):
    with pytest.raises(QConfigError, match="'module_name' has a malformed entry"):
        QConfigMapping.from_dict({"module_name": [entry]})


def test_pickle_and_deepcopy_keep_it():
    assert pickle.loads(pickle.dumps(FULL)) == FULL
    assert copy.deepcopy(FULL) == FULL


@pytest.mark.parametrize("setter", SETTERS)
def test_mappings_compare_by_their_entries(setter):
    assert setter(QConfigMapping(), A) == setter(QConfigMapping(), A)
    assert setter(QConfigMapping(), A) != setter(QConfigMapping(), B)
    assert setter(QConfigMapping(), A) != QConfigMapping()


def test_the_order_of_regexes_counts_in_comparison():
    one = QConfigMapping().set_module_name_regex("a", A).set_module_name_regex("b", B)
    other = QConfigMapping().set_module_name_regex("b", B).set_module_name_regex("a", A)
    assert one != other


def test_it_is_not_equal_to_something_else_and_not_hashable():
    assert QConfigMapping() != {}
    with pytest.raises(TypeError, match="unhashable"):
        hash(QConfigMapping())


def test_repr_reads_as_the_calls_that_made_it():
    assert repr(FULL).splitlines() == [
        "QConfigMapping()",
        "  .set_global(default_dynamic_qconfig)",
        "  .set_object_type(nn.Linear, per_tensor_dynamic_qconfig)",
        "  .set_object_type(F.linear, None)",
        "  .set_module_name_regex('b.*', float16_dynamic_qconfig)",
        "  .set_module_name_regex('a', None)",
        "  .set_module_name('head', None)",
        "  .set_module_name_object_type_order('blocks.0', nn.Linear, 1, float16_dynamic_qconfig)",
    ]


def test_a_prepared_model_keeps_its_own_copy():
    mapping = everything()
    prepared = prepare(Nested(), torch.randn(2, 4), mapping=mapping)
    mapping.set_module_name("head", None).set_global(None)
    assert prepared.record.mapping == everything()
    assert kinds(fxquant.convert_fx(prepared))["head"] == "DynamicQuantizedLinear"


def test_the_default_mapping_is_the_default_qconfig_everywhere_and_new_each_time():
    assert default_dynamic_qconfig_mapping() == everything()
    assert default_dynamic_qconfig_mapping() is not default_dynamic_qconfig_mapping()


def test_a_shared_module_is_decided_by_any_of_its_names():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x))

    for name in ("a", "b"):
        assert decisions(everything().set_module_name(name, None), Shared()) == {}


@pytest.mark.parametrize("size", [32, 64, 128])
def test_an_int4_preset_of_another_group_size_reads_as_the_call_that_made_it(size):
    (line,) = repr(QConfigMapping().set_global(int4_dynamic_qconfig.with_group_size(size))).splitlines()[1:]
    suffix = "" if size == int4_dynamic_qconfig.weight.group_size else f".with_group_size({size})"
    assert line == f"  .set_global(int4_dynamic_qconfig{suffix})"


@pytest.mark.parametrize(
    ("mapping", "entry", "told"),
    [
        (QConfigMapping(), Entry(Setter.NONE), "no entry"),
        (everything(), Entry(Setter.GLOBAL), "global"),
        (
            QConfigMapping().set_object_type(nn.Linear, None),
            Entry(Setter.OBJECT_TYPE, ("nn.Linear",)),
            "object_type nn.L",
        ),
        (
            QConfigMapping().set_module_name_regex("a|b", None),
            Entry(Setter.MODULE_NAME_REGEX, ("a|b",)),
            "module_name_r",
        ),
        (QConfigMapping().set_module_name("a", None), Entry(Setter.MODULE_NAME, ("a",)), "module_name 'a'"),
        (
            QConfigMapping().set_module_name_object_type_order("", nn.Linear, 0, None),
            Entry(Setter.MODULE_NAME_OBJECT_TYPE_ORDER, ("", "nn.Linear", 0)),
            "module_name_object_type_order ('', nn.Linear, 0)",
        ),
    ],
)
def test_a_rule_names_its_entry_as_data_and_in_words(mapping, entry, told):
    found = mapping.resolve("a", "", (nn.Linear,), 0).entry
    assert found == entry
    assert str(found).startswith(told)
