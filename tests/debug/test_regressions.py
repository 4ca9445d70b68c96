"""Where a site comes out larger or slower than float, explain says so; the mapping is obeyed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    OPERATORS,
    QConfigMapping,
    convert_fx,
    default_dynamic_qconfig,
    explain,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
    prepare_fx,
    quantize_dynamic,
)
from fxquant.debug import regressions
from fxquant.debug.regressions import ISAS, Speed, SpeedTable, measured_tables, nearest_table, speed_table
from fxquant.ops import library
from fxquant.qconfig import BEST
from tests.samples import everything, prepare, quantize

TABLE = SpeedTable(
    "a machine, 2026",
    {
        ("linear", "int8"): (Speed(1, 16, 5, 20), Speed(1, 64, 9, 6), Speed(16, 64, 8.5, 8)),
        ("linear", "int16"): (Speed(1, 16, 7, 5),),
        ("lstm", "int8"): (Speed(1, 16, 9, 6),),
    },
)


@pytest.fixture
def measured(monkeypatch):
    monkeypatch.setattr(regressions, "speed_table", lambda: TABLE)


def told(model):
    return {
        row.path: [(loss.kind, loss.quantized, loss.unquantized) for loss in row.regressions]
        for row in explain(model).rows
    }


@pytest.mark.parametrize(
    ("module", "x", "quantized", "unquantized"),
    [
        (nn.Embedding(20, 1), torch.tensor([3]), 20 * (1 + 4), 20 * 4),  # a float scale for each row's one byte
        (nn.Linear(1, 6), torch.randn(2, 1), 6 * (1 + 4 + 4), 6 * (4 + 4)),  # weight, scale, bias
    ],
)
def test_a_larger_site_is_told_with_both_figures_and_its_opt_out(module, x, quantized, unquantized):
    for stage in (prepare(nn.Sequential(module), x), quantize(nn.Sequential(module), x)):
        assert ("larger", quantized, unquantized) in told(stage)["0"]
        text = str(explain(stage))
        assert f"larger than float: 0, {quantized} B instead of {unquantized} B for its tensors" in text
        assert "set_module_name('0', None) leaves it float" in text


@pytest.mark.parametrize(
    ("module", "x"), [(nn.Embedding(20, 2), torch.tensor([3])), (nn.Linear(2, 6), torch.randn(2, 2))]
)
def test_a_smaller_site_is_not(module, x):
    assert "larger" not in str(explain(quantize(nn.Sequential(module), x)))


def test_a_slower_site_is_told_with_what_was_measured(measured):
    model = nn.Sequential(nn.Linear(64, 128))
    for stage in (prepare(model, torch.randn(3, 64)), quantize(model, torch.randn(3, 64))):
        assert told(stage) == {"0": [("slower", 9, 6)]}
        text = str(explain(stage))
        assert "slower than float: 0, about 9 us instead of 6 us for 1 token of 64 → 64;" in text
        assert "such times were measured on a machine, 2026; yours may differ" in text


def test_every_spelling_of_a_linear_is_looked_up_as_one(measured):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64))
            self.bias = nn.Parameter(torch.randn(64))

        def forward(self, x):
            return torch.addmm(self.bias, F.linear(x, self.weight) @ self.weight, self.weight.t())

    rows = explain(prepare(Model(), torch.randn(3, 64))).rows
    assert [row.operator for row in rows] == ["linear", "linear", "linear"]
    assert [[loss.kind for loss in row.regressions] for row in rows] == [["slower"]] * 3
    assert rows[2].regressions[0].opt_out == "set_module_name_object_type_order('', torch.addmm, 0, None)"


def test_what_was_not_measured_is_not_told(measured):
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(3, 64)
    other = QConfigMapping().set_global(int4_dynamic_qconfig)
    assert told(convert_fx(prepare_fx(model, other, x))) == {"0": []}
    assert told(quantize_dynamic(model)) == {"0": []}  # no example inputs, so no rows


@pytest.mark.parametrize(
    ("qconfig", "figures"), [(per_tensor_dynamic_qconfig, (9, 6)), (int16_dynamic_qconfig, (7, 5))]
)
def test_a_qconfig_is_looked_up_by_its_weights_dtype(measured, qconfig, figures):
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(3, 64)
    mapping = QConfigMapping().set_global(qconfig)
    assert told(convert_fx(prepare_fx(model, mapping, x))) == {"0": [("slower", *figures)]}


@pytest.mark.parametrize(("part", "losses"), [({}, ["slower"]), ({"weight_ih_l0": int16_dynamic_qconfig}, [])])
def test_a_layer_of_mixed_weights_is_as_fast_as_nothing_that_was_measured(measured, part, losses):
    model, mapping = nn.Sequential(nn.LSTM(64, 64)).eval(), everything()
    for name, qconfig in part.items():
        mapping.set_module_name(f"0.{name}", qconfig)
    assert [loss[0] for loss in told(prepare(model, torch.randn(3, 64), mapping=mapping))["0"]] == losses


def test_the_opt_out_leaves_the_site_float(measured):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), torch.randn(3, 64)
    loss = explain(prepare(model, x)).rows[1].regressions[0]
    mapping = everything()
    eval(f"mapping.{loss.opt_out}", {"mapping": mapping})
    assert [row.is_quantized for row in explain(prepare(model, x, mapping=mapping)).rows] == [True, False]


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        ((1, 16, 16), (1, 16)),
        ((1, 8, 8), (1, 16)),  # less than the least
        ((1, 63, 64), (1, 16)),
        ((1, 32, 128), (1, 64)),  # the geometric mean
        ((15, 4096, 4096), (1, 64)),
        ((16, 64, 64), (16, 64)),
        ((500, 16, 16), (1, 16)),  # no more rows were measured at this size
    ],
)
def test_the_nearest_lower_shape_is_found(shape, found):
    speed = TABLE.find("linear", default_dynamic_qconfig, shape)
    assert (speed.tokens, speed.size) == found


def test_no_shape_or_no_such_operator_finds_nothing():
    assert TABLE.find("linear", default_dynamic_qconfig, ()) is None
    assert TABLE.find("cell", default_dynamic_qconfig, (1, 16, 16)) is None


@pytest.mark.parametrize(
    ("quantized", "unquantized", "is_slower"),
    [(30, 28, True), (100, 96, False), (3, 2.1, False), (3, 1.9, True), (5, 9, False)],
)
def test_slower_is_more_than_noise_and_a_call(quantized, unquantized, is_slower):
    assert Speed(1, 16, quantized, unquantized).is_slower == is_slower


def table_of(isa, **speeds):
    return SpeedTable(f"a machine with {isa}", {(name, "int8"): found for name, found in speeds.items()}, isa)


@pytest.mark.parametrize(
    ("isa", "nearest"),
    [
        ("amx", "amx"),
        ("avx512_vnni", "avx512_vnni"),
        ("avx_vnni", "avx2"),  # as near to AVX512-VNNI: the slower one
        ("avx2", "avx2"),
        ("neon_dot", "avx2"),
        ("portable", "avx2"),
        (None, "avx2"),
    ],
)
def test_the_nearest_instruction_sets_table_is_used_and_named(isa, nearest):
    found = nearest_table([table_of(name) for name in ("avx2", "amx", "avx512_vnni")], isa)
    other = "" if isa == nearest else f" (nothing was measured with {isa or 'plain torch'})"
    assert (found.isa, found.source) == (nearest, f"a machine with {nearest}{other}")


def test_explain_names_the_machine_whose_kernels_are_nearest(monkeypatch):
    slow = (Speed(1, 16, 9, 6),)
    monkeypatch.setattr(regressions, "measured_tables", lambda: (table_of("amx"), table_of("avx2", linear=slow)))
    monkeypatch.setattr(library, "kernel_info", lambda: library.KernelInfo("a library", "avx2", 1, ""))
    monkeypatch.setattr(regressions, "kernel_info", library.kernel_info)
    text = str(explain(quantize(nn.Sequential(nn.Linear(16, 16)), torch.randn(1, 16))))
    assert "such times were measured on a machine with avx2; yours may differ" in text


@pytest.mark.parametrize(
    ("kind", "is_call", "rows"),
    [("nn.Linear", False, 1), ("F.linear", True, 2), ("operator.matmul", True, 2), ("torch.einsum", True, 1)],
)
def test_calls_of_functions_have_times_of_their_own_but_an_einsum_which_is_as_a_linear(kind, is_call, rows):
    table = table_of("amx", linear=(Speed(1, 16, 5, 4),), matmul=(Speed(2, 16, 5, 4),))
    assert table.find("linear", default_dynamic_qconfig, (1, 16, 16), kind, is_call).tokens == rows


def test_calls_of_functions_are_looked_up_as_such(monkeypatch):
    table = table_of("amx", linear=(Speed(1, 16, 5, 9),), matmul=(Speed(1, 16, 7, 5),))
    monkeypatch.setattr(regressions, "speed_table", lambda: table)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16))

        def forward(self, x):
            return torch.einsum("bi,oi->bo", self.layer(x) @ self.weight, self.weight.t())

    rows = explain(prepare(Model(), torch.randn(1, 16))).rows
    assert [len(row.regressions) for row in rows] == [0, 1, 0]


@pytest.mark.parametrize(("kind", "rows"), [("nn.LSTMCell", 1), ("nn.RNNCell", 2)])
def test_a_plain_cell_has_times_of_its_own(kind, rows):
    table = table_of("amx", cell=(Speed(1, 16, 5, 4),), rnn_cell=(Speed(2, 16, 5, 4),))
    assert table.find("cell", default_dynamic_qconfig, (1, 16, 16), kind).tokens == rows


def test_the_package_has_measurements_of_operators_in_the_table_for_each_kind_of_kernels():
    rows = {row.name: row for row in OPERATORS}
    rows |= {"rnn_cell": rows["cell"], "matmul": rows["linear"]}
    assert [table.isa for table in measured_tables()] == ["amx", "avx512_vnni", "avx2"]
    assert speed_table().isa in ISAS
    for table in measured_tables():
        assert f"where fxquant runs on {table.isa} kernels, 1 thread" in table.source
        dtypes = {"int8", "int4", "int16", "float16", "uint8", "uint4"}
        dtypes |= {"int3"} if table.isa != "amx" else set()  # AMX was measured before there were 3 bits
        assert {dtype for _, dtype in table.speeds} == dtypes
        for (operator, dtype), speeds in table.speeds.items():
            assert any(scheme.accepts(BEST[dtype]) for scheme in rows[operator].schemes)
            shapes = {(speed.tokens, speed.size) for speed in speeds}
            assert {(rows, size) for rows in (1, 16, 256) for size in (16, 64, 256, 1024)} <= shapes, operator
            assert all(min(speed.quantized_us, speed.float_us) > 0 for speed in speeds)


@pytest.mark.parametrize(
    ("module", "x", "shape"),
    [
        (nn.Linear(6, 10), torch.randn(2, 3, 6), (6, 6, 10)),
        (nn.Embedding(20, 8), torch.zeros(2, 3, dtype=torch.long), (6, 8, 8)),
        (nn.LSTM(6, 10), torch.randn(4, 3, 6), (12, 6, 10)),
        (nn.LSTM(6, 10), nn.utils.rnn.pack_sequence([torch.randn(4, 6), torch.randn(2, 6)]), (6, 6, 10)),
        (nn.GRUCell(6, 10), torch.randn(3, 6), (3, 6, 10)),
        (nn.Linear(6, 10), torch.randn(0, 6), ()),
    ],
)
def test_a_module_knows_the_shape_of_its_example(module, x, shape):
    (site,) = prepare_fx(
        nn.Sequential(module).eval(), QConfigMapping().set_global(default_dynamic_qconfig), (x,)
    ).record.sites
    assert site.shape == shape


def test_a_call_knows_the_shape_of_its_example():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.table, self.bias = (nn.Parameter(torch.randn(*s)) for s in ((10, 6), (20, 6), (10,)))

        def forward(self, indices):
            return torch.addmm(self.bias, F.embedding(indices, self.table), self.weight.t())

    sites = prepare(Model(), torch.zeros(3, dtype=torch.long)).record.sites
    assert {site.kind: site.shape for site in sites} == {"F.embedding": (3, 6, 6), "torch.addmm": (3, 6, 10)}


def test_old_names_warn():
    (row,) = explain(prepare(nn.Sequential(nn.Embedding(20, 1)), torch.tensor([3]))).rows
    with pytest.warns(DeprecationWarning, match=r"is now \.regressions"):
        assert row.losses == row.regressions
    with pytest.warns(DeprecationWarning, match="Loss is now Regression"):
        assert regressions.Loss is type(row.regressions[0])
