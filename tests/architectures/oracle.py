"""An oracle: the float model with every weight and activation rounded that fxquant quantizes, and nothing else changed.

Written from the equations of docs/numerics.md alone, on torch's float64 products: it shares no line with fxquant, has
no graph, no sites and no kernels. What it gives is what the quantized model is to give, but for float rounding where
the page leaves an order open (an LSTM's exponentials), which may tip a value that lies between two integers.
"""

from __future__ import annotations

import contextlib
import copy
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.overrides import TorchFunctionMode


def round_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (q - z, s) of an activation's tokens: "token scale", "token integers"."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high / 2 - low / 2) / 127.5
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low * (1 / scale)).round().clamp(0, 255)
    return ((x * (1 / scale)).round() + zero).clamp(0, 255) - zero, scale


def round_channels(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (q, s) of a weight's output channels, or of a table's vectors: "symmetric weight"."""
    scale = weight.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale == 0, 1.0, scale)
    return (weight * (1 / scale)).round().clamp(-127, 127), scale


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x @ weight.T + bias: "int8 output"."""
    (qx, sx), (qw, sw) = round_rows(x.float()), round_channels(weight.detach())
    y = (qx.double() @ qw.double().T).float() * (sx * sw.squeeze(-1))
    return y if bias is None else y + bias


def table(weight: torch.Tensor) -> torch.Tensor:
    """Return an embedding's vectors: "embedding"."""
    q, scale = round_channels(weight.detach())
    return q * scale


def step(kind: str, gates: torch.Tensor, hidden: torch.Tensor, h: torch.Tensor, c: Any) -> tuple[torch.Tensor, Any]:
    """Return (h', c') of one step: "LSTM cell", "GRU output".

    gates: the input's part and its bias; hidden: the state's part.
    """
    if kind == "LSTM":
        i, f, g, o = (gates + hidden).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c
    if kind == "GRU":
        (xr, xz, xn), (hr, hz, hn) = gates.chunk(3, -1), hidden.chunk(3, -1)
        n = (xn + (xr + hr).sigmoid() * hn).tanh()
        z = (xz + hz).sigmoid()
        return n + z * (h - n), None
    return (gates + hidden).relu() if kind == "relu" else (gates + hidden).tanh(), None


def run_layer(kind: str, x: torch.Tensor, h: torch.Tensor, c: Any, tensors: list[Any]) -> tuple[Any, ...]:
    """Return (outputs, h, c) of one layer in one direction. x: (T, B, I); tensors: w_ih, w_hh, b_ih, b_hh, w_hr."""
    w_ih, w_hh, b_ih, b_hh, w_hr = tensors
    outputs, gates = [], linear(x, w_ih, b_ih).double()
    for t in range(x.shape[0]):
        h, c = step(kind, gates[t], linear(h, w_hh, b_hh).double(), h.double(), c)
        h = h.float() if w_hr is None else linear(h, w_hr)
        outputs.append(h)
    return torch.stack(outputs), h, c


def kind_of(module: Any) -> str:
    name = type(module).__name__.removesuffix("Cell")
    return name if name != "RNN" else module.nonlinearity


def run_stack(module: Any, x: torch.Tensor, hx: Any) -> tuple[torch.Tensor, Any]:
    """Return (output, states) of an nn.LSTM, GRU or RNN for x (T, B, I)."""
    sides = ("", "_reverse") if module.bidirectional else ("",)
    cells = [f"l{layer}{side}" for layer in range(module.num_layers) for side in sides]
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    is_lstm = isinstance(module, nn.LSTM)
    if hx is None:
        sizes = (module.proj_size or module.hidden_size, module.hidden_size)
        states = [x.new_zeros(len(cells), x.shape[1], size) for size in sizes]
    else:
        states = list(hx) if is_lstm else [hx, hx]
    last: list[tuple[torch.Tensor, Any]] = []
    for layer in range(module.num_layers):
        parts = []
        for side in range(len(sides)):
            index = layer * len(sides) + side
            tensors = [getattr(module, f"{name}_{cells[index]}", None) for name in names]
            steps = x.flip(0) if side else x
            output, h, c = run_layer(kind_of(module), steps, states[0][index], states[1][index].double(), tensors)
            parts.append(output.flip(0) if side else output)
            last.append((h, c))
        x = torch.cat(parts, -1)
    h = torch.stack([h for h, _ in last])
    return x, (h, torch.stack([c for _, c in last]).float()) if is_lstm else h


def _recurrent(self: Any, input: Any, hx: Any = None) -> Any:
    if isinstance(input, PackedSequence):  # each sequence by itself
        padded, lengths = pad_packed_sequence(input)
        alone = [run_stack(self, padded[:n, b : b + 1], None) for b, n in enumerate(lengths.tolist())]
        packed = pack_sequence([output[:, 0] for output, _ in alone], enforce_sorted=False)
        states = [state for _, state in alone]
        if isinstance(self, nn.LSTM):
            return packed, tuple(torch.cat(parts, 1) for parts in zip(*states, strict=True))
        return packed, torch.cat(states, 1)
    x = input.transpose(0, 1) if self.batch_first else input
    output, state = run_stack(self, x, hx)
    return output.transpose(0, 1) if self.batch_first else output, state


def _cell(self: Any, input: torch.Tensor, hx: Any = None) -> Any:
    is_lstm = isinstance(self, nn.LSTMCell)
    zeros = input.new_zeros(input.shape[0], self.hidden_size)
    h, c = (hx if is_lstm else (hx, zeros)) if hx is not None else (zeros, zeros)
    tensors = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, None]
    _, h, c = run_layer(kind_of(self), input.unsqueeze(0), h, c.double(), tensors)
    return (h, c.float()) if is_lstm else h


def _attention(
    self: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    def heads(x: torch.Tensor) -> torch.Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    biases = self.in_proj_bias.chunk(3)
    rows = zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
    q, k, v = (heads(linear(*operands)) for operands in rows)
    mask = None
    for given in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None, :]):
        if given is not None:
            added = torch.zeros(given.shape).masked_fill(given, -torch.inf) if given.dtype == torch.bool else given
            mask = added if mask is None else mask + added
    joined = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    joined = joined if self.batch_first else joined.transpose(0, 1)
    return linear(joined, self.out_proj.weight, self.out_proj.bias), None


def _bag(self: Any, input: torch.Tensor, offsets: Any = None, per_sample_weights: Any = None) -> torch.Tensor:
    options = {"mode": self.mode, "per_sample_weights": per_sample_weights, "padding_idx": self.padding_idx}
    return F.embedding_bag(input, table(self.weight), offsets, **options)


FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    nn.Linear: lambda self, x: linear(x, self.weight, self.bias),
    nn.Embedding: lambda self, indices: table(self.weight)[indices],
    nn.EmbeddingBag: _bag,
    nn.MultiheadAttention: _attention,
    **dict.fromkeys((nn.LSTM, nn.GRU, nn.RNN), _recurrent),
    **dict.fromkeys((nn.LSTMCell, nn.GRUCell, nn.RNNCell), _cell),
}


class Calls(TorchFunctionMode):
    """Rounds in functional calls of a parameter."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, last = getattr(func, "__name__", ""), args[-1] if args else None
        if name == "linear" and is_constant(args[1]):
            return linear(*args)
        if name == "embedding" and is_constant(args[1]):
            return table(args[1])[args[0]]
        if name == "embedding_bag" and is_constant(args[1]):
            return F.embedding_bag(args[0], table(args[1]), **kwargs)
        if name in ("matmul", "__matmul__", "mm") and is_constant(last):
            return linear(args[0], last.t())
        if name == "addmm" and is_constant(last):
            return linear(args[1], last.t(), args[0])
        if name == "einsum" and is_constant(last):
            assert args[0] == "bti,oi->bto", args[0]
            return linear(args[1], last)
        return func(*args, **(kwargs or {}))


def is_constant(tensor: Any) -> bool:
    """Return whether something is a matrix of the model's or its transpose."""
    return isinstance(tensor, nn.Parameter) or isinstance(getattr(tensor, "_base", None), nn.Parameter)


def simulate(model: nn.Module, inputs: tuple[Any, ...], called: Sequence[str], form: str) -> Any:
    """Return what a float model gives with everything rounded that is quantized."""
    twin = copy.deepcopy(model)
    for module in list(quantizable(twin)):
        own = copy.deepcopy(module)
        module.forward = types.MethodType(FORWARDS[type(module)], own)  # type: ignore[method-assign]
    # What reads a module's weight itself meets what its integers stand for.
    for path in called if form == "eager" else ():
        owner, _, name = path.rpartition(".")
        if type(twin.get_submodule(owner)) in FORWARDS:
            weight = nn.Parameter(table(twin.get_parameter(path)))
            twin.get_submodule(owner).register_parameter(name, weight)
    with Calls() if form == "fx" else contextlib.nullcontext():
        return twin(*inputs)


def quantizable(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules whose weights are to become int8: those of an exact type with a rule above."""
    yield from (module for module in model.modules() if type(module) in FORWARDS)
