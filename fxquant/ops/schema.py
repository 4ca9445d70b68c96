"""The operators' schemas, their shape (fake) functions, and the checks that every implementation shares.

Shapes: B batch, T time, I in, H hidden, P projection (H without one), O out, V vocabulary, D embedding, L layers times
directions. Each operator is registered once, in the namespace `torch.ops.fxquant`, with the plain-torch reference for
every device; `fxquant.ops` chooses what a CPU call really runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fxquant.errors import ArgumentError, DTypeError, ShapeError
from fxquant.numerics import group_size_of
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
    "matmul": "(Tensor a, Tensor b) -> Tensor",
    "attention": "(Tensor query, Tensor key, Tensor value, Tensor? mask=None, bool is_causal=False,"
    " float? scale=None) -> Tensor",
}


RNN_MODES = {"gru": "GRU", "rnn_tanh": "RNN", "rnn_relu": "RNN"}
"""The modes of the operator rnn, and what each is called in errors."""

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
"""How many rows of a weight a hidden unit has."""

SCHEMES = {
    torch.int8: "int",
    torch.int16: "int",
    torch.uint8: "int4",
    torch.float16: "float",
    torch.float32: "float",
}
"""The dtypes that a recurrent operator's weights may have, and how each is scaled."""


def rnn_kind(mode: str) -> str:
    """Return what a mode of the operator rnn is called in errors; ArgumentError for what is none."""
    if mode not in RNN_MODES:
        raise ArgumentError(f"the operator rnn takes one of the modes {', '.join(map(repr, RNN_MODES))}, got {mode!r}")
    return RNN_MODES[mode]


def check_dense(x: Any, operator: str) -> None:
    """Raise DTypeError for what is no tensor, nor stands for one, and for a sparse or nested tensor."""
    if not isinstance(x, torch.Tensor):
        if not hasattr(type(x), "__torch_function__"):  # as what torch.fx traces with has
            raise DTypeError(f"a quantized {operator} takes a tensor, got {type(x).__name__}")
    elif x.is_nested or x.layout is not torch.strided:
        told, cure = ("nested", "to_padded_tensor(0.0)") if x.is_nested else (str(x.layout), "to_dense()")
        raise DTypeError(f"a quantized {operator} takes a dense tensor, got a {told} one; call x.{cure} before it")


def check_linear(x: torch.Tensor, weight: torch.Tensor, in_features: int = 0, qmax: int = 255) -> None:
    """Raise an error unless x is (..., I) floating point; I: in_features, or the weight's columns.

    qmax: of the activations. ShapeError, DTypeError, or ArgumentError for a qmax that does not go with the weight.
    """
    inputs = in_features or weight.shape[1]
    if not x.is_floating_point():
        raise DTypeError(f"a quantized linear takes a float tensor, got {x.dtype}; call x.float() before it")
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ShapeError(
            f"a quantized linear of {inputs} inputs takes x of shape (..., {inputs}), got {tuple(x.shape)}"
        )
    if weight.dtype in (torch.int8, torch.uint8):
        _check_qmax("linear", qmax)


def _check_qmax(kind: str, qmax: int) -> None:
    if not 1 <= qmax <= 255:
        raise ArgumentError(f"a quantized {kind} takes qmax from 1 to 255, got {qmax}; 255 is 8 bits, 127 is 7")


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
    kind: str,
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    hidden_biases: Sequence[torch.Tensor] = (),
    bidirectional: bool = False,
    qmax: int = 255,
) -> None:
    """Raise ShapeError, DTypeError or ArgumentError unless the operands of a recurrent operator fit each other.

    kind: what to call it in errors: "LSTM", "GRU", "RNN"; x: (T, B, I) or packed (N, I); states: h0 (L, B, P), and an
    LSTM's c0 (L, B, H). Each weight may have a scheme of its own: `reference.multiply`.
    """
    _check_qmax(kind, qmax)
    _check_sequence(kind, x, batch_sizes, weights[0] if weights else None, states)
    cells, outputs, hidden = states[0].shape[0], states[0].shape[2], states[-1].shape[2]
    directions, rows = 2 if bidirectional else 1, GATES[kind] * hidden
    is_projected = kind == "LSTM" and len(weights) == 3 * cells
    numbers = {
        "weights": (weights, (3 if is_projected else 2) * cells),
        "scales": (scales, len(weights) if scales else 0),
        "biases": (biases, cells if biases else 0),
        "hidden biases": (hidden_biases, cells if hidden_biases else 0),
    }
    told = f"a quantized {kind} of {cells} cells with {hidden} hidden units and {outputs} outputs"
    for name, (given, count) in numbers.items():
        if len(given) != count:
            raise ShapeError(f"{told} takes {count} {name}, got {len(given)}")
    if cells % directions or (hidden != outputs and not is_projected):
        raise ShapeError(f"{told} cannot be: {directions} directions, {'a' if is_projected else 'no'} projection")
    for i, vector in enumerate((*biases, *hidden_biases)):
        if vector.shape != (rows if i < len(biases) else hidden,):
            raise ShapeError(f"{told} got a bias of shape {tuple(vector.shape)}")
    for i, weight in enumerate(weights):
        cell, place = divmod(i, 3 if is_projected else 2)
        inputs = x.shape[-1] if cell < directions else directions * outputs
        shape = ((rows, inputs), (rows, outputs), (outputs, hidden))[place]
        _check_matrix(f"{told}: weight_{('ih', 'hh', 'hr')[place]} of cell {cell}", weight, scales[i : i + 1], shape)


def _check_sequence(
    kind: str,
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    weight: torch.Tensor | None,
    states: Sequence[torch.Tensor],
) -> None:
    for name, tensor in (("input", x), *zip(("h0", "c0"), states, strict=False)):
        if not tensor.is_floating_point():
            raise DTypeError(f"a quantized {kind} takes float tensors, got {name} of {tensor.dtype}")
    want = 3 if batch_sizes is None else 2
    given = x.shape[-1] if x.dim() else 0
    inputs = given if weight is None else weight.shape[-1]
    if weight is not None and weight.dtype is torch.uint8:  # two values a byte: the last may be one alone
        inputs = given if (given + 1) // 2 == inputs else 2 * inputs
    if x.dim() != want or given != inputs:
        raise ShapeError(
            f"a quantized {kind} of {inputs} inputs takes {want}-D input whose last dimension is {inputs}, "
            f"got {tuple(x.shape)}"
        )
    batch = x.shape[1] if batch_sizes is None else None
    for name, state in zip(("h0", "c0"), states, strict=False):
        if state.dim() != 3 or (batch is not None and state.shape[1] != batch):
            raise ShapeError(f"a quantized {kind} called with batch {batch} got {name} of shape {tuple(state.shape)}")
    if states[0].shape[0] == 0 or states[0].shape[:2] != states[-1].shape[:2]:
        shapes = " and ".join(str(tuple(state.shape)) for state in states)
        raise ShapeError(f"a quantized {kind} takes states of the same cells, 1 or more, and batch, got {shapes}")


def _check_matrix(told: str, weight: torch.Tensor, scales: Sequence[torch.Tensor], shape: tuple[int, int]) -> None:
    """Raise DTypeError or ShapeError unless weight and its scale, if it has one, are a matrix of this shape."""
    (rows, columns), scale = shape, scales[0] if scales else None
    kind, dtype = SCHEMES.get(weight.dtype, ""), None if scale is None else scale.dtype
    if not kind or (kind == "int4" and dtype is not torch.bfloat16):
        known = ", ".join(map(str, SCHEMES))
        raise DTypeError(
            f"{told} takes one of {known}, where uint8 has a scale of torch.bfloat16, got {weight.dtype}"
            f" with a scale of {dtype}"
        )
    sizes = () if scale is None else tuple(scale.shape)
    fits = {
        "float": scale is None or scale.numel() == 0,
        "int": sizes == (rows,),
        "int4": len(sizes) == 2 and sizes[0] == rows and (columns == 0 or group_size_of(columns, sizes[1]) > 0),
    }
    if weight.shape != (rows, (columns + 1) // 2 if kind == "int4" else columns) or not fits[kind]:
        raise ShapeError(
            f"{told} stands for {rows} x {columns} numbers, which {tuple(weight.shape)} of {weight.dtype}"
            f" with {'no scale' if scale is None else f'a scale of shape {sizes}'} are not"
        )


def check_indices(indices: torch.Tensor, operator: str) -> None:
    """Raise DTypeError unless the indices are int32 or int64."""
    if indices.dtype not in (torch.int32, torch.int64):
        raise DTypeError(f"a quantized {operator} takes int32 or int64 indices, got {indices.dtype}")


def product_shape(a: torch.Tensor, b: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of a @ b, or raise ShapeError or DTypeError: both floating point, of one dtype."""
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise DTypeError(f"a product of two activations takes floats of one dtype, got {a.dtype} and {b.dtype}")
    if not a.dim() or not b.dim() or a.shape[-1] != b.shape[-2 if b.dim() > 1 else 0]:
        raise ShapeError(f"no product of shapes {tuple(a.shape)} and {tuple(b.shape)}: (..., M, K) and (..., K, N)")
    rows, columns = a.shape[-2:-1], b.shape[-1:] if b.dim() > 1 else ()
    return (*broadcast("product", a.shape[:-2], b.shape[:-2]), *rows, *columns)


def attention_shape(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> tuple[int, ...]:
    """Return the shape of what attention gives, or raise ShapeError or DTypeError."""
    operands = (query, key, value)
    if not query.is_floating_point() or len({x.dtype for x in operands}) > 1:
        raise DTypeError(f"attention takes floats of one dtype, got {', '.join(str(x.dtype) for x in operands)}")
    shapes = [tuple(x.shape) for x in operands]
    if min(map(len, shapes)) < 2 or query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise ShapeError(
            "attention takes query (..., L, E), key (..., S, E) and value (..., S, O), "
            f"got {', '.join(map(str, shapes))}"
        )
    outer = broadcast("attention", *(x.shape[:-2] for x in operands))
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise DTypeError(f"an attention mask is bool or floating point, got {mask.dtype}; call mask.bool()")
        scores = (*outer, query.shape[-2], key.shape[-2])
        if broadcast("attention and its mask", scores, mask.shape) != scores:
            raise ShapeError(f"attention's mask must expand to {scores}, got {tuple(mask.shape)}")
    return (*outer, query.shape[-2], value.shape[-1])


def broadcast(told: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that shapes broadcast to, or raise ShapeError."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ShapeError(f"no {told} of {' and '.join(str(tuple(shape)) for shape in shapes)}: {error}") from None


def _is_laid_out_as_query(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> bool:
    """Return whether torch's attention on the CPU gives its result the query's strides: where its fused kernel runs.

    Elsewhere it writes the products out and the result is contiguous. The conditions are those of torch's
    aten/src/ATen/native/transformers/sdp_utils_cpp.cpp.
    """
    if not query.dim() == key.dim() == value.dim() == 4:
        return False
    q, k, v = query.shape, key.shape, value.shape
    return (
        q[0] == k[0] == v[0]
        and q[1] == k[1] == v[1]
        and q[3] == v[3]
        and q[2] > 0
        and k[2] > 0
        and query.stride(3) == key.stride(3) == value.stride(3) == 1
        and (mask is None or (mask.dim() in (2, 4) and not mask.requires_grad))
    )


def lay_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, attended: torch.Tensor
) -> torch.Tensor:
    """Return attended, (..., L, O), in query's dtype and with the strides that torch gives it: a later view() counts.

    A copy, unless it has both already.
    """
    if not _is_laid_out_as_query(query, key, value, mask):
        return attended.to(query.dtype).reshape(-1).view(attended.shape)  # sizes of 1 get torch's strides too
    if attended.dtype == query.dtype and attended.stride() == query.stride():
        return attended
    return torch.empty_like(query).copy_(attended)


def _fake_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a.new_empty(product_shape(a, b))


def _fake_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    shape = attention_shape(query, key, value, mask)
    return torch.empty_like(query) if _is_laid_out_as_query(query, key, value, mask) else query.new_empty(shape)


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
    check_linear(x, weight, in_features, qmax)
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
    check_recurrent("LSTM", x, batch_sizes, (h0, c0), weights, scales, biases, (), bidirectional, qmax)
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
    parts = (weights, scales, biases, hidden_biases)
    check_recurrent(rnn_kind(mode), x, batch_sizes, (h0,), *parts, bidirectional, qmax)
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
    "matmul": _fake_matmul,
    "attention": _fake_attention,
}

for _name, _schema in SCHEMAS.items():
    LIBRARY.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fxquant::{_name}", _FAKES[_name], lib=LIBRARY)
