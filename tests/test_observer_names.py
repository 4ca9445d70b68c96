"""torch.ao's names of observers: the specs that they stand for."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxquant
from fxquant import QConfig, QConfigError, QConfigMapping, convert_fx, prepare_fx
from fxquant.ranges import Fixed, LeastError, MinMax, MovingAverage


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


@pytest.mark.parametrize(("options", "named"), [({"foo": 1}, "'foo'"), ({"ch_axis": 1}, "ch_axis=1; channels are")])
def test_what_has_no_meaning_here_is_an_error(options, named):
    with pytest.raises(QConfigError, match=f"PerChannelMinMaxObserver does not take {named}"):
        fxquant.PerChannelMinMaxObserver.with_args(**options)


@pytest.mark.parametrize("backend", ["x86", "fbgemm", "onednn", "qnnpack"])
def test_every_backend_gives_the_static_default(backend):
    assert fxquant.get_default_qconfig_mapping(backend) == fxquant.default_static_qconfig_mapping()
    assert fxquant.get_default_qconfig(backend) is fxquant.default_qconfig is fxquant.default_static_qconfig


@pytest.mark.parametrize("get", [fxquant.get_default_qconfig, fxquant.get_default_qconfig_mapping])
def test_another_backend_is_an_error_that_lists_them(get):
    with pytest.raises(QConfigError, match=r"no backend 'x68'; there are x86, fbgemm, onednn, qnnpack"):
        get("x68")


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
