"""Models laid open for the views that run them: mirrors in which every site, a functional one too, is a module.

Whatever is hooked, swapped or written to in a mirror never reaches the user's model, also when its forward fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.errors import ModelStateError
from fxquant.graph import edit
from fxquant.graph.convert.convert import rescue_reads
from fxquant.graph.eager import plain_mirror
from fxquant.graph.fuse import fuse
from fxquant.graph.module import finish
from fxquant.graph.record import Record, Site, record_of
from fxquant.graph.trace.trace import trace
from fxquant.nn.transformer import avoid_fast_path
from fxquant.operators import OPERATORS


@dataclass(frozen=True)
class OpenModel:
    """A mirror of a model and its sites' modules, in the record's order."""

    model: nn.Module
    sites: tuple[nn.Module, ...]


class SiteCall(nn.Module):
    """A functional site as a module: called with the values of its inputs by their nodes' names.

    Passes keep the nodes' names, so what the float site is called with, the quantized one takes too. Each brings its
    own constants along: weights, scales and options.
    """

    def __init__(self, node: fx.Node, root: nn.Module) -> None:
        super().__init__()
        self.function: Any = node.target  # of a method its name
        self.operands = node.args, node.kwargs
        self.constants: dict[str, torch.Tensor | None] = {}
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                self.constants[read.name] = tensor = edit.get_tensor(root, str(read.target))
                self.register_buffer(f"constant_{len(self.constants)}", tensor)

    def forward(self, **values: Any) -> Any:
        """Return what the call gives."""
        known = {**values, **self.constants}
        args, kwargs = map_arg(self.operands, lambda node: known[node.name])
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)


def open_quantized(model: nn.Module, record: Record) -> OpenModel:
    """Return a quantized (or prepared) model laid open."""
    return open_in_place(edit.mirror(model), record)


def open_float(model: Any, record: Record) -> OpenModel:
    """Return the float model that a record's was made from, laid open: traced and fused as that one was, nothing more.

    So a fused site stands against the fused float computation. model: the user's, or what prepare_fx made of it.
    Raises ModelStateError where it cannot be that model.
    """
    own = record_of(model)
    if not isinstance(model, nn.Module) or (own is not None and own.stage == "quantized"):
        told = "a quantized one" if own is not None else type(model).__name__
        raise ModelStateError(f"the float model, from which the quantized one was made, is needed here, got {told}")
    if own is not None and own.stage == "prepared":
        return open_in_place(edit.mirror(model), record)
    if not record.is_traced:
        return open_in_place(plain_mirror(model, written=record.written), record)
    operators = record.operators or OPERATORS
    traced = trace(model, operators, constants=record.constants, untraced=record.untraced, keep=record.keep)
    fuse(traced.module, traced.hooked, only=record.fusions)
    return open_in_place(finish(traced.module, model, Record(stage="fused", **traced.kept)), record)


def open_in_place(root: nn.Module, record: Record) -> OpenModel:
    """Return a model laid open, its functional sites turned into modules: in place, so a mirror or one of our own."""
    for part in root.modules():
        avoid_fast_path(part)  # which would read the sites' weights and never call them
    sites: list[nn.Module] = []
    for site in record.sites:
        try:
            sites.append(root.get_submodule(site.path) if site.call is None else _as_module(root, site))
        except (LookupError, AttributeError) as error:
            raise ModelStateError(
                f"the quantized model was made from another model than this {type(root).__name__}, which has no "
                f"{site.kind} at {site.call or site.path!r}"
            ) from error
    if isinstance(root, fx.GraphModule):
        for site in record.sites:
            if site.call is None:
                rescue_reads(root, site.path)  # what a call that stays float reads of a module that is swapped
        root.recompile()
    return OpenModel(root, tuple(sites))


def _as_module(root: nn.Module, site: Site) -> SiteCall:
    """Make a graph call a functional site as a module, and return that."""
    nodes = list(root.graph.nodes) if isinstance(root, fx.GraphModule) else []
    node = next((node for node in nodes if node.name == site.call), None)
    if node is None or node.op not in ("call_function", "call_method"):
        raise LookupError(site.call)
    call = SiteCall(node, root)
    path = edit.free_name(root, f"{site.call}_site")
    root.add_module(path, call)
    inputs = {read.name: read for read in node.all_input_nodes if read.name not in call.constants}
    constants = [read for read in node.all_input_nodes if read.name in call.constants]
    node.op, node.target, node.args, node.kwargs = "call_module", path, (), inputs
    edit.erase_dead(node.graph, constants)
    return call


def first_tensor(tree: Any) -> torch.Tensor | None:
    """Return the first tensor of nested tuples, lists and dicts; of a PackedSequence its data."""
    for leaf in pytree.tree_leaves(tree, is_leaf=lambda part: isinstance(part, rnn.PackedSequence)):
        if isinstance(leaf, (torch.Tensor, rnn.PackedSequence)):
            return leaf if isinstance(leaf, torch.Tensor) else leaf.data
    return None
