"""Functions of one value, however they are written: x * sigmoid(x), x * relu6(x + 3) / 6, max(x, 0.1 * x).

Nodes that compute from one value alone, element by element, and give one, are a function of it. A static product ends
with those that are a clamp or one of its curves, which shows in what they give; any other is one table of 256.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx

_TOLERANCE = 1e-5
"""Of x: a hundredth of what 8 bits round away, and more than float32 leaves of x * 0.166667 for x / 6."""


class Ending(NamedTuple):
    """What a static product does before it rounds: bounds, or a curve (fxquant/ops/elementwise.py) with its slope."""

    low: float | None = None
    high: float | None = None
    curve: str = ""
    slope: float = 0.0


def functions_after(
    source: fx.Node, following: Sequence[fx.Node], operands: Callable[[fx.Node], Sequence[fx.Node]]
) -> Iterator[tuple[fx.Node, ...]]:
    """Yield the nodes of each function of a node's result, the longest first, in the graph's order.

    following: the nodes after it. operands: what a node computes with element by element; none for any other node.
    """
    within, awaited = {source}, set(source.users)
    ends: list[fx.Node] = []
    for node in following:
        if not awaited:
            break
        awaited.discard(node)
        reads = operands(node)
        if reads and within.issuperset(reads):
            within.add(node)
            ends.append(node)
            awaited.update(node.users)
    for end in reversed(ends):
        inside = {end}
        for node in reversed(ends):
            if node in inside:
                inside.update(read for read in operands(node) if read is not source)
        if all(user in inside for node in inside - {end} for user in node.users):
            yield tuple(node for node in ends if node in inside)


def evaluate(module: fx.GraphModule, nodes: Sequence[fx.Node], x: torch.Tensor) -> torch.Tensor:
    """Return what nodes, in the graph's order, make of x, which is what every other node gives."""
    known: dict[fx.Node, torch.Tensor] = {}
    with torch.no_grad():
        for node in nodes:
            reads = lambda read: known.get(read, x).clone()  # noqa: E731 (some write into their operand)
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), reads)
            if node.op == "call_module":
                known[node] = module.get_submodule(str(node.target))(*args, **kwargs)
            elif node.op == "call_method":
                known[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return known[nodes[-1]]


def ending_of(module: fx.GraphModule, nodes: Sequence[fx.Node]) -> Ending | None:
    """Return the clamp or curve that nodes are together, None where they are another function."""
    called = (module.get_submodule(str(node.target)) for node in nodes if node.op == "call_module")
    if any(True for part in called for _ in (*part.parameters(), *part.buffers())):
        return None  # training changes them
    x = _probes()
    y = evaluate(module, nodes, x)
    low, high = _flat(y[:2]), _flat(y[-2:].flip(0))
    if (low, high) != (None, None) and torch.equal(y, x.clamp(low, high)):
        return Ending(low, high)
    slope = float(y[0] / x[0])
    curves = {
        Ending(curve="hardswish"): F.hardswish(x),
        Ending(curve="silu"): F.silu(x),
        Ending(curve="leaky_relu", slope=slope): F.leaky_relu(x, slope),
    }
    is_near = (ending for ending, z in curves.items() if ((y - z).abs() <= _TOLERANCE * x.abs()).all())
    return None if torch.equal(y, x) else next(is_near, None)


def _flat(ends: torch.Tensor) -> float | None:
    """Return the value that a function has far out; None where it still changes there."""
    return float(ends[0]) + 0.0 if ends[0] == ends[1] else None  # 0.0 for -0.0


@functools.cache
def _probes() -> torch.Tensor:
    """Return the arguments by which functions are told apart, in order: dense near 0, some far out. float64."""
    near, far = torch.linspace(-12, 12, 4801, dtype=torch.float64), 2.0 ** torch.arange(4, 31, dtype=torch.float64)
    fine = 2.0 ** torch.arange(-20, -6, dtype=torch.float64)
    return torch.cat([near, far, -far, fine, -fine]).sort().values
