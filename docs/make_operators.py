"""Write docs/operators.md from the operator table."""

import operator
import pathlib
from collections.abc import Callable
from typing import Any

from fxquant import OPERATORS
from fxquant.ops import KERNELS
from fxquant.qconfig import PRESETS
from fxquant.qconfig_mapping import type_name

_HEAD = """# Operators

What fxquant quantizes. `python docs/make_operators.py` makes this page from the operator table. Every other layer
with a weight stays float, and `fxquant.explain` gives the reason.

*float*: the modules and calls that the operator covers. *calls*: other ways to call it. *accepts*: the kinds of
qconfig. *presets*: the qconfigs of [this table](quick_start.md#choose-what-is-quantized) among them.
"""


def _written(kind: Callable[..., Any] | str) -> str:
    """Return a module type, function or method as it is written in code."""
    if kind is operator.matmul:
        return "x @ weight"
    if isinstance(kind, str):
        return kind if "." in kind else f".{kind}()"
    return type_name(kind)


def _kinds(*kinds: Any) -> str:
    return ", ".join(dict.fromkeys(f"`{_written(kind)}`" for kind in kinds))


def page() -> str:
    """Return the page's text."""
    parts = [_HEAD]
    for row in OPERATORS:
        kinds = _kinds(*row.modules, *row.functions)
        calls = "".join(f"| calls | {_kinds(*pattern.functions)}: {pattern.summary} |\n" for pattern in row.calls)
        presets = ", ".join(f"`{name}`" for name, preset in PRESETS.items() if row.accepts(preset))
        schemes = "; ".join(scheme.name for scheme in row.schemes)
        parts.append(
            f"## {row.name}\n\n{row.summary}.\n\n"
            f"| | |\n|---|---|\n| float | {kinds} |\n{calls}| accepts | {schemes} |\n| presets | {presets} |\n"
        )
    parts.append(
        "## The registered operators\n\n"
        "Graphs call the functions of `fxquant.ops`. `torch.compile` and `torch.export` see the operators "
        "`torch.ops.fxquant.*`:\n"
    )
    parts.append("```text\n" + "\n".join(f"{name}{kernel.schema}" for name, kernel in KERNELS.items()) + "\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    (pathlib.Path(__file__).parent / "operators.md").write_text(page(), encoding="utf8")
