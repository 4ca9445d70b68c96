"""What determines a float model's outputs besides its tensors, in a form that a file can hold and compare.

For a traced model that is its graph and the leaves that it calls: their types, their reprs, and numbers that they hold.
What is not traced, a leaf or a whole model, is identified by its code, without comments, annotations and formatting,
and by the functions and constants that this uses. Dropout and the like, idle in eval mode, do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd

from fxquant.graph.fingerprint.code import Code, code_of, hook_word, stored_names
from fxquant.graph.fingerprint.values import Values, is_near, without_addresses
from fxquant.graph.trace.tracer import BUFFERS_ARE_NODES, forward_of
from fxquant.qconfig_mapping import type_name

_IDLE_MODULES = (_DropoutNd, nn.Identity)
_IDLE_CALLS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)
_IDLE_NAMES = frozenset(
    {"training", "p", "dropout", "inplace", "momentum", "sparse", "scale_grad_by_freq", "enable_nested_tensor"}
)
"""Parts of a module's repr, and attributes, that change nothing in eval mode."""

_OF_ORIGIN = frozenset({"name_or_path", "_name_or_path", "device"})
"""Attributes that say where a model is, or where it came from."""

_BY_ANY_NAME = frozenset({"getattr", "vars", "__dict__", "attrgetter", "__getattribute__"})
"""Names in code that may read attributes which the code does not name."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_IDENTITY = "identity"


@dataclass(frozen=True)
class ModuleKind:
    """What one module is. type: its type, "" if its code identifies it; details: the parts of its extra_repr.

    attributes: its plain ones; code: for a user's module, a digest of its forward's code; release: the package that it
    comes from, with the version. tensors: summaries of those that no file holds, if they have values.
    """

    type: str
    details: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    release: str = ""
    tensors: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def describe(self, other: ModuleKind) -> str:
        """Return the module as one would write it, with what distinguishes it from another."""
        parts = [part for part in self.details if self.type != other.type or part not in other.details]
        shared = self.attributes.keys() & other.attributes.keys()
        parts += [f"{n}={self.attributes[n]}" for n in self.attributes if n in shared and self.is_other(other, n)]
        apart = [name for name in self.tensors if not self.has_near(other, name)]
        parts += [f"{name}: a tensor {tuple(self.tensors[name][0])} of other values or shape" for name in apart]
        return f"{self.type or 'a module of its own class'}({', '.join(parts)})"

    def is_other(self, other: ModuleKind, name: str) -> bool:
        """Return whether both have an attribute, with different values: a release may lack some."""
        return name in self.attributes and self.attributes[name] != other.attributes.get(name, self.attributes[name])

    def has_near(self, other: ModuleKind, name: str) -> bool:
        """Return whether a tensor is the same in both, or unknown in one of them, as on the meta device."""
        return name not in other.tensors or is_near(self.tensors[name], other.tensors[name])


@dataclass(frozen=True)
class Architecture:
    """A float model without its tensors. nodes: its graph, a line for each node, () without one; buffers_are_nodes: how
    it was traced. modules: by their paths, those that the graph calls and those inside them; without a graph, all.
    """

    modules: Mapping[str, ModuleKind]
    nodes: tuple[str, ...] = ()
    buffers_are_nodes: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Architecture:
        return self  # it never changes

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON values, with equal modules once."""
        kinds = list(dict.fromkeys(map(_key, self.modules.values())))
        numbers = {kind: number for number, kind in enumerate(kinds)}
        first = {_key(kind): kind for kind in self.modules.values()}
        return {
            "kinds": [asdict(first[kind]) for kind in kinds],
            "modules": {path: numbers[_key(kind)] for path, kind in self.modules.items()},
            "nodes": list(self.nodes),
            "buffers_are_nodes": self.buffers_are_nodes,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Architecture:
        """Return the architecture that to_plain wrote."""
        kinds = [ModuleKind(**{**kind, "details": tuple(kind["details"])}) for kind in plain["kinds"]]
        modules = {path: kinds[number] for path, number in plain["modules"].items()}
        return cls(modules, tuple(plain["nodes"]), bool(plain["buffers_are_nodes"]))


def _key(kind: ModuleKind) -> tuple[Any, ...]:
    return kind.type, kind.details, tuple(kind.attributes.items()), kind.code, kind.release, repr(kind.tensors)


class _Seen(NamedTuple):
    """What is known about the whole model. reads: the names that its code reads; paths: of its modules, by id."""

    reads: frozenset[str]
    paths: Mapping[int, str]


def describe(root: nn.Module, source: nn.Module | None = None) -> Architecture:
    """Return the architecture of a model in eval mode. A traced one is described by its graph, before fusion.

    source: the user's model, if root is a mirror of it on the meta device, to read values of tensors from.
    """
    graph = root.graph if isinstance(root, fx.GraphModule) else None
    parts: dict[str, nn.Module] = {}
    if graph is not None:
        for node in graph.find_nodes(op="call_module", sort=True):
            leaf = root.get_submodule(str(node.target))
            parts.update({f"{node.target}.{path}".rstrip("."): module for path, module in leaf.named_modules()})
    else:
        parts = dict(root.named_modules())
    codes = [code_of(type(m), forward_of(m)) for m in parts.values() if not type(m).__module__.startswith("torch.")]
    paths = {id(module): path for path, module in root.named_modules()}
    seen = _Seen(frozenset[str]().union(*(code.reads for code in codes)), paths)
    sources = dict((root if source is None else source).named_modules(remove_duplicate=False))
    modules = {path: _module_kind(module, sources.get(path), seen) for path, module in parts.items()}
    if graph is None:
        return Architecture(modules)
    hooks = tuple(_hooks(sources[""]))  # of the root, which is not a leaf; modules with hooks are
    modules.update({"": ModuleKind("hooks", hooks)} if hooks else {})
    return Architecture(modules, _node_lines(graph), bool(graph.output_node().meta.get(BUFFERS_ARE_NODES)))


def differences(saved: Architecture, actual: Architecture) -> tuple[list[str], list[str]]:
    """Return what makes a model another than the saved one, and what may: code from another release of a package.

    Each is a line that says where, and what the file and the model have there.
    """
    certain, possible = [], []
    for path in dict.fromkeys([*saved.modules, *actual.modules]):
        old, new = saved.modules.get(path), actual.modules.get(path)
        where = f"module {path!r}" if path else "the model"
        if old is None or new is None:
            kind, sides = (old, "the file, not this model") if new is None else (new, "this model, not the file")
            if kind is not None and kind.type != _IDENTITY:
                certain.append(f"{where}, {kind.describe(ModuleKind(''))}, is in {sides}")
        elif _is_other(old, new):
            certain.append(f"{where} is {new.describe(old)}, in the file {old.describe(new)}")
        elif old.code != new.code and old.code and new.code:
            name, _, old_version = old.release.partition(" ")
            new_name, _, new_version = new.release.partition(" ")
            if name == new_name and old_version != new_version:
                possible.append(f"{where}: the code of {name} {new_version} differs from that of {old_version}")
            else:
                certain.append(f"{where}: its forward, or what that calls, has other code than the file's model")
    if saved.nodes and actual.nodes and saved.buffers_are_nodes == actual.buffers_are_nodes:
        certain += _other_nodes(saved.nodes, actual.nodes)
    return certain, possible


def _is_other(old: ModuleKind, new: ModuleKind) -> bool:
    """Return whether two modules differ in more than their code."""
    return (old.type, old.details) != (new.type, new.details) or (
        any(old.is_other(new, n) for n in old.attributes) or not all(old.has_near(new, n) for n in old.tensors)
    )


def _other_nodes(saved: tuple[str, ...], actual: tuple[str, ...]) -> list[str]:
    """Return a line about the first node in which two graphs differ."""
    for number, (old, new) in enumerate(zip(saved, actual, strict=False)):
        if old != new:
            return [f"node {number} of its graph is {new}, in the file {old}"]
    if len(saved) != len(actual):
        return [f"its graph has {len(actual)} nodes, in the file {len(saved)}"]
    return []


def _module_kind(module: nn.Module, source: nn.Module | None, seen: _Seen) -> ModuleKind:
    """Return what a module is."""
    if isinstance(module, _IDLE_MODULES):
        return ModuleKind(_IDENTITY)
    module_type: Any = type(module)
    is_torchs = module_type.__module__.startswith("torch.")
    has_repr = module_type.extra_repr is not nn.Module.extra_repr
    values = _values(module, source, seen)
    code = Code() if is_torchs else code_of(module_type, forward_of(module))
    details = (*(_details(module) if has_repr else ()), *_hooks(module if source is None else source))
    for part in details if is_torchs else ():
        values.texts.pop(part.partition("=")[0], None)  # the repr has it
    name = type_name(module_type) if is_torchs else "" if code.digest else module_type.__name__
    return ModuleKind(name, details, values.texts, code.digest, code.release, values.tensors)


def _details(module: nn.Module) -> Iterator[str]:
    """Yield the parts of a module's extra_repr that count."""
    try:
        text = module.extra_repr()
    except Exception:  # of the user's, who did not ask for this call
        return
    for part in re.split(r",\s*(?![^(\[{]*[)\]}])", without_addresses(text)):
        if part and part.partition("=")[0].strip() not in _IDLE_NAMES:
            yield part.strip()


def _values(module: nn.Module, source: nn.Module | None, seen: _Seen) -> Values:
    """Return the values in a module that count, without those that its methods set while it runs.

    source: the user's own module, which has the values of tensors.
    """
    module_type: Any = type(module)
    is_torchs = module_type.__module__.startswith("torch.")
    skipped = _IDLE_NAMES | _OF_ORIGIN | _OF_EVERY_MODULE | stored_names(module_type)
    values = Values(seen.reads, skipped, seen.paths)
    knows_all = is_torchs or not seen.reads or bool(_BY_ANY_NAME & seen.reads)
    for name, value in vars(module).items():
        if name in skipped or not (name in seen.reads or (knows_all and not (is_torchs and name.startswith("_")))):
            continue
        values.add(name, value)
    values.tensors.clear()
    if source is None or is_torchs or code_of(module_type, forward_of(module)).writes:
        return values
    held = {name: source._buffers.get(name) for name in source._non_persistent_buffers_set}
    there = Values(seen.reads, skipped)
    for name, value in {**vars(source), **held}.items():
        if name in seen.reads and name not in skipped and value is not None:
            there.add(name, value)
    values.tensors.update(there.tensors)
    return values


def _hooks(module: nn.Module) -> Iterator[str]:
    """Yield the forward hooks of a module that take part in what it computes."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        words = [word for hook in getattr(module, name).values() if (word := hook_word(hook))]
        if words:
            yield f"{name.strip('_')}={'; '.join(words)}"


def _node_lines(graph: fx.Graph) -> tuple[str, ...]:
    """Return a line for each node that contributes to outputs or writes, with numbers in place of names."""
    nodes = [node for node in graph.nodes if node.op == "output" or _is_write(node)]
    live: set[fx.Node] = set()
    while nodes:
        node = nodes.pop()
        if node not in live:
            live.add(node)
            nodes += node.all_input_nodes
    numbers = {node: f"%{number}" for number, node in enumerate(node for node in graph.nodes if node in live)}
    return tuple(_line(node, numbers) for node in numbers)


def _is_write(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op.startswith("call_") and (str(name).endswith("_") or name == "setitem") and node.op != "call_module"


def _line(node: fx.Node, numbers: Mapping[fx.Node, str]) -> str:
    if node.op in ("get_attr", "placeholder"):
        default = f"={_argument(node.args[0], numbers)}" if node.args else ""
        return f"{'the tensor' if node.op == 'get_attr' else 'the argument'} {node.target}{default}"
    target: Any = node.target
    name = "output" if node.op == "output" else f".{target}" if node.op == "call_method" else target
    if node.op == "call_function":
        is_torchs = (getattr(target, "__module__", None) or "torch").startswith(("torch", "_operator"))
        is_overload = isinstance(target, torch._ops.OpOverload)
        name = str(target) if is_overload else type_name(target) if is_torchs else target.__name__
    args = node.args[:1] if target in _IDLE_CALLS else node.args
    kwargs = {} if target in _IDLE_CALLS else {k: v for k, v in node.kwargs.items() if k != "inplace"}
    texts = [_argument(arg, numbers) for arg in args]
    texts += [f"{key}={_argument(value, numbers)}" for key, value in sorted(kwargs.items())]
    return f"{name}({', '.join(texts)})"


def _argument(value: Any, numbers: Mapping[fx.Node, str]) -> str:
    """Return an argument as text that is the same on every device and in every process."""
    if isinstance(value, fx.Node):
        return numbers[value]
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_argument(part, numbers) for part in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_argument(part, numbers)}' for key, part in value.items())}}}"
    if isinstance(value, slice):
        return ":".join(_argument(part, numbers) for part in (value.start, value.stop, value.step))
    if isinstance(value, (torch.device, torch.Tensor)):
        return type(value).__name__
    if isinstance(value, float):
        return repr(float(value))
    named = getattr(value, "__name__", None)
    return str(named) if named else without_addresses(repr(value))
