"""torch.ao's static graphs and modules as float ones, and where their values become integers.

Each quantized call becomes the float call that it stands for. A pass-through marks what torch.ao quantizes or
dequantizes there; scales are kept by the marks' and modules' paths.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxquant.errors import TorchAoError
from fxquant.graph import edit
from fxquant.nn.stubs import FloatFunctional
from fxquant.spec import TensorSpec

STATIC_LATER = (
    "Of a static model fxquant takes over Conv, ConvTranspose and Linear with their scales, sums, products, moves, "
    "poolings and the usual activations; quantize the float model anew instead: prepare_fx(model, "
    "default_static_qconfig_mapping(), example_inputs), then convert_fx(prepared, data=batches)"
)


SPEC = TensorSpec(dtype="uint8", qmin=0, qmax=255, axis="tensor")
"""Of the values of a static model."""


class Qparams(NamedTuple):
    """A value's scale, () float32, and zero point, () int32."""

    scale: torch.Tensor
    zero_point: torch.Tensor


def qparams_of(scale: Any, zero_point: Any) -> Qparams:
    """Return torch.ao's scale and zero point, numbers or tensors of one number, as ours."""
    return Qparams(
        torch.as_tensor(scale, dtype=torch.float32).detach().cpu().reshape(()).clone(),
        torch.as_tensor(zero_point).detach().cpu().to(torch.int32).reshape(()).clone(),
    )


@dataclass
class Scales:
    """What is known about values. of: by a module's path, under what it quantizes what it gives; None: it dequantizes.

    products: the paths of static modules with weights. used: the state_dict's names of what was read for that.
    """

    of: dict[str, Qparams | None] = field(default_factory=dict)
    products: set[str] = field(default_factory=set)
    used: set[str] = field(default_factory=set)


class Functional(FloatFunctional):
    """A FloatFunctional whose results pass a mark."""

    def __init__(self) -> None:
        super().__init__()
        self.mark = nn.Identity()


def _marked(name: str) -> Callable[..., torch.Tensor]:
    plain = getattr(FloatFunctional, name)

    def call(self: Functional, *operands: Any, **named: Any) -> torch.Tensor:
        y: torch.Tensor = self.mark(plain(self, *operands, **named))
        return y

    return call


for _name in ("add", "add_relu", "mul", "cat"):  # sums and products with a number have the value's own scale
    setattr(Functional, _name, _marked(_name))


# Modules


def _convolution(kind: type[nn.Module]) -> Callable[[Any], nn.Module]:
    names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"]

    def make(old: Any) -> nn.Module:
        if getattr(old, "transposed", False) and old.groups > 1:
            raise TorchAoError(f"a transposed convolution in {old.groups} groups does not come over. {STATIC_LATER}")
        more = {"output_padding": old.output_padding} if getattr(old, "transposed", False) else {}
        options = {name: getattr(old, name) for name in names}
        return kind(**options, **more, bias=old.bias() is not None, device="meta")

    return make


def convolution_forms(fused: Mapping[str, type[nn.Module]]) -> dict[str, Callable[[Any], nn.Module]]:
    """Return how the float module of one of torch.ao is made, by its name below torch.ao. fused: those with a ReLU."""
    plain = {f"nn.quantized.modules.conv.{name}": getattr(nn, name) for name in _CONVOLUTIONS}
    named = {f"nn.intrinsic.quantized.modules.conv_relu.{name}": kind for name, kind in fused.items()}
    return {name: _convolution(kind) for name, kind in {**plain, **named}.items()}


_CONVOLUTIONS = (
    *("Conv1d", "Conv2d", "Conv3d"),
    *("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d"),
)
DEQUANTIZE = "nn.quantized.modules.DeQuantize"
_ACTIVATIONS = "nn.quantized.modules.activation"
STATIC_FORMS: dict[str, Callable[[Any], nn.Module]] = {
    "nn.quantized.modules.Quantize": lambda _: nn.Identity(),
    DEQUANTIZE: lambda _: nn.Identity(),
    "nn.quantized.modules.functional_modules.QFunctional": lambda _: Functional(),
    "nn.quantized.modules.dropout.Dropout": lambda _: nn.Identity(),
    f"{_ACTIVATIONS}.ReLU6": lambda _: nn.ReLU6(),
    f"{_ACTIVATIONS}.Hardswish": lambda _: nn.Hardswish(),
    f"{_ACTIVATIONS}.Sigmoid": lambda _: nn.Sigmoid(),
    f"{_ACTIVATIONS}.ELU": lambda old: nn.ELU(old.alpha),
    f"{_ACTIVATIONS}.LeakyReLU": lambda old: nn.LeakyReLU(old.negative_slope),
}
"""How the float module is made from each of torch.ao's without weights."""

_OWN_SCALE = ("scale", "output_scale")


def note_scale(old: Any, path: str, scales: Scales) -> None:
    """Remember the scale of what one of torch.ao's modules gives, if it has one."""
    scale = next((getattr(old, name) for name in _OWN_SCALE if getattr(old, name, None) is not None), None)
    zero_point = getattr(old, "output_zero_point" if hasattr(old, "output_scale") else "zero_point", None)
    if scale is None or zero_point is None:
        return
    name = type(old).__name__
    scales.of[f"{path}.mark" if name in ("QFunctional", "FloatFunctional") else path] = qparams_of(scale, zero_point)
    if hasattr(old, "weight"):
        scales.products.add(path)
    prefix = f"{path}." if path else ""
    scales.used |= {f"{prefix}scale", f"{prefix}zero_point"}


# Graphs


_PAIRS: dict[str, tuple[Callable[..., Any], bool]] = {
    "quantized.add": (operator.add, False),
    "quantized.add_relu": (operator.add, True),
    "quantized.mul": (operator.mul, False),
    "quantized.mul_relu": (operator.mul, True),
}
"""The sum or product of each operator, and whether a ReLU follows."""

_CURVES: dict[str, Callable[..., torch.Tensor]] = {
    "quantized.hardswish": F.hardswish,
    "quantized.sigmoid": torch.sigmoid,
    "quantized.leaky_relu": F.leaky_relu,
    "quantized.elu": F.elu,
}


class Lifting:
    """Replaces what a graph of torch.ao's quantizes by float calls and marks. path: where the graph stands."""

    def __init__(self, module: fx.GraphModule, path: str, scales: Scales) -> None:
        self._module, self._graph = module, module.graph
        self._prefix, self._scales = f"{path}." if path else "", scales

    def lift(self, node: fx.Node) -> bool:
        """Replace a node, and return True, if it is one of those."""
        target = str(node.target)
        with self._graph.inserting_before(node):
            new = self._form(node, target)
        if new is None:
            return False
        if new is not node:
            node.replace_all_uses_with(new)
            self._graph.erase_node(node)
        return True

    def _form(self, node: fx.Node, target: str) -> fx.Node | None:
        if node.op == "call_method" and target == "dequantize":
            return self._mark(node.args[0], node.name, None)
        if node.op != "call_function":
            return None
        if node.target is torch.quantize_per_tensor:
            x, scale, zero_point, dtype = node.args
            self.need_unsigned(dtype, node.name)
            return self._mark(x, node.name, self._read(scale, zero_point))
        if target in _PAIRS:
            function, is_rectified = _PAIRS[target]
            made = self._graph.call_function(function, node.args[:2])
            made = self._graph.call_function(F.relu, (made,)) if is_rectified else made
            return made if len(node.args) == 2 else self._mark(made, node.name, self._read(*node.args[2:4]))
        if target in _CURVES and "output_scale" in node.kwargs:
            named = dict(node.kwargs)
            qparams = self._read(named.pop("output_scale"), named.pop("output_zero_point"))
            made = self._graph.call_function(_CURVES[target], node.args, named)
            return self._mark(made, node.name, qparams)
        return None

    def mark(self, made: fx.Node, name: str, operands: tuple[Any, ...]) -> fx.Node:
        """Return the mark of what a product gives under these operands, a scale and a zero point."""
        return self._mark(made, name, self._read(*operands))

    @staticmethod
    def need_unsigned(dtype: Any, name: str) -> None:
        """Raise TorchAoError unless a value's integers are unsigned bytes."""
        if str(dtype).rpartition(".")[2] != "quint8":
            raise TorchAoError(f"{name!r} gives {dtype}; activations of quint8 alone come over. {STATIC_LATER}")

    def _mark(self, x: Any, name: str, qparams: Qparams | None) -> fx.Node:
        path = edit.free_name(self._module, f"{name}_mark")
        self._module.add_submodule(path, nn.Identity())
        self._scales.of[self._prefix + path] = qparams
        return self._graph.call_module(path, (x,))

    def _read(self, scale: Any, zero_point: Any) -> Qparams:
        return qparams_of(*(self._value(part) for part in (scale, zero_point)))

    def _value(self, part: Any) -> Any:
        """Return what a node reads, and remember that the model needs it no more."""
        if not isinstance(part, fx.Node):
            return part
        self._scales.used.add(self._prefix + str(part.target))
        return edit.get_tensor(self._module, str(part.target))
