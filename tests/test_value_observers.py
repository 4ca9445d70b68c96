"""Observers of values: what they remember of batches, and the ranges that they choose."""

import copy

import pytest
import torch

from fxquant import ops
from fxquant.errors import CalibrationError, QConfigError
from fxquant.ranges import RANGES, Fixed, LeastError, MinMax, MovingAverage, Percentile, range_from_dict
from fxquant.spec import TensorSpec
from fxquant.value_observers import BINS, InputMean, make_value_observer


def observer(way=None, qmax=255):
    return make_value_observer(TensorSpec(dtype="uint8", qmin=0, qmax=qmax, axis="tensor", range=way))


def seen(way, *batches, qmax=255):
    measuring = observer(way, qmax)
    for batch in batches:
        assert measuring(batch) is batch
    return measuring


def chosen(measuring):
    return tuple(map(float, measuring.choose()))


def normal(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("way", [MinMax(), MovingAverage(0.5), Percentile(99.0), LeastError(), Fixed(-1.0, 2.0)])
def test_a_way_is_told_and_read_again(way):
    assert range_from_dict(way.to_dict()) == way
    assert RANGES[type(way).__name__] is type(way)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: MovingAverage(0), "MovingAverage.constant is above 0 and at most 1, got 0"),
        (lambda: Percentile(101), "Percentile.percent is above 50 and at most 100, got 101"),
        (lambda: Fixed(1.0, 2.0), r"Fixed range holds 0 and more, got \[1.0, 2.0\]"),
    ],
)
def test_a_way_that_makes_no_sense_is_refused(make, told):
    with pytest.raises(QConfigError, match=told):
        make()


def test_min_and_max_are_of_all_batches_and_zero():
    assert chosen(seen(MinMax(), torch.tensor([1.0, 2.0]), torch.tensor([[-3.0]]))) == (-3, 2)
    assert chosen(seen(MinMax(), torch.tensor([1.0, 2.0]))) == (0, 2)


def test_a_moving_average_moves_by_its_constant():
    assert chosen(seen(MovingAverage(0.25), torch.tensor([-4.0, 8.0]), torch.tensor([-8.0, 4.0]))) == (-5, 7)


def test_what_is_not_finite_is_left_out():
    batch = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0, -2.0])
    for way in (MinMax(), LeastError(), Percentile(100.0)):
        assert chosen(seen(way, batch)) == pytest.approx((-2, 1), rel=0.05)


def test_bins_are_joined_where_a_batch_goes_beyond_them_and_no_value_is_lost():
    batches = [normal(1000), 50 * normal(1000, 1), -900 * normal(10, 2).abs(), 1e-3 * normal(1000, 3)]
    measuring = seen(LeastError(), *batches)
    assert int(measuring.counts.sum()) == 3010
    edges = (torch.arange(BINS + 1) + int(measuring.first)) * float(measuring.width)
    every = torch.cat(batches)
    for at in (0, 300, 1500, BINS):
        assert int(measuring.counts[:at].sum()) == int((every < edges[at]).sum())


def test_batches_of_one_kind_give_a_range_however_they_are_cut():
    every = normal(6000)
    assert chosen(seen(LeastError(), every)) == pytest.approx(chosen(seen(LeastError(), *every.split(700))), rel=0.03)


@pytest.mark.parametrize("qmax", [255, 15])
def test_the_least_error_is_less_than_other_ranges_give(qmax):
    values = normal(20000) ** 3
    measuring = seen(LeastError(), values, qmax=qmax)

    def error(scale, zero_point):
        q = (values / scale).round().add(zero_point).clamp(0, qmax)
        return float(((q - zero_point) * scale - values).square().sum())

    ours = error(*measuring.calculate_qparams())
    whole = error(*seen(MinMax(), values, qmax=qmax).calculate_qparams())
    assert ours < {255: 0.97, 15: 0.5}[qmax] * whole
    for factor in (0.8, 1.25):
        scale, zero_point = measuring.calculate_qparams()
        assert ours < error(scale * factor, zero_point)


def test_a_percentile_leaves_out_as_many_on_each_side():
    values = torch.linspace(-1, 1, 20001)
    assert chosen(seen(Percentile(90.0), values)) == pytest.approx((-0.9, 0.9), abs=2e-3)
    assert chosen(seen(Percentile(90.0), values.abs())) == pytest.approx((0.0, 0.9), abs=2e-3)


def test_a_fixed_range_needs_no_data():
    scale, zero_point = observer(Fixed(0.0, 1.0)).calculate_qparams()
    assert (float(scale), int(zero_point)) == (pytest.approx(1 / 255), 0)


def test_scales_are_those_of_one_token():
    scale, zero_point = seen(MinMax(), torch.tensor([-1.0, 3.0])).calculate_qparams()
    assert (float(scale), int(zero_point)) == (pytest.approx(4 / 255), 64)
    assert (scale.dtype, zero_point.dtype, scale.shape) == (torch.float32, torch.int32, ())
    scale, zero_point = seen(MinMax(), torch.zeros(3)).calculate_qparams()
    assert (float(scale), int(zero_point)) == (1, 0)


def test_nothing_seen_is_an_error():
    for measuring in (observer(), seen(MinMax(), torch.zeros(0, 3))):
        with pytest.raises(CalibrationError, match="ValueObserver has seen no value yet; run calibration data through"):
            measuring.calculate_qparams()


def test_a_copy_goes_on_by_itself():
    measuring = seen(LeastError(), normal(100))
    before = measuring.counts.clone()
    twin = copy.deepcopy(measuring)
    twin(10 * normal(100))
    assert torch.equal(measuring.counts, before)
    assert not torch.equal(twin.counts, before)


def test_means_are_those_of_each_channel():
    measuring = InputMean(1)
    a, b = normal(60).view(2, 3, 10), normal(15, 1).view(1, 3, 5)
    assert measuring(a) is a
    measuring(b)
    measuring(torch.full((1, 3, 2), float("nan")))
    every = torch.cat([a.movedim(1, 0).flatten(1), b.movedim(1, 0).flatten(1)], 1)
    assert torch.allclose(measuring.total / measuring.count, every.double().mean(1), atol=1e-6)


def test_counts_are_those_of_the_whole_parts(monkeypatch):
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 4
    x[0, :4] = torch.tensor([float("nan"), float("inf"), -float("inf"), 2047.0 / 150])
    place = x.mul(150.0).add(1024.0).flatten().tolist()
    expected = torch.zeros(2048, dtype=torch.float64)
    for value in place:
        if 0 <= value < 2048:
            expected[int(value)] += 1
    monkeypatch.setattr(ops, "_COUNTED", 700)  # in parts
    assert torch.equal(ops.histogram(x, 150.0, 1024.0), expected)
    monkeypatch.setattr(ops, "_native_histogram", None)
    assert torch.equal(ops.histogram(x, 150.0, 1024.0), expected)
