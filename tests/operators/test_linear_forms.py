"""Linear forms of a constant matrix in every spelling: the bits of an nn.Linear with that weight, or a reason."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QConfigMapping, default_dynamic_qconfig, float16_dynamic_qconfig
from tests.samples import everything, prepare, quantize, same_bits


class Forms(nn.Module):
    """A submodule, "net", with a weight both ways round and a bias, and a function that uses them."""

    def __init__(self, function):
        super().__init__()
        self.net = nn.Module()
        self.net.oi = nn.Parameter(torch.randn(5, 6))
        self.net.io = nn.Parameter(self.net.oi.detach().t().contiguous())
        self.net.register_buffer("buffer", self.net.io.detach().clone())
        self.net.bias = nn.Parameter(torch.randn(5))
        self.function = function

    def forward(self, x):
        return self.function(self.net, x)


SPELLINGS = {
    "x @ w": lambda m, x: x @ m.io,
    "x @ buffer": lambda m, x: x @ m.buffer,
    "x @ w.t()": lambda m, x: x @ m.oi.t(),
    "x @ w.T": lambda m, x: x @ m.oi.T,
    "x @ w.transpose(0, 1)": lambda m, x: x @ m.oi.transpose(0, 1),
    "x @ w.transpose(-1, -2)": lambda m, x: x @ m.oi.transpose(-1, -2),
    "x @ w.permute(1, 0)": lambda m, x: x @ m.oi.permute(1, 0),
    "x @ w.t().t()": lambda m, x: x @ m.io.t().t(),
    "torch.matmul": lambda m, x: torch.matmul(x, m.io),
    "torch.matmul by name": lambda m, x: torch.matmul(other=m.oi.t(), input=x),
    ".matmul": lambda m, x: x.matmul(m.io),
    "torch.linalg.matmul": lambda m, x: torch.linalg.matmul(x, m.io),
    "x @ w.t().contiguous()": lambda m, x: x @ m.oi.t().contiguous(),
    "x @ w.data.mH": lambda m, x: x @ m.oi.data.mH,
    "torch.mm": lambda m, x: torch.mm(x, m.io),
    "torch.mm by name": lambda m, x: torch.mm(x, mat2=m.io),
    ".mm": lambda m, x: x.mm(m.oi.t()),
    "torch.addmm": lambda m, x: torch.addmm(m.bias, x, m.io),
    "torch.addmm by name": lambda m, x: torch.addmm(mat2=m.oi.T, mat1=x, input=m.bias, beta=1, alpha=1),
    ".addmm": lambda m, x: m.bias.addmm(x, m.io),
    "F.linear": lambda m, x: F.linear(x, weight=m.oi, bias=m.bias),
    "F.linear of w.detach()": lambda m, x: F.linear(x, m.oi.detach()),
    "F.linear of w.t()": lambda m, x: F.linear(x, m.io.t()),
    "F.linear of buffer.t()": lambda m, x: F.linear(x, m.buffer.t(), m.bias),
    "einsum bi,oi->bo": lambda m, x: torch.einsum("bi,oi->bo", x, m.oi),
    "einsum bi,io->bo": lambda m, x: torch.einsum("bi, io -> bo", x, m.io),
    "einsum bi,io": lambda m, x: torch.einsum("bi,io", x, m.io),
    "einsum ...i,oi": lambda m, x: torch.einsum("...i,oi", x, m.oi),
    "einsum ...i,io->...o": lambda m, x: torch.einsum("...i,io->...o", x, m.io),
    "einsum ...i,oi->...o": lambda m, x: torch.einsum("...i,oi->...o", [x, m.io.t()]),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_gives_the_bits_of_an_nn_linear(spelling):
    model, x = Forms(SPELLINGS[spelling]).eval(), torch.randn(3, 6)
    linear = nn.Linear(6, 5)
    linear.weight = model.net.oi
    linear.bias = model.net.bias if "addmm" in spelling or "bias" in SPELLINGS[spelling].__code__.co_names else None
    assert torch.equal(quantize(model, x)(x), quantize(nn.Sequential(linear), x)(x))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_prepared_model_gives_the_models_bits_and_nothing_is_left(spelling):
    model, x = Forms(SPELLINGS[spelling]).eval(), torch.randn(3, 6)
    prepared = prepare(model, x)
    assert torch.equal(prepared(x), model(x))
    assert prepared.record.skipped == ()
    (observer,) = (m for m in prepared.modules() if isinstance(m, fxquant.observers.Observer))
    assert torch.equal(observer.max_val, model.net.oi.detach().amax(1))  # one range an output channel


@pytest.mark.parametrize(
    ("qconfig", "dtype"), [(default_dynamic_qconfig, torch.int8), (float16_dynamic_qconfig, torch.float16)]
)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_float_matrix_and_its_transpositions_are_gone(spelling, qconfig, dtype):
    quantized = quantize(Forms(SPELLINGS[spelling]), torch.randn(3, 6), mapping=everything(qconfig))
    assert len([n for n in quantized.graph.nodes if n.op in ("call_function", "call_method")]) == 1
    (values,) = (tensor for tensor in quantized.state_dict().values() if tensor.dim() > 1)
    assert (values.shape, values.dtype) == ((5, 6), dtype)
    assert values.is_contiguous()


@pytest.mark.parametrize("qconfig", [default_dynamic_qconfig, float16_dynamic_qconfig])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_checkpoints_and_state_dicts_of_forms_in_a_submodule(spelling, qconfig, tmp_path):
    model, x = Forms(SPELLINGS[spelling]).eval(), torch.randn(3, 6)
    quantized = quantize(model, x, mapping=everything(qconfig))
    fxquant.save(quantized, tmp_path / "q")
    with torch.device("meta"):
        skeleton = Forms(SPELLINGS[spelling]).eval()
    assert torch.equal(fxquant.load(skeleton, tmp_path / "q")(x), quantized(x))
    other = quantize(Forms(SPELLINGS[spelling]), x, mapping=everything(qconfig))
    assert not torch.equal(other(x), quantized(x))
    other.load_state_dict(quantized.state_dict())
    assert torch.equal(other(x), quantized(x))


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6), (2, 1, 3, 6)])
def test_rows_in_any_shape(shape):
    model, x = Forms(lambda m, x: x @ m.io).eval(), torch.randn(shape)
    quantized = quantize(model, torch.randn(3, 6))
    rows = torch.cat([torch.empty(0, 5), *(quantized(row.unsqueeze(0)) for row in x.reshape(-1, 6))])
    assert torch.equal(quantized(x), rows.reshape(*shape[:-1], 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes(dtype):
    model, x = Forms(lambda m, x: x @ m.io).eval().to(dtype), torch.randn(3, 6, dtype=dtype)
    quantized = quantize(model, x)
    assert quantized(x).dtype == dtype
    assert (quantized(x) - model(x)).norm() < 0.03 * model(x).norm()


LEFT = {
    "only a form of one constant, its 'other', is quantized": [
        ("net.oi", lambda m, x: m.oi @ x.t()),
        ("net.buffer", lambda m, x: m.buffer.t() @ x.t()),
        ("net.oi", lambda m, x: x * (m.oi @ m.io).sum()),
        ("net.io", lambda m, x: x * (m.oi @ m.io).sum()),
    ],
    "only a form of one constant, its 'weight', is quantized": [
        ("net.oi", lambda m, x: torch.einsum("oi,bi->bo", m.oi, x)),
    ],
    "its beta or alpha is not 1": [
        ("net.io", lambda m, x: torch.addmm(m.bias, x, m.io, beta=2)),
        ("net.io", lambda m, x: torch.addmm(m.bias, x, m.io, alpha=0.5)),
    ],
    "what it adds has shape (3, 5), not a bias's (5,)": [
        ("net.io", lambda m, x: torch.addmm(x[:, :5], x, m.io)),
        ("net.oi", lambda m, x: F.linear(x, m.oi, x[:, :5])),
    ],
    "its equation 'zi,io' is none like '...i,oi->...o' or '...i,io->...o'": [
        ("net.io", lambda m, x: torch.einsum("zi,io", x, m.io)),  # which gives "oz"
    ],
    "its equation 'bi,io->ob' is none like '...i,oi->...o' or '...i,io->...o'": [
        ("net.io", lambda m, x: torch.einsum("bi,io->ob", x, m.io)),
    ],
    "its equation 'bi,io->bio' is none like '...i,oi->...o' or '...i,io->...o'": [
        ("net.io", lambda m, x: torch.einsum("bi,io->bio", x, m.io)),
    ],
    "its equation 'ii,io->io' is none like '...i,oi->...o' or '...i,io->...o'": [
        ("net.io", lambda m, x: torch.einsum("ii,io->io", x.t() @ x, m.io)),
    ],
    "it is called with more than equation, input, weight": [
        ("net.io", lambda m, x: torch.einsum("bi,io,b->bo", x, m.io, x[:, 0])),
    ],
    "it stretches a dimension of size 1": [
        ("net.io", lambda m, x: torch.einsum("bi,io->bo", x[:, :1], m.io)),
    ],
    "it is called with more than input, other": [
        ("net.io", lambda m, x: torch.matmul(x, m.io, out=x.new_empty(3, 5))),
    ],
    "its weight is its input too": [
        ("net.oi", lambda m, x: x @ F.linear(m.oi, m.oi)[0].sum().expand(6)),
        ("net.square", lambda m, x: x * torch.matmul(m.square, m.square).sum()),
    ],
    "its weight is 1-D, not 2-D": [("net.vector", lambda m, x: F.linear(x, m.vector))],
    "its weight is 3-D, not 2-D": [("net.cube", lambda m, x: torch.matmul(x, m.cube))],
    "there is no quantized form of torch.bmm": [("net.cube", lambda m, x: torch.bmm(x.expand(2, 3, 6), m.cube))],
    "there is no quantized form of torch.baddbmm": [
        ("net.cube", lambda m, x: torch.baddbmm(x[0, 0], x.expand(2, 3, 6), m.cube)),
    ],
    "torch.bilinear multiplies two inputs with each other; only forms of one input are quantized": [
        ("net.pairs", lambda m, x: F.bilinear(x, x, m.pairs)),
    ],
    "torch.conv1d has no dynamic form: of convolutions, the modules nn.Conv1d and nn.Conv2d have one": [
        ("net.kernel", lambda m, x: F.conv1d(x, m.kernel)),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "function", "reason"), [(path, use, reason) for reason, uses in LEFT.items() for path, use in uses]
)
def test_other_forms_stay_float_with_their_reason(path, function, reason):
    model, x = Forms(function).eval(), torch.randn(3, 6)
    model.net.square, model.net.cube = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(2, 6, 5))
    model.net.pairs, model.net.kernel = nn.Parameter(torch.randn(4, 6, 6)), nn.Parameter(torch.randn(4, 3, 2))
    model.net.vector = nn.Parameter(torch.randn(6))
    with torch.no_grad():
        prepared, expected = prepare(model, x), model(x)
    assert (path, reason) in {(left.path, left.reason) for left in prepared.record.skipped}
    assert path not in {site.path for site in prepared.record.sites}
    with torch.no_grad():
        assert (fxquant.convert_fx(prepared)(x) - expected).norm() <= 0.03 * expected.norm()


def test_products_of_activations_and_vectors_are_no_candidates():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector = nn.Parameter(torch.randn(6))

        def forward(self, x):
            scores = torch.softmax(x @ x.transpose(-1, -2), -1)
            return torch.einsum("bqk,bkd->bqd", scores, x) @ self.vector

    record = prepare(Attention(), torch.randn(2, 3, 6)).record
    assert (record.sites, record.skipped) == ((), ())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (nn.Bilinear(6, 6, 2), "nn.Bilinear multiplies two inputs with each other"),
        (nn.ConvTranspose1d(6, 6, 2), "nn.ConvTranspose1d has no dynamic form: of convolutions, the modules"),
    ],
)
def test_modules_that_are_no_linear_form_say_why(kind, reason):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = kind

        def forward(self, x):
            return self.layer(x, x) if isinstance(self.layer, nn.Bilinear) else self.layer(x)

    (left,) = prepare(Model(), torch.randn(6, 6)).record.skipped
    assert left.reason.startswith(reason)


class TiedHead(nn.Module):
    """The usual tied output layer: the logits are products with the embedding's rows."""

    def __init__(self, head):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = head

    def forward(self, ids):
        return self.head(torch.tanh(self.embedding(ids)), self.embedding.weight)


@pytest.mark.parametrize(
    "head",
    [F.linear, lambda x, w: x @ w.t(), lambda x, w: torch.matmul(x, w.T), lambda x, w: torch.einsum("bd,vd->bv", x, w)],
)
def test_a_tied_head_shares_the_embeddings_table(head, tmp_path):
    model, ids = TiedHead(head).eval(), torch.arange(5)
    quantized = quantize(model, ids)
    tables = {t.data_ptr() for t in quantized.state_dict().values() if t.dtype == torch.int8}
    assert len(quantized.record.sites) == 2
    assert len(tables) == 1
    fxquant.save(quantized, tmp_path / "q")
    assert (tmp_path / "q").stat().st_size < 8000
    with torch.device("meta"):
        skeleton = TiedHead(head).eval()
    loaded = fxquant.load(skeleton, tmp_path / "q")
    assert len({t.data_ptr() for t in loaded.state_dict().values() if t.dtype == torch.int8}) == 1
    assert torch.equal(loaded(ids), quantized(ids))
    untied = nn.Linear(8, 20, bias=False)
    untied.weight = model.embedding.weight
    expected = quantize(nn.Sequential(model.embedding, nn.Tanh(), untied), ids)
    assert torch.equal(quantized(ids), expected(ids))


def test_a_weight_used_both_ways_round_has_a_table_for_each(tmp_path):
    model, x = Forms(lambda m, x: (x @ m.oi.t() @ m.oi, x @ m.oi.t() @ m.oi + 1)).eval(), torch.randn(3, 6)
    prepared = prepare(model, x)
    assert same_bits(prepared(x), model(x))
    quantized = fxquant.convert_fx(prepared)
    shapes = [tuple(t.shape) for t in quantized.state_dict().values() if t.dtype == torch.int8]
    assert sorted(shapes) == [(5, 6), (6, 5)]
    linears = nn.Sequential(nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False))
    linears[0].weight, linears[1].weight = model.net.oi, nn.Parameter(model.net.oi.detach().t())
    assert torch.equal(quantized(x)[0], quantize(linears, x)(x))
    fxquant.save(quantized, tmp_path / "q")
    with torch.device("meta"):
        skeleton = Forms(model.function).eval()
    assert same_bits(fxquant.load(skeleton, tmp_path / "q")(x), quantized(x))


class Conv1D(nn.Module):
    """GPT-2's projection, as Hugging Face transformers writes it: a Linear whose weight is (I, O)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size_out = x.size()[:-1] + (self.nf,)  # noqa: RUF005
        x = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return x.view(size_out)


def test_gpt_2s_projections_are_quantized_as_linears_would_be():
    model, x = nn.Sequential(Conv1D(12, 6), nn.GELU(), Conv1D(6, 12)).eval(), torch.randn(2, 3, 6)
    quantized = quantize(model, x)
    assert [site.path for site in quantized.record.sites] == ["0.weight", "2.weight"]
    linears = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))
    for index in (0, 2):
        linears[index].weight = nn.Parameter(model[index].weight.detach().t())
        linears[index].bias = model[index].bias
    assert torch.equal(quantized(x), quantize(linears, x)(x))


@pytest.mark.parametrize(
    ("kind", "function"),
    [(torch.matmul, lambda m, x: torch.matmul(x, m.io)), ("matmul", lambda m, x: x.matmul(m.io)),
     (torch.einsum, lambda m, x: torch.einsum("bi,io->bo", x, m.io))],
)  # fmt: skip
def test_mapping_entries_reach_each_spelling(kind, function, tmp_path):
    model, x = Forms(lambda m, x: function(m, x) + x @ m.buffer).eval(), torch.randn(3, 6)
    mapping = everything().set_object_type(kind, None)
    quantized = quantize(model, x, mapping=mapping)
    assert [site.path for site in quantized.record.sites] == ["net.buffer"]
    assert [left.reason for left in quantized.record.skipped] == ["the mapping says float"]
    fxquant.save(quantized, tmp_path / "q")
    assert fxquant.load(model, tmp_path / "q").record.mapping == mapping


def test_an_order_entry_counts_the_forms_of_constants_only():
    model = Forms(lambda m, x: torch.matmul(torch.matmul(x, x.t()) @ x, m.io) * torch.matmul(x, m.io))
    mapping = QConfigMapping().set_module_name_object_type_order("", torch.matmul, 1, default_dynamic_qconfig)
    sites = prepare(model, torch.randn(3, 6), mapping=mapping).record.sites
    assert [site.call for site in sites] == ["matmul_3"]
