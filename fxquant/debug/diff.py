"""graph_diff: what changed between two graphs, node by node, and why."""

from __future__ import annotations

import difflib
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from fxquant.debug.diff_view import DiffRow, fold, near_changes
from fxquant.debug.table import html_table, megabytes, paint, shorten, text_table, wants_color
from fxquant.graph import edit
from fxquant.graph.module import Record, record_of
from fxquant.graph.trace import trace
from fxquant.operators import OPERATORS
from fxquant.qconfig_mapping import qconfig_name, type_name

_HEADERS = ("", "node", "before", "after", "size")
_WIDTHS = (1, 20, 22, 30, 14)
_RED, _GREEN, _YELLOW, _DIM = "31", "32", "33", "2"
_COLORS = {
    "+": (_GREEN, _GREEN, _GREEN, _GREEN),
    "-": (_RED, _RED, _RED, _RED),
    "~": (_YELLOW, _YELLOW, _RED, _GREEN),
    "⋮": (_DIM, _DIM, _DIM, _DIM),
    "×": (_DIM, _DIM, _DIM, _DIM),
}
"""By a row's sign, the colours of the sign, the name, before and after."""


@dataclass(frozen=True)
class GraphDiff:
    """The difference between two graphs: print it, show it in a notebook, or walk its rows, which are all there.

    context, is_folded, color: how it is shown, as graph_diff was told.
    """

    rows: tuple[DiffRow, ...]
    bytes_before: int
    bytes_after: int
    quantized: int
    candidates: int
    outcome: str = ""
    context: int | None = None
    is_folded: bool = True
    color: bool | None = None

    @property
    def total(self) -> str:
        """The last line: bytes before and after, their ratio, and what became of the candidates."""
        ratio = f", {self.bytes_before / self.bytes_after:.2f}×" if self.bytes_after else ""  # packed weights count 0
        outcome = f"; {self.outcome}" if self.candidates else ""
        return f"{megabytes(self.bytes_before)} → {megabytes(self.bytes_after)}{ratio}{outcome}"

    @property
    def shown(self) -> list[DiffRow]:
        """The rows that are printed."""
        rows = fold(self.rows) if self.is_folded else list(self.rows)
        return rows if self.context is None else near_changes(rows, self.context)

    def __str__(self) -> str:
        is_colored = wants_color() if self.color is None else self.color
        cells = [_cells(row, _COLORS.get(row.sign) if is_colored else None) for row in self.shown]
        return f"{text_table(cells, _HEADERS, _WIDTHS)}\n\n{self.total}"

    def _repr_html_(self) -> str:
        cells = [
            (row.sign, row.name, row.before, f"{row.after} ({row.note})" if row.note else row.after, _sizes(row))
            for row in self.shown
        ]
        return html_table(cells, _HEADERS, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Return all rows, sizes and counts as plain dicts, tuples, strings and numbers, as json.dumps takes them."""
        names = ("bytes_before", "bytes_after", "quantized", "candidates")
        return {"rows": tuple(map(asdict, self.rows)), **{name: getattr(self, name) for name in names}}


def graph_diff(
    before: nn.Module,
    after: nn.Module,
    *,
    context: int | None = None,
    only_changed: bool = False,
    fold: bool = True,
    color: bool | None = None,
) -> GraphDiff:
    """Return what changed between two models: float, fused, prepared or quantized, or any torch.fx.GraphModule.

    A model that is no graph yet is traced; where one of them does not trace, both are told module by module. Nodes are
    matched by name, which fxquant's passes keep.

    How it is shown (the rows are always all there): context: only what changed, and so many rows around it;
    only_changed: context=0. fold: a block that follows upon itself, layer after layer, is shown once. color: None for
    on a terminal and unless NO_COLOR is set; the signs say the same.
    """
    records = [record for record in map(record_of, (after, before)) if record is not None]
    old, new = (_as_graph(model, records) for model in (before, after))
    old_nodes, new_nodes = ({node.name: node for node in module.graph.nodes} for module in (old, new))
    notes = _notes(after)
    rows = []
    for name in _merged(list(old_nodes), list(new_nodes)):
        a, b = old_nodes.get(name), new_nodes.get(name)
        was, size_before = _describe(a, old)
        now, size_after = _describe(b, new)
        sign = "+" if a is None else "-" if b is None else "~" if was != now else " "
        path = next((str(node.target) for node in (b, a) if node is not None and node.op == "call_module"), "")
        note = notes.get(name, "") or notes.get(path, "")
        rows.append(DiffRow(sign, name, was, "" if sign == " " else now, note, size_before, size_after))
    record = record_of(after) or record_of(before) or Record(stage="float")
    return GraphDiff(
        tuple(rows),
        edit.byte_count(before),
        edit.byte_count(after),
        quantized=len(record.sites),
        candidates=len(record.sites) + len(record.left),
        outcome=record.outcome,
        context=0 if only_changed and context is None else context,
        is_folded=fold,
        color=color,
    )


def _as_graph(model: nn.Module, records: list[Record]) -> fx.GraphModule:
    """Return a model's graph, traced if need be as the other one was."""
    if isinstance(model, fx.GraphModule):
        return model
    if any(not record.is_traced for record in records):
        return _as_list(model)
    if not records:
        return trace(model, OPERATORS).module
    constants, untraced = records[0].constants, records[0].untraced
    return trace(model, records[0].operators or OPERATORS, constants=constants, untraced=untraced).module


def _as_list(model: nn.Module) -> fx.GraphModule:
    """Return a graph that holds each module of a model that has tensors of its own, and no wiring."""
    graph = fx.Graph()
    for path, module in model.named_modules():
        if path and any(True for _ in (*module.parameters(False), *module.buffers(False))):
            graph.call_module(path).name = path
    return fx.GraphModule(model, graph)


def _merged(old: list[str], new: list[str]) -> list[str]:
    """Return the names of both graphs in an order that keeps each one's own."""
    names: list[str] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        names += old[a:b] if tag == "equal" else [*old[a:b], *new[c:d]]
    return list(dict.fromkeys(names))


def _describe(node: fx.Node | None, module: fx.GraphModule) -> tuple[str, int]:
    """Return what a node is, in a word or two, and the bytes of the tensors it brings."""
    if node is None:
        return "", 0
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        return type_name(type(target)), edit.byte_count(target)
    if node.op == "get_attr":
        tensor = edit.get_tensor(module, str(node.target))
        if tensor is None:
            return str(node.target), 0
        kind = str(tensor.dtype).removeprefix("torch.")
        return f"{kind} {tuple(tensor.shape)}", tensor.numel() * tensor.element_size()
    if node.op == "call_function":
        function: Any = node.target
        is_overload = isinstance(function, torch._ops.OpOverload)
        return str(function).removesuffix(".default") if is_overload else type_name(function), 0
    return (f".{node.target}()" if node.op == "call_method" else node.op), 0


def _notes(model: nn.Module) -> dict[str, str]:
    """Return, by node name or module path, the qconfig of each site and the reason of each candidate left float."""
    record = record_of(model)
    if record is None:
        return {}
    notes = {site.call or site.path: qconfig_name(site.qconfig) for site in record.sites}
    notes.update({left.path: f"float: {left.reason}" for left in record.left})
    for fusion in record.fusions:
        notes.update(dict.fromkeys(fusion.chain[1:], f"fused into {fusion.path}"))
    return notes


def _cells(row: DiffRow, colors: tuple[str, str, str, str] | None) -> tuple[str, ...]:
    """Return a row's texts for a terminal."""
    names = (row.sign, shorten(row.name, _WIDTHS[1]), shorten(row.before, _WIDTHS[2]), shorten(row.after, _WIDTHS[3]))
    *first, after = map(paint, names, colors) if colors else names
    note = paint(row.note, _DIM) if colors else row.note
    return (*first, "\n".join(part for part in (after, note) if part), _sizes(row))


def _sizes(row: DiffRow) -> str:
    """Return the sizes as one cell; an equal pair once."""
    before, after = megabytes(row.bytes_before), megabytes(row.bytes_after)
    if not row.bytes_before and not row.bytes_after:
        return ""
    if row.sign in "+-" or row.bytes_before == row.bytes_after:
        return after if row.sign == "+" else before
    return f"{before}\n→ {after}"
