"""An operator as one dataclass, and the one place that decides where a call of it runs.

    compiled or exported          `torch.ops.fxquant`, which compilers hold, and which runs one of the last three later
    eager, plain CPU tensors      the native kernel at once: torch's dispatcher would cost more than a small product
    eager, plain CUDA tensors     Triton's kernels at once, where they serve the call (`gpu`)
    other strided CPU tensors     through the dispatcher, the native kernel on the operands that `Kernel.prepare` makes
    other strided CUDA tensors    through the dispatcher, Triton's kernels
    everything else               through the dispatcher, the plain-torch reference

An operator's signature is written twice: in its schema, for torch, and at its function of `fxquant.ops`, for callers.
What the operator is made of takes its arguments as one named tuple, which `arguments_of` makes from the latter.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch.compiler import is_compiling

from fxquant.errors import ModelStateError, warn
from fxquant.ops import compiled, gpu, library
from fxquant.ops.autocast import cast_dtype

P = ParamSpec("P")
R = TypeVar("R")

_LIBRARY = torch.library.Library("fxquant", "DEF")  # type: ignore[no-untyped-call]
_COPIED = (torch.float32, torch.int32, torch.int64)  # of the dtypes that the native library takes

OVERLOADS: dict[str, Callable[..., Any]] = {}
"""The registered operators: those that torch.compile and torch.export call."""


class Gradient(NamedTuple):
    """How gradients pass an operator.

    keep: (ctx, arguments, output), stores what the other needs. give: (ctx, the output's gradient, by name whether each
    argument needs one), returns the gradients by name.
    """

    keep: Callable[[Any, Any, Any], None]
    give: Callable[[Any, torch.Tensor, dict[str, bool]], dict[str, torch.Tensor | None]]


@dataclass(frozen=True)
class Kernel(Generic[R]):
    """An operator: its schema, reference, checks and gradient, and what the native library needs.

    schema: its arguments and results, as torch.library.define takes them; the native library's function of this name
    takes the same arguments. arguments: the type of the named tuple that the functions below take. reference: the
    operator in plain torch, the specification. check: raises an error for arguments that do not fit each other. fake:
    returns empty outputs. prepare: returns the arguments as the native library takes them (dense, float32), or None
    where the reference is to run. finish: (what the library returned, arguments), returns the outputs. gradient: None
    where a gradient that comes back is an error. is_cast: whether torch.autocast casts an eager call's output.
    at_once: (the native library's function, arguments), returns its result for operands as they lie, or None; not
    needed where that is the function's own. on_gpu: its Triton function; None: on a GPU it is the reference alone.
    floats: the arguments that are of other floats in a model of such, for which the library gets float32.
    """

    name: str
    schema: str
    arguments: Callable[..., Any]
    reference: Callable[[Any], R]
    check: Callable[[Any], object]
    fake: Callable[[Any], R]
    prepare: Callable[[Any], tuple[Any, ...] | None]
    finish: Callable[[Any, Any], R]
    gradient: Gradient | None = None
    is_cast: bool = False
    at_once: Callable[[Callable[..., Any], tuple[Any, ...]], R | None] | None = None
    on_gpu: gpu.OnGpu | None = None
    floats: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The arguments' names."""
        names: tuple[str, ...] = self.arguments._fields  # type: ignore[attr-defined]
        return names

    def takes(self, args: Sequence[Any]) -> bool:
        """Return whether the native library computes with a call's tensors: on the CPU, the first of them strided."""
        if not library.available() or args[0].layout is not torch.strided:
            return False
        return all(tensor.is_cpu for _, tensor in self._tensors(args))

    def _tensors(self, args: Sequence[Any]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in zip(self.names, args, strict=False):
            if isinstance(value, torch.Tensor):
                yield name, value
            elif isinstance(value, (list, tuple)):
                yield from ((name, part) for part in value if isinstance(part, torch.Tensor))

    def native(self) -> Callable[..., Any] | None:
        """Return the native library's function, None where there is none."""
        return library.function(self.name)

    def run_native(self, a: Any) -> R | None:
        """Return the native kernel's result for operands made dense, or None where the reference is to run."""
        native = self.native()
        prepared = self.prepare(a) if native is not None and self.takes(a) else None
        if native is None or prepared is None:
            return None
        out = native(False, *prepared)
        if out is None:
            self._refuse_freed(a)
            return None
        return self.finish(out, a)

    def run_triton(self, a: Any, tensors: list[torch.Tensor] | None = None) -> R | None:
        """Return the Triton kernels' result, or None where the reference is to run. tensors: those of `on_device`."""
        return gpu.run(self.on_gpu, a, self.on_device(a) if tensors is None else tensors)  # type: ignore[no-any-return]

    def takes_on_gpu(self, args: Sequence[Any]) -> bool:
        """Return whether Triton's kernels compute a call."""
        return gpu.device_for(self.on_gpu, self.arguments(*args), self.on_device(args)) is not None

    def on_device(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Return the tensors of a call that must be on the device that computes it, those in lists too."""
        host = self.on_gpu.host if self.on_gpu is not None else ()
        return [tensor for name, tensor in self._tensors(args) if name not in host]

    def run(self, *args: Any) -> R:
        """Run the native kernel, Triton's or the reference: the implementation of the registered operator."""
        return self._run(self.arguments(*args), None)

    def _run(self, a: Any, tensors: list[torch.Tensor] | None) -> R:
        """Run an operator. tensors: those of `on_device`, where they are known to be on a GPU."""
        self.check(a)
        try:
            out = self.run_native(a) if tensors is None else None
            out = self.run_triton(a, tensors) if out is None else out
            return self.run_reference(a) if out is None else out
        except Exception:
            self._refuse_freed(a)
            raise

    def run_reference(self, a: Any) -> R:
        """Return the reference's result; torch.autocast has no say in its products."""
        if not torch._C._is_any_autocast_enabled():
            return self.reference(a)
        with torch.autocast(a[0].device.type, enabled=False):
            return self.reference(a)

    def _refuse_freed(self, args: Sequence[Any]) -> None:
        """Raise ModelStateError where a tensor's memory was given back: untyped_storage().resize_(0)."""
        for i, (name, tensor) in enumerate(self._tensors(args)):
            if tensor.layout is torch.strided and tensor.numel() and not tensor.untyped_storage().nbytes():
                message = f"the {name if i else 'input'} of a quantized operator has no memory: its storage was freed"
                raise ModelStateError(message) from None

    def _run_fake(self, *args: Any, **kwargs: Any) -> R:
        a = self.arguments(*args, **kwargs)
        self.check(a)
        if library.available():
            compiled.teach_inductor(self.name, OVERLOADS[self.name], self.arguments)
        return self.fake(a)

    def dispatch(self, args: Sequence[Any]) -> R:
        """Call the registered operator; a gradient that it cannot hand on is a ModelStateError, and never lost.

        If only the first operand is not dense, the native library gets a dense copy of that; operands of other floats
        are cast to float32: a call through the dispatcher costs 50 us more, as much as many a product.
        """
        if is_compiling():
            return OVERLOADS[self.name](*args)  # type: ignore[no-any-return]
        first, native = args[0], self.native()
        library.check_dense(first, self.name.replace("_", " "))
        is_for_gpu = self.on_gpu is not None and isinstance(first, torch.Tensor) and (first.is_cuda or gpu.interprets())
        if is_for_gpu and not gpu.is_watched(tensors := self.on_device(args)):
            return self._run(self.arguments(*args), tensors)
        is_tensor = native is not None and isinstance(first, torch.Tensor)
        if is_tensor and first.dtype in _COPIED and not first.is_contiguous():
            copied: R | None = native(True, first.contiguous(), *args[1:])  # type: ignore[misc]
            if copied is not None:
                return copied
        if is_tensor and self.floats and first.is_cpu and not library.is_any_mode_active():
            a = self.arguments(*args)
            as_floats = {name: library.in_float32(getattr(a, name)) for name in self.floats}
            given = native(True, *a._replace(**as_floats))  # type: ignore[misc]
            if given is not None:
                return self.finish(given, a)
        if all(map(library.is_unwatched, args)) and not library.is_any_mode_active():
            return self.run(*args)
        out: R = OVERLOADS[self.name](*args)
        for part in (out if isinstance(out, tuple) else (out,)) if self.gradient is None else ():
            if isinstance(part, torch.Tensor) and part.requires_grad:
                part.register_hook(functools.partial(_refuse_gradient, self.name))  # type: ignore[no-untyped-call]
        return out

    def register(self) -> Callable[[tuple[Any, ...]], R]:
        """Register the operator with torch, and return what an eager call of it runs, with all its arguments."""
        overload = "per_token" if "per_token" in self.names else ""
        if overload:
            self._register_per_row()
        name = f"{self.name}.{overload}".rstrip(".")
        is_known = _define(self.name, overload, self.schema)
        torch.library.register_fake(f"fxquant::{name}", self._run_fake, lib=_LIBRARY)
        with _ignoring_warnings() if is_known else contextlib.nullcontext():  # of overriding
            for key in ("CompositeExplicitAutograd", "CPU")[: 1 + is_known]:
                _LIBRARY.impl(name, self.run, key)  # type: ignore[no-untyped-call]
        OVERLOADS[self.name] = getattr(getattr(torch.ops.fxquant, self.name), overload or "default")
        KERNELS[self.name] = self
        compiled.register(self.name, OVERLOADS[self.name], self.native(), self.at_once)
        if self.gradient is not None:
            self._register_gradient(f"fxquant::{name}", self.gradient)
        native, dispatch, is_cast = self.native(), self.dispatch, self.is_cast
        is_autocast = torch._C._is_any_autocast_enabled  # asked here: a call of cast_dtype costs 0.2 us

        def call(args: tuple[Any, ...]) -> R:
            out: Any = None if native is None or is_compiling() else native(True, *args)
            if out is None:
                out = dispatch(args)
            dtype = cast_dtype(args[0]) if is_cast and is_autocast() else None
            return out if dtype is None else out.to(dtype)  # type: ignore[no-any-return]

        return call

    def _register_per_row(self) -> None:
        """Register the overload in which per_token is per_row: for files of torch.export, which name arguments."""
        schema = self.schema.replace("per_token", "per_row")
        _define(self.name, "", schema)
        forward = functools.partial(_call_overload, self.name)
        _LIBRARY.impl(self.name, forward, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]

    def _register_gradient(self, name: str, gradient: Gradient) -> None:
        def keep(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            gradient.keep(ctx, self.arguments(*inputs), output)

        def give(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            needs = dict.fromkeys(self.names, False) | dict(zip(self.names, ctx.needs_input_grad, strict=False))
            gradients = gradient.give(ctx, grad, needs)
            return tuple(gradients.get(name) for name in self.names)

        torch.library.register_autograd(name, give, setup_context=keep, lib=_LIBRARY)


KERNELS: dict[str, Kernel[Any]] = {}
"""The operators by name."""


def arguments_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the named tuple of a function's arguments, but for what is there for an old name."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.KEYWORD_ONLY]
    defaults = [parameter.default for parameter in parameters if parameter.default is not parameter.empty]
    return namedtuple(function.__name__, [parameter.name for parameter in parameters], defaults=defaults)


PUBLIC: list[Callable[..., Any]] = []
"""The functions of `fxquant.ops` that graphs call."""


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function as one of `fxquant.ops`: graphs, pickles and reports name it by where it is found."""
    function.__module__ = "fxquant.ops"
    PUBLIC.append(function)
    return function


def per_token_of(per_row: bool) -> bool:
    """Return what the old name of per_token was given, with a DeprecationWarning."""
    warn("per_row of fxquant.ops is now per_token", category=DeprecationWarning)
    return per_row


@contextlib.contextmanager
def _ignoring_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _define(name: str, overload: str, schema: str) -> bool:
    """Define an operator; return whether a library without Python has done so, in a process that loaded it before."""
    known = torch._C._jit_get_schemas_for_operator(f"fxquant::{name}")
    if any(one.overload_name == overload for one in known):
        return True
    full = f"{name}.{overload}".rstrip(".") + schema
    _LIBRARY.define(full, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    return False


def _call_overload(name: str, *args: Any) -> Any:
    return OVERLOADS[name](*args)


def _refuse_gradient(name: str, _: torch.Tensor) -> None:
    raise ModelStateError(
        f"a gradient came back to torch.ops.fxquant.{name}, which has none: quantized linears, convolutions and "
        "attention hand gradients on to their inputs, recurrent layers and tables do not. Leave these float (a qconfig "
        "of None), or train the float model and quantize it afterwards; where only outputs are needed, call the "
        "quantized one under torch.no_grad()"
    )
