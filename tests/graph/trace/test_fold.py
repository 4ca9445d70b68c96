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
}


@pytest.mark.parametrize("function", FOLDED.values(), ids=FOLDED)
def test_what_constants_give_is_quantized(function, tmp_path):
    model, x = Model(function).eval(), torch.randn(5, 16)
    expected = model(x)
    prepared = prepare(model, x)
    assert same_bits(prepared(x), expected)
    quantized = convert_fx(prepared)
    assert quantized.record.coverage.share == 1
    assert not quantized.record.left
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
    "half of it cast": lambda m, x: F.linear(x, m.a.weight.to(x.dtype) * m.mask.to(x.dtype)),
}


@pytest.mark.parametrize("function", LEFT.values(), ids=LEFT)
def test_what_is_not_the_same_at_each_call_stays_float(function):
    model, twin, x = Model(function).eval(), Model(function).eval(), torch.randn(5, 16)
    twin.load_state_dict(model.state_dict())
    quantized = convert_fx(prepare(model, x))
    assert not quantized.record.sites
    assert quantized.record.left
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
    (left,) = prepare(model, torch.randn(5, 16)).record.left
    assert (left.path, left.reason) == ("a.weight", "its weight is cast to another dtype at each call")


DEPENDS_ON_VALUES = {
    "a mask as an index": lambda m, x: F.linear(x, m.a.weight[m.mask.sum(1) > 0]),
    "item": lambda m, x: F.linear(x, m.a.weight * m.scale.item()),
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
