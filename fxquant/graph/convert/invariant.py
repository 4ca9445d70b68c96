"""After convert: the float products of a graph get a fixed order of sums, so that no row depends on its batch.

torch's own products order their sums by the sizes of the batch and by where a tensor lies in memory: docs/numerics.md
has the table. `batch_invariant` is None (products of two activations and attention, where native kernels compute them),
True (on every device, and float linear layers too) or False (torch's own).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant import ops
from fxquant.graph import edit
from fxquant.graph.constants import constant_of
from fxquant.nn import DynamicQuantizedMultiheadAttention, QuantizedModule
from fxquant.ops.activations import pair_product
from fxquant.qconfig_mapping import type_name

PRODUCTS = (ops.matmul, ops.add_product, ops.einsum, ops.attention, ops.float_linear)
"""The functions that this pass puts into a graph."""

_PAIRS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((operator.matmul, torch.matmul, torch.linalg.matmul, "matmul", "__matmul__"), ("input", "other")),
    **dict.fromkeys((torch.bmm, torch.mm, "bmm", "mm"), ("input", "mat2")),
}
_SUMS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((torch.baddbmm, "baddbmm"), ("input", "batch1", "batch2", "beta", "alpha")),
    **dict.fromkeys((torch.addmm, "addmm"), ("input", "mat1", "mat2", "beta", "alpha")),
}
_LINEAR = ("input", "weight", "bias")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


class _Form(NamedTuple):
    """A call as one of PRODUCTS: its arguments, and the operands that it multiplies."""

    target: Callable[..., Any]
    args: tuple[Any, ...]
    factors: tuple[Any, ...]


def bring_products(root: nn.Module, batch_invariant: bool | None) -> None:
    """Replace, in place, the float products of a converted model: a graph's calls, and those in fxquant's modules."""
    for module in root.modules():
        if isinstance(module, DynamicQuantizedMultiheadAttention):
            module.batch_invariant = batch_invariant
    if batch_invariant is False or not isinstance(root, fx.GraphModule):
        return
    keywords = {"anywhere": bool(batch_invariant)}
    for node in list(root.graph.nodes):
        form = _form_of(node, root if batch_invariant else None)
        if form is not None and (batch_invariant or not any(map(constant_of, form.factors))):
            node.op, node.target, node.args, node.kwargs = "call_function", form.target, form.args, keywords


def _form_of(node: fx.Node, root: fx.GraphModule | None) -> _Form | None:
    """Return what a node becomes, None if it is not a product. root: holds the float modules, which may change too."""
    if node.op == "call_module" and root is not None:
        return _module_form(node, root)
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _PAIRS:
        operands = _named(node, _PAIRS[node.target])
        factors = None if operands is None else tuple(operands[name] for name in _PAIRS[node.target])
        return None if factors is None else _Form(ops.matmul, factors, factors)
    if node.target in _SUMS:
        operands = _named(node, _SUMS[node.target])
        if operands is None:
            return None
        start, a, b = (operands[name] for name in _SUMS[node.target][:3])
        return _Form(ops.add_product, (start, a, b, operands.get("beta", 1), operands.get("alpha", 1)), (a, b))
    if node.target is F.linear:
        operands = _named(node, _LINEAR)
        if operands is None:
            return None
        x, weight = operands["input"], operands["weight"]
        return _Form(ops.float_linear, (x, weight, operands.get("bias")), (x, weight))
    if node.target is torch.einsum:
        is_pair = pair_product(str(node.args[0])) is not None  # torch turns the other signatures into this one
        return _Form(ops.einsum, node.args, node.args[1:]) if is_pair else None
    return _attention_form(node) if node.target is F.scaled_dot_product_attention else None


def _attention_form(node: fx.Node) -> _Form | None:
    operands = _named(node, _ATTENTION)
    if operands is None or operands.get("dropout_p", 0.0) != 0.0 or operands.get("enable_gqa", False) is not False:
        return None
    rest = operands.get("attn_mask"), operands.get("is_causal", False), operands.get("scale")
    factors = tuple(operands[name] for name in _ATTENTION[:3])
    return _Form(ops.attention, (*factors, *rest), factors)


def _module_form(node: fx.Node, root: fx.GraphModule) -> _Form | None:
    """Return a float nn.Linear without hooks as a call; its tensors stay where they are."""
    module = root.get_submodule(str(node.target))
    if type(module) is not nn.Linear or edit.has_hooks(module) or "weight" not in module._parameters:
        return None
    (x,) = (*node.args, *node.kwargs.values())
    with root.graph.inserting_before(node):
        weight = root.graph.get_attr(f"{node.target}.weight")
        bias = None if module.bias is None else root.graph.get_attr(f"{node.target}.bias")
    return _Form(ops.float_linear, (x, weight, bias), (x, weight))


def _named(node: fx.Node, names: tuple[str, ...]) -> dict[str, Any] | None:
    """Return a call's operands by name, None where it has others (out=) or is in torch's older form.

    That is addmm(beta, input, alpha, mat1, mat2) without beta, alpha or both: more operands by position than three, or
    one of the matrices by position and by name.
    """
    operands = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    is_clear = len(operands) == len(node.args) + len(node.kwargs)
    most = 3 if "beta" in names else len(names)
    return operands if is_clear and len(node.args) <= most and operands.keys() <= set(names) else None


class Dependent(NamedTuple):
    """A float operator that torch computes in another order in another batch: functions, methods and module types."""

    name: str
    functions: tuple[Any, ...]
    modules: tuple[type[nn.Module], ...] = ()


DEPENDENT = (
    Dependent("matmul", (*_PAIRS, *_SUMS, torch.einsum, torch.dot, torch.mv, "dot", "mv", torch.tensordot)),
    Dependent("scaled_dot_product_attention", (F.scaled_dot_product_attention,), (nn.MultiheadAttention,)),
    Dependent("linear", (F.linear,), (nn.Linear,)),
    Dependent("bilinear", (F.bilinear,), (nn.Bilinear,)),
    Dependent(
        "convolution",
        (F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
        (nn.modules.conv._ConvNd,),
    ),
    Dependent("recurrent", (), (nn.RNNBase, nn.RNNCellBase)),
    Dependent("sigmoid", (torch.sigmoid, F.sigmoid, "sigmoid", F.glu), (nn.Sigmoid, nn.GLU)),
    Dependent("silu", (F.silu, F.mish), (nn.SiLU, nn.Mish)),
    Dependent("softplus", (F.softplus,), (nn.Softplus,)),
    Dependent("elu", (F.elu, F.selu, F.celu, torch.selu, torch.celu), (nn.ELU, nn.SELU, nn.CELU)),
    Dependent("gelu, tanh", (F.gelu,), (nn.GELU,)),
    Dependent("pow", (torch.pow, operator.pow, "pow", "__pow__")),
    Dependent("softmax, another dimension than the last", (F.softmax, torch.softmax, "softmax"), (nn.Softmax,)),
    Dependent("sum of several dimensions", (torch.sum, torch.mean, "sum", "mean")),
)
"""The operators of docs/numerics.md's table that are not independent of the batch on some machine."""


def find_dependent(root: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield (where, operator) of what in a converted model torch computes in another order in another batch."""
    by_function = {function: dependent.name for dependent in DEPENDENT for function in dependent.functions}
    nodes = list(root.graph.nodes) if isinstance(root, fx.GraphModule) else []
    for node in nodes:
        if node.op in ("call_function", "call_method") and node.target in by_function and _is_dependent(node):
            yield node.name, by_function[node.target]
    for path, module in root.named_modules():
        if isinstance(module, QuantizedModule):  # a quantized Linear is an nn.Linear too
            continue
        names = (dependent.name for dependent in DEPENDENT if isinstance(module, dependent.modules))
        if _is_dependent_module(module) and (name := next(names, None)) is not None:
            yield path or type_name(type(module)), name


def _is_dependent(node: fx.Node) -> bool:
    """Return whether a call is one of the dependent cases of its function."""
    operands: dict[Any, Any] = {**dict(enumerate(node.args)), **node.kwargs}
    if node.target is F.gelu:
        return bool(operands.get("approximate", operands.get(1, "none")) == "tanh")
    dim = operands.get("dim", operands.get(1))
    if node.target in (F.softmax, torch.softmax, "softmax"):
        return dim != -1
    if node.target in (torch.sum, torch.mean, "sum", "mean"):
        return dim is None or (isinstance(dim, (tuple, list)) and len(dim) > 1)
    if node.target in (torch.pow, operator.pow, "pow", "__pow__"):
        return operands.get("exponent", operands.get(1)) not in (1, 2, 3, -1, -2, 0.5, -0.5)
    return True


def _is_dependent_module(module: nn.Module) -> bool:
    if isinstance(module, nn.GELU):
        return module.approximate == "tanh"
    return module.dim != -1 if isinstance(module, nn.Softmax) else True
