"""The operators on the native CPU kernels (csrc/), with the signatures and, to the bit, the results of `reference`,
of products with float weights to float rounding.

The library keeps nothing: every call passes plain tensors. So there is nothing to pack, cache or save, and calls from
several threads are independent. Its functions give None for what they do not take as it is: tensors that are not dense
(of a linear's input only each row must be), not of their dtypes, or that somebody watches. FXQUANT_NATIVE=0 switches it
off; FXQUANT_ISA=amx, avx512_vnni, avx_vnni, avx2, neon_dot or portable forces an instruction set; FXQUANT_OPENMP=0
keeps it from the threads of torch's OpenMP. They are read once, the first two at import.
"""

from __future__ import annotations

import importlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch

from fxquant.errors import DTypeError, ShapeError
from fxquant.ops import reference, reference_products, reference_recurrent
from fxquant.ops.output_pool import OutputPool, limit_from_environment
from fxquant.ops.schema import lay_out

Tensors: TypeAlias = Sequence[torch.Tensor]

_INTERFACE = 9  # what module.c says it is: a library left from another version is not called
_MOST_DIMENSIONS = 8  # of tensors.h


@dataclass(frozen=True)
class KernelInfo:
    """Which kernels run the quantized operators.

    library: the library's path, None when plain torch does the work; isa: its instruction set; threads: how many
    threads the next call may use; why: why not a better library or instruction set, empty when there is none.
    """

    library: str | None
    isa: str | None
    threads: int
    why: str

    def __str__(self) -> str:
        name = f"{self.isa} kernels" if self.library else "plain torch, no native kernels"
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"fxquant runs on {name}, {threads}" + (f" ({self.why})" if self.why else "")


def _load() -> tuple[Any, str]:
    """Return the library, or None and why; a library that is there but cannot be used is warned about."""
    if os.environ.get("FXQUANT_NATIVE", "1") == "0":
        return None, "FXQUANT_NATIVE=0 switched the native library off"
    try:
        library = importlib.import_module("fxquant._native")
    except ModuleNotFoundError:
        return None, "the native library was not built: pip found no working C compiler"
    except ImportError as error:
        why = f"the native library cannot be loaded: {error}"
    else:
        if getattr(library, "interface", None) == _INTERFACE:
            return library, ""
        why = f"the native library {library.__file__} was built for another version of fxquant; install fxquant again"
    warnings.warn(f"{why}. The quantized operators run in plain torch, much slower.", RuntimeWarning, stacklevel=2)
    return None, why


def _choose_isa(library: Any) -> str:
    """Select FXQUANT_ISA where it is set and possible, and return why not a better instruction set."""
    known: dict[str, str] = dict(library.isas())
    forced = os.environ.get("FXQUANT_ISA", "")
    if forced:
        obstacle = known.get(forced, "there is no such instruction set here; there are " + ", ".join(known))
        if not obstacle and library.select_isa(list(known).index(forced)):
            return f"FXQUANT_ISA={forced}"
        warnings.warn(
            f"FXQUANT_ISA={forced}: {obstacle}. Using {library.active_isa()} instead.", RuntimeWarning, stacklevel=2
        )
    better = list(known)[: list(known).index(library.active_isa())]
    return "; ".join(f"no {name}: {known[name]}" for name in better)


def _introduce_torch(library: Any, exchange: object) -> None:
    """Tell the library what it needs of torch; exchange: the capsule of DLPack's exchange interface, or None."""
    library.set_torch(
        (torch.Tensor, torch.nn.Parameter),
        (torch.float32, torch.int8, torch.uint8, torch.int32, torch.int64, torch.bfloat16, torch.int16, torch.float16),
        (torch.empty, {"dtype": torch.float32, "device": torch.device("cpu")}),
        (output_pool.empty, torch.get_num_threads, torch.is_grad_enabled),
        (
            torch._C._len_torch_dispatch_stack,
            torch._C._len_torch_function_stack,
            torch._C._are_functorch_transforms_active,
            torch._C._get_tracing_state,
        ),
        exchange,
    )


class _NoLibrary:
    """Takes nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


_library, _why = _load()
output_pool = OutputPool(limit_from_environment(), _library.use_huge_pages if _library is not None else lambda *_: None)
if _library is not None:
    _why = _choose_isa(_library)
    _introduce_torch(_library, getattr(torch.Tensor, "__dlpack_c_exchange_api__", None))
at_once: Any = _library if _library is not None else _NoLibrary()
"""The library's functions, called with True and an operator's arguments: a result, or None."""


def available() -> bool:
    """Return whether the native library is loaded."""
    return _library is not None


def kernel_info() -> KernelInfo:
    """Return which library, instruction set and threads run the quantized operators, and why not better ones."""
    threads = torch.get_num_threads()
    if _library is None:
        return KernelInfo(None, None, threads, _why)
    return KernelInfo(_library.__file__, _library.active_isa(), threads, _why)


def takes(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Return whether the library computes with these tensors: strided ones on the CPU."""
    is_here = _library is not None and x.is_cpu and x.layout is torch.strided
    return is_here and all(weight.is_cpu for weight in weights)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy, dense and of no subclass."""
    return tensor.as_subclass(torch.Tensor).resolve_neg().contiguous()


def _floats(tensor: torch.Tensor) -> torch.Tensor:
    return _plain(tensor).to(torch.float32)


def _rows(x: torch.Tensor, columns: int) -> torch.Tensor:
    """Return x as plain floats whose rows are dense: where it can be read as it lies, uncopied."""
    x = x.as_subclass(torch.Tensor).resolve_neg().to(torch.float32)
    is_read = x.dim() <= _MOST_DIMENSIONS and (x.shape[-1] <= 1 or x.stride(-1) == 1)
    return x if is_read else x.reshape(math.prod(x.shape[:-1]), columns).contiguous()


def _vector(name: str, vector: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return a scale or bias as dense floats, or raise ShapeError: the kernels read `count` of them."""
    if vector is None or vector.numel() != count:
        given = "none" if vector is None else tuple(vector.shape)
        raise ShapeError(f"a quantized operator of {count} rows needs a {name} of shape ({count},), got {given}")
    return _floats(vector).reshape(count)


def linear(
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
    """Return x @ dequantize(weight).T + bias, with x quantized row by row: `reference.linear`."""
    outputs = weight.shape[0]
    rows = _rows(x, in_features if group_size else weight.shape[1])
    bias = None if bias is None else _vector("bias", bias, outputs)
    if weight.dtype is not torch.float16:
        scale = _plain(scale) if group_size and scale is not None else _vector("scale", scale, outputs)
    how = (relu, per_row, qmax, group_size, in_features)
    out = _library.linear(False, rows, _plain(weight), scale, bias, *how)
    if out is None and group_size:
        out = reference.linear(rows, weight, scale, bias, *how)  # without columns there is nothing to multiply
    if out is None:
        raise DTypeError(f"a quantized linear takes a weight of torch.int8, int16 or float16, got {weight.dtype}")
    return cast(torch.Tensor, out.view(*x.shape[:-1], outputs).to(x.dtype))


def lstm(
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
    """Return (output, h, c) of a stack of LSTM layers: `reference_recurrent.lstm`."""
    if x.numel() == 0 or h0.numel() == 0 or c0.numel() == 0:
        return reference_recurrent.lstm(x, batch_sizes, h0, c0, weights, scales, biases, bidirectional, per_row, qmax)
    sizes, how = _sizes(batch_sizes, x.shape[0], h0.shape[1]), (bidirectional, per_row, qmax)

    states, parts = (_floats(h0), _floats(c0)), _dense_parts(weights, scales, biases)
    output, h, c = _library.lstm(False, _floats(x), sizes, *states, *parts, *how)
    return output.to(x.dtype), h.to(x.dtype), c.to(x.dtype)


def rnn(
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
    """Return (output, h) of a stack of GRU or plain RNN layers: `reference_recurrent.rnn`."""
    if x.numel() == 0 or h0.numel() == 0:
        operands = (weights, scales, biases, hidden_biases)
        return reference_recurrent.rnn(x, batch_sizes, h0, *operands, mode, bidirectional, per_row, qmax)
    sizes, how = _sizes(batch_sizes, x.shape[0], h0.shape[1]), (bidirectional, per_row, qmax)

    parts = _dense_parts(weights, scales, biases, hidden_biases)
    output, h = _library.rnn(False, _floats(x), sizes, _floats(h0), *parts, mode, *how)
    return output.to(x.dtype), h.to(x.dtype)


def _dense_parts(weights: Tensors, scales: Tensors, *vectors: Tensors) -> list[list[torch.Tensor]]:
    own = [_plain(scale) if scale.dtype is torch.bfloat16 else _floats(scale) for scale in scales]
    return [[_plain(weight) for weight in weights], own, *([_floats(vector) for vector in part] for part in vectors)]


def _sizes(batch_sizes: torch.Tensor | None, rows: int, batch: int) -> torch.Tensor | None:
    """Return the sizes as the library takes them.

    Raises ShapeError unless they fall from at most `batch` to at least 1 and are `rows` together.
    """
    if batch_sizes is None:
        return None
    given = batch_sizes.tolist()
    falls = all(a >= b for a, b in zip([batch, *given], [*given, 1], strict=True))
    if not falls or sum(given) != rows:
        raise ShapeError(f"packed rows: {rows} rows of a batch of {batch} cannot have batch_sizes {given}")
    return _plain(batch_sizes).to(torch.int64)


def _table(
    weight: torch.Tensor, scale: torch.Tensor | None, zero_point: torch.Tensor | None, columns: int, bits: int
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return a table's tensors as the library takes them, or raise DTypeError or ShapeError."""
    rows = weight.shape[0]
    if weight.dtype not in (torch.int8, torch.uint8, torch.float16):
        raise DTypeError(f"a quantized table holds torch.int8, torch.uint8 or float16, got {weight.dtype}")
    if weight.shape != (rows, (columns + 1) // 2 if bits == 4 else columns):
        raise ShapeError(f"a quantized table of {columns} columns at {bits} bits cannot be {tuple(weight.shape)}")
    if weight.dtype is torch.float16:
        return _plain(weight), None, None
    zero_points = None if zero_point is None else _vector("zero_point", zero_point, rows)
    return _plain(weight), _vector("scale", scale, rows), zero_points


def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the rows of a quantized table: `reference.embedding`."""
    table = _table(weight, scale, zero_point, embedding_dim, bits)
    out = _library.embedding(False, _plain(indices).reshape(-1), *table, embedding_dim, bits, torch.float32)
    if out is None:
        reference.check_range(indices, weight.shape[0])
    return cast(torch.Tensor, out.view(*indices.shape, embedding_dim).to(dtype))


def embedding_bag(
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
    """Return a sum, mean or max of a table's rows for each bag: `reference.embedding_bag`, to float rounding."""
    table = _table(weight, scale, zero_point, embedding_dim, bits)
    starts = None if offsets is None else _plain(offsets).to(torch.int64)
    sample_weights = None if per_sample_weights is None else _floats(per_sample_weights)
    how = (starts, mode, sample_weights, include_last_offset, padding_idx, bits, torch.float32)
    out = _library.embedding_bag(False, _plain(indices), *table, embedding_dim, *how)
    if out is not None:
        return cast(torch.Tensor, out.to(dtype))
    return reference.embedding_bag(  # which has the words for what is wrong
        indices,
        weight,
        scale,
        zero_point,
        embedding_dim,
        offsets,
        mode,
        per_sample_weights,
        include_last_offset,
        padding_idx,
        bits,
        dtype,
    )


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b: `reference_products.matmul`, to float rounding."""
    rows, columns = (x.as_subclass(torch.Tensor).resolve_neg().to(torch.float32) for x in (a, b))
    rows, columns = rows.unsqueeze(0) if a.dim() == 1 else rows, columns.unsqueeze(1) if b.dim() == 1 else columns
    out = _library.matmul(False, rows, columns)
    if out is None:  # of more dimensions than the library counts
        return reference_products.matmul(a, b)
    out = out.squeeze(-1) if b.dim() == 1 else out
    return cast(torch.Tensor, (out.squeeze(-1 if b.dim() == 1 else -2) if a.dim() == 1 else out).to(a.dtype))


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax(scale query keyᵀ + mask) value: `reference_products.attention`, to float rounding."""
    parts, outer = reference_products.spread_heads(query, key, value, mask)
    q, k, v, added = (None if x is None else x.as_subclass(torch.Tensor).resolve_neg() for x in parts)
    out = _library.attention(False, q, k, v, added, is_causal, reference_products.scale_of(query, scale))
    heads = out.transpose(1, 2).view(*outer, query.shape[-2], value.shape[-1])
    return lay_out(query, key, value, mask, heads)
