"""What surrounds the products of two activations: when torch's own runs instead, gradients, einsum."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from fxquant.ops import native
from fxquant.ops.autocast import cast_dtype
from fxquant.ops.reference_products import scale_of as scale_of
from fxquant.ops.schema import LIBRARY


def is_torchs(*operands: Any) -> bool:
    """Return whether torch's own function is to run: for what is not strided, real and floating point.

    So sparse, nested, complex and integer products are torch's (of integers its sums are exact in any order), and so is
    all that torch.func and forward-mode gradients transform, which our operators have no rules for.
    """
    if not is_compiling() and _is_transforming():
        return True
    tensors = [x for x in operands if isinstance(x, torch.Tensor)]
    return any(x.layout is not torch.strided or x.is_nested or not x.is_floating_point() for x in tensors)


def is_at_once(x: Any) -> bool:
    """Return whether the native library may be asked at once: of an eager call without autocast or transforms."""
    return not is_compiling() and cast_dtype(x) is None and not _is_transforming()


def _is_transforming() -> bool:
    """Return whether torch.func (vmap, grad, jacrev, …) or forward-mode differentiation is in force."""
    interpreters = torch._C._functorch.peek_interpreter_stack()
    return interpreters is not None or forward_ad._current_level >= 0


def torch_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return torch's a @ b: sparse matrices in a batch are taken by torch.bmm alone."""
    if a.layout is not torch.strided and a.dim() == 3 == b.dim():
        return torch.bmm(a, b)
    return torch.matmul(a, b)


def cast(x: torch.Tensor) -> torch.Tensor:
    """Return x as torch.autocast casts a product's operand; x itself without autocast."""
    dtype = cast_dtype(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else None
    return x if dtype is None else x.to(dtype)


def has_kernel(x: Any) -> bool:
    """Return whether the native library computes products of such tensors: where it is loaded, on the CPU."""
    return not isinstance(x, torch.Tensor) or (native.available() and x.is_cpu)


_OPERANDS = 4  # of matmul and attention come first: tensors, and a mask, which may be None
_OPTIONS: tuple[Any, ...] = (False, None)  # attention's is_causal and scale, where the call leaves them out


def _keep_operands(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - torch's names
    ctx.save_for_backward(*inputs[:_OPERANDS])
    ctx.rest = inputs[_OPERANDS:]


def _product_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _gradients(ctx, gradient, torch.matmul)


def _attention_gradient(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    is_causal, scale = ctx.rest + _OPTIONS[len(ctx.rest) :]

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if ctx.is_again:  # torch's fused kernel has no gradient of its gradient
            math = torch.ops.aten._scaled_dot_product_attention_math
            out: torch.Tensor = math(q, k, v, mask, 0.0, is_causal, None, scale=scale)[0]
            return out
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale)

    return _gradients(ctx, gradient, attend)


def _gradients(ctx: Any, gradient: torch.Tensor, run: Any) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of what torch's own function gives for the operands: nearly the same values.

    With create_graph they have gradients too: then they are computed from the operands themselves, not from twins.
    """
    asked, ctx.is_again = ctx.needs_input_grad, torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
        twins = [
            None if x is None
            else x.view_as(x) if ctx.is_again and asked[i]
            else x.detach().requires_grad_(asked[i] and x.is_floating_point())
            for i, x in enumerate(ctx.saved_tensors)
        ]  # fmt: skip
        wanted = [x for x in twins if x is not None and x.requires_grad]
        found = iter(torch.autograd.grad(run(*twins), wanted, gradient, create_graph=ctx.is_again))
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


def fits(plan: tuple[str, str, str, str, str, str], a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether operands have the dimensions of an einsum, each letter of one size, or of 1 in one of them."""
    if a.dim() != len(plan[0]) or b.dim() != len(plan[1]):
        return False
    sizes = dict(zip(plan[0], a.shape, strict=True))
    return all(size == sizes.get(c, size) or 1 in (size, sizes[c]) for c, size in zip(plan[1], b.shape, strict=True))


def _expand(x: torch.Tensor, letters: str, other: torch.Tensor, others: str) -> torch.Tensor:
    """Return x with the dimensions of size 1 as large as the other operand's, as torch.einsum broadcasts."""
    sizes = dict(zip(others, other.shape, strict=True))
    return x.expand([sizes.get(c, n) if n == 1 else n for c, n in zip(letters, x.shape, strict=True)])


def as_matrices(
    plan: tuple[str, str, str, str, str, str], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Return (shared…, M, K) and (shared…, K, N) of an einsum's operands, and what shape and order its result has."""
    letters_a, letters_b, out, shared, summed, own = plan
    a, b = _expand(a, letters_a, b, letters_b), _expand(b, letters_b, a, letters_a)
    other = "".join(c for c in out if c in letters_b and c not in letters_a)
    size = {**dict(zip(letters_a, a.shape, strict=True)), **dict(zip(letters_b, b.shape, strict=True))}
    rows = a.permute([letters_a.index(c) for c in shared + own + summed])
    columns = b.permute([letters_b.index(c) for c in shared + summed + other])
    outer = [size[c] for c in shared]
    many = [torch.Size([size[c] for c in part]).numel() for part in (own, summed, other)]
    rows, columns = rows.reshape(*outer, many[0], many[1]), columns.reshape(*outer, many[1], many[2])
    made = shared + own + other
    return rows, columns, [size[c] for c in made], [made.index(c) for c in out]
