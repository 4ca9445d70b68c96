"""Quantized models on other devices: everything of them moves there and back, and gives the same bits on a GPU."""

import copy
import types

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from fxquant import QConfigMapping, convert_fx, get_default_qconfig_mapping, prepare_fx, quantize_dynamic
from fxquant.qconfig import BEST
from tests.ops.kernels_on_gpu import needs_cuda
from tests.samples import leaves, same_bits

WORDS, X = torch.randint(20, (5, 3)), torch.randn(5, 3, 32)
PACKED = pack_padded_sequence(X, torch.tensor([2, 5, 4]), enforce_sorted=False)
LAYERS = {
    "Linear": (nn.Linear(32, 8), X),
    "Embedding": (nn.Embedding(20, 32), WORDS),
    "EmbeddingBag": (nn.EmbeddingBag(20, 32), WORDS),
    "LSTM": (nn.LSTM(32, 16, 2, bidirectional=True, proj_size=8), X),
    "GRU": (nn.GRU(32, 40, batch_first=True), X),
    "RNN": (nn.RNN(32, 16, nonlinearity="relu", bias=False), X),
    "packed LSTM": (nn.LSTM(32, 16, bidirectional=True), PACKED),
    "LSTMCell": (nn.LSTMCell(32, 16), X[0]),
    "GRUCell": (nn.GRUCell(32, 16), X[0]),
    "RNNCell": (nn.RNNCell(32, 16), X[0]),
    "TransformerEncoderLayer": (nn.TransformerEncoderLayer(32, 4, 64), X),
}
SUMS_FLOATS = {"TransformerEncoderLayer": "attention and layer norms are torch's"}


class Net(nn.Module):
    """A network whose static form has convolutions, values that are added, tables of curves, pools and a Linear."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.curve = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.PReLU()
        self.pool, self.out = nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)

    def forward(self, x):
        y = self.curve(self.norm(self.conv(x)))
        y = nn.functional.max_pool2d(torch.sigmoid(y + self.conv(x)), 2)
        return self.out(self.pool(y).flatten(1))


def quantized(name, qconfig=None):
    """Return a quantized layer."""
    mapping = None if qconfig is None else QConfigMapping().set_global(qconfig)
    return quantize_dynamic(nn.Sequential(copy.deepcopy(LAYERS[name][0])).eval(), mapping)


def static():
    """Return a static model and its input."""
    x = torch.randn(2, 3, 8, 8)
    prepared = prepare_fx(Net().eval(), get_default_qconfig_mapping(), (x,))
    prepared(x)
    return convert_fx(prepared), x


def reachable(thing, seen, path=""):
    """Yield each tensor that is reached from a thing's attributes, items and closures, and its path."""
    if id(thing) in seen or isinstance(thing, (str, int, float, type, types.ModuleType, types.CodeType)):
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        yield path, thing
    elif isinstance(thing, dict):
        for key, value in list(thing.items()):
            yield from reachable(value, seen, f"{path}.{key}")
    elif isinstance(thing, (list, tuple, set, frozenset)):
        for i, value in enumerate(thing):
            yield from reachable(value, seen, f"{path}[{i}]")
    elif isinstance(thing, types.FunctionType):
        yield from reachable([cell.cell_contents for cell in thing.__closure__ or ()], seen, path)
    else:
        yield from reachable(getattr(thing, "__dict__", None), seen, path)


@pytest.mark.parametrize("name", [*LAYERS, "static"])
def test_no_tensor_of_a_moved_model_stays_behind(name):
    model = static()[0] if name == "static" else quantized(name)
    model.to("meta")
    found = dict(reachable(model, set()))
    assert len(found) >= 3
    assert not [path for path, tensor in found.items() if not tensor.is_meta]


@pytest.mark.parametrize("name", [*(name for name in LAYERS if name != "packed LSTM"), "static"])
def test_a_moved_model_runs_where_it_is(name):
    model, x = static() if name == "static" else (quantized(name), LAYERS[name][1])
    outputs = leaves(model.to("meta")(x.to("meta")))
    assert all(out.is_meta for out in outputs)


def assert_alike(name, got, expected):
    for one, other in zip(leaves(got), leaves(expected), strict=True):
        if name in SUMS_FLOATS:
            assert torch.allclose(one.cpu(), other, 1e-3, 1e-3)
        else:
            assert same_bits(one.cpu(), other)


@needs_cuda
@pytest.mark.parametrize("qconfig", BEST.values(), ids=map(str, BEST.values()))
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_gives_the_cpus_bits_on_a_gpu_and_back(name, qconfig):
    layer, x = quantized(name, qconfig), LAYERS[name][1]
    is_float = qconfig.weight.format.limits is None
    with torch.no_grad():
        expected = layer(x)
        there = layer.to("cuda")(x.to("cuda"))
        assert_alike("TransformerEncoderLayer" if is_float else name, there, expected)
        assert all(same_bits(a, b) for a, b in zip(leaves(layer.to("cpu")(x)), leaves(expected), strict=True))


@needs_cuda
def test_a_static_model_gives_the_cpus_bits_on_a_gpu():
    model, x = static()
    expected = model(x)
    assert same_bits(model.to("cuda")(x.to("cuda")).cpu(), expected)


@needs_cuda
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "packed LSTM"])
def test_a_layer_is_captured_in_a_cuda_graph(name):
    layer, x = quantized(name).to("cuda"), LAYERS[name][1].to("cuda")
    with torch.no_grad():
        expected = [out.clone() for out in leaves(layer(x))]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = leaves(layer(x))
        for _ in range(2):
            graph.replay()
            assert all(map(torch.equal, captured, expected))
