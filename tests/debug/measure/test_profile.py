"""profile: milliseconds by a clock that only the modules move, and bytes."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxquant import (
    ExampleInputsError,
    ModelStateError,
    ShapeError,
    fuse_fx,
    kernel_info,
    profile,
    quantize_dynamic,
)
from fxquant.debug.measure.profile import _Kernels
from fxquant.graph.edit import byte_count
from fxquant.nn import DynamicQuantizedLinear
from fxquant.ops.register import Kernel
from tests.samples import Call, WordLM, lm_inputs, prepare, quantize
from tests.test_laws import same_snapshot, snapshot


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what the test has modules take."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def takes(kind, *rounds_ms):
        """Have each call of a kind of module take so long, the rounds one after another."""
        times, forward = iter(rounds_ms), kind.forward

        def slow(self, *args, **kwargs):
            now[0] += next(times) / 1000
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", slow)

    return takes


def by_path(found):
    return {row.path: row for row in found.rows}


def test_medians_of_the_rounds_after_the_first(clock):
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Dropout()).eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    clock(DynamicQuantizedLinear, 1000, 1, 9, 2)
    clock(nn.Dropout, 1000, 30, 30, 10)
    found = profile(quantized, x, rounds=3)
    assert by_path(found)["0"].ms == pytest.approx(2)
    assert by_path(found)["elsewhere"].ms == pytest.approx(30)
    assert found.ms == pytest.approx(31)  # of 31, 39, 12
    assert found.rounds == 3
    assert math.isnan(found.float_ms)


def test_float_beside_quantized(clock):
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    clock(DynamicQuantizedLinear, *[2] * 4)
    clock(nn.Linear, *[6] * 4)
    found = profile(quantized, (x,), float_model=model, rounds=3)
    row = by_path(found)["0"]
    assert (row.ms, row.float_ms, row.speedup) == pytest.approx((2, 6, 3))
    assert (found.ms, found.float_ms) == pytest.approx((2, 6))
    assert "a call: 2.000 ms, float 6.000 ms, 3.0× as fast" in str(found)


def test_a_user_s_hooks_count_as_elsewhere(clock):
    class Slow:
        def run(self):
            pass

        forward = run

    slow, before = Slow(), Slow()
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    model[0].register_forward_hook(lambda *_: slow.forward())
    model[0].register_forward_pre_hook(lambda *_: before.forward())
    quantized = quantize(model, x)
    clock(Slow, *[8] * 4)
    clock(DynamicQuantizedLinear, *[2] * 2)
    rows = by_path(profile(quantized, x, rounds=1))
    assert (rows["0"].ms, rows["elsewhere"].ms) == pytest.approx((2, 16))


def test_a_site_that_is_never_called_says_so():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x)

    quantized = quantize_dynamic(Idle().eval(), {nn.Linear})
    found = profile(quantized, torch.randn(2, 4), rounds=1)
    (line,) = [line for line in str(found).splitlines() if line.startswith("b ")]
    assert re.split(r"\s{2,}", line) == ["b", "nn.Linear", "never called", "48 B"]  # int8 weight, float scale and bias


def test_figures_of_a_busy_machine_are_called_so(clock):
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Dropout()).eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    clock(DynamicQuantizedLinear, 1, 1, 1, 9)
    clock(nn.Dropout, 1, 9, 1, 1)
    assert "the sites add up to 2.000 ms: the machine was busy with other work; measure again" in str(
        profile(quantized, x, rounds=3)
    )  # medians of 1, 1, 9 and of 9, 1, 1, but of 10, 2, 10 in all


def test_calls_of_a_shared_module_add_up(clock):
    shared, x = nn.Linear(4, 4), torch.randn(2, 4)
    quantized = quantize(nn.Sequential(shared, nn.Tanh(), shared), x)
    clock(DynamicQuantizedLinear, *[5] * 4)
    row = by_path(profile(quantized, x, rounds=1))["0"]
    assert (row.calls, row.ms) == (2, pytest.approx(10))


def test_functional_calls_are_sites_too():
    model, x = Call(F.linear, 6, 4).eval(), torch.randn(2, 4)
    row = by_path(profile(quantize(model, x), x, float_model=model))["weight"]
    assert (row.call, row.calls) == ("linear", 1)
    assert row.ms > 0
    assert row.float_ms > 0
    assert (row.bytes, row.float_bytes) == (6 * 4 + 6 * 4, 6 * 4 * 4)


def test_bytes_of_sites_and_of_the_rest():
    model = nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)).eval()
    x = torch.randn(2, 8)
    quantized = quantize(model, x)
    found = profile(quantized, x, float_model=model, rounds=1)
    rows = by_path(found)
    assert (rows["0"].bytes, rows["0"].float_bytes) == (4 * 8 + 4 * 4 + 4 * 4, 4 * 4 * 8 + 4 * 4)
    assert (rows["elsewhere"].bytes, rows["elsewhere"].float_bytes) == (4 * 4 * 2, 4 * 4 * 2)
    assert (found.bytes, found.float_bytes) == (byte_count(quantized), byte_count(model))


def test_tied_weights_leave_nothing_negative_elsewhere():
    model = WordLM(ninp=8, nhid=8, tie=True).eval()
    found = profile(quantize(model, *lm_inputs(model)), lm_inputs(model), float_model=model, rounds=1)
    assert (by_path(found)["elsewhere"].bytes, by_path(found)["elsewhere"].float_bytes) == (0, 0)


def test_threads_and_kernels_are_stated():
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    torch.set_num_threads(2)
    found = profile(quantized, x, rounds=1)
    assert found.threads == 2
    assert found.kernels == (f"{kernel_info().isa} kernels" if kernel_info().isa else "plain torch, no native kernels")
    assert re.search(r"medians of 1 rounds?; 2 threads, ", str(found))


@pytest.mark.parametrize("make", [quantize, prepare, lambda model, *_: quantize_dynamic(model)])
def test_neither_model_is_changed(make):
    model, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(inplace=True)).eval(), torch.randn(3, 4)
    made = make(model, x)
    before = snapshot(model), snapshot(made)
    profile(made, x, float_model=model, rounds=2)
    with pytest.raises((RuntimeError, ShapeError), match=r"mat1 and mat2|takes x of shape"):
        profile(made, torch.randn(3, 5))
    assert same_snapshot(before[0], snapshot(model))
    assert same_snapshot(before[1], snapshot(made))


def test_each_round_gets_the_inputs_as_they_were_given(monkeypatch):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.mul_(2))

    model, x = Model().eval(), torch.ones(1, 4)
    quantized = quantize(model, x)
    seen, forward = [], DynamicQuantizedLinear.forward
    monkeypatch.setattr(
        DynamicQuantizedLinear, "forward", lambda self, x: (seen.append(x.clone()), forward(self, x))[1]
    )
    profile(quantized, x, rounds=2)
    assert all(torch.equal(x, torch.full((1, 4), 2.0)) for x in seen)
    assert torch.equal(x, torch.ones(1, 4))


def test_the_slowest_comes_first_and_empty_columns_are_left_out():
    model = WordLM().eval()
    found = profile(quantize(model, *lm_inputs(model)), lm_inputs(model), rounds=1)
    assert [row.ms for row in found.rows] == sorted((row.ms for row in found.rows), reverse=True)
    assert "float" not in str(found)
    beside = profile(quantize(model, *lm_inputs(model)), lm_inputs(model), float_model=model, rounds=1)
    assert "float ms" in str(beside)
    assert max(map(len, str(beside).splitlines())) <= 100


def test_what_cannot_be_profiled_is_an_error():
    model, x = nn.Sequential(nn.Linear(4, 3)).eval(), torch.randn(3, 4)
    with pytest.raises(ModelStateError, match=r"got Sequential; the float model goes beside it"):
        profile(model, x)
    with pytest.raises(ModelStateError, match="profile needs the result of prepare_fx"):
        profile(fuse_fx(model), x)
    with pytest.raises(ModelStateError, match=r"times calls on the CPU.*model\.cpu\(\)"):
        profile(quantize(model, x).to("meta"), x)
    with pytest.raises(ExampleInputsError, match="at least one round, got rounds=0"):
        profile(quantize(model, x), x, rounds=0)
    with pytest.raises(ExampleInputsError, match="does not fit forward"):
        profile(quantize(model, x), (x, x))
    with pytest.raises(ModelStateError, match="from another model"):
        profile(quantize(model, x), x, float_model=nn.Identity().eval())


def test_kernels_are_those_that_ran():
    model = WordLM().eval()
    inputs = lm_inputs(model)
    isa = kernel_info().isa or "plain torch"
    rows = by_path(profile(quantize(model, *inputs), inputs, rounds=1))
    assert {path: row.kernel for path, row in rows.items()} == {
        "encoder": f"embedding ({isa})", "rnn": f"lstm ({isa})", "decoder": f"linear ({isa})", "elsewhere": "",
    }  # fmt: skip


def test_what_the_library_does_not_take_runs_in_plain_torch(monkeypatch):
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    quantized = quantize(model, x)
    monkeypatch.setattr(Kernel, "takes", lambda *_: False)
    found = profile(quantized, x, rounds=1)
    assert by_path(found)["0"].kernel == "linear (plain torch)"
    assert by_path(found)["0"].label == ("linear" if kernel_info().isa is None else "linear (plain torch)")


def test_what_runs_the_kernels_is_said_once():
    model, x = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 4)).eval(), torch.randn(2, 8)
    text = str(profile(quantize(model, x), x, rounds=1))
    assert text.count(kernel_info().isa or "plain torch") == 1
    assert "(" not in text


def test_a_functional_has_a_kernel_and_a_float_site_none():
    model, x = Call(F.linear, 4, 6).eval(), torch.randn(2, 6)
    isa = kernel_info().isa or "plain torch"
    prepared = prepare(model, x)
    assert by_path(profile(quantize(model, x), x, rounds=1))["weight"].kernel == f"linear ({isa})"
    assert by_path(profile(prepared, x, rounds=1))["weight"].kernel == ""


def test_a_user_s_operator_is_named_with_its_library():
    class Row(nn.Linear):
        def forward(self, x):
            return torch.ops.fxquant_test_profile.twice(super().forward(x))

    torch.library.define("fxquant_test_profile::twice", "(Tensor x) -> Tensor")
    torch.library.impl("fxquant_test_profile::twice", "CPU", lambda x: 2 * x)
    site, x = Row(3, 3).eval(), torch.randn(2, 3)
    with _Kernels([site]) as seen, torch.no_grad():
        site(x)
    assert [list(names) for names in seen.names] == [[("fxquant_test_profile.twice", "")]]
    assert not site._forward_hooks
    assert not site._forward_pre_hooks
