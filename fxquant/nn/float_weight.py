"""The float weight that a quantized module shows as `.weight`: a tensor whose values are computed when they are read.

Reading its shape, dtype or device, or making a tensor like it, costs nothing. Whatever needs values gets them
dequantized anew; nothing is kept. Writing to it, or to a view of it, is a ReadOnlyError.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from fxquant.errors import DTypeError, ReadOnlyError

_GETTERS = (
    *(
        "shape",
        "dtype",
        "device",
        "layout",
        "ndim",
        "itemsize",
        "nbytes",
        "requires_grad",
        "grad",
        "grad_fn",
    ),
    *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_nested", "is_quantized", "output_nr"),
)
_METHODS = (
    *("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "is_contiguous"),
    *("is_floating_point", "is_complex", "is_signed", "is_inference", "get_device", "__len__", "__hash__"),
)
_METADATA = {
    *(getattr(torch.Tensor, name).__get__ for name in _GETTERS if hasattr(torch.Tensor, name)),
    *(getattr(torch.Tensor, name) for name in _METHODS),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_signed),
}
"""Functions that need no values: torch answers them from the tensor itself."""

_MAKERS = {
    *(getattr(torch.Tensor, f"new_{name}") for name in ("zeros", "ones", "empty", "full", "tensor", "empty_strided")),
    *(getattr(torch, f"{name}_like") for name in ("zeros", "ones", "empty", "full", "rand", "randn", "randint")),
}
"""Functions that make a tensor of another's shape, dtype and device."""

_FOLLOWERS = {getattr(torch.Tensor, name) for name in ("to", "type_as", "expand_as", "view_as", "reshape_as")}
"""Functions that use only the shape, dtype and device of the tensors after the first."""

_THEMSELVES = (torch.Tensor.data.__get__, torch.Tensor.detach, torch.detach, torch.Tensor.contiguous)  # type: ignore[attr-defined]
_MARKS = {"_is_param": nn.Parameter, "_is_buffer": torch.Tensor}
"""What nn.Parameter and nn.Buffer set on a tensor of another type to make it one, and the type that it then has."""

_COPY = "a trainable or writable copy of the values is .clone()"


class FloatWeight(torch.Tensor):
    """A read-only tensor whose values `read(rows)` gives: those of some rows, an index of dimension 0; None: all.

    name: what it is, for errors. It is not a Parameter, so optimizers and state_dicts skip it.
    """

    _read: Callable[[Any], torch.Tensor]
    _name: str
    _has_rows: bool
    _device: torch.device
    _is_detached = False
    _is_copy = False

    @staticmethod
    def __new__(
        cls,
        read: Callable[[Any], torch.Tensor],
        name: str,
        shape: tuple[int, ...] | torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        has_rows: bool = False,
    ) -> FloatWeight:
        """Return the tensor. has_rows: whether `read` can be asked for some rows alone."""
        # The backend is "meta", for `parameter.data = weight` asks the weight nothing and takes over what it has for
        # memory: on one of its own backend, null pointers. So it is an error of torch's.
        made: FloatWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=torch.device("meta"), dispatch_device=True
        )
        made._read, made._name, made._has_rows, made._device = read, name, has_rows, torch.device(device)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if self._is_copy and name in _MARKS:
            for field in ("_read", "_name", "_has_rows", "_device", "_is_copy"):
                del self.__dict__[field]
            self.__class__ = _MARKS[name]  # type: ignore[assignment]
        object.__setattr__(self, name, value)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weight = args[0] if args and isinstance(args[0], FloatWeight) else None
        if weight is not None and weight._is_copy:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if weight is None and _is_ours(func):
            raise DTypeError(
                f"{func} takes a weight's integers, got the float weight that they stand for: pass the buffer beside "
                "it, whose name QuantizedModule.set_weight returns (self.table_int8 for self.table)"
            )
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if weight is not None and func in _MAKERS:
            like = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
            return func(like, *args[1:], **{"device": weight.device, **kwargs})
        if func in _FOLLOWERS and weight is None:
            return func(*pytree.tree_map_only(FloatWeight, _stand_in, args), **kwargs)
        if weight is not None and func in _THEMSELVES and not kwargs:
            return _detached(weight) if func in _THEMSELVES[1:3] else weight
        if func in _REFUSED:
            return _REFUSED[func](*args, **kwargs)
        name = getattr(func, "__name__", "")
        if weight is not None and name.endswith("_") and not name.startswith("_"):
            raise _read_only(weight, func)  # writes of other functions are found once they have written
        result = _look_up(func, args, kwargs)
        return _with_values(func, args, kwargs) if result is None else result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Return what an operator gives that was not met as a function: inside torch.func, say."""
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return args[0]._device
        arguments = {**dict(zip((arg.name for arg in func._schema.arguments), args, strict=False)), **kwargs}
        for arg in func._schema.arguments:
            written = arguments.get(arg.name) if arg.alias_info is not None and arg.alias_info.is_write else None
            for part in pytree.tree_leaves(written):
                if isinstance(part, FloatWeight):
                    raise _read_only(part, func)
        args, kwargs = pytree.tree_map_only(FloatWeight, lambda weight: weight._read(None), (args, kwargs))
        return func(*args, **kwargs)


def _is_ours(func: Any) -> bool:
    """Return whether a function is one of torch.ops.fxquant."""
    packet = func.overloadpacket if isinstance(func, torch._ops.OpOverload) else func
    return isinstance(packet, torch._ops.OpOverloadPacket) and packet._qualified_op_name.startswith("fxquant::")


def _stand_in(weight: FloatWeight) -> torch.Tensor:
    """Return a plain tensor of a weight's shape, dtype and device that takes no memory."""
    return torch.empty((), dtype=weight.dtype, device=weight.device).expand(weight.shape)


def _look_up(func: Any, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Return some rows of a weight where a function asks for those alone, else None."""
    weight, rows, more = None, None, bool(kwargs)
    if func is torch.Tensor.__getitem__:
        weight, rows = args
        if not isinstance(rows, (int, slice, torch.Tensor)) or isinstance(rows, bool):
            return None
    elif func is F.embedding:  # which hands on all but these two by name
        rows, weight = args
        more = kwargs.get("max_norm") is not None
    elif func in (torch.index_select, torch.Tensor.index_select) and len(args) == 3 and args[1] == 0:
        weight, rows = args[0], args[2]
    if not isinstance(weight, FloatWeight) or not weight._has_rows or isinstance(rows, FloatWeight) or more:
        return None
    if isinstance(rows, torch.Tensor) and rows.dtype not in (torch.int32, torch.int64):
        return None  # a mask
    if func is not torch.Tensor.__getitem__ and isinstance(rows, torch.Tensor) and (rows < 0).any():
        return None  # torch raises an error, but [] counts from the end
    values = weight._read(rows)
    return values if isinstance(rows, torch.Tensor) else _view(weight, values)


def _with_values(func: Any, args: Any, kwargs: Any) -> Any:
    """Return what a function gives for the values; views of them are read-only too."""
    read: dict[int, tuple[FloatWeight, torch.Tensor, int]] = {}

    def values_of(weight: FloatWeight) -> torch.Tensor:
        if id(weight) not in read:
            values = weight._read(None)
            read[id(weight)] = weight, values, values._version
        return read[id(weight)][1]

    plain_args, plain_kwargs = pytree.tree_map_only(FloatWeight, values_of, (args, kwargs))
    result = func(*plain_args, **plain_kwargs)
    for weight, values, version in read.values():
        if values._version != version:
            raise _read_only(weight, func)

    def protected(part: Any) -> Any:
        source = next((w for w, values, _ in read.values() if torch._C._is_alias_of(part, values)), None)  # type: ignore[attr-defined]
        return part if source is None else _view(source, part)

    if type(result).__module__ == "numpy" and hasattr(result, "flags"):
        result.flags.writeable = False
    return pytree.tree_map_only(torch.Tensor, protected, result)


def _view(source: FloatWeight, values: torch.Tensor) -> FloatWeight:
    """Return values that are a view of a weight's, read-only."""
    return FloatWeight(lambda _: values, f"a view of {source._name}", values.shape, values.dtype, values.device)


def _detached(weight: FloatWeight) -> FloatWeight:
    """Return a weight as `.detach()` gives it; nn.Parameter(weight) would keep it."""
    twin = FloatWeight(weight._read, weight._name, weight.shape, weight.dtype, weight.device, weight._has_rows)
    twin._is_detached = True
    return twin


def _grad_asked(weight: FloatWeight, requires_grad: bool = True) -> FloatWeight:
    """Return the weight for requires_grad=False, a float copy of a detached one; else raise ReadOnlyError."""
    if weight._is_detached:  # nn.Parameter(weight) asks this, as do nn.Embedding.from_pretrained and others
        return _float_copy(weight, requires_grad)
    return _refuse_grad(weight) if requires_grad else weight


def _refuse_grad(weight: FloatWeight, requires_grad: bool = True) -> FloatWeight:
    """Return the weight for requires_grad=False, else raise ReadOnlyError."""
    if requires_grad:
        raise ReadOnlyError(
            f"{weight._name} is dequantized anew at each read, so that it does not train; "
            f"{_COPY}: nn.Parameter(weight.clone())"
        )
    return weight


def _float_copy(weight: FloatWeight, requires_grad: bool) -> FloatWeight:
    """Return the values in memory of their own, of this type until nn.Parameter, which insists on it, has marked it."""
    copied: Any = nn.Parameter(weight._read(None).clone(), requires_grad)
    copied.__class__ = FloatWeight  # not made as one: operators would be met by __torch_dispatch__
    copied._name, copied._has_rows, copied._device = f"a copy of {weight._name}", False, weight._device
    copied._read, copied._is_copy = lambda _: torch.ops.aten.alias.default(copied), True
    return copied  # type: ignore[no-any-return]


def _refuse_address(weight: FloatWeight) -> int:
    raise ReadOnlyError(
        f"{weight._name} has no memory of its own: it is dequantized at each read. Tied ones are the same object: "
        f"compare them by `is`; {_COPY}"
    )


def _read_only(weight: FloatWeight, func: Any) -> ReadOnlyError:
    name = getattr(func, "__name__", str(func))
    return ReadOnlyError(
        f"{name} writes to {weight._name}, which is dequantized anew at each read: nothing would be changed. "
        f"Change the float model and quantize it again; {_COPY}"
    )


def _is_leaf(weight: FloatWeight) -> bool:
    """Return True, as for every tensor without a gradient; raise ReadOnlyError if an optimizer asks."""
    asker = sys._getframe(2).f_globals.get("__name__", "")  # past __torch_function__
    if asker.startswith("torch.optim"):
        raise ReadOnlyError(
            f"an optimizer was given {weight._name}, which is dequantized anew at each read and does not train. Train "
            f"adapters beside the layer, or the float model, and quantize it again; {_COPY}: "
            "nn.Parameter(weight.clone())"
        )
    return True


_REFUSED: dict[Any, Callable[..., Any]] = {
    torch.Tensor.is_leaf.__get__: _is_leaf,  # type: ignore[attr-defined]
    torch.Tensor.requires_grad_: _grad_asked,
    torch.Tensor.requires_grad.__set__: _refuse_grad,  # type: ignore[attr-defined]
    torch.Tensor.data_ptr: _refuse_address,
}


def _write(name: str) -> Callable[..., Any]:
    def refuse(weight: FloatWeight, _: Any) -> None:
        raise ReadOnlyError(f"{weight._name} cannot be set ({name}): it is dequantized at each read; {_COPY}")

    return refuse


_REFUSED.update({getattr(torch.Tensor, name).__set__: _write(f".{name}") for name in ("data", "grad")})
