"""Dynamic quantization of PyTorch models on the FX graph: a quarter of the memory, the same answers."""

from fxquant._version import __version__
from fxquant.checkpoint import load, save
from fxquant.debug import explain, graph_diff
from fxquant.eager import quantize_dynamic
from fxquant.errors import (
    ArgumentError,
    AttributeNameError,
    CheckpointError,
    DTypeError,
    ExampleInputsError,
    FxQuantError,
    IndexRangeError,
    MappingNameError,
    ModelStateError,
    QConfigError,
    ShapeError,
    TraceError,
)
from fxquant.observers import MinMaxObserver, Observer, PerChannelMinMaxObserver
from fxquant.operators import OPERATORS, Operator
from fxquant.ops import KernelInfo, kernel_info
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    per_channel_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
)
from fxquant.qconfig_mapping import QConfigMapping, default_dynamic_qconfig_mapping
from fxquant.quantize_fx import convert_fx, fuse_fx, prepare_fx
from fxquant.spec import TensorSpec

__all__ = [
    "OPERATORS",
    "ArgumentError",
    "AttributeNameError",
    "CheckpointError",
    "DTypeError",
    "ExampleInputsError",
    "FxQuantError",
    "IndexRangeError",
    "KernelInfo",
    "MappingNameError",
    "MinMaxObserver",
    "ModelStateError",
    "Observer",
    "Operator",
    "PerChannelMinMaxObserver",
    "QConfig",
    "QConfigError",
    "QConfigMapping",
    "ShapeError",
    "TensorSpec",
    "TraceError",
    "__version__",
    "convert_fx",
    "default_dynamic_qconfig",
    "default_dynamic_qconfig_mapping",
    "explain",
    "float16_dynamic_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "fuse_fx",
    "graph_diff",
    "kernel_info",
    "load",
    "per_channel_dynamic_qconfig",
    "per_tensor_dynamic_qconfig",
    "prepare_fx",
    "quantize_dynamic",
    "save",
]
