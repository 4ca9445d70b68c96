"""The operator matmul: a product of two activations in a fixed order of sums; and what attention shares with it.

torch's own products order their sums by the batch and by where a tensor lies in memory. Here each sum runs through the
depth in order, in single operations on one element, so an element depends on its row and its column alone. The kernels
(csrc/kernels/generic/products-inl.h) go through it in the same order by fused multiply-adds, and agree with the
references, in plain torch for any device, to float rounding. docs/numerics.md, "ordered sum".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fxquant.errors import DTypeError, ShapeError
from fxquant.ops.library import bare
from fxquant.ops.register import Gradient, Kernel


class MatmulArguments(NamedTuple):
    """Return a @ b with torch.matmul's shapes, in their dtype. Sums are float64 for float64 operands, else float32."""

    a: torch.Tensor
    b: torch.Tensor


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return (..., M, K) @ (..., K, N), each sum in the order of the depth."""
    sums = a.new_zeros(*broadcast("product", a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    for k in range(a.shape[-1]):
        sums += a[..., k : k + 1] * b[..., k : k + 1, :]
    return sums


def _as_matrices(a: MatmulArguments, dtype: torch.dtype) -> MatmulArguments:
    x, y = (bare(operand).to(dtype) for operand in a)
    return MatmulArguments(x.unsqueeze(0) if x.dim() == 1 else x, y.unsqueeze(1) if y.dim() == 1 else y)


def _as_operands(out: torch.Tensor, a: MatmulArguments) -> torch.Tensor:
    """Return a product of matrices without the dimensions that were added to vectors, in a's dtype."""
    out = out.squeeze(-1) if a.b.dim() == 1 else out
    return (out.squeeze(-1 if a.b.dim() == 1 else -2) if a.a.dim() == 1 else out).to(a.a.dtype)


def _reference(a: MatmulArguments) -> torch.Tensor:
    return _as_operands(matmul(*_as_matrices(a, torch.float64 if a.a.dtype == torch.float64 else torch.float32)), a)


def _prepare(a: MatmulArguments) -> MatmulArguments | None:
    return None if a.a.dtype == torch.float64 else _as_matrices(a, torch.float32)


def _shape(a: MatmulArguments) -> tuple[int, ...]:
    """Return the shape of a @ b, or raise ShapeError or DTypeError: both floating point, of one dtype."""
    x, y = a
    if not x.is_floating_point() or x.dtype != y.dtype:
        raise DTypeError(f"a product of two activations takes floats of one dtype, got {x.dtype} and {y.dtype}")
    if not x.dim() or not y.dim() or x.shape[-1] != y.shape[-2 if y.dim() > 1 else 0]:
        raise ShapeError(f"no product of shapes {tuple(x.shape)} and {tuple(y.shape)}: (..., M, K) and (..., K, N)")
    rows, columns = x.shape[-2:-1], y.shape[-1:] if y.dim() > 1 else ()
    return (*broadcast("product", x.shape[:-2], y.shape[:-2]), *rows, *columns)


def broadcast(name: str, *shapes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that shapes broadcast to, or raise ShapeError."""
    try:
        return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        raise ShapeError(f"no {name} of {' and '.join(str(tuple(shape)) for shape in shapes)}: {error}") from None


def _keep(ctx: Any, a: MatmulArguments, _: torch.Tensor) -> None:
    ctx.save_for_backward(*a)


def _give(ctx: Any, gradient: torch.Tensor, needs: dict[str, bool]) -> dict[str, torch.Tensor | None]:
    return gradients(ctx, gradient, needs, lambda a, b: a @ b)


def gradients(
    ctx: Any, gradient: torch.Tensor, needs: dict[str, bool], run: Callable[..., torch.Tensor]
) -> dict[str, torch.Tensor | None]:
    """Return the gradients of torch's own function at the saved operands: nearly the same values.

    With create_graph they have gradients too: then they are computed from the operands themselves, not from twins.
    """
    is_again = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        twins = {
            name: x.view_as(x) if is_again and needs[name]
            else x.detach().requires_grad_(needs[name] and x.is_floating_point())
            for name, x in zip(needs, ctx.saved_tensors, strict=False)
            if x is not None
        }  # fmt: skip
        wanted = [name for name, x in twins.items() if x.requires_grad]
        out = run(**twins)
        grads = torch.autograd.grad(out, [twins[name] for name in wanted], gradient, create_graph=is_again)
    return dict(zip(wanted, grads, strict=True))


_MATMUL = Kernel(
    name="matmul",
    schema="(Tensor a, Tensor b) -> Tensor",
    arguments=MatmulArguments,
    reference=_reference,
    check=_shape,
    fake=lambda a: a.a.new_empty(_shape(a)),
    prepare=_prepare,
    finish=_as_operands,
    gradient=Gradient(_keep, _give),
)
_MATMUL.register()
