"""The quantized operators, as functions: the one place that decides which implementation a call runs."""

from __future__ import annotations

import torch

from fxquant.ops.schema import SCHEMAS

OVERLOADS = {name: getattr(torch.ops.fxquant, name).default for name in SCHEMAS}
"""The registered operators: what graphs, torch.compile and torch.export hold."""

linear = OVERLOADS["linear"]
lstm = OVERLOADS["lstm"]
embedding = OVERLOADS["embedding"]
embedding_bag = OVERLOADS["embedding_bag"]

__all__ = ["OVERLOADS", "embedding", "embedding_bag", "linear", "lstm"]
