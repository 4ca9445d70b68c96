"""to_onnx: a quantized model as a file of standard ONNX operators, through torch.export and torch.onnx.export."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.rnn import PackedSequence

from fxquant.errors import ArgumentError, ExportError, MissingPackageError
from fxquant.nn.recurrent import DynamicQuantizedRecurrent
from fxquant.onnx.ranges import Range, measure
from fxquant.onnx.refusals import PACKED, Refusal, find_refusal
from fxquant.ops import KERNELS, OVERLOADS

_PACKAGES = ("onnx", "onnxscript")


def to_onnx(
    quantized: nn.Module,
    example_inputs: Sequence[Any],
    path: str | os.PathLike[str],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    data: Iterable[Sequence[Any]] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> None:
    """Write a quantized model to an ONNX file of standard operators (opset 21), with integer weights as they are.

    quantized: what convert_fx or quantize_dynamic returned, in eval mode. example_inputs, example_kwargs: arguments of
    a call. dynamic_shapes: which sizes may change, as torch.export.export takes it; others are those of the example.
    Dynamic sites become quantization written out and MatMulInteger; static ones DequantizeLinear, a float operator and
    QuantizeLinear, which runtimes fuse; LSTMs and GRUs become Scan. docs/onnx.md says how far results agree.

    data: inputs like those that a static model was calibrated with, for models with residual connections. fxquant adds
    to a product before it is rounded, ONNX after: the range for that is measured on the data, or else so wide that
    nothing is clipped, which costs accuracy.

    Raises MissingPackageError without onnx and onnxscript (pip install "fxquant[onnx]"), and ExportError, which names
    the site, for what ONNX cannot express.
    """
    _check_call(quantized)
    kwargs = dict(example_kwargs or {})
    _check_sequences(quantized, tuple(example_inputs), kwargs)
    program = torch.export.export(quantized, tuple(example_inputs), kwargs, dynamic_shapes=dynamic_shapes, strict=False)
    _check(program.graph)
    ranges = [] if data is None else measure(program, data)
    _write(program, path, ranges, input_names, output_names)


def _check_call(quantized: Any) -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackageError(f'to_onnx needs {" and ".join(missing)}: pip install "fxquant[onnx]"')
    if not isinstance(quantized, nn.Module):
        raise ArgumentError(f"to_onnx takes a quantized nn.Module, got {type(quantized).__name__}")


def _check_sequences(quantized: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ExportError for a layer that is called with a packed sequence, which torch.export cannot follow either."""

    def refuse(path: str, _: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], PackedSequence):
            raise _error(repr(path), PACKED)

    layers = {path: part for path, part in quantized.named_modules() if isinstance(part, DynamicQuantizedRecurrent)}
    hooks = [part.register_forward_pre_hook(functools.partial(refuse, path)) for path, part in layers.items()]
    try:
        with torch.no_grad():
            if hooks:
                quantized(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()


def _error(site: str, refusal: Refusal) -> ExportError:
    return ExportError(f"{site} is {refusal.what}, which ONNX cannot express: {refusal.why}; {refusal.cure}")


def _check(graph: fx.Graph) -> None:
    """Raise ExportError for the first call that has no ONNX form."""
    names = {overload: name for name, overload in OVERLOADS.items()}
    for node in graph.nodes:
        name = names.get(node.target) if node.op == "call_function" else None
        if name is None:
            continue
        refusal = find_refusal(name, KERNELS[name].arguments(*node.args, **node.kwargs))
        if refusal is not None:
            raise _error(_site(node), refusal)


def _site(node: fx.Node) -> str:
    """Return where a node of an exported graph comes from."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = stack[-1][0] if stack else ""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    place = f"{path!r}" if path else f"the call {node.name!r}"
    at = next((line for line in reversed(lines) if line.startswith("File ") and "fxquant" not in line), "")
    return f"{place} ({at})" if at and not path else place


def _write(
    program: torch.export.ExportedProgram,
    path: str | os.PathLike[str],
    ranges: Sequence[Range],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> None:
    from fxquant.onnx.graph import OPSET, Model, simplify
    from fxquant.onnx.table import TRANSLATIONS

    model = Model(_tensors(program), ranges)
    table = {OVERLOADS[name]: _translator(model, name, translate) for name, translate in TRANSLATIONS.items()}
    with _quiet():
        exported = torch.onnx.export(
            program,
            custom_translation_table=table,
            opset_version=OPSET,
            input_names=input_names,
            output_names=output_names,
            optimize=False,
            verbose=False,
        )
        assert exported is not None
        exported.model = simplify(exported.model)
        exported.save(os.fspath(path))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what torch's exporter says about itself: packages that it could use, and its own deprecated calls."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="copyreg|torch")
            yield
    finally:
        logger.setLevel(level)


def _tensors(program: torch.export.ExportedProgram) -> dict[str, torch.Tensor]:
    """Return a program's stored tensors by the names of their nodes."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    stored: dict[str, Any] = {**program.constants, **program.state_dict}
    return {node: stored[name] for node, name in names.items()}


def _translator(model: Any, name: str, translate: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        return translate(model, KERNELS[name].arguments(*args, **kwargs))

    return run
