"""Write docs/operators.md from the operator table."""

import operator
import pathlib
from collections.abc import Callable
from typing import Any

from fxquant import OPERATORS
from fxquant.operators.base import ANY, Operator
from fxquant.operators.values import VALUE_OPERATORS, Form
from fxquant.ops import KERNELS
from fxquant.qconfig import PRESETS
from fxquant.qconfig_mapping import type_name

_HEAD = """# Operators

What fxquant quantizes. `python docs/make_operators.py` makes this page from the operator table. Every other layer
with a weight stays float, and `fxquant.explain` gives the reason.

*float*: the modules and calls that the operator covers. *calls*: other ways to call it. *accepts*: the kinds of
qconfig. *presets*: the qconfigs of [this table](quick_start.md#choose-what-is-quantized) among them.

## At a glance

*dynamic*: the weights' formats under a dynamic or weight-only qconfig. *static*: what becomes of the layer under
`default_static_qconfig`. "int8" computes with calibrated integers and may give some; "dynamic" and "weight-only" are
quantized as under a dynamic mapping, and give floats.
"""

_VALUES = """## Values without weights

What computes between [static](static_quantization.md) layers, and what it does there with integers. Everything else
computes with floats, between a dequantize and a quantize, and so do these where their arguments have no integer form (a
max pooling that returns indices, padding with a constant other than 0, bicubic interpolation); `explain` lists them.

| modules | functions and methods, in any of their forms | with integers |
|---|---|---|
"""

_DOES = {
    Form.KEEPS: "integers pass as they are, under the same scale",
    Form.PADS: "padded with the zero point, or with values that are there",
    Form.POOLS: "the largest integer, under the same scale",
    Form.RESIZES: "repeated, under the same scale; linear and bilinear: weighted sums of integers, rounded once",
    Form.LOOKS_UP: "a table of 256, one a channel where they differ; "
    "after a layer or addition a clamp is part of that, and after a layer hardswish, SiLU and leaky ReLU too",
    Form.ADDS: "two values: rounded once, after a layer as part of that; a value and a number: a table of 256 integers",
    Form.MULTIPLIES: "two values: rounded once; a value and a number: a table of 256 integers",
    Form.AVERAGES: "summed exactly and rounded once",
}

_SIGNS: dict[Any, str] = {
    operator.getitem: "x[…]",
    **dict.fromkeys((operator.add, operator.iadd), "+"),
    operator.sub: "-",
    operator.neg: "-x",
    **dict.fromkeys((operator.mul, operator.imul), "*"),
    **dict.fromkeys((operator.truediv, operator.itruediv), "/"),
    operator.pow: "**",
}


def _written(kind: Callable[..., Any] | str) -> str:
    """Return a module type, function or method as it is written in code."""
    if kind is operator.matmul:
        return "x @ weight"
    if isinstance(kind, str):
        return kind if "." in kind else f".{kind}()"
    return type_name(kind)


def _kinds(*kinds: Any) -> str:
    return ", ".join(dict.fromkeys(f"`{_written(kind)}`" for kind in kinds))


def _covered(row: Operator) -> tuple[Any, ...]:
    """Return a row's modules, functions, and the first function of each way to call it."""
    return (*row.modules, *row.functions, *(pattern.functions[0] for pattern in row.calls))


def _glance() -> str:
    """Return the table of layers: with which weights each is dynamic, and what becomes of it under a static mapping."""
    static = {kind for row in OPERATORS if row.is_static for kind in _covered(row)}
    groups: dict[tuple[str, str, str], list[Any]] = {}
    seen: set[Any] = set()
    for row in sorted(OPERATORS, key=lambda row: row.is_static):
        for kind in _covered(row):
            if kind in seen or getattr(kind, "__module__", "").startswith("fxquant"):
                continue
            seen.add(kind)
            formats = "–" if row.is_static else ", ".join(dict.fromkeys(scheme.weight for scheme in row.schemes))
            has_activations = any(scheme.activation != ANY for scheme in row.schemes)
            under = "int8" if kind in static else "dynamic" if has_activations else "weight-only"
            groups.setdefault((row.name, formats, under), []).append(kind)
    lines = (f"| {_kinds(*kinds)} | {formats} | {under} |\n" for (_, formats, under), kinds in groups.items())
    return "| layer | dynamic | static |\n|---|---|---|\n" + "".join(lines)


def _called(kind: Callable[..., Any] | str) -> str:
    """Return the name that a function and a method share."""
    return kind if isinstance(kind, str) else _SIGNS.get(kind, kind.__name__)


def _values() -> str:
    """Return the table of functions of values."""
    lines = []
    for row in VALUE_OPERATORS:
        calls = ", ".join(dict.fromkeys(f"`{_called(kind)}`" for kind in row.functions))
        lines.append(f"| {_kinds(*row.modules)} | {calls} | {_DOES[row.form]} |\n")
    return _VALUES + "".join(lines)


def page() -> str:
    """Return the page's text."""
    parts = [_HEAD, _glance()]
    for row in OPERATORS:
        kinds = _kinds(*row.modules, *row.functions)
        calls = "".join(f"| calls | {_kinds(*pattern.functions)}: {pattern.summary} |\n" for pattern in row.calls)
        presets = ", ".join(f"`{name}`" for name, preset in PRESETS.items() if row.accepts(preset))
        schemes = "; ".join(scheme.name for scheme in row.schemes)
        parts.append(
            f"## {row.name}\n\n{row.summary}.\n\n"
            f"| | |\n|---|---|\n| float | {kinds} |\n{calls}| accepts | {schemes} |\n| presets | {presets} |\n"
        )
    parts.append(_values())
    parts.append(
        "## The registered operators\n\n"
        "Graphs call the functions of `fxquant.ops`. `torch.compile` and `torch.export` see the operators "
        "`torch.ops.fxquant.*`:\n"
    )
    parts.append("```text\n" + "\n".join(f"{name}{kernel.schema}" for name, kernel in KERNELS.items()) + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (pathlib.Path(__file__).parent / "operators.md").write_text(page(), encoding="utf8")
