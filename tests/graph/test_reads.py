"""Weights that untraced code reads itself: their modules stay float, or it would be handed integers."""

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import quantize_dynamic
from fxquant.graph.module import record_of
from fxquant.graph.reads import weights_read
from tests.samples import kinds, quantize


class Decoder(nn.Module):
    """A decoding loop whose output layer is the embedding's table."""

    def __init__(self):
        super().__init__()
        self.embedding, self.cell, self.bridge = nn.Embedding(20, 8), nn.GRUCell(8, 8), nn.Linear(8, 8)
        self.init_weights()

    def init_weights(self):
        self.cell.weight_ih.data.uniform_(-0.1, 0.1)

    def scores(self, h):
        return F.linear(h, self.embedding.weight)

    def forward(self, h):
        word = torch.zeros(h.shape[0], dtype=torch.long, device=self.bridge.weight.device)
        for _ in range(int(h.sum() * 0) + 3):
            h = self.cell(self.embedding(word), self.bridge(h))
            word = self.scores(h).argmax(-1)
        return h


def test_what_forward_and_its_methods_read():
    assert weights_read(Decoder()) == {"embedding"}
    assert weights_read(nn.LSTM(2, 2)) == frozenset()


class Adapter(nn.Module):
    """A LoRA layer as PEFT has it: the input is cast to what the adapter's weight is, which a variable names."""

    def __init__(self):
        super().__init__()
        self.base, self.names = nn.Linear(8, 8), ["default"]
        self.down = nn.ModuleDict({"default": nn.Linear(8, 2)})
        self.up = nn.ModuleDict({"default": nn.Linear(2, 8)})

    def forward(self, x):
        y = self.base(x)
        for name in self.names:
            down, up = self.down[name], self.up[name]
            y = y + up(down(x.to(down.weight.dtype)))
        return y


class Stack(nn.Module):
    """Reads the weights of its layers in a loop, and of another the shape alone."""

    def __init__(self):
        super().__init__()
        self.layers, self.third = (nn.ModuleList([nn.Linear(8, 8)]) for _ in range(2))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = F.linear(x, layer.weight) * (number + 1)
        third = self.third[0]
        return x + third(x) * third.weight.shape[0]


def test_what_a_variable_stands_for_is_followed():
    assert {"down", "base"} & weights_read(Adapter()) == {"down"}
    assert weights_read(Stack()) == {"layers"}


def test_an_adapter_runs_and_its_base_is_quantized():
    model, x = Adapter().eval(), torch.randn(3, 8)
    quantized = quantize_dynamic(model)
    assert [site.path for site in record_of(quantized).sites] == ["base"]
    assert (quantized(x) - model(x)).norm() <= 0.05 * model(x).norm()


def test_a_swapped_model_runs_and_says_why_a_table_stayed_float():
    model, h = Decoder().eval(), torch.randn(3, 8)
    quantized = quantize_dynamic(model)
    (left,) = record_of(quantized).left
    assert left.path == "embedding"
    assert left.reason.endswith("Decoder reads self.embedding's weight itself")
    assert kinds(quantized)["cell"] == "DynamicQuantizedGRUCell"
    assert (quantized(h) - model(h)).norm() <= 0.05 * model(h).norm()


def test_so_does_a_submodule_that_does_not_trace():
    model, h = nn.Sequential(nn.Linear(8, 8), Decoder()).eval(), torch.randn(3, 8)
    quantized = quantize(model, h)
    assert [site.path for site in quantized.record.sites] == ["0", "1.cell", "1.bridge"]
    assert [left.path for left in quantized.record.left] == ["1.embedding"]
    quantized(h)
