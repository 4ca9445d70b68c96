"""What Python code reads, found in its bytecode: names, and the weights that a module reads past its submodules.

Code that is not traced runs on as it is: where it says F.linear(x, self.embedding.weight), a quantized embedding would
hand it integers. Such a module must stay float.
"""

from __future__ import annotations

import dis
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import nn

_WEIGHTS = ("weight", "weight_ih", "weight_hh", "weight_ih_l0", "weight_hh_l0", "in_proj_weight", "all_weights")
_HARMLESS = ("device", "shape", "size", "dim", "ndim", "numel", "requires_grad")
_LOADS = ("LOAD_ATTR", "LOAD_METHOD")
_NOTHING = ("CACHE", "PRECALL", "PUSH_NULL", "EXTENDED_ARG", "RESUME")


def weights_read(module: nn.Module) -> frozenset[str]:
    """Return the names of the submodules whose weights forward, or a method that it calls, reads itself.

    {"embedding"} for `self.embedding.weight`, {"layers"} for `for layer in self.layers: layer.weight`; asking a weight
    for its shape or device does not count.
    """
    found: set[str] = set()
    waiting: list[Any] = [getattr(type(module), "forward", None)]
    seen: set[types.CodeType] = set()
    while waiting:
        function = inspect.unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen or (getattr(function, "__module__", None) or "").startswith("torch."):
            continue
        seen.add(code)
        for names in _attribute_chains(code):
            waiting += [getattr(type(module), name) for name in names if hasattr(type(module), name)]
            for owner, weight, use in zip(names, names[1:], [*names[2:], ""], strict=False):
                if weight in _WEIGHTS and use not in _HARMLESS:
                    found.add(owner)
    return frozenset(found)


def _attribute_chains(code: types.CodeType) -> Iterator[list[str]]:
    """Yield each run of attribute names in a function's code and the functions inside it: a.b.c gives ["b", "c"].

    That of a local variable begins with the first attribute that the variable was made from, once for each of those.
    """
    made_from: dict[str, set[str]] = {}  # what each local variable was made from
    heads: set[str] = set()  # what the statement so far has read
    root, is_stored = "", False
    chain: list[str] = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in _LOADS:
            chain.append(str(value))
        elif name not in _NOTHING:
            runs = [[head, *chain] for head in made_from.get(root, ())] or [chain]
            yield from runs
            heads |= {run[0] for run in runs if run}
            root, chain = "", []
            if is_stored and "STORE_FAST" not in name:
                heads = set()
            is_stored = "STORE_FAST" in name or name == "POP_TOP"
            variables = value if isinstance(value, tuple) else (value,)
            if name.startswith("STORE_FAST"):
                made_from.update(dict.fromkeys(map(str, variables), heads))
            if "LOAD_FAST" in name or name == "LOAD_DEREF":
                root = str(variables[-1])
    yield chain
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _attribute_chains(part)


def names_in(function: Any) -> set[str]:
    """Return every name that the code of a function, method or property mentions."""
    if isinstance(function, property):
        function = function.fget
    waiting, found = [getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)], set()
    while waiting:
        code = waiting.pop()
        if code is not None:
            found.update(code.co_names)
            waiting += [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return found
