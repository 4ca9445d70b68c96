"""Static products and values as plain QDQ: DequantizeLinear, the float operator and QuantizeLinear, to be fused."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from onnxscript import ir
from onnxscript import opset21 as op

from fxquant.numerics import FLOAT32_TINY
from fxquant.onnx.graph import Model, cast, constant, ints, number, rank_of, shape_of, to_float, turned

_INT32_MAX = 2**31 - 1


class Grid(NamedTuple):
    """The scale and zero point of a value, as numbers."""

    scale: float
    zero_point: int

    def integer(self, real: float) -> int:
        """Return the integer of a real number, clamped to a byte."""
        return max(0, min(255, round(real / self.scale) + self.zero_point)) if math.isfinite(real) else 255 * (real > 0)

    @property
    def low(self) -> float:
        """The least real number."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """The greatest real number."""
        return (255 - self.zero_point) * self.scale

    def parts(self) -> tuple[Any, Any]:
        """Return scale and zero point as ONNX values."""
        return constant(torch.tensor(self.scale)), constant(torch.tensor(self.zero_point, dtype=torch.uint8))


def grid_of(model: Model, scale: Any, zero_point: Any) -> Grid:
    """Return the grid whose stored tensors these are."""
    return Grid(model.scalar(scale), int(model.scalar(zero_point)))


def real(q: Any, grid: Grid) -> Any:
    """Return what integers stand for."""
    return op.DequantizeLinear(q, *grid.parts())


def to_integers(y: Any, grid: Grid, qmax: int, low: float | None = None, high: float | None = None) -> Any:
    """Return a float value, clamped to [low, high], as integers; the clamp is done on them, where it has an effect."""
    q = op.QuantizeLinear(y, *grid.parts())
    least = 0 if low is None else grid.integer(low)
    most = min(qmax, 255 if high is None else grid.integer(high))
    return q if (least, most) == (0, 255) else op.Clip(q, byte(least), byte(most))


def byte(value: int) -> Any:
    """Return a uint8 scalar as a value."""
    return constant(torch.tensor(value, dtype=torch.uint8))


def clip(y: Any, low: float | None, high: float | None) -> Any:
    """Return a float value clamped."""
    if low == 0.0 and high is None:
        return op.Relu(y)
    bounds = [None if bound is None else number(bound) for bound in (low, high)]
    return y if low is None and high is None else op.Clip(y, *bounds)


def _end(a: Any, y: Any) -> Any:
    """Return a product's float result clamped, or bent by its curve."""
    if a.curve == "leaky_relu":
        return op.LeakyRelu(y, alpha=a.slope)
    if a.curve == "hardswish":
        part = op.Clip(op.Add(y, number(3.0)), number(0.0), number(6.0))
        return op.Mul(op.Mul(y, part), number(1.0 / 6.0))
    return op.Mul(y, op.Sigmoid(y)) if a.curve == "silu" else clip(y, a.low, a.high)


def quantize(model: Model, a: Any) -> Any:
    """Return the integers of a float value."""
    return to_integers(to_float(a.x), grid_of(model, a.scale, a.zero_point), a.qmax)


def dequantize(model: Model, a: Any) -> Any:
    """Return what integers stand for."""
    return real(a.q, grid_of(model, a.scale, a.zero_point))


def lookup(_: Model, a: Any) -> Any:
    """Return table[q]."""
    return op.Gather(a.table, op.Cast(a.q, to=int(ir.DataType.INT32)))


def lookup_channels(model: Model, a: Any) -> Any:
    """Return table[channel, q]."""
    channels = model.tensor(a.table).shape[0]
    first = torch.arange(0, 256 * channels, 256, dtype=torch.int32).view(-1, *[1] * (rank_of(a.q) - 2))
    flat = model.store("flat", [a.table], lambda table: table.reshape(-1))
    return op.Gather(flat, op.Add(op.Cast(a.q, to=int(ir.DataType.INT32)), constant(first)))


def add_values(model: Model, a: Any) -> Any:
    """Return a ± b."""
    return _pair(model, a, op.Sub if a.alpha < 0 else op.Add)


def mul_values(model: Model, a: Any) -> Any:
    """Return a b."""
    return _pair(model, a, op.Mul)


def _pair(model: Model, a: Any, combine: Any) -> Any:
    sides = real(a.a, grid_of(model, a.a_scale, a.a_zero_point)), real(a.b, grid_of(model, a.b_scale, a.b_zero_point))
    return to_integers(combine(*sides), grid_of(model, a.scale, a.zero_point), a.qmax, a.low, a.high)


def pad_value(model: Model, a: Any) -> Any:
    """Return a value padded with its zero point."""
    rank, sides = rank_of(a.x), list(a.pad)
    sides += [0] * (2 * rank - len(sides))
    before, after = sides[::2][::-1], sides[1::2][::-1]
    return op.Pad(a.x, ints(*before, *after), byte(int(model.scalar(a.zero_point))))


def static_linear(model: Model, a: Any) -> Any:
    """Return x @ weight.T + bias + addend: a Gemm of tokens, or exact integer sums where floats are to come out."""
    grid = grid_of(model, a.x_scale, a.x_zero_point)
    if a.scale is None:
        values = turned(a.weight)
        sums = op.MatMulInteger(a.x, values, byte(grid.zero_point))
        return _floats(model, a, sums, grid, 1)
    columns = shape_of(a.weight)[1]
    is_matrix = rank_of(a.x) == 2
    x = a.x if is_matrix else op.Reshape(a.x, ints(-1, columns))
    weight, bias, rest = _operands(model, a, grid, 1)
    product = op.Gemm(real(x, grid), weight, *([] if bias is None else [bias]), transB=1)
    shape = None
    if not is_matrix:
        shape = op.Concat(op.Shape(a.x, end=-1), ints(shape_of(a.weight)[0]), axis=0)
    return _integers(model, a, product if rest is None else op.Add(product, rest), shape)


def static_convolution(model: Model, a: Any) -> Any:
    """Return a convolution + bias + addend; integer sums are exact where floats are to come out."""
    rank, shape = rank_of(a.x), shape_of(a.weight)[2:]
    grid = grid_of(model, a.x_scale, a.x_zero_point)
    options: dict[str, Any] = {
        "kernel_shape": shape,
        "strides": list(a.stride),
        "dilations": list(a.dilation),
        "pads": [*a.padding[::2], *a.padding[1::2]],
        "group": a.groups,
    }
    if a.scale is None and not a.is_transposed:
        sums = op.ConvInteger(a.x, a.weight, byte(grid.zero_point), **options)
        return _floats(model, a, sums, grid, rank - 1)
    weight, bias, rest = _operands(model, a, grid, rank - 1, a.is_transposed, a.groups)
    operands = [real(a.x, grid), weight, *([] if bias is None else [bias])]
    if a.is_transposed:
        y = op.ConvTranspose(*operands, output_padding=list(a.output_padding), **options)
    else:
        y = op.Conv(*operands, **options)
    y = y if rest is None else op.Add(y, rest)
    if a.scale is not None:
        return _integers(model, a, y, None)
    return _end(a, _with_addend(model, a, y))


def _operands(
    model: Model, a: Any, grid: Grid, spread: int, is_transposed: bool = False, groups: int = 1
) -> tuple[Any, Any, Any]:
    """Return (weight, bias, bias that is to be added): the bias as int32 if its numbers fit in, as runtimes fuse it.

    spread: with how many dimensions of size 1 a number an output channel is broadcast, itself included.
    """
    scale = constant(model.tensor(a.weight_scale).to(torch.float32).reshape(-1))
    in_groups = is_transposed and groups > 1
    if in_groups:  # output channels lie along two dimensions then: dequantized by a product
        weight = op.Mul(cast(a.weight, ir.DataType.FLOAT), constant(_group_scale(model, a, groups)))
    else:
        operands = [a.weight, scale]
        if spread == 1:  # a Gemm: ONNX Runtime fuses none whose weight has no zero points
            operands.append(constant(torch.zeros(model.tensor(a.weight_scale).numel(), dtype=torch.int8)))
        weight = op.DequantizeLinear(*operands, axis=1 if is_transposed else 0)
    if a.bias is None:
        return weight, None, None
    steps = model.tensor(a.weight_scale).to(torch.float32).reshape(-1) * grid.scale
    bias = model.tensor(a.bias).detach().to(torch.float32)
    whole = (bias.to(torch.float64) / steps.to(torch.float64)).round()
    if in_groups or bool((whole.abs() > _INT32_MAX / 2).any()):
        return weight, None, constant(bias.view(-1, *[1] * (spread - 1)))
    return weight, op.DequantizeLinear(constant(whole.to(torch.int32)), constant(steps), axis=0), None


def _group_scale(model: Model, a: Any, groups: int) -> torch.Tensor:
    """Return the scales of a transposed convolution's outputs as they lie in its weight, (I, O / groups, 1, ...)."""
    shape, scale = shape_of(a.weight), model.tensor(a.weight_scale).to(torch.float32)
    each = scale.reshape(groups, -1).repeat_interleave(shape[0] // groups, dim=0)
    return each.view(*each.shape, *[1] * (len(shape) - 2))


def _floats(model: Model, a: Any, sums: Any, grid: Grid, spread: int) -> Any:
    """Return what exact int32 sums stand for, with bias and addend, clamped or bent: fxquant's single operations."""
    shape = (-1, *[1] * (spread - 1))
    scale = (model.tensor(a.weight_scale).to(torch.float32) * grid.scale).view(shape)
    y = op.Mul(cast(sums, ir.DataType.FLOAT), constant(scale))
    if a.bias is not None:
        y = op.Add(y, constant(model.tensor(a.bias).detach().to(torch.float32).view(shape)))
    return _end(a, _with_addend(model, a, y))


def _with_addend(model: Model, a: Any, y: Any) -> Any:
    if a.addend is None:
        return y
    return op.Add(y, real(a.addend, grid_of(model, a.addend_scale, a.addend_zero_point)))


def _integers(model: Model, a: Any, y: Any, shape: Any) -> Any:
    """Return a product's integers, with an addend, clamped or bent. shape: that it is to have."""
    grid = grid_of(model, a.scale, a.zero_point)
    if a.addend is not None or a.curve is not None:
        y = _between(model, y, grid, a)
        y = _with_addend(model, a, y if shape is None else op.Reshape(y, shape))
        return to_integers(y if a.curve is None else _end(a, y), grid, a.qmax, a.low, a.high)
    q = to_integers(y, grid, a.qmax, a.low, a.high)
    return q if shape is None else op.Reshape(q, shape)


def _between(model: Model, y: Any, grid: Grid, a: Any) -> Any:
    """Return a product rounded to integers of its own before what follows it, without which no runtime fuses it.

    Their range is the measured one, if it is known, and no wider than where clamping to it changes no result: a product
    below it makes the sum less than the least result, whatever the addend is.
    """
    least, greatest = model.next_range()
    low = max(grid.low, -math.inf if a.low is None else a.low)
    high = min(grid.high, math.inf if a.high is None else a.high)
    if a.curve is not None:
        low, high = _before_curve(grid, a)
    if a.addend is not None:
        addend = grid_of(model, a.addend_scale, a.addend_zero_point)
        low, high = low - addend.high, high - addend.low
    low, high = min(max(low, least), 0.0), max(min(high, greatest), 0.0)
    scale = max((high - low) / 255, FLOAT32_TINY)
    middle = Grid(float(torch.tensor(scale)), max(0, min(255, round(-low / scale))))
    return real(op.QuantizeLinear(y, *middle.parts()), middle)


def _before_curve(grid: Grid, a: Any) -> tuple[float, float]:
    """Return the range beyond which a curve's results are clipped, or change by less than half a step."""
    if a.curve == "hardswish":
        return -3.0, max(grid.high, 3.0)
    if a.curve == "silu":
        low = -1.0
        while low / (1.0 + math.exp(-low)) < -grid.scale / 2:
            low -= 0.25
        return low, grid.high + 0.5  # x - silu(x) is 0.28 at most
    edge = grid.low if a.slope > 0 else grid.high
    return edge / a.slope if a.slope else 0.0, grid.high
