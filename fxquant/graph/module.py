"""The GraphModule that fxquant gives back, and what it remembers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fxquant.errors import ModelStateError
from fxquant.graph import edit
from fxquant.graph.call import Example
from fxquant.graph.convert import dtypes
from fxquant.graph.fingerprint.architecture import Architecture
from fxquant.graph.preserve.attributes import Part, check_settable, seal
from fxquant.graph.preserve.bound import carry, install
from fxquant.graph.preserve.extra_state import key_of, lost_states, tensors_of
from fxquant.graph.preserve.preserve import NOTHING_PRESERVED, Keep, Preserved
from fxquant.graph.references import copy_attributes
from fxquant.graph.trace.tracer import TRACING
from fxquant.nn.base import QuantizedModule, dtype_errors, refuse_script
from fxquant.nn.training import trainable, warn_of_training
from fxquant.operators import Operator
from fxquant.qconfig import QConfig
from fxquant.qconfig_mapping import QConfigMapping


@dataclass(frozen=True)
class Coverage:
    """How many bytes of the weights are quantized, or will be.

    Weights are the tensors of two or more dimensions that candidates hold. Tied ones count once, and as float where
    one of their candidates stays so.
    """

    quantized_bytes: int = 0
    total_bytes: int = 0

    @property
    def share(self) -> float:
        """The quantized part, 0 to 1; 1 where there is no weight."""
        return self.quantized_bytes / self.total_bytes if self.total_bytes else 1.0


NOTHING = Coverage()
"""The coverage of a model without weights."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """One decision to quantize.

    path: the module's path, or its weight's path for a call. kind: what it was ("nn.Linear", "F.linear"). operator: the
    row's name. rule: the mapping entry that decided. call, observer: a call's node name and the path of its weight's
    observer, None for a module. float_bytes, int_bytes: what its tensors take before and after (0 before convert_fx).
    opt_out: the mapping entry that would leave it float. shape: rows, inputs and outputs of its first call on the
    example inputs, () where they are not known. part_rules: further entries, which decided for weights of it. Its float
    weights are candidates of their own, each `Left`, and in none of its bytes. rounding: how weights were rounded where
    data was given for that.
    """

    path: str
    kind: str
    operator: str
    qconfig: QConfig
    rule: str
    call: str | None = None
    observer: str | None = None
    float_bytes: int = 0
    int_bytes: int = 0
    opt_out: str = ""
    shape: tuple[int, ...] = ()
    part_rules: tuple[str, ...] = ()
    rounding: str = ""


ASKED = "the mapping says float"
"""The reason of those candidates that stay float because an entry of the mapping says so."""


@dataclass(frozen=True, kw_only=True)
class Left:
    """One candidate, or one weight of a Site, that stays float, and why. call: a call's node name, None for a module.
    opt_out: the mapping entry that would say so.
    """

    path: str
    kind: str
    reason: str
    rule: str = ""
    call: str | None = None
    float_bytes: int = 0
    opt_out: str = ""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """One chain that became one node. path: where it stands now; chain: what it was, in order."""

    path: str
    chain: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Unfused:
    """One chain that stayed several nodes, because code beside the graph uses `used`, as it is."""

    chain: tuple[str, ...]
    used: str


@dataclass(frozen=True, kw_only=True, repr=False)
class Record:
    """All that a model of ours remembers beside its graph. stage: "fused", "prepared" or "quantized".

    is_traced: whether it is an FxModule; quantize_dynamic gives the user's own class instead. example: of a prepared
    one, the arguments that it is checked on once it is quantized. architecture: of the float model, for checkpoints.
    unchecked: why that check was not possible. live, checked: the paths of the attributes that its graph reads at each
    call, to use and to compare; fixed: of those that forward read when it was traced; baked: the plain values that it
    read. written: the parameters that forward writes into. batch_invariant: what was asked of its float products:
    graph/convert/invariant.py. extra_states: what get_extra_state gave, by the paths of modules that were traced
    through. trainable: of a quantized one with sites, the parameters that required a gradient when it was made.
    """

    stage: str
    is_traced: bool = True
    sites: tuple[Site, ...] = ()
    left: tuple[Left, ...] = ()
    fusions: tuple[Fusion, ...] = ()
    mapping: QConfigMapping = field(default_factory=QConfigMapping)
    operators: tuple[Operator, ...] = ()
    unfused: tuple[Unfused, ...] = ()
    preserved: Preserved = NOTHING_PRESERVED
    live: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    fixed: frozenset[str] = frozenset()
    baked: Mapping[str, Any] = field(default_factory=dict)
    written: frozenset[str] = frozenset()
    constants: Mapping[str, Any] = field(default_factory=dict)
    untraced: Mapping[str, str] = field(default_factory=dict)
    float_bytes: int = 0
    coverage: Coverage = NOTHING
    extra_states: Mapping[str, Any] = field(default_factory=dict)
    example: Example | None = field(default=None, compare=False)
    architecture: Architecture | None = None
    unchecked: str = ""
    batch_invariant: bool | None = None
    trainable: frozenset[str] | None = field(default=None, compare=False)

    @property
    def outcome(self) -> str:
        """In a line: how many candidates, and how many bytes of their weights, are quantized or will be."""
        done, tense = len(self.sites), "quantized" if self.stage == "quantized" else "to be quantized by convert_fx"
        return (
            f"{done} of {done + len(self.left)} candidates, {self.coverage.quantized_bytes:,} of "
            f"{self.coverage.total_bytes:,} weight bytes {tense} ({100 * self.coverage.share:.1f} %)"
        )

    @property
    def keep(self) -> Keep:
        """What another trace of the same model has to take care of."""
        return Keep(self.preserved, self.live, self.written)

    def __repr__(self) -> str:
        return f"<fused: {len(self.fusions)} chains>" if self.stage == "fused" else f"<{self.stage}: {self.outcome}>"

    def advance(self, **changes: Any) -> Record:
        """Return a record with some fields changed."""
        return replace(self, **changes)


class FxModule(fx.GraphModule):
    """A torch.fx.GraphModule that keeps its record, its hooks and its preserved attributes in copies and pickles.

    record: what it remembers, unless the user's model has a module of that name: `record_of` finds it always.
    """

    record: Record

    def recompile(self) -> Any:
        """Compile the graph, to be called as any module is.

        torch.fx's own way there costs a microsecond, and replaces the traceback of an error in the graph by a print.
        """
        code = super().recompile()
        if "__call__" in vars(type(self)):
            del type(self).__call__
        return code

    def __getattr__(self, name: str) -> Any:
        for kind in ("_buffers", "_modules"):  # what a graph asks for at each call: nn.Module takes longer to find it
            found = self.__dict__.get(kind, {}).get(name)
            if found is not None:
                return found
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
        """Return the model as torch.jit.script takes it; raise ModelStateError for a quantized one."""
        return refuse_script() if self._fxquant_record.stage == "quantized" else self

    def __copy__(self) -> FxModule:
        twin = build(self, self.graph, self.__class__.__name__, self._fxquant_record)
        edit.carry_hooks(self, twin)
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> FxModule:
        twin = super().__deepcopy__(memo)
        assert isinstance(twin, FxModule)
        twin.__class__.__name__ = self.__class__.__name__  # a class of the twin's own
        twin.__dict__["_fxquant_record"] = copy.deepcopy(self._fxquant_record, memo)
        twin._non_persistent_buffers_set |= self._non_persistent_buffers_set  # which torch.fx forgets
        install(twin, self._fxquant_record.preserved)
        for name in self._fxquant_record.preserved.modules_of(self):  # torch.fx copies no second name of a module
            twin._modules[name] = copy.deepcopy(self._modules[name], memo)
        for name in self.__dict__.keys() - twin.__dict__.keys() - {"_compiled_call_impl"}:  # what the user hung on it
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
        reduced[1][0].pop("_compiled_call_impl", None)  # of .compile(): nn.Module's own pickles leave it out too
        return _restore, (reduced, self.__class__.__name__, nodes, hooks)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> FxModule:
        """Move as nn.Module does; what a quantized call reads as buffers, its integers and scales, keeps its dtype.

        The calls of tables give the new one.
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
        _take_old_call_keys(self, state_dict, prefix)
        own = {prefix + name: tensor for name, tensor in tensors_of(self).items()}
        errors: list[str] = args[-1]
        errors.extend(dtype_errors(own, state_dict))  # as a part of a larger model, whose load_state_dict is not ours
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load tensors as nn.Module does; integers never take floats, nor floats integers (RuntimeError)."""
        state_dict = copy.copy(state_dict)  # with the versions that it carries
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
        if part is module or type(part) in (nn.Module, Part):  # where nothing else is left of what they hold
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
    record, found = model._fxquant_record, {}
    for path in record.extra_states:
        found[path] = state_dict.pop(key_of(prefix, path), missing)
    absent = [path for path, state in found.items() if state is missing]
    missing += [key_of(prefix, path) for path in absent] if strict else []
    states = {path: state for path, state in found.items() if path not in absent}
    if states:
        keep_record(model, record.advance(extra_states={**record.extra_states, **states}))


def take_old_keys(root: nn.Module, state_dict: Any) -> None:
    """Rename in place what a state_dict of a quantized model holds under the keys that fxquant wrote before 0.1.0."""
    for path, module in root.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        if isinstance(module, FxModule):
            _take_old_call_keys(module, state_dict, prefix)
        elif isinstance(module, QuantizedModule):
            module.take_old_keys(state_dict, prefix)


def _take_old_call_keys(model: FxModule, state_dict: dict[str, Any], prefix: str) -> None:
    """Rename in place what a state_dict holds of quantized calls under their old keys.

    Those were named by the dtype of the values: all of 4 bits were `_uint8`, numbered where there were several. A
    state_dict is taken for an old one where it has none of the keys that are new, one that is no more, and only
    tensors that fit.
    """
    old_of = _old_call_keys(model)
    old = {key: name for key, name in old_of.items() if prefix + name in state_dict}
    has_new = any(prefix + key in state_dict for key in old_of.keys() - old_of.values())
    if has_new or not set(old.values()) - old_of.keys():
        return
    held = {key: state_dict[prefix + name] for key, name in old.items()}
    if all(_fits(edit.get_tensor(model, key), tensor) for key, tensor in held.items()):
        for name in old.values():
            del state_dict[prefix + name]
        state_dict.update({prefix + key: tensor for key, tensor in held.items()})


def _fits(own: torch.Tensor | None, tensor: Any) -> bool:
    """Return whether what a state_dict holds could be the values of a tensor."""
    return (
        own is not None and isinstance(tensor, torch.Tensor) and (own.dtype, own.shape) == (tensor.dtype, tensor.shape)
    )


def _old_call_keys(model: FxModule) -> dict[str, str]:
    """Return the old key of the values of each quantized call whose values are stored as uint8."""
    old_of: dict[str, str] = {}
    calls = {node.name: node for node in model.graph.nodes}
    for site in model._fxquant_record.sites:
        spec, node = site.qconfig.weight, calls.get(site.call or "")
        for part in node.all_input_nodes if node is not None and spec.torch_dtype == torch.uint8 else ():
            key = str(part.target)
            stem, found, _ = key.rpartition(f"_{spec.dtype}")
            if part.op == "get_attr" and found and key not in old_of:
                names = (f"{stem}_uint8{f'_{n}' if n else ''}" for n in itertools.count())
                old_of[key] = next(name for name in names if name not in old_of.values())
    return old_of


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


def keep_record(model: nn.Module, record: Record) -> nn.Module:
    """Return a model of the user's own class that carries a record, in copies and pickles too."""
    if record.stage == "quantized" and record.sites and record.trainable is None:
        record = record.advance(trainable=trainable(model))
    model.__dict__["_fxquant_record"] = record
    return model


def record_of(model: Any) -> Record | None:
    """Return what a model of ours remembers, None for any other."""
    found = vars(model).get("_fxquant_record") if isinstance(model, nn.Module) else None
    return found if isinstance(found, Record) else None


def preserved_of(model: nn.Module) -> Preserved:
    """Return what a model keeps of the user's beside forward: of a fused one, what fuse_fx kept."""
    record = record_of(model)
    return NOTHING_PRESERVED if record is None else record.preserved


def refuse_ours(model: Any, caller: str, stages: Sequence[str] = ("fused", "prepared", "quantized")) -> None:
    """Raise ModelStateError for a model that went through fxquant already, to one of these stages."""
    record = record_of(model)
    if record is not None and record.stage in stages:
        raise ModelStateError(f"{caller} needs the float model, got a model that is {record.stage} already")


def need_stage(model: Any, stage: str, caller: str, cure: str) -> Record:
    """Return the model's record if it is at the stage that a call needs, else raise ModelStateError."""
    record = record_of(model)
    if record is not None and record.stage == stage:
        return record
    got = f"a model that is {record.stage} already" if record is not None else type(model).__name__
    raise ModelStateError(f"{caller} needs the result of {cure}, got {got}")
