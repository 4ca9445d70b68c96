"""The operators on the native CPU kernels (csrc/), with the signatures and, to the bit, the results of `reference`.

The library keeps nothing: every call passes addresses of plain tensors. So there is nothing to pack, cache or save, and
calls from several threads are independent. FXQUANT_NATIVE=0 switches it off; FXQUANT_ISA=amx, avx512_vnni, avx_vnni,
avx2, neon_dot or portable forces an instruction set. Both are read once, at import.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fxquant.errors import DTypeError, ShapeError
from fxquant.ops import reference, reference_recurrent
from fxquant.ops.output_pool import OutputPool, limit_from_environment

_INTERFACE = 3  # what module.c says it is: a library left from another version is not called
_BAD_INDEX, _BAD_OFFSETS = -2, -3
_MODES = {"sum": 0, "mean": 1, "max": 2}
_RECURRENT = {"lstm": (0, 4), "gru": (1, 3), "rnn_tanh": (2, 1), "rnn_relu": (3, 1)}  # number in fxquant.h, gates


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


_library, _why = _load()
if _library is not None:
    _why = _choose_isa(_library)
    _library.set_dtypes(torch.float32, torch.int8)
output_pool = OutputPool(limit_from_environment(), _library.use_huge_pages if _library is not None else lambda *_: None)


def available() -> bool:
    """Return whether the native library is loaded."""
    return _library is not None


def kernel_info() -> KernelInfo:
    """Return which library, instruction set and threads run the quantized operators, and why not better ones."""
    threads = torch.get_num_threads()
    if _library is None:
        return KernelInfo(None, None, threads, _why)
    return KernelInfo(_library.__file__, _library.active_isa(), threads, _why)


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether the library computes with these tensors: strided ones on the CPU, and weights of integers."""
    return (
        _library is not None
        and x.is_cpu
        and weight.is_cpu
        and weight.dtype is not torch.float16
        and x.layout is torch.strided
    )


def _floats(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor, or a copy, dense and in float32."""
    if tensor.dtype is not torch.float32:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _vector(name: str, vector: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return a scale or bias as dense floats, or raise ShapeError: the kernels read `count` of them."""
    if vector is None or vector.numel() != count:
        given = "none" if vector is None else tuple(vector.shape)
        raise ShapeError(f"a quantized operator of {count} rows needs a {name} of shape ({count},), got {given}")
    if vector.dtype is torch.float32 and vector.is_contiguous():  # the common case costs no call
        return vector
    return _floats(vector)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    per_row: bool = True,
    qmax: int = 255,
) -> torch.Tensor:
    """Return x @ dequantize(weight).T + bias, with x quantized row by row: `reference.linear`."""
    outputs, columns = weight.shape
    shape = (*x.shape[:-1], outputs)
    count = x.numel() // columns if columns else math.prod(shape[:-1])
    out = output_pool.empty(shape, 4 * count * outputs)
    rest = (out, count, columns, outputs, relu, per_row, qmax, torch.get_num_threads())
    if not _library.linear(x, weight, scale, bias, *rest):  # something is not dense, or not float32
        dense_bias = None if bias is None else _vector("bias", bias, outputs)
        dense = (_floats(x), weight.contiguous(), _vector("scale", scale, outputs), dense_bias)
        if not _library.linear(*dense, *rest):
            raise DTypeError(f"a quantized linear takes a weight of torch.int8 or float16, got {weight.dtype}")
    return out if x.dtype is torch.float32 else out.to(x.dtype)


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
    c = _floats(c0.clone())
    parts = (weights, scales, biases, ())
    output, h = _recurrent("lstm", x, batch_sizes, h0, c, parts, bidirectional, per_row, qmax)
    return output, h, c if x.dtype is torch.float32 else c.to(x.dtype)


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
    parts = (weights, scales, biases, hidden_biases)
    if x.numel() == 0 or h0.numel() == 0:
        return reference_recurrent.rnn(x, batch_sizes, h0, *parts, mode, bidirectional, per_row, qmax)
    return _recurrent(mode, x, batch_sizes, h0, None, parts, bidirectional, per_row, qmax)


_Parts: TypeAlias = tuple[
    Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor], Sequence[torch.Tensor]
]


def _recurrent(
    mode: str,
    x: torch.Tensor,
    batch_sizes: torch.Tensor | None,
    h0: torch.Tensor,
    c: torch.Tensor | None,
    parts: _Parts,
    bidirectional: bool,
    per_row: bool,
    qmax: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (output, h) in x's dtype; c, dense floats, is advanced in place."""
    cells, batch, outputs = h0.shape
    hidden, directions = outputs if c is None else c.shape[2], 2 if bidirectional else 1
    inputs = x.shape[-1]
    number, gates = _RECURRENT[mode]
    if c is not None and c.shape != (cells, batch, hidden):
        raise ShapeError(f"a quantized LSTM got h0 of shape {tuple(h0.shape)} and c0 of shape {tuple(c.shape)}")
    addresses, _alive = _cell_addresses(inputs, gates * hidden, hidden, outputs, cells, directions, parts)
    sizes = None if batch_sizes is None else batch_sizes.to(torch.int64).contiguous()
    if sizes is not None:
        _check_sizes(sizes, x.shape[0], batch)
    rows, start = _floats(x), _floats(h0)
    h, out = torch.empty_like(start), torch.empty((*x.shape[:-1], directions * outputs), dtype=torch.float32)
    _library.recurrent(
        number,
        rows.data_ptr(),
        x.shape[0] if sizes is None else sizes.shape[0],
        batch,
        inputs,
        hidden,
        outputs,
        0 if sizes is None else sizes.data_ptr(),
        cells // directions,
        directions,
        *addresses,
        start.data_ptr(),
        h.data_ptr(),
        0 if c is None else c.data_ptr(),
        out.data_ptr(),
        per_row,
        qmax,
        torch.get_num_threads(),
    )
    return (out, h) if x.dtype is torch.float32 else (out.to(x.dtype), h.to(x.dtype))


def _cell_addresses(
    inputs: int, rows: int, hidden: int, outputs: int, cells: int, directions: int, parts: _Parts
) -> tuple[list[tuple[int, ...]], list[list[torch.Tensor]]]:
    """Return the addresses of the weights, scales, biases and hidden biases, and the tensors there that are copies.

    rows: of weight_ih, gates by hidden units. Raises ShapeError where a tensor does not fit.
    """
    counts = _cell_counts(inputs, rows, hidden, outputs, cells, directions, tuple(map(len, parts)))
    addresses, copies = [], []
    for i, (tensors, sizes) in enumerate(zip(parts, counts, strict=True)):
        found = _library.addresses(tensors, sizes, i == 0)
        if found is None:
            copies.append([_dense(i == 0, tensor, size) for tensor, size in zip(tensors, sizes, strict=True)])
            found = _library.addresses(copies[-1], sizes, i == 0)
            if found is None:
                raise DTypeError("a quantized recurrent layer takes weights of torch.int8, or all of float16")
        addresses.append(found)
    return addresses, copies


@functools.lru_cache(maxsize=256)
def _cell_counts(
    inputs: int, rows: int, hidden: int, outputs: int, cells: int, directions: int, given: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """Return how many elements each weight, scale, bias and hidden bias has, or raise ShapeError for their numbers."""
    per_cell = given[0] // cells
    fits = given[0] == given[1] == cells * per_cell and given[2] in (0, cells) and given[3] in (0, cells)
    if per_cell not in (2, 3) or not fits or (per_cell == 2 and outputs != hidden):
        raise ShapeError(
            f"a quantized recurrent layer of {cells} cells, {hidden} hidden units and {outputs} outputs got "
            f"{given[0]} weights, {given[1]} scales, {given[2]} biases and {given[3]} hidden biases"
        )
    weights: list[int] = []
    for cell in range(cells):
        columns = inputs if cell < directions else directions * outputs
        weights += [rows * columns, rows * outputs, outputs * hidden][:per_cell]
    return tuple(weights), (rows, rows, outputs)[:per_cell] * cells, (rows,) * given[2], (hidden,) * given[3]


def _dense(is_weight: bool, tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Return a weight, or a scale or bias as floats, dense; raise ShapeError unless it has `count` elements."""
    if not is_weight:
        return _vector("scale or bias", tensor, count)
    if tensor.numel() != count:
        raise ShapeError(f"a quantized layer needs a weight of {count} elements, got {tuple(tensor.shape)}")
    return tensor.contiguous()


def _check_sizes(sizes: torch.Tensor, rows: int, batch: int) -> None:
    """Raise ShapeError unless the sizes fall from at most `batch` to at least 1 and are `rows` together."""
    given = sizes.tolist()
    falls = all(a >= b for a, b in zip([batch, *given], [*given, 1], strict=True))
    if not falls or sum(given) != rows:
        raise ShapeError(f"packed rows: {rows} rows of a batch of {batch} cannot have batch_sizes {given}")


def _table(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    columns: int,
    bits: int,
) -> tuple[tuple[int, ...], list[torch.Tensor]]:
    """Return what the library is told of a table and indices, and the tensors to keep alive meanwhile."""
    rows = weight.shape[0]
    if weight.dtype not in (torch.int8, torch.uint8):
        raise DTypeError(f"a quantized table holds torch.int8, torch.uint8 or float16, got {weight.dtype}")
    if weight.shape != (rows, (columns + 1) // 2 if bits == 4 else columns):
        raise ShapeError(f"a quantized table of {columns} columns at {bits} bits cannot be {tuple(weight.shape)}")
    scale = _vector("scale", scale, rows)
    if zero_point is not None:
        zero_point = _vector("zero_point", zero_point, rows)
    weight, indices = weight.contiguous(), indices.contiguous()
    told = (
        weight.data_ptr(),
        rows,
        columns,
        bits,
        weight.dtype is torch.int8,
        scale.data_ptr(),
        0 if zero_point is None else zero_point.data_ptr(),
        indices.data_ptr(),
        indices.numel(),
        indices.dtype is torch.int64,
    )
    return told, [tensor for tensor in (weight, indices, scale, zero_point) if tensor is not None]


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
    told, _alive = _table(indices, weight, scale, zero_point, embedding_dim, bits)
    out = torch.empty((*indices.shape, embedding_dim), dtype=torch.float32)
    if _library.embedding(*told, out.data_ptr(), torch.get_num_threads()) == _BAD_INDEX:
        reference.check_range(indices, weight.shape[0])
    return out if dtype is torch.float32 else out.to(dtype)


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
    rows = weight.shape[0]
    told, alive = _table(indices, weight, scale, zero_point, embedding_dim, bits)
    is_known = mode in _MODES and (
        per_sample_weights is None or (mode == "sum" and per_sample_weights.shape == indices.shape)
    )
    has_form = (indices.dim() == 2 and offsets is None) or (
        indices.dim() == 1 and offsets is not None and offsets.dim() == 1
    )
    status = _BAD_OFFSETS
    if is_known and has_form:
        bags = indices.shape[0] if offsets is None else offsets.shape[0] - include_last_offset
        starts = None if offsets is None else offsets.to(torch.int64).contiguous()
        sample_weights = None if per_sample_weights is None else _floats(per_sample_weights)
        out = torch.empty((max(bags, 0), embedding_dim), dtype=torch.float32)
        status = _library.embedding_bag(
            *told,
            0 if starts is None else starts.data_ptr(),
            bags,
            indices.shape[1] if starts is None else 0,
            starts is not None and include_last_offset,
            _MODES[mode],
            0 if sample_weights is None else sample_weights.data_ptr(),
            -1 if padding_idx is None else padding_idx % rows,
            out.data_ptr(),
            torch.get_num_threads(),
        )
    del alive
    if status == 0:
        return out if dtype is torch.float32 else out.to(dtype)
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
