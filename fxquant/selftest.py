"""Whether each operator gives its reference's bits on this machine: what `python -m fxquant` tries.

Layers of every operator and format are called in a mode that sees each call of an operator, and has both the kernel
(the native one, on a GPU Triton's) and the plain-torch reference compute it. Products of floats (float16 weights,
matmul, attention) have another order of summation in torch: there the two may differ by float rounding.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxquant import ops
from fxquant.nn.base import quantize_alone
from fxquant.operators import OPERATORS, find_module_operator
from fxquant.ops.register import KERNELS, Kernel
from fxquant.qconfig import BEST


@dataclass(frozen=True)
class Tried:
    """What came of an operator's calls.

    native: how many a kernel computed; rounded: how many of these differ by float rounding, as float sums
    may; wrong: how many differ otherwise.
    """

    name: str
    calls: int
    native: int
    rounded: int
    wrong: int

    def __str__(self) -> str:
        if self.wrong:
            return f"WRONG: {self.wrong} of {self.calls} calls differ from the reference"
        if not self.native:
            return "plain torch" if self.calls else "not tried"
        near = f", {self.rounded} of them to float rounding" if self.rounded else ""
        return f"as the reference in {self.native} of {self.native} native calls{near}"


def try_operators(device: torch.device | None = None, on_gpu: bool = False) -> list[Tried]:
    """Return what came of each operator's calls, in the order of their names; it takes half a second.

    device: where to call them, on a GPU longer the first time; on_gpu: whether to try Triton's kernels.
    """
    on = device or torch.device("cpu")
    with torch.random.fork_rng(devices=[on] if on.type == "cuda" else []), torch.no_grad(), on:
        torch.manual_seed(0)
        with _Comparing(Kernel.run_triton if on_gpu else Kernel.run_native) as seen:
            _call_layers()
            _call_values()
            _call_float()
    return [
        Tried(name, *(seen.counts[name, what] for what in ("calls", "native", "rounded", "wrong")))
        for name in sorted(KERNELS)
    ]


class _Comparing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes each call of an operator twice, and counts."""

    def __init__(self, run: Callable[[Kernel[Any], Any], Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run = run
        self.counts: collections.Counter[tuple[str, str]] = collections.Counter()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: else torch imports its compiler at the first call, which takes a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kernel = KERNELS.get(func._opname) if func.namespace == "fxquant" else None
        if kernel is None:
            return func(*args, **(kwargs or {}))
        arguments = kernel.arguments(*args, **(kwargs or {}))
        expected, got = kernel.reference(arguments), self.run(kernel, arguments)
        self.counts[kernel.name, "calls"] += 1
        self.counts[kernel.name, "native"] += got is not None
        if got is not None:
            pairs = list(zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True))
            is_same = all(torch.equal(a, b) for a, b in pairs)
            sums_floats = kernel.name in _OF_FLOATS or _has_float16(arguments)
            is_right = is_same or (sums_floats and all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in pairs))
            self.counts[kernel.name, "rounded"] += is_right and not is_same
            self.counts[kernel.name, "wrong"] += not is_right
        return expected


_OF_FLOATS = ("matmul", "attention")


def _has_float16(arguments: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float16 for leaf in pytree.tree_leaves(arguments))


def _call_layers() -> None:
    """Call a layer of each dynamic operator, in every format."""
    words, x = torch.randint(20, (3, 2)), torch.randn(3, 2, 96)
    layers = (
        (nn.Embedding(20, 96), words),
        (nn.EmbeddingBag(20, 96), words),
        (nn.Linear(96, 40), x),
        (nn.LSTM(96, 32), x),
        (nn.GRU(96, 32, bidirectional=True), x),
        (nn.RNN(96, 32), x),
    )
    for layer, inputs in layers:
        row = find_module_operator(OPERATORS, type(layer))
        assert row is not None, layer
        assert row.convert_module is not None, layer
        for qconfig in filter(row.accepts, BEST.values()):
            row.convert_module(layer.eval(), qconfig, quantize_alone)(inputs)


def _call_values() -> None:
    """Call each operator on values of static models."""
    one = torch.tensor(0.05), torch.tensor(120, dtype=torch.int32)
    other = torch.tensor(0.08), torch.tensor(101, dtype=torch.int32)
    q = ops.quantize(torch.randn(2, 24, 9, 7).to(memory_format=torch.channels_last), *one)
    weight, scales = torch.randint(-127, 128, (24, 24, 3, 3), dtype=torch.int8), torch.rand(24) / 99
    bias = torch.randn(24)
    for groups in (1, 24):
        part = weight[:, : 24 // groups].contiguous()
        ops.static_convolution(q, *one, part, scales, bias, *other, [2, 2], [1] * 4, [1, 1], groups)
    ops.static_linear(q[:, :, 0, 0].contiguous(), *one, weight[:, :, 0, 0].contiguous(), scales, bias, *other, low=0.0)
    ops.dequantize(q, *one)
    ops.lookup(q, torch.randint(256, (256,), dtype=torch.uint8))
    ops.lookup_channels(q, torch.randint(256, (24, 256), dtype=torch.uint8))
    ops.add_values(q, *one, q, *other, *other, low=0.0)
    ops.mul_values(q, *one, q, *other, *other)
    ops.pad_value(q, one[1], [1, 0, 0, 1])
    ops.resize_value(q, [5, 6])
    ops.resize_value(q, None, [2.0, 1.5], True)
    ops.max_pool_value(q, [3, 3], [2, 2], [1, 1], [1, 1])
    ops.pool_value(q, *one, *other, [2, 2], [2, 2], [0, 0])
    ops.adaptive_pool_value(q, *one, *other, [2, 3])
    ops.mean_value(q, *one, *other, [2, 3])


def _call_float() -> None:
    """Call the operators that compute with floats, for the sake of one order of summation."""
    ops.matmul(torch.randn(2, 9, 12), torch.randn(2, 12, 9))
    query, key, value = torch.randn(3, 2, 2, 9, 16)
    ops.attention(query, key, value)
