"""The quantization arithmetic: scales, zero points, rounding, packing. docs/numerics.md has the equations.

Sources: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference" (affine scheme with an exact zero); gemmlowp, doc/quantization.md (nudged zero point); torch.ao's
`_choose_qparams` (symmetric scale over half the steps). Every float operation here is a single IEEE float32
operation in a stated order, never fused, so that each kernel and each device can give the same bits.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fxquant.formats import FLOAT32, INT16_MAX, Format
from fxquant.spec import TensorSpec

FLOAT32_MAX = torch.finfo(torch.float32).max
MAX_COLUMNS = (2**31 - 1) // (255 * 128)  # the int32 sum of this many products of a uint8 and an int8 cannot overflow
_VALUES_AT_ONCE = 1 << 16  # float copies of a whole layer would take most of the memory during conversion
RANGE_SHARES = tuple(1 - step / 32 for step in range(15))  # of a full range: a narrower one has finer steps
FLOAT32_TINY = torch.finfo(torch.float32).tiny  # the least normal number: below it 1 / scale overflows


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A tensor's numbers in a format: x ≈ (integers - zero_point) * scale, or the stored floats themselves.

    values: (N, ..., format.stored_columns(columns)), what format.pack gives. scale: (N,), one an index of dimension 0,
    or (N, groups of columns); None for floats. zero_point: (N,) float32, or None where it is 0.
    columns: the length of the last dimension. group_size: how many columns share a scale; 0: all of an output channel.
    """

    format: Format
    values: torch.Tensor
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    columns: int
    group_size: int = 0

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What is stored: values, scale and zero point."""
        return self.values, self.scale, self.zero_point

    def __iter__(self) -> Iterator[torch.Tensor | None]:
        """Yield what is stored, so that an operator's own code may say `values, scale, zero_point = quantized`."""
        return iter(self.tensors)


def quantize_tokens(
    x: torch.Tensor, qmax: int, per_token: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (q, scale, zero_point) of an activation, measured from its values. docs/numerics.md, "Activations".

    x: (M, K) float32 -> q: (M, K) float32 holding whole numbers in [0, qmax]; scale and zero_point: (M, 1) float32
    (one for each token, or the same one for every token when per_token is False).
    A NaN makes the scale of its token NaN; an infinity counts as the largest float32; a token whose scale would be
    below the least normal float32 is all zeros with scale 1.
    """
    if x.shape[0] == 0 or x.shape[1] == 0:
        return x, x.new_ones(x.shape[0], 1), x.new_zeros(x.shape[0], 1)
    low, high = _ends(x, keepdim=True)
    if not per_token:
        low = low.amin(dim=0, keepdim=True).expand(x.shape[0], 1)
        high = high.amax(dim=0, keepdim=True).expand(x.shape[0], 1)
    low = low.clamp(-FLOAT32_MAX, 0.0)  # real 0 must be exact: padding and ReLU produce it
    high = high.clamp(0.0, FLOAT32_MAX)
    scale = divided(high * 0.5 - low * 0.5, qmax * 0.5)  # halves: the widest range does not overflow
    scale = torch.where(scale < FLOAT32_TINY, 1.0, scale)
    inverse = 1.0 / scale
    zero_point = (low * -inverse).round_().clamp_(0, qmax)
    q = (x * inverse).round_().add_(zero_point).clamp_(0, qmax)
    return q.nan_to_num_(nan=0.0), scale, zero_point.nan_to_num(nan=0.0)


def divided(x: torch.Tensor, number: float) -> torch.Tensor:
    """Return x / number, rounded once on every device.

    By a tensor: on a GPU torch multiplies with the reciprocal of a Python number, and rounds twice.
    """
    return x / x.new_full((), number)


def _ends(rows: torch.Tensor, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest value of each row; in two passes, for torch does not vectorize aminmax."""
    return rows.amin(1, keepdim), rows.amax(1, keepdim)


def choose_value_qparams(low: torch.Tensor, high: torch.Tensor, qmax: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, zero_point) of a value that spans [low, high]: () float32 and () int32, as for one token.

    low, high: () float32; the range is widened to hold 0. docs/numerics.md, "Static values".
    """
    low, high = low.clamp(-FLOAT32_MAX, 0.0), high.clamp(0.0, FLOAT32_MAX)
    scale = divided(high * 0.5 - low * 0.5, qmax * 0.5)
    scale = torch.where(scale < FLOAT32_TINY, 1.0, scale)
    zero_point = (low * -(1.0 / scale)).round_().clamp_(0, qmax)
    return scale, zero_point.to(torch.int32)


def value_qparams_of(low: float, high: float, qmax: int) -> tuple[float, float, int]:
    """Return (scale, 1 / scale, zero_point) of `choose_value_qparams`, the same bits, from numbers and as numbers.

    A float64 operation on float32 numbers, rounded to float32, is the float32 operation. For training on the CPU,
    where a dozen operators on one number each would take longer than rounding a small value.
    """
    low, high = max(min(low, 0.0), -FLOAT32_MAX), min(max(high, 0.0), FLOAT32_MAX)
    scale = float32(float32(high * 0.5 - low * 0.5) / (qmax * 0.5))
    scale = 1.0 if scale < FLOAT32_TINY else scale
    inverse = float32(1.0 / scale)
    return scale, inverse, max(0, min(qmax, round(float32(low * -inverse))))


def float32(number: float) -> float:
    """Return the nearest float32."""
    return ctypes.c_float(number).value


def quantize_value(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, qmax: int = 255) -> torch.Tensor:
    """Return clamp(round(x (1 / scale)) + zero_point, 0, qmax) as uint8; NaN gives zero_point.

    x: float, of any shape; scale: () float32; zero_point: () int32.
    """
    q = (x.to(torch.float32) * (1.0 / scale)).nan_to_num_(nan=0.0).round_().add_(zero_point)
    return q.clamp_(0, qmax).to(torch.uint8)


def dequantize_value(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """Return (q - zero_point) * scale: uint8 -> float32 of the same shape."""
    return q.to(torch.float32).sub_(zero_point).mul_(scale)


def quantize_tokens_int16(x: torch.Tensor, per_token: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (q, scale) of an activation as int16, measured from its values. docs/numerics.md, "int16 scale".

    x: (M, K) float32 -> q: (M, K) float32 holding whole numbers in [-32767, 32767]; scale: (M, 1) float32. NaN,
    infinities, tokens too small and per_token as in `quantize_tokens`; there is no zero point.
    """
    if x.shape[0] == 0 or x.shape[1] == 0:
        return x, x.new_ones(x.shape[0], 1)
    low, high = _ends(x, keepdim=True)
    largest = torch.maximum(-low, high)
    if not per_token:
        largest = largest.amax(dim=0, keepdim=True).expand(x.shape[0], 1)
    scale = divided(largest.clamp(max=FLOAT32_MAX), INT16_MAX)
    scale = torch.where(scale < FLOAT32_TINY, 1.0, scale)
    q = (x * (1.0 / scale)).round_().clamp_(-INT16_MAX, INT16_MAX)
    return q.nan_to_num_(nan=0.0), scale


def choose_qparams(low: torch.Tensor, high: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scale, zero_point) for weights that span [low, high]. docs/numerics.md, "Weights".

    low, high: (N,) float32, one a channel or one for all -> scale, zero_point: (N,) float32; for groups all of them (N,
    groups), the scale of the format's dtype. Groups: scale = e / qmin, where e is whichever of low and high is farther
    from 0; the scale is negative where e is positive, so that e becomes qmin and all integers (16 in [-8, 7]) are used.
    docs/numerics.md, "group". Symmetric: scale = max(|low|, |high|) / steps, zero_point 0. Affine (embedding
    rows): scale = (high - low) / steps and the real- valued zero_point = -low / scale of torch.ao's float_qparams
    scheme. A range of 0 gives scale 1 (the symmetric case) or the constant itself (the affine case), so that a constant
    is exact.
    """
    if spec.axis == "group":
        scale = divided(torch.where(high > -low, high, low), spec.qmin)
        return torch.where(scale.abs() < FLOAT32_TINY, 1.0, scale).to(spec.format.scale), torch.zeros_like(scale)
    if spec.symmetric:
        scale = divided(torch.maximum(low.abs(), high.abs()), spec.scale_steps or spec.qmax)
        return torch.where(scale < FLOAT32_TINY, 1.0, scale), torch.zeros_like(scale)
    scale = divided(high * 0.5 - low * 0.5, (spec.scale_steps or spec.qmax - spec.qmin) * 0.5)
    flat = scale < FLOAT32_TINY
    # A constant output channel c: q = 0 and (0 - zero_point) * scale = c with scale |c|, zero_point -sign(c).
    constant = torch.where(low.abs() < FLOAT32_TINY, 0.0, low)
    scale = torch.where(flat, torch.where(constant == 0, 1.0, constant.abs()), scale)
    return scale, torch.where(flat, -constant.sign(), -low / scale)


def quantize_with(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, spec: TensorSpec
) -> torch.Tensor:
    """Return the integers of a weight under given qparams: clamp(round(w (1 / scale) + zero_point), qmin, qmax).

    weight: (N, ...) float32; scale, zero_point: as `choose_qparams` gives them -> (N, ...) as the format stores them.
    """
    channels, group_size, weight_format = weight.shape[0], spec.group_size or 0, spec.format
    # as torch.ao: a division rounds otherwise where w / scale is near 127.5
    inverse = 1.0 / scale.to(torch.float32)
    shape = (*weight.shape[:-1], weight_format.stored_columns(weight.shape[-1]))
    q = torch.empty(shape, dtype=weight_format.storage, device=weight.device)
    at_once = max(1, _VALUES_AT_ONCE // max(1, math.prod(weight.shape[1:])))
    qparams = (part.expand(channels, *part.shape[1:]) for part in (inverse, zero_point))
    parts = (torch.split(part, at_once) for part in (q, weight, *qparams))
    for out, values, factor, offset in zip(*parts, strict=True):
        real = values * spread(factor, values.shape, group_size)
        real.add_(spread(offset, values.shape, group_size)).round_().clamp_(spec.qmin, spec.qmax)
        out.copy_(weight_format.pack(real))
    return q


def spread(numbers: torch.Tensor, shape: torch.Size, group_size: int) -> torch.Tensor:
    """Return one number a channel, or one a group of columns, in a shape that broadcasts with the weight."""
    if not group_size:
        return numbers.view((-1,) + (1,) * (len(shape) - 1))
    return numbers.repeat_interleave(group_size, dim=1)[:, : shape[1]]


def to_floats(weight: torch.Tensor, weight_format: Format) -> QuantizedTensor:
    """Return a weight in a format of floats; values beyond its range become its largest (float16: ±65504)."""
    real = weight.detach().to(torch.float32)
    if weight_format is not FLOAT32:
        largest = torch.finfo(weight_format.storage).max
        real = real.clamp(-largest, largest).to(weight_format.storage)
    return QuantizedTensor(weight_format, real, None, None, weight.shape[-1])


def weight_range(weight: torch.Tensor, spec: TensorSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the least and the greatest value, one pair for each index of dimension 0 (equal ones for axis "tensor").

    weight: (N, ...) float32 -> two (N,) float32; zeros where there is nothing to measure. For axis "group", weight:
    (N, K) -> two (N, ceil(K / group_size)), one pair a group of columns, 0 included.
    """
    if spec.group_size is not None:
        groups = split_groups(weight, spec.group_size)
        return groups.amin(dim=2), groups.amax(dim=2)
    rows = weight.reshape(weight.shape[0], -1) if weight.numel() else weight.new_zeros(weight.shape[0], 1)
    if rows.shape[0] == 0:
        return rows.new_zeros(0), rows.new_zeros(0)
    low, high = _ends(rows)
    if spec.axis == "tensor":
        low, high = low.amin().expand_as(low), high.amax().expand_as(high)
    return low, high


def split_groups(weight: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the columns of (N, K) in groups, the last filled up with zeros: (N, ceil(K / group_size), group_size)."""
    rows, columns = weight.shape
    return F.pad(weight, (0, -columns % group_size)).view(rows, (columns + group_size - 1) // group_size, group_size)


def dequantize(weight: QuantizedTensor) -> torch.Tensor:
    """Return the float32 tensor that the integers stand for."""
    real = weight.format.unpack(weight.values, weight.columns).to(torch.float32)
    if weight.zero_point is not None:
        real = real - spread(weight.zero_point, real.shape, 0)
    if weight.scale is None:
        return real
    return real * spread(weight.scale.to(torch.float32), real.shape, weight.group_size)
