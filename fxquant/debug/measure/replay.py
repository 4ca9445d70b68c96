"""Partial passes: a graph's values on a batch are kept, so that a changed site costs only the nodes that follow it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fxquant.debug.measure.metric import Floats, squared_errors
from fxquant.debug.measure.sites import Forms, OpenModel, tensors_in
from fxquant.graph import edit
from fxquant.graph.call import Inputs, run
from fxquant.graph.outputs import named_floats
from fxquant.graph.trace.signature import Interpreter, arguments_of

_NO_VALUES = ("get_attr", "output")  # a constant is read anew: its module may have been swapped


class Variant(NamedTuple):
    """A model to be measured. base: one that it differs little from; many variants should share it."""

    forms: Forms
    base: Forms


class InexactError(Exception):
    """A graph draws random numbers or writes into its values, so no part of it can be run by itself."""


class Replay:
    """One pass of a graph over one batch. output: what it gave.

    is_exact: whether a part of the graph may be run again by itself. It may not if the pass drew random numbers, or
    wrote into a tensor that it had made or held: then the kept values are not those that the nodes were given.
    Memory: the values of all nodes and, while a part runs again, those of them that are still to be read.
    """

    def __init__(self, root: fx.GraphModule, arguments: Inputs, seed: int) -> None:
        self._root = root
        copies = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
        versions = [(tensor, tensor._version) for tensor in (*root.parameters(), *root.buffers())]

        def see(_: fx.Node, value: Any) -> None:
            versions.extend((tensor, tensor._version) for tensor in tensors_in(value))

        interpreter = Interpreter(root, root.graph, arguments_of(root, copies), see, garbage_collect_values=False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            self.output = interpreter.run()
            drew_none = torch.equal(before, torch.get_rng_state())
        self._values = {node: value for node, value in interpreter.env.items() if node.op not in _NO_VALUES}
        self.is_exact = drew_none and all(tensor._version == version for tensor, version in versions)

    def output_with(self, changed: Collection[fx.Node]) -> Any:
        """Return the output now that these nodes call other modules: they run again, and all that depend on them."""
        again = set(changed)
        for node in self._root.graph.nodes:
            if not again.isdisjoint(node.all_input_nodes):
                again.add(node)
        if not again:
            return self.output
        kept = {node: value for node, value in self._values.items() if node not in again}
        rest = fx.Interpreter(self._root)
        rest.extra_traceback = False
        with torch.no_grad():
            return rest.run(initial_env=kept)


class _Pass(NamedTuple):
    """A base's pass over one batch. expected: the float model's outputs."""

    number: int
    base: Forms
    replay: Replay
    expected: Floats


class PartialPasses:
    """The errors of a float graph's outputs with some sites swapped, by partial passes. Memory: see Replay.

    callers: the nodes that call each site.
    """

    def __init__(self, opened: OpenModel, callers: Sequence[set[fx.Node]], batches: Sequence[Inputs]) -> None:
        self._float, self._callers, self._batches = opened, callers, batches
        self._kept: _Pass | None = None

    def errors(self, number: int, variant: Variant) -> tuple[float, ...]:
        """Return `squared_errors` of a variant on one batch. Raises InexactError where partial passes are not exact."""
        kept = self._pass_over(number, variant.base)
        swapped = [i for i in {**variant.base, **variant.forms} if variant.base.get(i) is not variant.forms.get(i)]
        with self._float.swapped(variant.forms):
            output = kept.replay.output_with(set().union(*(self._callers[i] for i in swapped)))
        return squared_errors(output, kept.expected)

    def forget(self) -> None:
        """Free the values that are kept."""
        self._kept = None

    def _pass_over(self, number: int, base: Forms) -> _Pass:
        """Return a base's pass over one batch. The last one is kept: variants come ordered by batch and base."""
        kept = self._kept
        if kept is not None and kept.number == number and kept.base is base:
            return kept
        expected = kept.expected if kept is not None and kept.number == number else None
        self._kept = kept = None  # free its values before the next ones are made
        batch = self._batches[number]
        if base and expected is None:
            expected = named_floats(run(self._float.model, batch, number))
        with self._float.swapped(base) as root:
            assert isinstance(root, fx.GraphModule)
            replay = Replay(root, batch, number)
        if not replay.is_exact:
            raise InexactError
        if not base or expected is None:
            expected = named_floats(replay.output)
        self._kept = _Pass(number, base, replay, expected)
        return self._kept


def partial_passes(opened: OpenModel, batches: Sequence[Inputs]) -> PartialPasses | None:
    """Return the partial passes of a float model, or None if it has to run whole.

    That is so without a graph, with hooks on the root, which partial passes would skip, and if no node calls some site.
    """
    root = opened.model
    if not isinstance(root, fx.GraphModule) or edit.has_hooks(root):
        return None
    callers: dict[int, set[fx.Node]] = {id(site): set() for site in opened.sites}
    for node in root.graph.find_nodes(op="call_module"):
        for part in root.get_submodule(str(node.target)).modules():
            if id(part) in callers:
                callers[id(part)].add(node)
    nodes = [callers[id(site)] for site in opened.sites]
    return PartialPasses(opened, nodes, batches) if all(nodes) else None
