"""Linear interpolation of integer values, which keep their scale: a mean of neighbours lies between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxquant.errors import ShapeError
from fxquant.ops.register import public
from fxquant.ops.values import as_it_lies, check_value, layout, register_value


@public
def resize_value(
    x: torch.Tensor,
    size: int | Sequence[int] | None = None,
    factors: Sequence[float] | None = None,
    align_corners: bool = False,
) -> torch.Tensor:
    """Return a uint8 value interpolated linearly to a size, or by factors, along each dimension after the second.

    size: an int is that of each dimension. Raises ShapeError where there are not as many sizes or factors.
    x: (B, C, ...) uint8 -> (B, C, *size) uint8, in x's memory format. Positions are those of F.interpolate;
    x0 (1 - w) + x1 w in single float32 operations, the last dimension first, then rounded half to even.
    """
    sizes = size if size is None or isinstance(size, (list, tuple)) else (size,) * (x.dim() - 2)
    return _resize((x, sizes, factors, align_corners))


def _sizes(a: Any) -> list[Any]:
    if a.size is not None:
        return list(a.size)
    return [torch.sym_int(n * factor) for n, factor in zip(a.x.shape[2:], a.factors, strict=True)]  # type: ignore[no-untyped-call]


def _resize_reference(a: Any) -> torch.Tensor:
    y: torch.Tensor = a.x.to(torch.float32)
    for at, size in reversed(list(enumerate(_sizes(a)))):
        dim, length = at + 2, a.x.shape[at + 2]
        step = length / size if a.factors is None else 1.0 / a.factors[at]
        place = torch.arange(size, dtype=torch.float64, device=y.device)
        if a.align_corners:
            place = place * ((length - 1) / max(size - 1, 1))
        else:
            place = place.add(0.5).mul(step).sub(0.5).clamp_(min=0.0)
        first = place.floor().clamp_(max=length - 1)
        share = (place - first).to(torch.float32).view(-1, *[1] * (y.dim() - dim - 1))
        before = first.to(torch.int64)
        after = before.add(1).clamp_(max=length - 1)
        y = y.index_select(dim, before).mul_(1.0 - share) + y.index_select(dim, after).mul_(share)
    rounded: torch.Tensor = y.round_().to(torch.uint8).contiguous(memory_format=layout(a.x))
    return rounded


def _check_resize(a: Any) -> None:
    check_value("resize_value", a.x)
    given = a.factors if a.size is None else a.size
    if given is None or len(given) != a.x.dim() - 2:
        got = f"size={a.size}, factors={a.factors} for {tuple(a.x.shape)}"
        raise ShapeError(f"resize_value takes a size or factors, one for each dimension after the second, got {got}")


_resize = register_value(
    resize_value,
    "(Tensor x, SymInt[]? size=None, float[]? factors=None, bool align_corners=False) -> Tensor",
    _resize_reference,
    _check_resize,
    lambda a: a.x.new_empty((*a.x.shape[:2], *_sizes(a))).contiguous(memory_format=layout(a.x)),
    as_it_lies,
)
