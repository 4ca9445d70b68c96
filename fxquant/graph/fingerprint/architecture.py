"""What of a float model decides its answers beside its tensors, written down, so that a file can tell another model's.

A graph says it all, with the leaves that it calls: their types, what their repr says of them, numbers that they hold.
What is not traced, a leaf's own code or a whole model's, is known by that code: without comments, annotations and
formatting, and with the functions and constants that it uses. Dropout and the like, idle in eval mode, do not count.
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
"""What a module's repr and attributes hold that changes nothing in eval mode."""

_OF_ORIGIN = frozenset({"name_or_path", "_name_or_path", "device"})
"""Attributes that say where a model is, or came from."""

_BY_ANY_NAME = frozenset({"getattr", "vars", "__dict__", "attrgetter", "__getattribute__"})
"""Names in code that may read an attribute whose own name is not in it."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_IDENTITY = "identity"


@dataclass(frozen=True)
class ModuleKind:
    """What one module is. type: its type, "" where there is code to tell; details: its extra_repr, a part an entry.

    attributes: its plain ones; code: of a user's module a digest of its forward's code; release: that one's package,
    with the version. tensors: a summary of each that no file holds, where it has values.
    """

    type: str
    details: tuple[str, ...] = ()
    attributes: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    release: str = ""
    tensors: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def tell(self, other: ModuleKind) -> str:
        """Return the module as a person would write it, with what sets it apart from another."""
        parts = [part for part in self.details if self.type != other.type or part not in other.details]
        shared = self.attributes.keys() & other.attributes.keys()
        parts += [f"{n}={self.attributes[n]}" for n in self.attributes if n in shared and self.is_other(other, n)]
        apart = [name for name in self.tensors if not self.has_near(other, name)]
        parts += [f"{name}: a tensor {tuple(self.tensors[name][0])} of other values or shape" for name in apart]
        return f"{self.type or 'a module of its own class'}({', '.join(parts)})"

    def is_other(self, other: ModuleKind, name: str) -> bool:
        """Return whether both have an attribute, and not the same: what one release lacks does not count."""
        return name in self.attributes and self.attributes[name] != other.attributes.get(name, self.attributes[name])

    def has_near(self, other: ModuleKind, name: str) -> bool:
        """Return whether a tensor is the same in both, or not known in one of them, as on the meta device."""
        return name not in other.tensors or is_near(self.tensors[name], other.tensors[name])


@dataclass(frozen=True)
class Architecture:
    """A float model but for its tensors. nodes: its graph, a line a node, () without one; buffers_are_nodes: how it was
    traced. modules: by their paths those that the graph calls, with what is inside them; without a graph all.
    """

    modules: Mapping[str, ModuleKind]
    nodes: tuple[str, ...] = ()
    buffers_are_nodes: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Architecture:
        return self  # it never changes

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON values, each kind of module once."""
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
        """Return what to_plain gave JSON values of."""
        kinds = [ModuleKind(**{**kind, "details": tuple(kind["details"])}) for kind in plain["kinds"]]
        modules = {path: kinds[number] for path, number in plain["modules"].items()}
        return cls(modules, tuple(plain["nodes"]), bool(plain["buffers_are_nodes"]))


def _key(kind: ModuleKind) -> tuple[Any, ...]:
    return kind.type, kind.details, tuple(kind.attributes.items()), kind.code, kind.release, repr(kind.tensors)


class _Seen(NamedTuple):
    """What is known of a whole model. reads: the names that its code reads; paths: of its modules, by their ids."""

    reads: frozenset[str]
    paths: Mapping[int, str]


def describe(root: nn.Module, source: nn.Module | None = None) -> Architecture:
    """Return the architecture of a model in eval mode: of a traced one, not yet fused, by its graph.

    source: the user's model, where root is a mirror of it on the meta device: values of tensors are read there.
    """
    graph = root.graph if isinstance(root, fx.GraphModule) else None
    found: dict[str, nn.Module] = {}
    if graph is not None:
        for node in graph.find_nodes(op="call_module", sort=True):
            leaf = root.get_submodule(str(node.target))
            found.update({f"{node.target}.{path}".rstrip("."): module for path, module in leaf.named_modules()})
    else:
        found = dict(root.named_modules())
    codes = [code_of(type(m), forward_of(m)) for m in found.values() if not type(m).__module__.startswith("torch.")]
    paths = {id(module): path for path, module in root.named_modules()}
    seen = _Seen(frozenset[str]().union(*(code.reads for code in codes)), paths)
    own = dict((root if source is None else source).named_modules(remove_duplicate=False))
    modules = {path: _module_kind(module, own.get(path), seen) for path, module in found.items()}
    if graph is None:
        return Architecture(modules)
    hooks = tuple(_hooks(own[""]))  # of the root, which is no leaf; others with hooks are
    modules.update({"": ModuleKind("hooks", hooks)} if hooks else {})
    return Architecture(modules, _node_lines(graph), bool(graph.output_node().meta.get(BUFFERS_ARE_NODES)))


def differences(saved: Architecture, found: Architecture) -> tuple[list[str], list[str]]:
    """Return what makes a model another one than was saved, and what only may: code of another release of a package.

    Each is a line that says where, what the file has and what the model.
    """
    certain, possible = [], []
    for path in dict.fromkeys([*saved.modules, *found.modules]):
        old, new = saved.modules.get(path), found.modules.get(path)
        where = f"module {path!r}" if path else "the model"
        if old is None or new is None:
            kind, sides = (old, "the file, not this model") if new is None else (new, "this model, not the file")
            if kind is not None and kind.type != _IDENTITY:
                certain.append(f"{where}, {kind.tell(ModuleKind(''))}, is in {sides}")
        elif _is_other(old, new):
            certain.append(f"{where} is {new.tell(old)}, in the file {old.tell(new)}")
        elif old.code != new.code and old.code and new.code:
            name, _, version = old.release.partition(" ")
            own_name, _, own_version = new.release.partition(" ")
            if name == own_name and version != own_version:
                possible.append(f"{where}: the code of {own_name} {own_version} is other than that of {version}")
            else:
                certain.append(f"{where}: its forward, or what that calls, has other code than the file's model")
    if saved.nodes and found.nodes and saved.buffers_are_nodes == found.buffers_are_nodes:
        certain += _other_nodes(saved.nodes, found.nodes)
    return certain, possible


def _is_other(old: ModuleKind, new: ModuleKind) -> bool:
    """Return whether two kinds differ in more than their code."""
    return (old.type, old.details) != (new.type, new.details) or (
        any(old.is_other(new, n) for n in old.attributes) or not all(old.has_near(new, n) for n in old.tensors)
    )


def _other_nodes(saved: tuple[str, ...], found: tuple[str, ...]) -> list[str]:
    """Return a line for the first node in which two graphs differ."""
    for number, (old, new) in enumerate(zip(saved, found, strict=False)):
        if old != new:
            return [f"node {number} of its graph is {new}, in the file {old}"]
    if len(saved) != len(found):
        return [f"its graph has {len(found)} nodes, in the file {len(saved)}"]
    return []


def _module_kind(module: nn.Module, source: nn.Module | None, seen: _Seen) -> ModuleKind:
    """Return what a module is."""
    if isinstance(module, _IDLE_MODULES):
        return ModuleKind(_IDENTITY)
    kind: Any = type(module)
    is_torchs = kind.__module__.startswith("torch.")
    has_repr = kind.extra_repr is not nn.Module.extra_repr
    values = _values(module, source, seen)
    code = Code() if is_torchs else code_of(kind, forward_of(module))
    details = (*(_details(module) if has_repr else ()), *_hooks(module if source is None else source))
    if is_torchs:  # whose repr tells these
        for part in details:
            values.texts.pop(part.partition("=")[0], None)
    name = type_name(kind) if is_torchs else "" if code.digest else kind.__name__
    return ModuleKind(name, details, values.texts, code.digest, code.release, values.tensors)


def _details(module: nn.Module) -> Iterator[str]:
    """Yield the parts of a module's extra_repr that count."""
    try:
        text = module.extra_repr()
    except Exception:  # a user's own, which is called here for no wish of theirs
        return
    for part in re.split(r",\s*(?![^(\[{]*[)\]}])", without_addresses(text)):
        if part and part.partition("=")[0].strip() not in _IDLE_NAMES:
            yield part.strip()


def _values(module: nn.Module, source: nn.Module | None, seen: _Seen) -> Values:
    """Return what a module holds that counts, but for what its methods set while it runs.

    source: the user's own module, which has the values of tensors.
    """
    kind: Any = type(module)
    is_torchs = kind.__module__.startswith("torch.")
    skipped = _IDLE_NAMES | _OF_ORIGIN | _OF_EVERY_MODULE | stored_names(kind)
    found = Values(seen.reads, skipped, seen.paths)
    knows_all = is_torchs or not seen.reads or bool(_BY_ANY_NAME & seen.reads)
    for name, value in vars(module).items():
        if name in skipped or not (name in seen.reads or (knows_all and not (is_torchs and name.startswith("_")))):
            continue
        found.add(name, value)
    found.tensors.clear()
    if source is None or is_torchs or code_of(kind, forward_of(module)).writes:
        return found
    held = {name: source._buffers.get(name) for name in source._non_persistent_buffers_set}
    there = Values(seen.reads, skipped)
    for name, value in {**vars(source), **held}.items():
        if name in seen.reads and name not in skipped and value is not None:
            there.add(name, value)
    found.tensors.update(there.tensors)
    return found


def _hooks(module: nn.Module) -> Iterator[str]:
    """Yield the forward hooks of a module that take part in what it computes."""
    for name in ("_forward_pre_hooks", "_forward_hooks"):
        words = [word for hook in getattr(module, name).values() if (word := hook_word(hook))]
        if words:
            yield f"{name.strip('_')}={'; '.join(words)}"


def _node_lines(graph: fx.Graph) -> tuple[str, ...]:
    """Return a line for each node that has part in what the graph gives or writes, by number and not by name."""
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
    told = [_argument(arg, numbers) for arg in args]
    told += [f"{key}={_argument(value, numbers)}" for key, value in sorted(kwargs.items())]
    return f"{name}({', '.join(told)})"


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
