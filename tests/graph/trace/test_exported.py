"""Modules of torch.export's programs: strict and not, decomposed, from a file; what was exported in training mode."""

import copy
import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import (
    ModelStateError,
    ShapeError,
    convert_fx,
    default_dynamic_qconfig_mapping,
    fuse_fx,
    prepare_fx,
    quantize_dynamic,
)
from fxquant.graph.trace.exported import adopt
from fxquant.graph.trace.signature import check_sizes

# torch's own, of how an LSTM holds its weights, and of its tree specs
pytestmark = pytest.mark.filterwarnings("ignore:The tensor attributes self", "ignore:.*LeafSpec.*:FutureWarning")


class Layers(nn.Module):
    """A chain of layers of most kinds."""

    def __init__(self):
        super().__init__()
        self.words, self.attention = nn.Embedding(20, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.lstm, self.gru = nn.LSTM(16, 8, batch_first=True, bidirectional=True), nn.GRU(16, 8)
        self.norm, self.drop = nn.LayerNorm(16), nn.Dropout(0.1)
        self.projected = nn.LSTM(8, 8, bias=False, proj_size=4)
        self.rnn, self.hidden, self.last = nn.RNN(4, 8, nonlinearity="relu"), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, words):
        x = self.norm(self.words(words))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x, (h, c) = self.lstm(x)
        x, g = self.gru(x)
        x, (hr, _) = self.projected(x)
        x, r = self.rnn(x)
        return self.last(self.drop(F.relu(self.hidden(x)))), h, c, g, hr, r


class Calls(nn.Module):
    """Cells, bags, tied and bare weights, and products in several spellings."""

    def __init__(self):
        super().__init__()
        self.bags, self.cell = nn.EmbeddingBag(20, 16, mode="sum"), nn.LSTMCell(16, 16)
        self.gru, self.rnn, self.plain = nn.GRUCell(16, 16), nn.RNNCell(16, 16), nn.RNNCell(16, 16, nonlinearity="relu")
        self.words, self.tied = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.tied.weight = self.words.weight
        self.weight, self.bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
        self.register_buffer("fixed", torch.randn(16, 16))

    def forward(self, words):
        x = self.bags(words)
        h, c = self.cell(x)
        h = self.plain(self.rnn(self.gru(h, c)))
        y = torch.einsum("bti,oi->bto", self.words(words), self.weight) @ self.fixed
        y = F.linear(y, self.weight, self.bias)
        return self.tied(y), torch.addmm(self.bias, h, self.weight).mm(self.weight.t())


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv1d(16, 64, 65, padding=32), nn.Conv2d(8, 64, 13, padding="same")
        self.norm, self.last = nn.BatchNorm1d(64), nn.Linear(64, 8)

    def forward(self, x):
        y = self.norm(self.one(x)).relu().mean(2)
        return self.last(y + self.two(x.reshape(x.shape[0], 8, 3, -1)).mean((2, 3)))


WORDS = torch.randint(20, (2, 2), generator=torch.Generator().manual_seed(1))
CASES = {"layers": (Layers, WORDS), "calls": (Calls, WORDS), "convolutions": (Convolution, torch.randn(2, 16, 12))}


def export(model, *inputs, strict=False, **options):
    return torch.export.export(model.eval(), inputs, strict=strict, **options)


@functools.cache  # an export takes seconds on a busy machine
def exported_program(case):
    torch.manual_seed(0)
    kind, x = CASES[case]
    return export(kind(), x)


@functools.cache
def exported(case, how=""):
    """Return a case's model and the module of its program: "strict", "decomposed" or as it is."""
    torch.manual_seed(0)
    kind, x = CASES[case]
    model = kind().eval()
    if how == "decomposed":
        return model, exported_program(case).run_decompositions().module()
    return model, (export(model, x, strict=True) if how == "strict" else exported_program(case)).module()


def by_fx(model, *inputs):
    return convert_fx(prepare_fx(model, default_dynamic_qconfig_mapping(), inputs))


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


@pytest.mark.parametrize(("case", "how"), [("layers", ""), ("calls", ""), ("calls", "strict"), ("convolutions", "")])
def test_it_is_quantized_as_the_model_that_was_exported(case, how):
    (model, program), x = exported(case, how), CASES[case][1]
    quantized, expected = by_fx(program, x), by_fx(model, x)
    record, other = quantized._fxquant_record, expected._fxquant_record
    assert record.coverage == other.coverage
    assert {part.kind for part in record.skipped} == {part.kind for part in other.skipped}
    for got, wanted in zip(leaves(quantized(x)), leaves(expected(x)), strict=True):
        # MultiheadAttention's products between quantized ones are written otherwise, to float rounding.
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_the_float_graph_gives_the_program_s_bits(case):
    for how in ("", "decomposed"):
        (_, program), x = exported(case, how), CASES[case][1]
        for got, wanted in zip(leaves(adopt(program)(x)), leaves(program(x)), strict=True):
            assert torch.equal(got, wanted)


def test_copies_pickles_and_files(tmp_path):
    _, program = exported("layers")
    quantized = by_fx(program, WORDS)
    fxquant.save(quantized, tmp_path / "model.safetensors")
    twins = (
        fxquant.load(program, tmp_path / "model.safetensors"),
        copy.deepcopy(quantized),
        pickle.loads(pickle.dumps(quantized)),
    )
    for twin in twins:
        assert torch.equal(twin(WORDS)[0], quantized(WORDS)[0])


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # torch 2.11's own loading
def test_a_program_from_a_file(tmp_path):
    torch.export.save(export(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.ones(2, 8)), tmp_path / "program.pt2")
    program = torch.export.load(tmp_path / "program.pt2").module()
    with pytest.raises(NotImplementedError):
        program.eval()
    assert by_fx(program, torch.ones(2, 8)).record.coverage.share == 1
    eager = quantize_dynamic(program)
    assert eager._fxquant_record.coverage.share == 1
    assert torch.equal(eager(torch.ones(2, 8)), by_fx(program, torch.ones(2, 8))(torch.ones(2, 8)))
    assert [fusion.chain for fusion in fuse_fx(program, torch.ones(2, 8)).record.fusions] == [("0", "relu")]


def test_other_sizes_are_refused_unless_they_vary():
    batch = torch.export.Dim("batch", max=9)
    model, x = nn.Linear(8, 3), torch.randn(4, 8)
    with pytest.raises(
        ShapeError, match=r"'input': this model was exported, or traced, for \(4, 8\), got \(5, 8\); export"
    ):
        by_fx(export(nn.Sequential(model), x).module(), x)(torch.randn(5, 8))
    quantized = by_fx(export(nn.Sequential(model), x, dynamic_shapes=(({0: batch}),)).module(), x)
    assert quantized(torch.randn(9, 8)).shape == (9, 3)
    with pytest.raises(ShapeError, match=r"or traced, for \(\d to 9, 8\), got \(10, 8\)"):
        quantized(torch.randn(10, 8))
    with pytest.raises(ShapeError, match=r"for \(2, 0 to any\), got \(2,\)"):
        check_sizes(torch.ones(2), "x", ((2, 2), (0, None)))


def test_nested_inputs_keywords_and_a_counter():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, given, pair, *, scale=None):
            self.calls.add_(1)
            return {"y": self.linear(given["x"]) * scale, "n": (pair[0] + pair[1] + self.calls,)}

    args, kwargs = ({"x": torch.randn(3, 8)}, (torch.zeros(1), torch.ones(1))), {"scale": torch.ones(8)}
    program = torch.export.export(Counting().eval(), args, kwargs).module()
    quantized = convert_fx(prepare_fx(program, default_dynamic_qconfig_mapping(), args, example_kwargs=kwargs))
    assert [quantized(*args, **kwargs)["n"][0].item() for _ in range(2)] == [2, 3]
    assert program.calls == 0


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)], ids=["dropout", "norm"])
def test_what_was_exported_in_training_mode_is_refused(layer):
    traced = torch.export.export(nn.Sequential(nn.Linear(8, 8), copy.deepcopy(layer)).train(), (torch.ones(4, 8),))
    told = r"exported in training mode: \w+ is aten\.\S+ for training; export"
    for program in (traced, traced.run_decompositions()):
        with pytest.raises(ModelStateError, match=told):
            prepare_fx(program.module(), default_dynamic_qconfig_mapping(), torch.ones(4, 8))


def test_the_program_itself_is_refused_by_name():
    program = export(nn.Linear(8, 3), torch.ones(2, 8))
    with pytest.raises(ModelStateError, match=r"got ExportedProgram; pass its module: program\.module\(\)"):
        prepare_fx(program, default_dynamic_qconfig_mapping(), torch.ones(2, 8))


def test_hooks_of_the_user_stay_and_torch_s_go():
    program, seen = export(nn.Sequential(nn.Linear(8, 3)), torch.ones(2, 8)).module(), []
    program.register_forward_hook(lambda *_: seen.append(1))
    by_fx(program, torch.ones(2, 8))(torch.ones(2, 8))
    assert seen == [1]


@pytest.mark.filterwarnings("error")
def test_nothing_of_torchs_own_is_warned_of():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval(), torch.randn(2, 3, 8, 8)
    program = torch.export.export(model, (x,)).module()
    prepared = prepare_fx(program, fxquant.default_static_qconfig_mapping(), x)
    assert torch.equal(convert_fx(prepared, data=[x])(x), convert_fx(prepared, data=[x])(x))
