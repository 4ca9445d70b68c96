"""QConfigMapping: which qconfig each part of a model gets.

The setters, their precedence and the dict form are torch.ao's, so that its users keep their code.
"""

from __future__ import annotations

import copy
import enum
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from fxquant.backends import get_default_qat_qconfig, get_default_qconfig
from fxquant.errors import QConfigError, nearest
from fxquant.qconfig import PRESETS, QConfig, default_dynamic_qconfig, default_qat_qconfig, default_static_qconfig

ObjectType = Callable[..., Any] | str
Choice = QConfig | None

_KEYS = ("", "object_type", "module_name_regex", "module_name", "module_name_object_type_order")


class Setter(enum.Enum):
    """The method that made an entry, highest precedence first; the value is how reports name it."""

    MODULE_NAME_OBJECT_TYPE_ORDER = "module_name_object_type_order ({!r}, {}, {})"
    MODULE_NAME = "module_name {!r}"
    MODULE_NAME_REGEX = "module_name_regex {!r}"
    OBJECT_TYPE = "object_type {}"
    GLOBAL = "global"
    NONE = "no entry"
    OLD_FILE = "{}"  # from a checkpoint that is older than these codes


class Entry(NamedTuple):
    """One entry of a mapping: what set it, and its arguments except the qconfig; types and functions by `type_name`."""

    setter: Setter
    key: tuple[str | int, ...] = ()

    def __str__(self) -> str:
        return self.setter.value.format(*self.key)


class Rule(NamedTuple):
    """Which entry of a mapping decided, and what it says.

    direct: it names this very module, type or call, so that a qconfig the operator cannot take is the user's mistake,
    not a side effect. opt_out: the entry that would leave this candidate float, where the planner knows it.
    """

    qconfig: Choice
    entry: Entry
    direct: bool
    opt_out: str = ""


class QConfigMapping:
    """Which qconfig each module, call and weight gets; a qconfig of None leaves it float.

    Precedence, highest first: `set_module_name_object_type_order`, `set_module_name` (the nearest enclosing module that
    is named), `set_module_name_regex` (the first entry that matches, by re.match), `set_object_type`, `set_global`.
    A weight counts as innermost: "lstm.weight_ih_l0" outranks "lstm", and gives that matrix alone a scheme.
    Setters change the mapping and return it.
    """

    def __init__(self) -> None:
        self.global_qconfig: Choice = None
        self.object_type_qconfigs: dict[ObjectType, Choice] = {}
        self.module_name_regex_qconfigs: dict[str, Choice] = {}
        self.module_name_qconfigs: dict[str, Choice] = {}
        self.module_name_object_type_order_qconfigs: dict[tuple[str, ObjectType, int], Choice] = {}

    def set_global(self, global_qconfig: Choice) -> QConfigMapping:
        """Set the qconfig of everything that no other entry decides."""
        self.global_qconfig = _checked(global_qconfig)
        return self

    def set_object_type(self, object_type: ObjectType, qconfig: Choice) -> QConfigMapping:
        """Set what a module type (nn.Linear), a function (F.linear) or a method ("matmul") gets."""
        if not (callable(object_type) or isinstance(object_type, str)):
            raise QConfigError(
                f"set_object_type takes a module class, a function or a method's name, got {object_type!r}"
            )
        self.object_type_qconfigs[object_type] = _checked(qconfig)
        return self

    def set_module_name_regex(self, module_name_regex: str, qconfig: Choice) -> QConfigMapping:
        """Set what modules and weights get whose path matches from its start (re.match); the first entry wins."""
        try:
            re.compile(module_name_regex + "")  # a string: a compiled pattern could not go into a checkpoint
        except (re.error, TypeError) as error:
            raise QConfigError(
                f"set_module_name_regex: {module_name_regex!r} is not a regular expression: {error}"
            ) from error
        self.module_name_regex_qconfigs[module_name_regex] = _checked(qconfig)
        return self

    def set_module_name(self, module_name: str, qconfig: Choice) -> QConfigMapping:
        """Set what the module or weight at a path gets, and everything inside it."""
        if not isinstance(module_name, str):
            raise QConfigError(f"set_module_name takes a path such as 'encoder.layers.0', got {module_name!r}")
        self.module_name_qconfigs[module_name] = _checked(qconfig)
        return self

    def set_module_name_object_type_order(
        self, module_name: str, object_type: ObjectType, index: int, qconfig: Choice
    ) -> QConfigMapping:
        """Set what the index-th call of a type or function inside the module at a path gets."""
        self.module_name_object_type_order_qconfigs[(module_name, object_type, index)] = _checked(qconfig)
        return self

    def resolve(self, path: str, scope: str, types: tuple[ObjectType, ...], index: int, weight: str = "") -> Rule:
        """Return the entry that decides for one candidate, or for one of its weights.

        path: the module's path, or for a call the path of the module whose forward makes it; scope: the path of the
        module that the candidate is counted in; types: what it is (an nn.Linear that was fused is still nn.Linear);
        index: its number among those in `scope`; weight: the weight's path. A regular expression must match `path`, or
        the path of a weight directly in it.
        """
        for object_type in types:
            key = (scope, object_type, index)
            if key in self.module_name_object_type_order_qconfigs:
                return Rule(self.module_name_object_type_order_qconfigs[key], order_entry(*key), True)
        named = (weight, path) if weight else (path,)
        for name in (*named[:-1], *_enclosing(path)):
            if name in self.module_name_qconfigs:
                return Rule(self.module_name_qconfigs[name], Entry(Setter.MODULE_NAME, (name,)), name in named)
        names = named if weight.rpartition(".")[0] == path else (path,)
        for pattern, qconfig in self.module_name_regex_qconfigs.items():
            if any(re.match(pattern, name) for name in names):
                return Rule(qconfig, Entry(Setter.MODULE_NAME_REGEX, (pattern,)), False)
        for object_type in types:
            if object_type in self.object_type_qconfigs:
                entry = Entry(Setter.OBJECT_TYPE, (type_name(object_type),))
                return Rule(self.object_type_qconfigs[object_type], entry, True)
        return Rule(self.global_qconfig, Entry(Setter.NONE if self.global_qconfig is None else Setter.GLOBAL), False)

    @property
    def has_static(self) -> bool:
        """Whether an entry's qconfig needs calibration."""
        held = (value.values() if isinstance(value, dict) else [value] for value in vars(self).values())
        return any(qconfig is not None and qconfig.is_static for qconfigs in held for qconfig in qconfigs)

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping in torch.ao's dict form, which `from_dict` takes back."""
        return {
            "": self.global_qconfig,
            "object_type": list(self.object_type_qconfigs.items()),
            "module_name_regex": list(self.module_name_regex_qconfigs.items()),
            "module_name": list(self.module_name_qconfigs.items()),
            "module_name_object_type_order": [
                (*key, qconfig) for key, qconfig in self.module_name_object_type_order_qconfigs.items()
            ],
        }

    @classmethod
    def from_dict(cls, qconfig_dict: dict[str, Any]) -> QConfigMapping:
        """Return the mapping that a dict in torch.ao's form describes. An unknown key is a QConfigError."""
        for key in qconfig_dict:
            if key not in _KEYS:
                raise QConfigError(f"QConfigMapping.from_dict: unknown key {key!r}{nearest(str(key), _KEYS[1:])}")
        mapping = cls()
        if "" in qconfig_dict:
            mapping.set_global(qconfig_dict[""])
        for key in _KEYS[1:]:
            setter = getattr(mapping, f"set_{key}")
            for entry in qconfig_dict.get(key, ()):
                try:
                    setter(*entry)
                except TypeError as error:
                    raise QConfigError(f"QConfigMapping.from_dict: {key!r} has a malformed entry {entry!r}") from error
        return mapping

    def copy(self) -> QConfigMapping:
        """Return a mapping of its own with the same entries."""
        twin = QConfigMapping()
        for name, value in vars(self).items():
            setattr(twin, name, copy.copy(value))
        return twin

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QConfigMapping):
            return NotImplemented
        return all(  # the first regex that matches decides, so their order counts
            list(a.items()) == list(b.items()) if name == "module_name_regex_qconfigs" else a == b
            for (name, a), b in zip(vars(self).items(), vars(other).values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]  # it is mutable

    def __repr__(self) -> str:
        lines = "".join(f"\n  .{line}" for line in self._entries())
        return f"QConfigMapping(){lines}"

    def _entries(self) -> Iterator[str]:
        if self.global_qconfig is not None:
            yield f"set_global({qconfig_name(self.global_qconfig)})"
        for key in _KEYS[1:]:
            for *key_parts, qconfig in self.to_dict()[key]:
                what = ", ".join(type_name(part) if callable(part) else repr(part) for part in key_parts)
                yield f"set_{key}({what}, {qconfig_name(qconfig)})"


def default_dynamic_qconfig_mapping() -> QConfigMapping:
    """Return the mapping that quantizes everything dynamically: `set_global(default_dynamic_qconfig)`."""
    return QConfigMapping().set_global(default_dynamic_qconfig)


def default_static_qconfig_mapping() -> QConfigMapping:
    """Return the mapping that calibrates what has a static form: `set_global(default_static_qconfig)`."""
    return QConfigMapping().set_global(default_static_qconfig)


def default_qat_qconfig_mapping() -> QConfigMapping:
    """Return the mapping for training: `set_global(default_qat_qconfig)`."""
    return QConfigMapping().set_global(default_qat_qconfig)


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """Return `default_static_qconfig_mapping()` under torch.ao's name. QConfigError for an unknown backend."""
    return QConfigMapping().set_global(get_default_qconfig(backend, version))


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """Return `default_qat_qconfig_mapping()` under torch.ao's name. QConfigError for an unknown backend."""
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))


def qconfig_name(qconfig: Choice) -> str:
    """Return a qconfig's preset name where it has one, else what it says."""
    if qconfig is None:
        return "None"
    names = {
        preset.with_group_size(size): f"{name}.with_group_size({size})"
        for name, preset in PRESETS.items()
        for size in preset.weight.format.group_sizes
    }
    names.update({preset: name for name, preset in PRESETS.items()})
    return qconfig.tell(lambda part: names.get(part, f"QConfig({part})"))


def type_name(object_type: ObjectType) -> str:
    """Return a module type or function as one would write it: "nn.Linear", "F.linear", "my_package.Block"."""
    if isinstance(object_type, str):
        return repr(object_type)
    module, name = getattr(object_type, "__module__", None) or "", getattr(object_type, "__name__", repr(object_type))
    if module.startswith("torch.nn.modules"):
        return f"nn.{name}"
    if module in ("torch.nn.functional", "torch._C._nn"):
        return f"F.{name}"
    if module == "torch._C._linalg":
        return f"torch.linalg.{name.removeprefix('linalg_')}"
    if module == "fxquant.ops":
        return f"fxquant.{name}"
    if module in ("torch", "torch.functional", "_operator"):
        return f"{'operator' if module == '_operator' else 'torch'}.{name}"
    return f"{module}.{name}" if module and not module.startswith(("torch", "fxquant")) else name


def order_entry(scope: str, object_type: ObjectType, index: int) -> Entry:
    """Return an entry of set_module_name_object_type_order."""
    return Entry(Setter.MODULE_NAME_OBJECT_TYPE_ORDER, (scope, type_name(object_type), index))


def opt_out(path: str) -> str:
    """Return the entry that leaves a module and all inside it float, as one would write it."""
    return f"set_module_name({path!r}, None)"


def opt_out_one(scope: str, object_type: ObjectType, index: int) -> str:
    """Return the entry that leaves one call or module in the module at a path float, as one would write it."""
    return f"set_module_name_object_type_order({scope!r}, {type_name(object_type)}, {index}, None)"


def _enclosing(path: str) -> Iterator[str]:
    """Yield a module path and the paths around it, innermost first, the root's "" last."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _checked(qconfig: Any) -> Choice:
    """Return the qconfig, or raise QConfigError if it is static, has parts, is torch.ao's, or is something else."""
    if qconfig is None:
        return None
    if not isinstance(qconfig, QConfig):
        theirs = type(qconfig).__module__.startswith("torch.ao")
        hint = (
            "import the preset of the same name from fxquant" if theirs else "use a fxquant.QConfig, or None for float"
        )
        raise QConfigError(f"a qconfig must be a fxquant.QConfig, got {type(qconfig).__qualname__}; {hint}")
    if qconfig.parts:
        raise QConfigError(
            f"a mapping takes a qconfig without parts, got {qconfig}; name its weights instead: "
            f"set_module_name('path.of.module.{qconfig.parts[0][0]}', …)"
        )
    return qconfig
