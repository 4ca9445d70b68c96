"""MultiheadAttention: int8 projections, the packed one too; softmax(Q Kᵀ) V stays float.

torch's TransformerEncoder, TransformerDecoder, their layers and Transformer need no operator: they are traced through,
and their attention and linears are candidates like any others.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fxquant.nn import DynamicQuantizedMultiheadAttention
from fxquant.nn.trained_attention import train_attention
from fxquant.operators.base import PRODUCTS, Operator, refuse_parameters


def _refuse(module: nn.MultiheadAttention) -> str | None:
    last = module.out_proj
    if type(last) not in (NonDynamicallyQuantizableLinear, nn.Linear):
        return f"its out_proj is a {type(last).__name__}"
    names = ("in_proj_weight",) if module._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
    if "weight" not in last._parameters or any(name not in module._parameters for name in names):
        return "its weights are recomputed at each call (weight_norm, pruning or the like); remove that first"
    reason = refuse_parameters(last)
    return refuse_parameters(module) or (reason and f"out_proj: {reason}")


ATTENTION = Operator(
    name="attention",
    summary=(
        "nn.MultiheadAttention: its four projections, with any masks and options; softmax(Q Kᵀ) V stays float. "
        "nn.Transformer, its encoder, decoder and their layers are traced through to this and to linear"
    ),
    modules=(nn.MultiheadAttention,),
    schemes=PRODUCTS,
    convert_module=DynamicQuantizedMultiheadAttention.from_float,
    refuse_module=_refuse,
    train_module=train_attention,
)
