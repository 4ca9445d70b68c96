"""The dynamically quantized MultiheadAttention: its projections are int8, softmax(Q Kᵀ) V stays float."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxquant import ops
from fxquant.nn.attention_calls import AttentionCalls
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.nn.linear import DynamicQuantizedLinear
from fxquant.qconfig import QConfig, default_dynamic_qconfig

_PACKED, _SEPARATE = ("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight")


class DynamicQuantizedMultiheadAttention(AttentionCalls, QuantizedModule):
    """An nn.MultiheadAttention with projections of int8 or another format, called as that is; made by `from_float`.

    in_proj_weight_int8: (3·E, E), or where key or value have sizes of their own q_proj_weight_int8 (E, E),
    k_proj_weight_int8 (E, kdim) and v_proj_weight_int8 (E, vdim), each with its `_scale` and, without `_int8`, the
    float weight; in_proj_bias: (3·E,) or None; bias_k, bias_v:
    (1, 1, E) or None; the weights that it lacks are None, as in torch;
    out_proj: a DynamicQuantizedLinear. Dropout is for training only and has no part here.

    Each token of query, key and value is quantized by itself, and so is each that out_proj takes. What lies between,
    softmax(Q Kᵀ) V, is float, in a fixed order of sums. docs/numerics.md, "attention".
    """

    in_proj_bias: nn.Parameter | None

    def __init__(
        self,
        module: nn.MultiheadAttention,
        qconfig: QConfig = default_dynamic_qconfig,
        quantize: Quantize = quantize_alone,
    ) -> None:
        super().__init__(qconfig)
        self.embed_dim, self.kdim, self.vdim = module.embed_dim, module.kdim, module.vdim
        self.num_heads, self.head_dim = module.num_heads, module.head_dim
        self.batch_first, self.add_zero_attn = module.batch_first, module.add_zero_attn
        self.dropout = module.dropout
        self._qkv_same_embed_dim = module._qkv_same_embed_dim  # torch's TransformerEncoderLayer asks for it
        self._keys: dict[str, tuple[str, str, str]] = {}
        for name in _PACKED if self._qkv_same_embed_dim else _SEPARATE:
            weight = getattr(module, name)
            key = self.set_weight(name, quantize(weight, qconfig), weight)
            self._keys[name] = key, f"{name}_scale", "in_proj_bias"
        for name in ("in_proj_bias", "bias_k", "bias_v"):
            self.set_bias(name, getattr(module, name))
        self.out_proj = DynamicQuantizedLinear.from_float(module.out_proj, qconfig, quantize)

    def __getattr__(self, name: str) -> Any:
        if name in _PACKED + _SEPARATE and name not in self.__dict__.get("_stored", {name}):
            return None
        return super().__getattr__(name)

    @classmethod
    def from_float(
        cls,
        module: nn.MultiheadAttention,
        qconfig: QConfig = default_dynamic_qconfig,
        quantize: Quantize = quantize_alone,
    ) -> DynamicQuantizedMultiheadAttention:
        """Return the quantized form of a float MultiheadAttention, which is left as it is."""
        return cls(module, qconfig, quantize)

    def _linear(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return x projected as query (0), key (1), value (2): those from first to before last, side by side."""
        name = "in_proj_weight" if self._qkv_same_embed_dim else f"{'qkv'[first]}_proj_weight"
        weight, scale, bias = self.own(self._keys[name])
        if last - first < 3:
            part = slice(first * self.embed_dim, last * self.embed_dim)
            if self._qkv_same_embed_dim:
                weight, scale = weight[part], None if scale is None else scale[part]
            bias = None if bias is None else bias[part]
        columns = self.embed_dim if self._qkv_same_embed_dim else (self.embed_dim, self.kdim, self.vdim)[first]
        how = (self.qconfig.per_token, self.qconfig.qmax, *self.qconfig.layout(columns))
        return ops.linear(x, weight, scale, bias, False, *how)

    def extra_repr(self) -> str:
        """Return what print shows: the sizes, the options that differ from the defaults, and the scheme."""
        sizes = [str(self.embed_dim), str(self.num_heads)]
        if not self._qkv_same_embed_dim:
            sizes += [f"kdim={self.kdim}", f"vdim={self.vdim}"]
        options = [f"{name}=True" for name in ("batch_first", "add_zero_attn") if getattr(self, name)]
        return ", ".join([*sizes, *options, str(self.qconfig)])
