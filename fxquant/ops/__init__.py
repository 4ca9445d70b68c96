"""The quantized operators as functions, whose arguments `SCHEMAS` has.

An eager call on plain CPU tensors, from a module or a graph, goes straight to the native kernels, `native.at_once`:
torch's dispatcher would cost more than a small product. Every other call is one of `torch.ops.fxquant.*`, which
`dispatch` answers: compilers and torch.export see those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import ModelStateError
from fxquant.ops import dispatch, gradient, products
from fxquant.ops.autocast import cast_dtype
from fxquant.ops.native import KernelInfo, at_once, kernel_info
from fxquant.ops.schema import LIBRARY, SCHEMAS, check_dense, lay_out

for _name in SCHEMAS:
    LIBRARY.impl(_name, getattr(dispatch, _name), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

OVERLOADS: dict[str, Callable[..., Any]] = {name: getattr(torch.ops.fxquant, name).default for name in SCHEMAS}
"""The registered operators: what torch.compile and torch.export hold."""
gradient.register()


_COPIED = (torch.float32, torch.int32, torch.int64)  # of the dtypes that the library takes


def _dispatched(name: str, *args: Any) -> Any:
    """Call the registered operator; a gradient that it cannot hand on is a ModelStateError, and never lost.

    If only the first operand is not dense, the native library gets a dense copy of that.
    """
    if is_compiling():
        return OVERLOADS[name](*args)
    check_dense(args[0], name.replace("_", " "))
    first = args[0]
    if isinstance(first, torch.Tensor) and first.dtype in _COPIED and not first.is_contiguous():
        out = getattr(at_once, name)(True, first.contiguous(), *args[1:])
        if out is not None:
            return out
    out = OVERLOADS[name](*args)
    parts = out if isinstance(out, tuple) else (out,)
    for part in parts if name != "linear" else ():  # which has a gradient
        if isinstance(part, torch.Tensor) and part.requires_grad:
            part.register_hook(functools.partial(_refuse_gradient, name))  # type: ignore[no-untyped-call]
    return out


def _refuse_gradient(name: str, _: torch.Tensor) -> None:
    raise ModelStateError(
        f"a gradient came back to torch.ops.fxquant.{name}, which has none: quantized linears, convolutions and "
        "attention hand gradients on to their inputs, recurrent layers and tables do not. Leave these float (a qconfig "
        "of None), or train the float model and quantize it afterwards; where only answers are wanted, call the "
        "quantized one under torch.no_grad()"
    )


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
    """Call `torch.ops.fxquant.linear`; under torch.autocast the output has the dtype that F.linear gives there."""
    args = (x, weight, scale, bias, relu, per_row, qmax, group_size, in_features)
    out: torch.Tensor | None = None if is_compiling() else at_once.linear(True, *args)
    out = _dispatched("linear", *args) if out is None else out
    dtype = cast_dtype(x)
    return out if dtype is None else out.to(dtype)


def transpose(x: torch.Tensor) -> torch.Tensor:
    """Return x.transpose(1, 2) of (B, M, N), contiguous: by the native library in a fraction of torch's time."""
    out: torch.Tensor | None = None if is_compiling() else at_once.transpose(True, x)
    return x.transpose(1, 2).contiguous() if out is None else out


def lstm(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Call `torch.ops.fxquant.lstm`."""
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None if is_compiling() else at_once.lstm(True, *args)
    return _dispatched("lstm", *args) if out is None else out


def rnn(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Call `torch.ops.fxquant.rnn`."""
    out: tuple[torch.Tensor, torch.Tensor] | None = None if is_compiling() else at_once.rnn(True, *args)
    return _dispatched("rnn", *args) if out is None else out


def embedding(
    indices: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero_point: torch.Tensor | None,
    embedding_dim: int,
    bits: int = 8,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Call `torch.ops.fxquant.embedding`."""
    args = (indices, weight, scale, zero_point, embedding_dim, bits, dtype)
    out: torch.Tensor | None = None if is_compiling() else at_once.embedding(True, *args)
    return _dispatched("embedding", *args) if out is None else out


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
    """Call `torch.ops.fxquant.embedding_bag`."""
    table = (indices, weight, scale, zero_point, embedding_dim)
    bags = (offsets, mode, per_sample_weights, include_last_offset, padding_idx, bits, dtype)
    out: torch.Tensor | None = None if is_compiling() else at_once.embedding_bag(True, *table, *bags)
    return _dispatched("embedding_bag", *table, *bags) if out is None else out


def matmul(a: torch.Tensor, b: torch.Tensor, anywhere: bool = True) -> torch.Tensor:
    """Return torch.matmul(a, b), each element of which depends on its row of a and its column of b alone.

    So it has the same bits whatever else is in the batch, and wherever the operands lie in memory. anywhere: also where
    no native kernel does it, by the reference, much slower; False: by torch.matmul there.
    """
    if products.is_at_once(a):
        out: torch.Tensor | None = at_once.matmul(True, a, b)
        if out is not None:
            return out
    if has_torch_function((a, b)):  # what traces sees the call, and not what is in it
        return handle_torch_function(matmul, (a, b), a, b, anywhere=anywhere)
    if products.is_torchs(a, b) or not (anywhere or products.has_kernel(a)):
        return products.torch_matmul(a, b)
    product: torch.Tensor = OVERLOADS["matmul"](products.cast(a), products.cast(b))
    return product


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    anywhere: bool = True,
) -> torch.Tensor:
    """Return what F.scaled_dot_product_attention does; each row depends on its query, the keys and values alone.

    Keys at the end that the mask keeps out change nothing, not a bit, as long as they and their values are finite. The
    strides are torch's on the CPU. float64 is torch's own. anywhere: as for `matmul`.
    """
    if products.is_at_once(query) and isinstance(query, torch.Tensor) and query.dim() == 4:
        factor = products.scale_of(query, scale)
        out: torch.Tensor | None = at_once.attention(True, query, key, value, mask, is_causal, factor)
        if out is not None:
            return lay_out(query, key, value, mask, out.transpose(1, 2))
    if has_torch_function((query, key, value)):
        args = (query, key, value, mask, is_causal, scale, anywhere)
        return handle_torch_function(attention, (query, key, value), *args)
    is_torchs = products.is_torchs(query, key, value) or query.dtype == torch.float64  # ours is float32 arithmetic
    if is_torchs or not (anywhere or products.has_kernel(query)):
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, scale=scale)
    query, key, value = (products.cast(x) for x in (query, key, value))
    attended: torch.Tensor = OVERLOADS["attention"](query, key, value, mask, is_causal, scale)
    return attended


def einsum(equation: str, a: torch.Tensor, b: torch.Tensor, anywhere: bool = True) -> torch.Tensor:
    """Return torch.einsum(equation, a, b) by `matmul`, for the equations that `products.pair_product` knows."""
    if has_torch_function((a, b)):
        return handle_torch_function(einsum, (a, b), equation, a, b, anywhere=anywhere)
    plan = products.pair_product(equation)
    if plan is None or products.is_torchs(a, b) or not products.fits(plan, a, b):
        return torch.einsum(equation, a, b)
    rows, columns, shape, order = products.as_matrices(plan, a, b)
    return matmul(rows, columns, anywhere).view(shape).permute(order)


def add_product(
    start: torch.Tensor, a: torch.Tensor, b: torch.Tensor, beta: float = 1, alpha: float = 1, anywhere: bool = True
) -> torch.Tensor:
    """Return beta start + alpha (a @ b) by `matmul`, as torch.addmm and torch.baddbmm do."""
    if has_torch_function((start, a, b)):
        args = (start, a, b, beta, alpha, anywhere)
        return handle_torch_function(add_product, (start, a, b), *args)
    if products.is_torchs(start, a, b):
        return (torch.addmm if a.dim() == 2 else torch.baddbmm)(start, a, b, beta=beta, alpha=alpha)
    start = products.cast(start)
    product = matmul(a, b, anywhere)
    product = product if alpha == 1 else alpha * product
    return product if beta == 0 else product + (start if beta == 1 else beta * start)


def float_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, anywhere: bool = True
) -> torch.Tensor:
    """Return F.linear(x, weight, bias) by `matmul`: of a float weight, or of an activation in its place."""
    if has_torch_function((x, weight)):
        return handle_torch_function(float_linear, (x, weight), x, weight, bias, anywhere)
    if products.is_torchs(x, weight):
        return F.linear(x, weight, bias)
    product = matmul(x, weight.t() if weight.dim() > 1 else weight, anywhere)
    return product if bias is None else product + products.cast(bias)


__all__ = [
    "OVERLOADS",
    "KernelInfo",
    "add_product",
    "attention",
    "einsum",
    "embedding",
    "embedding_bag",
    "float_linear",
    "kernel_info",
    "linear",
    "lstm",
    "matmul",
    "rnn",
    "transpose",
]
