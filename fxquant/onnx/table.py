"""The translations of our operators, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxquant.onnx import attention, pools, products, recurrent, static, tables
from fxquant.onnx.graph import Model

TRANSLATIONS: dict[str, Callable[[Model, Any], Any]] = {
    function.__name__: function
    for function in (
        products.linear,
        attention.matmul,
        attention.attention,
        recurrent.lstm,
        recurrent.rnn,
        tables.embedding,
        tables.embedding_bag,
        static.quantize,
        static.dequantize,
        static.lookup,
        static.lookup_channels,
        static.add_values,
        static.mul_values,
        static.pad_value,
        static.static_linear,
        static.static_convolution,
        pools.mean_value,
        pools.pool_value,
        pools.adaptive_pool_value,
        pools.max_pool_value,
        pools.resize_value,
    )
}
"""(model, arguments by name, as values of the ONNX graph) -> the results."""
