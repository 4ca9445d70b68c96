"""The operator linear: a product of activations, quantized as it runs, and a quantized weight.

Its reference, in plain torch for any device, is the specification that every kernel is held to, bit for bit. A result
depends on its own row alone, bit for bit, because only two kinds of arithmetic are used: integer sums, which are exact
in any order, and single IEEE float32 operations on one element (+, -, *, /, round), which give the same bits at every
position of a tensor. torch.sigmoid, torch.tanh and fused multiply-adds do not, so they are not used. Float16 weights
are the exception: they go through torch's float matmul, and the kernels, which have an order of their own
(csrc/kernels/generic/floats-inl.h), agree to float rounding.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from fxquant.errors import ArgumentError, DTypeError, ModelStateError, ShapeError
from fxquant.formats import INT4, INT8
from fxquant.numerics import QuantizedTensor, dequantize, quantize_rows, quantize_rows_int16
from fxquant.ops.library import bare, plain, vector
from fxquant.ops.register import Gradient, Kernel, arguments_of, public

_MOST_DIMENSIONS = 8  # of csrc/python/tensors.h
EXACT_COLUMNS = 512  # 512 * 255 * 127 < 2**24: such a float32 sum of products is exact in any order


@public
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
    -> (..., O) in x's dtype, or in that which F.linear gives under torch.autocast. per_row False: one scale for all of
    x. qmax: 255, or 127 for 7-bit activations; of no meaning to int16 weights, whose activations are int16 too.
    docs/numerics.md, "int16 output". group_size: 0, or 32, 64 or 128 for int4 weights: (O, ceil(I / 2)) uint8, with
    in_features I and scale (O, ceil(I / group_size)) bfloat16. docs/numerics.md, "int4 output".
    """
    return _run((x, weight, scale, bias, relu, per_row, qmax, group_size, in_features))


def _reference(a: Any) -> torch.Tensor:
    columns = a.in_features if a.group_size else a.weight.shape[1]
    rows = a.x.reshape(math.prod(a.x.shape[:-1]), columns).to(torch.float32)
    start = None if a.bias is None else a.bias.to(torch.float32)
    if a.group_size:
        assert a.scale is not None
        y = project_groups(rows, a.weight, a.scale, start, a.per_row, a.qmax, a.group_size)
    else:
        y = project(rows, a.weight, a.scale, a.per_row, a.qmax)
        if start is not None:
            y += start
    if a.relu:
        y.relu_()
    return y.to(a.x.dtype).reshape(*a.x.shape[:-1], a.weight.shape[0])


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
        group_size = INT4.find_group_size(rows.shape[1], scale.shape[1])
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
    values = INT4.unpack(weight, rows.shape[1])
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


def _check(a: Any) -> None:
    """Raise ShapeError, DTypeError or ArgumentError unless x and the weight go together."""
    inputs = a.in_features or a.weight.shape[1]
    if not a.x.is_floating_point():
        raise DTypeError(f"a quantized linear takes a float tensor, got {a.x.dtype}; call x.float() before it")
    if a.x.dim() == 0 or a.x.shape[-1] != inputs:
        raise ShapeError(
            f"a quantized linear of {inputs} inputs takes x of shape (..., {inputs}), got {tuple(a.x.shape)}"
        )
    if a.weight.dtype in (torch.int8, torch.uint8):
        check_qmax("linear", a.qmax)
    if a.group_size:
        _check_groups(a.weight, a.scale, a.group_size, a.in_features)
    elif a.weight.dtype not in (torch.int8, torch.int16, torch.float16):
        raise DTypeError(f"a quantized linear takes a weight of torch.int8, int16 or float16, got {a.weight.dtype}")


def check_qmax(kind: str, qmax: int) -> None:
    """Raise ArgumentError unless qmax is the greatest integer of activations of 1 to 8 bits."""
    if not 1 <= qmax <= 255:
        raise ArgumentError(f"a quantized {kind} takes qmax from 1 to 255, got {qmax}; 255 is 8 bits, 127 is 7")


def _check_groups(weight: torch.Tensor, scale: torch.Tensor | None, group_size: int, in_features: int) -> None:
    """Raise DTypeError or ShapeError unless weight and scale are those of an int4 linear."""
    if weight.dtype is not torch.uint8 or scale is None or scale.dtype is not torch.bfloat16:
        kinds = f"{weight.dtype} and {None if scale is None else scale.dtype}"
        raise DTypeError(f"an int4 linear takes a weight of torch.uint8 with a scale of torch.bfloat16, got {kinds}")
    outputs, groups = weight.shape[0], -(-in_features // group_size) if group_size in INT4.group_sizes else -1
    if weight.shape != (outputs, (in_features + 1) // 2) or scale.shape != (outputs, groups):
        raise ShapeError(
            f"an int4 linear of {in_features} inputs in groups of {group_size} (32, 64 or 128) takes a weight of shape "
            f"(O, {(in_features + 1) // 2}) and a scale of shape (O, {groups}), got {tuple(weight.shape)} and "
            f"{tuple(scale.shape)}"
        )


def _prepare(a: Any) -> tuple[Any, ...]:
    """Return the operands as the library takes them: x where it lies, if its rows are dense."""
    rows, outputs = bare(a.x).to(torch.float32), a.weight.shape[0]
    if a.x.dim() > _MOST_DIMENSIONS or (a.x.shape[-1] > 1 and rows.stride(-1) != 1):
        rows = rows.reshape(math.prod(a.x.shape[:-1]), a.x.shape[-1]).contiguous()
    scale = a.scale
    if a.weight.dtype is not torch.float16:
        scale = plain(scale) if a.group_size else vector("scale", scale, outputs)
    bias = None if a.bias is None else vector("bias", a.bias, outputs)
    return rows, plain(a.weight), scale, bias, *a[4:]


def _keep(ctx: Any, a: Any, output: torch.Tensor) -> None:
    """Keep what the gradient needs: the integers, which the model holds anyway, and a fused ReLU's output."""
    ctx.save_for_backward(a.weight, a.scale, output if a.relu else None)
    ctx.columns, ctx.group_size = a.x.shape[-1], a.group_size
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype


def _give(ctx: Any, grad: torch.Tensor, needs: dict[str, bool]) -> dict[str, torch.Tensor | None]:
    """Return the gradients of x, (..., I), and of the bias, (O,), in their dtypes: straight through Q and W.

    y = Q(x) Wᵀ + b, with Q the rounding of x and W what the integers stand for: dy/dx is taken as W, as if Q were not
    there (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"); where a ReLU is fused,
    0 where y is. The integers and their scales have no gradient.
    """
    weight, scale, output = ctx.saved_tensors
    if needs["weight"] or needs["scale"]:
        raise ModelStateError(
            "a gradient came back to the weight of a quantized linear: integers and their scales do not train. Train "
            "adapters beside it, to which gradients pass, or train the float model and quantize it afterwards"
        )
    if output is not None:
        grad = torch.where(output > 0, grad, 0.0)
    to_x = to_bias = None
    if needs["x"]:
        row = INT4 if ctx.group_size else INT8
        real = dequantize(QuantizedTensor(row, weight, scale, None, ctx.columns, ctx.group_size))
        wide = torch.promote_types(grad.dtype, torch.float32)
        to_x = (grad.to(wide) @ real.to(wide)).to(grad.dtype)
    if needs["bias"]:
        to_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        to_bias = to_bias.to(ctx.bias_dtype)
    return {"x": to_x, "bias": to_bias}


_LINEAR = Kernel[torch.Tensor](
    name="linear",
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? bias=None, bool relu=False, bool per_row=True,"
    " int qmax=255, int group_size=0, int in_features=0) -> Tensor",
    arguments=arguments_of(linear),
    reference=_reference,
    check=_check,
    fake=lambda a: a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0])),
    prepare=_prepare,
    finish=lambda out, a: out.view(*a.x.shape[:-1], a.weight.shape[0]).to(a.x.dtype),
    gradient=Gradient(_keep, _give),
    is_cast=True,
)
_run = _LINEAR.register()
