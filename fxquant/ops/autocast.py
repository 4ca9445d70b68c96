"""The dtype that a quantized layer gives under torch.autocast: what the float layer would give there."""

from __future__ import annotations

import torch


def cast_dtype(x: torch.Tensor, promotes: bool = False) -> torch.dtype | None:
    """Return the dtype of a float layer's output under the autocast in force; None where that is x's own.

    x: the layer's input; torch casts no float64. promotes: whether the layer joins its products with a state of x's
    dtype: torch's GRU and its LSTM and GRU cells on the CPU.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, torch.Tensor):  # torch.fx's stand-ins are none
        return None
    kind = "cpu" if x.is_cpu else x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    dtype: torch.dtype = torch.get_autocast_dtype(kind)
    return torch.promote_types(dtype, x.dtype) if promotes and kind == "cpu" else dtype
