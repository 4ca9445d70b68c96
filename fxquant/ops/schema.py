"""The operators' schemas, their shape (fake) functions, and the checks that every implementation shares.

Shapes: B batch, T time, I in, H hidden, P projection (H without one), O out, V vocabulary, D embedding, L layers times
directions. Each operator is registered once, in the namespace `torch.ops.fxquant`, with the plain-torch reference for
every device; `fxquant.ops` chooses what a CPU call really runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxquant.errors import DTypeError, ShapeError
from fxquant.spec import GROUP_SIZES

LIBRARY = torch.library.Library("fxquant", "DEF")  # type: ignore[no-untyped-call]

SCHEMAS = {
    "linear": "(Tensor x, Tensor weight, Tensor? scale, Tensor? bias=None, bool relu=False, bool per_row=True,"
    " int qmax=255, int group_size=0, int in_features=0) -> Tensor",
    "lstm": "(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor c0, Tensor[] weights, Tensor[] scales, Tensor[] biases,"
    " bool bidirectional=False, bool per_row=True, int qmax=255) -> (Tensor, Tensor, Tensor)",
    "rnn": "(Tensor x, Tensor? batch_sizes, Tensor h0, Tensor[] weights, Tensor[] scales, Tensor[] biases,"
    " Tensor[] hidden_biases, str mode, bool bidirectional=False, bool per_row=True, int qmax=255) -> (Tensor, Tensor)",
    "embedding": "(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, SymInt embedding_dim, int bits=8,"
    " ScalarType dtype=float32) -> Tensor",
    "embedding_bag": "(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, SymInt embedding_dim,"
    " Tensor? offsets=None, str mode='mean', Tensor? per_sample_weights=None, bool include_last_offset=False,"
    " int? padding_idx=None, int bits=8, ScalarType dtype=float32) -> Tensor",
}


RNN_MODES = {"gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
"""The modes of the operator rnn, and what each is called in errors."""


def check_dense(x: Any, operator: str) -> None:
    """Raise DTypeError for what is no tensor, nor stands for one, and for a sparse or nested tensor."""
    if not isinstance(x, torch.Tensor):
        if not hasattr(type(x), "__torch_function__"):  # as what torch.fx traces with has
            raise DTypeError(f"a quantized {operator} takes a tensor, got {type(x).__name__}")
    elif x.is_nested or x.layout is not torch.strided:
        told, cure = ("nested", "to_padded_tensor(0.0)") if x.is_nested else (str(x.layout), "to_dense()")
        raise DTypeError(f"a quantized {operator} takes a dense tensor, got a {told} one; call x.{cure} before it")


def check_linear(x: torch.Tensor, weight: torch.Tensor, in_features: int = 0) -> None:
    """Raise ShapeError or DTypeError unless x is (..., I) floating point; I: in_features, or the weight's columns."""
    inputs = in_features or weight.shape[1]
    if not x.is_floating_point():
        raise DTypeError(f"a quantized linear takes a float tensor, got {x.dtype}; call x.float() before it")
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ShapeError(
            f"a quantized linear of {inputs} inputs takes x of shape (..., {inputs}), got {tuple(x.shape)}"
        )


def check_groups(weight: torch.Tensor, scale: torch.Tensor | None, group_size: int, in_features: int) -> None:
    """Raise DTypeError or ShapeError unless weight and scale are those of an int4 linear."""
    if weight.dtype is not torch.uint8 or scale is None or scale.dtype is not torch.bfloat16:
        kinds = f"{weight.dtype} and {None if scale is None else scale.dtype}"
        raise DTypeError(f"an int4 linear takes a weight of torch.uint8 with a scale of torch.bfloat16, got {kinds}")
    outputs, groups = weight.shape[0], -(-in_features // group_size) if group_size in GROUP_SIZES else -1
    if weight.shape != (outputs, (in_features + 1) // 2) or scale.shape != (outputs, groups):
        raise ShapeError(
            f"an int4 linear of {in_features} inputs in groups of {group_size} (32, 64 or 128) takes a weight of shape "
            f"(O, {(in_features + 1) // 2}) and a scale of shape (O, {groups}), got {tuple(weight.shape)} and "
            f"{tuple(scale.shape)}"
        )


def check_recurrent(
    kind: str, x: torch.Tensor, batch_sizes: torch.Tensor | None, inputs: int, **states: torch.Tensor
) -> None:
    """Raise ShapeError or DTypeError unless x is (T, B, I) or packed (N, I), and each state (L, B, ...).

    kind: what to call it in errors: "LSTM", "GRU", "RNN".
    """
    for name, tensor in (("input", x), *states.items()):
        if not tensor.is_floating_point():
            raise DTypeError(f"a quantized {kind} takes float tensors, got {name} of {tensor.dtype}")
    want = 3 if batch_sizes is None else 2
    if x.dim() != want or x.shape[-1] != inputs:
        raise ShapeError(
            f"a quantized {kind} of {inputs} inputs takes {want}-D input whose last dimension is {inputs}, "
            f"got {tuple(x.shape)}"
        )
    batch = x.shape[1] if batch_sizes is None else None
    for name, state in states.items():
        if state.dim() != 3 or (batch is not None and state.shape[1] != batch):
            raise ShapeError(f"a quantized {kind} called with batch {batch} got {name} of shape {tuple(state.shape)}")


def check_indices(indices: torch.Tensor, operator: str) -> None:
    """Raise DTypeError unless the indices are int32 or int64."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise DTypeError(f"a quantized {operator} takes int32 or int64 indices, got {indices.dtype}")


def _fake_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    per_row: bool = True,
    qmax: int = 255,
    group_size: int = 0,
    in_features: int = 0,
) -> torch.Tensor:
    check_linear(x, weight, in_features)
    if group_size:
        check_groups(weight, scale, group_size, in_features)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_lstm(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    c0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    bidirectional: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    check_recurrent("LSTM", x, batch_sizes, weights[0].shape[1], h0=h0, c0=c0)
    columns = h0.shape[-1] * (2 if bidirectional else 1)
    return x.new_empty((*x.shape[:-1], columns)), x.new_empty(h0.shape), x.new_empty(c0.shape)


def _fake_rnn(
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    hidden_biases: Sequence[torch.Tensor],
    mode: str,
    bidirectional: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_recurrent(RNN_MODES[mode], x, batch_sizes, weights[0].shape[1], h0=h0)
    return x.new_empty((*x.shape[:-1], h0.shape[-1] * (2 if bidirectional else 1))), x.new_empty(h0.shape)


def _fake_embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    check_indices(indices, "embedding")
    return weight.new_empty((*indices.shape, embedding_dim), dtype=dtype)


def _fake_embedding_bag(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    offsets: torch.Tensor | None = None,
    mode: str = "mean",
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    check_indices(indices, "embedding bag")
    bags = indices.shape[0] if offsets is None else offsets.shape[0] - int(include_last_offset)
    return weight.new_empty((bags, embedding_dim), dtype=dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "linear": _fake_linear,
    "lstm": _fake_lstm,
    "rnn": _fake_rnn,
    "embedding": _fake_embedding,
    "embedding_bag": _fake_embedding_bag,
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fxquant::{_name}", _FAKES[_name], lib=LIBRARY)
