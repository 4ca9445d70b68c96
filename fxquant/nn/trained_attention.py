"""MultiheadAttention in quantization-aware training: its projections round; softmax(Q Kᵀ) V is float."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.learned import make_weight_rounding
from fxquant.nn.attention_calls import AttentionCalls
from fxquant.nn.trained import Rounds, Trained, token_rounding
from fxquant.nn.trained_product import train_product
from fxquant.qconfig import QConfig


class TrainedMultiheadAttention(AttentionCalls, Trained, nn.MultiheadAttention):  # type: ignore[misc]
    """A MultiheadAttention in quantization-aware training. weight_roundings: by the names of the packed weights."""

    added = ("weight_roundings", "input_rounding")

    def add_rounding(self) -> None:
        """Register what rounds."""
        names = ("in_proj_weight",) if self._qkv_same_embed_dim else ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        self.weight_roundings = nn.ModuleDict(
            {name: make_weight_rounding(self.qconfig, getattr(self, name)) for name in names}
        )
        self.input_rounding = token_rounding(self.qconfig)
        self._modules["out_proj"] = train_product(self.out_proj, self.qconfig)

    def rounds(self, module: Any) -> Iterator[Rounds]:
        """Yield what rounds each weight, and the weight; `out_proj` is another trained module."""
        for name, rounding in self.weight_roundings.items():
            yield rounding, getattr(module, name)

    def to_float(self) -> nn.Module:
        """Return the float module, with the parameters that it has now."""
        module = super().to_float()
        last: Any = self.out_proj
        module._modules["out_proj"] = last.to_float()
        return module

    def _linear(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        name = "in_proj_weight" if self._qkv_same_embed_dim else f"{'qkv'[first]}_proj_weight"
        weight, part = (
            self.weight_roundings[name](getattr(self, name)),
            slice(first * self.embed_dim, last * self.embed_dim),
        )
        bias = None if self.in_proj_bias is None else self.in_proj_bias[part]
        return F.linear(self.input_rounding(x), weight[part] if self._qkv_same_embed_dim else weight, bias)

    def _dropped(self, weights: torch.Tensor) -> torch.Tensor:
        return F.dropout(weights, self.dropout, self.training)

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal)


def train_attention(module: nn.MultiheadAttention, qconfig: QConfig) -> Trained:
    """Return the trained form of a MultiheadAttention."""
    return TrainedMultiheadAttention.from_float(module, qconfig)
