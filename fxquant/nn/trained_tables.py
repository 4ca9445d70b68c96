"""Embedding and EmbeddingBag in quantization-aware training: rows rounded as they are looked up."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxquant.errors import QConfigError
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
        rounded: torch.Tensor = self.weight_rounding(rows.flatten(0, -2)).view(rows.shape) if rows.numel() else rows
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
        table: Any = self.weight_rounding(self.weight)
        more = (None, 2.0, self.scale_grad_by_freq, self.mode, False, per_sample_weights, self.include_last_offset)
        return F.embedding_bag(input, table, offsets, *more, self.padding_idx)


def _refuse_learned(qconfig: QConfig) -> None:
    if qconfig.is_learned and qconfig.weight.range is not None:
        raise QConfigError("a table has a range for each row: range=Learned() is for the weights of products")


def train_embedding(module: nn.Embedding, qconfig: QConfig) -> Trained:
    """Return the trained form of an Embedding."""
    _refuse_learned(qconfig)
    return TrainedEmbedding.from_float(module, qconfig)


def train_embedding_bag(module: nn.EmbeddingBag, qconfig: QConfig) -> Trained:
    """Return the trained form of an EmbeddingBag."""
    _refuse_learned(qconfig)
    return TrainedEmbeddingBag.from_float(module, qconfig)
