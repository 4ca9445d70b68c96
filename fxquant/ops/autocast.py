"""The dtype of a quantized layer's output under torch.autocast: that of the float layer."""

from __future__ import annotations

import torch


def cast_dtype(x: torch.Tensor, promotes: bool = False) -> torch.dtype | None:
    """Return the dtype of a float layer's output under the autocast in force; None where that is x's own.

    x: the layer's input; torch never casts float64. promotes: whether the layer joins its products with a state of x's
    dtype: torch's GRU and its LSTM and GRU cells on the CPU.
    """
    if not torch._C._is_any_autocast_enabled() or not isinstance(x, torch.Tensor):  # torch.fx's proxies are not tensors
        return None
    device_type = "cpu" if x.is_cpu else x.device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type) or x.dtype == torch.float64:
        return None
    dtype: torch.dtype = torch.get_autocast_dtype(device_type)
    return torch.promote_types(dtype, x.dtype) if promotes and device_type == "cpu" else dtype
