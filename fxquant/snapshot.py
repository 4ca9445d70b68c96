"""What a compiled step of training reads of buffers that it goes on to change: ranges, and a BatchNorm's statistics.

For memory's sake torch.compile computes some of forward's values anew in backward. From a buffer that forward has
changed by then, it computes others, and gradients are wrong without a word (pytorch/pytorch#197039). What an operator
of ours gives is never computed anew, but kept.
"""

from __future__ import annotations

import torch


def snapshot(x: torch.Tensor) -> torch.Tensor:
    """Return x, without a gradient, for forward and backward alike."""
    kept: torch.Tensor = _snapshot(x.detach()) if torch.compiler.is_compiling() else x
    return kept


@torch.library.custom_op("fxquant_training::snapshot", mutates_args=())
def _snapshot(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


_snapshot.register_fake(torch.empty_like)
