"""The Python values that a module holds, as text and numbers that are the same in every process and on any device.

No code of the user's runs: objects are read by their __dict__ and slots, and only what the model's code names
(`reads`), so that time stamps and loggers do not count. Paths, locks, files, generators and devices never count.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import hashlib
import math
import re
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxquant.graph.trace.names import code_names, codes_in, function_of

_DEPTH = 4
"""How deep values are followed into objects and containers."""

_SHOWN = 64
"""The most parts of a container that are written out; of a larger one, it is their digest."""

_READ = 2**20
"""The most elements of a tensor that are read."""

_SAMPLES = 8
_CLOSE = 1e-4
"""How far equal tensors may differ, relative to their largest value, since processors round differently."""


@dataclass
class Values:
    """Texts and tensors that describe values. reads: the names that code reads; skipped: attributes that never count.

    paths: those of the model's modules, by their ids; texts, tensors: the result, by dotted names.
    """

    reads: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()
    paths: Mapping[int, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, list[Any]] = field(default_factory=dict)

    def add(self, name: str, value: Any, seen: tuple[int, ...] = ()) -> None:
        """Add a value: of an object each attribute that code reads, of a tensor its shape and some numbers."""
        tensor = _as_tensor(value)
        if tensor is not None:
            summary = summarize(tensor)
            self.tensors.update({name: summary} if summary else {})
        elif _is_object(value):
            if id(value) in seen or len(seen) >= _DEPTH:
                return
            methods = _methods(type(value), self.reads)
            reads = self.reads.union(*(code_names(method.__code__) for method in methods))
            inner = Values(reads, self.skipped, self.paths, self.texts, self.tensors)
            for attribute, part in _state(value):
                if attribute in reads and attribute not in self.skipped:
                    inner.add(f"{name}.{attribute}", part, (*seen, id(value)))
        elif text := self.text(value):
            self.texts[name] = text
            if signs := _signs(value):  # apart, since files have the text without them
                self.texts[f"{name} (operators)"] = signs

    def text(self, value: Any, depth: int = _DEPTH) -> str:
        """Return a number, a string, a function or a container of these as text; "" for anything else, and paths."""
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}.{value._name_}={self.text(value._value_, 1)}"
        if isinstance(value, str):
            return "" if "/" in value or "\\" in value else repr(str(value))
        if isinstance(value, (bool, int, type(None), torch.dtype)):
            return repr(value)
        if isinstance(value, (float, complex)):
            return repr(float(value) if isinstance(value, float) else value)
        if isinstance(value, slice):
            parts = [self.text(part) for part in (value.start, value.stop, value.step)]
            return f"slice({', '.join(parts)})" if all(parts) else ""
        if isinstance(value, nn.Module):
            path = self.paths.get(id(value))
            return "" if path is None else f"module {path!r}"
        if isinstance(value, (tuple, list, dict)):
            return self._container(value, depth) if depth else ""
        return self.word_for(value, depth) if depth else ""

    def _container(self, value: Any, depth: int) -> str:
        """Return a container's parts as text, "" if one of them has none."""
        named = dict.items(value) if isinstance(value, dict) else [("", part) for part in value]
        texts = [(str(name), self.text(part, depth - 1)) for name, part in named]
        if not texts or not all(text for _, text in texts):
            return ""
        parts = ", ".join(f"{name}: {text}" if name else text for name, text in texts)
        if len(texts) > _SHOWN:
            return f"[{len(texts)} values, {hashlib.sha256(parts.encode()).hexdigest()[:16]}]"
        return f"[{parts}]"

    def word_for(self, function: Any, depth: int = _DEPTH) -> str:
        """Return a function's name, its defaults and the values that it closes over; "" for anything else.

        For a lambda, the names and constants in its code.
        """
        if isinstance(function, functools.partial):
            word = self.word_for(function.func, depth - 1) if depth else ""
            held = [self.text(part, depth - 1) for part in (function.args, dict(function.keywords))] if word else []
            return f"partial({word}, {', '.join(filter(None, held))})" if word else ""
        if isinstance(function, (types.MethodType, type)) or not callable(function):
            return ""
        if isinstance(function, types.FunctionType):
            return self._function(function, depth)
        is_own = isinstance(function, (types.BuiltinFunctionType, torch._ops.OpOverload, torch._ops.OpOverloadPacket))
        return str(getattr(function, "__name__", "")) if is_own or _is_library(type(function)) else ""

    def _function(self, function: types.FunctionType, depth: int) -> str:
        code, word = function.__code__, function.__name__
        if word == "<lambda>":
            word = f"<lambda of {', '.join([*code.co_names, *constants_of(code)])}>"
        if _is_library(function) or not depth:
            return word
        held = [("", part) for part in function.__defaults__ or ()]
        held += [*(function.__kwdefaults__ or {}).items(), *closed_over(function)]
        texts = [f"{name}={text}".lstrip("=") for name, part in held if (text := self.text(part, depth - 1))]
        return f"{word} with {', '.join(texts)}" if texts else word


def closed_over(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables of outer functions that a function uses but does not set."""
    stored = {str(line.argval) for line in dis.get_instructions(function) if line.opname == "STORE_DEREF"}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            value = cell.cell_contents
        except ValueError:  # not set yet
            continue
        if name not in stored and name != "__class__":
            yield name, value


def constants_of(code: types.CodeType) -> list[str]:
    """Return the numbers in some code, in order."""
    lines = (line for line in dis.get_instructions(code) if "CONST" in line.opname or "SMALL_INT" in line.opname)
    return [repr(line.argval) for line in lines if type(line.argval) in (int, float)]


_NAMED = (
    "ADD + SUBTRACT - MULTIPLY * TRUE_DIVIDE / FLOOR_DIVIDE // MODULO % POWER ** MATRIX_MULTIPLY @ AND & OR | XOR ^"
)
_SIGNS = dict(zip(*[iter(f"{_NAMED} LSHIFT << RSHIFT >>".split())] * 2, strict=True))
"""The operators by their names in Python 3.10, which has an instruction for each."""


def operators_of(code: types.CodeType) -> list[str]:
    """Return the operators in some code, and the functions in it, in order, as they are written."""
    signs = []
    for line in (line for part in codes_in(code) for line in dis.get_instructions(part)):
        arity, _, name = line.opname.partition("_")
        if line.opname in ("BINARY_OP", "COMPARE_OP"):
            signs += re.findall(r"[-+*/%@&|^<>!=]+", line.argrepr)  # bool(<) from Python 3.13 on; [] is not one
        elif arity in ("BINARY", "INPLACE") and name in _SIGNS:
            signs.append(_SIGNS[name] + ("=" if arity == "INPLACE" else ""))
        elif line.opname in ("UNARY_NEGATIVE", "UNARY_INVERT"):
            signs.append(name.lower())
    return signs


def _signs(value: Any, depth: int = _DEPTH) -> str:
    """Return the operators in a lambda, or in the lambdas in a container or partial."""
    if isinstance(value, types.FunctionType) and value.__name__ == "<lambda>":
        return " ".join(operators_of(value.__code__))
    parts: Any = [value.func, *value.args] if isinstance(value, functools.partial) else ()
    parts = dict.values(value) if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else parts
    return "; ".join(filter(None, (_signs(part, depth - 1) for part in parts))) if depth else ""


def summarize(tensor: torch.Tensor) -> list[Any]:
    """Return a tensor's shape and some numbers of its values; [] if it has no plain ones, as on the meta device."""
    is_plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_complex()
    if tensor.device.type == "meta" or not is_plain or not tensor.numel():
        return []
    with torch.no_grad():
        flat = tensor.detach().reshape(-1)
        flat = flat[:: max(1, math.ceil(flat.numel() / _READ))].cpu().double()
        flat = flat.nan_to_num(nan=3.0, posinf=5.0, neginf=-7.0).clamp(-1e9, 1e9)
        ramp = torch.linspace(0, 1, flat.numel(), dtype=torch.float64)
        picked = flat[torch.linspace(0, flat.numel() - 1, _SAMPLES).long()]
        sums = [flat.mean(), flat.square().mean().sqrt(), (flat * ramp).mean(), *picked]
        return [list(tensor.shape), float(flat.abs().amax()), [float(value) for value in sums]]


def is_near(old: Sequence[Any], new: Sequence[Any]) -> bool:
    """Return whether two summaries are of the same tensor, up to rounding."""
    bound = _CLOSE * max(old[1], new[1])
    return list(old[0]) == list(new[0]) and all(
        abs(a - b) <= bound for a, b in zip([old[1], *old[2]], [new[1], *new[2]], strict=True)
    )


def without_addresses(text: str) -> str:
    """Return a repr without addresses."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", text)


def _as_tensor(value: Any) -> torch.Tensor | None:
    """Return a tensor, or a NumPy number or array as a tensor; None for anything else."""
    if type(value) in (torch.Tensor, nn.Parameter):
        return value  # type: ignore[no-any-return]
    numpy = sys.modules.get("numpy")
    if numpy is None or not isinstance(value, (numpy.ndarray, numpy.generic)) or isinstance(value, float):
        return None
    return torch.tensor(numpy.asarray(value).tolist()) if value.dtype.kind in "biuf" and value.size <= _READ else None


def _is_library(value: Any) -> bool:
    """Return whether a function or class comes with Python, torch or NumPy."""
    top = str(getattr(value, "__module__", None) or "builtins").partition(".")[0]
    return top in ("torch", "numpy") or (top in sys.stdlib_module_names and top != "__main__")


def _is_object(value: Any) -> bool:
    """Return whether a value is a plain object of a user's class, or a namespace."""
    plain = (enum.Enum, str, int, float, complex, tuple, list, dict, set, frozenset, type, types.ModuleType, nn.Module)
    if isinstance(value, (*plain, types.FunctionType, types.MethodType, torch.Tensor)):
        return False
    return isinstance(value, types.SimpleNamespace) or not _is_library(type(value))


def _methods(cls: type, reads: frozenset[str]) -> Iterator[types.FunctionType]:
    """Yield the methods and properties of a class that code reads, with __call__."""
    for base in cls.__mro__:
        for name, value in vars(base).items():
            function = function_of(value)
            if isinstance(function, types.FunctionType) and (name in reads or name == "__call__"):
                yield function


def _state(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield an object's attributes, from its __dict__ and slots, without running its code."""
    with contextlib.suppress(AttributeError, TypeError):
        yield from sorted(object.__getattribute__(value, "__dict__").items(), key=lambda pair: str(pair[0]))
    cls: type = type(value)
    for base in cls.__mro__:
        for name, slot in vars(base).items():
            if isinstance(slot, types.MemberDescriptorType):
                try:
                    yield name, slot.__get__(value, type(value))
                except AttributeError:  # not set
                    continue
