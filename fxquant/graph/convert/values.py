"""The values of a static model become integers: their scales are buffers, and their nodes compute with integers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.errors import CalibrationError
from fxquant.graph import edit
from fxquant.graph.observe import mean_path, observer_path
from fxquant.graph.pointwise import evaluate
from fxquant.graph.values import Edge, IntegerCall, Values, function_of
from fxquant.nn.static import StaticQuantizedProduct
from fxquant.operators.pools import average, max_pool, padding, resizing
from fxquant.operators.values import MOVING, Form, find_value_operator
from fxquant.value_observers import InputMean, ValueObserver

Qparams = tuple[fx.Node, fx.Node]


def convert_values(module: fx.GraphModule, values: Values, floats: Mapping[int, nn.Module]) -> None:
    """Rewrite a graph in place, whose sites are converted already; on the meta device scales are empty buffers.

    floats: the float module of each converted one, by its id. Raises CalibrationError where an observer has seen
    nothing.
    """
    if values.calls:
        _correct_biases(module, values.calls, floats)
        _Values(module, values.edges, values.calls).run()


@torch.no_grad()
def _correct_biases(module: fx.GraphModule, calls: Sequence[IntegerCall], floats: Mapping[int, nn.Module]) -> None:
    """Add to the biases of static products what rounding their weights takes away on average: (W - Ŵ) E[x].

    Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", with means from
    calibration data.
    """
    nodes = {node.name: node for node in module.graph.nodes}
    means: dict[str, list[InputMean]] = {}
    for call in calls:
        observer = module._modules.get(mean_path(call.node))  # a trained model has none: its biases learned
        if call.form is Form.PRODUCT and isinstance(observer, InputMean):
            means.setdefault(str(nodes[call.node].target), []).append(observer)
    for path, observers in means.items():
        product = module.get_submodule(path)
        weight = floats[id(product)].weight
        count = 0.0 if weight.is_meta else sum(float(observer.count) for observer in observers)
        if count:
            assert isinstance(product, StaticQuantizedProduct)
            mean = sum(observer.total for observer in observers if observer.total.numel()) / count
            product.correct_bias(weight, mean)  # type: ignore[arg-type]


class _Values:
    """One rewriting."""

    def __init__(self, module: fx.GraphModule, edges: Sequence[Edge], calls: Sequence[IntegerCall]) -> None:
        self._module, self._graph = module, module.graph
        self._edges = {edge.name: edge for edge in edges}
        self._calls = calls
        self._found = _find_qparams(module, edges)
        _drop_observers(module, edges, calls)
        self._nodes = {node.name: node for node in module.graph.nodes}
        self._qparams = self._store()
        self._ints: dict[str, fx.Node] = {}  # by edge
        self._reals: dict[str, fx.Node] = {}  # dequantized, by edge

    def run(self) -> None:
        """Rewrite."""
        for edge in self._edges.values():
            if edge.is_float:
                self._ints[edge.name] = self._quantize(edge)
        ends = {call.node: [self._nodes[name] for name in call.absorbed] for call in self._calls}
        readers = self._float_readers(ends)
        for call in self._calls:
            node = self._nodes[call.node]
            tail = ends[call.node][-1] if ends[call.node] else node
            users = list(tail.users)
            self._rewrite(call, [node, *ends[call.node]])
            for user in users:
                if user is not node and tail is not node:
                    user.replace_input_with(tail, node)
            for absorbed in reversed(ends[call.node]):
                self._graph.erase_node(absorbed)
            name = call.output or (call.node if call.form in MOVING else "")
            if name:
                self._ints[name] = node
                self._dequantize(name, node, [user for user in node.users if user in readers])
        self._graph.lint()

    def _store(self) -> dict[str, Qparams]:
        """Register each scale and zero point once, and return get_attr nodes of them at the graph's start."""
        nodes: dict[str, Qparams] = {}
        first = next(node for node in self._graph.nodes if node.op != "placeholder")
        for scale_of, parts in self._found.items():
            paths = []
            for part, ending in zip(parts, ("scale", "zero_point"), strict=True):
                path = edit.free_name(self._module, f"{scale_of}_{ending}")
                edit.set_tensor(self._module, path, part)
                paths.append(path)
            with self._graph.inserting_before(first):
                nodes[scale_of] = self._graph.get_attr(paths[0]), self._graph.get_attr(paths[1])
        return nodes

    def _of(self, name: str) -> Qparams:
        return self._qparams[self._edges[name].scale_of]

    def _quantize(self, edge: Edge) -> fx.Node:
        node = self._nodes[edge.at]
        place = node
        while place.next.op in ("placeholder", "get_attr"):
            place = place.next
        with self._graph.inserting_after(place):
            return self._graph.call_function(ops.quantize, (node, *self._of(edge.name), edge.spec.qmax))

    def _float_readers(self, ends: Mapping[str, Sequence[fx.Node]]) -> set[fx.Node]:
        """Return the nodes that compute with floats."""
        taken = {self._nodes[call.node] for call in self._calls} | {n for nodes in ends.values() for n in nodes}
        return {node for node in self._graph.nodes if node not in taken}

    def _dequantize(self, name: str, node: fx.Node, users: Sequence[fx.Node]) -> None:
        """Give those who compute with floats the dequantized value."""
        users = [user for user in users if user.target is not ops.dequantize and not _asks_shape(user)]
        if not users:
            return
        with self._graph.inserting_after(node):
            real = self._graph.call_function(ops.dequantize, (node, *self._of(name)))
        for user in users:
            user.replace_input_with(node, real)

    def _rewrite(self, call: IntegerCall, nodes: Sequence[fx.Node]) -> None:
        """Let a node compute with integers, and do those after it."""
        if call.form is Form.LOOKS_UP or (call.form in (Form.ADDS, Form.MULTIPLIES) and len(call.inputs) == 1):
            self._look_up(call, nodes)
            return
        node = nodes[0]
        rewrite: dict[Form, Callable[[IntegerCall, fx.Node, list[fx.Node]], None]] = {
            Form.PRODUCT: self._product,
            Form.KEEPS: self._move,
            Form.PADS: self._pad,
            Form.POOLS: self._pool,
            Form.RESIZES: self._resize,
            Form.ADDS: self._combine,
            Form.MULTIPLIES: self._combine,
            Form.AVERAGES: self._average,
        }
        rewrite[call.form](call, node, [self._ints[name] for name in call.inputs])

    def _product(self, call: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        kwargs: dict[str, Any] = {}
        if call.output:
            kwargs["scale"], kwargs["zero_point"] = self._of(call.output)
            kwargs["qmax"] = self._edges[call.output].spec.qmax
        if call.addend:
            kwargs["addend"] = self._ints[call.addend]
            kwargs["addend_scale"], kwargs["addend_zero_point"] = self._of(call.addend)
        kwargs.update({name: bound for name in ("low", "high") if (bound := getattr(call, name)) is not None})
        if call.curve:
            kwargs.update(curve=call.curve, slope=call.slope)
        node.args, node.kwargs = (inputs[0], *self._of(call.inputs[0])), kwargs

    def _move(self, _: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        if node.target in (torch.cat, torch.concat, torch.stack):
            node.args = (inputs, *node.args[1:])
        else:
            node.args = (inputs[0], *node.args[1:])

    def _pad(self, call: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        sides, mode = padding(*function_of(self._module, node))
        if mode == "constant":
            args = (inputs[0], self._of(call.inputs[0])[1], sides)
            node.op, node.target, node.args, node.kwargs = "call_function", ops.pad_value, args, {}
        else:
            self._move(call, node, inputs)

    def _pool(self, _: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        more = max_pool(*function_of(self._module, node))
        node.op, node.target, node.args, node.kwargs = "call_function", ops.max_pool_value, (inputs[0],), more

    def _resize(self, call: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        more = resizing(function_of(self._module, node)[1], call.rank)
        if more is None:
            self._move(call, node, inputs)
        else:
            node.op, node.target, node.args, node.kwargs = "call_function", ops.resize_value, (inputs[0],), more

    def _look_up(self, call: IntegerCall, nodes: Sequence[fx.Node]) -> None:
        table = self._table(call, nodes)
        path = edit.free_name(self._module, f"{call.output}_table")
        edit.set_tensor(self._module, path, table)
        node = nodes[0]
        with self._graph.inserting_before(node):
            read = self._graph.get_attr(path)
        function, x = ops.lookup if table.dim() == 1 else ops.lookup_channels, self._ints[call.inputs[0]]
        node.op, node.target, node.args, node.kwargs = "call_function", function, (x, read), {}

    def _table(self, call: IntegerCall, nodes: Sequence[fx.Node]) -> torch.Tensor:
        """Return what nodes make of what the 256 integers stand for, as integers; those of each channel."""
        scale, zero_point = self._found[self._edges[call.inputs[0]].scale_of]
        channels = max(self._channels(node) for node in nodes)
        shape = (channels, 256) if channels else (256,)
        if scale.is_meta:
            return torch.empty(shape, dtype=torch.uint8, device="meta")
        every = ops.dequantize(torch.arange(256, dtype=torch.uint8), scale.cpu(), zero_point.cpu())
        if channels:  # as a value of these channels and as many dimensions
            rest = [1] * (max(call.rank, 3) - 3)
            every = every.view(256, *rest).expand(1, channels, 256, *rest)
        edge = self._edges[call.output]
        out_scale, out_zero_point = self._found[edge.scale_of]
        real = evaluate(self._module, nodes, every)
        table = ops.quantize(real, out_scale.cpu(), out_zero_point.cpu(), edge.spec.qmax).to(scale.device)
        return table.view(shape)

    def _channels(self, node: fx.Node) -> int:
        """Return how many tables a function of values needs, one for each channel; 0: one for all of the value."""
        kind, given = function_of(self._module, node)
        row = find_value_operator(kind)
        return row.channels(given) if row is not None else 0

    def _combine(self, call: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        sides = [part for name, one in zip(call.inputs, inputs, strict=True) for part in (one, *self._of(name))]
        kwargs: dict[str, Any] = {n: bound for n in ("low", "high") if (bound := getattr(call, n)) is not None}
        kwargs["qmax"] = self._edges[call.output].spec.qmax
        if node.target in _SUBTRACTIONS:
            kwargs["alpha"] = -1.0
        node.target = ops.add_values if call.form is Form.ADDS else ops.mul_values
        node.op, node.args, node.kwargs = "call_function", (*sides, *self._of(call.output)), kwargs

    def _average(self, call: IntegerCall, node: fx.Node, inputs: list[fx.Node]) -> None:
        target, more = average(*function_of(self._module, node), rank=call.rank)
        more["qmax"] = self._edges[call.output].spec.qmax
        args = (inputs[0], *self._of(call.inputs[0]), *self._of(call.output))
        node.op, node.target, node.args, node.kwargs = "call_function", target, args, more


_SUBTRACTIONS = ("sub", "sub_", torch.sub, operator.sub)


def _asks_shape(node: fx.Node) -> bool:
    return node.target in ("size", "dim", "ndimension", "numel", "nelement") or (
        node.target is getattr and node.args[1] in ("shape", "ndim")
    )


def _find_qparams(module: fx.GraphModule, edges: Sequence[Edge]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return the scale and zero point of each class of values, from its observer; meta tensors on the meta device."""
    found, unseen = {}, []
    is_meta = any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    for edge in edges:
        if edge.scale_of in found or edge.scale_of in unseen:
            continue
        observer = module.get_submodule(observer_path(edge.scale_of))
        assert isinstance(observer, ValueObserver)
        if is_meta and not observer.is_given:
            found[edge.scale_of] = torch.empty((), device="meta"), torch.empty((), dtype=torch.int32, device="meta")
        elif observer.has_seen:
            found[edge.scale_of] = observer.calculate_qparams()
        else:
            unseen.append(edge.scale_of)
    if unseen:
        places = {node.name: edit.node_frame(node) for node in module.graph.nodes}
        named = [f"{name!r} ({places[name]})" if places.get(name) else repr(name) for name in unseen[:3]]
        names = ", ".join(named) + (f" and {len(unseen) - 3} more" if len(unseen) > 3 else "")
        raise CalibrationError(
            f"the static model is not calibrated: {names} of {len(found) + len(unseen)} values saw no data. Run the "
            "prepared model on some batches like those that it will see, or give them to convert_fx(prepared, "
            "data=batches)"
        )
    return found


def _drop_observers(module: fx.GraphModule, edges: Sequence[Edge], calls: Sequence[IntegerCall]) -> None:
    """Take the observers out of the graph and the module."""
    paths = {observer_path(edge.scale_of) for edge in edges}
    paths |= {mean_path(call.node) for call in calls if call.form is Form.PRODUCT}
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target in paths:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    for path in paths:
        module.delete_submodule(path)
