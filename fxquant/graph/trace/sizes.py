"""Sizes that forward computes with in Python (TensorFlow's padding, a pooling only of large images) as plain numbers.

A graph for inputs of certain sizes: what forward asks for a tensor's size, it gets as numbers, except the batch's size,
which stays a node. The graph checks its inputs' sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxquant.graph import edit
from fxquant.graph.call import Inputs
from fxquant.graph.trace.signature import arguments_of


class Sized(NamedTuple):
    """An input's dtype and sizes, for which a graph is made, as a checkpoint holds them too.

    any_batch: whether its first size may be another.
    """

    dtype: str
    sizes: tuple[int, ...]
    any_batch: bool = True

    @property
    def bounds(self) -> tuple[tuple[int, int | None], ...]:
        """The least and the greatest size of each dimension, as check_sizes takes them."""
        exact = [(size, size) for size in self.sizes]
        return ((0, None), *exact[1:]) if self.any_batch else tuple(exact)

    def on_meta(self) -> torch.Tensor:
        """Return such a tensor, without values."""
        return torch.empty(self.sizes, dtype=getattr(torch, self.dtype), device="meta")

    def __str__(self) -> str:
        sizes = ["any" if self.any_batch else str(self.sizes[0]), *map(str, self.sizes[1:])]
        return f"({', '.join(sizes)})"


def as_sized(fixed: Any) -> Sized | None:
    """Return what a graph's constant says of a tensor, None for another argument. fixed: as JSON gives it, perhaps."""
    is_sized = isinstance(fixed, (tuple, list)) and len(fixed) == 3 and isinstance(fixed[1], (tuple, list))
    return Sized(fixed[0], tuple(fixed[1]), fixed[2]) if is_sized else None


def sizes_of(model: nn.Module, inputs: Inputs, any_batch: bool = True) -> dict[str, Sized]:
    """Return the sizes of a call's tensors with two or more dimensions, by the arguments' names."""
    given = arguments_of(model, inputs)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.dim() > 1}
    return {
        name: Sized(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), any_batch)
        for name, tensor in tensors.items()
    }


def doubled(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return a call whose batch is there twice."""
    arguments = arguments_of(model, inputs)
    more = {name: torch.cat([arguments[name]] * 2) for name in sizes_of(model, inputs)}
    return Inputs((), {**arguments, **more})


class Shapes:
    """The shapes of what a graph's nodes give while it is traced: they run on the meta device, as far as is asked."""

    def __init__(self, root: nn.Module, constants: Mapping[str, Any]) -> None:
        self._root, self._constants = edit.mirror(root, "meta", hooks=False), constants
        self._live = root  # which has the tensors that forward makes
        self._values: dict[fx.Node, Any] = {}
        self.is_running = False
        self.any_batch = all(sized.any_batch for sized in map(as_sized, constants.values()) if sized is not None)

    def of(self, node: fx.Node) -> tuple[int, ...] | None:
        """Return the shape of a node's result, None where that is no tensor."""
        self.is_running = True
        try:
            with torch.no_grad():
                for earlier in node.graph.nodes:
                    if earlier not in self._values:
                        self._values[earlier] = self._run(earlier)
        finally:
            self.is_running = False
        value = self._values[node]
        return tuple(value.shape) if isinstance(value, torch.Tensor) else None

    def _run(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if node.op == "placeholder":
            fixed = self._constants.get(str(node.target), args[0] if args else None)
            sized = as_sized(fixed)
            return sized.on_meta() if sized is not None else fixed
        if node.op == "get_attr":
            tensor = edit.get_tensor(self._root, str(node.target))
            made = edit.get_tensor(self._live, str(node.target)) if tensor is None else None
            return tensor if made is None else made.to("meta")
        if node.op == "call_module":
            return self._root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class SizedProxy(fx.Proxy):
    """A stand-in for a tensor whose sizes are known."""

    def __getattr__(self, k: str) -> Any:
        """Return sizes as numbers, and everything else as torch.fx does."""
        shape = self.tracer.shapes.of(self.node) if k in ("shape", "size", "ndim", "dim") else None  # type: ignore[attr-defined]
        if shape is None:
            return super().__getattr__(k)
        if k in ("ndim", "dim"):
            return len(shape) if k == "ndim" else lambda: len(shape)
        return self._sizes(shape) if k == "shape" else lambda dim=None: self._sizes(shape, dim)

    def _sizes(self, shape: tuple[int, ...], dim: int | None = None) -> Any:
        sizes: list[Any] = list(shape)
        if sizes and self.tracer.shapes.any_batch and dim in (None, 0, -len(shape)):  # type: ignore[attr-defined]
            sizes[0] = self.tracer.create_proxy("call_method", "size", (self, 0), {})
        return tuple(sizes) if dim is None else sizes[dim]
