"""Runs: operators of a static model that follow each other become one call of the native library.

Between two small kernels Python takes longer than a kernel does. So nodes that follow each other, and that the library
knows, are planned once, and run by it without coming back. The graph keeps every node; a run gives the same bits, and
is called node by node wherever somebody could see the difference: under torch.compile and function transforms, where
a gradient is wanted, where a module of it has a hook, was replaced or got a forward of its own. FXQUANT_RUNS=0 switches
runs off.
"""

from __future__ import annotations

import operator
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from fxquant.graph.run_steps import known_nodes, plan
from fxquant.graph.trace.conditions import check_condition
from fxquant.ops import library

_OF_SIZES = (
    *(operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod),
    *(operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, check_condition),
)
_LEAST_NODES, _MOST_NODES = 2, 400
_REFUSALS = 3  # of a run that never came about: its values have other shapes than the library takes


def _make_run(module: fx.GraphModule, nodes: Sequence[fx.Node], plan: Any) -> Callable[..., tuple[torch.Tensor, ...]]:
    """Return a function of the values that nodes read from outside, to those that others read of theirs."""
    native = library.function("run")
    plain = _function(module, _cut(module.graph, nodes, *_ends(nodes)))
    assert native is not None
    root = weakref.ref(module)  # a cycle would keep the weights until Python's next collection
    refused = 0

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        nonlocal refused
        if refused < _REFUSALS:
            outputs: tuple[torch.Tensor, ...] | None = native(True, plan, *inputs)
            if outputs is not None:
                refused = -1 << 30
                return outputs
            refused += 1
        return plain(root(), *inputs)  # type: ignore[no-any-return]

    return run


def with_runs(plain: Callable[..., Any]) -> Callable[..., Any]:
    """Return a graph module's forward that calls its runs."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            run = self.__dict__.get(RUNS)
            if run is None:
                run = self.__dict__[RUNS] = _forward(self) or plain
            return run(self, *args, **kwargs)
        return plain(self, *args, **kwargs)

    forward.__wrapped__ = plain  # type: ignore[attr-defined]  # whose signature it has
    return forward


RUNS = "_fxquant_runs"
"""The key in a module's __dict__ of its forward with runs, which copies and pickles leave out."""


def _forward(module: fx.GraphModule) -> Callable[..., Any] | None:
    """Return a function of the module and its inputs that calls its runs; None where there are none."""
    if not library.available() or os.environ.get("FXQUANT_RUNS") == "0":
        return None
    runs: dict[fx.Node, tuple[Sequence[fx.Node], Callable[..., Any]]] = {}
    for nodes in _find(module):
        made = plan(module, nodes, *_ends(nodes))
        if made is not None:
            runs[nodes[-1]] = nodes, _make_run(module, nodes, made)
    return _function(module, _fused(module.graph, runs)) if runs else None


def _find(module: fx.GraphModule) -> list[list[fx.Node]]:
    """Return the longest sequences of nodes that the library knows."""
    known = known_nodes(module)
    found: list[list[fx.Node]] = [[]]
    for node in module.graph.nodes:
        if node.op == "get_attr" or node.op == "placeholder":
            continue
        if node in known and len(found[-1]) < _MOST_NODES:
            found[-1].append(node)
        elif found[-1] and not _reads_sizes(node):
            found.append([node] if node in known else [])
    return [nodes for nodes in found if len(nodes) >= _LEAST_NODES]


def _reads_sizes(node: fx.Node) -> bool:
    """Return whether a node only reads a tensor's sizes, computes with such, or checks them."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.target in _OF_SIZES and all(_reads_sizes(part) for part in node.all_input_nodes)


def _ends(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Return what nodes read from outside, but for stored tensors, and what others read of theirs."""
    own = set(nodes)
    read = [part for node in nodes for part in node.all_input_nodes if part not in own and part.op != "get_attr"]
    return list(dict.fromkeys(read)), [node for node in nodes if any(user not in own for user in node.users)]


def _cut(graph: fx.Graph, nodes: Sequence[fx.Node], inputs: Iterable[fx.Node], outputs: Iterable[fx.Node]) -> fx.Graph:
    """Return nodes as a graph of their own, which returns a tuple."""
    part = fx.Graph()
    twins = {node: part.placeholder(node.name) for node in inputs}
    for node in graph.nodes:
        is_read = node.op == "get_attr" and any(user in nodes for user in node.users)
        if is_read or node in nodes:
            twins[node] = part.node_copy(node, lambda n: twins[n])
    part.output(tuple(twins[node] for node in outputs))
    return part


def _fused(graph: fx.Graph, runs: dict[fx.Node, tuple[Sequence[fx.Node], Callable[..., Any]]]) -> fx.Graph:
    """Return the graph with a call for each run, at its last node; sizes of its values are read after it."""
    inside = {node for nodes, _ in runs.values() for node in nodes}
    waiting: list[fx.Node] = []
    result = fx.Graph()
    result._codegen = graph._codegen
    twins: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node in runs:
            nodes, run = runs[node]
            inputs, outputs = _ends(nodes)
            call = result.call_function(run, tuple(twins[part] for part in inputs))
            for i, output in enumerate(outputs):
                twins[output] = result.call_function(operator.getitem, (call, i))
            for each in waiting:
                twins[each] = result.node_copy(each, lambda n: twins[n])
            waiting = []
        elif _reads_sizes(node) and not all(part in twins for part in node.all_input_nodes):
            waiting.append(node)
        elif node not in inside and (node.op != "get_attr" or any(user not in inside for user in node.users)):
            twins[node] = result.node_copy(node, lambda n: twins[n])
    return result


def _function(module: fx.GraphModule, graph: fx.Graph) -> Callable[..., Any]:
    """Return a graph's code as a function of the module and its inputs."""
    kind = type(fx.GraphModule(module, graph))
    function: Callable[..., Any] = kind.forward
    del kind.forward  # a class lives until Python's next collection, and this leads to the weights
    return function
