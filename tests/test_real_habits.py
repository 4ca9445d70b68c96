"""What real code does around a model: threads, reloads, pickles, optional and keyword arguments, containers."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fxquant
from fxquant import (
    ArgumentError,
    CheckpointError,
    QConfigError,
    convert_fx,
    explain,
    graph_diff,
    prepare_fx,
    quantize_dynamic,
)
from fxquant.graph.record import record_of
from tests.samples import everything, kinds, prepare, quantize, same_bits


class Optional(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)

    def forward(self, x, mask=None, scale=2.0):
        h = self.net(x) * scale
        return h if mask is None else h * mask


class Positions(nn.Module):
    """A table of positions, sliced by the input's size: used twice."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)
        self.register_buffer("positions", torch.randn(1, 50, 8))

    def forward(self, x):
        return self.net(x + self.positions[:, : x.size(1)]) + self.positions[:, : x.size(1)]


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.ModuleDict({"a": nn.Linear(8, 8)})])

    def forward(self, x):
        return self.blocks[1]["a"](self.blocks[0](x))


class Annotated(nn.Module):
    """Annotations as strings, which `from __future__ import annotations` makes of all."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(8, 8)

    def forward(self, x: "torch.Tensor", scale: "float" = 2.0) -> "torch.Tensor":
        return self.net(x) * scale


SPECIMENS = {
    "annotated": (Annotated, lambda: (torch.randn(2, 8),)),
    "optional": (Optional, lambda: (torch.randn(2, 8),)),
    "positions": (Positions, lambda: (torch.randn(2, 5, 8),)),
    "packed": (Packed, lambda: (torch.randn(3, 5, 8), torch.tensor([5, 2, 4]))),
}
baked = pytest.mark.filterwarnings("ignore:.*was traced for")


@baked
@pytest.mark.parametrize("name", SPECIMENS)
def test_a_pickle_comes_back_and_leaves_tracing_as_it_was(name):
    kind, make = SPECIMENS[name]
    model, inputs = kind().eval(), make()
    prepared = prepare(model, *inputs)
    quantized = convert_fx(prepared)
    for module in (prepared, quantized):
        twin = pickle.loads(pickle.dumps(module))
        assert same_bits(twin(*inputs), module(*inputs))
        assert same_bits(pickle.loads(pickle.dumps(twin))(*inputs), module(*inputs))
    quantize(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 3))
    torch.fx.symbolic_trace(nn.Linear(2, 2))


@baked
def test_keywords_keep_their_names():
    model, x = Optional().eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    assert same_bits(quantized(x, mask=None, scale=2.0), quantized(x))
    with pytest.raises(
        ArgumentError, match=r"'mask': this model was prepared for mask=None.* got a tensor of shape \(8,"
    ):
        quantized(x, mask=torch.ones(8))


@baked
def test_a_diff_is_traced_as_the_result_was():
    model, x = Optional().eval(), torch.randn(2, 8)
    rows = graph_diff(model, quantize(model, x)).rows
    assert {row.name: row.sign for row in rows if row.sign != " "} == {"net": "~"}


def test_modules_in_containers_are_quantized():
    model, x = Containers().eval(), torch.randn(2, 8)
    quantized = quantize_dynamic(model)
    assert [site.path for site in record_of(quantized).sites] == ["blocks.0", "blocks.1.a"]
    assert kinds(quantized)["blocks.1.a"] == "DynamicQuantizedLinear"
    assert same_bits(quantized(x), quantize(model, x)(x))


def test_inference_goes_on_while_another_thread_prepares_and_loads(tmp_path):
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    fxquant.save(quantized, tmp_path / "m.safetensors")
    expected, stop, wrong, served = quantized(x), threading.Event(), [], []

    def serve():
        while not stop.is_set():
            try:
                if not torch.equal(quantized(x), expected):
                    wrong.append("other bits")
            except Exception as error:
                wrong.append(repr(error))
            served.append(1)

    server = threading.Thread(target=serve)
    server.start()
    try:
        for _ in range(8):
            assert same_bits(fxquant.load(model, tmp_path / "m.safetensors")(x), expected)
            assert same_bits(quantize(model, x)(x), expected)
    finally:
        stop.set()
        server.join()
    assert served
    assert not wrong, wrong[:3]


def test_several_threads_prepare_at_once():
    model, x, results = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]).eval(), torch.randn(2, 8), []

    def work():
        results.append(convert_fx(prepare_fx(copy.deepcopy(model), everything(), x))(x))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(result, results[0]) for result in results)


def test_prepare_inside_inference_mode():
    x = torch.randn(2, 5, 8)
    with torch.inference_mode():
        quantized = quantize(Positions().eval(), torch.randn(2, 5, 8))
    assert quantized(x).shape == x.shape


@baked
@pytest.mark.parametrize("other", [nn.Sequential(nn.Conv1d(1, 1, 1)), nn.Linear(8, 8), Positions()])
@pytest.mark.parametrize("quantizer", [lambda m: quantize(m, torch.randn(2, 8)), quantize_dynamic])
def test_a_checkpoint_of_another_model_is_one_clear_error(tmp_path, other, quantizer):
    fxquant.save(quantizer(Containers().eval()), tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=r"another model|has no tensor|no place"):
        fxquant.load(other.eval(), tmp_path / "m.safetensors")


@pytest.mark.parametrize("spec", [nn.Linear, "net"])
def test_one_type_or_name_must_stand_in_a_set(spec):
    with pytest.raises(QConfigError, match=r"is a set or dict of types and names, \{"):
        quantize_dynamic(Optional().eval(), spec)


def test_preserved_attributes_is_no_string():
    with pytest.raises(fxquant.FxQuantError, match=r"takes a tuple of names: \('net',\)"):
        prepare(Containers().eval(), torch.randn(2, 8), preserved_attributes="net")


@pytest.mark.filterwarnings("ignore:the weight of a quantized QuantizedEmbedding")
def test_what_a_hooked_module_reads_itself_is_the_float_weight():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(50, 16)

        def forward(self, i):
            return self.table(i) * 2 + self.table.weight[0]

    model, i = nn.Sequential(Reads(), nn.Linear(16, 16)).eval(), torch.arange(6)
    model[0].register_forward_hook(lambda *_: None)
    for quantized in (quantize(model, i), quantize_dynamic(model)):
        assert (quantized(i) - model(i)).norm() <= 0.03 * model(i).norm()
        assert len(explain(quantized).readers) == 1
        assert not record_of(quantized).skipped
