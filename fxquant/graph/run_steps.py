"""The plan of a run: the steps of its nodes, for the native library (csrc/python/call_run.c)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx, nn

from fxquant import ops
from fxquant.graph.run_nodes import MOVING, OUTPUT_SCALE, PASSES, Op, Place, Step, step_of
from fxquant.ops import library


def known_nodes(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that the library can do: those that move values only where these are integers."""
    integers: set[fx.Node] = set()
    known = set()
    for node in module.graph.nodes:
        step = step_of(module, node) if node.op.startswith("call_") else None
        moves = step is None or step.op in MOVING
        are_integers = any(part in integers for part in node.all_input_nodes)
        if step is not None and (are_integers or not moves):
            known.add(node)
        if are_integers if step is None or moves else _gives_integers(step):
            integers.add(node)
    return known


def _gives_integers(step: Step) -> bool:
    return step.op is not Op.DEQUANTIZE and (step.op is not Op.CONVOLVE or step.places[OUTPUT_SCALE] is not None)


def plan(
    module: fx.GraphModule, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> Any:
    """Return the library's plan of nodes that it knows, or None where there are too many ends."""
    return _Plan(module, nodes, outputs).make(inputs)


class _Plan:
    """What a plan is made of; values are numbered as they are made."""

    def __init__(self, module: fx.GraphModule, nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
        self._module, self._nodes, self._outputs = module, nodes, outputs
        self._places: dict[tuple[int, str], int] = {}
        self._found: list[Place] = []
        self._guards: dict[tuple[int, str | None], tuple[Any, ...]] = {}
        self._values: dict[fx.Node, int] = {}  # integers, and what is dequantized
        self._steps: list[list[Any]] = []
        self._count = 0

    def make(self, inputs: Sequence[fx.Node]) -> Any:
        given = [self._new() for _ in inputs]
        floats = dict(zip(inputs, given, strict=True))
        for node, number in floats.items():
            if any(user in self._nodes and user.target is not ops.quantize for user in node.users):
                self._values[node] = self._add(Op.IMPORT, (number,), (), (), None, None, 0.0)
        for node in self._nodes:
            step = step_of(self._module, node)
            assert step is not None
            known = floats if step.op is Op.QUANTIZE else self._values
            self._guard(node)
            if step.op is Op.PASS:
                self._values[node] = self._values[step.inputs[0]]
                continue
            numbers = tuple((known if part in known else self._values)[part] for part in step.inputs)
            places = tuple(-1 if place is None else self._place(place) for place in step.places)
            integers = tuple(map(int, step.integers))
            self._values[node] = self._add(step.op, numbers, places, integers, step.low, step.high, step.slope)
        ends = tuple(self._values[node] for node in self._outputs)
        for step_row in self._steps:
            step_row[2] = len(self._steps) if step_row[1] in ends else step_row[2]
        make, rows = library.function("plan_run"), tuple(map(tuple, self._steps))
        assert make is not None
        return make(tuple(self._found), tuple(self._guards.values()), self._count, tuple(given), ends, rows)

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _add(self, op: Op, inputs: tuple[int, ...], *rest: Any) -> int:
        output, at = self._new(), len(self._steps)
        for step in self._steps:
            step[2] = at if step[1] in inputs else step[2]
        self._steps.append([int(op), output, at, inputs, *rest])
        return output

    def _place(self, place: Place) -> int:
        key = id(place[0]), place[1]
        if key not in self._places:
            self._places[key] = len(self._found)
            self._found.append(place)
        return self._places[key]

    def _guard(self, node: fx.Node) -> None:
        """Keep in mind what a module's call depends on beside its tensors."""
        if node.op != "call_module":
            return
        owner: nn.Module = self._module
        for name in str(node.target).split("."):
            self._guards[id(owner._modules), name] = owner._modules, name, owner._modules[name]
            owner = owner.get_submodule(name)
        self._guards[id(owner), "forward"] = vars(owner), "forward", None
        if type(owner) in PASSES:
            self._guards[id(owner), "training"] = vars(owner), "training", False
        hooks = (owner._forward_hooks, owner._forward_pre_hooks, *_GLOBAL_HOOKS)
        self._guards.update({(id(each), None): (each, None, None) for each in hooks})


_GLOBAL_HOOKS: Any = (nn.modules.module._global_forward_hooks, nn.modules.module._global_forward_pre_hooks)
