"""What surrounds the products of two activations: when torch's own runs instead, gradients, einsum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxquant.ops import native
from fxquant.ops.reference_products import scale_of as scale_of
from fxquant.ops.schema import LIBRARY


def is_exact(*operands: Any) -> bool:
    """Return whether torch's product of these is to run because its sums are exact in any order: of integers."""
    return any(isinstance(x, torch.Tensor) and not x.is_floating_point() and not x.is_complex() for x in operands)


def has_kernel(x: Any) -> bool:
    """Return whether the native library computes products of such tensors: where it is loaded, on the CPU."""
    return not isinstance(x, torch.Tensor) or (native.available() and x.is_cpu)


_OPERANDS = 4  # of matmul and attention come first: tensors, and a mask, which may be None


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - torch's names
    ctx.save_for_backward(*inputs[:_OPERANDS])
    ctx.rest = inputs[_OPERANDS:]


def _product_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, gradient, torch.matmul)


def _attention_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    is_causal, scale = ctx.rest
    return _gradients(
        ctx,
        gradient,
        lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale),
    )


def _gradients(ctx: Any, gradient: torch.Tensor, run: Any) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of what torch's own function gives for the operands: nearly the same values."""
    asked = ctx.needs_input_grad
    with torch.enable_grad():
        twins = [
            None if x is None else x.detach().requires_grad_(asked[i] and x.is_floating_point())
            for i, x in enumerate(ctx.saved_tensors)
        ]
        found = iter(
            torch.autograd.grad(run(*twins), [x for x in twins if x is not None and x.requires_grad], gradient)
        )
    given = [next(found) if x is not None and x.requires_grad else None for x in twins]
    return (*given, *([None] * len(ctx.rest)))


for _name, _gradient in (("matmul", _product_gradient), ("attention", _attention_gradient)):
    torch.library.register_autograd(f"fxquant::{_name}", _gradient, setup_context=_keep_operands, lib=LIBRARY)


def pair_product(equation: str) -> tuple[str, str, str, str, str, str] | None:
    """Return how an einsum of two operands is a matrix product, or None where it is not.

    (a's letters, b's, the result's, those of all three, those summed over, those of a alone); b's own are the others.
    """
    left, arrow, out = equation.replace(" ", "").partition("->")
    a, comma, b = left.partition(",")
    letters = a + b + out
    if not (arrow and comma and letters.isalpha()) or any(len(set(part)) != len(part) for part in (a, b, out)):
        return None
    shared = "".join(c for c in out if c in a and c in b)
    summed = "".join(c for c in a if c in b and c not in out)
    if set(out) | set(summed) != set(a) | set(b) or not set(out) <= set(a) | set(b):
        return None  # a letter of one operand alone that is summed over
    return a, b, out, shared, summed, "".join(c for c in out if c in a and c not in b)


def as_matrices(
    plan: tuple[str, str, str, str, str, str], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Return (shared…, M, K) and (shared…, K, N) of an einsum's operands, and what shape and order its result has."""
    letters_a, letters_b, out, shared, summed, own = plan
    other = "".join(c for c in out if c in letters_b and c not in letters_a)
    size = {**dict(zip(letters_a, a.shape, strict=True)), **dict(zip(letters_b, b.shape, strict=True))}
    rows = a.permute([letters_a.index(c) for c in shared + own + summed])
    columns = b.permute([letters_b.index(c) for c in shared + summed + other])
    outer = [size[c] for c in shared]
    many = [torch.Size([size[c] for c in part]).numel() for part in (own, summed, other)]
    rows, columns = rows.reshape(*outer, many[0], many[1]), columns.reshape(*outer, many[1], many[2])
    made = shared + own + other
    return rows, columns, [size[c] for c in made], [made.index(c) for c in out]
