"""The float weight of a quantized module: right values when read, metadata for free, and no way to write to it."""

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

import fxquant
from fxquant import (
    QConfigMapping,
    ReadOnlyError,
    convert_fx,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    quantize_dynamic,
)
from fxquant.nn import DynamicQuantizedLinear, QuantizedEmbedding
from fxquant.nn.base import QuantizedModule
from fxquant.nn.float_weight import FloatWeight
from tests.samples import WordLM, lm_inputs, prepare, quantize

pytestmark = pytest.mark.filterwarnings("ignore:the [a-z_0-9]+ of a quantized")

INT8, INT16, FLOAT16 = None, int16_dynamic_qconfig, float16_dynamic_qconfig
LAYERS = {
    "linear": (lambda: nn.Linear(70, 6), (INT8, INT16, FLOAT16, int4_dynamic_qconfig), ("weight",)),
    "odd": (lambda: nn.Linear(7, 6), (int4_dynamic_qconfig,), ("weight",)),
    "embedding": (
        lambda: nn.Embedding(9, 7),
        (INT8, FLOAT16, float_qparams_weight_only_qconfig, float_qparams_weight_only_qconfig_4bit),
        ("weight",),
    ),
    "bag": (lambda: nn.EmbeddingBag(9, 6), (INT8, float_qparams_weight_only_qconfig_4bit), ("weight",)),
    "conv1d": (lambda: nn.Conv1d(64, 64, 17), (INT8,), ("weight",)),
    "conv2d": (lambda: nn.Conv2d(64, 64, (3, 6)), (INT8,), ("weight",)),
    "lstm": (
        lambda: nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3),
        (INT8, INT16, FLOAT16, int4_dynamic_qconfig),
        ("weight_ih_l0", "weight_hh_l1_reverse", "weight_hr_l0"),
    ),
    "gru cell": (lambda: nn.GRUCell(6, 5), (INT8,), ("weight_ih", "weight_hh")),
    "attention": (lambda: nn.MultiheadAttention(8, 2), (INT8, int4_dynamic_qconfig), ("in_proj_weight",)),
    "attention of sizes": (
        lambda: nn.MultiheadAttention(8, 2, kdim=6, vdim=4),
        (INT8,),
        ("q_proj_weight", "k_proj_weight", "v_proj_weight"),
    ),
}
CASES = [(name, qconfig) for name, (_, qconfigs, _) in LAYERS.items() for qconfig in qconfigs]


@pytest.mark.parametrize(("name", "qconfig"), CASES)
def test_it_is_the_float_weight_within_half_a_step(name, qconfig):
    make, _, names = LAYERS[name]
    layer = make().eval()
    quantized = quantize_dynamic(layer, QConfigMapping().set_global(qconfig or fxquant.default_dynamic_qconfig))
    assert isinstance(quantized, QuantizedModule)
    for weight_name in names:
        weight, own = getattr(quantized, weight_name), getattr(layer, weight_name).detach()
        assert isinstance(weight, FloatWeight)
        assert (weight.shape, weight.dtype, weight.device) == (own.shape, own.dtype, own.device)
        span = 2 * own.abs().amax()
        steps = {"int4": 15, "uint4": 15, "int16": 65534, "float16": 2**10}
        step = span / steps.get(quantized.qconfig.weight.dtype, 254)
        # an int4's bfloat16 scale is off by 2^-9, and its far end by half a step more where it is not the range's
        assert (weight - own).abs().max() <= step * (1.2 if qconfig is int4_dynamic_qconfig else 0.51)


@pytest.fixture
def layer():
    return DynamicQuantizedLinear.from_float(nn.Linear(8, 4))


@pytest.fixture
def table():
    return QuantizedEmbedding.from_float(nn.Embedding(10, 8))


@pytest.fixture
def values(layer):
    """The layer's weight, computed independently."""
    return layer.weight_int8.float() * layer.weight_scale[:, None]


READS = {
    "matmul": lambda w, x: x @ w.t(),
    "linear": lambda w, x: F.linear(x, w),
    "T": lambda w, x: w.T,
    "slice": lambda w, x: w[1:3, 2],
    "row": lambda w, x: w[-1],
    "detach": lambda w, x: w.detach() + 0,
    "data": lambda w, x: w.data * 2,
    "half": lambda w, x: w.half(),
    "to": lambda w, x: w.to(torch.float64),
    "float": lambda w, x: w.float(),
    "numpy": lambda w, x: torch.from_numpy(w.detach().cpu().numpy().copy()),
    "tolist": lambda w, x: torch.tensor(w.tolist()),
    "stack": lambda w, x: torch.stack([w, w]),
    "rows of an index": lambda w, x: w[torch.tensor([[3, 0], [-1, 1]])],
    "rows of a mask": lambda w, x: w[torch.tensor([True, False, True, True])],
    "index_select": lambda w, x: torch.index_select(w, 0, torch.tensor([2, 2])),
    "embedding": lambda w, x: F.embedding(torch.tensor([[1, 3]]), w),
    "deepcopy": lambda w, x: copy.deepcopy(w),
    "pickle": lambda w, x: pickle.loads(pickle.dumps(w)),
    "clone": lambda w, x: nn.Parameter(w.clone()),
    "vmap": lambda w, x: torch.func.vmap(lambda row: row * 2)(w),
    "iterate": lambda w, x: torch.stack(list(w)),
    "format": lambda w, x: torch.tensor([float(f"{w[0, 0]:.4f}")]),
    "cdist": lambda w, x: (x.unsqueeze(1) - w).pow(2).sum(-1),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_reads_it_gets_what_the_values_give(layer, values, read):
    x = torch.randn(3, 8)
    found, expected = read(layer.weight, x), read(values, x)
    assert torch.equal(found, expected)
    if not isinstance(found, FloatWeight):
        assert type(found) in (torch.Tensor, nn.Parameter)


def test_a_file_of_it_holds_the_values(layer, values):
    file = io.BytesIO()
    torch.save(layer.weight, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), values)


TABLE_READS = {
    "True": lambda w: w[True],
    "columns": lambda w: torch.index_select(w, 1, torch.tensor([2, 0])),
    "scaled": lambda w: F.embedding(torch.tensor([1, 3]), w, None, None, 2.0, True),
}


@pytest.mark.parametrize("read", TABLE_READS.values(), ids=TABLE_READS)
def test_reads_of_a_table_that_are_not_of_its_rows(table, read):
    assert torch.equal(read(table.weight), read(table.weight_int8.float() * table.weight_scale[:, None]))


@pytest.mark.parametrize(
    "look_up", [lambda i, w: F.embedding(i, w, None, 0.1), lambda i, w: F.embedding(i, w, max_norm=0.1)]
)
def test_a_look_up_that_scales_the_rows_in_place_is_a_write(table, look_up):
    with pytest.raises(ReadOnlyError, match="writes to the weight of a quantized QuantizedEmbedding"):
        look_up(torch.tensor([1, 3]), table.weight)


def test_its_numpy_array_is_read_only(layer, values):
    for array in (layer.weight.numpy(), np.asarray(layer.weight)):
        assert np.array_equal(array, values.numpy())
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_it_has_no_address(layer):
    with pytest.raises(ReadOnlyError, match=r"weight of a quantized \w+ .*has no memory of its own.*\.clone\(\)"):
        layer.weight.data_ptr()


def test_asking_it_to_stay_without_a_gradient_changes_nothing(layer):
    weight = layer.weight
    assert weight.requires_grad_(False) is weight


def test_a_parameter_made_of_a_view_shares_no_memory_with_it(layer, values):
    view = layer.weight.view(-1)
    nn.Parameter(view).data.zero_()
    assert torch.equal(view, values.view(-1))


@pytest.mark.parametrize("index", [10, -1])
def test_a_row_that_is_not_there(table, index):
    with pytest.raises(IndexError):
        F.embedding(torch.tensor([index]), table.weight)


def test_rows_are_looked_up_without_the_others(table, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "fxquant.nn.base.dequantize",
        lambda weight: seen.append(weight.values.shape) or weight.values.float(),
    )
    for read in READS["rows of an index"], READS["embedding"], READS["index_select"], READS["row"]:
        read(table.weight, None)
    assert seen == [(4, 8), (2, 8), (2, 8), (1, 8)]


def test_gradients_flow_to_the_other_operands(layer, values):
    x = torch.randn(3, 8, requires_grad=True)
    F.linear(x, layer.weight).sum().backward()
    assert torch.allclose(x.grad, values.sum(0).expand(3, 8))


ASKS = {
    "shape": lambda w: w.shape,
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "size": lambda w: w.size(0),
    "len": len,
    "hash": hash,
    "requires_grad": lambda w: w.requires_grad,
    "is_floating_point": lambda w: w.is_floating_point(),
    "new_zeros": lambda w: w.new_zeros(1, 3),
    "new_tensor": lambda w: w.new_tensor([1.0]),
    "zeros_like": lambda w: torch.zeros_like(w),
    "full_like": lambda w: torch.full_like(w, 2, dtype=torch.float64),
    "empty_like": lambda w: torch.empty_like(w).shape,
    "zeros_like on meta": lambda w: torch.zeros_like(w, device="meta").device,
    "x.to": lambda w: torch.ones(2, dtype=torch.float64).to(w),
    "type_as": lambda w: torch.ones(2, dtype=torch.float64).type_as(w),
    "expand_as": lambda w: torch.ones(8).expand_as(w),
    "data": lambda w: w.data.dtype,
    "detach": lambda w: w.detach().device,
}


@pytest.mark.parametrize("ask", ASKS.values(), ids=ASKS)
@pytest.mark.filterwarnings("error")
def test_what_asks_for_no_values_dequantizes_nothing(layer, values, ask, monkeypatch):
    weight = layer.weight
    monkeypatch.setattr(layer, "dequantize", None)
    found, expected = ask(weight), ask(values)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        assert (found.dtype, type(found)) == (expected.dtype, torch.Tensor)
    elif ask is not hash:
        assert found == expected


WRITES = {
    "setitem": lambda w: w.__setitem__(0, 1.0),
    "zero_": lambda w: w.zero_(),
    "row": lambda w: w[0].fill_(0),
    "data": lambda w: w.data.mul_(2),
    "detach": lambda w: w.detach().t().add_(1),
    "copy_": lambda w: w.copy_(torch.zeros(4, 8)),
    "iadd": lambda w: w.__iadd__(1),
    "init": lambda w: nn.init.xavier_uniform_(w),
    "inplace": lambda w: F.relu(w, inplace=True),
    "out": lambda w: torch.add(torch.ones(4, 8), 1, out=w),
    "set data": lambda w: setattr(w, "data", torch.zeros(4, 8)),
    "set grad": lambda w: setattr(w, "grad", torch.zeros(4, 8)),
    "share_memory_": lambda w: w.share_memory_(),
    "requires_grad": lambda w: w.requires_grad_(),
    "requires_grad =": lambda w: setattr(w, "requires_grad", True),
    "requires_grad = of detached": lambda w: setattr(w.detach(), "requires_grad", True),
    "unbound row": lambda w: w.unbind()[1].zero_(),
    "below torch functions": lambda w: torch.ops.aten.zero_.default(w),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_it_is_an_error_and_changes_nothing(layer, write):
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ReadOnlyError, match=r"weight of a quantized DynamicQuantizedLinear.*\.clone\(\)"):
        write(layer.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


COPIES = {
    "from_pretrained": lambda w: nn.Embedding.from_pretrained(w).weight,
    "from_pretrained, to train": lambda w: nn.Embedding.from_pretrained(w, freeze=False).weight,
    "bag": lambda w: nn.EmbeddingBag.from_pretrained(w).weight,
    "_weight": lambda w: nn.Embedding(4, 8, _weight=w).weight,
    "parameter": nn.Parameter,
    "frozen": lambda w: nn.Parameter(w, requires_grad=False),
    "data": lambda w: nn.Parameter(w.data),
    "detach": lambda w: nn.Parameter(w.detach()),
    "view": lambda w: nn.Parameter(w.view(4, 8)),
    "assigned": lambda w: assigned(w),
}


def assigned(weight):
    layer = nn.Linear(8, 4)
    layer.load_state_dict({"weight": weight, "bias": torch.zeros(4)}, assign=True)
    return layer.weight


@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_a_parameter_made_of_it_is_a_plain_float_copy(layer, values, made):
    found, frozen = made(layer.weight), made(values)
    assert type(found) is nn.Parameter
    assert found.requires_grad == frozen.requires_grad
    assert torch.equal(found, values)
    assert torch.equal(pickle.loads(pickle.dumps(found)), values)
    if found.requires_grad:
        (found * 3).sum().backward()
        assert (found.grad == 3).all()
    found.data.zero_()
    assert torch.equal(layer.weight.clone(), values)


def test_a_parameter_of_a_float16_weight_shares_no_memory_with_it():
    weights = QConfigMapping().set_global(float16_dynamic_qconfig)
    quantized = quantize_dynamic(nn.Sequential(nn.Linear(8, 4).half()).eval(), weights)[0]
    before = quantized.weight.clone()
    nn.Parameter(quantized.weight).data.zero_()
    assert torch.equal(quantized.weight.clone(), before)


def test_a_buffer_and_a_detached_leaf_made_of_it_are_copies(layer, values):
    module = nn.Module()
    module.table = nn.Buffer(layer.weight)
    assert type(module.table) is torch.Tensor
    assert torch.equal(module.state_dict()["table"], values)
    leaf = layer.weight.detach().requires_grad_()
    F.linear(torch.ones(3, 8), leaf).sum().backward()
    assert torch.equal(leaf.grad, torch.full((4, 8), 3.0))


def test_a_preserved_method_may_make_a_float_table_of_it():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(20, 8)

        def table(self):
            return nn.Embedding.from_pretrained(self.e.weight)

        def forward(self, words):
            return self.e(words)

    model, words = Model().eval(), torch.arange(20)
    quantized = quantize(model, words, preserved_attributes=("table",))
    assert torch.equal(quantized.table()(words), quantized(words))
    assert torch.equal(quantize_dynamic(model).table()(words), quantized(words))


TAKERS = {
    "data": lambda e, w: setattr(e.weight, "data", w),
    "data of a plain tensor": lambda e, w: setattr(torch.zeros(4, 8), "data", w),
    "data, a view": lambda e, w: setattr(e.weight, "data", w[:2]),
    "data, of meta": lambda e, w: setattr(torch.zeros(4, 8, device="meta"), "data", w),
    "vector": lambda e, w: nn.utils.vector_to_parameters(w.view(-1), [e.weight]),
    "swap": lambda e, w: torch.utils.swap_tensors(e.weight, w),
}


@pytest.mark.parametrize("take", TAKERS.values(), ids=TAKERS)
def test_memory_that_it_has_not_is_not_taken_over(layer, take):
    """Errors of torch's, which asks the weight nothing: what counts is that no parameter has null pointers then."""
    float_layer = nn.Linear(8, 4)
    before = float_layer.weight.clone()
    with pytest.raises(RuntimeError, match=r"incompatible tensor type|Cannot swap"):
        take(float_layer, layer.weight)
    assert torch.equal(float_layer.weight, before)


GIVEN = {
    "load_state_dict": lambda e, w: e.load_state_dict({"weight": w, "bias": torch.zeros(4)}),
    "copy_": lambda e, w: e.weight.data.copy_(w),
    "clone": lambda e, w: setattr(e, "weight", nn.Parameter(w.clone())),
    "data, a clone": lambda e, w: setattr(e.weight, "data", w.clone()),
    "set_": lambda e, w: torch.no_grad()(e.weight.set_)(w),
}


@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN)
def test_a_float_layer_is_given_its_values(layer, values, give):
    float_layer = nn.Linear(8, 4)
    give(float_layer, layer.weight)
    assert type(float_layer.weight) is nn.Parameter
    assert torch.equal(float_layer.weight, values)


def test_below_torch_functions_too(layer, values):
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(layer.weight * 2, values * 2)
        with pytest.raises(ReadOnlyError, match="mul_"):
            layer.weight.mul_(2)
        with pytest.raises(ReadOnlyError, match="_foreach_zero_"):
            torch._foreach_zero_([layer.weight])


@pytest.mark.parametrize(
    "assign",
    [lambda m: setattr(m, "weight", nn.Parameter(torch.zeros(4, 8))), lambda m: m.register_parameter("weight", None),
     lambda m: m.register_buffer("weight", torch.zeros(4, 8)), lambda m: delattr(m, "weight")],
)  # fmt: skip
def test_nothing_can_be_put_in_its_place(layer, assign):
    with pytest.raises(ReadOnlyError, match="is dequantized from weight_int8 and cannot be set or deleted"):
        assign(layer)
    assert layer.weight.shape == (4, 8)


def test_an_operator_takes_integers_and_no_float_weight(table):
    with pytest.raises(fxquant.DTypeError, match="takes a weight's integers, got the float weight"):
        torch.ops.fxquant.embedding(torch.tensor([1]), table.weight, table.weight_scale, None, 8)


def test_it_follows_the_modules_dtype_and_device(layer):
    assert copy.deepcopy(layer).double().weight.dtype == torch.float64
    assert copy.deepcopy(layer).to("meta").weight.is_meta
    assert copy.deepcopy(layer).half().weight.sum().dtype == torch.float16
    half = DynamicQuantizedLinear.from_float(nn.Linear(8, 4).half())
    assert half.weight.dtype == torch.float16


def test_tied_ones_are_one_object():
    quantized = quantize(WordLM(ninp=8, tie=True), *lm_inputs(WordLM()))
    assert quantized.encoder.weight is quantized.decoder.weight
    assert quantized.encoder.weight_int8 is quantized.decoder.weight_int8


class Codec(nn.Module):
    """Finds the nearest code of a table, in a method beside forward."""

    def __init__(self):
        super().__init__()
        self.enter, self.codes, self.leave = nn.Linear(32, 16), nn.Embedding(64, 16), nn.Linear(16, 32)

    def encode(self, x):
        return torch.cdist(self.enter(x), self.codes.weight).argmin(-1)

    @property
    def dtype(self):
        return self.codes.weight.dtype

    def forward(self, codes):
        return self.leave(self.codes(codes))


def test_a_method_beside_forward_computes_with_it_and_one_warning_names_it():
    codec, x = Codec().eval(), torch.randn(300, 32)
    quantized = quantize_dynamic(codec)
    assert quantized.dtype == torch.float32
    told = (
        r"a quantized QuantizedEmbedding \(64, 16\) at 'codes' is read by .*test_float_weight.py:\d+, in encode: `ret"
    )
    with pytest.warns(UserWarning, match=told) as caught:
        agree = (quantized.encode(x) == codec.encode(x)).float().mean()
    assert agree > 0.9
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantized.encode(x)
    (reader,) = fxquant.explain(quantized).readers
    assert reader.startswith("codes.weight is read by ")
    assert "set_module_name('codes', None)" in reader
    assert f"slow: {reader}" in fxquant.explain(quantized).remarks
    assert fxquant.explain(quantize_dynamic(codec)).readers == ()


class Tied(nn.Module):
    """A head, some levels down, that reads a table far from it."""

    def __init__(self):
        super().__init__()
        self.words = nn.ModuleDict({"embed": nn.Embedding(20, 16)})
        self.decoder = nn.Sequential(nn.Linear(16, 16), Logits(self.words["embed"]))

    def forward(self, x):
        return self.decoder(self.words["embed"](x))


class Logits(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.held = [table]

    def forward(self, x):
        return logits_of(self.held[0], x)


def logits_of(table, x):
    return x @ table.weight.t()


def test_the_paths_of_the_layer_and_of_its_reader_are_named():
    quantized = quantize_dynamic(Tied().eval())
    told = (
        r"the weight of a quantized QuantizedEmbedding \(20, 16\) at 'words.embed' is read by 'decoder.1', "
        r".*test_float_weight.py:\d+, in logits_of: .* \(QConfigMapping.set_module_name\('words.embed', None\)\)"
    )
    with pytest.warns(UserWarning, match=told):
        quantized(torch.tensor([[3]]))
    (reader,) = fxquant.explain(quantized).readers
    assert reader.startswith("words.embed.weight is read by 'decoder.1', ")


class Decoder(nn.Module):
    """A decoding loop whose output layer is the embedding's table; it does not trace."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell = nn.Embedding(20, 8), nn.GRUCell(8, 8)

    def forward(self, h):
        word = torch.zeros(h.shape[0], dtype=torch.long, device=self.cell.weight_ih.device)
        scores = []
        for _ in range(int(h.sum() * 0) + 3):
            h = self.cell(self.embedding(word), h)
            scores.append(F.linear(h, self.embedding.weight))
        return torch.stack(scores)


@pytest.mark.parametrize("make", [quantize_dynamic, lambda m: convert_fx(prepare(nn.Sequential(m), torch.randn(3, 8)))])
def test_code_that_does_not_trace_computes_with_it(make):
    model, h = Decoder().eval(), torch.randn(3, 8)
    quantized = make(model)
    assert fxquant.explain(quantized).coverage.share == 1
    assert (quantized(h) - model(h)).norm() <= 0.05 * model(h).norm()


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_tell_dtype_and_device_with_and_without_biases(bias):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rnn, self.out = nn.Embedding(9, 8), nn.LSTM(8, 8, bias=bias), nn.Linear(8, 8, bias=bias)

        def forward(self, words):
            states = [next(part.parameters()).new_zeros(1, words.shape[1], 8) for part in (self, self.rnn)]
            return self.out(self.rnn(self.table(words), tuple(states))[0])

    model, words = Model().eval(), torch.randint(9, (3, 2))
    quantized = quantize_dynamic(model)
    assert (quantized(words) - model(words)).norm() <= 0.05 * model(words).norm()
    for part in (quantized, *quantized.children()):
        assert next(part.parameters()).dtype == torch.float32
        assert next(copy.deepcopy(part).half().parameters()).dtype == torch.float16
    before = copy.deepcopy(quantized.state_dict())
    torch.optim.AdamW(quantized.parameters(), 0.1).step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in quantized.state_dict().items())
    assert not any("like" in name for name in before)
    quantized.load_state_dict(before)


@pytest.mark.parametrize("strict", [False, True])
def test_a_reader_is_exported(strict):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.codec = quantize_dynamic(Codec().eval())

        def forward(self, x):
            return x @ self.codec.codes.weight.t()

    reader, x = Reader(), torch.randn(2, 16)
    exported = torch.export.export(reader, (x,), strict=strict)
    assert torch.equal(exported.module()(x), reader(x))
    compiled = torch.compile(reader, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), reader(x))


RECURRENT = {
    "lstm": lambda: nn.LSTM(6, 5, 2, bidirectional=True, proj_size=3),
    "gru": lambda: nn.GRU(6, 5, 2, bidirectional=True),
    "rnn": lambda: nn.RNN(6, 5),
    "no bias": lambda: nn.LSTM(6, 5, bias=False),
    "lstm cell": lambda: nn.LSTMCell(6, 5),
    "gru cell": lambda: nn.GRUCell(6, 5),
    "rnn cell": lambda: nn.RNNCell(6, 5),
}


@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT)
def test_a_recurrent_module_shows_what_the_float_one_has(make):
    layer = make().eval()
    quantized = quantize_dynamic(layer)
    for name, own in layer.named_parameters():
        shown = getattr(quantized, name)
        assert (shown.shape, shown.dtype) == (own.shape, own.dtype)
        if name.startswith("bias_ih"):
            other = name.replace("ih", "hh")
            total, expected = shown + getattr(quantized, other), own + getattr(layer, other)
            is_gru = isinstance(layer, (nn.GRU, nn.GRUCell))
            n = 10 if is_gru else len(own)  # the n gate's biases are kept apart
            assert torch.equal(total[:n], expected[:n])
            assert torch.equal(shown[n:], own[n:])
            assert torch.equal(getattr(quantized, other)[n:], getattr(layer, other)[n:])
            assert not getattr(quantized, other)[:n].any()
    if isinstance(layer, nn.RNNBase):
        assert quantized._flat_weights_names == layer._flat_weights_names
        assert quantized._all_weights == layer._all_weights
        shapes = [[part.shape for part in parts] for parts in layer.all_weights]
        assert [[part.shape for part in parts] for parts in quantized.all_weights] == shapes
        assert [part.shape for part in quantized._flat_weights] == [part.shape for part in layer._flat_weights]
    assert copy.deepcopy(quantized).half().state_dict().keys() == quantized.state_dict().keys()


@pytest.mark.parametrize("make", [RECURRENT["gru"], lambda: nn.LSTM(6, 5, 2, bidirectional=True)])
def test_a_float_module_loaded_with_what_is_shown_computes_the_same(make):
    """The shown values are a float module's that computes what the quantized one does, but for activations."""
    layer, x = make().eval(), torch.randn(4, 3, 6)
    quantized, twin = quantize_dynamic(layer), make().eval()
    twin.load_state_dict({name: getattr(quantized, name) for name in layer.state_dict()})
    expected = layer(x)[0]
    assert (twin(x)[0] - expected).norm() <= 0.03 * expected.norm()


def test_biases_of_recurrent_modules_are_read_only():
    quantized = quantize_dynamic(nn.GRU(6, 5))
    for write in (
        lambda: quantized.bias_hh_l0.data.fill_(1),
        lambda: quantized.bias_ih_l0.__setitem__(0, 1.0),
        lambda: setattr(quantized, "bias_ih_l0", nn.Parameter(torch.zeros(15))),
    ):
        with pytest.raises(ReadOnlyError, match=r"bias_.h_l0 of a quantized GRU"):
            write()
    assert quantize_dynamic(nn.GRUCell(6, 5, bias=False)).bias_ih is None
    for name in ("bias_ih_l1", "bias_ih", "bias_nothing"):
        with pytest.raises(AttributeError, match=name):
            getattr(quantized, name)
    with pytest.raises(AttributeError, match="all_weights"):
        quantize_dynamic(nn.GRUCell(6, 5)).all_weights  # noqa: B018


@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 4}])
def test_the_weights_that_an_attention_does_not_have_are_none(sizes):
    layer = nn.MultiheadAttention(8, 2, **sizes).eval()
    quantized = quantize_dynamic(layer)
    for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "bias_k", "in_proj_bias"):
        own, shown = getattr(layer, name), getattr(quantized, name)
        assert (shown is None) == (own is None)
        assert own is None or shown.shape == own.shape
    assert quantized.dropout == layer.dropout


@pytest.mark.parametrize("layer_name", ["linear", "embedding", "bag", "conv1d", "lstm"])
def test_it_is_neither_pruned_nor_drawn_anew(layer_name):
    make, _, (name, *_) = LAYERS[layer_name]
    quantized = quantize_dynamic(make().eval())
    with pytest.raises(ReadOnlyError, match=rf"{name}_orig cannot be the {name} of a quantized .* cannot be pruned"):
        prune.l1_unstructured(quantized, name, amount=0.5)
    with pytest.raises(fxquant.ModelStateError, match=r"weights of a quantized \w+ cannot be reset"):
        quantized.reset_parameters()


OPTIMIZERS = {
    "SGD": lambda w: torch.optim.SGD([w], 0.1),
    "a group": lambda w: torch.optim.AdamW([{"params": w, "lr": 0.1}]),
    "added": lambda w: torch.optim.Adam([nn.Parameter(torch.zeros(2))]).add_param_group({"params": [w]}),
    "detached": lambda w: torch.optim.SGD([w.detach()], 0.1),
    "a view": lambda w: torch.optim.SGD([w.t()], 0.1),
}


@pytest.mark.parametrize("optimize", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_optimizer_does_not_take_it(layer, optimize):
    told = r"an optimizer was given .*the weight of a quantized DynamicQuantizedLinear.*does not train\. Train adapters"
    with pytest.raises(ReadOnlyError, match=told):
        optimize(layer.weight)
    assert layer.weight.is_leaf
    torch.optim.SGD([nn.Parameter(layer.weight)], 0.1)


def unharmed(layer, change, error, match):
    """Assert that a change of a layer is an error, after which the layer is as it was."""
    x, before = torch.randn(3, 8), copy.deepcopy(layer.state_dict())
    expected = layer(x)
    with pytest.raises(error, match=match):
        change(layer)
    state = layer.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.items())
    assert torch.equal(layer(x), expected)
    assert type(layer) is DynamicQuantizedLinear
    assert not layer._forward_pre_hooks
    assert isinstance(layer.weight, FloatWeight)


REPARAMETRIZED = {
    "weight_norm": (parametrizations.weight_norm, ValueError, "does not have a parameter"),
    "spectral_norm": (parametrizations.spectral_norm, ValueError, "does not have a parameter"),
    "orthogonal": (parametrizations.orthogonal, ValueError, "does not have a parameter"),
    "old spectral_norm": (spectral_norm, KeyError, "weight"),
    "functional_call": (
        lambda m: torch.func.functional_call(m, {"weight": torch.zeros(4, 8)}, torch.ones(1, 8)),
        ReadOnlyError,
        "cannot be set",
    ),
    "fused": (
        lambda m: nn.utils.fuse_linear_bn_eval(m, nn.BatchNorm1d(4).eval()),
        ReadOnlyError,
        "cannot be set",
    ),
    "own weight": (lambda m: setattr(m, "weight", m.weight), ReadOnlyError, "cannot be set"),
    **{
        f"init {name}": (lambda m, name=name: getattr(nn.init, name)(m.weight), ReadOnlyError, "writes to")
        for name in ("xavier_uniform_", "kaiming_normal_", "trunc_normal_", "zeros_", "eye_", "orthogonal_")
    },
    "global pruning": (
        lambda m: prune.global_unstructured([(m, "weight")], prune.L1Unstructured, amount=0.5),
        ReadOnlyError,
        "cannot be pruned",
    ),
}


@pytest.mark.parametrize("case", REPARAMETRIZED.values(), ids=REPARAMETRIZED)
def test_a_layer_whose_weight_is_to_be_replaced_stays_unharmed(layer, case):
    """Errors of ours where torch asks anything of ours. torch's parametrizations look into `_parameters` and
    `_buffers` before: a ValueError that names the layer and "weight". Its old weight_norm and spectral_norm delete from
    the first without looking: a KeyError.
    """
    unharmed(layer, *case)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_layer_whose_weight_is_to_be_normed_the_old_way_stays_unharmed(layer):
    unharmed(layer, nn.utils.weight_norm, KeyError, "weight")


@pytest.mark.parametrize("part", ["weight_uint8", "weight_scale", "weight_zero_point"])
@pytest.mark.parametrize(
    "take", [delattr, lambda m, name: parametrize.register_parametrization(m, name, nn.Identity())]
)
def test_its_integers_are_neither_deleted_nor_parametrized(part, take):
    quantized = QuantizedEmbedding.from_float(nn.Embedding(10, 8), float_qparams_weight_only_qconfig)
    expected = quantized(torch.arange(10))
    told = rf"{part} is a part of the weight of a quantized QuantizedEmbedding and cannot be deleted or reparametrized"
    with pytest.raises(ReadOnlyError, match=told):
        take(quantized, part)
    assert type(quantized) is QuantizedEmbedding
    assert torch.equal(quantized(torch.arange(10)), expected)


ASSIGNED = {
    "attribute": lambda e, w: setattr(e, "weight", w),
    "detached": lambda e, w: setattr(e, "weight", w.detach()),
    "register_parameter": lambda e, w: e.register_parameter("weight", w),
}


@pytest.mark.parametrize("assign", ASSIGNED.values(), ids=ASSIGNED)
def test_a_float_layer_takes_a_parameter_made_of_it_and_not_itself(layer, values, assign):
    """An error of torch's, which asks whether it is a Parameter, names nn.Parameter, and leaves the layer as it was."""
    float_layer = nn.Linear(8, 4)
    before = float_layer.weight
    with pytest.raises(TypeError, match=r"cannot assign .* parameter 'weight' \(torch\.nn\.Parameter or None"):
        assign(float_layer, layer.weight)
    assert float_layer.weight is before
    float_layer.weight = nn.Parameter(layer.weight)
    assert torch.equal(float_layer.weight, values)
    assert float_layer.weight.requires_grad


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


BIASES = {
    "bias": lambda: nn.Linear(8, 4),
    "bias_l0": lambda: nn.LSTM(8, 4),
    "gate_bias": lambda: nn.GRUCell(8, 4),
    "in_proj_bias": lambda: nn.MultiheadAttention(8, 2),
}


@pytest.mark.parametrize(("name", "make"), BIASES.items(), ids=BIASES)
def test_a_bias_may_be_pruned_and_parametrized(name, make):
    quantized, x = quantize_dynamic(make().eval()), torch.randn(3, 8)
    getattr(quantized, name).data.normal_()
    inputs = (x, x, x) if name == "in_proj_bias" else (x,)

    def leaf(given):
        return given if isinstance(given, torch.Tensor) else given[0]

    def expected(change):
        twin = copy.deepcopy(quantized)
        twin._parameters[name].data.copy_(change(twin._parameters[name].data))
        return leaf(twin(*inputs))

    doubled = expected(lambda bias: 2 * bias)
    pruned = expected(lambda bias: bias * (torch.arange(len(bias)) % 2))
    other = copy.deepcopy(quantized)
    prune.custom_from_mask(other, name, torch.arange(len(getattr(other, name))) % 2)
    assert torch.equal(leaf(other(*inputs)), pruned)
    prune.remove(other, name)
    assert torch.equal(leaf(other(*inputs)), pruned)
    parametrize.register_parametrization(quantized, name, Doubled())
    assert torch.equal(leaf(quantized(*inputs)), doubled)
    parametrize.remove_parametrizations(quantized, name)
    assert torch.equal(leaf(quantized(*inputs)), doubled)


OPTIONS = {
    **RECURRENT,
    "relu": lambda: nn.RNN(6, 5, nonlinearity="relu"),
    "relu cell": lambda: nn.RNNCell(6, 5, nonlinearity="relu"),
    **{name: make for name, (make, *_) in LAYERS.items()},
}


@pytest.mark.parametrize("make", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_float_module_read_the_same(make):
    layer = make().eval()
    quantized = quantize_dynamic(layer)
    for name, own in vars(layer).items():
        if name == "padding" and hasattr(layer, "kernel_size"):
            continue  # a quantized convolution's is in the form of F.pad
        if not name.startswith("_") and isinstance(own, (bool, int, float, str, tuple, type(None))):
            assert getattr(quantized, name) == own, name
