"""Weights that a graph computes from constants alone are computed once, and quantized; others stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QConfigMapping, convert_fx, default_dynamic_qconfig, float16_dynamic_qconfig
from tests.samples import prepare, same_bits


class Model(nn.Module):
    """Computes with weights in the way that it is given."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.conv, self.scale = nn.Conv1d(16, 16, 1), nn.Parameter(torch.tensor(2.0))
        self.down, self.up = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, 16))
        self.register_buffer("mask", (torch.rand(16, 16) > 0.3).float())
        self.register_buffer("table", torch.randn(16, 16))
        self.drop, self.tanh, self.turn = (
            nn.Dropout(0.5),
            nn.Tanh(),
            nn.Parameter(torch.eye(16) + torch.rand(16, 16) / 32),
        )
        self.function = function

    def forward(self, x):
        return self.function(self, x)


FOLDED = {
    "scaled": lambda m, x: F.linear(x, m.a.weight * m.scale),
    "masked": lambda m, x: F.linear(x, m.a.weight * m.mask, m.b.bias),
    "where": lambda m, x: F.linear(x, torch.where(m.mask > 0, m.a.weight, 0.0)),
    "masked_fill": lambda m, x: F.linear(x, m.a.weight.masked_fill(m.mask == 0, 0.0)),
    "sliced": lambda m, x: F.linear(x, m.a.weight[:8]),
    "cat": lambda m, x: F.linear(x, torch.cat([m.a.weight, m.b.weight])),
    "stack": lambda m, x: F.linear(x, torch.stack([m.down.t(), m.up]).reshape(8, 16)),
    "low rank": lambda m, x: F.linear(x, m.a.weight + (m.down @ m.up) * 0.5),
    "view": lambda m, x: F.linear(x, m.a.weight.view(8, 32)[:, :16]),
    "squeeze": lambda m, x: F.linear(x, m.conv.weight.squeeze(-1)),
    "normalize": lambda m, x: F.linear(x, F.normalize(m.a.weight, dim=-1)),
    "matmul": lambda m, x: x @ (m.a.weight * m.scale),
    "transposed": lambda m, x: x @ (m.a.weight * m.scale).t(),
    "einsum": lambda m, x: torch.einsum("bi,oi->bo", x, m.a.weight * m.mask),
    "addmm": lambda m, x: torch.addmm(m.b.bias, x, (m.a.weight * m.scale).t()),
    "relu": lambda m, x: F.relu(F.linear(x, m.a.weight * m.scale)),
    "embedding": lambda m, x: F.embedding(x.argmax(-1), m.a.weight * m.scale),
    "cast": lambda m, x: F.linear(x, (m.a.weight * m.mask).to(x.dtype), m.b.bias.to(x.dtype)),
    "twice": lambda m, x: F.linear(F.linear(x, w := m.a.weight * m.scale), w),
    "dropout": lambda m, x: F.linear(x, F.dropout(m.a.weight * m.scale, training=m.training)),
    "dropout by place": lambda m, x: F.linear(x, F.alpha_dropout(m.a.weight * m.scale, 0.5, m.training)),
    "torch.dropout": lambda m, x: F.linear(x, torch.dropout(m.a.weight * m.scale, 0.5, False)),
    "nn.Dropout": lambda m, x: F.linear(x, m.drop(m.a.weight)),
    "nn.Tanh": lambda m, x: F.linear(x, m.tanh(m.a.weight)),
    "rrelu": lambda m, x: F.linear(x, F.rrelu(m.a.weight)),
    "item": lambda m, x: F.linear(x, m.a.weight * m.scale.item()),
    "item of a norm": lambda m, x: F.linear(x, m.a.weight / m.a.weight.norm().item()),
    "linalg.norm": lambda m, x: F.linear(x, m.a.weight / torch.linalg.norm(m.a.weight, ord=2)),
    "linalg.vector_norm": lambda m, x: F.linear(x, m.a.weight / torch.linalg.vector_norm(m.a.weight, dim=1)[:, None]),
    "linalg.inv": lambda m, x: F.linear(x, torch.linalg.inv(m.turn)),
    "inverse": lambda m, x: F.linear(x, m.turn.inverse()),
    "linalg.qr": lambda m, x: F.linear(x, torch.linalg.qr(m.a.weight).Q),
    "linalg.svd": lambda m, x: F.linear(x, (f := torch.linalg.svd(m.a.weight))[0] @ f[2]),
    "matrix_exp": lambda m, x: F.linear(x, torch.linalg.matrix_exp(m.a.weight - m.a.weight.mT)),
    "fft": lambda m, x: F.linear(x, torch.fft.fft(m.a.weight).abs()),
}


@pytest.mark.parametrize("function", FOLDED.values(), ids=FOLDED)
def test_what_constants_give_is_quantized(function, tmp_path):
    model, x = Model(function).eval(), torch.randn(5, 16)
    expected = model(x)
    prepared = prepare(model, x)
    assert same_bits(prepared(x), expected)
    quantized = convert_fx(prepared)
    assert quantized.record.coverage.share == 1
    assert not quantized.record.skipped
    assert (quantized(x) - expected).norm() <= 0.02 * expected.norm()
    assert not any(t.dim() > 1 and t.is_floating_point() for t in quantized.state_dict().values())
    fxquant.save(quantized, tmp_path / "m")
    assert same_bits(fxquant.load(Model(function).eval(), tmp_path / "m")(x), quantized(x))


def _write(m, x):
    m.table.mul_(0.5)
    return F.linear(x, m.table * m.scale)


def _write_view(m, x):
    m.table[0].mul_(0.5)
    return F.linear(x, m.table)


def _write_out(m, x):
    torch.mul(m.table, 0.5, out=m.table)
    return F.linear(x, m.table.t())


LEFT = {
    "an input": lambda m, x: F.linear(x, m.a.weight * x.mean()),
    "random": lambda m, x: F.linear(x, m.a.weight + torch.rand_like(m.a.weight) * 0),
    "a buffer that is written": _write,
    "a view that is written": _write_view,
    "out": _write_out,
    "inplace": lambda m, x: F.linear(x, F.leaky_relu(m.table, 0.5, inplace=True) * m.scale),
    "dropout": lambda m, x: F.linear(x, F.dropout(m.a.weight, 0.0, training=True)),
    "dropout by default": lambda m, x: F.linear(x, F.dropout(m.a.weight, 0.0)),
    "rrelu in training": lambda m, x: F.linear(x, F.rrelu(m.a.weight, 0.5, 0.5, True)),
    "a part of a complex one": lambda m, x: F.linear(x, torch.fft.fft(m.a.weight).real),
    "half of it cast": lambda m, x: F.linear(x, m.a.weight.to(x.dtype) * m.mask.to(x.dtype)),
}


@pytest.mark.parametrize("function", LEFT.values(), ids=LEFT)
def test_what_is_not_the_same_at_each_call_stays_float(function):
    model, twin, x = Model(function).eval(), Model(function).eval(), torch.randn(5, 16)
    twin.load_state_dict(model.state_dict())
    quantized = convert_fx(prepare(model, x))
    assert not quantized.record.sites
    assert quantized.record.skipped
    for _ in range(3):
        assert same_bits(quantized(x), twin(x))


def test_what_a_hooked_module_holds_is_not_folded():
    class Hooked(Model):
        def forward(self, x):
            return F.linear(self.b(x), self.b.weight * self.scale)

    model, x = Hooked(None).eval(), torch.randn(5, 16)
    model.b.register_forward_hook(lambda module, *_: module.weight.data.mul_(1.0))
    quantized = convert_fx(prepare(model, x))
    assert [site.path for site in quantized.record.sites] == ["b"]
    assert "b_weight" in quantized.state_dict()


def test_a_mapping_names_a_folded_weight_by_its_source():
    model, x = Model(FOLDED["scaled"]).eval(), torch.randn(5, 16)
    mapping = QConfigMapping().set_global(default_dynamic_qconfig).set_module_name("a.weight", float16_dynamic_qconfig)
    (site,) = prepare(model, x, mapping=mapping).record.sites
    assert (site.path, site.qconfig, site.rule) == (
        "a.weight_folded",
        float16_dynamic_qconfig,
        "module_name 'a.weight'",
    )


def test_the_source_is_the_first_matrix():
    model, x = Model(lambda m, x: F.linear(x, m.scale * m.b.weight + m.a.weight)).eval(), torch.randn(5, 16)
    assert [site.path for site in prepare(model, x).record.sites] == ["b.weight_folded"]


def test_what_preserved_code_writes_into_is_not_folded():
    class Rescaled(Model):
        def rescale(self):
            self.scale.data.mul_(2)

    model, x = Rescaled(FOLDED["scaled"]).eval(), torch.randn(5, 16)
    prepared = prepare(model, x, preserved_attributes=("rescale",))
    before = prepared(x)
    prepared.rescale()
    assert same_bits(prepared(x), 2 * before)


def test_the_users_model_and_its_weights_are_left_alone():
    model, x = Model(FOLDED["scaled"]).eval(), torch.randn(5, 16)
    before = [*model.state_dict()]
    prepared = prepare(model, x)
    assert [*model.state_dict()] == before
    assert prepared.get_buffer("a.weight_folded").untyped_storage()._cdata != model.a.weight.untyped_storage()._cdata


CASTS = {
    "x.dtype": lambda m, x: F.linear(x, m.a.weight.to(x.dtype), m.b.bias.to(x.dtype)),
    "x": lambda m, x: F.linear(x, m.a.weight.to(x), m.b.bias.to(x)),
    "type_as": lambda m, x: F.linear(x, m.a.weight.type_as(x), m.b.bias.type_as(x)),
    "device and dtype": lambda m, x: F.linear(x, m.a.weight.to(x.device, x.dtype), m.b.bias.to(dtype=x.dtype)),
    "matmul": lambda m, x: x @ m.a.weight.t().to(x.dtype),
    "casts before a transposition": lambda m, x: x @ m.a.weight.to(x.dtype).t(),
}


@pytest.mark.parametrize("function", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_weight_cast_to_its_inputs_dtype_is_that_weight(function, dtype):
    model, x = Model(function).eval(), torch.randn(5, 16)
    prepared = prepare(model, x)
    quantized = convert_fx(prepared)
    assert quantized.record.coverage.share == 1
    other = x.to(dtype)
    assert same_bits(prepared(other), model(other))  # half inputs too: the cast stays in the float graph
    output = quantized(other)
    assert output.dtype == dtype
    assert (output.float() - model(x)).norm() <= 0.02 * model(x).norm()
    assert not any(node.target in ("to", "type_as") for node in quantized.graph.nodes)


def test_a_fixed_cast_is_that_weight():
    model, x = Model(lambda m, x: F.linear(x, m.a.weight.float())).eval(), torch.randn(5, 16)
    quantized = convert_fx(prepare(model, x))
    assert quantized.record.coverage.share == 1
    assert (quantized(x) - model(x)).norm() <= 0.02 * model(x).norm()


def test_a_table_cast_to_an_inputs_dtype_stays_float():
    model = Model(lambda m, x: F.embedding(x.argmax(-1), m.a.weight.to(x.dtype))).eval()
    (left,) = prepare(model, torch.randn(5, 16)).record.skipped
    assert (left.path, left.reason) == ("a.weight", "its weight is cast to another dtype at each call")


DEPENDS_ON_VALUES = {
    "a mask as an index": lambda m, x: F.linear(x, m.a.weight[m.mask.sum(1) > 0]),
    "item in a shape": lambda m, x: F.linear(x[:, :2], m.a.weight[:, : m.scale.item().__int__()]),
}


@pytest.mark.parametrize("function", DEPENDS_ON_VALUES.values(), ids=DEPENDS_ON_VALUES)
def test_what_a_checkpoint_could_not_fold_without_values_is_not_folded(function, tmp_path):
    model, x = Model(function).eval(), torch.randn(5, 16)
    quantized = convert_fx(prepare(model, x))
    fxquant.save(quantized, tmp_path / "m")
    with torch.device("meta"):
        skeleton = Model(function).eval()
    assert same_bits(fxquant.load(skeleton, tmp_path / "m")(x), quantized(x))
    assert same_bits(quantized(x), model(x))


def test_a_weight_that_comes_out_as_it_is_stays_tied():
    model = Model(lambda m, x: F.linear(F.embedding(x.argmax(-1), m.turn), F.dropout(m.turn, training=m.training)))
    quantized = convert_fx(prepare(model, torch.randn(5, 16)))
    assert [site.path for site in quantized.record.sites] == ["turn", "turn"]
    assert [name for name in quantized.state_dict() if "int8" in name] == ["turn_int8"]


def test_the_order_in_memory_stays_on_which_bits_depend():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.turn = nn.Parameter(torch.eye(64) + torch.rand(64, 64) / 128)

        def forward(self, x):
            return F.linear(x, torch.inverse(self.turn))

    model, x = Turned().eval(), torch.randn(7, 64)
    prepared = prepare(model, x)
    assert prepared.turn_folded.stride() == torch.inverse(model.turn).stride() == (1, 64)
    assert same_bits(prepared(x), model(x))
