"""Partial passes: a graph is run once on a batch and its values are kept; a changed site costs only what it feeds."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.graph import edit
from fxquant.graph.call import Inputs

_NO_VALUES = ("get_attr", "output")  # a constant is read anew: its module may have been swapped


class Replay:
    """One pass of a graph over one batch. output: what it gave.

    is_exact: whether a part of the graph may be run again by itself. It may not where the pass drew random numbers or
    wrote into a tensor that it had made or held: then the values that were kept are not those that a node was given.
    Memory: the values of all nodes, and, while a part runs again, what of that is still to be read.
    """

    def __init__(self, root: fx.GraphModule, arguments: Inputs, seed: int) -> None:
        self._root = root
        args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, arguments)
        recorder = _Recorder(root, inspect.signature(root.forward).bind(*args, **kwargs).arguments)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            self.output = recorder.run()
            drew_none = torch.equal(before, torch.get_rng_state())
        self._values = {node: value for node, value in recorder.env.items() if node.op not in _NO_VALUES}
        self.is_exact = drew_none and all(tensor._version == version for tensor, version in recorder.versions)

    def output_with(self, changed: Collection[fx.Node]) -> Any:
        """Return what the graph gives now that these nodes call other modules: they run, and all that reads them."""
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


class _Recorder(fx.Interpreter):
    """Runs a graph, keeps every node's value, and each tensor's version as it was made. given: arguments by name."""

    def __init__(self, root: fx.GraphModule, given: dict[str, Any]) -> None:
        super().__init__(root, garbage_collect_values=False)
        self.extra_traceback = False
        self.versions = [(tensor, tensor._version) for tensor in (*root.parameters(), *root.buffers())]
        self._given = given

    def placeholder(self, target: Any, args: Any, _: Any) -> Any:
        """Return an argument by its name, or its default: torch.fx counts them off, and so knows no keywords."""
        name = str(target).lstrip("*")
        if name in self._given:
            return self._given[name]
        return args[0] if name == target else () if target.startswith("*") and not target.startswith("**") else {}

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value."""
        value = super().run_node(n)
        self.versions.extend((tensor, tensor._version) for tensor in _tensors(value))
        return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested containers, those of packed sequences too."""
    for leaf in pytree.tree_leaves(value, is_leaf=lambda part: isinstance(part, rnn.PackedSequence)):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif isinstance(leaf, rnn.PackedSequence):
            yield leaf.data


def callers(root: nn.Module, sites: Collection[nn.Module]) -> list[set[fx.Node]] | None:
    """Return the nodes that call each site, or a module that it is in; None where there is no graph to run in parts.

    So it is without a graph, where hooks of the root's would be passed by, and where a site is called by no node.
    """
    if not isinstance(root, fx.GraphModule) or edit.has_hooks(root):
        return None
    found: dict[int, set[fx.Node]] = {id(site): set() for site in sites}
    for node in root.graph.nodes:
        if node.op == "call_module":
            for part in root.get_submodule(str(node.target)).modules():
                if id(part) in found:
                    found[id(part)].add(node)
    nodes = [found[id(site)] for site in sites]
    return nodes if all(nodes) else None
