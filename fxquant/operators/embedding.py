"""Embedding, EmbeddingBag, F.embedding and F.embedding_bag: integer tables; there is no activation to quantize."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.nn import QuantizedEmbedding, QuantizedEmbeddingBag
from fxquant.nn.trained_tables import train_embedding, train_embedding_bag
from fxquant.operators.base import (
    TABLES,
    Call,
    NewCall,
    Operator,
    refuse_parameters,
)

_MAX_NORM = "max_norm rescales its float rows at each call"


def _refuse_module(module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if module.max_norm is not None:
        return _MAX_NORM
    if "weight" not in module._parameters:
        return "its weight is recomputed at each call (a parametrization or hook); remove that first"
    return refuse_parameters(module, sums=False)


def _refuse_call(operands: dict[str, Any]) -> str | None:
    return _MAX_NORM if operands.get("max_norm") is not None else None


def _table(call: Call) -> dict[str, Any]:
    """Return the operands that both functions share."""
    return {
        "indices": call.operands["input"],
        "weight": call.operands["weight"],
        "scale": call.operands["weight_scale"],
        "zero_point": call.operands["weight_zero_point"],
        "embedding_dim": call.weights["weight"].shape[1],
        "format": call.qconfig.weight.dtype,
        "dtype": call.weights["weight"].dtype,
    }


def _convert_embedding(call: Call) -> NewCall:
    return NewCall(ops.embedding, _table(call))


def _convert_bag(call: Call) -> NewCall:
    same = ("offsets", "mode", "per_sample_weights", "include_last_offset", "padding_idx")
    options = {name: call.operands[name] for name in same if name in call.operands}
    return NewCall(ops.embedding_bag, {**_table(call), **options})


EMBEDDING = Operator(
    name="embedding",
    summary="rows of a table, by index",
    modules=(nn.Embedding,),
    functions=(F.embedding,),
    operands=("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    weights=("weight",),
    schemes=TABLES,
    convert_module=QuantizedEmbedding.from_float,
    train_module=train_embedding,
    convert_function=_convert_embedding,
    refuse_module=_refuse_module,
    refuse_call=_refuse_call,
)

EMBEDDING_BAG = Operator(
    name="embedding_bag",
    summary="sums, means or maxima of a table's rows, a bag at a time",
    modules=(nn.EmbeddingBag,),
    functions=(F.embedding_bag,),
    operands=(
        "input",
        "weight",
        "offsets",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "mode",
        "sparse",
        "per_sample_weights",
        "include_last_offset",
        "padding_idx",
    ),
    weights=("weight",),
    schemes=TABLES,
    convert_module=QuantizedEmbeddingBag.from_float,
    train_module=train_embedding_bag,
    convert_function=_convert_bag,
    refuse_module=_refuse_module,
    refuse_call=_refuse_call,
)
