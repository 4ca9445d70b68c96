"""The operator linear: a product of activations, quantized as it runs, and a quantized weight.

Its reference, in plain torch for any device, is the specification that every kernel is held to, bit for bit. A result
depends on its own token alone, to the bit, because only two sorts of arithmetic are used: integer sums, which are exact
in any order, and single IEEE float32 operations on one element (+, -, *, /, round), which give the same bits at every
position of a tensor. torch.sigmoid, torch.tanh and fused multiply-adds do not give that, so they are not used. Float16
weights are the exception: they go through torch's float matmul, and the kernels, which have an order of their own
(csrc/kernels/generic/floats-inl.h), agree to float rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fxquant.errors import DTypeError, ModelStateError, ShapeError
from fxquant.formats import FLOAT32, FORMATS, Activation, format_of
from fxquant.numerics import QuantizedTensor, dequantize, quantize_tokens, quantize_tokens_int16
from fxquant.ops.gpu import OnGpu
from fxquant.ops.library import bare, plain, vector
from fxquant.ops.register import Gradient, Kernel, arguments_of, per_token_of, public
from fxquant.ops.weights import check_format, check_matrix, check_qmax, prepare_scale

_FORMATS = tuple(known for known in FORMATS if known.activation is not None and known is not FLOAT32)
_MOST_DIMENSIONS = 8  # of csrc/calls/tensors.h
EXACT_COLUMNS = 512  # 512 * 255 * 127 < 2**24: such a float32 sum of products is exact in any order


@public
def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    relu: bool = False,
    per_token: bool = True,
    qmax: int = 255,
    format: str = "int8",
    group_size: int = 0,
    in_features: int = 0,
    *,
    per_row: bool | None = None,
) -> torch.Tensor:
    """Return x @ dequantize(weight).T + bias, with x quantized token by token. docs/numerics.md, "int8 output".

    x: (..., I) float; weight: (O, I), as the format of this name (`fxquant.formats`) stores it; scale: (O,) float32,
    None for floats; bias: (O,) or None -> (..., O) in x's dtype, or in that which F.linear gives under torch.autocast.
    per_token False: one scale for all of x; per_row: its old name. qmax: 255, or 127 for 7-bit activations; ignored for
    weights whose activations have 16 bits, as the format says. group_size: how many columns share a scale, which is
    (O, ceil(I / group_size)) bfloat16, with in_features I; 0: all of them. docs/numerics.md, "group output".
    """
    per_token = per_token if per_row is None else per_token_of(per_row)
    return _run((x, weight, scale, bias, relu, per_token, qmax, format, group_size, in_features))


def _weight(a: Any) -> QuantizedTensor:
    return QuantizedTensor(
        format_of(a.format), a.weight, a.scale, None, a.in_features or a.weight.shape[1], a.group_size
    )


def _reference(a: Any) -> torch.Tensor:
    weight = _weight(a)
    rows = a.x.reshape(math.prod(a.x.shape[:-1]), weight.columns).to(torch.float32)
    y = multiply(rows, weight, None if a.bias is None else a.bias.to(torch.float32), a.per_token, a.qmax)
    if a.relu:
        y.relu_()
    return y.to(a.x.dtype).reshape(*a.x.shape[:-1], a.weight.shape[0])


def multiply(
    rows: torch.Tensor, weight: QuantizedTensor, start: torch.Tensor | None, per_token: bool, qmax: int
) -> torch.Tensor:
    """Return start + rows @ dequantize(weight).T: in groups of columns, one product a group, added up in order.

    rows: (M, K) float32; weight: (N, K); start: (N,), (M, N) or None -> (M, N) float32, a new tensor.
    """
    if weight.format.activation is Activation.FLOAT:
        product = _float_matmul(rows, dequantize(weight))
        return product if start is None else product.add_(start)
    assert weight.scale is not None
    matmul: Callable[..., torch.Tensor]
    if weight.format.activation is Activation.INT16:
        q, row_scale = quantize_tokens_int16(rows, per_token)
        matmul = _wide_matmul
    else:
        q, row_scale, zero_point = quantize_tokens(rows, qmax, per_token)
        matmul = functools.partial(integer_matmul, zero_point=zero_point)
    values = weight.format.unpack(weight.values, weight.columns)
    scales = (weight.scale if weight.group_size else weight.scale.reshape(-1, 1)).to(torch.float32)
    y, size = start, weight.group_size or max(1, weight.columns)
    for group in range(scales.shape[1]):
        part = slice(group * size, (group + 1) * size)
        sums = matmul(q[:, part], weight=values[:, part].contiguous()).to(torch.float32)
        product = sums.mul_(row_scale * scales[:, group])
        y = product if y is None else product.add_(y)
    if y is None:
        return rows.new_zeros(len(rows), len(values))
    return y if scales.shape[1] else y.expand(len(rows), -1).clone()


def _float_matmul(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return rows @ weight.T of float32: by float64 where torch would round the factors to TF32's 11 bits."""
    if rows.is_cuda and _has_tf32():
        return (rows.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.float32)
    return rows @ weight.t()


def _has_tf32() -> bool:
    """Return whether torch may multiply float32 as TF32 on CUDA devices."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):  # torch 2.9; once that is set, the older name raises
        return bool(matmul.fp32_precision == "tf32")
    return bool(matmul.allow_tf32)


def _wide_matmul(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return q @ weight.T, exactly: (M, K) float32 of whole numbers of 16 bits, (N, K) of such -> (M, N) int64."""
    # Whole numbers are exact in any order for K * 2**30 <= 2**53, far beyond MAX_COLUMNS. An integer 0 has no sign.
    return (q.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.int64)


def integer_matmul(q: torch.Tensor, zero_point: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return (q - zero_point) @ weight.T, exactly.

    q: (M, K) float32 of whole numbers 0–255; zero_point: (M, 1) float32; weight: (N, K) int8 -> (M, N) int32.
    """
    rows, columns = q.shape
    # One column: torch._int_mm takes weight.t() of (N, 1) for another layout and gives wrong products (torch 2.13).
    if rows and columns > 1 and weight.shape[0] and (q.is_cuda or (q.is_cpu and has_exact_int_mm())):
        # q - 128 fits int8; a last row of ones gives the weights' sums, which turn it back into q - zero_point.
        signed = torch.cat((q - 128.0, q.new_ones(1, columns))).to(torch.int8)
        sums = _int_mm_on_gpu(signed, weight) if q.is_cuda else torch._int_mm(signed, weight.t())
        return sums[:-1] + (128.0 - zero_point).to(torch.int32) * sums[-1]
    centred = q - zero_point
    total = torch.zeros(rows, weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, columns, EXACT_COLUMNS):
        part = slice(start, start + EXACT_COLUMNS)
        total += (centred[:, part] @ weight[:, part].to(torch.float32).t()).to(torch.int32)
    return total


def _int_mm_on_gpu(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return q @ weight.T, exactly: (M, K) int8, (N, K) int8 -> (M, N) int32, on a CUDA device."""
    (rows, columns), outputs = q.shape, len(weight)
    filling = -columns % 8  # what torch._int_mm takes there: more than 16 rows, columns and outputs by the eight
    left = F.pad(q, (0, filling, 0, max(0, 17 - rows)))
    right = F.pad(weight, (0, filling, 0, -outputs % 8))
    try:
        return torch._int_mm(left, right.t())[:rows, :outputs]
    except RuntimeError:  # a device, or a build of torch, without products of int8
        return (q.to(torch.float64) @ weight.to(torch.float64).t()).to(torch.int32)


@functools.cache
def has_exact_int_mm() -> bool:
    """Whether torch._int_mm exists and is exact on this CPU: without VNNI instructions such kernels may saturate."""
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
    weight_format = check_format("linear", a.format, _FORMATS)
    if weight_format.activation is Activation.UINT8:
        check_qmax("linear", a.qmax)
    check_matrix("the weight of a quantized linear", _weight(a), a.weight.shape[0])


def _prepare(a: Any) -> tuple[Any, ...]:
    """Return the operands as the library takes them: x where it lies, if its rows are dense."""
    rows, outputs = bare(a.x).to(torch.float32), a.weight.shape[0]
    if a.x.dim() > _MOST_DIMENSIONS or (a.x.shape[-1] > 1 and rows.stride(-1) != 1):
        rows = rows.reshape(math.prod(a.x.shape[:-1]), a.x.shape[-1]).contiguous()
    bias = None if a.bias is None else vector("bias", a.bias, outputs)
    return rows, plain(a.weight), prepare_scale(_weight(a)), bias, *a[4:]


def _keep(ctx: Any, a: Any, output: torch.Tensor) -> None:
    """Keep what the gradient needs: the integers, which the model holds anyway, and a fused ReLU's output."""
    ctx.save_for_backward(a.weight, a.scale, output if a.relu else None)
    ctx.format, ctx.columns, ctx.group_size = a.format, a.x.shape[-1], a.group_size
    ctx.bias_dtype = None if a.bias is None else a.bias.dtype


def _give(ctx: Any, grad: torch.Tensor, needs: dict[str, bool]) -> dict[str, torch.Tensor | None]:
    """Return the gradients of x, (..., I), and of the bias, (O,), in their dtypes, by the straight-through estimator.

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
        real = dequantize(QuantizedTensor(format_of(ctx.format), weight, scale, None, ctx.columns, ctx.group_size))
        wide = torch.promote_types(grad.dtype, torch.float32)
        to_x = (grad.to(wide) @ real.to(wide)).to(grad.dtype)
    if needs["bias"]:
        to_bias = grad.flatten(0, -2).sum(0) if grad.dim() > 1 else grad
        to_bias = to_bias.to(ctx.bias_dtype)
    return {"x": to_x, "bias": to_bias}


def _is_for_triton(a: Any) -> bool:
    """Return whether Triton's kernels compute a product: of integers, and of something."""
    is_usual = a.scale is not None and a.scale.dtype == format_of(a.format).scale
    return is_usual and a.x.numel() > 0 and a.weight.numel() > 0


_LINEAR = Kernel[torch.Tensor](
    name="linear",
    schema="(Tensor x, Tensor weight, Tensor? scale, Tensor? bias=None, bool relu=False, bool per_token=True,"
    " int qmax=255, str format='int8', int group_size=0, int in_features=0) -> Tensor",
    arguments=arguments_of(linear),
    reference=_reference,
    check=_check,
    fake=lambda a: a.x.new_empty((*a.x.shape[:-1], a.weight.shape[0])),
    prepare=_prepare,
    finish=lambda out, a: out.view(*a.x.shape[:-1], a.weight.shape[0]).to(a.x.dtype),
    gradient=Gradient(_keep, _give),
    is_cast=True,
    on_gpu=OnGpu("triton_linear", "linear", _is_for_triton),
    floats=("x", "bias"),
)
_run = _LINEAR.register()
