"""The ranges of products before an addend or a curve, from data: in fxquant such a product is never rounded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxquant.errors import ArgumentError
from fxquant.ops import KERNELS, OVERLOADS

Range = tuple[float, float]

_PRODUCTS = {OVERLOADS[name]: name for name in ("static_linear", "static_convolution")}
_ALONE: dict[str, Any] = dict.fromkeys(
    ("addend", "addend_scale", "addend_zero_point", "scale", "zero_point", "low", "high", "curve")
)


def bare_products(graph: fx.Graph) -> list[fx.Node]:
    """Return the products of a graph that the file rounds before an addend or a curve, in their order."""
    return [node for node in graph.nodes if node.target in _PRODUCTS and _is_bare(_arguments(node))]


def measure(program: torch.export.ExportedProgram, data: Iterable[Sequence[Any]]) -> list[Range]:
    """Return the least and the greatest real value of each product of `bare_products`, over calls of the program.

    Raises ArgumentError where there is no call.
    """
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    ranges, calls = _Ranges(module), 0
    for calls, batch in enumerate(data, start=1):  # noqa: B007
        with torch.no_grad():
            ranges.run(*batch)
    if not calls:
        raise ArgumentError("the data of to_onnx holds no batch; leave it out, or give inputs as for calibration")
    return [ranges.found[node] for node in bare_products(module.graph)]


class _Ranges(fx.Interpreter):
    """Runs a graph, and measures its `bare_products`."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Range] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call a module; not the check of sizes, since a batch of data may be larger than the example."""
        return None if target == "_guards_fn" else super().call_module(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node."""
        if n.target in _PRODUCTS and _is_bare(_arguments(n)):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            product = n.target(*KERNELS[_PRODUCTS[n.target]].arguments(*args, **kwargs)._replace(**_ALONE))
            low, high = (float(bound) for bound in torch.aminmax(product))
            known = self.found.get(n, (low, high))
            self.found[n] = min(low, known[0]), max(high, known[1])
        return super().run_node(n)


def _arguments(node: fx.Node) -> Any:
    return KERNELS[_PRODUCTS[node.target]].arguments(*node.args, **node.kwargs)  # type: ignore[index]


def _is_bare(a: Any) -> bool:
    return (a.addend is not None or a.curve is not None) and a.scale is not None
