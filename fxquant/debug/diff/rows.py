"""The lines of a diff: what each node of two graphs is, what happened to it, and what it reads."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.debug.diff.fold import DiffRow
from fxquant.errors import TraceError
from fxquant.graph import edit
from fxquant.graph.convert.invariant import PRODUCTS
from fxquant.graph.record import Record, Site, Skipped, record_of
from fxquant.graph.trace.trace import trace
from fxquant.operators import OPERATORS
from fxquant.ops import library
from fxquant.qconfig_mapping import qconfig_name, type_name

_Key: TypeAlias = tuple[str, str]
"""A node's name and "", or "" and a module's path: a call may have the name that a module has as its path."""


_T = TypeVar("_T")


class _Decided(NamedTuple):
    """The message about a node, whether it is a candidate that stays float, and what it was fused into."""

    note: str
    is_float: bool = False
    fused_into: str = ""


class _Side:
    """One of the two graphs, and what its record says about its nodes.

    inside: by a node's name, the paths of candidates inside the module that it calls, which get lines of their own.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph, root: nn.Module) -> None:
        self.root = root
        self.nodes = {node.name: node for node in graph.nodes}
        self.schemes, self.others, candidates = _decisions(record_of(model))
        self._values = dict(_integers(root, self.nodes, record_of(model)))
        self.others.update(_absorbed(self.nodes, record_of(model)))
        self._modules = dict(self.root.named_modules())
        callers: dict[str, str] = {}
        for node in graph.find_nodes(op="call_module", sort=True):
            callers.setdefault(str(node.target), node.name)
        self.inside: dict[str, list[str]] = {}
        for path in candidates:
            above = path
            while above and above not in callers:
                above = above.rpartition(".")[0]
            if above and above != path and path in self._modules:
                self.inside.setdefault(callers[above], []).append(path)

    def path(self, name: str) -> str:
        """Return the path of the module that a node calls, or of the one that is meant inside a leaf, or ""."""
        node = self.nodes.get(name)
        if node is None:
            return name if name in self._modules else ""
        return str(node.target) if node.op == "call_module" else ""

    def inputs(self, name: str) -> tuple[str, ...]:
        """Return the names of the nodes that a node reads."""
        node = self.nodes.get(name)
        return () if node is None else tuple(read.name for read in node.all_input_nodes)

    def describe(self, name: str, apart: list[str]) -> tuple[str, str, int]:
        """Return what a node is in a word or two, its details and its bytes. apart: modules with lines of their own."""
        node, path = self.nodes.get(name), self.path(name)
        if path:
            return _module(self._modules[path], [self._modules[part] for part in apart if part in self._modules])
        return ("", "", 0) if node is None else _call(node, self.root)

    def scheme(self, name: str, path: str) -> str:
        """Return the qconfig of a site's node, else ""."""
        return self._of(self.schemes, name, path) or ""

    def decided(self, name: str, path: str) -> _Decided:
        """Return the message about a node: its qconfig, why it stays float or changed, or what it was fused into."""
        node, scheme = self.nodes.get(name), self.scheme(name, path)
        is_fixed = (
            node is not None and node.target in PRODUCTS and (library.available() or node.kwargs.get("anywhere", True))
        )
        integers = self._values.get(name, "")
        otherwise = _Decided("the same bits in any batch" if is_fixed else integers)
        if scheme:
            return _Decided(f"{scheme}; {integers}" if integers else scheme)
        return self._of(self.others, name, path) or otherwise

    def _of(self, decisions: dict[_Key, _T], name: str, path: str) -> _T | None:
        """Return the decision about a call by its name, or the module that it calls; inputs may be named as either."""
        node = self.nodes.get(name)
        if node is not None and node.op == "placeholder":
            return None
        return decisions.get((name, "")) or (decisions.get(("", path)) if path else None)


def _integers(root: nn.Module, nodes: dict[str, fx.Node], record: Record | None) -> Iterator[tuple[str, str]]:
    """Yield each node of a quantized graph that gives integers, and their dtype and scale in words."""
    scales = {name: node.args[1] for name, node in nodes.items() if node.target is ops.quantize}
    for name, read in scales.items():
        yield name, _uint8(edit.get_tensor(root, str(read.target)))  # type: ignore[union-attr]
    for edge in record.values.edges if record is not None and record.stage == "quantized" else ():
        if not edge.is_float and edge.name in nodes:
            yield edge.name, _uint8(edit.get_tensor(root, f"{edge.scale_of}_scale"))


def _absorbed(nodes: dict[str, fx.Node], record: Record | None) -> Iterator[tuple[_Key, _Decided]]:
    """Yield each node that a node of a quantized graph does too: an addition or a clamp after a static product, say."""
    for call in record.values.calls if record is not None and record.stage == "quantized" else ():
        node = nodes.get(call.node)
        path = str(node.target) if node is not None and node.op == "call_module" else ""
        for name in call.absorbed:
            yield (name, ""), _Decided(f"done by {call.node}", fused_into=path)


def _uint8(scale: torch.Tensor | None) -> str:
    return "uint8" if scale is None or scale.is_meta else f"uint8, scale {float(scale):.3g}"


def diff_rows(before: nn.Module, after: nn.Module) -> tuple[tuple[DiffRow, ...], str]:
    """Return a line for every node of either graph, in an order that both agree with, and a remark, or ""."""
    records = [record for record in map(record_of, (after, before)) if record is not None]
    is_traced = all(record.is_traced for record in records)
    try:
        graphs = [_as_graph(model, records) for model in (before, after)] if is_traced else []
    except TraceError:
        if records:
            raise
        is_traced, graphs = False, []
    graphs = graphs or [(_as_list(model), model) for model in (before, after)]
    old, new = (_Side(model, *graph) for model, graph in zip((before, after), graphs, strict=True))
    rows = []
    for name in _merged(list(old.nodes), list(new.nodes)):
        inside = list(dict.fromkeys([*old.inside.get(name, ()), *new.inside.get(name, ())]))
        rows += [_row(part, old, new, inside if part == name else []) for part in (name, *inside)]
    remark = "" if is_traced else "module by module: the model does not trace"
    return tuple(rows), remark


def _row(name: str, old: _Side, new: _Side, apart: list[str]) -> DiffRow:
    """Return the line of one node. apart: modules inside it that have lines of their own."""
    was, old_details, size_before = old.describe(name, apart)
    now, new_details, size_after = new.describe(name, apart)
    path = new.path(name) or old.path(name)
    decided = new.decided(name, path)
    note_before, note = "", decided.note
    sign = "+" if not was else "-" if not now else "~" if was != now else " "
    schemes = old.scheme(name, path), new.scheme(name, path)
    if was == now and all(schemes) and schemes[0] != schemes[1]:
        sign, note_before = "~", schemes[0]
    elif was == now and old_details != new_details:
        sign, note_before, note = "~", *_unlike(old_details, new_details)
    return DiffRow(
        sign=sign,
        name=name,
        before=was,
        after="" if sign == " " else now,
        note=note,
        bytes_before=size_before,
        bytes_after=size_after,
        note_before=note_before,
        path=path,
        inputs_before=old.inputs(name),
        inputs_after=new.inputs(name),
        is_float=decided.is_float,
        fused_into=decided.fused_into,
    )


def _unlike(old: str, new: str) -> tuple[str, str]:
    """Return the parts of two details in which they differ."""
    a, b = (re.split(r", (?![^(\[]*[)\]])", text) for text in (old, new))
    return ", ".join(part for part in a if part not in b), ", ".join(part for part in b if part not in a)


def _as_graph(model: nn.Module, records: list[Record]) -> tuple[fx.Graph, nn.Module]:
    """Return a model's graph, traced as the other model's was if it has none, and the root of the modules it calls."""
    module = model
    if not isinstance(module, fx.GraphModule):
        record = records[0] if records else Record(stage="prepared", operators=OPERATORS)
        operators = record.operators or OPERATORS
        module = trace(model, operators, None, record.constants, record.untraced, keep=record.keep).module
    return module.graph, module


def _as_list(model: nn.Module) -> fx.Graph:
    """Return a graph of the modules that have tensors of their own, without wiring."""
    graph = fx.Graph()
    for path, module in model.named_modules():
        if path and any(True for _ in (*module.parameters(False), *module.buffers(False))):
            graph.call_module(path).name = path
    return graph


def _merged(old: list[str], new: list[str]) -> list[str]:
    """Return the names of both graphs in an order that both agree with."""
    names: list[str] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        names += old[a:b] if tag == "equal" else [*old[a:b], *new[c:d]]
    return list(dict.fromkeys(names))


def _module(module: nn.Module, apart: list[nn.Module]) -> tuple[str, str, int]:
    """Return a module's type, its extra_repr with its tensors' dtypes, and its bytes, without the modules apart."""
    elsewhere = {edit.identity(tensor) for part in apart for tensor in (*part.parameters(), *part.buffers())}
    tensors = [t for t in (*module.parameters(), *module.buffers()) if edit.identity(t) not in elsewhere]
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    details = ", ".join([*filter(None, [module.extra_repr()]), *dtypes])
    return type_name(type(module)), details, sum(edit.sizes(tensors).values())


def _call(node: fx.Node, module: nn.Module) -> tuple[str, str, int]:
    """Return the same for a node that calls no module. Its details are its constant arguments."""
    if node.op == "get_attr":
        tensor = edit.get_tensor(module, str(node.target))
        if tensor is None:
            return str(node.target), "", 0
        dtype = str(tensor.dtype).removeprefix("torch.")
        return f"{dtype} {tuple(tensor.shape)}", "", tensor.numel() * tensor.element_size()
    constants = ", ".join(_constants(node))
    if node.op == "call_function":
        function: Any = node.target
        if not isinstance(function, torch._ops.OpOverload):
            return type_name(function), constants, 0
        is_plain = function._overloadname == "default" or function.namespace == "fxquant"
        return str(function.overloadpacket if is_plain else function), constants, 0
    return (f".{node.target}()" if node.op == "call_method" else node.op), constants, 0


def _constants(node: fx.Node) -> Iterator[str]:
    """Yield the plain arguments of a node."""
    for name, value in [*((str(i), arg) for i, arg in enumerate(node.args)), *node.kwargs.items()]:
        held: list[fx.Node] = []
        fx.node.map_arg(value, held.append)
        if not held and isinstance(value, (bool, int, float, str, torch.dtype, torch.device, type(None))):
            yield f"{name}={value!r}" if not name.isdigit() else f"argument {name} {value!r}"


def _key(part: Site | Skipped) -> _Key:
    return (part.call, "") if part.call else ("", part.path)


def _decisions(record: Record | None) -> tuple[dict[_Key, str], dict[_Key, _Decided], list[str]]:
    """Return, by node name or module path, qconfigs, and messages where there is none; and candidates' paths."""
    if record is None:
        return {}, {}, []
    schemes = {_key(site): qconfig_name(site.qconfig) for site in record.sites}
    others = {_key(part): _Decided(f"float: {part.reason}", is_float=True) for part in record.skipped}
    for fusion in record.fusions:
        for part in fusion.chain[1:]:
            fused = _Decided(f"fused into {fusion.path}", fused_into=fusion.path)
            others.update(dict.fromkeys([(part, ""), ("", part)], fused))
    candidates = [site.path for site in record.sites if site.call is None]
    candidates += [part.path for part in record.skipped if part.call is None]
    return schemes, others, candidates
