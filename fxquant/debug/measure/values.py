"""The values between a static model's sites, compared with float's: sums, products, tables and means of integers."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.debug.measure.static import End
from fxquant.graph import edit
from fxquant.graph.outputs import Error
from fxquant.graph.record import Record
from fxquant.graph.values import IntegerCall
from fxquant.operators.values import MOVING, Form


@dataclass(frozen=True, kw_only=True)
class ValueRow:
    """One value's error as it runs, by compare's equations. name: the node that gives it in the quantized graph."""

    name: str
    calls: int
    sqnr_db: float
    relative_rms: float
    max_error: float


class ValueWatch:
    """Watches one value while both models run, the float one first."""

    def __init__(self, call: IntegerCall, theirs: End, ours: End) -> None:
        self.name, self.error = call.node, Error()
        self.waiting: collections.deque[torch.Tensor] = collections.deque()
        theirs.register_forward_hook(self.see_float)
        ours.register_forward_hook(self.see_quantized)

    def see_float(self, _: nn.Module, __: Any, output: torch.Tensor) -> None:
        """Keep a float value: copied, for forward may go on to write into it."""
        self.waiting.append(output.detach().clone())

    def see_quantized(self, end: nn.Module, _: Any, output: torch.Tensor) -> None:
        """Compare with the float value of the same call."""
        assert isinstance(end, End)
        expected = self.waiting.popleft() if self.waiting else None
        if expected is not None and expected.shape == output.shape:
            self.error.add(expected, end.real(output))

    def end_batch(self) -> None:
        """Drop the float values without a counterpart."""
        self.waiting.clear()

    def row(self) -> ValueRow:
        """Return the sums so far."""
        error = self.error
        figures = {name: getattr(error, name) for name in ("sqnr_db", "relative_rms", "max_error")}
        return ValueRow(name=self.name, calls=error.calls, **figures)


def watch_values(theirs: nn.Module, ours: nn.Module, record: Record) -> list[ValueWatch]:
    """Insert watches of the values that no site gives and that are not only moved, into both graphs."""
    if not isinstance(theirs, fx.GraphModule) or not isinstance(ours, fx.GraphModule):
        return []
    return list(_watches(theirs, ours, record))


def _watches(theirs: fx.GraphModule, ours: fx.GraphModule, record: Record) -> Iterator[ValueWatch]:
    scales = {edge.name: edge.scale_of for edge in record.values.edges}
    for call in record.values.calls:
        if call.form is Form.PRODUCT or call.form in MOVING or not call.output:
            continue
        parts = [edit.get_tensor(ours, f"{scales[call.output]}_{part}") for part in ("scale", "zero_point")]
        ends = _insert(theirs, (call.absorbed or (call.node,))[-1], End()), _insert(ours, call.node, End(*parts))
        if None not in parts and ends[0] is not None and ends[1] is not None:
            yield ValueWatch(call, ends[0], ends[1])
    for graph in (theirs, ours):
        graph.recompile()


def _insert(root: fx.GraphModule, name: str, end: End) -> End | None:
    """Let what a node gives pass a module; None where there is no such node."""
    node = next((node for node in root.graph.nodes if node.name == name), None)
    if node is None:
        return None
    path = edit.free_name(root, f"{name}_value")
    root.add_module(path, end)
    with root.graph.inserting_after(node):
        passed = root.graph.call_module(path, (node,))
    node.replace_all_uses_with(passed, lambda user: user is not passed)
    return end
