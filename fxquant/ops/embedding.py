"""The operators embedding and embedding_bag: rows of a quantized table, and their sums, means or maxima."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxquant.errors import DTypeError, IndexRangeError
from fxquant.formats import FORMATS, format_of
from fxquant.numerics import QuantizedTensor, dequantize
from fxquant.ops.gpu import OnGpu
from fxquant.ops.library import floats, plain, vector
from fxquant.ops.register import Kernel, arguments_of, public
from fxquant.ops.weights import check_format, check_matrix, prepare_scale

_FORMATS = tuple(known for known in FORMATS if known.is_table)


@public
def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    format: str = "int8",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the rows of a quantized table: (weight[i] - zero_point[i]) * scale[i]. docs/numerics.md, "embedding".

    indices: any shape, int32 or int64; weight: (V, D), as the format of this name (`fxquant.formats`) stores it; scale,
    zero_point: (V,) float32 or None -> (*indices.shape, D) of `dtype`.
    """
    return _run_embedding((indices, weight, scale, zero_point, embedding_dim, format, dtype))


@public
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
    format: str = "int8",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return a sum, mean or max of a quantized table's rows for each bag, as torch.nn.functional.embedding_bag does.

    indices: (B, N), or (N,) with offsets (B,) or, with include_last_offset, (B + 1,); per_sample_weights: like indices,
    mode "sum" only; table arguments as in `embedding` -> (B, D) of `dtype`.
    """
    return _run_bag(
        (
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
            format,
            dtype,
        )
    )


def _embed(a: Any) -> torch.Tensor:
    """Return the float32 rows of a table at the indices, flattened."""
    _check_range(a.indices, a.weight.shape[0])
    flat = a.indices.reshape(-1)
    scale, zero_point = (None if part is None else part[flat] for part in (a.scale, a.zero_point))
    return dequantize(QuantizedTensor(format_of(a.format), a.weight[flat], scale, zero_point, a.embedding_dim))


def _reference(a: Any) -> Any:
    return _embed(a).to(a.dtype).reshape(*a.indices.shape, a.embedding_dim)


def _bag_reference(a: Any) -> torch.Tensor:
    rows, indices = _embed(a), a.indices.reshape(-1)
    weights = None if a.per_sample_weights is None else a.per_sample_weights.to(torch.float32)
    _check_bags(a, rows[:, :1], weights)
    starts, lengths = _bags(a)
    counted = None if a.padding_idx is None else indices != a.padding_idx % a.weight.shape[0]
    bags, counts = rows.new_zeros(len(starts), rows.shape[1]), rows.new_zeros(len(starts), 1)
    for k in range(int(lengths.max()) if lengths.numel() else 0):  # in the bags' order, on every device
        at = (starts + k).clamp_(max=max(len(rows) - 1, 0))
        row = rows[at] if weights is None else rows[at] * weights.reshape(-1, 1)[at]
        is_in = (lengths > k) if counted is None else (lengths > k) & counted[at]
        more = torch.where((row > bags) | (counts == 0), row, bags) if a.mode == "max" else bags + row
        bags, counts = torch.where(is_in.unsqueeze(1), more, bags), counts + is_in.unsqueeze(1)
    bags = bags / counts.clamp_(min=1.0) if a.mode == "mean" else bags
    return bags.to(a.dtype)


def _bags(a: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return where each bag begins among the flattened indices, and how many it has."""
    count = a.indices.numel()
    if a.offsets is None:
        bags, width = a.indices.shape
        return torch.arange(bags, device=a.indices.device) * width, a.indices.new_full((bags,), width)
    starts = a.offsets.to(torch.int64)
    ends = torch.cat((starts[1:], starts.new_full((1,), count)))
    bags = len(starts) - a.include_last_offset
    return starts[:bags], (ends - starts)[:bags]


def _check_bags(a: Any, rows: torch.Tensor, weights: torch.Tensor | None) -> None:
    """Raise torch's errors for what cannot be bags, by its own function on a column of the rows."""
    places = torch.arange(len(rows), device=rows.device).reshape(a.indices.shape)
    offsets = None if a.offsets is None else a.offsets.to(places.dtype)
    F.embedding_bag(
        places, rows, offsets, mode=a.mode, per_sample_weights=weights, include_last_offset=a.include_last_offset
    )


def _check_range(indices: torch.Tensor, rows: int) -> None:
    """Raise IndexRangeError unless every index lies in [0, rows)."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= rows:
        raise IndexRangeError(f"a quantized table of {rows} rows got indices from {low} to {high}")


def _check(a: Any, name: str = "embedding") -> None:
    if a.indices.dtype not in (torch.int32, torch.int64):
        raise DTypeError(f"a quantized {name} takes int32 or int64 indices, got {a.indices.dtype}")
    check_format(name, a.format, _FORMATS)


def _fake_bag(a: Any) -> Any:
    bags = a.indices.shape[0] if a.offsets is None else a.offsets.shape[0] - int(a.include_last_offset)
    return a.weight.new_empty((bags, a.embedding_dim), dtype=a.dtype)


def _prepare_embedding(a: Any) -> tuple[Any, ...]:
    weight, scale, zero_point = _prepare_table(a)
    indices = plain(a.indices).reshape(-1)
    return indices, weight, scale, zero_point, a.embedding_dim, a.format, torch.float32


def _prepare_bag(a: Any) -> Any:
    weight, scale, zero_point = _prepare_table(a)
    offsets = None if a.offsets is None else plain(a.offsets).to(torch.int64)
    samples = None if a.per_sample_weights is None else floats(a.per_sample_weights)
    table = a._replace(indices=plain(a.indices), weight=weight, scale=scale, zero_point=zero_point)
    return table._replace(offsets=offsets, per_sample_weights=samples, dtype=torch.float32)


def _prepare_table(a: Any) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return a table's tensors as the library takes them, or raise DTypeError or ShapeError."""
    table = QuantizedTensor(format_of(a.format), a.weight, a.scale, a.zero_point, a.embedding_dim)
    rows = len(a.weight)
    check_matrix("a quantized table", table, rows)
    zero_point = None if a.zero_point is None else vector("zero_point", a.zero_point, rows)
    return plain(a.weight), prepare_scale(table), zero_point


def _is_for_triton(a: Any) -> bool:
    """Return whether Triton's kernel computes a call: of something, with tensors as models have them."""
    _prepare_table(a)  # raises for what does not fit
    is_usual = all(part is None or part.dtype == torch.float32 for part in (a.scale, a.zero_point))
    return is_usual and a.indices.numel() > 0 and a.embedding_dim > 0


def _is_bag_for_triton(a: Any) -> bool:
    """Return whether Triton's kernel computes a call; not what torch has an error for."""
    is_bags = a.indices.dim() == 2 if a.offsets is None else a.indices.dim() == 1 == a.offsets.dim()
    samples = a.per_sample_weights
    is_sum = samples is None or (a.mode == "sum" and samples.shape == a.indices.shape)
    offsets = a.offsets is None or (len(a.offsets) > a.include_last_offset and not a.offsets.is_floating_point())
    return is_bags and is_sum and offsets and a.mode in ("sum", "mean", "max") and _is_for_triton(a)


_EMBEDDING = Kernel[torch.Tensor](
    name="embedding",
    schema="(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, SymInt embedding_dim,"
    " str format='int8', ScalarType dtype=float32) -> Tensor",
    arguments=arguments_of(embedding),
    reference=_reference,
    check=_check,
    fake=lambda a: a.weight.new_empty((*a.indices.shape, a.embedding_dim), dtype=a.dtype),
    prepare=_prepare_embedding,
    finish=lambda out, a: out.view(*a.indices.shape, a.embedding_dim).to(a.dtype),
    on_gpu=OnGpu("triton_embedding", "embedding", _is_for_triton),
    floats=("dtype",),
)
_run_embedding = _EMBEDDING.register()

_EMBEDDING_BAG = Kernel[torch.Tensor](
    name="embedding_bag",
    schema="(Tensor indices, Tensor weight, Tensor? scale, Tensor? zero_point, SymInt embedding_dim,"
    " Tensor? offsets=None, str mode='mean', Tensor? per_sample_weights=None, bool include_last_offset=False,"
    " int? padding_idx=None, str format='int8', ScalarType dtype=float32) -> Tensor",
    arguments=arguments_of(embedding_bag),
    reference=_bag_reference,
    check=lambda a: _check(a, "embedding bag"),
    fake=_fake_bag,
    prepare=_prepare_bag,
    finish=lambda out, a: out.to(a.dtype),
    on_gpu=OnGpu("triton_embedding", "embedding_bag", _is_bag_for_triton),
    floats=("per_sample_weights", "dtype"),
)
_run_bag = _EMBEDDING_BAG.register()
