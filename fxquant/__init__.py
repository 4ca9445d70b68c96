"""Dynamic and static quantization of PyTorch models on the FX graph: int8 weights in a quarter of the memory.

prepare_fx and convert_fx quantize a model; prepare_qat_fx lets it train with the rounding in; quantize_dynamic
quantizes one without tracing it. explain and graph_diff show what changed, compare, profile and sensitivity measure it,
suggest_mapping finds a mapping within an error budget, and save and load store the result.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

from fxquant._version import __version__
from fxquant.backends import get_default_qat_qconfig, get_default_qconfig
from fxquant.balance import equalize_fx, smooth_fx
from fxquant.checkpoint import load, save
from fxquant.debug import compare, explain, graph_diff, profile, sensitivity
from fxquant.eager import quantize_dynamic
from fxquant.errors import (
    ArgumentError,
    AttributeNameError,
    CalibrationError,
    CheckError,
    CheckpointError,
    ColumnError,
    DivergedError,
    DTypeError,
    ExampleInputsError,
    ExportError,
    FixedAttributeError,
    FxQuantError,
    IndexRangeError,
    MappingNameError,
    MissingPackageError,
    ModelStateError,
    MovedImportError,
    MovedNameError,
    QConfigError,
    ReadOnlyError,
    ShapeError,
    TorchAoError,
    TraceError,
)
from fxquant.fake_quantize import FakeQuantize
from fxquant.nn.modes import freeze_bn_stats, update_bn_stats
from fxquant.nn.stubs import DeQuantStub, FloatFunctional, QuantStub, QuantWrapper
from fxquant.observer_names import (
    FixedQParamsObserver,
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
    default_histogram_observer,
    default_observer,
    default_per_channel_weight_observer,
    default_weight_observer,
)
from fxquant.observers import (
    GroupMinMaxObserver,
    LeastErrorObserver,
    MinMaxObserver,
    Observer,
    PerChannelMinMaxObserver,
)
from fxquant.onnx import to_onnx
from fxquant.operators import OPERATORS, Operator
from fxquant.ops import KernelInfo, kernel_info
from fxquant.qat import prepare_qat_fx
from fxquant.qconfig import (
    QConfig,
    default_dynamic_qconfig,
    default_qat_qconfig,
    default_qconfig,
    default_static_qconfig,
    float16_dynamic_qconfig,
    float_qparams_weight_only_qconfig,
    float_qparams_weight_only_qconfig_4bit,
    int3_dynamic_qconfig,
    int4_dynamic_qconfig,
    int16_dynamic_qconfig,
    per_channel_dynamic_qconfig,
    per_tensor_dynamic_qconfig,
    uint4_weight_only_qconfig,
)
from fxquant.qconfig_mapping import (
    QConfigMapping,
    default_dynamic_qconfig_mapping,
    default_qat_qconfig_mapping,
    default_static_qconfig_mapping,
    get_default_qat_qconfig_mapping,
    get_default_qconfig_mapping,
)
from fxquant.quantize_fx import convert_fx, fuse_fx, prepare_fx
from fxquant.rounding import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer
from fxquant.spec import TensorSpec
from fxquant.torch_ao.names import MOVED as _MOVED
from fxquant.tuning import suggest_mapping

if TYPE_CHECKING:
    from fxquant.torch_ao.load import from_torch_ao, load_torch_ao

__all__ = [
    "OPERATORS",
    "ArgumentError",
    "AttributeNameError",
    "CalibrationError",
    "CheckError",
    "CheckpointError",
    "ColumnError",
    "DTypeError",
    "DeQuantStub",
    "DivergedError",
    "ExampleInputsError",
    "ExportError",
    "FakeQuantize",
    "FixedAttributeError",
    "FixedQParamsObserver",
    "FloatFunctional",
    "FxQuantError",
    "GroupMinMaxObserver",
    "HistogramObserver",
    "IndexRangeError",
    "KernelInfo",
    "LeastErrorObserver",
    "MappingNameError",
    "MinMaxObserver",
    "MissingPackageError",
    "ModelStateError",
    "MovedImportError",
    "MovedNameError",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "Observer",
    "Operator",
    "PerChannelMinMaxObserver",
    "QConfig",
    "QConfigError",
    "QConfigMapping",
    "QuantStub",
    "QuantWrapper",
    "ReadOnlyError",
    "ShapeError",
    "TensorSpec",
    "TorchAoError",
    "TraceError",
    "__version__",
    "compare",
    "convert_fx",
    "default_dynamic_qconfig",
    "default_dynamic_qconfig_mapping",
    "default_fixed_qparams_range_0to1_observer",
    "default_fixed_qparams_range_neg1to1_observer",
    "default_histogram_observer",
    "default_observer",
    "default_per_channel_weight_observer",
    "default_qat_qconfig",
    "default_qat_qconfig_mapping",
    "default_qconfig",
    "default_static_qconfig",
    "default_static_qconfig_mapping",
    "default_weight_observer",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "equalize_fx",
    "explain",
    "float16_dynamic_qconfig",
    "float_qparams_weight_only_qconfig",
    "float_qparams_weight_only_qconfig_4bit",
    "freeze_bn_stats",
    "from_torch_ao",
    "fuse_fx",
    "get_default_qat_qconfig",
    "get_default_qat_qconfig_mapping",
    "get_default_qconfig",
    "get_default_qconfig_mapping",
    "graph_diff",
    "int3_dynamic_qconfig",
    "int4_dynamic_qconfig",
    "int16_dynamic_qconfig",
    "kernel_info",
    "load",
    "load_torch_ao",
    "per_channel_dynamic_qconfig",
    "per_tensor_dynamic_qconfig",
    "prepare_fx",
    "prepare_qat_fx",
    "profile",
    "quantize_dynamic",
    "save",
    "sensitivity",
    "smooth_fx",
    "suggest_mapping",
    "to_onnx",
    "uint4_weight_only_qconfig",
    "update_bn_stats",
]


def __getattr__(name: str) -> Any:
    """Return what is loaded on use only; for a name of torch.ao's, say what takes its place."""
    if name in ("from_torch_ao", "load_torch_ao"):
        way_over = importlib.import_module("fxquant.torch_ao.load")
        globals().update(from_torch_ao=way_over.from_torch_ao, load_torch_ao=way_over.load_torch_ao)
        return globals()[name]
    if name not in _MOVED:
        raise AttributeError(f"module 'fxquant' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
    message = f"fxquant has no {name}, which is torch.ao's: {_MOVED[name]}"
    if sys._getframe(1).f_code.co_name == "_handle_fromlist":  # `from fxquant import name` asks here first
        raise MovedImportError(message)
    raise MovedNameError(message)
