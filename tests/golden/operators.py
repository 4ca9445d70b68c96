"""Single operators of random sizes, tails and all, each made from its number alone, through quantized modules."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import fxquant.ops
from fxquant import QConfig, QConfigMapping
from tests.golden.schemes import LINEAR, SELDOM, TABLES, by_graph, by_module, quiet

WIDTHS = (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 70, 100, 129)
DEPTHS = (1, 3, 7, 16, 17, 31, 33, 63, 64, 65, 100, 127, 128, 129, 200, 257, 300)
ROWS = (0, 1, 1, 2, 3, 5, 8, 16, 17, 33, 64)
Made = tuple[nn.Module, tuple[Any, ...]]


def _floats(rng: random.Random, *shape: int) -> torch.Tensor:
    """Return activations, now and then extreme ones."""
    x = torch.randn(*shape) * 10 ** rng.uniform(-2, 2)
    kind = rng.choice(("usual",) * 8 + ("zero", "positive", "infinite", "nan"))
    if kind == "zero":
        x.zero_()
    elif kind == "positive":
        x.abs_()
    elif x.numel() and kind != "usual":
        x.view(-1)[rng.randrange(x.numel())] = float("inf" if kind == "infinite" else "nan")
    return x


def linear(rng: random.Random, qconfig: QConfig) -> Made:
    """Return a linear layer, with and without bias and ReLU, in three dtypes; one in ten for two threads to share."""
    rows, columns, outputs = rng.choice(ROWS), rng.choice(DEPTHS), rng.choice(WIDTHS)
    if rng.random() < 0.1:
        rows, columns, outputs = rng.randint(40, 100), rng.choice((255, 320)), rng.choice((200, 259))
    layer, x = nn.Linear(columns, outputs, bias=rng.random() < 0.6), _floats(rng, rows, columns)
    dtype = rng.choice((torch.float32,) * 6 + (torch.bfloat16, torch.float64))
    x = x.unsqueeze(0) if rng.random() < 0.2 else x
    if rows and dtype == torch.float32 and rng.random() < 0.3:
        return by_graph(nn.Sequential(layer, nn.ReLU()).eval(), (torch.randn(2, columns),), qconfig), (x,)
    return by_module(nn.Sequential(layer).eval().to(dtype), (), qconfig), (x.to(dtype),)


class Packed(nn.Module):
    """A recurrent layer that runs on packed sequences."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x, lengths):
        return self.layer(nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False))


MIXABLE = [LINEAR[name] for name in ("int8", "int4", "int4 of 32", "int16", "float16")]
"""The schemes that may stand side by side in a recurrent layer."""


def _mixed(rng: random.Random, qconfig: QConfig) -> QConfigMapping:
    """Return a mapping that gives the first layer's matrices schemes of their own, every other time."""
    mapping = QConfigMapping().set_global(qconfig)
    if rng.random() < 1 / 2 and qconfig in MIXABLE:
        for matrix in ("weight_ih_l0", "weight_hh_l0"):
            mapping.set_module_name(f"layer.{matrix}", rng.choice((*MIXABLE, None)))
    return mapping


def recurrent(rng: random.Random, qconfig: QConfig) -> Made:
    """Return an LSTM, GRU or plain RNN on packed sequences: layers, directions and projections vary."""
    kind, inputs, hidden = rng.choice((nn.LSTM, nn.LSTM, nn.GRU, nn.RNN)), rng.choice(DEPTHS[:12]), rng.choice(WIDTHS)
    options: dict[str, Any] = {"bias": rng.random() < 0.7, "bidirectional": rng.random() < 0.4}
    if kind is nn.LSTM and hidden > 2 and rng.random() < 0.3:
        options["proj_size"] = rng.randint(1, hidden - 1)
    if kind is nn.RNN:
        options["nonlinearity"] = rng.choice(("tanh", "relu"))
    model = Packed(kind(inputs, hidden, rng.choice((1, 2)), **options)).eval()
    steps, batch = rng.choice((1, 2, 7)), rng.choice((1, 2, 5, 17))
    lengths = torch.tensor([rng.randint(1, steps) for _ in range(batch)])
    lengths[0] = steps
    x = torch.randn(steps, batch, inputs) * 10 ** rng.uniform(-1, 1)
    return quiet(fxquant.quantize_dynamic)(model, _mixed(rng, qconfig)), (x, lengths)


def cell(rng: random.Random, qconfig: QConfig) -> Made:
    """Return an LSTM's, GRU's or plain RNN's cell."""
    kind, inputs = rng.choice((nn.LSTMCell, nn.GRUCell, nn.RNNCell)), rng.choice(DEPTHS[:12])
    layer = kind(inputs, rng.choice(WIDTHS), bias=rng.random() < 0.7)
    return by_module(nn.Sequential(layer).eval(), (), qconfig), (torch.randn(rng.choice(ROWS[1:]), inputs),)


def convolution(rng: random.Random, qconfig: QConfig) -> Made:
    """Return a convolution of one or two dimensions, of the 65,536 weights from which they are quantized."""
    dims, outputs = rng.choice((1, 2)), rng.choice((256, 257))
    channels = rng.choice((96, 129) if dims == 1 else (33, 64))
    kind = (nn.Conv1d, nn.Conv2d)[dims - 1]
    options: dict[str, Any] = {"stride": rng.choice((1, 2)), "padding": rng.choice((0, 1)), "bias": rng.random() < 0.6}
    layer = kind(channels, outputs, 3, dilation=rng.choice((1, 1, 2)), **options)
    x = torch.randn(rng.choice((1, 2, 3)), channels, *(rng.randint(6, 8) for _ in range(dims)))
    return by_module(nn.Sequential(layer).eval(), (), qconfig), (x,)


class SelfAttention(nn.Module):
    """An attention of a sequence on itself, with a mask of what may be seen."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(*sizes, **options)

    def forward(self, x, mask):
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def attention(rng: random.Random, qconfig: QConfig) -> Made:
    """Return an attention with or without a causal mask, whose products are ours or torch's."""
    heads, width, steps = rng.choice((1, 2, 3)), rng.choice((1, 5, 8, 17)), rng.choice((1, 2, 7, 17))
    model = SelfAttention(heads * width, heads, bias=rng.random() < 0.7).eval()
    mask = nn.Transformer.generate_square_subsequent_mask(steps) if rng.random() < 0.5 else None
    ours = rng.choice((True, None))
    quantized = quiet(fxquant.quantize_dynamic)(model, QConfigMapping().set_global(qconfig), batch_invariant=ours)
    return quantized, (torch.randn(steps, rng.choice((1, 2, 3)), heads * width), mask)


def table(rng: random.Random, qconfig: QConfig) -> Made:
    """Return an embedding, or bags of it."""
    rows, columns = rng.choice((1, 5, 100)), rng.choice(WIDTHS)
    kind = rng.choice(("embedding", "sum", "mean", "max"))
    layer = nn.Embedding(rows, columns) if kind == "embedding" else nn.EmbeddingBag(rows, columns, mode=kind)
    words = torch.randint(rows, (rng.randint(1, 5), rng.randint(1, 7)), dtype=rng.choice((torch.int32, torch.int64)))
    return by_module(nn.Sequential(layer).eval(), (), qconfig), (words,)


class Products(nn.Module):
    """The float products that batch_invariant=True asks for."""

    def forward(self, a, b):
        return fxquant.ops.matmul(a, b), fxquant.ops.attention(a, a, a), fxquant.ops.attention(a, a, a, is_causal=True)


def products(rng: random.Random, _: QConfig) -> Made:
    """Return products of activations with activations."""
    rows, columns, inner = rng.choice(ROWS[1:]), rng.choice(WIDTHS), rng.choice(WIDTHS)
    return Products(), (torch.randn(2, 3, rows, inner), torch.randn(2, 3, inner, columns))


ALL = {**LINEAR, **SELDOM}
UINT8 = {name: qconfig for name, qconfig in ALL.items() if "per" in name or name in ("int8", "reduced range")}
OPERATORS: dict[str, tuple[Callable[[random.Random, QConfig], Made], dict[str, QConfig], int]] = {
    "linear": (linear, ALL, 50),
    "recurrent": (recurrent, ALL, 12),
    "cell": (cell, ALL, 8),
    "convolution": (convolution, UINT8, 10),
    "attention": (attention, ALL, 6),
    "table": (table, {**TABLES, "int8": LINEAR["int8"], "float16": LINEAR["float16"]}, 15),
    "products": (products, {"float": LINEAR["int8"]}, 30),
}
"""For each operator: what makes a case of it, with which schemes, and how many of each."""


def cases() -> Iterator[tuple[str, str, Callable[[], Made]]]:
    """Yield (operator and number, scheme, what makes it)."""
    for operator, (make, schemes, count) in OPERATORS.items():
        for scheme, qconfig in schemes.items():
            for number in range(count):
                yield f"{operator} {number}", scheme, _maker(make, f"{operator} {scheme} {number}", qconfig)


def _maker(make: Callable[[random.Random, QConfig], Made], seed: str, qconfig: QConfig) -> Callable[[], Made]:
    def call() -> Made:
        rng = random.Random(seed)
        torch.manual_seed(rng.randrange(2**31))
        return make(rng, qconfig)

    return call
