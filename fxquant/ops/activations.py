"""Products of two activations as graphs call them: by the operators matmul and attention, or by torch's own.

Torch's own run where ours do not apply; see `_is_torchs`. torch.einsum, torch.addmm, torch.baddbmm and F.linear of two
activations are forms of matmul.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.ops import library
from fxquant.ops.attention import lay_out, scale_of
from fxquant.ops.autocast import cast_dtype
from fxquant.ops.register import OVERLOADS, public

_native_matmul, _native_attention = library.function("matmul"), library.function("attention")


def _is_torchs(*operands: Any) -> bool:
    """Return whether torch's own function is to run: for what is not strided, real and floating point. So sparse,
    nested, complex and integer products are torch's (sums of integers are exact in any order), and so is everything
    under torch.func or forward-mode gradients, for which our operators have no rules.
    """
    if not is_compiling() and _is_transforming():
        return True
    tensors = [x for x in operands if isinstance(x, torch.Tensor)]
    return any(x.layout is not torch.strided or x.is_nested or not x.is_floating_point() for x in tensors)


def _is_at_once(x: Any) -> bool:
    """Return whether the native library may be called directly: in an eager call without autocast or transforms."""
    return not is_compiling() and cast_dtype(x) is None and not _is_transforming()


def _is_transforming() -> bool:
    """Return whether torch.func (vmap, grad, jacrev, …) or forward-mode differentiation is in force."""
    interpreters = torch._C._functorch.peek_interpreter_stack()
    return interpreters is not None or forward_ad._current_level >= 0


def _torch_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return torch's a @ b; for a batch of sparse matrices only torch.bmm works."""
    if a.layout is not torch.strided and a.dim() == 3 == b.dim():
        return torch.bmm(a, b)
    return torch.matmul(a, b)


def _cast(x: torch.Tensor) -> torch.Tensor:
    """Return x as torch.autocast casts a product's operand; x itself without autocast."""
    dtype = cast_dtype(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else None
    return x if dtype is None else x.to(dtype)


def _has_kernel(x: Any) -> bool:
    """Return whether the native library computes products of such tensors: where it is loaded, on the CPU."""
    return not isinstance(x, torch.Tensor) or (library.available() and x.is_cpu)


@public
def matmul(a: torch.Tensor, b: torch.Tensor, anywhere: bool = True) -> torch.Tensor:
    """Return torch.matmul(a, b), each element of which depends on its row of a and its column of b alone.

    So it has the same bits whatever else is in the batch, and wherever the operands lie in memory. anywhere: also where
    no native kernel does it, by the reference, much slower; False: by torch.matmul there.
    """
    if _native_matmul is not None and _is_at_once(a):
        out: torch.Tensor | None = _native_matmul(True, a, b)
        if out is not None:
            return out
    if has_torch_function((a, b)):  # a tracer sees the call, not what is in it
        return handle_torch_function(matmul, (a, b), a, b, anywhere=anywhere)
    if _is_torchs(a, b) or not (anywhere or _has_kernel(a)):
        return _torch_matmul(a, b)
    product: torch.Tensor = OVERLOADS["matmul"](_cast(a), _cast(b))
    return product


@public
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    anywhere: bool = True,
) -> torch.Tensor:
    """Return F.scaled_dot_product_attention's output; each row depends on its query, the keys and values alone.

    Masked keys at the end change no bit, as long as they and their values are finite. The
    strides are torch's on the CPU. float64 is torch's own. anywhere: as for `matmul`.
    """
    if _native_attention is not None and _is_at_once(query) and isinstance(query, torch.Tensor) and query.dim() == 4:
        factor = scale_of(query, scale)
        out: torch.Tensor | None = _native_attention(True, query, key, value, mask, is_causal, factor)
        if out is not None:
            return lay_out(query, key, value, mask, out.transpose(1, 2))
    if has_torch_function((query, key, value)):
        args = (query, key, value, mask, is_causal, scale, anywhere)
        return handle_torch_function(attention, (query, key, value), *args)
    is_torchs = _is_torchs(query, key, value) or query.dtype == torch.float64  # ours is float32 arithmetic
    if is_torchs or not (anywhere or _has_kernel(query)):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    query, key, value = (_cast(x) for x in (query, key, value))
    attended: torch.Tensor = OVERLOADS["attention"](query, key, value, mask, is_causal, scale)
    return attended


@public
def einsum(equation: str, a: torch.Tensor, b: torch.Tensor, anywhere: bool = True) -> torch.Tensor:
    """Return torch.einsum(equation, a, b) by `matmul`, for the equations that `pair_product` knows."""
    if has_torch_function((a, b)):
        return handle_torch_function(einsum, (a, b), equation, a, b, anywhere=anywhere)
    plan = pair_product(equation)
    if plan is None or _is_torchs(a, b) or not _fits(plan, a, b):
        return torch.einsum(equation, a, b)
    rows, columns, shape, order = _as_matrices(plan, a, b)
    return matmul(rows, columns, anywhere).view(shape).permute(order)


@public
def add_product(
    start: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1, anywhere: bool = True
) -> torch.Tensor:
    """Return beta start + alpha (a @ b) by `matmul`, as torch.addmm and torch.baddbmm do."""
    if has_torch_function((start, a, b)):
        args = (start, a, b, beta, alpha, anywhere)
        return handle_torch_function(add_product, (start, a, b), *args)
    if _is_torchs(start, a, b):
        return (torch.addmm if a.dim() == 2 else torch.baddbmm)(start, a, b, beta=beta, alpha=alpha)
    start = _cast(start)
    product = matmul(a, b, anywhere)
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else product + (start if beta == 1 else beta * start)


@public
def float_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, anywhere: bool = True
) -> torch.Tensor:
    """Return F.linear(x, weight, bias) by `matmul`: of a float weight, or of an activation in its place."""
    if has_torch_function((x, weight)):
        return handle_torch_function(float_linear, (x, weight), x, weight, bias, anywhere)
    if _is_torchs(x, weight):
        return F.linear(x, weight, bias)
    product = matmul(x, weight.t() if weight.dim() > 1 else weight, anywhere)
    return product if bias is None else product + _cast(bias)


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


def _fits(plan: tuple[str, str, str, str, str, str], a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether operands have the dimensions of an einsum, each letter with one size, or with size 1 in one of
    them.
    """
    if a.dim() != len(plan[0]) or b.dim() != len(plan[1]):
        return False
    sizes = dict(zip(plan[0], a.shape, strict=True))
    return all(size == sizes.get(c, size) or 1 in (size, sizes[c]) for c, size in zip(plan[1], b.shape, strict=True))


def _expand(x: torch.Tensor, letters: str, other: torch.Tensor, others: str) -> torch.Tensor:
    """Return x with the dimensions of size 1 as large as the other operand's, as torch.einsum broadcasts."""
    sizes = dict(zip(others, other.shape, strict=True))
    return x.expand([sizes.get(c, n) if n == 1 else n for c, n in zip(letters, x.shape, strict=True)])


def _as_matrices(
    plan: tuple[str, str, str, str, str, str], a: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
    """Return an einsum's operands as (shared…, M, K) and (shared…, K, N), and the shape and order of its result."""
    letters_a, letters_b, out, shared, summed, only_a = plan
    a, b = _expand(a, letters_a, b, letters_b), _expand(b, letters_b, a, letters_a)
    other = "".join(c for c in out if c in letters_b and c not in letters_a)
    size = {**dict(zip(letters_a, a.shape, strict=True)), **dict(zip(letters_b, b.shape, strict=True))}
    rows = a.permute([letters_a.index(c) for c in shared + only_a + summed])
    columns = b.permute([letters_b.index(c) for c in shared + summed + other])
    outer = [size[c] for c in shared]
    many = [torch.Size([size[c] for c in part]).numel() for part in (only_a, summed, other)]
    rows, columns = rows.reshape(*outer, many[0], many[1]), columns.reshape(*outer, many[1], many[2])
    made = shared + only_a + other
    return rows, columns, [size[c] for c in made], [made.index(c) for c in out]
