"""torch.ao's names of observers: the specs that they stand for."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QConfig, QConfigError, QConfigMapping, convert_fx, prepare_fx
from fxquant.ranges import Fixed, LeastError, MinMax, MovingAverage
from fxquant.value_observers import make_value_observer


@pytest.mark.parametrize(
    ("spec", "way"),
    [
        (fxquant.MinMaxObserver.with_args(), MinMax()),
        (fxquant.MinMaxObserver.with_args(dtype=torch.uint8, reduce_range=True, eps=1e-6), MinMax()),
        (fxquant.HistogramObserver.with_args(bins=512), LeastError()),
        (fxquant.MovingAverageMinMaxObserver.with_args(averaging_constant=0.1), MovingAverage(0.1)),
        (fxquant.FixedQParamsObserver.with_args(scale=0.5, zero_point=10), Fixed(-5, 122.5)),
        (fxquant.default_fixed_qparams_range_0to1_observer, Fixed(0, 255 / 256)),
        (fxquant.default_fixed_qparams_range_neg1to1_observer, Fixed(-1, 127 / 128)),
        (fxquant.default_observer, MinMax()),
        (fxquant.default_histogram_observer, LeastError()),
    ],
)
def test_a_name_for_activations_is_a_calibrated_spec(spec, way):
    assert (spec.dtype, spec.qmin, spec.qmax, spec.axis, spec.dynamic) == ("uint8", 0, 255, "tensor", False)
    assert spec.range == way


@pytest.mark.parametrize(
    ("spec", "axis"),
    [
        (fxquant.PerChannelMinMaxObserver.with_args(qscheme=torch.per_channel_symmetric), "channel"),
        (fxquant.MovingAveragePerChannelMinMaxObserver.with_args(ch_axis=0), "channel"),
        (fxquant.MinMaxObserver.with_args(dtype=torch.int8), "tensor"),
        (fxquant.default_weight_observer, "tensor"),
        (fxquant.default_per_channel_weight_observer, "channel"),
    ],
)
def test_a_name_for_weights_is_an_int8_spec(spec, axis):
    assert (spec.dtype, spec.qmin, spec.qmax, spec.symmetric, spec.axis) == ("int8", -127, 127, True, axis)
    assert spec.range is None


def test_fewer_levels_and_dynamic():
    assert fxquant.HistogramObserver.with_args(quant_min=0, quant_max=15).qmax == 15
    assert fxquant.MinMaxObserver.with_args(is_dynamic=True).dynamic


@pytest.mark.parametrize(
    ("observer", "options", "message"),
    [
        ("PerChannelMinMaxObserver", {"foo": 1}, "does not take 'foo'"),
        ("PerChannelMinMaxObserver", {"ch_axis": 1}, "does not take ch_axis=1: a weight's channels are"),
        (
            "PerChannelMinMaxObserver",
            {"dtype": torch.qint32},
            r"does not take dtype=torch\.qint32; there are torch\.qint8",
        ),
        ("MinMaxObserver", {"dtype": torch.float16}, r"does not take dtype=torch\.float16; there are torch\.quint8"),
        ("MinMaxObserver", {"quant_min": 10}, "does not take quant_min=10: an activation's integers begin at 0"),
        ("MinMaxObserver", {"averaging_constant": 0.1}, "does not take 'averaging_constant'"),
        ("HistogramObserver", {"scale": 0.1}, "does not take 'scale'"),
        ("HistogramObserver", {"qscheme": torch.per_channel_affine}, "measures per tensor, .*per_channel_affine"),
        (
            "PerChannelMinMaxObserver",
            {"qscheme": torch.per_tensor_affine},
            "measures per channel, .*per_tensor_affine",
        ),
        ("FixedQParamsObserver", {"scale": 0.1}, "needs zero_point=…"),
        ("LeastErrorObserver", {}, r"write a TensorSpec, and QConfig\(…, weight_observer=LeastErrorObserver\)"),
        ("GroupMinMaxObserver", {}, "weight_observer=GroupMinMaxObserver"),
    ],
)
def test_what_has_no_meaning_here_is_an_error_that_names_it(observer, options, message):
    with pytest.raises(QConfigError, match=f"{observer}.*{message}"):
        getattr(fxquant, observer).with_args(**options)


def test_the_rows_of_embeddings_keep_their_dtype():
    scheme = torch.per_channel_affine_float_qparams
    rows = fxquant.PerChannelMinMaxObserver.with_args(dtype=torch.quint8, qscheme=scheme, ch_axis=0)
    assert rows == fxquant.float_qparams_weight_only_qconfig.weight
    rows = fxquant.PerChannelMinMaxObserver.with_args(dtype=torch.quint4x2, qscheme=scheme)
    assert rows == fxquant.float_qparams_weight_only_qconfig_4bit.weight


@pytest.mark.parametrize("dtype", [torch.qint8, torch.int8])
def test_quantized_dtypes_are_known_by_their_names(dtype):
    assert fxquant.MinMaxObserver.with_args(dtype=dtype) == fxquant.default_weight_observer
    assert fxquant.MinMaxObserver.with_args(dtype=torch.quint8) == fxquant.default_observer


@pytest.mark.parametrize(
    ("activation", "weight", "message"),
    [
        (fxquant.HistogramObserver, fxquant.default_weight_observer, r"write HistogramObserver\.with_args\(\)"),
        (fxquant.default_observer, fxquant.PerChannelMinMaxObserver, r"write PerChannelMinMaxObserver\.with_args\(\)"),
        (fxquant.default_observer, fxquant.default_observer, r"weight has the range of an activation, MinMax\(\)"),
        (
            fxquant.default_weight_observer,
            fxquant.default_weight_observer,
            "activation is calibrated as uint8, got 'int8",
        ),
    ],
)
def test_a_qconfig_refuses_what_would_quantize_nothing(activation, weight, message):
    with pytest.raises(QConfigError, match=message):
        QConfig(activation=activation, weight=weight)


@pytest.mark.parametrize(("scale", "zero_point"), [(1 / 256, 0), (2 / 256, 128), (0.1, 37), (0.003, 255)])
def test_fixed_qparams_are_what_was_given(scale, zero_point):
    spec = fxquant.FixedQParamsObserver.with_args(scale=scale, zero_point=zero_point)
    found, zero = make_value_observer(spec).calculate_qparams()
    assert float(found) == pytest.approx(scale, rel=2**-22)  # float32, one rounding of the span and one of the quotient
    assert int(zero) == zero_point


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_backend_gives_the_static_default(backend):
    assert fxquant.get_default_qconfig_mapping(backend) == fxquant.default_static_qconfig_mapping()
    assert fxquant.get_default_qconfig(backend) is fxquant.default_qconfig is fxquant.default_static_qconfig


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_backend_gives_the_default_for_training(backend):
    assert fxquant.get_default_qat_qconfig_mapping(backend) == fxquant.default_qat_qconfig_mapping()
    for version in (0, 1):
        assert fxquant.get_default_qat_qconfig(backend, version) is fxquant.default_qat_qconfig
    with pytest.raises(QConfigError, match="versions 0 and 1, got 2"):
        fxquant.get_default_qat_qconfig(backend, 2)


GETTERS = [
    *(fxquant.get_default_qconfig, fxquant.get_default_qconfig_mapping),
    *(fxquant.get_default_qat_qconfig, fxquant.get_default_qat_qconfig_mapping),
]


@pytest.mark.parametrize("get", GETTERS)
def test_another_backend_is_an_error_that_lists_them(get):
    with pytest.raises(QConfigError, match=r"no backend 'x68'; there are x86, fbgemm, onednn, qnnpack"):
        get("x68")


@pytest.mark.parametrize("get", [fxquant.get_default_qconfig, fxquant.get_default_qconfig_mapping])
def test_another_version_is_an_error(get):
    with pytest.raises(QConfigError, match="version 0 alone, got 1"):
        get("x86", version=1)


def their_stubs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.nn.quantized import FloatFunctional
        from torch.ao.quantization import DeQuantStub, QuantStub
    return QuantStub, DeQuantStub, FloatFunctional


class Eager(nn.Module):
    """As one writes it for torch.ao's eager mode."""

    def __init__(self, quant, dequant, functional):
        super().__init__()
        self.quant, self.dequant, self.functional = quant(), dequant(), functional()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.a(self.quant(x))
        x = self.functional.add_relu(self.b(x), x)
        x = self.functional.cat([self.functional.mul_scalar(x, 0.5), self.functional.mul(x, x)], dim=1)
        return self.dequant(self.c(x))


@pytest.mark.parametrize("is_theirs", [False, True])
@torch.no_grad()
def test_models_written_for_eager_mode_pass(is_theirs):
    ours = (fxquant.QuantStub, fxquant.DeQuantStub, fxquant.FloatFunctional)
    torch.manual_seed(0)
    model, x = Eager(*(their_stubs() if is_theirs else ours)).eval(), torch.randn(2, 3, 5, 5)
    qconfig = QConfig(
        activation=fxquant.HistogramObserver.with_args(reduce_range=True),
        weight=fxquant.default_per_channel_weight_observer,
    )
    prepared = prepare_fx(model, QConfigMapping().set_global(qconfig), (x,), strict=True)
    quantized = convert_fx(prepared, data=[(x,)])
    error = (quantized(x) - model(x)).norm() / model(x).norm()
    assert error < 0.02
    assert len(quantized.record.sites) == 3


class Residual(nn.Module):
    """A sum by a functional, and its ReLU apart."""

    def __init__(self, functional):
        super().__init__()
        self.a, self.functional, self.relu = nn.Conv2d(8, 8, 1), functional(), nn.ReLU()

    def forward(self, x):
        return self.a(self.relu(self.functional.add(self.a(x), x)))


@torch.no_grad()
def test_their_functional_gives_the_graph_of_ours():
    x, results = torch.randn(2, 8, 5, 5), []
    for functional in (fxquant.FloatFunctional, their_stubs()[2]):
        torch.manual_seed(0)
        prepared = prepare_fx(Residual(functional).eval(), fxquant.get_default_qconfig_mapping(), (x,))
        quantized = convert_fx(prepared, data=[(x,)])
        results.append(([node.name for node in quantized.graph.nodes], quantized(x)))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_functionals_are_their_functions():
    f, x, y = fxquant.FloatFunctional(), torch.randn(2, 2), torch.randn(2, 2)
    assert torch.equal(f.add(x, y), x + y)
    assert torch.equal(f.add_scalar(x, 2.0), x + 2)
    assert torch.equal(f.add_relu(x, y), F.relu(x + y))
    assert torch.equal(f.mul(x, y), x * y)
    assert torch.equal(f.mul_scalar(x, 2.0), x * 2)
    assert torch.equal(f.cat([x, y], 1), torch.cat([x, y], 1))
    assert torch.equal(f.matmul(x, y), x @ y)
    with pytest.raises(RuntimeError, match="used by its methods"):
        f(x)


def test_a_wrapper_gives_what_its_module_gives():
    wrapped, x = fxquant.QuantWrapper(nn.Linear(3, 2)).eval(), torch.randn(4, 3)
    assert torch.equal(wrapped(x), wrapped.module(x))
    assert not wrapped.training or wrapped.module.training
