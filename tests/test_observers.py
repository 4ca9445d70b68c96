"""Observers: pass-throughs that remember a range."""

import copy

import pytest
import torch

from fxquant import (
    GroupMinMaxObserver,
    LeastErrorObserver,
    MinMaxObserver,
    PerChannelMinMaxObserver,
    QConfig,
    QConfigError,
    ShapeError,
    TensorSpec,
    float_qparams_weight_only_qconfig_4bit,
    uint4_weight_only_qconfig,
)
from fxquant.numerics import dequantize
from fxquant.observers import Observer
from tests.samples import Call, everything, quantize

X = torch.tensor([[-1.0, 4.0], [2.0, 3.0]])


@pytest.mark.parametrize("kind", [MinMaxObserver, PerChannelMinMaxObserver])
def test_it_returns_the_very_tensor(kind):
    assert kind()(X) is X


def test_min_max_of_the_whole_tensor():
    observer = MinMaxObserver()
    observer(X)
    assert (observer.min_val.tolist(), observer.max_val.tolist()) == ([-1], [4])


def test_min_max_per_channel():
    observer = PerChannelMinMaxObserver()
    observer(X)
    assert (observer.min_val.tolist(), observer.max_val.tolist()) == ([-1, 2], [4, 3])


def test_ranges_grow_over_several_tensors():
    observer = PerChannelMinMaxObserver()
    observer(X)
    observer(X * 2)
    observer(X / 2)
    assert (observer.min_val.tolist(), observer.max_val.tolist()) == ([-2, 1], [8, 6])


@pytest.mark.parametrize("kind", [MinMaxObserver, PerChannelMinMaxObserver, GroupMinMaxObserver, LeastErrorObserver])
def test_an_empty_batch_says_nothing(kind):
    observer = kind()
    observer(torch.empty(2, 0))
    assert observer.min_val.numel() == 0
    observer(X)
    before = observer.min_val.clone(), observer.max_val.clone()
    observer(torch.empty(0, 2))
    assert torch.equal(observer.min_val, before[0])
    assert torch.equal(observer.max_val, before[1])


@pytest.mark.parametrize("sizes", [[1, 6], [3, 4], [2, 2, 3], [7], [5, 0, 2]])
def test_the_range_of_a_tensor_does_not_depend_on_how_it_comes_in_batches(sizes):
    x, observer = torch.randn(7, 5), MinMaxObserver()
    for batch in x.split(sizes):
        observer(batch)
    assert (observer.min_val, observer.max_val) == (x.min(), x.max())
    assert [part.shape for part in observer.calculate_qparams()] == [(1,), (1,)]


@pytest.mark.parametrize("kind", [PerChannelMinMaxObserver, GroupMinMaxObserver, LeastErrorObserver])
def test_other_channels_than_those_seen_are_an_error(kind):
    observer = kind()
    observer(torch.randn(2, 8))
    with pytest.raises(ShapeError, match=rf"{kind.__name__} measures per .* shape \(2.*, got a tensor of \(3"):
        observer(torch.randn(3, 8))


def test_a_weight_that_was_seen_is_not_measured_again(monkeypatch):
    observer, weight = PerChannelMinMaxObserver(), torch.randn(3, 8)
    plain = observer.quantize(weight)
    observer(weight)
    monkeypatch.setattr(observer, "measure", None)
    assert all(torch.equal(a, b) for a, b in zip(observer.quantize(weight).tensors[:2], plain.tensors[:2], strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda o, w: w.data.mul_(2),
        lambda o, w: w.data[0].fill_(9),
        lambda o, w: o(w * 2),
        lambda o, w: o.half(),
        lambda o, w: o.double(),
    ],
    ids=["data", "an entry", "another seen", "half", "double"],
)
def test_a_weight_that_changed_since_is_measured_anew(change):
    observer, weight = PerChannelMinMaxObserver(), torch.randn(3, 8)
    observer(weight)
    change(observer, weight)
    found, plain = (o.quantize(weight) for o in (observer, PerChannelMinMaxObserver()))
    assert torch.equal(found.values, plain.values)
    assert torch.equal(found.scale, plain.scale)


def test_observing_the_same_again_changes_nothing():
    observer = PerChannelMinMaxObserver()
    observer(X)
    before = observer.calculate_qparams()
    observer(X)
    assert all(torch.equal(a, b) for a, b in zip(before, observer.calculate_qparams(), strict=True))


def test_qparams_follow_from_the_range():
    observer = PerChannelMinMaxObserver()
    observer(torch.tensor([[-1.27, 1.0], [2.54, 0.0]]))
    scale, zero_point = observer.calculate_qparams()
    assert torch.allclose(scale, torch.tensor([0.01, 0.02]), rtol=2**-23, atol=0)
    assert zero_point.tolist() == [0, 0]


def test_qparams_before_any_tensor_are_an_error():
    with pytest.raises(QConfigError, match="MinMaxObserver has seen no tensor yet"):
        MinMaxObserver().calculate_qparams()


@pytest.mark.parametrize(
    ("kind", "axis"), [(MinMaxObserver, "channel"), (PerChannelMinMaxObserver, "tensor")]
)  # fmt: skip
def test_a_spec_of_another_axis_is_an_error(kind, axis):
    with pytest.raises(
        QConfigError, match=f"{kind.__name__} measures per .*, but its spec is 'int8 symmetric per {axis}"
    ):
        kind(TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis=axis))


def test_its_range_is_not_saved_but_is_copied():
    observer = MinMaxObserver()
    observer(X)
    assert observer.state_dict() == {}
    assert torch.equal(copy.deepcopy(observer).max_val, observer.max_val)


def test_repr_shows_spec_and_range():
    observer = MinMaxObserver()
    assert "range" not in repr(observer)
    observer(X)
    assert "int8 symmetric per tensor, range [-1, 4]" in repr(observer)


def test_half_precision_is_measured_in_float32():
    observer = MinMaxObserver()
    observer(X.half())
    assert observer.min_val.dtype == torch.float32


class ClippingObserver(Observer):
    """A user's own: the range is half as wide, so that outliers saturate."""

    axis = "channel"

    def measure(self, x):
        low, high = super().measure(x)
        return low / 2, high / 2


def test_a_users_observer_decides_the_scales():
    qconfig = everything().global_qconfig
    clipping = QConfig(activation=qconfig.activation, weight=qconfig.weight, weight_observer=ClippingObserver)
    torch.manual_seed(3)
    modules = torch.nn.Sequential(torch.nn.Linear(6, 4)), Call(torch.nn.functional.linear, 4, 6)
    for model in modules:
        x = torch.randn(2, 6)
        plain, clipped = quantize(model, x), quantize(model, x, mapping=everything(clipping), check=False)
        scales = [next(b for n, b in m.named_buffers() if n.endswith("_scale")) for m in (plain, clipped)]
        assert torch.equal(scales[1], scales[0] / 2)


def test_min_max_per_group():
    observer = GroupMinMaxObserver()
    observer(torch.cat((X, torch.zeros(2, 62), -X), dim=1))
    assert observer.min_val.tolist() == [[-1, -4], [0, -3]]
    assert observer.max_val.tolist() == [[4, 1], [3, 0]]


def squared_error(qconfig, weight):
    """Return each row's squared error, from the integers that come out."""
    restored = dequantize(qconfig.quantize_weight(weight))
    return (restored.double() - weight.double()).square().sum(1)


def test_clipped_rows_are_nowhere_worse_than_whole_ones():
    weight = torch.randn(300, 512) * torch.logspace(-15, 15, 300)[:, None]
    ours = squared_error(uint4_weight_only_qconfig, weight)
    whole = squared_error(float_qparams_weight_only_qconfig_4bit, weight)
    assert bool((ours <= whole * (1 + 2**-20)).all())  # sums of 512 float32 squares chose
    assert bool((ours < whole).any())


def test_bell_shaped_rows_come_near_the_best_that_16_even_steps_can_do():
    error = squared_error(uint4_weight_only_qconfig, torch.randn(100, 512)).mean() / 512
    assert error < 0.01154 * 1.05  # Max 1960, table II, for steps that are even about 0; the whole range has 0.0138


def test_the_share_of_the_range_is_the_best_of_all_that_are_tried():
    weight = torch.randn(6, 40)
    low, high = LeastErrorObserver(uint4_weight_only_qconfig.weight).measure(weight)
    best = []
    for row in weight.double():
        errors = {}
        for share in (step / 32 for step in range(18, 33)):
            scale = share * (row.max() - row.min()) / 15
            zero = -share * row.min() / scale
            errors[share] = float((((row / scale + zero).round().clamp(0, 15) - zero) * scale - row).square().sum())
        best.append(min(errors, key=errors.get))
    torch.testing.assert_close(torch.stack((low, high)), torch.tensor(best) * torch.stack(weight.aminmax(dim=1)))


@pytest.mark.parametrize(
    "weight",
    [torch.full((2, 5), 3.0), torch.zeros(2, 5), torch.zeros(0, 5), torch.zeros(2, 0), torch.full((1, 3), torch.nan)],
    ids=["constant", "zero", "no rows", "no columns", "NaN"],
)
def test_rows_with_nothing_to_clip_are_as_without(weight):
    ours = uint4_weight_only_qconfig.quantize_weight(weight)
    plain = float_qparams_weight_only_qconfig_4bit.quantize_weight(weight)
    for a, b in zip(ours.tensors, plain.tensors, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_a_row_is_clipped_by_itself():
    weight = torch.randn(200, 1000)
    whole, one = (uint4_weight_only_qconfig.quantize_weight(part) for part in (weight, weight[150:151]))
    assert all(torch.equal(a[150:151], b) for a, b in zip(whole.tensors, one.tensors, strict=True))


def test_clipping_8_bit_channels_keeps_their_zero():
    weight = torch.randn(3, 50)
    spec = TensorSpec(dtype="int8", qmin=-127, qmax=127, symmetric=True, axis="channel")
    found = QConfig(activation=None, weight=spec, weight_observer=LeastErrorObserver).quantize_weight(weight)
    assert found.zero_point is None
