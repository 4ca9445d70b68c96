"""One run of a prepared or quantized model on its example inputs, of which nothing is left: what it calls and gives."""

from __future__ import annotations

import collections
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from fxquant.graph import edit
from fxquant.graph.call import Inputs, copies, repeatable
from fxquant.graph.convert.clean import own_tensors
from fxquant.graph.outputs import drained, named_floats, named_tensors
from fxquant.graph.record import Site
from fxquant.graph.trace.verify import Shapes
from fxquant.nn.base import QuantizedModule

NOISE_DB = 30.0
"""The SQNR that `noise` gives each site: a little less than int8 gives (about 40 dB)."""


class Pass:
    """One run of a mirror on the example inputs. tensors, floats: its outputs, by name; error: why there are none.

    ran: how often each site was called, by its number; read: the numbers of quantized ones whose `.weight` was read;
    used: of those whose float weights torch was given, whatever holds them. seen: with is_kept, what each site gave,
    call by call. noise: what is drawn from to add noise to what the module sites give, NOISE_DB below it.
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
        self.model, self.inputs, self.uses, self._noise = model, inputs, uses, noise
        self.error: Exception | None = None
        output = None
        for is_copy in (False, True):
            try:
                output = self._run(self._open(sites, is_copy, is_kept), sites if is_kept else {})
            except _WritesError:
                continue
            except Exception as error:
                self.error = error
            break
        self.used, self.read = uses.take()
        self.tensors, self.floats = named_tensors(output), named_floats(output)

    def _open(self, sites: Mapping[int, Site], is_copy: bool, is_kept: bool) -> nn.Module:
        """Return a mirror whose sites' calls are noted. is_copy: whether its weights are its own, to be written to."""
        self.ran: collections.Counter[int] = collections.Counter()
        self.seen: dict[int, list[torch.Tensor]] = {}
        twin = edit.mirror(_shell(self.model), hooks=False)
        if is_copy:
            own_tensors(twin, self.model)
        self.uses.guard(() if is_copy else twin.parameters())
        for number, site in sites.items():
            if site.call is None:
                self._watch(twin.get_submodule(site.path), number, is_kept)
                self.uses.show(twin.get_submodule(site.path), number)
        return twin

    def _watch(self, module: nn.Module, number: int, is_kept: bool) -> None:
        """Note a site's calls, also where they go to its forward itself."""
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
        """Return a tensor with noise added; exact zeros stay, as quantization keeps those of weights and inputs."""
        if not tensor.is_floating_point() or not tensor.numel() or tensor.is_nested:
            return tensor
        drawn = torch.randn(tensor.shape, generator=self._noise).to(tensor)
        return tensor + drawn * (tensor != 0) * tensor.square().mean().sqrt() * 10 ** (-NOISE_DB / 20)

    def _keep(self, number: int, output: Any) -> None:
        first = next(iter(named_floats(output).values()), None)
        if first is not None:
            self.seen.setdefault(number, []).append(first.clone())  # forward may go on to write into it

    def _run(self, twin: nn.Module, kept: Mapping[int, Site]) -> Any:
        inputs = _placed(copies(self.inputs), twin)
        with torch.no_grad(), repeatable(), warnings.catch_warnings(), self.uses:
            warnings.simplefilter("ignore")  # the user meets the model's own warnings when running it
            if not isinstance(self.model, fx.GraphModule):
                return drained(twin(*inputs.args, **inputs.kwargs))
            given = inspect.signature(self.model.forward).bind(*inputs.args, **inputs.kwargs).arguments
            calls = {site.call: number for number, site in kept.items() if site.call is not None}
            return drained(_Nodes(twin, self.model.graph, given, calls, self._keep).run())


def _shell(model: nn.Module) -> nn.Module:
    """Return what a graph is run over: its modules and tensors. To copy the graph would take longer than to run it."""
    if not isinstance(model, fx.GraphModule):
        return model
    shell = nn.Module()
    tops = {str(node.target).partition(".")[0] for node in model.graph.find_nodes(op="get_attr")}
    shell.__dict__.update({name: value for name, value in vars(model).items() if name in tops})
    for place in ("_modules", "_parameters", "_buffers"):
        getattr(shell, place).update(getattr(model, place))
    return shell


class _WritesError(Exception):
    """Forward is about to write into a weight, which the mirror shares with the model."""


_OPERATORS = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_WRITERS = frozenset({"__setitem__", *(f"__i{name}__" for name in _OPERATORS)})


def _writes(name: str) -> bool:
    """Return whether a function of torch's of this name writes into its first argument."""
    return name in _WRITERS or (name.endswith("_") and not name.startswith("__"))


def _address(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_sparse or tensor.is_nested else tensor.untyped_storage().data_ptr()


class _Nodes(Shapes):
    """Runs a graph and hands on what the calls that are sites give."""

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph,
        given: dict[str, Any],
        calls: Mapping[str, int],
        keep: Callable[[int, Any], None],
    ) -> None:
        super().__init__(module, graph, given)
        self._calls, self._keep = calls, keep

    def run_node(self, n: fx.Node) -> Any:
        """Return the node's value."""
        value = fx.Interpreter.run_node(self, n)
        if n.name in self._calls:
            self._keep(self._calls[n.name], value)
        return value


class Uses(TorchFunctionMode):
    """While it is entered, notes the module sites of a prepared model whose float weights torch's functions are given.

    The weights are known by their addresses, which the prepared model shares with the user's, and a quantized one with
    neither: what it shows as `.weight` is known by `show`. Biases count as well: a parametrized layer computes its
    weight anew at each call. Under any mode torch's transformer layers take no fast path, which would call no site.
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
        """Let what would write into these raise _WritesError instead."""
        self._guarded = {_address(tensor) for tensor in parameters} - {0}

    def show(self, module: nn.Module, number: int) -> None:
        """Note from now on who reads the float weights that a site's quantized module shows."""
        for part in module.modules():
            for weight in part.float_weights() if isinstance(part, QuantizedModule) else ():
                self._shown.setdefault(id(weight), (weight, set()))[1].add(number)  # tied ones show the same object

    def take(self) -> tuple[set[int], set[int]]:
        """Return the sites whose float weights were used, and whose quantized ones were read, since the last time."""
        used, read = self._used, self._read
        self._used, self._read, self._shown = set(), set(), {}
        return used, read


def _placed(inputs: Inputs, model: nn.Module) -> Inputs:
    """Return the inputs on the model's device, where that has but one: it may have been moved since it was prepared."""
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    if len(devices) != 1:
        return inputs
    (device,) = devices
    moved: Inputs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), inputs)
    return moved
