"""The output dtype of a quantized model's tables: it follows .half(), .to(dtype) and the like, and is saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from fxquant import ops
from fxquant.nn.embedding import QuantizedTable
from fxquant.nn.stored import moved_dtype

OURS = (ops.linear, ops.embedding, ops.embedding_bag)
"""What the functional calls of a quantized graph are."""


def follow(module: fx.GraphModule, move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change the output dtype of a graph's calls of tables as a move changes tensors of that dtype."""
    before: dict[fx.Node, Any] = {node: node.kwargs["dtype"] for node in _calls(module)}
    moved = {node: moved_dtype(move, dtype) for node, dtype in before.items()}
    if moved != before:
        _set(module, moved)


def table_dtypes(model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the output dtypes of a model's tables: modules by their paths, calls of its graph by their names."""
    modules = {path: module.dtype for path, module in model.named_modules() if isinstance(module, QuantizedTable)}
    calls = {node.name: node.kwargs["dtype"] for node in _calls(model)}
    return {
        holder: {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
        for holder, dtypes in (("modules", modules), ("calls", calls))
    }


def set_table_dtypes(model: nn.Module, dtypes: Mapping[str, Mapping[str, str]]) -> None:
    """Set the output dtypes that `table_dtypes` returned. LookupError, AttributeError for another model's."""
    for path, name in dtypes.get("modules", {}).items():
        table: Any = model.get_submodule(path)
        table.dtype = getattr(torch, name)
    nodes, calls = {node.name: node for node in _calls(model)}, dtypes.get("calls", {})
    if calls:
        _set(model, {nodes[call]: getattr(torch, name) for call, name in calls.items()})


def _calls(model: nn.Module) -> Iterator[fx.Node]:
    """Yield the calls of tables in a model's graph, if it is one."""
    for node in model.graph.nodes if isinstance(model, fx.GraphModule) else ():
        if node.op == "call_function" and node.target in OURS and "dtype" in node.kwargs:
            yield node


def _set(module: Any, dtypes: Mapping[fx.Node, torch.dtype]) -> None:
    for node, dtype in dtypes.items():
        node.update_kwarg("dtype", dtype)
    module.recompile()
