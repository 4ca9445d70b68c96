"""What an operator of the table is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fxquant.formats import FLOAT32, FORMATS, INT8, Activation, Format
from fxquant.nn.base import Quantize
from fxquant.numerics import MAX_COLUMNS
from fxquant.qconfig import QConfig

ANY = "any"


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One sort of qconfig that an operator accepts.

    weight: the weights' dtype; symmetric: whether they have no zero point; activation: the input's dtype, or ANY where
    the operator has no activation to quantize, so that only the qconfig's weight half applies. is_static: whether its
    range is found by calibration.
    """

    name: str
    weight: str
    symmetric: bool = False
    activation: str = ANY
    is_static: bool = False

    def accepts(self, qconfig: QConfig) -> bool:
        """Return whether a qconfig is of this sort."""
        weight, activation = qconfig.weight, qconfig.activation
        if weight.dtype != self.weight or weight.symmetric != self.symmetric:
            return False
        if self.activation == ANY:
            return True
        if activation is None or activation.dtype != self.activation or activation.dynamic is self.is_static:
            return False
        return activation.format.is_whole or (not activation.symmetric and activation.qmin == 0)


def product_scheme(weight_format: Format) -> Scheme:
    """Return the scheme of products with weights of a format."""
    assert weight_format.activation is not None, weight_format
    if weight_format.activation is Activation.FLOAT:
        return Scheme(name=f"{weight_format.name} weights", weight=weight_format.name)
    activation = weight_format.activation.value
    grouped = " in groups" if weight_format.group_sizes else ""
    name = f"{weight_format.name} weights{grouped}, {activation} dynamic activations"
    return Scheme(name=name, weight=weight_format.name, symmetric=weight_format.is_symmetric, activation=activation)


def table_scheme(weight_format: Format) -> Scheme:
    """Return the scheme of tables of a format, whose rows are looked up."""
    if weight_format.limits is None:
        return Scheme(name=f"{weight_format.name} weights", weight=weight_format.name)
    affine = "" if weight_format.is_symmetric else "affine "
    return Scheme(
        name=f"{affine}{weight_format.name} rows", weight=weight_format.name, symmetric=weight_format.is_symmetric
    )


PRODUCTS = tuple(product_scheme(known) for known in FORMATS if known.activation is not None and known is not FLOAT32)
"""The schemes of an operator whose kernels multiply with all formats."""

TABLES = tuple(table_scheme(known) for known in FORMATS if known.is_table)
"""The schemes of an operator that looks up rows."""

INT8_DYNAMIC, INT8_ROWS = product_scheme(INT8), table_scheme(INT8)
INT8_STATIC = Scheme(
    name="int8 weights, uint8 static activations", weight="int8", symmetric=True, activation="uint8", is_static=True
)


class Call(NamedTuple):
    """A functional call that is to be quantized, its operands by name.

    operands: what the user passed, with each weight replaced by the graph node of its integers and joined by
    `<name>_scale` and `<name>_zero_point` nodes (or None); weights: a meta tensor like each float weight.
    """

    function: Callable[..., Any]
    operands: dict[str, Any]
    weights: dict[str, torch.Tensor]
    qconfig: QConfig


class NewCall(NamedTuple):
    """What a functional call becomes: the operator to call and its operands by name."""

    target: Callable[..., Any]
    kwargs: dict[str, Any]


def no_modules(module: nn.Module, qconfig: QConfig, quantize: Quantize) -> nn.Module:
    """Stand in for convert_module in an operator without modules."""
    raise NotImplementedError(f"{type(module)} has no module form")


def no_functions(call: Call) -> NewCall:
    """Stand in for convert_function in an operator without functions."""
    raise NotImplementedError(f"{call.function} has no functional form")


def no_stand_in(function: Any, operands: dict[str, Any]) -> nn.Module:
    """Stand in for stand_in in an operator whose calls stay calls."""
    raise NotImplementedError(f"{function} of {list(operands)} has no module")


def never_transposed(_: dict[str, Any]) -> bool:
    """Stand in for is_transposed in an operator whose calls take their weights as (O, I)."""
    return False


def sole_weight(module: nn.Module) -> tuple[str, ...]:
    """Return the name of a module's weight of two or more dimensions if there is one, and one alone."""
    names = [name for name, weight in module.named_parameters(remove_duplicate=False) if weight.dim() > 1]
    return tuple(names) if len(names) == 1 else ()


def never_refuse(_: Any) -> None:
    """Stand in for a check in an operator that takes all its modules or calls."""


@dataclass(frozen=True, kw_only=True)
class CallPattern:
    """One way to call an operator.

    summary: for docs/operators.md. functions: float functions, and methods of tensors by name. operands: their operand
    names in their order. roles: the operator's names for these; (): the same. may_lack_weight: whether a call may have
    no constant weight, and then is not a candidate. is_transposed: whether a call, by its operands, takes its weight as
    (I, O); everything else sees it as (O, I). refuse_call: returns why a call, by its operands (with TensorMetadata of
    the example's shapes for tensors), must stay float, or None. Both get the operands by their roles.
    """

    summary: str
    functions: tuple[Callable[..., Any] | str, ...] = ()
    operands: tuple[str, ...] = ()
    roles: tuple[str, ...] = ()
    may_lack_weight: bool = False
    is_transposed: Callable[[dict[str, Any]], bool] = never_transposed
    refuse_call: Callable[[dict[str, Any]], str | None] = never_refuse

    def operand_of(self, role: str) -> str:
        """Return the functions' name for an operand."""
        return self.operands[(self.roles or self.operands).index(role)]

    def name_operands(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return a call's operands by their roles."""
        roles = dict(zip(self.operands, self.roles or self.operands, strict=True))
        return {**dict(zip(roles.values(), args, strict=False)), **{roles.get(key, key): kwargs[key] for key in kwargs}}


@dataclass(frozen=True, kw_only=True)
class Operator(CallPattern):
    """An operator of the table: one family of float modules and calls, and how each becomes quantized.

    It is the pattern of its own functions; calls: further patterns. name, summary: for reports and docs/operators.md.
    modules: float types, the fused ones too, with the subclasses that inherit their forward; a type of a package that
    need not be installed by its name, "package.module.Type". weights: which operands are constant weights. is_static:
    whether its input is a calibrated value, which the graph has as integers. has_rows: whether the last dimension of a
    module's input and output holds its features. schemes: the qconfigs it accepts. refuse_module: returns why a module
    must stay float, or None. convert_module(module, qconfig, quantize), convert_function(call): see `Call`; operators
    never edit graphs. stand_in(function, operands): of a static one, the float module that computes what a call does,
    from its operands by their roles, constants as tensors; that module is converted. train_module(module, qconfig): its
    form for quantization-aware training, a `nn.trained.Trained`; None: it trains in float. parts: return the names of
    those weights of a module that may each have a scheme of its own; by default the only one. Of several,
    convert_module gives each `quantize(weight, qconfig.of(name))`.
    """

    name: str
    modules: tuple[type[nn.Module] | str, ...] = ()
    calls: tuple[CallPattern, ...] = ()
    weights: tuple[str, ...] = ()
    has_rows: bool = True
    is_static: bool = False
    schemes: tuple[Scheme, ...]
    convert_module: Callable[[Any, QConfig, Quantize], nn.Module] = no_modules
    convert_function: Callable[[Call], NewCall] = no_functions
    stand_in: Callable[[Any, dict[str, Any]], nn.Module] = no_stand_in
    refuse_module: Callable[[Any], str | None] = never_refuse
    train_module: Callable[[Any, QConfig], nn.Module] | None = None
    parts: Callable[[Any], tuple[str, ...]] = sole_weight

    @property
    def patterns(self) -> tuple[CallPattern, ...]:
        """All ways to call it, its own first."""
        return (self, *self.calls)

    def find_pattern(self, function: Any) -> CallPattern | None:
        """Return the pattern of a function, or of a method by its name."""
        return next((pattern for pattern in self.patterns if function in pattern.functions), None)

    def accepts(self, qconfig: QConfig) -> bool:
        """Return whether one of the operator's schemes takes the qconfig."""
        return any(scheme.accepts(qconfig) for scheme in self.schemes)


def refuse_weight(weight: torch.Tensor, sums: bool = True, name: str = "weight") -> str | None:
    """Return why a weight, of this name, cannot become integers, or None.

    sums: whether its products along a row are added up.
    """
    if not weight.is_floating_point():
        return f"its {name} is {weight.dtype}, not floating point"
    if sums and weight.shape[-1] > MAX_COLUMNS:
        return f"its {name} has {weight.shape[-1]} columns; int32 sums are exact up to {MAX_COLUMNS}"
    # The two ends are enough: aminmax propagates NaN, and takes no memory, unlike torch.isfinite of the whole.
    if weight.numel() and weight.device.type != "meta" and not all(map(torch.isfinite, weight.detach().aminmax())):
        return f"its {name} holds NaN or infinity"
    return None


def refuse_parameters(module: nn.Module, sums: bool = True) -> str | None:
    """Return why a module's own weights cannot become integers, or None."""
    if module.training:
        return "it is in training mode; call .eval() on it"
    for name, weight in module.named_parameters(recurse=False):
        reason = refuse_weight(weight, sums and weight.dim() > 1, name)
        if reason is not None:
            return reason
    return None
