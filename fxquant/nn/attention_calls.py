"""How an nn.MultiheadAttention is called: its checks and masks, and the float products between its projections."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant import ops
from fxquant.errors import ShapeError
from fxquant.nn.transformer import additive_mask
from fxquant.ops.library import check_dense

_NAME = "a quantized MultiheadAttention"


def _check_shape(name: str, mask: torch.Tensor, *wanted: tuple[int, ...]) -> None:
    check_dense(mask, f"MultiheadAttention's {name}")
    if tuple(mask.shape) not in wanted:
        raise ShapeError(f"{_NAME} takes {name} of shape {' or '.join(map(str, wanted))}, got {tuple(mask.shape)}")


class AttentionCalls:
    """The calls of a MultiheadAttention, for a class whose `_linear` projects and whose out_proj joins the heads.

    batch_invariant: as prepare_fx takes it: how softmax(Q Kᵀ) V is computed.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    batch_first: bool
    add_zero_attn: bool
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    out_proj: Any
    _qkv_same_embed_dim: bool
    batch_invariant: bool | None = None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return (output, weights); the weights are None unless asked for.

        query: (L, B, E), with batch_first (B, L, E), without a batch (L, E); key, value: the same forms of (S, B, kdim)
        and (S, B, vdim) -> output in query's form and dtype, weights (B, L, S), or (B, H, L, S) if not averaged over
        the H heads. attn_mask: (L, S) or (B·H, L, S); key_padding_mask: (B, S); True or -inf masks a key, another float
        is added to its score. is_causal: says that attn_mask, which must be given, is the causal one. As in torch, it
        replaces the mask unless there is padding or weights are asked for; keys that add_bias_kv and add_zero_attn add
        then count as the last ones. Raises ShapeError or DTypeError for anything else.
        """
        if is_causal and attn_mask is None:
            raise ShapeError(
                f"{_NAME} got is_causal=True, a hint on attn_mask, without one; pass "
                "nn.Transformer.generate_square_subsequent_mask(L)"
            )
        self._check_rows(query, key, value)
        is_batched = query.dim() == 3
        q, k, v = map(self._split_heads, self._project(query, key, value))
        mask = self._join_masks(q, k.shape[2], attn_mask, key_padding_mask, is_batched)
        is_hinted = is_causal and key_padding_mask is None and not need_weights
        k, v = self._extend(k, self.bias_k), self._extend(v, self.bias_v)
        if mask is not None:
            mask = None if is_hinted else F.pad(mask, (0, k.shape[2] - mask.shape[-1]))
        if not need_weights:
            attended = self._attend(q, k, v, mask, is_hinted)
            return self.out_proj(self._join_heads(attended, is_batched)), None
        scores = self._multiply(q * math.sqrt(1 / q.shape[-1]), k.transpose(-2, -1))
        weights = (scores if mask is None else scores + mask).softmax(-1)
        weights = self._dropped(weights)
        output = self.out_proj(self._join_heads(self._multiply(weights, v), is_batched))
        weights = weights.mean(1) if average_attn_weights else weights
        return output, weights if is_batched else weights.squeeze(0)

    def _linear(self, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """Return x projected as query (0), key (1), value (2): those from first to before last, side by side."""
        raise NotImplementedError

    def _dropped(self, weights: torch.Tensor) -> torch.Tensor:
        """Return softmax's weights after dropout, if there is any."""
        return weights

    def _multiply(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b if self.batch_invariant is False else ops.matmul(a, b, self.batch_invariant is True)

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, is_causal: bool
    ) -> torch.Tensor:
        if self.batch_invariant is False:
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal)
        return ops.attention(q, k, v, mask, is_causal, None, self.batch_invariant is True)

    def _check_rows(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Raise ShapeError unless query, key and value fit each other."""
        for x in (query, key, value):
            if not isinstance(x, torch.Tensor):
                check_dense(x, "MultiheadAttention")
        shapes = [tuple(x.shape) if not x.is_nested else "nested" for x in (query, key, value)]
        got = f"got query, key, value of {shapes[0]}, {shapes[1]}, {shapes[2]}"
        if query.is_nested or key.is_nested or value.is_nested:
            raise ShapeError(f"{_NAME} takes plain tensors, {got}; pad them and pass a key_padding_mask")
        if not query.dim() == key.dim() == value.dim() or query.dim() not in (2, 3):
            raise ShapeError(f"{_NAME} takes 3-D query, key and value, or 2-D ones without a batch, {got}")
        batch = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (query.dim() == 3 and query.shape[batch] != key.shape[batch]):
            raise ShapeError(f"{_NAME} takes one batch size, and as many values as keys, {got}")

    def _project(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the projected query, key and value; the same tensor is quantized and projected at once."""
        if not self._qkv_same_embed_dim or key is not value:
            return tuple(self._linear(x, i, i + 1) for i, x in enumerate((query, key, value)))
        if query is not key:
            return (self._linear(query, 0, 1), *self._linear(key, 1, 3).chunk(2, -1))
        return self._linear(query, 0, 3).chunk(3, -1)

    def _split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Return projected rows as (B, H, T, E / H)."""
        x = x.reshape(*x.shape[:-1], self.num_heads, self.head_dim)
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _join_heads(self, x: torch.Tensor, is_batched: bool) -> torch.Tensor:
        """Return (B, H, T, E / H) in the form that the query had."""
        if not is_batched:
            return x.squeeze(0).transpose(0, 1).flatten(1)
        return (x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)).flatten(2)

    def _join_masks(
        self,
        q: torch.Tensor,
        keys: int,
        attn_mask: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        is_batched: bool,
    ) -> torch.Tensor | None:
        """Return what is added to the scores, in a form that broadcasts to (B, H, L, S), or raise ShapeError."""
        batch, heads, length = q.shape[:3]
        mask = None
        if attn_mask is not None:
            _check_shape("attn_mask", attn_mask, (length, keys), (batch * heads, length, keys))
            mask = additive_mask(attn_mask, q)
            mask = mask.reshape(batch, heads, length, keys) if mask.dim() == 3 else mask
        if key_padding_mask is not None:
            _check_shape("key_padding_mask", key_padding_mask, (batch, keys) if is_batched else (keys,))
            padding = additive_mask(key_padding_mask, q).reshape(batch, 1, 1, keys)
            mask = padding if mask is None else mask + padding
        return mask

    def _extend(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return keys or values, (B, H, S, E / H), with the learned row and the row of zeros, if there are any."""
        batch = x.shape[0]
        if bias is not None:
            x = torch.cat((x, self._split_heads(bias[0].to(x.dtype)).expand(batch, -1, -1, -1)), 2)
        return F.pad(x, (0, 0, 0, 1)) if self.add_zero_attn else x
