"""The quantized Embedding and EmbeddingBag: integer tables, float rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fxquant import ops
from fxquant.errors import ShapeError
from fxquant.nn.base import Quantize, QuantizedModule, quantize_alone
from fxquant.nn.stored import moved_dtype
from fxquant.ops.library import check_dense
from fxquant.qconfig import QConfig, default_dynamic_qconfig


class QuantizedTable(QuantizedModule):
    """What the two share: a table of integers, (V, D), or (V, ceil(D / 2)) for 4-bit rows. weight: the float table.

    dtype: of its output: the float table's dtype; .half(), .to(dtype) and the like change it.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor | None
    weight_zero_point: torch.Tensor | None

    def __init__(self, module: nn.Embedding | nn.EmbeddingBag, qconfig: QConfig, quantize: Quantize) -> None:
        super().__init__(qconfig)
        self.num_embeddings, self.embedding_dim = module.num_embeddings, module.embedding_dim
        self.padding_idx, self.dtype = module.padding_idx, module.weight.dtype
        for name in ("max_norm", "norm_type", "scale_grad_by_freq", "sparse"):  # of no effect here, but read by callers
            setattr(self, name, getattr(module, name))
        key = self.set_weight("weight", quantize(module.weight, qconfig), module.weight)
        self._tensors = (key, "weight_scale", "weight_zero_point")
        self._format = qconfig.weight.dtype  # found once, not at each call

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedTable:
        super()._apply(fn, recurse)
        self.dtype = moved_dtype(fn, self.dtype)
        return self

    def extra_repr(self) -> str:
        """Return what print shows: the sizes, the options and the scheme."""
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self.qconfig.weight}"


class QuantizedEmbedding(QuantizedTable):
    """An nn.Embedding whose table is int8 rows (or affine uint8, packed 4-bit, float16); made by `from_float`.

    input: any shape, int32 or int64 -> (*input.shape, D) of `dtype`.
    Raises DTypeError for other indices and IndexRangeError beyond the table. docs/numerics.md, "embedding".
    """

    def __init__(
        self, module: nn.Embedding, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> None:
        super().__init__(module, qconfig, quantize)

    @classmethod
    def from_float(
        cls, module: nn.Embedding, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> QuantizedEmbedding:
        """Return the quantized form of a float Embedding, which is left as it is."""
        return cls(module, qconfig, quantize)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rows that the indices name."""
        weight, scale, zero_point = self.own(self._tensors)
        return ops.embedding(input, weight, scale, zero_point, self.embedding_dim, self._format, self.dtype)


class QuantizedEmbeddingBag(QuantizedTable):
    """An nn.EmbeddingBag with a quantized table; called as nn.EmbeddingBag is; made by `from_float`."""

    def __init__(
        self, module: nn.EmbeddingBag, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> None:
        super().__init__(module, qconfig, quantize)
        self.mode, self.include_last_offset = module.mode, module.include_last_offset

    @classmethod
    def from_float(
        cls, module: nn.EmbeddingBag, qconfig: QConfig = default_dynamic_qconfig, quantize: Quantize = quantize_alone
    ) -> QuantizedEmbeddingBag:
        """Return the quantized form of a float EmbeddingBag, which is left as it is."""
        return cls(module, qconfig, quantize)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return one vector for each bag.

        input: (B, N), or (N,) with offsets (B,); per_sample_weights: like input, for mode "sum" -> (B, D) of
        `dtype`. Raises ShapeError, DTypeError or IndexRangeError for anything else.
        """
        for name, tensor in (("offsets", offsets), ("per_sample_weights", per_sample_weights)):
            if tensor is not None:
                check_dense(tensor, f"EmbeddingBag's {name}")
        if not isinstance(input, torch.Tensor) or input.dim() not in (1, 2) or (input.dim() == 1) == (offsets is None):
            check_dense(input, "EmbeddingBag")
            with_or_without = "with" if offsets is not None else "without"
            raise ShapeError(
                "a quantized EmbeddingBag takes 2-D input without offsets or 1-D input with offsets, "
                f"got {tuple(input.shape)} {with_or_without} offsets"
            )
        if per_sample_weights is not None and (self.mode != "sum" or per_sample_weights.shape != input.shape):
            raise ShapeError(
                f"per_sample_weights must have the input's shape {tuple(input.shape)} and mode 'sum', "
                f"got {tuple(per_sample_weights.shape)} and mode {self.mode!r}"
            )
        weight, scale, zero_point = self.own(self._tensors)
        return ops.embedding_bag(
            input,
            weight,
            scale,
            zero_point,
            self.embedding_dim,
            offsets,
            self.mode,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
            self._format,
            self.dtype,
        )

    def extra_repr(self) -> str:
        """Return what print shows: the sizes, the mode and the scheme."""
        return f"{super().extra_repr()}, mode={self.mode!r}"
