"""The operators in plain torch, for any device: the specification that every kernel is held to, bit for bit.

A result depends on its own row alone, bit for bit, because only two kinds of arithmetic are used: integer sums, which
are exact in any order, and single IEEE float32 operations on one element (+, -, *, /, round), which give the same bits
at every position of a tensor. torch.sigmoid, torch.tanh and fused multiply-adds do not, so they are not used.
Float16 weights are the exception: they go through torch's float matmul, and the kernels, which have an order of their
own (csrc/kernels/generic/floats-inl.h), agree to float rounding.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F

from fxquant.errors import IndexRangeError
from fxquant.numerics import (
    QuantizedTensor,
    dequantize_weight,
    group_size_of,
    quantize_rows,
    quantize_rows_int16,
    unpack_int4,
)

EXACT_COLUMNS = 512  # 512 * 255 * 127 < 2**24: such a float32 sum of products is exact in any order


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
    """Return x @ dequantize(weight).T + bias, with x quantized row by row. docs/numerics.md, "int8 output".

    x: (..., I) float; weight: (O, I) int8, int16 or float16; scale: (O,) float32, None for float16; bias: (O,) or None
    -> (..., O) in x's dtype. per_row False: one scale for all of x. qmax: 255, or 127 for 7-bit activations; of no
    meaning to int16 weights, whose activations are int16 too. docs/numerics.md, "int16 output".
    group_size: 0, or 32, 64 or 128 for int4 weights: (O, ceil(I / 2)) uint8, with in_features I and scale
    (O, ceil(I / group_size)) bfloat16. docs/numerics.md, "int4 output".
    """
    columns = in_features if group_size else weight.shape[1]
    rows = x.reshape(math.prod(x.shape[:-1]), columns).to(torch.float32)
    start = None if bias is None else bias.to(torch.float32)
    if group_size:
        assert scale is not None
        y = project_groups(rows, weight, scale, start, per_row, qmax, group_size)
    else:
        y = project(rows, weight, scale, per_row, qmax)
        if start is not None:
            y += start
    if relu:
        y.relu_()
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def multiply(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    start: torch.Tensor | None,
    per_row: bool,
    qmax: int,
) -> torch.Tensor:
    """Return start + rows @ dequantize(weight).T, whatever the weight's scheme, which its dtype tells.

    rows: (M, K) float32; weight: (N, K) of integers with scale (N,) float32, (N, ceil(K / 2)) uint8 of int4 values with
    scale (N, groups) bfloat16, or (N, K) float16 or float32, whose scale is not looked at; start: (N,), (M, N) or None
    -> (M, N) float32, a new tensor.
    """
    if weight.dtype is torch.uint8:
        assert scale is not None
        group_size = group_size_of(rows.shape[1], scale.shape[1])
        return project_groups(rows, weight, scale, start, per_row, qmax, group_size)
    y = project(rows, weight, None if weight.is_floating_point() else scale, per_row, qmax)
    return y if start is None else y.add_(start)


def project(
    rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, per_row: bool, qmax: int
) -> torch.Tensor:
    """Return rows @ dequantize(weight).T without a bias: (M, K) float32, (N, K) -> (M, N) float32, a new tensor.

    The weight's dtype says how: float16, int16 with int16 activations, int8 with activations in [0, qmax].
    """
    if scale is None:
        return rows @ weight.to(torch.float32).t()
    if weight.dtype == torch.int16:
        q, row_scale = quantize_rows_int16(rows, per_row)
        # Whole numbers are exact in any order for K * 2**30 <= 2**53, far beyond MAX_COLUMNS. An integer 0 has no sign.
        sums = (q.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.int64)
    else:
        q, row_scale, zero_point = quantize_rows(rows, qmax, per_row)
        sums = integer_matmul(q, zero_point, weight)
    return sums.to(torch.float32).mul_(row_scale * scale.to(torch.float32))


def project_groups(
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    start: torch.Tensor | None,
    per_row: bool,
    qmax: int,
    group_size: int,
) -> torch.Tensor:
    """Return start + rows @ dequantize(weight).T for int4 weights: a product a group of columns, added up in order.

    rows: (M, K) float32; weight: (N, ceil(K / 2)) uint8; scale: (N, ceil(K / group_size)); start: (N,), (M, N) or None
    -> (M, N) float32.
    """
    q, row_scale, zero_point = quantize_rows(rows, qmax, per_row)
    values = unpack_int4(weight, rows.shape[1])
    y = rows.new_zeros(rows.shape[0], weight.shape[0]) if start is None else start.expand(rows.shape[0], -1)
    for group in range(scale.shape[1]):
        part = slice(group * group_size, (group + 1) * group_size)
        sums = integer_matmul(q[:, part], zero_point, values[:, part].contiguous()).to(torch.float32)
        product = sums.mul_(row_scale * scale[:, group].to(torch.float32))
        y = product if start is None and group == 0 else product.add_(y)
    return y.clone() if scale.shape[1] == 0 else y


def integer_matmul(q: torch.Tensor, zero_point: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return (q - zero_point) @ weight.T, exactly.

    q: (M, K) float32 of whole numbers 0–255; zero_point: (M, 1) float32; weight: (N, K) int8 -> (M, N) int32.
    """
    rows, columns = q.shape
    # One column: torch._int_mm takes weight.t() of (N, 1) for another layout and gives wrong products (torch 2.13).
    if rows and columns > 1 and weight.shape[0] and q.device.type == "cpu" and has_exact_int_mm():
        # q - 128 fits int8; a last row of ones gives the weights' sums, which turn it back into q - zero_point.
        signed = torch.cat((q - 128.0, q.new_ones(1, columns))).to(torch.int8)
        sums = torch._int_mm(signed, weight.t())
        return sums[:-1] + (128.0 - zero_point).to(torch.int32) * sums[-1]
    centred = q - zero_point
    total = torch.zeros(rows, weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, columns, EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        total += (centred[:, part] @ weight[:, part].to(torch.float32).t()).to(torch.int32)
    return total


@functools.cache
def has_exact_int_mm() -> bool:
    """Whether this CPU's torch._int_mm is there and exact: without VNNI instructions such kernels may saturate."""
    weight = torch.full((48, 96), 127, dtype=torch.int8)
    for rows in (2, 5, 40):
        for value in (127, -128):
            try:
                sums = torch._int_mm(torch.full((rows, 96), value, dtype=torch.int8), weight.t())
            except (AttributeError, RuntimeError):
                return False
            if not bool((sums == 96 * 127 * value).all()):
                return False
    return True


_LOG2E = 1.4426950408889634
_LN2_HIGH = 0.693359375  # 10 significant bits: n * _LN2_HIGH is exact
_LN2_LOW = -2.1219444e-4
_SERIES = (
    1 / 5040,
    1 / 720,
    1 / 120,
    1 / 24,
    1 / 6,
    1 / 2,
)  # the Taylor series of (exp(r) - 1 - r) / r², highest first


def expm1_(x: torch.Tensor) -> torch.Tensor:
    """Return exp(x) - 1 in place, for x clamped to ±43; relative error below 4e-7. NaN stays NaN.

    x = n ln 2 + r with whole n and |r| ≤ ln 2 / 2 (Cody and Waite's two-part reduction); then
    exp(x) - 1 = 2ⁿ (exp(r) - 1) + (2ⁿ - 1). ±43 keeps a product of two results finite.
    """
    x.clamp_(-43.0, 43.0)
    n = (x * _LOG2E).round_()
    r = x.sub_(n * _LN2_HIGH).sub_(n * _LN2_LOW)
    p = r * _SERIES[0]
    for coefficient in _SERIES[1:-1]:
        p.add_(coefficient).mul_(r)
    p.add_(_SERIES[-1]).mul_(r * r).add_(r)
    power = (
        n.nan_to_num_(nan=0.0).to(torch.int32).add_(127).bitwise_left_shift_(23).view(torch.float32)
    )  # 2ⁿ, by its bits
    return x.copy_(p.mul_(power).add_(power - 1.0))


def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return the rows of a quantized table: (weight[i] - zero_point[i]) * scale[i]. docs/numerics.md, "embedding".

    indices: any shape, int32 or int64; weight: (V, D) int8, uint8 or float16, or (V, ceil(D / 2)) uint8 with bits=4;
    scale, zero_point: (V,) float32 or None -> (*indices.shape, D) of `dtype`.
    """
    check_range(indices, weight.shape[0])
    flat = indices.reshape(-1)
    parts = QuantizedTensor(weight[flat], *(None if part is None else part[flat] for part in (scale, zero_point)))
    rows = dequantize_weight(parts, bits, embedding_dim)
    return rows.to(dtype).reshape(*indices.shape, embedding_dim)


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
    """Return a sum, mean or max of a quantized table's rows for each bag, as torch.nn.functional.embedding_bag does.

    indices: (B, N), or (N,) with offsets (B,) or, with include_last_offset, (B + 1,); per_sample_weights: like indices,
    mode "sum" only; table arguments as in `embedding` -> (B, D) of `dtype`.
    """
    rows = embedding(indices.reshape(-1), weight, scale, zero_point, embedding_dim, bits)
    places = torch.arange(rows.shape[0], device=indices.device, dtype=indices.dtype).reshape(indices.shape)
    padding = None
    if padding_idx is not None:  # every padded place points at one extra row, which embedding_bag then leaves out
        padding = rows.shape[0]
        places = torch.where(indices == padding_idx % weight.shape[0], padding, places)
        rows = torch.cat((rows, rows.new_zeros(1, embedding_dim)))
    if per_sample_weights is not None:
        per_sample_weights = per_sample_weights.to(torch.float32)
    if offsets is not None:
        offsets = offsets.to(indices.dtype)
    bags = F.embedding_bag(
        places,
        rows,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding,
    )
    return bags.to(dtype)


def check_range(indices: torch.Tensor, rows: int) -> None:
    """Raise IndexRangeError unless every index lies in [0, rows)."""
    if indices.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(indices))
    if low < 0 or high >= rows:
        raise IndexRangeError(f"a quantized table of {rows} rows got indices from {low} to {high}")
