"""Embedding and EmbeddingBag in quantization-aware training: rows rounded as they are looked up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.nn.trained import Trained
from fxquant.qconfig import QConfig


class TrainedEmbedding(Trained, nn.Embedding):
    """An Embedding in quantization-aware training. Each row has a range of its own, so only what is read is rounded."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return the rounded rows that the indices name."""
        options = (self.padding_idx, None, 2.0, self.scale_grad_by_freq)
        if self.qconfig.weight.axis == "tensor":
            return F.embedding(input, self.weight_rounding(self.weight), *options)
        rows = F.embedding(input, self.weight, *options, self.sparse)
        if not rows.numel():
            return rows
        rounded: torch.Tensor = self.weight_rounding(rows.flatten(0, -2), input.flatten()).view(rows.shape)
        return rounded


class TrainedEmbeddingBag(Trained, nn.EmbeddingBag):
    """An EmbeddingBag in quantization-aware training."""

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return one vector for each bag of rounded rows."""
        table, words, padding = self._read(input)
        more = (None, 2.0, self.scale_grad_by_freq, self.mode, False, per_sample_weights, self.include_last_offset)
        return F.embedding_bag(words, table, offsets, *more, padding)

    def _read(self, input: torch.Tensor) -> tuple[Any, torch.Tensor, int | None]:
        """Return the rounded table, the indices into it, and which of them pads."""
        if self.qconfig.weight.axis == "tensor" or not input.numel() or torch.compiler.is_compiling():
            return self.weight_rounding(self.weight), input, self.padding_idx
        rows, places = torch.unique(input, return_inverse=True)
        table = self.weight_rounding(F.embedding(rows, self.weight, sparse=self.sparse), rows)
        padding = None if self.padding_idx is None else (rows == self.padding_idx).nonzero().flatten().tolist()
        return table, places.to(input.dtype), padding[0] if padding else None


def train_embedding(module: nn.Embedding, qconfig: QConfig) -> Trained:
    """Return the trained form of an Embedding."""
    return TrainedEmbedding.from_float(module, qconfig)


def train_embedding_bag(module: nn.EmbeddingBag, qconfig: QConfig) -> Trained:
    """Return the trained form of an EmbeddingBag."""
    return TrainedEmbeddingBag.from_float(module, qconfig)
