"""from_torch_ao and load_torch_ao: torch.ao's integers and scales, in fxquant's modules."""

import copy
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    ModelStateError,
    QConfigError,
    TorchAoError,
    default_dynamic_qconfig,
    explain,
    float16_dynamic_qconfig,
    from_torch_ao,
    graph_diff,
    load_torch_ao,
    per_tensor_dynamic_qconfig,
)
from fxquant.formats import UINT4
from fxquant.graph.module import FxModule
from fxquant.graph.record import record_of
from tests.samples import WordLM, kinds, leaves, lm_inputs, same_bits

EXACT = per_tensor_dynamic_qconfig.with_reduce_range()
ULP = 2**-23


@pytest.fixture(autouse=True)
def tq():
    """torch.ao.quantization, whose modules are deprecated: its warnings are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch.ao.quantization
        import torch.ao.quantization.quantize_fx

        yield torch.ao.quantization


def swapped(tq, model, dtype=torch.qint8):
    """Return torch.ao's eager form, embeddings at 8 bits."""
    spec = dict.fromkeys(
        (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell),
        tq.default_dynamic_qconfig if dtype == torch.qint8 else tq.float16_dynamic_qconfig,
    )
    if dtype == torch.qint8:
        spec.update(dict.fromkeys((nn.Embedding, nn.EmbeddingBag), tq.float_qparams_weight_only_qconfig))
    return tq.quantize_dynamic(model.eval(), spec)


def graphed(tq, model, *inputs, linear=None, embedding=None):
    """Return torch.ao's FX form."""
    mapping = tq.QConfigMapping().set_global(linear or tq.default_dynamic_qconfig)
    for kind in (nn.Embedding, nn.EmbeddingBag):
        mapping.set_object_type(kind, embedding or tq.float_qparams_weight_only_qconfig)
    prepared = tq.quantize_fx.prepare_fx(copy.deepcopy(model).eval(), mapping, inputs)
    return tq.quantize_fx.convert_fx(prepared)


class Functional(nn.Module):
    """Calls of F.linear in two scopes, one with a ReLU, beside a Linear and BatchNorms that fold."""

    def __init__(self):
        super().__init__()
        self.inner, self.fc = Inner(), nn.Linear(8, 8)
        self.conv, self.norm = nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)
        self.conv2, self.norm2 = nn.Conv1d(8, 8, 1, bias=False), nn.BatchNorm1d(8)
        self.first, self.second = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 6))
        for norm in (self.norm, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x.unsqueeze(-1))))
        x = self.norm2(self.conv2(x)).squeeze(-1)
        return F.linear(F.linear(self.inner(self.fc(x)), self.first), self.second)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.relu(F.linear(x, self.weight, self.bias))


class Step(nn.Module):
    """The three cells, one after the other."""

    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.rnn = nn.LSTMCell(6, 8), nn.GRUCell(8, 8), nn.RNNCell(8, 8, nonlinearity="relu")

    def forward(self, x):
        return self.rnn(self.gru(self.lstm(x)[0]))


def their_weights(module):
    """Return every quantized weight of a torch.ao module by our buffer's name, through torch.ao's own accessors."""
    if hasattr(module, "get_weight"):
        return module.get_weight()
    return {"weight": module.weight()}


def check_integers(module, quantized):
    """Check that a module of ours holds the integers, scales and zero points of torch.ao's, read by torch itself."""
    weights = their_weights(module)
    assert weights
    for name, theirs in weights.items():
        integers = quantized.own((quantized._stored[name].key,))[0]
        per_channel = theirs.qscheme() != torch.per_tensor_affine
        scale = theirs.q_per_channel_scales() if per_channel else torch.tensor([theirs.q_scale()])
        assert torch.equal(getattr(quantized, f"{name}_scale"), scale.float().expand(theirs.shape[0]))
        zero_point = getattr(quantized, f"{name}_zero_point")
        if theirs.dtype == torch.qint8:
            assert zero_point is None
        else:
            assert torch.equal(zero_point, theirs.q_per_channel_zero_points().float())
        if theirs.dtype == torch.quint4x2:
            assert integers.shape == (theirs.shape[0], -(-theirs.shape[1] // 2))
            shape = (-1, 1)
            q = (theirs.dequantize() / scale.view(shape) + zero_point.view(shape)).round()
            assert torch.equal(UINT4.unpack(integers, theirs.shape[1]).float(), q)
        else:
            assert torch.equal(integers, theirs.int_repr())


CASES = {
    "linear": lambda: (nn.Linear(16, 8), torch.randn(3, 16)),
    "linear without bias": lambda: (nn.Linear(16, 8, bias=False), torch.randn(3, 16)),
    "lstm": lambda: (nn.LSTM(6, 8, 2, bidirectional=True, batch_first=True), torch.randn(3, 5, 6)),
    "lstm, one direction": lambda: (nn.LSTM(6, 8, 3), torch.randn(5, 3, 6)),
    "gru": lambda: (nn.GRU(6, 8, 2, bidirectional=True), torch.randn(5, 3, 6)),
    "lstm cell": lambda: (nn.LSTMCell(6, 8), torch.randn(3, 6)),
    "gru cell": lambda: (nn.GRUCell(6, 8), torch.randn(3, 6)),
    "rnn cell": lambda: (nn.RNNCell(6, 8, nonlinearity="relu"), torch.randn(3, 6)),
    "embedding": lambda: (nn.Embedding(20, 9), torch.randint(20, (4,))),
    "embedding bag": lambda: (nn.EmbeddingBag(20, 9, mode="sum"), torch.randint(20, (4,)), torch.tensor([0, 3])),
}


class Alone(nn.Module):
    """A model of one module."""

    def __init__(self, module):
        super().__init__()
        self.part = module

    def forward(self, *inputs):
        return self.part(*inputs)


class Two(Alone):
    """The same, for a call with two arguments: torch.ao's tracer takes no *args."""

    def forward(self, input, offsets):
        return self.part(input, offsets)


class One(Alone):
    """The same, for a call with one."""

    def forward(self, input):
        return self.part(input)


@pytest.mark.parametrize("form", ["eager", "graph"])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "with the float model"])
@pytest.mark.parametrize("case", CASES)
def test_the_integers_are_torch_aos_and_the_arithmetic_can_be(tq, case, form, beside):
    module, *inputs = CASES[case]()
    model = (Two if len(inputs) == 2 else One)(module).eval()
    theirs = swapped(tq, model) if form == "eager" else graphed(tq, model, *inputs)
    ours = from_torch_ao(theirs, model if beside else None, qconfig=EXACT)
    check_integers(theirs.part, ours.get_submodule("part"))
    for a, b in zip(leaves(ours(*inputs)), leaves(theirs(*inputs)), strict=True):
        # The same integers meet; sums, σ and tanh round in another order, a few times in float32.
        assert (a - b).abs().max() <= 16 * ULP * b.abs().max().clamp(min=1)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("columns", [8, 9])
def test_4_bit_rows(tq, kind, columns):
    if kind is nn.EmbeddingBag:
        model, inputs = Two(nn.EmbeddingBag(20, columns, mode="sum")), (torch.arange(20), torch.arange(20))
    else:
        model, inputs = One(nn.Embedding(20, columns)), (torch.arange(20),)
    if columns % 2:  # torch.ao packs no such row, but a quantized tensor of it may be in a file
        state = swapped(tq, model).state_dict()
        weight, scale = model.part.weight.detach(), torch.full((20,), 0.3)
        packed = torch.quantize_per_channel(weight, scale, torch.full((20,), 7.5), 0, torch.quint4x2)
        state["part._packed_params._packed_weight"] = packed
        ours = from_torch_ao(state, model).part
        q = (weight / 0.3 + 7.5).round().clamp(0, 15)
        assert torch.equal(UINT4.unpack(ours.weight_uint4, columns).float(), q)
    else:
        theirs = graphed(tq, model, *inputs, embedding=tq.float_qparams_weight_only_qconfig_4bit)
        ours = from_torch_ao(theirs)
        check_integers(theirs.part, ours.get_submodule("part"))
        low, high = model.part.weight.detach().aminmax(dim=1, keepdim=True)
        # torch.ao's kernel keeps scale and offset in float16: 2⁻¹¹ of (15 scales) and of the offset.
        assert ((ours(*inputs) - theirs(*inputs)).abs() <= 2**-11 * ((high - low) + low.abs()) * 1.01).all()


def test_per_channel_weights_keep_their_scales(tq):
    model, x = One(nn.Linear(16, 8)), torch.randn(3, 16)
    theirs = graphed(tq, model, x, linear=tq.per_channel_dynamic_qconfig)
    ours = from_torch_ao(theirs)
    check_integers(theirs.part, ours.get_submodule("part"))
    assert ours.get_submodule("part").weight_scale.unique().numel() == 8


@pytest.mark.parametrize("engine", [name for name in torch.backends.quantized.supported_engines if name != "none"])
def test_every_engines_packing_is_read(tq, engine):
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = engine
        theirs = swapped(tq, One(nn.LSTM(6, 8)))
    finally:
        torch.backends.quantized.engine = before
    check_integers(theirs.part, from_torch_ao(theirs).part)


@pytest.mark.parametrize("form", ["eager", "graph"])
def test_float16(tq, form):
    model, inputs = WordLM().eval(), lm_inputs(WordLM())
    theirs = (
        swapped(tq, model, torch.float16)
        if form == "eager"
        else graphed(tq, model, *inputs, linear=tq.float16_dynamic_qconfig)
    )
    ours = from_torch_ao(theirs)
    assert torch.equal(ours.get_submodule("decoder").weight_float16, model.decoder.weight.half())
    assert torch.equal(ours.get_submodule("rnn").weight_hh_l1_float16, model.rnn.weight_hh_l1.half())
    assert {site.path: site.qconfig for site in record_of(ours).sites}["decoder"] == float16_dynamic_qconfig


# F.linear, ReLU, BatchNorm: what only a graph has


def test_a_graphs_calls_become_modules_in_the_packed_weights_place(tq):
    model, x = Functional().eval(), torch.randn(5, 8)
    theirs = graphed(tq, model, x)
    ours = from_torch_ao(theirs, qconfig=EXACT)
    assert isinstance(ours, FxModule)
    assert kinds(ours)["inner_packed_weight_0"] == "DynamicQuantizedLinearReLU"
    for name in ("inner_packed_weight_0", "_packed_weight_0", "_packed_weight_1"):
        weight, bias = torch.ops.quantized.linear_unpack(getattr(theirs, name))
        part = ours.get_submodule(name)
        assert torch.equal(part.weight_int8, weight.int_repr())
        assert torch.equal(part.weight_scale, torch.full((weight.shape[0],), weight.q_scale()))
        assert (bias is None and part.bias is None) or torch.equal(part.bias, bias)
    expected = theirs(x)
    assert (ours(x) - expected).abs().max() <= 16 * ULP * expected.abs().max()


def test_beside_the_float_model_calls_and_folded_norms_find_their_places(tq, tmp_path):
    model, x = Functional().eval(), torch.randn(5, 8)
    theirs = graphed(tq, model, x)
    ours = from_torch_ao(theirs.state_dict(), model, qconfig=EXACT)
    paths = [site.path for site in record_of(ours).sites]
    assert paths == ["fc", "inner.weight", "first", "second"]
    weight, _ = torch.ops.quantized.linear_unpack(theirs._packed_weight_1)
    assert torch.equal(ours.second_int8, weight.int_repr())
    expected = theirs(x)
    assert (ours(x) - expected).abs().max() <= 16 * ULP * expected.abs().max()
    fxquant.save(ours, tmp_path / "m.safetensors")
    assert same_bits(fxquant.load(model, tmp_path / "m.safetensors")(x), ours(x))


class Whole(nn.Module):
    """A Conv and a BatchNorm that torch.ao is told not to look into, and one call of F.linear."""

    def __init__(self):
        super().__init__()
        self.body, self.weight = nn.Sequential(nn.Conv1d(8, 8, 1), nn.BatchNorm1d(8)), nn.Parameter(torch.randn(4, 8))
        self.body[1].running_mean.normal_()

    def forward(self, x):
        return F.linear(self.body(x.unsqueeze(-1)).squeeze(-1), self.weight)


class Scaled(Whole):
    """A Whole whose output goes through a matrix that is computed from others."""

    def __init__(self):
        super().__init__()
        self.matrix, self.scale = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return super().forward(x) @ (self.matrix * self.scale)


def test_a_matrix_that_forward_computes_is_that_of_torch_aos_tensors(tq):
    model, x = Scaled().eval(), torch.randn(5, 8)
    theirs = graphed(tq, model, x)
    ours = from_torch_ao(theirs.state_dict(), Scaled().eval(), qconfig=EXACT)  # an architecture with other weights
    assert (ours(x) - theirs(x)).abs().max() <= 16 * ULP * theirs(x).abs().max()


@pytest.mark.parametrize("is_folded", [False, True])
def test_a_norm_that_torch_ao_did_not_fold_is_not(tq, is_folded):
    model, x = Whole().eval(), torch.randn(5, 8)
    custom = {} if is_folded else {"non_traceable_module_name": ["body"]}
    mapping = tq.QConfigMapping().set_global(tq.default_dynamic_qconfig)
    prepared = tq.quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,), prepare_custom_config=custom)
    theirs = tq.quantize_fx.convert_fx(prepared)
    ours = from_torch_ao(theirs.state_dict(), model, qconfig=EXACT)
    assert ("BatchNorm1d" in kinds(ours).values()) != is_folded
    assert (ours(x) - theirs(x)).abs().max() <= 16 * ULP * theirs(x).abs().max()


@pytest.mark.parametrize("function", [True, False], ids=["F.linear", "a folded norm"])
def test_what_has_a_place_in_a_graph_only_gives_one(tq, function):
    model = Inner() if function else nn.Sequential(nn.Linear(8, 8), nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5))
    x = torch.randn(2, 5, 8)
    theirs = graphed(tq, model.eval(), x)
    ours = from_torch_ao(theirs.state_dict(), model, qconfig=EXACT)
    assert isinstance(ours, FxModule)
    assert (ours(x) - theirs(x)).abs().max() <= 16 * ULP * theirs(x).abs().max()


def test_a_call_that_torch_ao_left_float_is_left(tq):
    model, x = Functional().eval(), torch.randn(5, 8)
    mapping = tq.QConfigMapping().set_global(tq.default_dynamic_qconfig)
    mapping.set_module_name_object_type_order("", F.linear, 0, None)
    theirs = tq.quantize_fx.convert_fx(tq.quantize_fx.prepare_fx(copy.deepcopy(model), mapping, (x,)))
    ours = from_torch_ao(theirs.state_dict(), model)
    assert [site.path for site in record_of(ours).sites] == ["fc", "inner.weight", "second"]
    assert torch.equal(ours.first, model.first)


def test_a_fused_linear_relu_module(tq):
    model, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU()).eval(), torch.randn(5, 16)
    theirs = graphed(tq, model, x)
    assert type(theirs.get_submodule("0")).__name__ == "LinearReLU"
    ours = from_torch_ao(theirs, qconfig=EXACT)
    assert kinds(ours)["0"] == "DynamicQuantizedLinearReLU"
    check_integers(theirs.get_submodule("0"), ours.get_submodule("0"))
    assert (ours(x) - theirs(x)).abs().max() <= 4 * ULP * theirs(x).abs().max()


def test_a_float_chain_fused_in_the_eager_way(tq):
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Linear(7, 3)).eval()
    theirs, x = swapped(tq, tq.fuse_modules(model, [["0", "1"]])), torch.randn(2, 4, 7)
    ours = from_torch_ao(theirs, qconfig=EXACT)
    assert not [name for name, module in ours.named_modules() if type(module).__module__.startswith("torch.ao")]
    assert (ours(x) - theirs(x)).abs().max() <= 8 * ULP * theirs(x).abs().max()


@pytest.mark.parametrize("beside", [False, True])
def test_float_chains_that_torch_ao_fused_come_along(tq, beside):
    model = nn.Sequential(nn.Conv1d(4, 4, 1), nn.ReLU(), nn.Linear(7, 3)).eval()
    x = torch.randn(2, 4, 7)
    theirs = graphed(tq, model, x)
    assert "0.0.weight" in theirs.state_dict()
    ours = from_torch_ao(theirs, model if beside else None, qconfig=EXACT)
    assert not [name for name, module in ours.named_modules() if type(module).__module__.startswith("torch.ao")]
    assert (ours(x) - theirs(x)).abs().max() <= 8 * ULP * theirs(x).abs().max()


def test_a_graph_inside_the_users_own_model(tq):
    class Outer(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body, self.out = body, nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.body(x)) if x.sum() > -1e9 else None

    x = torch.randn(5, 8)
    theirs = Outer(graphed(tq, Functional(), x)).eval()
    ours = from_torch_ao(theirs, qconfig=EXACT)
    assert type(ours) is Outer
    assert kinds(ours)["body.fc"] == "DynamicQuantizedLinear"
    assert kinds(ours)["out"] == "Linear"
    assert (ours(x) - theirs(x)).abs().max() <= 16 * ULP * theirs(x).abs().max()


# What comes back is fxquant's, wholly


def test_by_default_a_rows_result_depends_on_that_row_alone(tq):
    model = WordLM().eval()
    ours = from_torch_ao(swapped(tq, model))
    words, hidden = lm_inputs(model, batch=4)
    alone = ours(words[:, :1], tuple(state[:, :1] for state in hidden))
    assert same_bits(alone[0], ours(words, hidden)[0][:, :1])


@pytest.mark.parametrize("form", ["eager", "graph", "graph beside the float model"])
def test_checkpoints_copies_and_reports(tq, form, tmp_path):
    model = WordLM(nlayers=2).eval()
    inputs = lm_inputs(model)
    theirs = swapped(tq, model) if form == "eager" else graphed(tq, model, *inputs)
    ours = from_torch_ao(theirs, model if "beside" in form else None)
    assert [row.path for row in explain(ours).rows if row.is_quantized] == ["encoder", "rnn", "decoder"]
    assert "3 of 3 candidates, " in str(graph_diff(model, ours))
    assert explain(ours).coverage.share == 1
    assert explain(ours).coverage.total_bytes > 0
    fxquant.save(ours, tmp_path / "m.safetensors")
    torch.save(ours.state_dict(), tmp_path / "m.pt")
    loaded = fxquant.load(model, tmp_path / "m.safetensors")
    assert str(explain(loaded)) == str(explain(ours))
    twins = [loaded, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))]
    for twin in twins:
        assert same_bits(twin(*inputs), ours(*inputs))
    plain = torch.load(tmp_path / "m.pt", weights_only=True)
    assert all(not tensor.is_quantized for tensor in plain.values())


def test_what_torch_ao_left_float_says_so(tq):
    theirs = tq.quantize_dynamic(WordLM().eval(), {nn.LSTM})
    rows = {row.path: row.decision for row in explain(from_torch_ao(theirs)).rows}
    assert rows["decoder"] == "float: no mapping entry covers it"


def test_methods_hooks_and_the_class_stay(tq):
    model, seen = WordLM(), []
    model.decoder.register_forward_hook(lambda *_: seen.append(1))
    ours = from_torch_ao(swapped(tq, model))
    ours(torch.zeros(2, 1, dtype=torch.long), ours.init_hidden(1))
    assert type(ours) is WordLM
    assert seen == [1]


def test_a_module_by_itself(tq):
    holder = swapped(tq, One(nn.LSTM(4, 6)))
    ours = from_torch_ao(holder.part)
    check_integers(holder.part, ours)


@pytest.mark.parametrize("form", ["eager", "graph"])
def test_neither_model_is_changed_nor_shared(tq, form):
    model = WordLM().eval()
    inputs = lm_inputs(model)
    theirs = swapped(tq, model) if form == "eager" else graphed(tq, model, *inputs)
    before, types = theirs(*inputs), kinds(theirs)
    weights = copy.deepcopy(model.state_dict())
    only = tq.quantize_dynamic(model, {nn.Linear})  # with an LSTM and an Embedding that stay float
    first = only(*inputs)
    for given in (theirs, only):
        for ours in (from_torch_ao(given), from_torch_ao(given.state_dict(), model)):
            for tensor in (*ours.parameters(), *ours.buffers()):
                tensor.data.zero_()
    assert same_bits(only(*inputs), first)
    assert same_bits(theirs(*inputs), before)
    assert kinds(theirs) == types
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_module_under_two_names_and_tied_float_weights_stay_one(tq):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = self.a
            self.c, self.d = nn.Bilinear(8, 8, 8), nn.Bilinear(8, 8, 8)
            self.d.weight = self.c.weight

        def forward(self, x):
            return self.d(self.c(x, x), self.b(self.a(x)))

    model = Tied().eval()
    theirs = swapped(tq, model)
    assert type(theirs.b) is nn.Linear  # torch.ao swaps the first name only
    for ours in (from_torch_ao(theirs), from_torch_ao(theirs.state_dict(), model)):
        assert ours.c.weight is ours.d.weight
        check_integers(theirs.a, ours.a)
    state, other = theirs.state_dict(), torch.quantize_per_tensor(torch.randn(8, 8), 0.02, 0, torch.qint8)
    state["a._packed_params._packed_params"] = (other, None)
    del state["b.bias"]
    model.a.bias = None
    ours = from_torch_ao(state, model)
    assert torch.equal(ours.a.weight_int8, other.int_repr())  # and not b's float weight anew
    assert ours.b.weight_int8 is ours.a.weight_int8


def test_a_weight_that_a_float_module_shares(tq):
    model = WordLM(ninp=8, tie=True).eval()
    theirs = tq.quantize_dynamic(model, {nn.Linear})
    for ours in (from_torch_ao(theirs), from_torch_ao(theirs.state_dict(), model)):
        assert torch.equal(ours.encoder.weight, model.encoder.weight)
        check_integers(theirs.decoder, ours.decoder)


def test_nothing_points_into_torch_aos_memory(tq):
    model, ids = One(nn.Embedding(50, 12)), torch.arange(50)
    theirs = pickle.loads(pickle.dumps(swapped(tq, model)))
    ours = from_torch_ao(theirs)
    before = ours(ids)
    del theirs
    _ = [torch.randn(size) for size in (50, 50, 100, 600) for _ in range(50)]  # so that freed memory is used again
    assert same_bits(ours(ids), before)


def test_a_float_recurrent_layer_gets_the_files_weights(tq):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.out = nn.RNN(6, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(self.rnn(x)[0])

    theirs, x = swapped(tq, Both()), torch.randn(4, 2, 6)
    ours = from_torch_ao(theirs.state_dict(), Both().eval(), qconfig=EXACT)
    assert (ours(x) - theirs(x)).abs().max() <= 8 * ULP * theirs(x).abs().max().clamp(min=1)


# Files


@pytest.mark.parametrize("on_meta", [False, True])
@pytest.mark.parametrize("form", ["eager", "graph"])
def test_a_state_dict_file(tq, form, on_meta, tmp_path):
    model = WordLM().eval()
    inputs = lm_inputs(model)
    theirs = swapped(tq, model) if form == "eager" else graphed(tq, model, *inputs)
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    with torch.device("meta" if on_meta else "cpu"):
        skeleton = WordLM().eval()
    loaded = load_torch_ao(tmp_path / "m.pt", skeleton)
    assert type(loaded) is WordLM
    check_integers(theirs.rnn, loaded.rnn)
    assert same_bits(loaded(*inputs), from_torch_ao(theirs.state_dict(), model)(*inputs))


def test_a_state_dict_file_of_f_linears(tq, tmp_path):
    model, x = Functional().eval(), torch.randn(5, 8)
    theirs = graphed(tq, model, x)
    torch.save(theirs.state_dict(), tmp_path / "m.pt")
    loaded = load_torch_ao(tmp_path / "m.pt", model, qconfig=EXACT)
    assert (loaded(x) - theirs(x)).abs().max() <= 16 * ULP * theirs(x).abs().max()


@pytest.mark.parametrize("form", ["eager", "graph"])
def test_a_file_of_the_whole_model(tq, form, tmp_path):
    model = WordLM().eval()
    inputs = lm_inputs(model)
    theirs = swapped(tq, model) if form == "eager" else graphed(tq, model, *inputs)
    torch.save(theirs, tmp_path / "m.pt")
    loaded = load_torch_ao(tmp_path / "m.pt")
    assert same_bits(loaded(*inputs), from_torch_ao(theirs)(*inputs))


class Bomb:
    armed = True

    def __reduce__(self):
        return setattr, (Bomb, "armed", False)


def test_beside_a_float_model_nothing_is_unpickled(tmp_path):
    torch.save({"weight": Bomb()}, tmp_path / "m.pt")
    with pytest.raises(TorchAoError, match=r"of which only tensors are read.*torch\.load\(path, weights_only=False\)"):
        load_torch_ao(tmp_path / "m.pt", nn.Linear(2, 2))
    assert Bomb.armed


def test_it_imports_nothing_of_torch_ao(tq, tmp_path):
    torch.save(swapped(tq, nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))).state_dict(), tmp_path / "m.pt")
    code = (
        "import sys, torch; from torch import nn; had = set(sys.modules); import fxquant; "
        "model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4)).eval(); "
        "assert 'fxquant.torch_ao.load' not in sys.modules; "
        "quantized = fxquant.load_torch_ao(sys.argv[1], model); "
        "assert quantized[1].weight_hh_l0_int8.dtype == torch.int8; "
        "print(sorted(m for m in set(sys.modules) - had if m.startswith(('torch.ao', 'torch.quantization'))))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "m.pt")]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == "[]"


# Errors


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(TorchAoError, match="cannot be opened: No such file"):
        load_torch_ao(tmp_path / "none.pt", nn.Linear(2, 2))


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "m.pt").write_bytes(b"no such thing")
    with pytest.raises(TorchAoError, match="cannot read it: the classes in it must be importable"):
        load_torch_ao(tmp_path / "m.pt")


def test_the_float_model_is_a_module():
    with pytest.raises(TorchAoError, match=r"takes the float model as an nn\.Module, got int"):
        from_torch_ao({}, 3)


def test_a_state_dict_needs_the_model():
    with pytest.raises(TorchAoError, match=r"from_torch_ao\(state_dict, model\); got a state_dict alone"):
        from_torch_ao({})


def test_something_else_altogether():
    with pytest.raises(TorchAoError, match=r"takes a model that torch.ao quantized, .*; got int"):
        from_torch_ao(3, nn.Linear(2, 2))


def test_a_float_model_is_told_where_to_go():
    with pytest.raises(TorchAoError, match=r"quantized nothing in this: a float model goes to fxquant\.prepare_fx"):
        from_torch_ao(nn.Linear(2, 2).eval())


def test_a_model_of_ours_is_refused():
    quantized = fxquant.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ModelStateError, match="this went through fxquant"):
        from_torch_ao(quantized)


def linear_state(weight):
    """Return what torch.ao saves of a Linear with this quantized weight."""
    return {"0._packed_params._packed_params": (weight, None)}


def test_zero_points_of_a_weight_are_refused():
    weight = torch.quantize_per_tensor(torch.randn(4, 8), 0.1, 3, torch.qint8)
    with pytest.raises(TorchAoError, match=r"'0\.weight' has zero points other than 0"):
        from_torch_ao(linear_state(weight), nn.Sequential(nn.Linear(8, 4, bias=False)))


def test_another_kind_of_integers_is_refused():
    weight = torch.quantize_per_tensor(torch.randn(4, 8), 0.1, 0, torch.qint32)
    with pytest.raises(TorchAoError, match=r"'0\.weight' is torch\.qint32 torch\.per_tensor_affine"):
        from_torch_ao(linear_state(weight), nn.Sequential(nn.Linear(8, 4, bias=False)))


WEIGHT = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.ModuleDict({"one": nn.Linear(8, 4, bias=False)}), "the model has no module '0'"),
        (nn.Sequential(nn.Linear(8, 5, bias=False)), r"'0\.weight' is \(4, 8\) in torch\.ao's state_dict, \(5, 8\)"),
        (nn.Sequential(nn.Linear(8, 4)), r"has no '0\.bias', which the model needs"),
        (nn.Sequential(nn.ReLU()), r"has '0\.weight', for which the model has no place"),
    ],
)
def test_another_models_state_dict(model, message):
    weight = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    with pytest.raises(TorchAoError, match=message):
        from_torch_ao(linear_state(weight), model)


def test_a_recurrent_entry_for_another_module(tq):
    state = swapped(tq, nn.Sequential(nn.LSTM(4, 4))).state_dict()
    with pytest.raises(TorchAoError, match="is a recurrent layer's, but the model has Linear there"):
        from_torch_ao(state, nn.Sequential(nn.Linear(4, 4)))


def test_a_weight_that_is_no_site_here_says_why():
    class Mine(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    weight = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    with pytest.raises(TorchAoError, match=r"'0\.weight' would have no value: it is a subclass of nn\.Linear"):
        from_torch_ao(linear_state(weight), nn.Sequential(Mine(8, 4, bias=False)))


def test_a_buffer_that_nothing_holds():
    model = nn.Sequential(nn.Linear(8, 4, bias=False))
    model.register_buffer("table", torch.zeros(3, device="meta"), persistent=False)
    weight = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    with pytest.raises(TorchAoError, match="'table' would have no value: no state_dict holds it"):
        from_torch_ao(linear_state(weight), model)


def test_missing_and_surplus_calls(tq):
    model, x = Functional().eval(), torch.randn(5, 8)
    state = graphed(tq, model, x).state_dict()
    fewer = {name: value for name, value in state.items() if name != "_packed_weight_1"}
    with pytest.raises(TorchAoError, match=r"has no weight for the F\.linear of 'second'"):
        from_torch_ao(fewer, model)
    with pytest.raises(TorchAoError, match=r"no call of F\.linear for the packed weight 2 of module ''"):
        from_torch_ao({**state, "_packed_weight_2": state["_packed_weight_1"]}, model)


def test_a_torch_that_cannot_unpack_says_so(monkeypatch):
    def gone(self):
        raise RuntimeError("int_repr is gone")

    weight = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    monkeypatch.setattr(torch.Tensor, "int_repr", gone)
    with pytest.raises(TorchAoError, match=r"can no longer unpack '0\.weight' .*under an older torch"):
        from_torch_ao(linear_state(weight), nn.Sequential(nn.Linear(8, 4, bias=False)))


def test_a_qconfig_without_activations_is_refused_where_they_are_needed():
    weight = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    with pytest.raises(QConfigError, match=r"'0' .*cannot take the qconfig"):
        from_torch_ao(linear_state(weight), nn.Sequential(nn.Linear(8, 4, bias=False)), qconfig=float16_dynamic_qconfig)


def test_the_qconfigs_of_sites_are_what_was_found_and_what_was_asked():
    weight = torch.quantize_per_tensor(WEIGHT, 0.1, 0, torch.qint8)
    (site,) = record_of(from_torch_ao(linear_state(weight), nn.Sequential(nn.Linear(8, 4, bias=False)))).sites
    assert site.qconfig.activation == default_dynamic_qconfig.activation
    assert site.qconfig.weight == per_tensor_dynamic_qconfig.weight
