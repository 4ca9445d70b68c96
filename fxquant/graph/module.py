"""The GraphModule that fxquant gives back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.graph import edit
from fxquant.graph.convert import dtypes
from fxquant.graph.old_keys import take_old_call_keys, take_old_keys
from fxquant.graph.preserve.attributes import Part, check_settable, seal
from fxquant.graph.preserve.bound import carry, install
from fxquant.graph.preserve.extra_state import key_of, lost_states, tensors_of
from fxquant.graph.record import Record, keep_record, record_of
from fxquant.graph.references import copy_attributes
from fxquant.graph.runs import RUNS, with_runs
from fxquant.graph.trace.tracer import TRACING
from fxquant.nn.base import QuantizedModule, refuse_script
from fxquant.nn.stored import dtype_errors
from fxquant.nn.training import warn_of_training


class FxModule(fx.GraphModule):
    """A torch.fx.GraphModule that keeps its record, its hooks and its preserved attributes in copies and pickles.

    record: what it remembers, unless the user's model has a module of that name; `record_of` always finds it.
    """

    record: Record

    def recompile(self) -> Any:
        """Compile the graph, to be called as any module is.

        torch.fx's own way there costs a microsecond, and replaces the traceback of an error in the graph by a print.
        """
        code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        self.__dict__.pop(RUNS, None)
        if any(node.target is ops.quantize for node in self.graph.nodes):
            type(self).forward = with_runs(type(self).forward)
        return code

    def __getattr__(self, name: str) -> Any:
        for kept in ("_buffers", "_modules"):  # a graph reads these at each call, and nn.Module takes longer
            value = self.__dict__.get(kept, {}).get(name)
            if value is not None:
                return value
        try:
            return super().__getattr__(name)
        except AttributeError:
            record = record_of(self)
            if record is not None and name == "record":
                return record
            raise AttributeError(
                f"this {self.__class__.__name__} is a traced graph and has no attribute {name!r}; a graph keeps what "
                f"forward uses. If your float model has it, name it: "
                f"prepare_fx(..., preserved_attributes=({name!r},))"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        check_settable(self, name, value)
        super().__setattr__(name, value)

    def train(self, mode: bool = True) -> FxModule:
        """Set the mode as nn.Module does; warn where a quantized model that cannot train is put into training mode."""
        super().train(mode)
        if mode and not any(isinstance(part, QuantizedModule) for part in self.modules()):  # which warn themselves
            warn_of_training(self, FxModule)
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """Return the model for torch.jit.script; raise ModelStateError for a quantized one."""
        return refuse_script() if self._fxquant_record.stage == "quantized" else self

    def __copy__(self) -> FxModule:
        twin = build(self, self.graph, self.__class__.__name__, self._fxquant_record)
        edit.carry_hooks(self, twin)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> FxModule:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, FxModule)
        twin.__class__.__name__ = self.__class__.__name__  # the twin's class is not shared
        twin.__dict__["_fxquant_record"] = copy.deepcopy(self._fxquant_record, memo)
        twin._non_persistent_buffers_set |= self._non_persistent_buffers_set  # which torch.fx forgets
        install(twin, self._fxquant_record.preserved)
        for name in self._fxquant_record.preserved.modules_of(self):  # torch.fx drops the second name of a module
            twin._modules[name] = copy.deepcopy(self._modules[name], memo)
        ours = {"_compiled_call_impl", RUNS}
        for name in self.__dict__.keys() - twin.__dict__.keys() - ours:  # what the user attached
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        memo[id(self)] = twin
        twin.__dict__.update(copy_attributes(self, memo))
        for name in edit.HOOKS:
            twin.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        return twin

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        nodes = [(node.name, node.meta) for node in self.graph.nodes]
        hooks = {name: self.__dict__[name] for name in edit.HOOKS}  # torch.fx drops those of the root
        reduced = super().__reduce__()
        reduced[1][0].pop(RUNS, None)
        reduced[1][0].pop("_compiled_call_impl", None)  # of .compile(): nn.Module's own pickles leave it out too
        return _restore, (reduced, self.__class__.__name__, nodes, hooks)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FxModule:
        """Move as nn.Module does; the integers and scales of quantized calls keep their dtype.

        Calls of tables change their output dtype.
        """
        record = record_of(self)
        calls = {site.call for site in record.sites} if record is not None and record.stage == "quantized" else set()
        ours = [node for node in self.graph.nodes if node.name in calls or node.target in dtypes.OURS]
        read = [part for node in ours for part in node.all_input_nodes]
        kept = {str(part.target): edit.get_tensor(self, str(part.target)) for part in read if part.op == "get_attr"}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for path, tensor in kept.items():
            moved = edit.get_tensor(self, path)
            if tensor is None or moved is None or isinstance(moved, nn.Parameter) or moved.dtype == tensor.dtype:
                continue
            edit.set_tensor(self, path, tensor.to(moved.device))
        dtypes.follow(self, fn)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        record = self._fxquant_record
        destination.update({key_of(prefix, path): state for path, state in record.extra_states.items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        _, strict, missing, *_ = args
        _take_extra_states(self, state_dict, prefix, strict, missing)
        take_old_call_keys(self, self._fxquant_record, state_dict, prefix)
        expected = {prefix + name: tensor for name, tensor in tensors_of(self).items()}
        errors: list[str] = args[-1]
        # As a part of a larger model, whose load_state_dict is not ours.
        errors.extend(dtype_errors(expected, state_dict))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors as nn.Module does; integers never take floats, nor floats integers (RuntimeError)."""
        state_dict = copy.copy(state_dict)  # keeps the versions in it
        take_old_keys(self, state_dict)
        errors = dtype_errors(tensors_of(self), state_dict)
        for path, module in self.named_modules() if strict else ():
            if isinstance(module, QuantizedModule):
                errors += module.float_keys(state_dict, f"{path}." if path else "")
        if errors:
            raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {self.__class__.__name__}:", *errors]))
        return super().load_state_dict(state_dict, strict, assign)


def build(root: nn.Module, graph: fx.Graph, name: str, record: Record) -> FxModule:
    """Return the module for a graph over a root's submodules and tensors."""
    module = FxModule(root, graph, name)
    for part in module.modules():
        if part is module or type(part) in (nn.Module, Part):  # these are new, and hold only what the graph uses
            part._non_persistent_buffers_set.clear()  # torch 2.13 forgets them by itself, 2.14 does not
    carry(root, module, record.preserved)
    install(module, record.preserved)
    keep_record(module, record)
    seal(module, record.baked)
    module.train(False)
    return module


def _take_extra_states(
    model: FxModule, state_dict: dict[str, Any], prefix: str, strict: bool, missing: list[str]
) -> None:
    """Take out of a state_dict the extra states that torch's loading has no module for, and keep them."""
    record, taken = model._fxquant_record, {}
    for path in record.extra_states:
        taken[path] = state_dict.pop(key_of(prefix, path), missing)
    absent = [path for path, state in taken.items() if state is missing]
    missing += [key_of(prefix, path) for path in absent] if strict else []
    states = {path: state for path, state in taken.items() if path not in absent}
    if states:
        keep_record(model, record.advance(extra_states={**record.extra_states, **states}))


def _restore(
    reduced: tuple[Any, ...], name: str, nodes: list[tuple[str, dict[str, Any]]], hooks: dict[str, Any]
) -> FxModule:
    """Rebuild from a pickle: torch.fx rebuilds a plain GraphModule by tracing its own code; make it ours again."""
    modules, without_file = reduced[1][0]["_modules"], reduced[1][0]["_non_persistent_buffers_set"]
    with TRACING:
        plain = reduced[0](*reduced[1])
    plain._modules.update({name: module for name, module in modules.items() if name not in plain._modules})
    for node, (own_name, meta) in zip(plain.graph.nodes, nodes, strict=True):
        node.name, node.meta = own_name, meta
    graph = copy.deepcopy(plain.graph)  # whose namespace knows those names
    module = build(plain, graph, name, plain.__dict__["_fxquant_record"])
    module.__dict__.update({**{n: v for n, v in plain.__dict__.items() if n not in module.__dict__}, **hooks})
    module._non_persistent_buffers_set |= without_file
    module.train(plain.training)
    return module


def finish(module: fx.GraphModule, source: nn.Module, record: Record, is_skeleton: bool = False) -> FxModule:
    """Return the result of a pass as an FxModule, with the hooks that its source has.

    is_skeleton: the source is what a file is loaded into, which brings its extra states.
    """
    earlier = record_of(source)
    states = {} if earlier is None else earlier.extra_states
    baked = {**({} if earlier is None else earlier.baked), **record.baked}
    record = record.advance(extra_states={**states, **lost_states(module, source, is_skeleton)}, baked=baked)
    result = build(module, module.graph, type(source).__name__, record)
    places = dict(result.named_modules())
    for path, original in source.named_modules():
        if path in places and edit.has_hooks(original):
            edit.carry_hooks(original, places[path])
    return result
