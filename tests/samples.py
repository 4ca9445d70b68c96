"""Models that the tests share, and for each row of the operator table at least one sample of every module and call.

A new row needs a sample here: tests/operators/test_contract.py walks the table and fails on a row without one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

import fxquant
from fxquant import QConfig, QConfigMapping, TensorSpec, convert_fx, prepare_fx
from fxquant.graph.record import record_of
from fxquant.nn import ConvReLU1d, ConvReLU2d, LinearReLU, linear_relu
from fxquant.nn.fused import ConvReLU3d, expanded_bmm


@dataclass(frozen=True)
class Sample:
    """One use of a row: a model whose only candidate it is, and the inputs of one call.

    covers: the float module type or function. rows: the dimension of the first input along which rows are independent,
    and the same dimension of the first output.
    """

    covers: Any
    model: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    rows: int = 0


class Call(nn.Module):
    """A model that calls a function on an input and a parameter of its own."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int, **kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape) / 4)
        self.function, self.kwargs = function, kwargs

    def forward(self, x):
        return self.function(x, self.weight, **self.kwargs)


class SelfAttention(nn.Module):
    """An nn.MultiheadAttention of a sequence on itself."""

    def __init__(self, *sizes: Any, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(*sizes, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class CallWithBias(Call):
    """A model that calls a function on a bias of its own, an input and its weight."""

    def __init__(self, function: Callable[..., torch.Tensor], *shape: int) -> None:
        super().__init__(function, *shape)
        self.bias = nn.Parameter(torch.randn(shape[1]))

    def forward(self, x):
        return self.function(self.bias, x, self.weight)


class Conv1D(nn.Module):
    """transformers.pytorch_utils.Conv1D, as that package (5.x) has it, for tests without it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) / 4)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


Conv1D.__module__ = "transformers.pytorch_utils"


def relu_of_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.relu(F.linear(x, weight))


def einsum_of_rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.einsum("...i,oi->...o", x, weight)


def indices(*shape: int, top: int = 20) -> torch.Tensor:
    return torch.randint(top, shape)


LINEAR_CALLS = (
    Sample(F.linear, lambda: Call(F.linear, 12, 24), lambda: (torch.randn(5, 24),)),
    Sample(linear_relu, lambda: Call(relu_of_linear, 12, 24), lambda: (torch.randn(5, 24),)),
    Sample(operator.matmul, lambda: Call(operator.matmul, 24, 12), lambda: (torch.randn(5, 24),)),
    Sample(torch.matmul, lambda: Call(torch.matmul, 24, 12), lambda: (torch.randn(5, 24),)),
    Sample(torch.linalg.matmul, lambda: Call(torch.linalg.matmul, 24, 12), lambda: (torch.randn(5, 24),)),
    Sample("matmul", lambda: Call(lambda x, w: x.matmul(w), 24, 12), lambda: (torch.randn(5, 24),)),
    Sample(expanded_bmm, lambda: Call(expanded_bmm, 24, 12), lambda: (torch.randn(2, 5, 24),)),
    Sample(torch.mm, lambda: Call(torch.mm, 24, 12), lambda: (torch.randn(5, 24),)),
    Sample("mm", lambda: Call(lambda x, w: x.mm(w), 24, 12), lambda: (torch.randn(5, 24),)),
    Sample(torch.addmm, lambda: CallWithBias(torch.addmm, 24, 12), lambda: (torch.randn(5, 24),)),
    Sample("addmm", lambda: CallWithBias(lambda b, x, w: b.addmm(x, w), 24, 12), lambda: (torch.randn(5, 24),)),
    Sample(torch.einsum, lambda: Call(einsum_of_rows, 12, 24), lambda: (torch.randn(5, 24),)),
)
"""Of F.linear and its other forms."""

SAMPLES: dict[str, tuple[Sample, ...]] = {
    "linear": (
        Sample(nn.Linear, lambda: nn.Sequential(nn.Linear(24, 12)), lambda: (torch.randn(5, 24),)),
        Sample(LinearReLU, lambda: nn.Sequential(nn.Linear(24, 12), nn.ReLU()), lambda: (torch.randn(5, 24),)),
        *LINEAR_CALLS,
    ),
    "attention": (
        Sample(nn.MultiheadAttention, lambda: SelfAttention(24, 3), lambda: (torch.randn(4, 3, 24),), rows=1),
    ),
    "lstm": (Sample(nn.LSTM, lambda: nn.Sequential(nn.LSTM(10, 8, 2)), lambda: (torch.randn(4, 3, 10),), rows=1),),
    "rnn": (
        Sample(nn.GRU, lambda: nn.Sequential(nn.GRU(10, 8, 2)), lambda: (torch.randn(4, 3, 10),), rows=1),
        Sample(nn.RNN, lambda: nn.Sequential(nn.RNN(10, 8, 2)), lambda: (torch.randn(4, 3, 10),), rows=1),
    ),
    "cell": (
        Sample(nn.LSTMCell, lambda: nn.Sequential(nn.LSTMCell(10, 8)), lambda: (torch.randn(5, 10),)),
        Sample(nn.GRUCell, lambda: nn.Sequential(nn.GRUCell(10, 8)), lambda: (torch.randn(5, 10),)),
        Sample(nn.RNNCell, lambda: nn.Sequential(nn.RNNCell(10, 8)), lambda: (torch.randn(5, 10),)),
    ),
    "embedding": (
        Sample(nn.Embedding, lambda: nn.Sequential(nn.Embedding(20, 9)), lambda: (indices(4, 3),)),
        Sample(F.embedding, lambda: Call(F.embedding, 20, 9), lambda: (indices(4, 3),)),
    ),
    "transposed_linear": (Sample(Conv1D, lambda: nn.Sequential(Conv1D(12, 24)), lambda: (torch.randn(5, 24),)),),
    "convolution": (
        Sample(nn.Conv1d, lambda: nn.Sequential(nn.Conv1d(128, 256, 3)), lambda: (torch.randn(3, 128, 7),)),
        Sample(nn.Conv2d, lambda: nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1)), lambda: (torch.randn(3, 64, 5, 6),)),
        Sample(ConvReLU1d, lambda: nn.Sequential(nn.Conv1d(512, 512, 1), nn.ReLU()), lambda: (torch.randn(3, 512, 4),)),
        Sample(
            ConvReLU2d,
            lambda: nn.Sequential(nn.Conv2d(128, 64, (3, 4), padding="same"), nn.ReLU()),
            lambda: (torch.randn(3, 128, 4, 3),),
        ),
    ),
    "embedding_bag": (
        Sample(nn.EmbeddingBag, lambda: nn.Sequential(nn.EmbeddingBag(20, 9)), lambda: (indices(4, 3),)),
        Sample(F.embedding_bag, lambda: Call(F.embedding_bag, 20, 9), lambda: (indices(4, 3),)),
    ),
    "static linear": (
        Sample(nn.Linear, lambda: nn.Sequential(nn.Linear(24, 12)), lambda: (torch.randn(5, 24),)),
        Sample(LinearReLU, lambda: nn.Sequential(nn.Linear(24, 12), nn.ReLU()), lambda: (torch.randn(5, 24),)),
        *LINEAR_CALLS,
    ),
    "static convolution": (
        Sample(F.conv1d, lambda: Call(F.conv1d, 64, 32, 3, stride=2), lambda: (torch.randn(3, 32, 7),)),
        Sample(
            F.conv2d,
            lambda: Call(F.conv2d, 64, 16, 3, 2, padding=(1, 0), groups=2),
            lambda: (torch.randn(3, 32, 5, 6),),
        ),
        Sample(F.conv3d, lambda: Call(F.conv3d, 32, 16, 2, 2, 2), lambda: (torch.randn(3, 16, 3, 4, 5),)),
        Sample(nn.Conv1d, lambda: nn.Sequential(nn.Conv1d(128, 256, 3)), lambda: (torch.randn(3, 128, 7),)),
        Sample(
            nn.Conv2d,
            lambda: nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1, padding_mode="reflect")),
            lambda: (torch.randn(3, 64, 5, 6),),
        ),
        Sample(nn.Conv3d, lambda: nn.Sequential(nn.Conv3d(16, 32, 2)), lambda: (torch.randn(3, 16, 3, 4, 5),)),
        Sample(ConvReLU1d, lambda: nn.Sequential(nn.Conv1d(512, 512, 1), nn.ReLU()), lambda: (torch.randn(3, 512, 4),)),
        Sample(
            ConvReLU2d,
            lambda: nn.Sequential(nn.Conv2d(128, 64, (3, 4), padding="same"), nn.ReLU()),
            lambda: (torch.randn(3, 128, 4, 3),),
        ),
        Sample(
            ConvReLU3d,
            lambda: nn.Sequential(nn.Conv3d(16, 32, 2), nn.ReLU()),
            lambda: (torch.randn(3, 16, 3, 4, 5),),
        ),
        Sample(
            nn.ConvTranspose1d,
            lambda: nn.Sequential(nn.ConvTranspose1d(64, 32, 3, 2, 1, 1)),
            lambda: (torch.randn(3, 64, 4),),
        ),
        Sample(
            nn.ConvTranspose2d,
            lambda: nn.Sequential(nn.ConvTranspose2d(64, 32, 3, (2, 1))),
            lambda: (torch.randn(3, 64, 4, 3),),
        ),
        Sample(
            nn.ConvTranspose2d,
            lambda: nn.Sequential(nn.ConvTranspose2d(64, 32, 3, 2, groups=4)),
            lambda: (torch.randn(3, 64, 3, 3),),
        ),
        Sample(
            nn.ConvTranspose3d,
            lambda: nn.Sequential(nn.ConvTranspose3d(16, 32, 2)),
            lambda: (torch.randn(3, 16, 2, 3, 4),),
        ),
    ),
}

SCHEMES: dict[str, QConfig] = {
    "int8 weights, uint8 dynamic activations": fxquant.default_dynamic_qconfig,
    "int8 weights, uint8 static activations": fxquant.default_static_qconfig,
    "int4 weights in groups, uint8 dynamic activations": fxquant.int4_dynamic_qconfig,
    "int3 weights in groups, uint8 dynamic activations": fxquant.int3_dynamic_qconfig,
    "int16 weights, int16 dynamic activations": fxquant.int16_dynamic_qconfig,
    "float16 weights": fxquant.float16_dynamic_qconfig,
    "int8 rows": QConfig(
        activation=None, weight=TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel")
    ),
    "affine uint8 rows": fxquant.float_qparams_weight_only_qconfig,
    "affine uint4 rows": fxquant.float_qparams_weight_only_qconfig_4bit,
}
"""A qconfig for each scheme, by the scheme's name."""

MIXTURES: dict[str, dict[str, QConfig]] = {
    "int16 and int8": {"weight_ih": fxquant.int16_dynamic_qconfig},
    "int4, int16 and int8": {"weight_ih": fxquant.int4_dynamic_qconfig, "weight_hh": fxquant.int16_dynamic_qconfig},
    "int4, float16 and int8": {"weight_ih": fxquant.int4_dynamic_qconfig, "weight_hh": fxquant.float16_dynamic_qconfig},
}
"""Schemes of a first layer's weights, the others being int8, for rows whose weights may differ; by a name."""


class WordLM(nn.Module):
    """The documents' word language model, small."""

    def __init__(self, ntoken=50, ninp=12, nhid=8, nlayers=2, tie=False):
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.encoder = nn.Embedding(ntoken, ninp)
        self.rnn = nn.LSTM(ninp, nhid, nlayers, dropout=0.5 if nlayers > 1 else 0)
        self.decoder = nn.Linear(nhid, ntoken)
        self.nlayers, self.nhid = nlayers, nhid
        if tie:
            self.decoder.weight = self.encoder.weight

    def forward(self, input, hidden):
        output, hidden = self.rnn(self.drop(self.encoder(input)), hidden)
        return self.decoder(self.drop(output)), hidden

    def init_hidden(self, bsz):
        weight = next(self.parameters())
        return weight.new_zeros(self.nlayers, bsz, self.nhid), weight.new_zeros(self.nlayers, bsz, self.nhid)


def lm_inputs(model: WordLM, time: int = 5, batch: int = 3) -> tuple[Any, ...]:
    return torch.randint(model.encoder.num_embeddings, (time, batch)), model.init_hidden(batch)


def everything(qconfig: QConfig | None = fxquant.default_dynamic_qconfig) -> QConfigMapping:
    return QConfigMapping().set_global(qconfig)


def scheme_mapping(name: str) -> QConfigMapping:
    """Return the mapping that gives everything a scheme, or a mixture, by its name."""
    if name not in MIXTURES:
        return everything(SCHEMES[name])
    mapping = everything()
    for weight, qconfig in MIXTURES[name].items():
        mapping.set_module_name_regex(rf".*\.{weight}(_l0)?$", qconfig)
    return mapping


def weight_dtypes(qconfig: QConfig) -> set[str]:
    """Return the dtypes that a site's weights have, by its qconfig."""
    return {qconfig.weight.dtype, *("float32" if own is None else own.weight.dtype for _, own in qconfig.parts)}


def prepare(model: nn.Module, *inputs: Any, mapping: Any = None, **options: Any) -> fxquant.graph.module.FxModule:
    return prepare_fx(model.eval(), mapping or everything(), inputs, **options)


def quantize(
    model: nn.Module, *inputs: Any, mapping: Any = None, check: bool = True, **options: Any
) -> fxquant.graph.module.FxModule:
    prepared = prepare(model, *inputs, mapping=mapping, **options)
    if record_of(prepared).values.edges:
        prepared(*inputs)  # calibrates
    return convert_fx(prepared, check=check)


def leaves(tree: Any) -> list[torch.Tensor]:
    """Return the tensors of nested tuples, lists, dicts and PackedSequences, in order."""
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [t for branch in tree for t in leaves(branch)] if isinstance(tree, (tuple, list)) else []


def same_bits(a: Any, b: Any) -> bool:
    """Return whether all tensors of two results are equal in shape, dtype and bits; a NaN equals a NaN."""
    return all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan())
        and torch.equal(x.nan_to_num(), y.nan_to_num())
        for x, y in zip(leaves(a), leaves(b), strict=True)
    )  # fmt: skip


def kinds(model: nn.Module) -> dict[str, str]:
    """Return the type's name of every module, by its path."""
    return {name: type(module).__name__ for name, module in model.named_modules()}


def linear_bound(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return how far default_dynamic_qconfig may put x @ weight.T + bias from the float result, element by element.

    With |x - x̂| ≤ s_x / 2 and |w - ŵ| ≤ s_w / 2, |Σ x w - Σ x̂ ŵ| ≤ Σ |x̂| s_w / 2 + Σ |w| s_x / 2, where
    |x̂| ≤ |x| + s_x / 2; and two float32 roundings of a sum of K products. (The zero point is rounded, which may clip an
    end of the row's range by as much as half a step more: s_x where s_x / 2 stood.)
    """
    x, weight = x.double(), weight.detach().double()
    s_x = (x.amax(-1, keepdim=True).clamp(min=0) - x.amin(-1, keepdim=True).clamp(max=0)) / 255
    s_w = weight.abs().amax(-1) / 127
    size = x.abs() @ weight.abs().t() + (0 if bias is None else bias.detach().double().abs())
    steps = s_x * weight.abs().sum(-1) + (x.abs() + s_x).sum(-1, keepdim=True) * s_w / 2
    return steps + (x.shape[-1] + 4) * 2**-24 * size


def sqnr(expected: torch.Tensor, got: torch.Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB."""
    return float(10 * torch.log10(expected.detach().pow(2).sum() / (expected - got).detach().pow(2).sum()))


@torch.no_grad()
def steps_apart(prepared, quantized, *inputs):
    """Yield each value that a trained model rounds, and how many steps it is at most away from its integers."""
    rounded, integers = (fx.Interpreter(model, garbage_collect_values=False) for model in (prepared, quantized))
    rounded.run(*inputs), integers.run(*inputs)
    values = {node.name: value for node, value in integers.env.items()}
    edges = [edge for edge in prepared.record.values.edges if edge.scale_of == edge.name and not edge.is_moved]
    for edge in edges:
        q = values.get(edge.name)
        if isinstance(q, torch.Tensor) and q.dtype == torch.uint8:
            call = prepared.graph.find_nodes(op="call_module", target=f"{edge.name}_observer")[0]
            scale, zero = (getattr(quantized, f"{edge.name}_{part}") for part in ("scale", "zero_point"))
            yield edge.name, float(((q.float() - zero) - rounded.env[call] / scale).abs().max())
