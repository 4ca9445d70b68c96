"""Float modules that stand for fused chains, and the quantized modules that convert_fx puts in."""

from fxquant.nn.attention import DynamicQuantizedMultiheadAttention
from fxquant.nn.base import QuantizedModule
from fxquant.nn.cells import DynamicQuantizedGRUCell, DynamicQuantizedLSTMCell, DynamicQuantizedRNNCell
from fxquant.nn.convolution import DynamicQuantizedConv, DynamicQuantizedConvReLU
from fxquant.nn.embedding import QuantizedEmbedding, QuantizedEmbeddingBag
from fxquant.nn.fused import ConvReLU1d, ConvReLU2d, ConvReLU3d, LinearReLU, linear_relu
from fxquant.nn.linear import DynamicQuantizedLinear, DynamicQuantizedLinearReLU
from fxquant.nn.recurrent import DynamicQuantizedGRU, DynamicQuantizedLSTM, DynamicQuantizedRNN

__all__ = [
    "ConvReLU1d",
    "ConvReLU2d",
    "ConvReLU3d",
    "DynamicQuantizedConv",
    "DynamicQuantizedConvReLU",
    "DynamicQuantizedGRU",
    "DynamicQuantizedGRUCell",
    "DynamicQuantizedLSTM",
    "DynamicQuantizedLSTMCell",
    "DynamicQuantizedLinear",
    "DynamicQuantizedLinearReLU",
    "DynamicQuantizedMultiheadAttention",
    "DynamicQuantizedRNN",
    "DynamicQuantizedRNNCell",
    "LinearReLU",
    "QuantizedEmbedding",
    "QuantizedEmbeddingBag",
    "QuantizedModule",
    "linear_relu",
]
