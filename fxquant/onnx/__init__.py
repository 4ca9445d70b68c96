"""Quantized models as ONNX files: `fxquant.to_onnx`. The packages onnx and onnxscript are imported when it is called.

Each operator of ours has a translation into standard ONNX operators, in `products`, `attention`, `recurrent`, `tables`,
`static` and `pools`; `table` lists them, and what has no ONNX form.
"""

from fxquant.onnx.export import to_onnx

__all__ = ["to_onnx"]
