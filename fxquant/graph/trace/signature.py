"""The signature of a traced model: which arguments its graph fixes and checks, and how its forward takes them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from fxquant.errors import ArgumentError, ShapeError
from fxquant.graph.call import Inputs

STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
"""How torch.fx writes *args and **kwargs."""

_PLAIN = (bool, int, float, str, type(None))


def arguments_of(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a call by the names that forward has for them, without defaults."""
    return dict(inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs).arguments)


class Interpreter(fx.Interpreter):
    """Runs a graph on arguments by name: torch.fx's own counts them off, and cannot take keywords.

    see: is called with each node and its value.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        arguments: dict[str, Any],
        see: Callable[[fx.Node, Any], None] = lambda _node, _value: None,
        **options: Any,
    ) -> None:
        super().__init__(module, graph=graph, **options)
        self.extra_traceback = False  # it would add lines of its own to our errors
        self._arguments, self._see = arguments, see

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value."""
        value = super().run_node(n)
        self._see(n, value)
        return value

    def placeholder(self, target: Any, args: Any, _: Any) -> Any:
        """Return an argument, or its default."""
        name = str(target).lstrip("*")
        if name in self._arguments:
            return self._arguments[name]
        rest: dict[str, Any] = {"*": (), "**": {}}
        return rest[target[: -len(name)]] if name != target else args[0]


def fixable(model: nn.Module, inputs: Inputs) -> dict[str, Any]:
    """Return the arguments of a call, defaults included, that a graph can be specialized for.

    Plain values are under their names; under "*args" is how many there are, under "**kwargs" the list of their names.
    """
    signature = inspect.signature(model.forward)
    bound = signature.bind(*inputs.args, **inputs.kwargs)
    bound.apply_defaults()
    fixed: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        stars = STARS.get(signature.parameters[name].kind, "")
        if stars:
            fixed[stars + name] = len(value) if stars == "*" else sorted(value)
        elif isinstance(value, _PLAIN):
            fixed[name] = value
    return fixed


def unpacked(kind: Any, proxy: Any, fixed: Any) -> Any:
    """Return what forward is traced with for a fixed argument: its value, or the parts of *args or **kwargs."""
    if kind is inspect.Parameter.VAR_POSITIONAL:
        return [proxy[index] for index in range(fixed)]
    if kind is inspect.Parameter.VAR_KEYWORD:
        return {name: proxy[name] for name in fixed}
    return fixed


def describe(name: str, fixed: Any) -> str:
    """Return "mask=None", "2 *args" or "**kwargs of 'a'", for messages."""
    if name.startswith("**"):
        return f"{name} of {', '.join(map(repr, fixed)) or 'none'}"
    return f"{fixed} {name}" if name.startswith("*") else f"{name}={fixed!r}"


@fx.node.has_side_effect
def check_argument(value: Any, name: str, fixed: Any) -> None:
    """Raise ArgumentError unless an argument has the value that the graph was made for. Such graphs call this."""
    if has_torch_function((value,)):
        handle_torch_function(check_argument, (value,), value, name, fixed)
    elif name.startswith("**"):
        if sorted(value) != list(fixed):
            raise _other_argument(name, sorted(value), fixed)
    elif name.startswith("*"):
        if len(value) != fixed:
            raise _other_argument(name, len(value), fixed)
    elif value is not fixed and not (isinstance(value, _PLAIN) and value == fixed):
        raise _other_argument(name, value, fixed)


@fx.node.has_side_effect
def check_sizes(value: Any, name: str, sizes: tuple[tuple[int, int | None], ...]) -> None:
    """Raise ShapeError unless an input has sizes that its graph was made for. sizes: the least and the greatest."""
    if has_torch_function((value,)):
        handle_torch_function(check_sizes, (value,), value, name, sizes)
        return
    shape = tuple(value.shape)
    fits = (low <= size and (high is None or size <= high) for size, (low, high) in zip(shape, sizes, strict=False))
    if len(shape) != len(sizes) or not all(fits):
        expected = [str(low) if low == high else f"{low} to {high or 'any'}" for low, high in sizes]
        raise ShapeError(
            f"{name!r}: this model was exported, or traced, for ({', '.join(expected)}), got {shape}; export it again "
            "with dynamic_shapes for what varies, or prepare it with such inputs"
        )


def _other_argument(name: str, got: Any, fixed: Any) -> ArgumentError:
    received = f"a tensor of shape {tuple(got.shape)}" if isinstance(got, torch.Tensor) else describe(name, got)
    return ArgumentError(
        f"{name.lstrip('*')!r}: this model was prepared for {describe(name, fixed)}, because its forward branches on "
        f"that, and got {received}. Keep to the value, or prepare the float model again with the other one in "
        "example_inputs or example_kwargs"
    )


class SignatureCodeGen(fx.graph.CodeGen):
    """Writes a graph's forward with the model's kinds of arguments, where torch.fx would make all positional."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.kinds = {p.name: p.kind for p in inspect.signature(model.forward).parameters.values()}

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        """Return the first line of forward."""
        names = {text: text.lstrip("*").partition(":")[0].partition("=")[0].strip() for text in free_vars}
        arguments = [text for text in free_vars if names[text] in self.kinds]
        arguments.sort(key=lambda text: self.kinds[names[text]])  # which come in the order that Python wants
        kinds = [self.kinds[names[text]] for text in arguments]
        if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
            arguments.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
        if inspect.Parameter.POSITIONAL_ONLY in kinds:
            arguments.insert(kinds.count(inspect.Parameter.POSITIONAL_ONLY), "/")
        rest = [text for text in free_vars if names[text] not in self.kinds]
        return super().gen_fn_def([*rest, *arguments], maybe_return_annotation, **options)

    def process_inputs(self, *args: Any) -> Any:
        """Return the values that torch.fx's Interpreter gives to the placeholders, one after another.

        torch.export (strict=False) runs graphs like this, with keyword arguments in the caller's order and without
        their names. The names are found in the calling frame, and each value goes to the placeholder of its name.
        """
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_name == "process_inputs":  # the graph's own
            frame = frame.f_back
        interpreter, caller = frame.f_locals.get("self"), frame.f_back
        kwargs = caller.f_locals.get("kwargs") if caller is not None else None
        if not isinstance(interpreter, fx.Interpreter) or not isinstance(kwargs, dict) or not kwargs:
            return args
        last = args[len(args) - len(kwargs) :]
        if len(last) != len(kwargs) or any(a is not b for a, b in zip(last, kwargs.values(), strict=True)):
            return args  # another caller's keywords
        nodes = interpreter.graph.find_nodes(op="placeholder")
        interpreter.env.update(self._by_name(nodes, args[: len(args) - len(kwargs)], kwargs))
        return ()

    def _by_name(self, nodes: Iterable[fx.Node], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[fx.Node, Any]:
        """Return the placeholders' values; a placeholder that is missing has its default."""
        values: dict[fx.Node, Any] = {}
        waiting, named = list(args), dict(kwargs)
        for node in sorted(nodes, key=lambda node: self.kinds[str(node.target).lstrip("*")]):
            name = str(node.target).lstrip("*")
            kind = self.kinds[name]
            if kind is inspect.Parameter.VAR_POSITIONAL:
                values[node], waiting = tuple(waiting), []
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values[node] = named
            elif waiting and kind is not inspect.Parameter.KEYWORD_ONLY:
                values[node] = waiting.pop(0)
            elif name in named:
                values[node] = named.pop(name)
        return values
