import copy
import dataclasses
import io

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import fxquant
from fxquant import DivergedError, FakeQuantize, default_qat_qconfig
from fxquant.ranges import Fixed, MinMax, MovingAverage

SPEC = default_qat_qconfig.activation


def with_range(way, qmax=255):
    return FakeQuantize(dataclasses.replace(SPEC, range=way, qmax=qmax), "'x'")


def test_the_range_follows_the_batches():
    module = with_range(MovingAverage(0.25))
    module(torch.tensor([-1.0, 2.0]))
    assert (module.low, module.high) == (-1, 2)  # the first batch's
    module(torch.tensor([-3.0, 6.0]))
    assert (module.low, module.high) == (-1.5, 3)
    module(torch.tensor([1.0, 2.0]))
    assert (module.low, module.high) == (-1.125, 2.75)  # 0 is in every range


def test_a_least_and_greatest_value_only_grow():
    module = with_range(MinMax())
    for batch in ([-1.0, 2.0], [-0.5, 3.0], [0.0, 1.0]):
        module(torch.tensor(batch))
    assert (module.low, module.high) == (-1, 3)


def test_a_fixed_range_stays():
    module = with_range(Fixed(0.0, 1.0))
    assert module.has_seen
    module(torch.tensor([-3.0, 3.0]))
    assert (module.low, module.high) == (0, 1)


def test_few_levels_clip_what_lies_far_out():
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu()
    module = with_range(MovingAverage(), qmax=3)
    module(values)
    error = (module.eval()(values) - values).square().mean()
    assert module.high < 0.7 * values.max()
    wide = with_range(Fixed(0.0, float(values.max())), qmax=3)
    assert error < 0.6 * (wide(values) - values).square().mean()


def test_few_levels_compile_as_one_graph():
    plain, x = with_range(MovingAverage(), qmax=3), torch.randn(50)
    twin = copy.deepcopy(plain)
    assert torch.equal(torch.compile(twin, backend="eager", fullgraph=True)(x), plain(x))
    assert torch.equal(twin.high, plain.high)


@pytest.mark.parametrize("why", ["eval", "fake quantization off", "observer off"])
def test_a_range_rests(why):
    module = with_range(MovingAverage())
    module(torch.tensor([-1.0, 2.0]))
    before = copy.deepcopy(module.state_dict())
    if why == "eval":
        module.eval()
    else:
        module.apply(fxquant.disable_fake_quant if why == "fake quantization off" else fxquant.disable_observer)
    module(torch.tensor([-5.0, 5.0]))
    after = module.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("low", "high", "count"))


def test_off_means_float():
    module, x = with_range(MovingAverage()), torch.randn(100)
    assert not torch.equal(module(x), x)
    module.apply(fxquant.disable_fake_quant)
    assert module(x) is x
    module.apply(fxquant.enable_fake_quant)
    assert not torch.equal(module(x), x)


def test_before_any_batch_eval_is_float():
    module, x = with_range(MovingAverage()).eval(), torch.randn(100)
    assert module(x) is x
    assert not module.has_seen


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value):
    module = with_range(MovingAverage())
    module(torch.ones(3))
    with pytest.raises(DivergedError, match=f"'x' became {'NaN' if value != value else 'infinite'}"):
        module(torch.tensor([1.0, value]))
    assert module.high == 1  # as it was


def test_a_range_that_is_not_finite_is_named():
    module = with_range(MovingAverage())
    module.count.fill_(1.0)
    module.high.fill_(float("nan"))
    with pytest.raises(DivergedError, match="the range of 'x'"):
        module.calculate_qparams()


def test_its_state_is_tensors_of_one_shape():
    module = with_range(MovingAverage())
    fresh = {name: tensor.shape for name, tensor in module.state_dict().items()}
    module(torch.randn(5))
    module.apply(fxquant.disable_observer)
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == fresh
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = with_range(MovingAverage())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.high, module.high)
    assert not other.observes
    assert other.rounds


def test_a_float_models_state_changes_nothing():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), with_range(MovingAverage()))
    module(torch.randn(3, 2))
    high = module[1].high.clone()
    module.load_state_dict(torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict())
    assert torch.equal(module[1].high, high)


def test_half_a_state_is_an_error():
    module = with_range(MovingAverage())
    state = module.state_dict()
    del state["low"]
    with pytest.raises(RuntimeError, match="low"):
        module.load_state_dict(state)


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_average_of_weights_keeps_the_ranges(use_buffers):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), with_range(MovingAverage()))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)
    for _ in range(3):
        model(torch.randn(100, 2))
        average.update_parameters(model)
    assert average.module[1].has_seen
    if not use_buffers:
        assert torch.equal(average.module[1].high, model[1].high)
    x = torch.randn(50, 2)
    assert not torch.equal(average.eval()(x), average.module[0](x))


def test_a_checkpoint_that_is_computed_again_counts_once():
    for use_reentrant in (False, True):
        module, x = with_range(MovingAverage(0.5)), torch.randn(20, requires_grad=True)
        checkpoint(lambda x, module=module: module(x).square(), x, use_reentrant=use_reentrant).sum().backward()
        assert module.count == 1


def test_a_relu_before_it_is_seen_as_one():
    plain, absorbed = with_range(MovingAverage()), with_range(MovingAverage())
    absorbed.rectifies = "relu"
    for seed in range(3):
        x = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(absorbed(x), plain(x.relu()))
    assert torch.equal(absorbed.high, plain.high)
    assert absorbed.low == 0
    absorbed.apply(fxquant.disable_fake_quant)
    assert torch.equal(absorbed(x), x.relu())


def test_numbers_move_a_range_as_tensors_do(monkeypatch):
    quick, plain = with_range(MovingAverage(0.3)), with_range(MovingAverage(0.3))
    monkeypatch.setattr(plain, "_is_plain", lambda: False)
    for seed in range(20):
        x = torch.randn(5, generator=torch.Generator().manual_seed(seed))
        quick(x)
        plain(x)
    assert torch.equal(quick.low, plain.low)
    assert torch.equal(quick.high, plain.high)
