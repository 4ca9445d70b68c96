"""One run of a prepared or quantized model on its example inputs, which leaves no trace: its calls and outputs."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxquant import ops
from fxquant.graph import edit
from fxquant.graph.call import Inputs, copies, repeatable
from fxquant.graph.convert.clean import own_tensors
from fxquant.graph.outputs import drained, named_floats, named_tensors
from fxquant.graph.record import Site, record_of
from fxquant.graph.trace.signature import Interpreter, arguments_of
from fxquant.nn.base import QuantizedModule
from fxquant.operators.values import Form

NOISE_DB = 30.0
"""The SQNR of each site under `noise`: a little less than in int8 (about 40 dB)."""


class Pass:
    """One run of a mirror on the example inputs. tensors, floats: its outputs, by name; error: why there are none.

    ran: how often each site was called, by its number; read: the numbers of quantized sites whose `.weight` was read;
    used: those whose float weights torch's functions were given. seen: with is_kept, each site's outputs, call by
    call. noise: a generator for noise that is added to the module sites' outputs, NOISE_DB below them.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Mapping[int, Site],
        inputs: Inputs,
        uses: Uses,
        is_kept: bool = False,
        noise: torch.Generator | None = None,
    ) -> None:
        self.model, self.sites, self.inputs, self.uses, self._noise = model, sites, inputs, uses, noise
        self.error: Exception | None = None
        output, ends = None, _ends(model, sites)
        for is_copy in (False, True):
            try:
                output = self._run(self._open(sites, is_copy, is_kept), sites if is_kept else {}, ends)
            except _WritesError:
                continue
            except Exception as error:
                self.error = error
            break
        self.used, self.read = uses.take()
        self.tensors, self.floats = named_tensors(output), named_floats(output)

    def again(self, sites: Mapping[int, Site], model: nn.Module | None = None, **options: Any) -> Pass:
        """Return another run on the same inputs, of this model or another one."""
        return Pass(self.model if model is None else model, sites, self.inputs, self.uses, **options)

    def _open(self, sites: Mapping[int, Site], is_copy: bool, is_kept: bool) -> nn.Module:
        """Return a mirror whose sites' calls are noted. is_copy: whether it has its own weights, to be written to."""
        self.ran: collections.Counter[int] = collections.Counter()
        self.seen: dict[int, list[torch.Tensor]] = {}
        twin = edit.mirror(_shell(self.model), hooks=False)
        if is_copy:
            own_tensors(twin, self.model)
        self.uses.guard(() if is_copy else twin.parameters())
        for number, site in sites.items():
            if site.call is None:
                self._watch(twin.get_submodule(site.path), number, is_kept and not site.is_static)
                self.uses.show(twin.get_submodule(site.path), number)
        return twin

    def _watch(self, module: nn.Module, number: int, is_kept: bool) -> None:
        """Note a site's calls, also direct calls of its forward."""
        forward = module.forward

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.ran[number] += 1
            output = forward(*args, **kwargs)
            if self._noise is not None:
                output = pytree.tree_map_only(torch.Tensor, self._shaken, output)
            if is_kept:
                self._keep(number, output)
            return output

        module.forward = noted

    def _shaken(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor with noise added, except to exact zeros, which quantization keeps."""
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_nested:
            return tensor
        drawn = torch.randn(tensor.shape, generator=self._noise).to(tensor)
        return tensor + drawn * (tensor != 0) * tensor.square().mean().sqrt() * 10 ** (-NOISE_DB / 20)

    def _keep(self, number: int, output: Any) -> None:
        first = next(iter(named_floats(output).values()), None)
        if first is not None:
            self.seen.setdefault(number, []).append(first.clone())  # forward may go on to write into it

    def _run(self, twin: nn.Module, kept: Mapping[int, Site], ends: Mapping[str, int]) -> Any:
        inputs = _placed(copies(self.inputs), twin)
        with torch.no_grad(), repeatable(), warnings.catch_warnings(), self.uses:
            warnings.simplefilter("ignore")  # the user sees the model's own warnings when running it
            if not isinstance(self.model, fx.GraphModule):
                return drained(twin(*inputs.args, **inputs.kwargs))
            calls = {site.call: number for number, site in kept.items() if site.call is not None}
            calls.update({name: number for name, number in ends.items() if number in kept})

            def see(node: fx.Node, value: Any) -> None:
                if node.name in calls:
                    self._keep(calls[node.name], _real(twin, node, value))

            return drained(Interpreter(twin, self.model.graph, arguments_of(self.model, inputs), see).run())


def _ends(model: nn.Module, sites: Mapping[int, Site]) -> dict[str, int]:
    """Return the numbers of the static sites by the nodes that give their results: after their additions and clamps.

    A quantized graph has not kept the nodes that a static product does too; there the product gives the result.
    """
    record, static = record_of(model), {number: site for number, site in sites.items() if site.is_static}
    numbers = {site.call or site.path: number for number, site in static.items()}
    if record is None or not isinstance(model, fx.GraphModule):
        return {}
    nodes = {node.name: node for node in model.graph.nodes}
    products = [call for call in record.values.calls if call.form is Form.PRODUCT]
    ends = {call.node: next((name for name in call.absorbed[-1:] if name in nodes), call.node) for call in products}
    places = {end: name if name in numbers else str(nodes[name].target) for name, end in ends.items()}
    return {end: numbers[place] for end, place in places.items() if place in numbers}


def _real(root: nn.Module, node: fx.Node, value: Any) -> Any:
    """Return what a node gives in floats: a static product's integers are dequantized."""
    scale, zero_point = (node.kwargs.get(name) for name in ("scale", "zero_point"))
    if not (isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and isinstance(scale, fx.Node)):
        return value
    assert isinstance(zero_point, fx.Node)
    tensors = [edit.get_tensor(root, str(read.target)) for read in (scale, zero_point)]
    return ops.dequantize(value, *tensors)  # type: ignore[arg-type]


def _shell(model: nn.Module) -> nn.Module:
    """Return a graph's modules and tensors, to run it over: copying the graph would take longer than running it."""
    if not isinstance(model, fx.GraphModule):
        return model
    shell = nn.Module()
    tops = {str(node.target).partition(".")[0] for node in model.graph.find_nodes(op="get_attr")}
    shell.__dict__.update({name: value for name, value in vars(model).items() if name in tops})
    for place in ("_modules", "_parameters", "_buffers"):
        getattr(shell, place).update(getattr(model, place))
    return shell


class _WritesError(Exception):
    """Forward is about to write into a weight that the mirror shares with the model."""


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITERS = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS)})


def _writes(name: str) -> bool:
    """Return whether a function of torch with this name writes into its first argument."""
    return name in _WRITERS or (name.endswith("_") and not name.startswith("__"))


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_sparse or tensor.is_nested else tensor.untyped_storage().data_ptr()


class Uses(TorchFunctionMode):
    """Notes, while entered, the module sites of a prepared model whose float weights torch's functions are given.

    Weights are identified by their addresses, which the prepared model shares with the user's model, but not with a
    quantized one; `show` registers what that has as `.weight`. Biases count too, since a parametrized layer computes
    its weight anew at each call. Under any mode torch's transformer layers take no fast path, which would call no site.
    """

    def __init__(self, prepared: nn.Module, sites: Sequence[Site]) -> None:
        super().__init__()
        self._numbers: dict[int, list[int]] = {}
        self._shown: dict[int, tuple[torch.Tensor, set[int]]] = {}
        self._used: set[int] = set()
        self._read: set[int] = set()
        self._guarded: set[int] = set()
        for number, site in enumerate(sites):
            for tensor in prepared.get_submodule(site.path).parameters() if site.call is None else ():
                if tensor.numel():
                    self._numbers.setdefault(tensor.data_ptr(), []).append(number)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for part in (*args, *kwargs.values()):
            for tensor in part if isinstance(part, (list, tuple)) else (part,):
                if type(tensor) is nn.Parameter:
                    self._used.update(self._numbers.get(tensor.data_ptr(), ()))
                elif id(tensor) in self._shown:
                    self._read |= self._shown[id(tensor)][1]
        name = getattr(func, "__name__", "")
        written = kwargs["out"] if "out" in kwargs else args[0] if args and _writes(name) else None
        if self._guarded and isinstance(written, torch.Tensor) and _address(written) in self._guarded:
            raise _WritesError
        return func(*args, **kwargs)

    def guard(self, parameters: Iterable[torch.Tensor]) -> None:
        """Raise _WritesError before these are written into."""
        self._guarded = {_address(tensor) for tensor in parameters} - {0}

    def show(self, module: nn.Module, number: int) -> None:
        """Note from now on when the float weights that a site's quantized module shows are read."""
        for part in module.modules():
            for weight in part.float_weights() if isinstance(part, QuantizedModule) else ():
                self._shown.setdefault(id(weight), (weight, set()))[1].add(number)  # tied ones show the same object

    def take(self) -> tuple[set[int], set[int]]:
        """Return the sites whose float weights were used, and those whose quantized ones were read, since last time."""
        used, read = self._used, self._read
        self._used, self._read, self._shown = set(), set(), {}
        return used, read


def _placed(inputs: Inputs, model: nn.Module) -> Inputs:
    """Return the inputs on the model's device, if it has only one: it may have been moved since it was prepared."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return inputs
    (device,) = devices
    moved: Inputs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    return moved
