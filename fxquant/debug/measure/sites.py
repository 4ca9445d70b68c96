"""Models opened up for measuring: mirrors in which every site is a module, functional ones too.

Hooks, swaps and writes in a mirror never reach the user's model, even when its forward fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.utils import rnn
from torch.utils import _pytree as pytree

from fxquant.debug.measure.static import add_ends, open_static, static_calls
from fxquant.errors import ModelStateError
from fxquant.graph import edit
from fxquant.graph.convert.convert import rescue_reads
from fxquant.graph.eager import plain_mirror
from fxquant.graph.fuse import fuse
from fxquant.graph.lower import lower
from fxquant.graph.module import finish
from fxquant.graph.record import Record, Site, record_of
from fxquant.graph.trace.trace import trace
from fxquant.nn.transformer import avoid_fast_path
from fxquant.operators import OPERATORS
from fxquant.rounding import disable_fake_quant

Forms = Mapping[int, nn.Module]
"""The modules that replace sites, by the sites' numbers; sites without one stay as they are."""


@dataclass(frozen=True)
class OpenModel:
    """A mirror of a model and its sites' modules, in the record's order.

    forms: what a site is between floats, where it is not its module: a static one, by its number. ends: the modules
    that its results pass, where they are not its module's own: a static one's, after what it does of what follows it.
    """

    model: nn.Module
    sites: tuple[nn.Module, ...]
    forms: Forms = field(default_factory=dict)
    ends: Mapping[int, Sequence[nn.Module]] = field(default_factory=dict)

    def form(self, number: int) -> nn.Module:
        """Return a site as a module between floats."""
        return self.forms.get(number, self.sites[number])

    def ends_of(self, number: int) -> Sequence[nn.Module]:
        """Return the modules that a site's results pass."""
        return self.ends.get(number) or (self.sites[number],)

    @contextmanager
    def swapped(self, forms: Forms) -> Iterator[nn.Module]:
        """Replace some sites for the duration of the block. Gives the root, which may be a site itself."""
        root = _swap(self.model, {id(self.sites[i]): form for i, form in forms.items()})
        try:
            yield root
        finally:
            _swap(root, {id(form): self.sites[i] for i, form in forms.items()})


def _swap(root: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Replace modules, by their ids, wherever the tree holds them; return the root, or its replacement."""
    for parent in list(root.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = replacements.get(id(child), child)
    return replacements.get(id(root), root)


class SiteCall(nn.Module):
    """A functional site as a module, called with the values of its inputs by their nodes' names.

    Passes keep the nodes' names, so the quantized site takes what the float one is called with. Each holds its own
    constants: weights, scales and options.
    """

    def __init__(self, node: fx.Node, root: nn.Module) -> None:
        super().__init__()
        self.function: Any = node.target  # the name of a method
        self.operands = node.args, node.kwargs
        self.constants: dict[str, torch.Tensor | None] = {}
        for read in node.all_input_nodes:
            if read.op == "get_attr":
                self.constants[read.name] = tensor = edit.get_tensor(root, str(read.target))
                self.register_buffer(f"constant_{len(self.constants)}", tensor)

    def forward(self, **values: Any) -> Any:
        """Return the result of the call."""
        known = {**values, **self.constants}
        args, kwargs = map_arg(self.operands, lambda node: known[node.name])
        if isinstance(self.function, str):
            return getattr(args[0], self.function)(*args[1:], **kwargs)
        return self.function(*args, **kwargs)


def open_quantized(model: nn.Module, record: Record) -> OpenModel:
    """Return a quantized (or prepared) model opened up."""
    return open_in_place(edit.mirror(model), record)


def open_float(model: Any, record: Record) -> OpenModel:
    """Return the float model that a record's model was made from, opened up.

    It is traced and fused in the same way, so a fused site is compared with the fused float computation. model: the
    user's model, or the result of prepare_fx. Raises ModelStateError if it cannot be the right one.
    """
    known = record_of(model)
    if not isinstance(model, nn.Module) or (known is not None and known.stage == "quantized"):
        message = "a quantized one" if known is not None else type(model).__name__
        raise ModelStateError(f"expected the float model from which the quantized one was made, got {message}")
    if known is not None and known.stage == "prepared":
        twin = edit.mirror(model)
        if known.is_trained:  # the float model that was trained
            lower(twin, known)
            twin.train(False).apply(disable_fake_quant)
        return open_in_place(twin, record)
    if not record.is_traced:
        return open_in_place(plain_mirror(model, written=record.written), record)
    operators = record.operators or OPERATORS
    traced = trace(model, operators, constants=record.constants, untraced=record.untraced, keep=record.keep)
    fuse(traced.module, traced.hooked, only=record.fusions)
    return open_in_place(finish(traced.module, model, Record(stage="fused", **traced.kept)), record)


def open_in_place(root: nn.Module, record: Record) -> OpenModel:
    """Return a model opened up, with its functional sites made modules. It is changed: pass a mirror."""
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
                rescue_reads(root, site.path)  # calls that stay float may read a tensor of a module that is swapped
        root.recompile()
    forms = open_static(root, record)
    return OpenModel(root, tuple(sites), forms, add_ends(root, static_calls(root, record)))


def _as_module(root: nn.Module, site: Site) -> nn.Module:
    """Turn a functional site of a graph into a call of a module, and return that module."""
    nodes = list(root.graph.nodes) if isinstance(root, fx.GraphModule) else []
    node = next((node for node in nodes if node.name == site.call), None)
    if node is not None and node.op == "call_module" and site.is_static:
        return root.get_submodule(str(node.target))  # once it is quantized it is a module
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


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of nested tuples, lists and dicts; of a PackedSequence its data."""
    for leaf in pytree.tree_leaves(value, is_leaf=lambda part: isinstance(part, rnn.PackedSequence)):
        if isinstance(leaf, (torch.Tensor, rnn.PackedSequence)):
            yield leaf if isinstance(leaf, torch.Tensor) else leaf.data


def first_tensor(value: Any) -> torch.Tensor | None:
    """Return the first of a value's tensors, or None."""
    return next(tensors_in(value), None)
