"""What torch.compile's graphs call: the native library at once, as an eager call does.

Inductor calls an operator that it has no code for through torch's dispatcher, from Python, which costs more than a
small product. So, once Inductor is loaded and traces one of ours, it learns for that operator alone to write a call of
the function in `calls`. Nothing of Inductor is imported or changed before. Where it is not as it was when this was
written (torch 2.13), it keeps its own way, with the same results.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from fxquant.ops import packaged

_MODULE = "torch._inductor.lowering"
_DTYPES = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16}  # as schemas' defaults number them
calls = SimpleNamespace()
"""Each operator's function: its native kernel as an eager call runs it, else what torch has registered."""
_taught: set[str] = set()


def register(
    name: str,
    overload: Callable[..., Any],
    native: Callable[..., Any] | None,
    at_once: Callable[[Callable[..., Any], tuple[Any, ...]], Any] | None,
) -> None:
    """Make the function of an operator. at_once: as of `Kernel`."""

    def call(*args: Any) -> Any:
        out = native(True, *args)  # type: ignore[misc]
        return overload(*args) if out is None else out

    def call_at_once(*args: Any) -> Any:
        out = at_once(native, args)  # type: ignore[misc,arg-type]
        return overload(*args) if out is None else out

    setattr(calls, name, overload if native is None else call if at_once is None else call_at_once)


def teach_inductor(name: str, overload: Any, arguments: Callable[..., Any]) -> None:
    """Let Inductor, where it is loaded, call an operator's function. arguments: as of `Kernel`."""
    if name in _taught or _MODULE not in sys.modules:
        return
    _taught.add(name)
    try:
        _lower(name, overload, arguments)
    except (ImportError, AttributeError, TypeError):  # another Inductor: its own fallback is right, too
        return


def _named(args: Any) -> tuple[Any, ...]:
    """Return all arguments, a dtype as itself where a graph has its number."""
    named = args._asdict()
    if "dtype" in named:
        named["dtype"] = _DTYPES.get(named["dtype"], named["dtype"])
    return tuple(named.values())


def _leave_out_checks(wrapper: Any, graph: torch.fx.Graph) -> None:
    """Take out the checks of the sizes of inputs that calls alone read: 0.35 us each, together as much as a product.

    Dynamo's guards have compared these sizes, and kernels check what they read.
    """
    ours = {
        node.name
        for node in graph.nodes
        if node.op == "placeholder" and all(getattr(user.target, "namespace", "") == "fxquant" for user in node.users)
    }
    for name in ours:
        getattr(wrapper, "_pending_input_asserts", {}).pop(name, None)
    wrapper.lines[:] = [
        line
        for line in wrapper.lines
        if getattr(line, "op_name", "") != "input" or getattr(line, "name", "") not in ours
    ]


def _lower(name: str, overload: Any, arguments: Callable[..., Any]) -> None:
    from torch._inductor import ir, lowering
    from torch._inductor.virtualized import V
    from torch._library.utils import get_layout_constraint_tag

    class Call(ir.FallbackKernel):
        """A call of the operator in a compiled graph."""

        def codegen(self, wrapper: Any) -> None:
            """Write the call."""
            if not V.graph.aot_mode:
                _leave_out_checks(wrapper, V.graph.graph)
            if V.graph.cpp_wrapper and V.graph.aot_mode and packaged.takes(self):
                self.codegen_comment(wrapper)
                packaged.write_call(self, wrapper, name)
                self.codegen_unbacked_symbol_defs(wrapper)
                return
            if not V.graph.cpp_wrapper:
                wrapper.add_import_once("from fxquant.ops.compiled import calls as fxquant_calls")
                self.python_kernel_name = f"fxquant_calls.{name}"
            super().codegen(wrapper)

    def lower(*args: Any, **kwargs: Any) -> Any:
        outputs = Call.create(overload, *_named(arguments(*args, **kwargs)))
        return torch.utils._pytree.tree_map(box, outputs)

    def box(output: Any) -> Any:
        if not isinstance(output, ir.IRNode):
            return output
        output.skip_size_stride_alignment_checks = True  # type: ignore[attr-defined]
        return ir.TensorBox.create(output)

    constraint = lowering.tag_to_layout_constraint(get_layout_constraint_tag(overload, with_default=True))
    lowering.make_fallback(overload, layout_constraint=constraint, warn=False)  # type: ignore[no-untyped-call]
    lowering.register_lowering(overload, type_promotion_kind=None)(lower)
