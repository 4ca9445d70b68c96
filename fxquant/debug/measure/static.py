"""Static sites opened up for measuring: as modules from floats to floats, and what they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.graph import edit
from fxquant.graph.record import Record
from fxquant.graph.values import IntegerCall
from fxquant.nn.static import StaticQuantizedProduct
from fxquant.operators.values import Form


class End(nn.Module):
    """A pass-through after the last node that a static site does: after its addition and its clamp.

    scale, zero_point: those of the integers that pass, None where floats do.
    """

    def __init__(self, scale: torch.Tensor | None = None, zero_point: torch.Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x itself."""
        return x

    def real(self, x: torch.Tensor) -> torch.Tensor:
        """Return the floats that x stands for."""
        return x if x.dtype != torch.uint8 else ops.dequantize(x, self.scale, self.zero_point)  # type: ignore[arg-type]


class StaticAlone(nn.Module):
    """A static site between floats: its input is quantized before it, and what it gives is rounded as its output is.

    Where the site does an addition or a clamp that the float model has behind it, its output is not rounded here. For a
    module that is called several times the input with the widest range decides.
    """

    def __init__(self, product: StaticQuantizedProduct, source: Sequence[Any], end: Sequence[Any], low: Any) -> None:
        super().__init__()
        self.product, self.low = product, low
        self.qmax = (source[2], end[2] if end else 0)
        for name, tensors in (("input", source), ("output", end)):
            for part, ending in zip(tensors or (None, None), ("scale", "zero_point"), strict=False):
                self.register_buffer(f"{name}_{ending}", part)

    def forward(self, x: torch.Tensor | None = None, **named: torch.Tensor) -> torch.Tensor:
        """Return the site's result for floats. named: x by the name of a node, as a call's site is called."""
        x = next(iter(named.values())) if x is None else x
        scale: Any = self.input_scale
        zero_point: Any = self.input_zero_point
        y: torch.Tensor = self.product(
            ops.quantize(x, scale, zero_point, self.qmax[0]), scale, zero_point, low=self.low
        )
        if self.output_scale is not None:
            scale, zero_point = self.output_scale, self.output_zero_point
            y = ops.dequantize(ops.quantize(y, scale, zero_point, self.qmax[1]), scale, zero_point)
        return y.to(x.dtype)


def static_calls(root: nn.Module, record: Record) -> dict[int, list[IntegerCall]]:
    """Return the calls of each static site by its number, in the graph's order; none for a model without a graph."""
    found: dict[int, list[IntegerCall]] = {}
    if isinstance(root, fx.GraphModule):
        nodes = {node.name: node for node in root.graph.nodes}
        modules = {site.path: i for i, site in enumerate(record.sites) if site.is_static and site.call is None}
        calls = {site.call: i for i, site in enumerate(record.sites) if site.is_static}
        for call in record.values.calls:
            if call.form is Form.PRODUCT:
                number = calls[call.node] if call.node in calls else modules[str(nodes[call.node].target)]
                found.setdefault(number, []).append(call)
    return found


def add_ends(root: nn.Module, calls: Mapping[int, Sequence[IntegerCall]]) -> dict[int, list[End]]:
    """Insert an End after each call, in a float or a quantized graph, and return them by their sites' numbers."""
    ends: dict[int, list[End]] = {}
    if not calls:
        return ends
    assert isinstance(root, fx.GraphModule)
    nodes = {node.name: node for node in root.graph.nodes}
    for number, some in calls.items():
        for call in some:
            last = (call.absorbed or (call.node,))[-1]
            node = nodes.get(last) or nodes[call.node]  # a quantized graph has not kept what the product does
            name = edit.free_name(root, f"{call.node}_end")
            end = End(*_output(root, node)) if last not in nodes or not call.absorbed else End()
            root.add_module(name, end)
            with root.graph.inserting_after(node):
                passed = root.graph.call_module(name, (node,))
            node.replace_all_uses_with(passed, lambda user, own=passed: user is not own)
            ends.setdefault(number, []).append(end)
    root.recompile()
    return ends


def open_static(root: nn.Module, record: Record) -> dict[int, StaticAlone]:
    """Return the static sites of a quantized graph as modules between floats, by number; none of a float graph."""
    specs = {edge.name: edge.spec for edge in record.values.edges}
    nodes = {node.name: node for node in root.graph.nodes} if isinstance(root, fx.GraphModule) else {}
    found = {}
    for number, calls in static_calls(root, record).items():
        node = nodes[calls[0].node]
        product = root.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(product, StaticQuantizedProduct):
            continue  # the graph is a float one
        sources = [(*_tensors(root, nodes[c.node].args[1:3]), specs[c.inputs[0]].qmax) for c in calls]
        widest = max(range(len(calls)), key=lambda i: float(sources[i][0]) * sources[i][2])
        call = calls[widest]
        has_output = bool(call.output) and not call.absorbed
        end = (*_output(root, nodes[call.node]), specs[call.output].qmax) if has_output else ()
        found[number] = StaticAlone(product, sources[widest], end, None if call.absorbed else call.low)
    return found


def _output(root: nn.Module, node: fx.Node) -> list[Any]:
    """Return the scale and zero point of what a static product gives, none where it gives floats."""
    given = [node.kwargs[name] for name in ("scale", "zero_point") if isinstance(node.kwargs.get(name), fx.Node)]
    return _tensors(root, given)


def _tensors(root: nn.Module, reads: Any) -> list[Any]:
    return [edit.get_tensor(root, str(read.target)) for read in reads]
