"""A converted model's float products: a fixed order of sums, so that a row has the same bits in any batch."""

import copy
import operator
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import convert_fx, explain, graph_diff, load, ops, quantize_dynamic, save
from fxquant.graph.convert.invariant import DEPENDENT, find_dependent
from fxquant.graph.record import record_of
from fxquant.nn import DynamicQuantizedMultiheadAttention
from fxquant.ops import activations, library, products
from tests.samples import everything, prepare, quantize, same_bits

asked = pytest.mark.parametrize("batch_invariant", [None, True, False])


class Attention(nn.Module):
    """Attention written out around one quantized layer."""

    def __init__(self, attend):
        super().__init__()
        self.qkv, self.attend = nn.Linear(8, 24), attend

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attend(q, k, v)


def bmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


def baddbmm(q, k, v):
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return torch.baddbmm(torch.zeros(5, 5), q, k.transpose(1, 2), beta=0, alpha=0.5).softmax(-1).bmm(v)


ATTENTIONS = {
    "operator": (lambda q, k, v: (q @ k.transpose(-2, -1)).softmax(-1) @ v, ops.matmul),
    "method": (lambda q, k, v: q.matmul(k.transpose(-2, -1)).softmax(-1).matmul(v), ops.matmul),
    "function": (lambda q, k, v: torch.matmul(torch.matmul(q, other=k.mT).softmax(-1), v), ops.matmul),
    "bmm": (bmm, ops.matmul),
    "baddbmm": (baddbmm, ops.add_product),
    "einsum": (
        lambda q, k, v: torch.einsum("bhqk,bhkd->bqhd", torch.einsum("bhqd, bhkd -> bhqk", q, k), v),
        ops.einsum,
    ),
    "linear": (lambda q, k, v: F.linear(q[:, 0], k[0, 0]) @ v[:, 0], ops.float_linear),
    "sdpa": (F.scaled_dot_product_attention, ops.attention),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True, scale=0.4), ops.attention),
    "masked": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.eye(5)), ops.attention),
}  # fmt: skip
each = pytest.mark.parametrize("name", ATTENTIONS)


def targets(model):
    return [node.target for node in model.graph.nodes if node.op in ("call_function", "call_method")]


@each
def test_products_of_activations_become_ours_and_mean_the_same(name):
    attend, target = ATTENTIONS[name]
    model, x = Attention(attend), torch.randn(3, 5, 8)
    by_torch = quantize(model, x, batch_invariant=False)
    assert target not in targets(by_torch)
    for batch_invariant in (None, True):
        quantized = quantize(model, x, batch_invariant=batch_invariant)
        assert target in targets(quantized)
        assert torch.allclose(quantized(x), by_torch(x), atol=1e-5)
        assert not list(find_dependent(quantized))
    assert list(find_dependent(by_torch))


@each
def test_a_row_alone_has_the_same_bits(name):
    x = torch.randn(33, 5, 8)
    quantized = quantize(Attention(ATTENTIONS[name][0]), x[:4], batch_invariant=True)
    if name == "linear":  # whose weight is made of the first row
        x = torch.cat([x[:1], x])
    together = quantized(x)
    heads = 2 if name in ("bmm", "baddbmm") else 1
    for row in (1, 2, 7, 32):
        part = torch.cat([x[:1], x[row : row + 1]]) if name == "linear" else x[row : row + 1].clone()
        alone = quantized(part)
        expected = together[heads * row : heads * row + heads]
        assert same_bits(alone[-len(expected) :], expected)


def test_where_no_native_kernel_is_torch_multiplies_unless_it_is_asked(monkeypatch):
    model, x = Attention(ATTENTIONS["operator"][0]), torch.randn(3, 5, 8)
    quantized = {asked: quantize(model, x, batch_invariant=asked) for asked in (None, True, False)}
    monkeypatch.setattr(library, "_library", None)
    monkeypatch.setattr(activations, "_native_matmul", None)
    expected = quantized[False](x)
    assert same_bits(quantized[None](x), expected)
    calls = []
    monkeypatch.setattr(products, "matmul", lambda a, b: calls.append(1) or a @ b)
    quantized[None](x)
    assert not calls
    quantized[True](x)
    assert len(calls) == 2


def test_integers_and_gradients_go_as_before():
    a, b = torch.randint(9, (3, 4)), torch.randint(9, (4, 5))
    assert same_bits(ops.matmul(a, b), a @ b)
    assert same_bits(ops.einsum("ij,jk->ik", a, b), a @ b)
    x, y = torch.randn(2, 3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    ours, torchs = (torch.autograd.grad(f(x, y).square().sum(), (x, y)) for f in (ops.matmul, torch.matmul))
    assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(ours, torchs, strict=True))


@pytest.mark.parametrize(
    "equation", ["bhqd,bhkd->bhqk", "bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd", "ij,kj->ki", "i,i->", "i,j->ij", "bi,bi->b"]
)
def test_einsum_is_torchs(equation):
    left = equation.partition("->")[0].split(",")
    sizes = dict(zip("bhqkdij", (2, 3, 4, 5, 6, 7, 3), strict=True))
    a, b = (torch.randn([sizes[letter] for letter in part]) for part in left)
    assert torch.allclose(ops.einsum(equation, a, b), torch.einsum(equation, a, b), atol=1e-5)


@pytest.mark.parametrize("equation", ["ii,ij->ij", "ij,jk", "...i,ij->...j", "ij,k->k", "ij,jk->k"])
def test_what_einsum_does_not_know_stays_torchs(equation):
    assert activations.pair_product(equation) is None


@pytest.mark.parametrize("options", [{"dropout_p": 0.1}, {"enable_gqa": True}])
def test_other_attention_stays_torchs(options):
    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    quantized = quantize(Attention(attend), torch.randn(2, 5, 8), batch_invariant=True)
    assert F.scaled_dot_product_attention in targets(quantized)
    assert [name for _, name in find_dependent(quantized)] == ["scaled_dot_product_attention"]


class Left(nn.Module):
    """What the mapping leaves float, and functions whose bits depend on the batch."""

    def __init__(self):
        super().__init__()
        self.kept, self.act = nn.Linear(8, 7), nn.SiLU()
        self.weight, self.bias = nn.Parameter(torch.randn(3, 7)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        y = F.linear(self.act(self.kept(x)), self.weight, self.bias)
        return F.gelu(y, approximate="tanh") + F.gelu(y)


def left_float(batch_invariant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), Left())
    mapping = everything().set_module_name("1", None)
    return model, prepare(model, torch.randn(4, 8), mapping=mapping, batch_invariant=batch_invariant)


def test_float_linears_are_ours_where_it_is_asked_and_stay_torchs_by_default():
    x, results = torch.randn(33, 8), []
    for batch_invariant, count in ((None, 0), (False, 0), (True, 2)):
        quantized = convert_fx(left_float(batch_invariant)[1])
        assert targets(quantized).count(ops.float_linear) == count
        results.append(quantized(x))
    assert same_bits(*results[:2])
    assert torch.allclose(results[2], results[0], atol=1e-5)
    assert {name: t.shape for name, t in quantized.state_dict().items() if "kept" in name} == {
        "1.kept.weight": (7, 8), "1.kept.bias": (7,)}  # fmt: skip


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if x.sum() < 1e9 else 1)  # which does not trace: a leaf


def hooked():
    layer = nn.Linear(8, 7)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    return layer


OTHERS = {
    "a subclass": lambda: Doubled(8, 7),
    "hooked": hooked,
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.filterwarnings("ignore:.*does not trace")
def test_a_float_linear_that_does_more_stays_as_it_is(make):
    model, x = nn.Sequential(nn.Linear(8, 8), make()).eval(), torch.randn(4, 8)
    mapping = everything().set_module_name("1", None)
    quantized = quantize(model, x, mapping=mapping, batch_invariant=True)
    assert ops.float_linear not in targets(quantized)
    assert same_bits(quantized(x), model[1](quantized.get_submodule("0")(x)))


def test_a_float_linear_without_a_bias_is_ours():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 7, bias=False)), torch.randn(4, 8)
    mapping = everything().set_module_name("1", None)
    quantized = quantize(model, x, mapping=mapping, batch_invariant=True)
    assert ops.float_linear in targets(quantized)
    assert [node.target for node in quantized.graph.find_nodes(op="get_attr")] == ["1.weight"]
    assert torch.allclose(quantized(x), model[1](quantized.get_submodule("0")(x)), atol=1e-5)


def written(x):
    result = torch.zeros(4, 4)
    torch.mm(x, x.t(), out=result)
    return result


OTHER_CALLS = {
    "out": (written, torch.mm),
    "older addmm": (lambda x: torch.addmm(0.5, x, x, mat2=torch.eye(8)), torch.addmm),
    "three": (lambda x: torch.einsum("ij,kj,kl->il", x, x, x), torch.einsum),
    "dots": (lambda x: torch.einsum("...i,ij->...j", x, x.t()), torch.einsum),
}


@pytest.mark.parametrize("name", OTHER_CALLS)
@pytest.mark.filterwarnings("ignore:This overload of addmm is deprecated")
def test_other_forms_of_a_product_stay_torchs(name):
    call, target = OTHER_CALLS[name]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return call(self.linear(x))

    x = torch.randn(4, 8)
    quantized = quantize(Model(), x, batch_invariant=True)
    assert target in targets(quantized)
    assert torch.allclose(quantized(x), call(quantized.linear(x)), atol=1e-5)


CALLS = {
    "sum": (lambda x: x.sum(), 1),
    "sum of two": (lambda x: x.sum((0, 1)), 1),
    "mean of two": (lambda x: torch.mean(x, dim=[0, -1]), 1),
    "sum of one": (lambda x: x.sum(-1) + x.mean(dim=(1,)), 0),
    "cube": (lambda x: x.pow(3) + x**-1 + x**0.5 + torch.pow(x, exponent=-2), 0),
    "pow": (lambda x: x**2.5, 1),
    "softmax": (lambda x: x.softmax(-1) + F.softmax(x, dim=-1), 0),
    "softmax of the first": (lambda x: x.softmax(0), 1),
    "gelu": (lambda x: F.gelu(x), 0),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), 1),
    "modules": (nn.Sequential(nn.Softmax(-1), nn.GELU()), 0),
    "GELU, tanh": (nn.Sequential(nn.GELU("tanh")), 1),
    "Softmax of the first": (nn.Sequential(nn.Softmax(0)), 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_what_depends_on_the_batch_is_named(name):
    call, count = CALLS[name]
    assert len(list(find_dependent(torch.fx.symbolic_trace(call)))) == count


def test_a_float_linear_alone_has_the_same_bits():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 70))
    mapping = everything().set_module_name("1", None)
    quantized = quantize(model, torch.randn(2, 64), mapping=mapping, batch_invariant=True)
    x = torch.randn(40, 64)
    together = quantized(x)
    assert all(same_bits(quantized(x[i : i + 1].clone()), together[i : i + 1]) for i in range(40))


def test_explain_names_what_still_depends_on_the_batch():
    model, prepared = left_float(True)
    quantized = convert_fx(prepared)
    for explained in (explain(prepared), explain(quantized)):
        assert sorted(text.partition(": ")[2] for text in explained.dependent) == ["gelu, tanh", "silu"]
        assert "other bits in another batch (docs/numerics.md): 1.act: silu" in str(explained)
    for batch_invariant in (None, False):
        assert explain(left_float(batch_invariant)[1]).dependent == ()
    eager = quantize_dynamic(model, {nn.Linear}, batch_invariant=True)
    assert any("its own code, which is not traced" in text for text in explain(eager).dependent)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("batch_invariant", [None, True])
def test_graph_diff_says_why_a_product_changed_where_it_did(batch_invariant, is_native, monkeypatch):
    model, x = Attention(ATTENTIONS["operator"][0]), torch.randn(3, 5, 8)
    quantized = quantize(model, x, batch_invariant=batch_invariant)
    monkeypatch.setattr(library, "available", lambda: is_native)
    rows = {row.name: row for row in graph_diff(model, quantized).rows}
    note = "the same bits in any batch" if is_native or batch_invariant else ""
    assert (rows["matmul"].sign, rows["matmul"].before, rows["matmul"].after, rows["matmul"].note) == (
        "~", "operator.matmul", "fxquant.matmul", note)  # fmt: skip


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x, padding):
        return self.layers(x, src_key_padding_mask=padding)


@pytest.mark.filterwarnings("ignore:.*does not trace")
@pytest.mark.parametrize("form", ["fx", "eager"])
def test_a_sequence_padded_at_its_end_has_the_same_bits_as_alone(form):
    model, x = Encoder().eval(), torch.randn(5, 40, 8)
    lengths = torch.tensor([40, 1, 17, 32, 39])
    padding = torch.arange(40) >= lengths[:, None]
    if form == "fx":
        quantized = quantize(model, x, padding, batch_invariant=True)
    else:
        quantized = quantize_dynamic(model, batch_invariant=True)
    with torch.no_grad():
        together = quantized(x, padding)
        for row, length in enumerate(lengths.tolist()):
            alone = quantized(x[row : row + 1, :length].clone(), torch.zeros(1, length, dtype=torch.bool))
            assert same_bits(alone, together[row : row + 1, :length])


@asked
def test_what_was_asked_is_remembered(batch_invariant, tmp_path):
    model, x = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2)}), torch.randn(5, 3, 8)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = model["a"]

        def forward(self, x):
            y = self.a(x, x, x)[0]
            return y @ y.transpose(-2, -1)

    model = Both().eval()
    for quantized in (
        quantize(model, x, batch_invariant=batch_invariant),
        quantize_dynamic(model, batch_invariant=batch_invariant),
    ):
        save(quantized, tmp_path / "a.safetensors")
        for twin in (quantized, load(model, tmp_path / "a.safetensors"), copy.deepcopy(quantized)):
            assert record_of(twin).batch_invariant is batch_invariant
            (attention,) = [m for m in twin.modules() if isinstance(m, DynamicQuantizedMultiheadAttention)]
            assert attention.batch_invariant is batch_invariant
            assert same_bits(twin(x), quantized(x))
    twin = pickle.loads(pickle.dumps(quantize(model, x, batch_invariant=batch_invariant)))
    product = next(node for node in twin.graph.nodes if node.target in (ops.matmul, operator.matmul))
    assert product.target is (operator.matmul if batch_invariant is False else ops.matmul)
    assert product.kwargs == ({} if batch_invariant is False else {"anywhere": bool(batch_invariant)})


def test_every_dependent_operator_is_named_once():
    functions = [function for row in DEPENDENT for function in row.functions]
    assert len(functions) == len(set(functions))


@each
def test_autocast_mixes_dtypes_as_for_torch(name):
    model, x = Attention(ATTENTIONS[name][0]), torch.randn(3, 5, 8)
    quantized = quantize(model, x, batch_invariant=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(quantized(x).float(), quantized(x.clone()).float())
    with torch.autocast("cpu", torch.bfloat16, enabled=False):
        assert quantized(x).dtype == torch.float32
