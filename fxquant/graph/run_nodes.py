"""How each node of a static model is told to the native library, as a step of a run (csrc/python/plan.c)."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.nn.static import StaticQuantizedConv, StaticQuantizedLinear
from fxquant.ops.elementwise import CURVES
from fxquant.ops.register import KERNELS

Place = tuple[dict[str, Any], str]
"""Where a tensor is looked up at each call: a module's dict of buffers or parameters, and its name there."""


class Op(IntEnum):
    """What a step does, by the library's number."""

    IMPORT = 0
    QUANTIZE = 1
    DEQUANTIZE = 2
    CONVOLVE = 3
    COMBINE = 4
    POOL = 5
    LOOK_UP = 6
    FLATTEN = 7
    JOIN = 8
    PAD = 9
    RESIZE = 10
    LOOK_UP_CHANNELS = 11
    PASS = -1


class Step(NamedTuple):
    """One step. inputs: nodes. places: None where an argument is left out. integers: as csrc/python/plan.c has them."""

    op: Op
    inputs: Sequence[fx.Node]
    places: Sequence[Place | None] = ()
    integers: Sequence[int] = ()
    low: float | None = None
    high: float | None = None
    slope: float = 0.0


def step_of(module: fx.GraphModule, node: fx.Node) -> Step | None:
    """Return a node as a step, None for one that the library does not know."""
    if node.op == "call_module":
        target = module.get_submodule(str(node.target))
        make = _MODULES.get(type(target))
        return None if make is None else make(module, node, target)
    if node.op == "call_function" and node.target in _FUNCTIONS:
        return _FUNCTIONS[node.target](module, node)
    method = {"flatten": _flatten, "expand_as": _expand}.get(str(node.target)) if node.op == "call_method" else None
    return None if method is None else method(module, node)


def _stored(module: fx.GraphModule, *nodes: Any) -> list[Place | None] | None:
    """Return where get_attr nodes (or None) look up their tensors; None if a node is none of these."""
    places: list[Place | None] = []
    for node in nodes:
        if node is None:
            places.append(None)
        elif isinstance(node, fx.Node) and node.op == "get_attr":
            path, _, name = str(node.target).rpartition(".")
            places.append(_kept(module.get_submodule(path), name))
        else:
            return None
    return places


def _kept(owner: nn.Module, name: str) -> Place:
    kept: Any = owner._buffers if name in owner._buffers else owner._parameters
    return kept, name


def _called(node: fx.Node) -> Any:
    """Return the arguments of a call of one of our operators."""
    function: Any = node.target
    return KERNELS[function.__name__].arguments(*node.args, **node.kwargs)


def _three(sizes: Sequence[int], other: int = 1) -> tuple[int, ...]:
    """Return sizes of up to three dimensions as those of three."""
    return (*[other] * (_SPACE - len(sizes)), *sizes)


def _single(op: Op) -> Callable[[fx.GraphModule, fx.Node], Step | None]:
    def step(module: fx.GraphModule, node: fx.Node) -> Step | None:
        a = _called(node)
        places = _stored(module, *((a.table,) if hasattr(a, "table") else (a.scale, a.zero_point)))
        return None if places is None else Step(op, (a[0],), places, (getattr(a, "qmax", 255),))

    return step


def _pad(module: fx.GraphModule, node: fx.Node) -> Step | None:
    a = _called(node)
    places, most = _stored(module, a.zero_point), 2 * _SPACE
    if places is None or len(a.pad) > most or not all(isinstance(part, int) for part in a.pad):
        return None
    sides = (*a.pad, *[0] * (most - len(a.pad)))  # the last dimension's come first
    return Step(Op.PAD, (a.x,), places, [sides[most - 2 - i + 2 * (i % 2)] for i in range(most)])


def _resize(_: fx.GraphModule, node: fx.Node) -> Step | None:
    a = _called(node)
    given = a.factors if a.size is None else a.size
    if not isinstance(given, (list, tuple)) or not 0 < len(given) <= _SPACE:
        return None
    if not all(isinstance(part, int) and part > 0 for part in a.size or ()):
        return None
    factors = [_bits(float(factor)) for factor in a.factors or ()]
    sizes, bits = _three(a.size or [0] * len(given), 0), _three(factors or [0] * len(given), 0)
    return Step(Op.RESIZE, (a.x,), (), (len(given), a.align_corners, *sizes, *bits))


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    (bits,) = struct.unpack("<q", struct.pack("<d", number))
    return int(bits)


def _pair(module: fx.GraphModule, node: fx.Node) -> Step | None:
    a = _called(node)
    places = _stored(module, a.a_scale, a.a_zero_point, a.b_scale, a.b_zero_point, a.scale, a.zero_point)
    if places is None or not isinstance(a.a, fx.Node) or not isinstance(a.b, fx.Node):
        return None
    return Step(
        Op.COMBINE,
        (a.a, a.b),
        places,
        (a.qmax, node.target is ops.mul_values, getattr(a, "alpha", 1.0) < 0),
        a.low,
        a.high,
    )


def _max_pool(_: fx.GraphModule, node: fx.Node) -> Step | None:
    a = _called(node)
    windows = (*_three(a.kernel), *_three(a.stride), *_three(a.padding, 0), *_three(a.dilation))
    return Step(Op.POOL, (a.x,), (), (255, 0, *windows, a.ceil_mode))


def _averages(module: fx.GraphModule, node: fx.Node) -> Step | None:
    a = _called(node)
    places = _stored(module, a.x_scale, a.x_zero_point, a.scale, a.zero_point)
    if places is None:
        return None
    more: tuple[int, ...]
    if node.target is ops.pool_value:
        windows = (*_three(a.kernel), *_three(a.stride), *_three(a.padding, 0), 1, 1, 1)
        more = (*windows, a.ceil_mode, a.count_include_pad, a.divisor or 0)
    else:
        size = a.size if node.target is ops.adaptive_pool_value else (1,) * len(a.dims)
        if node.target is ops.mean_value and sorted(a.dims) not in _SPATIAL:
            return None
        if not all(isinstance(part, int) and part > 0 for part in size):
            return None
        more = (*_three([-part for part in size], -1), len(size), 0, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0)
    drops = node.target is ops.mean_value and not a.keepdim
    return Step(Op.POOL, (a.x,), places, (a.qmax, 1, *more, drops))


def _flatten(_: fx.GraphModule, node: fx.Node, module: Any = None) -> Step | None:
    rest = (module.start_dim, module.end_dim) if module is not None else tuple(node.args[1:])
    start = node.kwargs.get("start_dim", rest[0] if rest else 0)
    end = node.kwargs.get("end_dim", rest[1] if len(rest) > 1 else -1)
    is_node = bool(node.args) and isinstance(node.args[0], fx.Node)
    return Step(Op.FLATTEN, (node.args[0],)) if is_node and (start, end) == (1, -1) else None  # type: ignore[arg-type]


def _join(_: fx.GraphModule, node: fx.Node) -> Step | None:
    dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    parts: Any = node.args[0] if node.args else ()
    fits = isinstance(parts, (list, tuple)) and 0 < len(parts) <= _MOST_JOINED
    return Step(Op.JOIN, parts) if fits and dim in (1,) and all(isinstance(p, fx.Node) for p in parts) else None


def _product(module: fx.GraphModule, node: fx.Node, product: Any) -> Step | None:
    names = ("input", "input_scale", "input_zero_point", "scale", "zero_point")
    a: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    scales = _stored(module, *(a.get(name) for name in (*names[1:], "addend_scale", "addend_zero_point")))
    if scales is None or scales[0] is None or not isinstance(a.get("input"), fx.Node):
        return None
    places = (*scales[:2], *(_kept(product, name) for name in product._tensors), *scales[2:])
    windows: tuple[int, ...] = (1,) * (1 + 2 * _SPACE) + (0,) * 2 * _SPACE
    if isinstance(product, StaticQuantizedConv):
        if product.padding_mode != "zeros":
            return None
        sides = (0,) * (2 * _SPACE - len(product._sides)) + tuple(product._sides)
        windows = (product.groups, *_three(product.stride), *_three(product.dilation), *sides)
        if product.transposed:
            windows = (*windows, 1, *_three(product.output_padding, 0))
    inputs = (a["input"], a["addend"]) if a.get("addend") is not None else (a["input"],)
    curve = 1 + CURVES.index(a["curve"]) if a.get("curve") else 0
    integers = (a.get("qmax", 255), curve, *windows)
    return Step(Op.CONVOLVE, inputs, places, integers, a.get("low"), a.get("high"), a.get("slope", 0.0))


def _expand(_: fx.GraphModule, node: fx.Node) -> Step | None:
    """Return a step for y.expand_as(x) where it is only combined with x, which the library does for y as it is."""
    y, x = (*node.args, None, None)[:2]
    pairs = [_called(user) for user in node.users if user.target in (ops.add_values, ops.mul_values)]
    fits = len(pairs) == len(node.users) and all((a.a, a.b) == (x, node) for a in pairs)
    return Step(Op.PASS, (y,)) if fits and isinstance(y, fx.Node) else None


def _pass(_: fx.GraphModule, node: fx.Node, module: Any) -> Step | None:
    is_node = len(node.args) == 1 and isinstance(node.args[0], fx.Node)
    return Step(Op.PASS, (node.args[0],)) if is_node and not module.training else None  # type: ignore[arg-type]


PASSES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_SPACE, _MOST_JOINED = 3, 16
OUTPUT_SCALE = 5  # of a product's places
MOVING = (Op.PASS, Op.FLATTEN, Op.JOIN)
_SPATIAL = ([2], [2, 3], [2, 3, 4], [-1], [-2, -1], [-3, -2, -1])
_FUNCTIONS: dict[Any, Callable[[fx.GraphModule, fx.Node], Step | None]] = {
    ops.quantize: _single(Op.QUANTIZE),
    ops.dequantize: _single(Op.DEQUANTIZE),
    ops.lookup: _single(Op.LOOK_UP),
    ops.lookup_channels: _single(Op.LOOK_UP_CHANNELS),
    ops.pad_value: _pad,
    ops.resize_value: _resize,
    **dict.fromkeys((ops.add_values, ops.mul_values), _pair),
    ops.max_pool_value: _max_pool,
    **dict.fromkeys((ops.mean_value, ops.pool_value, ops.adaptive_pool_value), _averages),
    torch.flatten: _flatten,
    **dict.fromkeys((torch.cat, torch.concat), _join),
}
_MODULES: dict[type, Callable[[fx.GraphModule, fx.Node, Any], Step | None]] = {
    **dict.fromkeys((StaticQuantizedConv, StaticQuantizedLinear), _product),
    nn.Flatten: _flatten,
    **dict.fromkeys(PASSES, _pass),
}
